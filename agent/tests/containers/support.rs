//! The host's side of the protocol.

mod rootfs;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent::{container::Config, rpc};
use bulkhead_agent_api::{
    GREETING,
    agent::{
        ContainerRequest, CreateRequest, Empty, ExecRequest, KillRequest, ProcessRequest,
        ResizePtyRequest, Stdio, WaitOomRequest, WaitResponse,
    },
    agent_ttrpc::AgentClient,
};
use futures::stream;
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    task::JoinHandle,
    time::timeout,
};
use ttrpc::{
    r#async::{Client, transport::Socket},
    context,
};

/// No test takes this long unless something hangs.
const DEADLINE: Duration = Duration::from_secs(60);

/// The agent's service and a client of it.
pub(crate) struct Host {
    pub client: AgentClient,
    pub directory: TempDir,
    pub rootfs: PathBuf,
    cgroups: PathBuf,
    streams: PathBuf,
    next_id: AtomicU64,
    pub agent: JoinHandle<rpc::End>,
}

/// What a finished process left.
#[derive(Debug)]
pub(crate) struct Ran {
    pub status: u32,
    pub stdout: String,
    pub stderr: String,
    pub oom_killed: bool,
}

/// The agent's program: as it was built, or beside the tests where they were carried to.
fn agent_program() -> PathBuf {
    let built = PathBuf::from(env!("CARGO_BIN_EXE_bulkhead-agent"));
    if built.exists() {
        return built;
    }
    let tests = std::env::current_exe().unwrap();
    tests.with_file_name("bulkhead-agent")
}

/// Runs a test with a host, one at a time, and looks for what it left behind.
pub(crate) fn block_on(test: impl AsyncFnOnce(&mut Host)) {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _turn = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some((cgroups, _enabled)) = cgroup_parent() else {
        eprintln!("skipped: needs root and cgroup v2");
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    runtime.block_on(async {
        let mut host = Host::start(cgroups.clone()).await;
        timeout(DEADLINE, test(&mut host))
            .await
            .expect("the test hangs");
        let left: Vec<_> = fs::read_dir(&cgroups)
            .unwrap()
            .filter_map(Result::ok)
            .filter(|entry| entry.path().is_dir())
            .collect();
        assert!(left.is_empty(), "cgroups left: {left:?}");
    });
    assert_eq!(
        fs::read_to_string("/proc/self/mounts").unwrap(),
        mounts,
        "mounts left"
    );
    fs::remove_dir(cgroups).unwrap();
}

/// Controllers that were enabled for a test.
struct Enabled {
    file: PathBuf,
    names: Vec<String>,
}

impl Enabled {
    /// Those that the root has and does not give to its children.
    fn in_root(root: &Path) -> Self {
        let read = |name: &str| fs::read_to_string(root.join(name)).unwrap_or_default();
        let (all, given) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
        let missing = |name: &&str| !given.split_whitespace().any(|one| one == *name);
        let file = root.join("cgroup.subtree_control");
        let names = all.split_whitespace().filter(missing);
        let names: Vec<_> = names.map(str::to_owned).collect();
        for name in &names {
            fs::write(&file, format!("+{name}")).unwrap();
        }
        Self { file, names }
    }
}

impl Drop for Enabled {
    fn drop(&mut self) {
        for name in &self.names {
            // After a failure a cgroup may be left that uses it.
            let _ = fs::write(&self.file, format!("-{name}"));
        }
    }
}

fn cgroup_parent() -> Option<(PathBuf, Enabled)> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    let mount = mounts
        .lines()
        .find(|line| line.split(' ').nth(2) == Some("cgroup2"))?;
    let root = Path::new(mount.split(' ').nth(1)?);
    if !rustix::process::geteuid().is_root() {
        return None;
    }
    let enabled = Enabled::in_root(root);
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let parent = root.join(format!("bulkhead-test-{}-{number}", std::process::id()));
    fs::create_dir(&parent).unwrap();
    if let Ok(controllers) = fs::read_to_string(parent.join("cgroup.controllers")) {
        let enable: Vec<_> = controllers
            .split_whitespace()
            .map(|c| format!("+{c}"))
            .collect();
        fs::write(parent.join("cgroup.subtree_control"), enable.join(" ")).unwrap();
    }
    Some((parent, enabled))
}

