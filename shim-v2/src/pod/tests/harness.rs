//! A pod whose guest is in the same process: a scripted agent behind the real
//! protocol, the agent's own meeting point of streams, and a clock that stands still
//! while anything is to be done.

use std::{
    fmt, fs,
    fs::File,
    net::Shutdown,
    os::{
        fd::BorrowedFd,
        unix::net::{UnixListener as StdListener, UnixStream as StdStream},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
};

use async_trait::async_trait;
use bulkhead_agent_api::{GREETING, agent_ttrpc::create_agent};
use futures::stream;
use serde_json::{Value, json};
use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream},
    sync::watch,
};
use ttrpc::r#async::{Server, transport::Listener};

use super::{
    super::*,
    script::{DEADLINE, Script},
};
use crate::{
    agent::{Agent, Limits},
    carry::Bag,
    config::Config,
    events::testing::Told,
    io::{Dialer, Stdio, StreamHost, read_line, streaming::Hub},
    share::enter_private_namespace,
    statedir::{HostProcess, StateDir},
    vm::{
        self, Size,
        holder::{Holder, Quarters},
    },
};

/// The guest: the agent's connection, and a socket for its streams.
pub(crate) struct TestGuest {
    agent: Agent,
    dialer: Dialer,
    end: watch::Sender<Option<End>>,
    connection: StdStream,
    quarters: Quarters,
    size: Mutex<Size>,
    /// Those that it was given while it ran.
    pub(crate) sizes: Mutex<Vec<Size>>,
    /// Its network interfaces, by the numbers of their devices.
    pub(crate) interfaces: Mutex<BTreeMap<u8, File>>,
    _server: Mutex<Server>,
}

impl fmt::Debug for TestGuest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestGuest").finish_non_exhaustive()
    }
}

