//! `start`: makes the daemon of a pod, or finds it, and prints its address.
//!
//! Of two that come at once one binds the socket and makes the daemon, the other
//! finds it; the pod's lock is held meanwhile, so that a stale socket is replaced
//! once. What can fail comes before the daemon is made. On success nothing is written but the answer, and the
//! daemon inherits neither standard stream, since containerd waits for their end.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{DirBuilderExt, PermissionsExt},
            net::{UnixListener, UnixStream},
        },
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, BootstrapResult},
    protobuf::Message,
};
use serde_json::Value;
use thiserror::Error;

use crate::{
    daemon::{LISTENER_FD, OWNER, READY},
    flags::Flags,
    inherit, json,
    names::{self, ContainerId, Group, Namespace, Role, SOCKET_DIR, socket_path},
    statedir::StateDir,
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

/// How the caller wants to be answered.
#[derive(Clone, Debug, PartialEq)]
enum Caller {
    /// By the address as plain text, which every caller understands.
    Plain,
    /// By a protobuf message; it may choose the directory of sockets.
    Bootstrap { socket_dir: Option<String> },
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
    let caller = caller(&input, &flags.id);
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
            spawn(flags, &group, &bound).inspect_err(|_| {
                let _ = fs::remove_file(ADDRESS);
            })?;
            bound.keep();
        }
    }
    Ok(answer(&caller, &address))
}

fn caller(input: &[u8], id: &str) -> Caller {
    // Runtime options (a protobuf Any) parse as BootstrapParams too; the id tells
    // them apart. Whatever else it is, Create brings the options again.
    match BootstrapParams::parse_from_bytes(input) {
        Ok(params) if params.instance_id == id => {
            let dir = Some(params.socket_dir().to_owned());
            Caller::Bootstrap {
                socket_dir: dir.filter(|dir| dir.starts_with('/')),
            }
        }
        _ => Caller::Plain,
    }
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
                // A connection to a socket with a full backlog blocks for as long
                // as its daemon lives: that is alive, too.
                if UnixStream::connect(path).is_ok() {
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

fn spawn(flags: &Flags, group: &Group, socket: &Socket) -> Result<(), Error> {
    let program = std::env::current_exe().map_err(failed("find the shim's own file"))?;
    let listener = socket.listener.as_raw_fd();
    let mut command = Command::new(program);
    command
        .arg(format!("-namespace={}", flags.namespace))
        .arg(format!("-id={}", group.id))
        .arg(format!("-address={}", flags.address))
        .env_clear()
        .env("PATH", PATH)
        .env(LISTENER_FD, listener.to_string())
        .env(OWNER, &flags.id)
        .env(
            "TTRPC_ADDRESS",
            std::env::var("TTRPC_ADDRESS").unwrap_or_default(),
        )
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if flags.debug {
        command.arg("-debug");
    }
    inherit::only(&mut command, vec![listener]);
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
    use containerd_shim_protos::protobuf::well_known_types::any::Any;

    use super::*;

    #[test]
    fn the_input_tells_who_calls_lc_20() {
        let params = BootstrapParams {
            instance_id: "c1".into(),
            socket_dir: Some("/tmp/s".into()),
            ..BootstrapParams::default()
        };
        let bytes = params.write_to_bytes().unwrap();
        assert_eq!(
            caller(&bytes, "c1"),
            Caller::Bootstrap {
                socket_dir: Some("/tmp/s".into())
            }
        );
        assert_eq!(caller(&bytes, "c2"), Caller::Plain);
        let options = Any {
            type_url: "runtimeoptions.v1.Options".into(),
            ..Any::default()
        };
        assert_eq!(
            caller(&options.write_to_bytes().unwrap(), "c1"),
            Caller::Plain
        );
        assert_eq!(caller(b"", "c1"), Caller::Plain);
        assert_eq!(caller(b"\xff\xff garbage", "c1"), Caller::Plain);
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
}
