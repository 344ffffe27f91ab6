//! A container with the programs of the lab host, a socket of the host in it, and those
//! who talk by it.

use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        fs::symlink,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_tests::{Command, Outcome, Running, bundle};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Nothing takes so long that works.
const LIMIT: Duration = Duration::from_secs(120);

/// Where the socket is in the container: below a tmpfs, in a directory that is not there.
pub(crate) const PLACE: &str = "/run/made/test.sock";

/// What every client begins with.
const PRELUDE: &str = "
import os, socket, sys
def connect(path='/run/made/test.sock'):
    s = socket.socket(socket.AF_UNIX)
    s.settimeout(100)
    s.connect(path)
    return s
def rest(s):
    data = b''
    while True:
        piece = s.recv(1 << 16)
        if not piece:
            return data
        data += piece
def pattern(count, seed):
    return (bytes((n * seed) % 251 for n in range(251)) * (count // 251 + 1))[:count]
";

/// So many bytes, which the clients can make too.
pub(crate) fn pattern(count: usize, seed: usize) -> Vec<u8> {
    let byte = |n| u8::try_from(n % 251 * seed % 251).expect("it is small");
    (0..count).map(byte).collect()
}

/// A bundle of the lab host's programs, whose `/run` is a tmpfs.
pub(crate) struct Bundle {
    dir: TempDir,
    config: Value,
}

impl Bundle {
    pub(crate) fn new(args: &[&str]) -> Bundle {
        let dir = tempfile::tempdir().expect("temporary directory");
        let root = dir.path().join("rootfs");
        for place in ["usr", "proc", "dev", "tmp", "run"] {
            fs::create_dir_all(root.join(place)).expect("a directory");
        }
        for name in ["bin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name)).expect("a link");
        }
        let mut config = bundle::config("");
        config["process"]["args"] = json!(args);
        config["process"]["env"] = json!(["PATH=/usr/bin"]);
        let mut bundle = Bundle { dir, config };
        bundle.mount("/usr", "bind", Path::new("/usr"), &["rbind", "ro"]);
        bundle.mount("/run", "tmpfs", Path::new("tmpfs"), &[]);
        bundle
    }

    /// One that runs a client as its first process.
    pub(crate) fn of_client(program: &str) -> Bundle {
        Bundle::new(&["python3", "-c", &format!("{PRELUDE}{program}")])
    }

    /// Adds a mount.
    pub(crate) fn mount(&mut self, at: &str, kind: &str, source: &Path, options: &[&str]) {
        let mut mount = json!({"destination": at, "type": kind, "source": source});
        if !options.is_empty() {
            mount["options"] = json!(options);
        }
        let mounts = self.config["mounts"].as_array_mut().expect("a list");
        mounts.push(mount);
    }

    /// Adds the socket.
    pub(crate) fn with(mut self, source: &Path) -> Bundle {
        self.mount(PLACE, "uds", source, &[]);
        self
    }

    /// The command that runs it.
    pub(crate) fn command(&self, name: &str) -> Command {
        let file = self.dir.path().join("config.json");
        fs::write(file, self.config.to_string()).expect("the configuration");
        let dir = self.dir.path().to_str().expect("UTF-8");
        Command::bulkhead(["run", "--rm", "--name", name, "--bundle", dir])
    }
}

/// A container that does nothing, for execs.
pub(crate) struct Container {
    name: &'static str,
    run: Running,
    _bundle: Bundle,
}

impl Container {
    pub(crate) fn start(name: &'static str, source: &Path) -> Container {
        let script = "echo ready; exec sleep 10000";
        let bundle = Bundle::new(&["sh", "-c", script]).with(source);
        let run = bundle.command(name).start();
        run.wait_for_output("ready");
        Container {
            name,
            run,
            _bundle: bundle,
        }
    }

    /// Starts a client in it, as this user.
    pub(crate) fn client_of(&self, user: &str, program: &str) -> Running {
        let program = format!("{PRELUDE}{program}");
        let command = ["exec", "-u", user, self.name, "python3", "-c", &program];
        Command::bulkhead(command).start()
    }

    /// Starts a client in it.
    pub(crate) fn client(&self, program: &str) -> Running {
        self.client_of("0:0", program)
    }

    /// Kills it and waits for its end.
    pub(crate) fn kill(self) -> Outcome {
        let kill = Command::bulkhead(["kill", self.name, "KILL"]);
        kill.run().success();
        self.run.wait()
    }
}

/// A service of the host.
pub(crate) struct Service {
    path: PathBuf,
    listener: UnixListener,
}

impl Service {
    pub(crate) fn listen(path: &Path) -> Service {
        let listener = UnixListener::bind(path).expect("a socket");
        listener.set_nonblocking(true).expect("not to block");
        Service {
            path: path.to_owned(),
            listener,
        }
    }

    /// Whether nobody has connected.
    pub(crate) fn is_alone(&self) -> bool {
        self.listener.accept().is_err()
    }

    /// The next connection.
    pub(crate) fn accept(&self) -> UnixStream {
        let end = Instant::now() + LIMIT;
        loop {
            if let Ok((stream, _)) = self.listener.accept() {
                stream.set_nonblocking(false).expect("to block");
                stream.set_read_timeout(Some(LIMIT)).expect("a limit");
                stream.set_write_timeout(Some(LIMIT)).expect("a limit");
                return stream;
            }
            assert!(Instant::now() < end, "Nobody connects to {:?}", self.path);
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Ends, and takes the socket away.
    pub(crate) fn stop(self) {
        fs::remove_file(&self.path).expect("it was there");
    }
}

/// Takes all there is.
pub(crate) fn rest(stream: &mut UnixStream) -> Vec<u8> {
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).expect("an end");
    bytes
}

/// Says all of it.
pub(crate) fn say(stream: &mut UnixStream, bytes: &[u8]) {
    stream.write_all(bytes).expect("somebody who reads");
}
