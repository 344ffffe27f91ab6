//! `start`: makes the daemon of a pod, or finds it, and prints its address.
//!
//! Of two that come at once one binds the socket and makes the daemon, the other
//! finds it; the pod's lock is held meanwhile, so that a stale socket is replaced
//! once. What can fail comes before the daemon is made. On success nothing is written but the answer, and the
//! daemon inherits neither standard stream, since containerd waits for their end.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Seek, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::UnixListener,
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult, LogLevel},
    protobuf::{Enum, Message, well_known_types::any::Any},
};
use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, socket_with},
};
use serde_json::Value;
use thiserror::Error;

use crate::{
    daemon::{LISTENER_FD, OWNER, READY},
    flags::Flags,
    inherit, json,
    names::{self, ContainerId, Group, Namespace, Role, SOCKET_DIR, socket_path},
    options,
    statedir::StateDir,
    vm::cores::CORE_SCHEDULING,
};

/// File in the bundle by which others find the shim again.
const ADDRESS: &str = "address";
/// Largest input, in bytes.
const MAX_INPUT: u64 = 10 << 20;
/// Longest path of a socket (unix(7)), without the final NUL.
const MAX_SOCKET_PATH: usize = 106;
/// Where programs are found; nothing of the caller's environment counts.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Why there is no daemon.
#[derive(Debug, Error)]
pub enum Error {
    /// An id that is not one.
    #[error(transparent)]
    Name(#[from] names::Error),
    /// The specification cannot be read.
    #[error("Cannot read config.json as JSON")]
    Spec(#[from] json::Error),
    /// The pod of this container is gone.
    #[error("Sandbox {group:?} of container {id:?} has no shim: it is gone")]
    NoSandbox {
        /// The pod.
        group: String,
        /// The container.
        id: String,
    },
    /// The daemon refused.
    #[error("{0}")]
    Daemon(String),
    /// The path of the socket is too long.
    #[error("{} is too long for a socket", .0.display())]
    TooLong(PathBuf),
    /// A system call failed.
    #[error("Cannot {action}")]
    Io {
        /// A verb and its object.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
}

fn failed(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Io { action, source }
}

/// What the caller says on the standard input.
#[derive(Clone, Debug, PartialEq)]
struct Input {
    caller: Caller,
    /// Options of the runtime, of any kind.
    options: Vec<Any>,
    /// It wants to be told more than usual.
    debug: bool,
}

/// How the caller wants to be answered.
#[derive(Clone, Debug, PartialEq)]
enum Caller {
    /// By the address as plain text, which every caller understands.
    Plain,
    /// By a protobuf message; it may choose the directory of sockets.
    Bootstrap { socket_dir: Option<String> },
}

impl Input {
    /// Runtime options (a protobuf Any) parse as BootstrapParams too; the id tells them
    /// apart. Whatever else it is, Create brings the options again.
    fn read(input: &[u8], id: &str) -> Self {
        match BootstrapParams::parse_from_bytes(input) {
            Ok(params) if params.instance_id == id => {
                let dir = Some(params.socket_dir().to_owned());
                Input {
                    caller: Caller::Bootstrap {
                        socket_dir: dir.filter(|dir| dir.starts_with('/')),
                    },
                    debug: params.log_level.value() <= LogLevel::LOG_LEVEL_DEBUG.value(),
                    options: options::unpack(params),
                }
            }
            _ => Input {
                caller: Caller::Plain,
                options: match Any::parse_from_bytes(input) {
                    Ok(options) if !input.is_empty() => vec![options],
                    _ => Vec::new(),
                },
                debug: false,
            },
        }
    }
}

/// Makes or finds the daemon; returns what must be printed.
pub fn run(flags: &Flags) -> Result<Vec<u8>, Error> {
    let namespace = Namespace::new(&flags.namespace)?;
    let id = ContainerId::new(&flags.id)?;
    let mut input = Vec::new();
    io::stdin()
        .take(MAX_INPUT)
        .read_to_end(&mut input)
        .map_err(failed("read the standard input"))?;
    let Input {
        caller,
        options,
        debug,
    } = Input::read(&input, &flags.id);
    let group = Group::of(&id, spec(Path::new("."))?.as_ref())?;
    let dir = match &caller {
        Caller::Bootstrap {
            socket_dir: Some(dir),
        } => dir.as_str(),
        _ => SOCKET_DIR,
    };
    let socket = socket_path(dir, &flags.address, &namespace, &group.id);
    if socket.as_os_str().len() > MAX_SOCKET_PATH {
        return Err(Error::TooLong(socket));
    }
    let mut directory = DirBuilder::new();
    directory
        .recursive(true)
        .mode(0o700)
        .create(dir)
        .map_err(failed("make the directory of sockets"))?;
    let address = format!("unix://{}", socket.display());
    let bound = {
        let dir = StateDir::of(&namespace, &group.id);
        let _lock = dir.lock().map_err(failed("take the lock of the pod"))?;
        bind(&socket)?
    };
    match bound {
        Bound::Alive => write_address(&address).map_err(failed("write the file address"))?,
        Bound::New(bound) => {
            if group.role == Role::Member {
                return Err(Error::NoSandbox {
                    group: group.id.to_string(),
                    id: flags.id.clone(),
                });
            }
            write_address(&address).map_err(failed("write the file address"))?;
            let birth = Birth {
                flags,
                group: &group,
                socket: &bound,
                options,
                debug: flags.debug || debug,
            };
            birth.give().inspect_err(|_| {
                let _ = fs::remove_file(ADDRESS);
            })?;
            bound.keep();
        }
    }
    Ok(answer(&caller, &address))
}

fn answer(caller: &Caller, address: &str) -> Vec<u8> {
    match caller {
        Caller::Plain => address.as_bytes().to_vec(),
        Caller::Bootstrap { .. } => {
            let result = BootstrapResult {
                version: 3,
                address: address.to_owned(),
                protocol: "ttrpc".to_owned(),
                ..BootstrapResult::default()
            };
            result.write_to_bytes().unwrap_or_default()
        }
    }
}

/// `config.json` of a bundle.
pub(crate) fn spec(bundle: &Path) -> Result<Option<Value>, Error> {
    let file = match File::open(bundle.join("config.json")) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open config.json")(error)),
    };
    let text = json::read(file).map_err(failed("read config.json"))?;
    Ok(Some(json::parse(&text)?))
}

enum Bound {
    /// The group has a daemon.
    Alive,
    /// Ours now.
    New(Socket),
}

/// A socket that was bound; dropping it removes the file.
struct Socket {
    listener: UnixListener,
    path: Option<PathBuf>,
}

impl Socket {
    fn keep(mut self) {
        self.path = None;
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        if let Some(path) = &self.path {
            let _ = fs::remove_file(path);
        }
    }
}

fn bind(path: &Path) -> Result<Bound, Error> {
    let mut stale_removed = false;
    loop {
        match UnixListener::bind(path) {
            Ok(listener) => {
                let socket = Socket {
                    listener,
                    path: Some(path.to_owned()),
                };
                fs::set_permissions(path, fs::Permissions::from_mode(0o600))
                    .map_err(failed("restrict the socket"))?;
                return Ok(Bound::New(socket));
            }
            Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
                if is_alive(path) {
                    return Ok(Bound::Alive);
                }
                if stale_removed {
                    return Err(failed("bind the socket")(error));
                }
                stale_removed = true;
                let _ = fs::remove_file(path);
            }
            Err(error) => return Err(failed("bind the socket")(error)),
        }
    }
}

/// Does somebody listen on a socket? Never waits: one whose backlog is full has a
/// daemon, too.
pub(crate) fn is_alive(path: &Path) -> bool {
    let connect = || {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(path)?)
    };
    matches!(connect(), Ok(()) | Err(Errno::AGAIN))
}

