//! A pod whose guest is in the same process: a scripted agent behind the real
//! protocol, the agent's own meeting point of streams, and a clock that stands still
//! while anything is to be done.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs,
    net::Shutdown,
    os::unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use bulkhead_agent::streams::{BoxStream, Streams};
use bulkhead_agent_api::{
    GREETING,
    agent::{
        ContainerRequest, CreateRequest, Empty, ExecRequest, KillRequest, ProcessRequest,
        ProcessResponse, Stdio as AgentStdio, WaitOomRequest, WaitOomResponse, WaitResponse,
    },
    agent_ttrpc::{Agent as AgentService, create_agent},
};
use futures::stream;
use serde_json::json;
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    sync::watch,
};
use ttrpc::r#async::{Server, TtrpcContext, transport::Listener};

use super::super::*;
use crate::{
    agent::{Agent, Limits},
    events::testing::Told,
    io::{Dialer, Stdio, read_line},
    share::enter_private_namespace,
    statedir::{HostProcess, StateDir},
};

/// No test waits so long, on its own clock, for what will come.
const DEADLINE: Duration = Duration::from_secs(120);

/// A process as the agent has it.
#[derive(Debug, Default)]
struct Model {
    exit: Option<u32>,
    /// Kept open until the process ends.
    streams: Mutex<Vec<BoxStream>>,
}

#[derive(Debug, Default)]
struct Guts {
    calls: Vec<String>,
    held: BTreeSet<&'static str>,
    refused: BTreeMap<&'static str, Code>,
    processes: BTreeMap<(String, String), Model>,
    ooms: BTreeMap<String, u64>,
    /// Somebody else holds the output of what ends.
    shared_output: bool,
    off: bool,
}

/// The agent: does what it is told, unless a test holds a call back.
#[derive(Clone, Debug)]
pub(super) struct Script {
    guts: watch::Sender<Guts>,
    streams: Arc<Streams>,
}

fn refusal(code: Code) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(ttrpc::get_status(code, "refused".to_owned()))
}

impl Script {
    fn new() -> Self {
        Script {
            guts: watch::Sender::default(),
            streams: Streams::new(),
        }
    }

    /// Calls of this name wait from now on.
    pub(super) fn hold(&self, call: &'static str) {
        self.guts.send_modify(|guts| {
            guts.held.insert(call);
        });
    }

    /// They go on.
    pub(super) fn release(&self, call: &'static str) {
        self.guts.send_modify(|guts| {
            guts.held.remove(call);
        });
    }

    /// Calls of this name fail from now on.
    pub(super) fn refuse(&self, call: &'static str, code: Code) {
        self.guts.send_modify(|guts| {
            guts.refused.insert(call, code);
        });
    }

    pub(super) fn calls(&self) -> Vec<String> {
        self.guts.borrow().calls.clone()
    }

    /// Waits until this call has come.
    pub(super) async fn called(&self, call: &str) {
        self.until(|guts| guts.calls.iter().any(|seen| seen == call))
            .await;
    }

    /// Are there no containers in the guest?
    pub(super) async fn emptied(&self) {
        self.until(|guts| guts.processes.is_empty()).await;
    }

    pub(super) fn has(&self, container: &str, exec: &str) -> bool {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.borrow().processes.contains_key(&key)
    }

    /// A process ends by itself.
    pub(super) fn exits(&self, container: &str, exec: &str, status: u32) {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            let process = guts.processes.get_mut(&key).expect("it is there");
            process.exit.get_or_insert(status);
            lock(&process.streams).clear();
        });
    }

    /// A process ends whose output somebody else holds.
    pub(super) fn keeps_output(&self, container: &str, exec: &str, status: u32) {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            guts.shared_output = true;
            let process = guts.processes.get_mut(&key).expect("it is there");
            process.exit.get_or_insert(status);
        });
    }

    /// The OOM killer strikes.
    pub(super) fn oom(&self, container: &str) {
        self.guts.send_modify(|guts| {
            *guts.ooms.entry(container.to_owned()).or_default() += 1;
        });
    }

    async fn until(&self, seen: impl FnMut(&Guts) -> bool) {
        let mut guts = self.guts.subscribe();
        let waited = timeout(DEADLINE, guts.wait_for(seen)).await;
        assert!(waited.is_ok(), "it did not come; calls: {:?}", self.calls());
    }

    async fn enter(&self, call: &'static str, rest: String) -> ttrpc::Result<()> {
        self.guts.send_modify(|guts| {
            guts.calls.push(format!("{call}{rest}"));
        });
        let mut guts = self.guts.subscribe();
        let guts = guts.wait_for(|guts| !guts.held.contains(call)).await;
        match guts.map(|guts| guts.refused.get(call).copied()) {
            Ok(Some(code)) => Err(refusal(code)),
            _ => Ok(()),
        }
    }

    async fn make(&self, container: &str, exec: &str, stdio: &AgentStdio) -> ttrpc::Result<()> {
        let mut streams = Vec::new();
        for id in [stdio.stdout, stdio.stdin, stdio.stderr] {
            if id != 0 {
                streams.push(self.streams.claim(id)?.stream().await?);
            }
        }
        if let Some(stdout) = streams.first_mut() {
            let text = format!("output of {container} {exec}");
            stdout.write_all(text.as_bytes()).await.unwrap();
        }
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            let process = Model {
                exit: None,
                streams: streams.into(),
            };
            assert!(guts.processes.insert(key, process).is_none(), "made twice");
        });
        Ok(())
    }
}

