//! A shim of one test: started by a caller of the newest kind, and ended as callers do.

use std::{
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::Reader;
use containerd_shim_protos::{
    api::{
        ConnectRequest, ConnectResponse, CreateTaskRequest, CreateTaskResponse, DeleteResponse,
        Empty, ExecProcessRequest, PauseRequest, ResumeRequest,
    },
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::{Message, MessageField, well_known_types::any::Any},
};
use serde_json::Value;
use tempfile::TempDir;

use crate::{
    events::Events,
    output::{read_fifo, within, within_ms},
    process::{Process, Streams},
    root::Root,
    task::{BINARY, NAMESPACE, TASK_V3, Task},
};

/// A shim, the events it tells, and what its container is made of. Dropped in the middle
/// of a test, what is left of it is deleted.
pub(crate) struct Pod {
    pub(crate) task: Task,
    pub(crate) events: Events,
    root: Root,
    place: Place,
    /// Ids that were given to execs.
    execs: AtomicU32,
    /// Where the shim listens.
    address: String,
}

/// Where a shim lives, and by which name.
struct Place {
    id: String,
    bundle: TempDir,
    sockets: TempDir,
    /// What the shim logs.
    log: Reader,
}

/// Ids have their first 60 characters in common, and are as long as they get.
fn id(name: &str, last: u32) -> String {
    format!("{name:x<60.60}-{last:08x}")
}

impl Place {
    fn new(name: &str, config: &Value) -> Place {
        let bundle = tempfile::tempdir().unwrap();
        fs::write(bundle.path().join("config.json"), config.to_string()).unwrap();
        fs::create_dir(bundle.path().join("rootfs")).unwrap();
        let sockets = tempfile::Builder::new().prefix("nb-").tempdir_in("/tmp");
        Place {
            id: id(name, std::process::id()),
            log: read_fifo(&bundle.path().join("log")),
            bundle,
            sockets: sockets.unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.bundle.path().join(name)
    }

    /// The binary with the flags that every action has.
    fn binary(&self) -> Command {
        let mut command = Command::new(BINARY);
        command
            .args(["-namespace", NAMESPACE, "-id", &self.id, "-address"])
            .arg(self.path("c.sock"))
            .current_dir(self.bundle.path())
            .env("GOMAXPROCS", "2")
            .env("TTRPC_ADDRESS", self.path("c.sock"));
        command
    }

    /// Runs `start`; answers the address that it tells.
    fn start(&self) -> String {
        let sockets = self.sockets.path().to_str().unwrap();
        let params = BootstrapParams {
            instance_id: self.id.clone(),
            namespace: NAMESPACE.into(),
            containerd_grpc_address: self.path("c.sock").to_str().unwrap().into(),
            socket_dir: Some(sockets.into()),
            ..BootstrapParams::default()
        };
        let mut start = self.binary();
        let start = start.env("SHIM_SOCKET_DIR", sockets).arg("start");
        let piped = start.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut start = piped.stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = start.stdin.take().unwrap();
        stdin.write_all(&params.write_to_bytes().unwrap()).unwrap();
        drop(stdin);
        // Ends only if nobody has inherited its output.
        let Output {
            status,
            stdout,
            stderr,
        } = start.wait_with_output().unwrap();
        assert!(status.success() && stderr.is_empty(), "{status} {stderr:?}");
        let answer = BootstrapResult::parse_from_bytes(&stdout).unwrap();
        assert_eq!((answer.version, &*answer.protocol), (3, "ttrpc"));
        assert!(answer.address.contains(sockets), "{answer}");
        answer.address
    }

    /// Runs `delete`.
    fn delete(&self) -> Output {
        let mut delete = self.binary();
        let delete = delete.arg("-bundle").arg(self.bundle.path()).arg("delete");
        delete.stdin(Stdio::null()).output().unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{}", self.log.text());
        }
        if self.bundle.path().exists() {
            self.delete();
        }
    }
}

impl Pod {
    /// Starts a shim for a container with this root and configuration.
    pub(crate) fn start(name: &str, root: Root, config: &Value) -> Pod {
        Pod::start_as(TASK_V3, name, root, config)
    }

    /// The same for a caller of this version of the Task service.
    pub(crate) fn start_as(service: &'static str, name: &str, root: Root, config: &Value) -> Pod {
        let place = Place::new(name, config);
        let events = Events::listen(&place.path("c.sock"));
        let address = place.start();
        let pod = Pod {
            task: Task::connect(&address, service, &place.id),
            events,
            root,
            place,
            execs: AtomicU32::new(0),
            address,
        };
        assert_ne!(pod.shim(), 0);
        pod
    }

    /// Another container for the same shim, whose configuration says so.
    pub(crate) fn join(&self, name: &str, root: Root, config: &Value) -> Pod {
        let place = Place::new(name, config);
        Pod {
            task: Task::connect(&self.address, TASK_V3, &place.id),
            events: Events::listen(&place.path("c.sock")),
            root,
            place,
            execs: AtomicU32::new(0),
            address: self.address.clone(),
        }
    }

    /// Ends and deletes a container that has joined another.
    pub(crate) fn leave(self) {
        self.task.kill("", true).unwrap();
        self.task.wait("").unwrap();
        self.task.delete("").unwrap();
        let answer = self.place.delete();
        assert!(answer.status.success(), "{answer:?}");
        self.root.remove();
    }

    /// The id of the container.
    pub(crate) fn id(&self) -> &str {
        &self.place.id
    }

    /// The pid of the shim, which a second connection is told.
    pub(crate) fn shim(&self) -> u32 {
        let request = ConnectRequest {
            id: self.place.id.clone(),
            ..ConnectRequest::default()
        };
        let other = Task::connect(&self.address, TASK_V3, &self.place.id);
        let answer = other.call::<ConnectResponse>("Connect", &request);
        answer.unwrap().shim_pid
    }

    /// What the shim has logged.
    pub(crate) fn log(&self) -> String {
        self.place.log.text()
    }

    /// Lets the container stand still.
    pub(crate) fn pause(&self) {
        let request = PauseRequest {
            id: self.place.id.clone(),
            ..PauseRequest::default()
        };
        self.task.call::<Empty>("Pause", &request).unwrap();
    }

    /// Lets it go on.
    pub(crate) fn resume(&self) {
        let request = ResumeRequest {
            id: self.place.id.clone(),
            ..ResumeRequest::default()
        };
        self.task.call::<Empty>("Resume", &request).unwrap();
    }

    /// Where a file of a layer of the root lies on the host.
    pub(crate) fn on_host(&self, layer: usize, path: &str) -> PathBuf {
        self.root.on_host(layer, path)
    }

    /// Where a file that the container wrote lies on the host.
    pub(crate) fn written(&self, path: &str) -> PathBuf {
        self.root.written(path)
    }

    /// Creates the container.
    pub(crate) fn create(&self, streams: Streams) -> Process<'_> {
        let init = Process::new(self, "", streams, self.place.bundle.path());
        let request = CreateTaskRequest {
            id: self.place.id.clone(),
            bundle: self.place.bundle.path().to_str().unwrap().into(),
            rootfs: self.root.mounts(),
            stdin: init.names.stdin.clone(),
            stdout: init.names.stdout.clone(),
            stderr: init.names.stderr.clone(),
            options: MessageField::some(Any {
                type_url: "containerd.runc.v1.Options".into(),
                ..Any::default()
            }),
            ..CreateTaskRequest::default()
        };
        let answer = self.task.call::<CreateTaskResponse>("Create", &request);
        assert_ne!(answer.unwrap().pid, 0);
        init
    }

    /// Creates the container and lets it run.
    pub(crate) fn run(&self, streams: Streams) -> Process<'_> {
        let init = self.create(streams);
        init.start().unwrap();
        init
    }

    /// Registers a further process.
    pub(crate) fn exec(&self, process: &Value, streams: Streams) -> Process<'_> {
        let exec = id(&self.place.id, self.execs.fetch_add(1, Ordering::Relaxed));
        let exec = Process::new(self, &exec, streams, self.place.bundle.path());
        let kind = "types.containerd.io/opencontainers/runtime-spec/1/Process";
        let request = ExecProcessRequest {
            id: self.place.id.clone(),
            exec_id: exec.id.clone(),
            stdin: exec.names.stdin.clone(),
            stdout: exec.names.stdout.clone(),
            stderr: exec.names.stderr.clone(),
            spec: MessageField::some(Any {
                type_url: kind.into(),
                value: process.to_string().into_bytes(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        self.task.call::<Empty>("Exec", &request).unwrap();
        exec
    }

    /// Ends whatever runs, as callers do at the end.
    pub(crate) fn end(self) {
        // A test may have done all of it.
        if self.task.kill("", true).is_ok() || self.task.wait("").is_ok() {
            self.task.wait("").unwrap();
            self.task.delete("").unwrap();
        }
        let limit = within(Duration::from_secs(10));
        self.shutdown();
        assert!(Instant::now() < limit, "Shutdown took too long");
        self.delete();
    }

    /// Shutdown, which is answered by words or by the end of the connection.
    pub(crate) fn shutdown(&self) {
        if let Err(error) = self.task.shutdown() {
            assert!(matches!(error, ttrpc::Error::Socket(_)), "{error}");
        }
    }

    /// What comes last, whatever came before: `delete`, after which nothing is left.
    pub(crate) fn delete(self) {
        let limit = within(Duration::from_secs(10));
        let answer = self.place.delete();
        assert!(Instant::now() < limit, "delete took too long");
        assert!(answer.status.success(), "{answer:?}");
        DeleteResponse::parse_from_bytes(&answer.stdout).unwrap();
        let bundle = self.place.bundle.path();
        fs::remove_dir_all(bundle).expect("nothing is mounted in it");
        self.root.remove();
        let sockets = fs::read_dir(self.place.sockets.path()).unwrap();
        assert_eq!(sockets.count(), 0, "sockets are left");
        let limit = within_ms(500);
        while let Some(left) = of_the_binary() {
            assert!(Instant::now() < limit, "process {left} of the shim is left");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

/// A process that runs the shim's binary.
fn of_the_binary() -> Option<String> {
    let is_it = |exe: &Path| exe.file_name().is_some_and(|name| name == BINARY);
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut running = processes
        .filter(|process| fs::read_link(process.path().join("exe")).is_ok_and(|exe| is_it(&exe)));
    running
        .next()
        .map(|process| process.path().display().to_string())
}
