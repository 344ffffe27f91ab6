//! Logging programs: programs of the host that read the output of a process.
//!
//! The protocol is that of containerd's own shim. The program reads stdout from its
//! descriptor 3 and stderr from 4, and says on 5 that it is ready; its environment
//! tells whose output it is. It has nothing else of the shim's, and lives in the
//! host's mount namespace, not in the shim's.
//!
//! The end of the output is the end of its descriptors. It gets time to end by
//! itself, for a signal that overtakes what it has not read yet would lose it; then
//! SIGTERM, and time again. Dropping a [`Logger`] kills it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
    time::Duration,
};

use rustix::{
    pipe::{PipeFlags, pipe_with},
    process::Signal,
};
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt, Interest, unix::AsyncFd},
    net::unix::pipe,
    task::spawn_blocking,
    time::timeout,
};
use tracing::{debug, warn};

use super::StreamHost;
use crate::{
    child::{Child, Failure, Program},
    error::{Error, Result},
};

/// Time for a program to say that it is ready.
const READY: Duration = Duration::from_secs(30);

/// A program as a caller names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Command {
    pub(super) path: PathBuf,
    pub(super) arguments: Vec<String>,
    /// That it closes descriptor 5 without a word is a failure, not the word.
    pub(super) must_say_ready: bool,
}

/// How long the end of a program is waited for.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// From the end of its input to SIGTERM.
    pub alone: Duration,
    /// From SIGTERM to SIGKILL.
    pub asked: Duration,
}

impl Patience {
    /// In an orderly Delete: twelve seconds, as with containerd's own shim.
    pub const ORDERLY: Patience = Patience {
        alone: Duration::from_secs(2),
        asked: Duration::from_secs(10),
    };

    /// When somebody waits who has little time.
    pub const SHORT: Patience = Patience {
        alone: Duration::from_millis(500),
        asked: Duration::from_millis(500),
    };
}

/// A running program.
#[derive(Debug)]
pub(super) struct Logger {
    path: PathBuf,
    /// Readable from the program's end on.
    ended: AsyncFd<OwnedFd>,
    child: Child,
}

/// What goes along of one when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    path: PathBuf,
    pid: i32,
}

impl Logger {
    /// Starts a program and waits until it is ready. Answers what it reads stdout and
    /// stderr from. `id` is that of the container, or of the exec.
    pub(super) async fn start(
        command: Command,
        id: &str,
        host: &StreamHost,
    ) -> Result<(Self, [pipe::Sender; 2])> {
        let path = command.path.clone();
        let failed = |action| {
            let path = path.clone();
            move |source| Error::Path {
                action,
                path,
                source,
            }
        };
        let (stdout, to_stdout) = pipe().map_err(failed("make pipes for"))?;
        let (stderr, to_stderr) = pipe().map_err(failed("make pipes for"))?;
        let (ready, says_ready) = pipe().map_err(failed("make pipes for"))?;
        let environment = [
            format!("CONTAINER_ID={id}"),
            format!("CONTAINER_NAMESPACE={}", host.namespace),
        ];
        let must_say_ready = command.must_say_ready;
        let mounts = host.mounts.clone();
        let null = std::fs::File::options()
            .write(true)
            .open("/dev/null")
            .map_err(failed("open /dev/null for"))?;
        let born = spawn_blocking(move || {
            Child::start(&Program {
                arguments: &command.arguments,
                environment: &environment,
                placed: &[
                    (stdout.as_fd(), 3),
                    (stderr.as_fd(), 4),
                    (says_ready.as_fd(), 5),
                ],
                mounts: mounts.as_ref().map(|mounts| mounts.as_fd()),
                ..Program::new(&command.path, null.as_fd())
            })
        });
        let born = born.await.map_err(|_| Error::Panicked("start"))?;
        let child = born.map_err(|failure| match failure {
            Failure::Program(source) | Failure::Birth(source) => {
                failed("start the logging program")(source)
            }
        })?;
        let logger = Logger {
            ended: watched(&child).map_err(failed("watch the logging program"))?,
            path: path.clone(),
            child,
        };
        let said = timeout(READY, hear(ready)).await;
        let problem = match said {
            Ok(Ok(true)) => None,
            Ok(Ok(false)) if !must_say_ready => None,
            Ok(Ok(false)) => Some(io::Error::other(
                "it closed its descriptor 5 without saying that it is ready",
            )),
            Ok(Err(error)) => Some(error),
            Err(_) => Some(io::Error::other(format!(
                "it did not say on its descriptor 5 that it is ready within {} s",
                READY.as_secs()
            ))),
        };
        if let Some(problem) = problem {
            return Err(failed("wait for the logging program")(problem));
        }
        debug!(program = %logger.path.display(), pid = logger.child.pid(), "logs");
        let sender = |fd| pipe::Sender::from_owned_fd(not_blocking(fd)?);
        let senders = [sender(to_stdout), sender(to_stderr)];
        let [stdout, stderr] = senders.map(|sender| sender.map_err(failed("write to")));
        Ok((logger, [stdout?, stderr?]))
    }

    /// Goes on with one that the program before this one has started.
    pub(super) fn unpack(carried: Carried) -> io::Result<Self> {
        let child = Child::adopt(carried.pid)?;
        Ok(Logger {
            ended: watched(&child)?,
            path: carried.path,
            child,
        })
    }

    /// What goes along when the program changes.
    pub(super) fn carry(&self) -> Carried {
        Carried {
            path: self.path.clone(),
            pid: self.child.pid(),
        }
    }

    /// Ends it. Its descriptors are closed already.
    pub(super) async fn end(mut self, patience: Patience) {
        let program = self.path.display().to_string();
        if !self.ends_within(patience.alone).await {
            debug!(program, "asked to end");
            let asked = self.child.signal(Signal::TERM);
            if asked.is_err() || !self.ends_within(patience.asked).await {
                warn!(program, "a logging program does not end and is killed");
                return;
            }
        }
        match self.child.wait() {
            Ok(status) if status.success() => {}
            Ok(status) => warn!(program, %status, "a logging program failed"),
            Err(error) => warn!(program, %error, "the end of a logging program is not known"),
        }
    }

    async fn ends_within(&self, limit: Duration) -> bool {
        timeout(limit, self.ended.readable()).await.is_ok()
    }
}

/// What is readable from the program's end on.
fn watched(child: &Child) -> io::Result<AsyncFd<OwnedFd>> {
    let pidfd = child.pidfd()?;
    // SAFETY: an OwnedFd is open and stays the same descriptor until its end, which is
    // that of the AsyncFd.
    let ended = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
    Ok(ended?)
}

/// True for a byte, false for an end without one.
async fn hear(ready: OwnedFd) -> io::Result<bool> {
    let mut ready = pipe::Receiver::from_owned_fd(not_blocking(ready)?)?;
    Ok(ready.read(&mut [0]).await? > 0)
}

/// Of a pipe whose other end is another open file.
fn not_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    Ok(pipe_with(PipeFlags::CLOEXEC)?)
}