fn label(container: &str, exec: &str) -> String {
    if exec.is_empty() {
        format!(" {container}")
    } else {
        format!(" {container}/{exec}")
    }
}

#[async_trait]
impl AgentService for Script {
    async fn create(&self, _: &TtrpcContext, r: CreateRequest) -> ttrpc::Result<ProcessResponse> {
        self.enter("Create", label(&r.container_id, "")).await?;
        self.make(&r.container_id, "", &r.stdio).await?;
        Ok(ProcessResponse::default())
    }

    async fn start(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("Start", label(&r.container_id, "")).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecRequest) -> ttrpc::Result<ProcessResponse> {
        self.enter("Exec", label(&r.container_id, &r.exec_id))
            .await?;
        self.make(&r.container_id, &r.exec_id, &r.stdio).await?;
        Ok(ProcessResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        self.enter("Wait", label(&r.container_id, &r.exec_id))
            .await?;
        let key = (r.container_id.clone(), r.exec_id.clone());
        let mut guts = self.guts.subscribe();
        let guts = guts
            .wait_for(|guts| guts.processes.get(&key).is_none_or(|it| it.exit.is_some()))
            .await
            .unwrap();
        let process = guts.processes.get(&key);
        Ok(WaitResponse {
            exit_status: process
                .and_then(|process| process.exit)
                .ok_or_else(|| refusal(Code::NOT_FOUND))?,
            oom_kills: guts.ooms.get(&r.container_id).copied().unwrap_or(0),
            output_open: guts.shared_output,
            ..WaitResponse::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        r: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let mut guts = self.guts.subscribe();
        let kills = |guts: &Guts| guts.ooms.get(&r.container_id).copied().unwrap_or(0);
        let guts = guts.wait_for(|guts| kills(guts) > r.seen).await.unwrap();
        Ok(WaitOomResponse {
            oom_kills: kills(&guts),
            ..WaitOomResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        let rest = format!("{} {}", label(&r.container_id, &r.exec_id), r.signal);
        self.enter("Kill", rest).await?;
        let mut found = false;
        self.guts.send_modify(|guts| {
            for ((container, exec), process) in &mut guts.processes {
                // The others of a container do not survive its first process.
                let named = *exec == r.exec_id || r.exec_id.is_empty();
                if *container == r.container_id && named && process.exit.is_none() {
                    found = true;
                    if r.signal == 9 {
                        process.exit = Some(137);
                        lock(&process.streams).clear();
                    }
                }
            }
        });
        if found {
            Ok(Empty::default())
        } else {
            Err(refusal(Code::NOT_FOUND))
        }
    }

    async fn delete(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<Empty> {
        self.enter("Delete", label(&r.container_id, &r.exec_id))
            .await?;
        let key = (r.container_id.clone(), r.exec_id.clone());
        let mut answer = Err(refusal(Code::NOT_FOUND));
        self.guts
            .send_modify(|guts| match guts.processes.get(&key) {
                None => {}
                Some(Model { exit: None, .. }) => answer = Err(refusal(Code::FAILED_PRECONDITION)),
                Some(_) => {
                    let whole = r.exec_id.is_empty();
                    guts.processes.retain(|(container, exec), _| {
                        *container != r.container_id || (*exec != r.exec_id && !whole)
                    });
                    answer = Ok(Empty::default());
                }
            });
        answer
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.enter("Ping", String::new()).await?;
        Ok(Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.enter("Shutdown", String::new()).await?;
        self.guts.send_modify(|guts| guts.off = true);
        Ok(Empty::default())
    }
}

/// The guest: the agent's connection, and a socket for its streams.
pub(super) struct TestGuest {
    agent: Agent,
    dialer: Dialer,
    end: watch::Sender<Option<End>>,
    connection: StdStream,
    _server: Mutex<Server>,
}

impl fmt::Debug for TestGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestGuest").finish_non_exhaustive()
    }
}

impl TestGuest {
    async fn boot(script: &Script, dir: &Path) -> Arc<Self> {
        let _ = fs::remove_file(dir.join("vsock.sock"));
        let listener = StdListener::bind(dir.join("vsock.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let listener = UnixListener::from_std(listener).unwrap();
        let streams = Arc::clone(&script.streams);
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let streams = Arc::clone(&streams);
                tokio::spawn(async move {
                    let line = read_line(&mut stream, 32).await.unwrap();
                    assert_eq!(line, b"CONNECT 1025");
                    let room = streams.room().await;
                    if stream.write_all(b"OK 1\n").await.is_ok() {
                        streams.accept(stream, room);
                    }
                });
            }
        });
        let (ours, theirs) = StdStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        let connection = theirs.try_clone().unwrap();
        let mut theirs = UnixStream::from_std(theirs).unwrap();
        theirs.write_all(GREETING.as_bytes()).await.unwrap();
        let mut server = Server::new()
            .add_listener(Listener::new(stream::iter([Ok(theirs)])))
            .register_service(create_agent(Arc::new(script.clone())));
        server.start().await.unwrap();
        let limits = Limits {
            create: Duration::from_secs(30),
            request: Duration::from_secs(10),
        };
        let agent = Agent::greet(UnixStream::from_std(ours).unwrap(), limits);
        let guest = Arc::new(TestGuest {
            agent: agent.await.unwrap(),
            dialer: Dialer::new(crate::mount::open_dir(dir).unwrap(), "vsock.sock"),
            end: watch::Sender::new(None),
            connection,
            _server: server.into(),
        });
        let (off, mut guts) = (Arc::downgrade(&guest), script.guts.subscribe());
        tokio::spawn(async move {
            let _ = guts.wait_for(|guts| guts.off).await.map(drop);
            if let Some(guest) = off.upgrade() {
                guest.ends(255, "the guest powered off");
            }
        });
        guest
    }

    /// The VM ends.
    pub(super) fn ends(&self, status: u8, reason: &str) {
        self.end.send_if_modified(|end| {
            let first = end.is_none();
            if first {
                *end = Some(End {
                    status,
                    reason: reason.to_owned(),
                    console: Vec::new(),
                });
            }
            first
        });
        self.disconnects();
    }

    /// The agent's connection breaks.
    pub(super) fn disconnects(&self) {
        let _ = self.connection.shutdown(Shutdown::Both);
    }
}

#[async_trait]
impl Guest for TestGuest {
    fn agent(&self) -> &Agent {
        &self.agent
    }

    fn dialer(&self) -> &Dialer {
        &self.dialer
    }

    fn process(&self) -> HostProcess {
        HostProcess::of(std::process::id().cast_signed()).unwrap()
    }

    fn kill(&self) {
        self.ends(137, "the VM was killed");
    }

    fn has_ended(&self) -> Option<End> {
        self.end.borrow().clone()
    }

    async fn ended(&self) -> End {
        let mut end = self.end.subscribe();
        let end = end.wait_for(Option::is_some).await.unwrap();
        end.clone().unwrap()
    }
}

#[derive(Debug)]
struct TestBoots {
    script: Script,
    dir: PathBuf,
    booted: AtomicU32,
    guest: Mutex<Option<Arc<TestGuest>>>,
}

#[async_trait]
impl Boots for TestBoots {
    async fn boot(&self, _: Size, _: i32) -> Result<Arc<dyn Guest>> {
        self.booted.fetch_add(1, Ordering::SeqCst);
        let guest = TestGuest::boot(&self.script, &self.dir).await;
        *lock(&self.guest) = Some(Arc::clone(&guest));
        Ok(guest)
    }
}

/// A pod and all that is around it.
pub(super) struct Bench {
    pub(super) pod: Arc<Pod>,
    pub(super) agent: Script,
    pub(super) told: Told,
    boots: Arc<TestBoots>,
    pub(super) state: StateDir,
    place: PathBuf,
}

/// Runs a test with a pod in a mount namespace of its own; needs root.
pub(super) fn run(test: impl AsyncFnOnce(&Bench) + Send) {
    let place = tempfile::tempdir().unwrap();
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            enter_private_namespace().unwrap();
            let flags = rustix::mount::MountFlags::empty();
            rustix::mount::mount("test", "/run", "tmpfs", flags, None).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .start_paused(true)
                .build()
                .unwrap();
            runtime.block_on(async {
                let bench = Bench::new(place.path());
                test(&bench).await;
                bench.pod.stop().await;
                assert!(!bench.state.exists(), "the state directory is left");
            });
        });
        if let Err(panic) = thread.join() {
            std::panic::resume_unwind(panic);
        }
    });
}