/// A specification as containerd would write it, without a rootfs yet.
pub(crate) fn busybox_spec<const N: usize>(args: [&str; N]) -> Value {
    let caps = [
        "CAP_CHOWN",
        "CAP_DAC_OVERRIDE",
        "CAP_FOWNER",
        "CAP_KILL",
        "CAP_SETGID",
        "CAP_SETUID",
        "CAP_SETPCAP",
        "CAP_NET_BIND_SERVICE",
        "CAP_MKNOD",
    ];
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "user": {"uid": 0, "gid": 0},
            "args": args.as_slice(),
            "env": ["PATH=/bin:/sbin"],
            "cwd": "/",
            "capabilities": {"bounding": caps, "effective": caps, "permitted": caps},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": true
        },
        "root": {"path": "", "readonly": false},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs",
             "options": ["nosuid", "strictatime", "mode=755", "size=65536k"]},
            {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
             "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]},
            {"destination": "/dev/shm", "type": "tmpfs", "source": "shm",
             "options": ["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]},
            {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue",
             "options": ["nosuid", "noexec", "nodev"]},
            {"destination": "/sys", "type": "sysfs", "source": "sysfs",
             "options": ["nosuid", "noexec", "nodev", "ro"]},
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup",
             "options": ["nosuid", "noexec", "nodev", "relatime", "ro"]}
        ],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"},
                {"type": "network"}, {"type": "cgroup"}
            ],
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/sys/firmware"],
            "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/bus"],
            "resources": {"devices": [{"allow": false, "access": "rwm"}]}
        }
    })
}

impl Host {
    async fn start(cgroups: PathBuf) -> Self {
        let directory = TempDir::new_in("/var/tmp").unwrap();
        let rootfs = directory.path().join("rootfs");
        rootfs::make(&rootfs);
        let (ours, theirs) = UnixStream::pair().unwrap();
        let streams = directory.path().join("streams");
        let listener = UnixListener::bind(&streams).unwrap();
        let accepted = stream::unfold(listener, |listener| async {
            let connection = listener.accept().await.map(|(connection, _)| connection);
            Some((connection, listener))
        });
        let helper = agent_program();
        let config = Config {
            helper,
            cgroups: cgroups.clone(),
            shares: vec![rootfs.clone()],
            sockets: directory.path().join("sockets"),
            machine: None,
        };
        let agent = tokio::spawn(async { rpc::serve(config, theirs, accepted).await.unwrap() });
        let mut ours = ours;
        let mut greeting = vec![0; GREETING.len()];
        ours.read_exact(&mut greeting).await.unwrap();
        assert_eq!(greeting, GREETING.as_bytes());
        let client = AgentClient::new(Client::new(Socket::new(ours)));
        Self {
            client,
            directory,
            rootfs,
            cgroups,
            streams,
            next_id: AtomicU64::new(1),
            agent,
        }
    }

