//! A host of its own for each test, and a client of the shim.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{ConnectRequest, CreateTaskRequest, ShutdownRequest},
    shim_async::{Client, TaskClient},
};
use rustix::{
    fd::OwnedFd,
    process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open},
};
use serde_json::{Value, json};
use ttrpc::Code;

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-bulkhead-v2");

/// A host of its own: `/run`, `/etc` and what a test puts over other paths.
pub(crate) struct Host {
    pub(crate) dir: tempfile::TempDir,
}

impl Host {
    /// Runs a test in a host of its own.
    pub(crate) fn with(test: impl AsyncFnOnce(&Host) + Send) {
        let host = Host {
            dir: tempfile::tempdir().unwrap(),
        };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).unwrap();
                let slave = rustix::mount::MountPropagationFlags::DOWNSTREAM
                    | rustix::mount::MountPropagationFlags::REC;
                rustix::mount::mount_change("/", slave).unwrap();
                host.cover("/run");
                let runtime = tokio::runtime::Builder::new_current_thread()
                    .enable_all()
                    .build()
                    .unwrap();
                runtime.block_on(test(&host));
                host.assert_clean();
            });
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        });
    }

    /// Address of a containerd that is not there; it tells the shims of this host
    /// from those of others.
    pub(crate) fn containerd(&self) -> String {
        format!("{}/containerd.sock", self.dir.path().display())
    }

    /// Puts an empty tmpfs over a directory.
    pub(crate) fn cover(&self, path: &str) {
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("test", path, "tmpfs", flags, None).unwrap();
    }

    /// Makes a bundle with a valid specification.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        let bundle = self.dir.path().join(id);
        fs::create_dir_all(bundle.join("rootfs")).unwrap();
        self.write_spec(&bundle, &spec());
        bundle
    }

    pub(crate) fn write_spec(&self, bundle: &Path, spec: &Value) {
        fs::write(bundle.join("config.json"), spec.to_string()).unwrap();
    }

    /// The binary with the flags that it always gets, the action being next.
    pub(crate) fn flags(&self, bundle: &Path, id: &str) -> Command {
        let mut command = Command::new(SHIM);
        command
            .args([
                "-namespace",
                "default",
                "-address",
                &self.containerd(),
                "-publish-binary",
                "/bin/false",
            ])
            .args(["-id", id])
            .current_dir(bundle)
            .env("LD_PRELOAD_NOT", "hostile")
            .env("TTRPC_ADDRESS", "")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    pub(crate) fn command(&self, bundle: &Path, id: &str, action: &str) -> Command {
        let mut command = self.flags(bundle, id);
        if action == "delete" {
            command.arg("-bundle").arg(bundle);
        }
        command.arg(action);
        command
    }

    pub(crate) fn run(&self, bundle: &Path, id: &str, action: &str) -> Output {
        self.command(bundle, id, action).output().unwrap()
    }

    /// Starts a shim; answers its address.
    pub(crate) fn start(&self, bundle: &Path, id: &str) -> String {
        let output = self.run(bundle, id, "start");
        assert!(output.status.success(), "{output:?}");
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Nothing of a pod is left: no state, no socket, no shim.
    pub(crate) fn assert_clean(&self) {
        let deadline = Instant::now() + Duration::from_secs(5);
        let left = || {
            let mut left = entries(Path::new("/run/containerd/s"));
            for path in entries(Path::new("/run/bulkhead")) {
                if path.is_dir() {
                    left.push(path);
                }
            }
            left.extend(
                shims(&self.containerd())
                    .iter()
                    .map(|pid| format!("process {pid}").into()),
            );
            left
        };
        while !left().is_empty() {
            assert!(Instant::now() < deadline, "left behind: {:?}", left());
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

pub(crate) fn entries(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir).map_or_else(
        |_| Vec::new(),
        |entries| entries.map(|entry| entry.unwrap().path()).collect(),
    )
}

/// Shims that were started with this address of containerd.
pub(crate) fn shims(address: &str) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap() {
        let path = entry.unwrap().path();
        let Some(pid) = path
            .file_name()
            .and_then(|name| name.to_str()?.parse().ok())
        else {
            continue;
        };
        let exe = fs::read_link(path.join("exe")).unwrap_or_default();
        let args = fs::read_to_string(path.join("cmdline")).unwrap_or_default();
        if exe == Path::new(SHIM) && args.contains(address) {
            found.push(pid);
        }
    }
    found
}

pub(crate) fn spec() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    })
}

pub(crate) async fn connect(address: &str) -> TaskClient {
    TaskClient::new(Client::connect(address).await.unwrap())
}

pub(crate) fn context() -> ttrpc::context::Context {
    ttrpc::context::with_duration(Duration::from_secs(10))
}

pub(crate) fn code(error: &ttrpc::Error) -> (Code, String) {
    match error {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message.clone()),
        error => panic!("{error:?}"),
    }
}

pub(crate) async fn shutdown(task: &TaskClient, id: &str) {
    let request = ShutdownRequest {
        id: id.into(),
        ..ShutdownRequest::default()
    };
    match task.shutdown(context(), &request).await {
        Ok(_) | Err(ttrpc::Error::RemoteClosed | ttrpc::Error::Socket(_)) => {}
        Err(error) => panic!("{error:?}"),
    }
}

pub(crate) async fn create(task: &TaskClient, id: &str, bundle: &Path) -> (Code, String) {
    let request = CreateTaskRequest {
        id: id.into(),
        bundle: bundle.display().to_string(),
        ..CreateTaskRequest::default()
    };
    code(&task.create(context(), &request).await.unwrap_err())
}

/// Number and descriptor of the shim that a client talks to.
pub(crate) async fn process(task: &TaskClient) -> (Pid, OwnedFd) {
    let request = ConnectRequest::default();
    let pid = task.connect(context(), &request).await.unwrap().shim_pid;
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    (pid, pidfd_open(pid, PidfdFlags::empty()).unwrap())
}

/// Kills a shim and waits for its end.
pub(crate) async fn murder(task: &TaskClient) {
    let (pid, fd) = process(task).await;
    kill_process(pid, Signal::KILL).unwrap();
    assert!(bulkhead_shim::statedir::ended(&fd, 5000));
}