impl TestGuest {
    async fn boot(script: &Script, dir: &Path, first: Size) -> Arc<Self> {
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
            size: Mutex::new(first),
            sizes: Mutex::default(),
            interfaces: Mutex::default(),
            quarters: Quarters::new(None, fs::File::open("/proc/self/ns/net").unwrap().into()),
            _server: server.into(),
        });
        let (off, script) = (Arc::downgrade(&guest), script.clone());
        tokio::spawn(async move {
            script.powered_off().await;
            if let Some(guest) = off.upgrade() {
                guest.ends(255, "the guest powered off");
            }
        });
        guest
    }

    /// The VM ends.
    pub(crate) fn ends(&self, status: u8, reason: &str) {
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
    pub(crate) fn disconnects(&self) {
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

    async fn attach(&self, _: File, _: bool) -> Result<u8> {
        Err(Error::Unsupported("A disk"))
    }

    async fn detach(&self, device: u8) -> Result<()> {
        lock(&self.interfaces).remove(&device);
        Ok(())
    }

    async fn attach_interface(&self, tap: File, _: [u8; 6], _: u16) -> Result<u8> {
        let mut all = lock(&self.interfaces);
        let device = (7..9).find(|device| !all.contains_key(device));
        let device = device.ok_or(Error::Unsupported("A third interface"))?;
        all.insert(device, tap);
        Ok(device)
    }

    fn network(&self) -> BorrowedFd<'_> {
        self.quarters.network()
    }

    fn most(&self) -> Size {
        Size {
            vcpus: 4,
            memory_mib: 4_096,
        }
    }

    async fn size(&self) -> Size {
        *lock(&self.size)
    }

    async fn resize(&self, to: Size) -> Result<Size> {
        let to = to.and(self.most());
        if std::mem::replace(&mut *lock(&self.size), to) != to {
            lock(&self.sizes).push(to);
        }
        Ok(to)
    }

    fn hold(&self, label: &str, network: Option<BorrowedFd<'_>>) -> Result<Holder> {
        self.quarters.hold(label, network)
    }

    fn carry(&self, _: &mut Bag) -> std::io::Result<Option<vm::Carried>> {
        Ok(None)
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

    async fn gone(&self) {
        self.ended().await;
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
    async fn boot(&self, shape: Shape, _: i32, _: Option<Place>) -> Result<Arc<dyn Guest>> {
        self.booted.fetch_add(1, Ordering::SeqCst);
        let guest = TestGuest::boot(&self.script, &self.dir, shape.first).await;
        *lock(&self.guest) = Some(Arc::clone(&guest));
        Ok(guest)
    }

    fn unpack(&self, _: vm::Carried) -> Result<Arc<dyn Guest>> {
        Err(Error::Unsupported("Taking over a scripted guest"))
    }
}

/// A pod and all that is around it.
pub(crate) struct Bench {
    pub(crate) pod: Arc<Pod>,
    pub(crate) agent: Script,
    pub(crate) told: Told,
    boots: Arc<TestBoots>,
    pub(crate) state: StateDir,
    /// A directory for what a test needs.
    pub(crate) place: PathBuf,
}

/// Runs a test with a pod in a mount namespace of its own; needs root.
pub(crate) fn run(test: impl AsyncFnOnce(&Bench) + Send) {
    run_with(Config::default(), test);
}

/// The same with other settings.
pub(crate) fn run_with(config: Config, test: impl AsyncFnOnce(&Bench) + Send) {
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
            runtime.spawn(hold_the_clock());
            runtime.block_on(async {
                let bench = Bench::new(place.path(), config);
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

/// Lets ten seconds of the paused clock last 20 ms at least. Where nothing is left to do it
/// goes on to the next limit of time at once, and the end of a stream may still be to come:
/// a process that another test begins has copies of all descriptors for a moment.
async fn hold_the_clock() {
    loop {
        let moment = || std::thread::sleep(Duration::from_millis(20));
        let _ = tokio::task::spawn_blocking(moment).await;
        tokio::time::sleep(Duration::from_secs(10)).await;
    }
}

impl Bench {
    fn new(place: &Path, config: Config) -> Self {
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
        let streams = StreamHost {
            namespace: namespace.clone(),
            mounts: None,
            hub: Hub::new(None),
        };
        let pod = Pod::new(Parts {
            namespace,
            settings: Arc::new(config.into()),
            dir: Arc::new(held),
            share,
            events,
            hypervisor: Arc::clone(&boots) as Arc<dyn Boots>,
            host: Arc::new(Host::here().unwrap()),
            streams,
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

    pub(crate) fn guest(&self) -> Arc<TestGuest> {
        let guest = lock(&self.boots.guest);
        Arc::clone(guest.as_ref().expect("a guest was booted"))
    }

    pub(crate) fn booted(&self) -> u32 {
        self.boots.booted.load(Ordering::SeqCst)
    }

    /// A request for a container with a bundle of its own.
    pub(crate) fn request(&self, id: &str) -> Create {
        self.request_with(id, |_| {})
    }

    /// The same with another specification.
    pub(crate) fn request_with(&self, id: &str, change: impl FnOnce(&mut Value)) -> Create {
        let bundle = self.place.join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        let mut spec = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
            "root": {"path": "rootfs"},
            "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
            "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
        });
        change(&mut spec);
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
        Create {
            id: ContainerId::new(id).unwrap(),
            bundle,
            rootfs: Vec::new(),
            stdio: Stdio::default(),
            options: crate::options::Options::default(),
        }
    }

    pub(crate) async fn create(&self, id: &str) -> Result<u32> {
        self.pod.create(self.request(id)).await
    }

    /// A container whose first process runs.
    pub(crate) async fn running(&self, id: &str) {
        self.create(id).await.unwrap();
        self.start(id).await.unwrap();
    }

    pub(crate) async fn start(&self, name: &str) -> Result<u32> {
        self.pod.start(&named(name)).await
    }

    /// Registers an exec.
    pub(crate) fn add(&self, name: &str, stdio: Stdio) -> Result<()> {
        let name = named(name);
        let process = json!({"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
        let exec = name.exec.expect("an exec");
        self.pod.exec(&name.container, exec, process, stdio)
    }

    /// An exec that runs.
    pub(crate) async fn executing(&self, name: &str) {
        self.add(name, Stdio::default()).unwrap();
        self.start(name).await.unwrap();
    }

    pub(crate) async fn wait(&self, name: &str) -> u8 {
        let waited = timeout(DEADLINE, self.pod.wait(&named(name))).await;
        waited.expect("it does not end").unwrap().status
    }

    pub(crate) async fn kill(&self, name: &str, signal: u32) -> Result<()> {
        self.pod.kill(&named(name), signal, false).await
    }

    pub(crate) async fn delete(&self, name: &str) -> Result<u8> {
        let (_, exit) = self.pod.delete(&named(name)).await?;
        Ok(exit.status)
    }

    /// The pid of a process.
    pub(crate) fn pid(&self, name: &str) -> u32 {
        self.pod.describe(&named(name)).unwrap().process.pid()
    }

    /// Makes a FIFO.
    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.place.join(name);
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
        path.display().to_string()
    }

    /// Directories of containers on the host.
    pub(crate) fn shared(&self) -> usize {
        fs::read_dir(self.state.share()).unwrap().count()
    }

    /// The events whose text contains `word`.
    pub(crate) fn told_of(&self, word: &str) -> Vec<String> {
        let mut told = self.told.all();
        told.retain(|event| event.contains(word));
        told
    }
}

/// `container` or `container/exec`.
pub(crate) fn named(text: &str) -> ProcessName {
    let (container, exec) = match text.split_once('/') {
        Some((container, exec)) => (container, Some(ExecId::new(exec).unwrap())),
        None => (text, None),
    };
    ProcessName {
        container: ContainerId::new(container).unwrap(),
        exec,
    }
}