    /// A fresh id, for a stream or a container.
    pub(crate) fn id(&self) -> u64 {
        self.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Connects a stream that a request names.
    pub(crate) async fn stream(&self, id: u64) -> UnixStream {
        let mut stream = UnixStream::connect(&self.streams).await.unwrap();
        stream.write_all(&id.to_le_bytes()).await.unwrap();
        stream
    }

    /// Streams for a process with pipes: the request's part and our ends.
    pub(crate) async fn pipes(&self) -> (Stdio, [UnixStream; 3]) {
        let [stdin, stdout, stderr] = [self.id(), self.id(), self.id()];
        let streams = [
            self.stream(stdin).await,
            self.stream(stdout).await,
            self.stream(stderr).await,
        ];
        (
            Stdio {
                stdin,
                stdout,
                stderr,
                ..Default::default()
            },
            streams,
        )
    }

    /// Streams for a process with a terminal.
    pub(crate) async fn terminal(&self, columns: u32, rows: u32) -> (Stdio, [UnixStream; 2]) {
        let [stdin, stdout] = [self.id(), self.id()];
        let streams = [self.stream(stdin).await, self.stream(stdout).await];
        let terminal = true;
        (
            Stdio {
                stdin,
                stdout,
                terminal,
                columns,
                rows,
                ..Default::default()
            },
            streams,
        )
    }

    /// Creates a container of `spec` on the busybox root.
    pub(crate) async fn create(&self, spec: Value, stdio: Stdio) -> ttrpc::Result<String> {
        self.create_filtered(spec, stdio, Vec::new()).await
    }

    /// The same with a system call filter.
    pub(crate) async fn create_filtered(
        &self,
        mut spec: Value,
        stdio: Stdio,
        seccomp_filter: Vec<u8>,
    ) -> ttrpc::Result<String> {
        if spec["root"]["path"] == "" {
            spec["root"]["path"] = self.rootfs.to_str().unwrap().into();
        }
        let container_id = format!("c{}", self.id());
        let request = CreateRequest {
            container_id: container_id.clone(),
            spec: serde_json::to_vec(&spec).unwrap(),
            stdio: Some(stdio).into(),
            seccomp_filter,
            ..Default::default()
        };
        self.client
            .create(context::Context::default(), &request)
            .await?;
        Ok(container_id)
    }

    pub(crate) async fn start_container(&self, id: &str) -> ttrpc::Result<Empty> {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .start(context::Context::default(), &request)
            .await
    }

    pub(crate) async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &Value,
        stdio: Stdio,
    ) -> ttrpc::Result<u32> {
        let request = ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            process: serde_json::to_vec(process).unwrap(),
            stdio: Some(stdio).into(),
            ..Default::default()
        };
        Ok(self
            .client
            .exec(context::Context::default(), &request)
            .await?
            .pid)
    }

    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> ttrpc::Result<WaitResponse> {
        self.client
            .wait(context::Context::default(), &process(id, exec_id))
            .await
    }

    pub(crate) async fn wait_oom(&self, id: &str, seen: u64) -> ttrpc::Result<u64> {
        let request = WaitOomRequest {
            container_id: id.into(),
            seen,
            ..Default::default()
        };
        let answer = self.client.wait_oom(context::Context::default(), &request);
        Ok(answer.await?.oom_kills)
    }

    pub(crate) async fn delete(&self, id: &str, exec_id: &str) -> ttrpc::Result<Empty> {
        self.client
            .delete(context::Context::default(), &process(id, exec_id))
            .await
    }

    pub(crate) async fn close_stdin(&self, id: &str) {
        let request = process(id, "");
        self.client
            .close_stdin(context::Context::default(), &request)
            .await
            .unwrap();
    }

    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> ttrpc::Result<Empty> {
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let request = KillRequest {
            container_id,
            exec_id,
            signal,
            ..Default::default()
        };
        self.client
            .kill(context::Context::default(), &request)
            .await
    }

    pub(crate) async fn kill_all(&self, id: &str, signal: u32) -> ttrpc::Result<Empty> {
        let container_id = id.into();
        let request = KillRequest {
            container_id,
            signal,
            all: true,
            ..Default::default()
        };
        self.client
            .kill(context::Context::default(), &request)
            .await
    }

    pub(crate) async fn resize(&self, id: &str, columns: u32, rows: u32) -> ttrpc::Result<Empty> {
        let container_id = id.into();
        let request = ResizePtyRequest {
            container_id,
            columns,
            rows,
            ..Default::default()
        };
        self.client
            .resize_pty(context::Context::default(), &request)
            .await
    }

    pub(crate) async fn shutdown(&self) -> ttrpc::Result<Empty> {
        self.client
            .shutdown(context::Context::default(), &Empty::default())
            .await
    }

    pub(crate) async fn pids(&self, id: &str) -> Vec<u32> {
        let request = ContainerRequest {
            container_id: id.into(),
            ..Default::default()
        };
        self.client
            .pids(context::Context::default(), &request)
            .await
            .unwrap()
            .pids
    }

    /// Creates, starts, waits, deletes; no input.
    pub(crate) async fn run(&self, spec: Value) -> Ran {
        let (stdio, streams) = self.pipes().await;
        let id = self.create(spec, stdio).await.unwrap();
        self.start_container(&id).await.unwrap();
        let ran = self.finish(&id, "", streams).await;
        self.delete(&id, "").await.unwrap();
        ran
    }

    /// Runs a further process to its end.
    pub(crate) async fn run_exec(&self, id: &str, process: &Value) -> Ran {
        let (stdio, streams) = self.pipes().await;
        let exec_id = format!("e{}", self.id());
        self.exec(id, &exec_id, process, stdio).await.unwrap();
        let ran = self.finish(id, &exec_id, streams).await;
        self.delete(id, &exec_id).await.unwrap();
        ran
    }

    /// Reads the output of a process until it has ended.
    pub(crate) async fn finish(&self, id: &str, exec_id: &str, streams: [UnixStream; 3]) -> Ran {
        let [stdin, mut stdout, mut stderr] = streams;
        let (mut out, mut err) = (String::new(), String::new());
        let (exit, _, _) = tokio::join!(
            self.wait(id, exec_id),
            stdout.read_to_string(&mut out),
            stderr.read_to_string(&mut err)
        );
        drop(stdin);
        let exit = exit.unwrap();
        Ran {
            status: exit.exit_status,
            stdout: out,
            stderr: err,
            oom_killed: exit.oom_kills > 0,
        }
    }

    /// Whether limits of this controller can be tried here; says so if not.
    pub(crate) fn has_controller(&self, name: &str) -> bool {
        let file = self.cgroups.join("cgroup.subtree_control");
        let has = fs::read_to_string(file)
            .unwrap()
            .split_whitespace()
            .any(|one| one == name);
        if !has {
            eprintln!("skipped: there is no {name} controller in cgroup v2");
        }
        has
    }

    /// The cgroup of a container.
    pub(crate) fn cgroup(&self, id: &str) -> PathBuf {
        self.cgroups.join(id)
    }

    /// How many containers have a cgroup.
    pub(crate) fn cgroups(&self) -> usize {
        let entries = fs::read_dir(&self.cgroups).unwrap().filter_map(Result::ok);
        entries.filter(|entry| entry.path().is_dir()).count()
    }
}