/// What a daemon is made with.
struct Birth<'a> {
    flags: &'a Flags,
    group: &'a Group,
    socket: &'a Socket,
    options: Vec<Any>,
    debug: bool,
}

impl Birth<'_> {
    fn command(&self) -> Result<Command, Error> {
        let program = std::env::current_exe().map_err(failed("find the shim's own file"))?;
        let listener = self.socket.listener.as_raw_fd();
        let mut command = Command::new(program);
        command
            .arg(format!("-namespace={}", self.flags.namespace))
            .arg(format!("-id={}", self.group.id))
            .arg(format!("-address={}", self.flags.address))
            // It has a log for them.
            .args(self.flags.ignored.iter().map(|name| format!("-{name}=")))
            .env_clear()
            .env("PATH", PATH)
            .env(LISTENER_FD, listener.to_string())
            .env(OWNER, &self.flags.id)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        for name in ["TTRPC_ADDRESS", CORE_SCHEDULING] {
            command.env(name, std::env::var_os(name).unwrap_or_default());
        }
        if self.debug {
            command.arg("-debug");
        }
        if !self.options.is_empty() {
            command.stdin(file_of(&options::pack(self.options.clone()))?);
        }
        inherit::only(&mut command, vec![listener]);
        Ok(command)
    }

    /// Starts the daemon; it serves once this has returned.
    fn give(self) -> Result<(), Error> {
        let mut command = self.command()?;
        let mut child = command.spawn().map_err(failed("start the daemon"))?;
        let mut said = String::new();
        let read = child
            .stdout
            .take()
            .map(|stdout| stdout.take(4096).read_to_string(&mut said));
        if matches!(read, Some(Ok(_))) && said == READY {
            set_oom_score(child.id());
            return Ok(());
        }
        let _ = child.kill();
        let status = child.wait().map_err(failed("wait for the daemon"))?;
        let text = said.trim();
        Err(Error::Daemon(if text.is_empty() {
            format!("The daemon ended with {status}")
        } else {
            text.to_owned()
        }))
    }
}