impl Bench {
    fn new(place: &Path) -> Self {
        let namespace = Namespace::new("default").unwrap();
        let state = StateDir::of(&namespace, &crate::names::GroupId::new("pod").unwrap());
        let held = state.take("pod", None).unwrap();
        let share = Share::mount(&state.share()).unwrap();
        let (events, told) = Publisher::kept();
        let agent = Script::new();
        let boots = Arc::new(TestBoots {
            script: agent.clone(),
            dir: state.path().to_owned(),
            booted: AtomicU32::new(0),
            guest: Mutex::default(),
        });
        let pod = Pod::new(Parts {
            namespace,
            config: Config::default(),
            dir: Arc::new(held),
            share,
            events,
            hypervisor: Arc::clone(&boots) as Arc<dyn Boots>,
        });
        Bench {
            pod,
            agent,
            told,
            boots,
            state,
            place: place.to_owned(),
        }
    }

    pub(super) fn guest(&self) -> Arc<TestGuest> {
        let guest = lock(&self.boots.guest);
        Arc::clone(guest.as_ref().expect("a guest was booted"))
    }

    pub(super) fn booted(&self) -> u32 {
        self.boots.booted.load(Ordering::SeqCst)
    }

    /// A request for a container with a bundle of its own.
    pub(super) fn request(&self, id: &str) -> Create {
        let bundle = self.place.join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        Create {
            id: ContainerId::new(id).unwrap(),
            bundle,
            rootfs: Vec::new(),
            stdio: Stdio::default(),
        }
    }