/// What comes out of a stream up to and with `end`.
pub(crate) async fn read_until(stream: &mut UnixStream, end: &str) -> String {
    let mut seen = String::new();
    while !seen.ends_with(end) {
        let mut byte = [0];
        stream.read_exact(&mut byte).await.unwrap();
        seen.push(byte[0].into());
    }
    seen
}

/// What `script` prints in a container whose specification `change` has edited.
pub(crate) async fn output(host: &Host, script: &str, change: impl FnOnce(&mut Value)) -> String {
    let mut spec = busybox_spec(["sh", "-c", script]);
    change(&mut spec);
    let ran = host.run(spec).await;
    assert_eq!(
        (ran.status, &*ran.stderr),
        (0, ""),
        "{script}: {}",
        ran.stdout
    );
    ran.stdout
}

/// The text of the error of a creation that must fail, leaving nothing.
pub(crate) async fn refusal(host: &Host, spec: Value) -> String {
    let error = host.create(spec, Stdio::default()).await.unwrap_err();
    assert_eq!(host.cgroups(), 0, "a cgroup is left after {error}");
    match error {
        ttrpc::Error::RpcStatus(status) => status.message,
        other => panic!("{other}"),
    }
}

fn process(id: &str, exec_id: &str) -> ProcessRequest {
    ProcessRequest {
        container_id: id.into(),
        exec_id: exec_id.into(),
        ..Default::default()
    }
}