/// A file with this content, to be read from its beginning.
fn file_of(content: &[u8]) -> Result<File, Error> {
    let failed = |error| failed("hand the options over")(error);
    let memory = rustix::fs::memfd_create("options", rustix::fs::MemfdFlags::CLOEXEC);
    let mut file = File::from(memory.map_err(|errno| failed(errno.into()))?);
    file.write_all(content).map_err(failed)?;
    file.rewind().map_err(failed)?;
    Ok(file)
}

/// The daemon is one step easier to kill than containerd. That it may not be set is
/// no reason to fail.
fn set_oom_score(child: u32) {
    let parent = rustix::process::getppid().map_or(0, |pid| pid.as_raw_nonzero().get());
    let score = fs::read_to_string(format!("/proc/{parent}/oom_score_adj"))
        .ok()
        .and_then(|text| text.trim().parse::<i32>().ok());
    if let Some(score) = score {
        let _ = fs::write(
            format!("/proc/{child}/oom_score_adj"),
            score.saturating_add(1).min(1000).to_string(),
        );
    }
}

/// Writes the file by which others find the shim again, at once.
fn write_address(address: &str) -> io::Result<()> {
    let temporary = format!(".address.{}", std::process::id());
    let _ = fs::remove_file(&temporary);
    let mut file = File::create_new(&temporary)?;
    file.write_all(address.as_bytes())?;
    fs::rename(&temporary, ADDRESS).inspect_err(|_| {
        let _ = fs::remove_file(&temporary);
    })
}

#[cfg(test)]
mod tests {
    use containerd_shim_protos::protobuf::{EnumOrUnknown, MessageField};

    use super::*;

    #[test]
    fn the_input_tells_who_calls_and_what_is_set_lc_18_lc_19_lc_20() {
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            value: b"\x12\x02/x".to_vec(),
            ..Any::default()
        };
        let params = |level: i32| {
            let params = BootstrapParams {
                instance_id: "c1".into(),
                socket_dir: Some("/tmp/s".into()),
                log_level: EnumOrUnknown::from_i32(level),
                extensions: vec![containerd_shim_protos::bootstrap_api::Extension {
                    value: MessageField::some(options.clone()),
                    ..Default::default()
                }],
                ..BootstrapParams::default()
            };
            params.write_to_bytes().unwrap()
        };
        for (level, debug) in [(-8, true), (-5, true), (-4, true), (0, false), (8, false)] {
            let input = Input {
                caller: Caller::Bootstrap {
                    socket_dir: Some("/tmp/s".into()),
                },
                options: vec![options.clone()],
                debug,
            };
            assert_eq!(Input::read(&params(level), "c1"), input);
        }
        let plain = |options: &[Any]| Input {
            caller: Caller::Plain,
            options: options.to_vec(),
            debug: false,
        };
        assert_eq!(Input::read(&params(0), "c2").caller, Caller::Plain);
        let bytes = options.write_to_bytes().unwrap();
        assert_eq!(Input::read(&bytes, "c1"), plain(&[options]));
        assert_eq!(Input::read(b"", "c1"), plain(&[]));
        assert_eq!(Input::read(b"\xff\xff garbage", "c1"), plain(&[]));
    }

    #[test]
    fn the_answer_has_the_form_that_the_caller_reads_lc_25() {
        assert_eq!(answer(&Caller::Plain, "unix:///s"), b"unix:///s");
        let bytes = answer(&Caller::Bootstrap { socket_dir: None }, "unix:///s");
        let result = BootstrapResult::parse_from_bytes(&bytes).unwrap();
        assert_eq!(
            (
                result.version,
                result.address.as_str(),
                result.protocol.as_str()
            ),
            (3, "unix:///s", "ttrpc")
        );
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_living_one_kept_lc_32() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        let Bound::New(socket) = bind(&path).unwrap() else {
            panic!("stale")
        };
        assert_eq!(
            fs::metadata(&path).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert!(matches!(bind(&path).unwrap(), Bound::Alive));
        drop(socket);
        assert!(!path.exists());
    }

    #[test]
    fn a_daemon_that_accepts_nobody_for_now_is_alive_lc_32() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let mut waiting = Vec::new();
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let full = loop {
            let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
            let socket = socket.unwrap();
            match rustix::net::connect(&socket, &SocketAddrUnix::new(&path).unwrap()) {
                Ok(()) => waiting.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full, Errno::AGAIN);
        assert!(matches!(bind(&path).unwrap(), Bound::Alive));
    }
}