    pub(super) async fn create(&self, id: &str) -> Result<u32> {
        self.pod.create(self.request(id)).await
    }

    /// A container whose first process runs.
    pub(super) async fn running(&self, id: &str) {
        self.create(id).await.unwrap();
        self.start(id).await.unwrap();
    }

    pub(super) async fn start(&self, name: &str) -> Result<u32> {
        self.pod.start(&named(name)).await
    }

    /// Registers an exec.
    pub(super) fn add(&self, name: &str, stdio: Stdio) -> Result<()> {
        let name = named(name);
        let process = json!({"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        let exec = name.exec.expect("an exec");
        self.pod.exec(&name.container, exec, process, stdio)
    }

    /// An exec that runs.
    pub(super) async fn executing(&self, name: &str) {
        self.add(name, Stdio::default()).unwrap();
        self.start(name).await.unwrap();
    }

    pub(super) async fn wait(&self, name: &str) -> u8 {
        let waited = timeout(DEADLINE, self.pod.wait(&named(name))).await;
        waited.expect("it does not end").unwrap().status
    }

    pub(super) async fn kill(&self, name: &str, signal: u32) -> Result<()> {
        self.pod.kill(&named(name), signal, false).await
    }

    pub(super) async fn delete(&self, name: &str) -> Result<u8> {
        let (_, exit) = self.pod.delete(&named(name)).await?;
        Ok(exit.status)
    }

    /// Makes a FIFO.
    pub(super) fn fifo(&self, name: &str) -> String {
        let path = self.place.join(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        path.display().to_string()
    }

    /// Directories of containers on the host.
    pub(super) fn shared(&self) -> usize {
        fs::read_dir(self.state.share()).unwrap().count()
    }

    /// The events whose text contains `word`.
    pub(super) fn told_of(&self, word: &str) -> Vec<String> {
        let mut told = self.told.all();
        told.retain(|event| event.contains(word));
        told
    }
}

/// `container` or `container/exec`.
pub(super) fn named(text: &str) -> ProcessName {
    let (container, exec) = match text.split_once('/') {
        Some((container, exec)) => (container, Some(ExecId::new(exec).unwrap())),
        None => (text, None),
    };
    ProcessName {
        container: ContainerId::new(container).unwrap(),
        exec,
    }
}
