//! What runs between the agent and a container's program.
//!
//! # Why a program of its own
//! A copy of a process with threads may only make a few kinds of system calls:
//! any lock that another thread held stays locked for ever in the copy, that
//! of the allocator too. The agent therefore never forks. It *spawns* its own
//! executable as a helper (`bulkhead-agent init`), which has one thread and so
//! can clone itself, allocate and report as it likes.
//!
//! # The way of a process
//! 1. The helper reads its [`Job`](crate::channel::Job) from the channel.
//! 2. It joins namespaces that only a child enters (pid) and clones itself into
//!    the container's cgroup as a child *of the agent*, does for it what takes
//!    rights that a user namespace of its own takes away, reports the new
//!    process id and exits.
//! 3. The new process takes the steps of `create` or `exec`, one call a line,
//!    then those of `process`, which are common to both, and reports that it is
//!    ready or what failed.
//! 4. It waits for the agent's word, then becomes the container's program. The
//!    channel closes by that, which tells the agent that it worked.
//!
//! Whatever fails is reported once, with its cause, and ends the process; its
//! namespaces, mounts and descriptors end with it. The agent owns the cgroup.

mod copy;
mod create;
mod devices;
mod exec;
mod lookup;
mod mounts;
mod paths;
mod privileges;
mod process;
mod rootfs;
mod terminal;
mod transfer;

use std::{
    convert::Infallible,
    fmt::Display,
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::PathBuf,
};

use rustix::pipe::{PipeFlags, pipe_with};

use crate::{
    channel::{Channel, Failure, FailureKind, Job, Report},
    sys::{self, Cloned},
};

/// Why a container or process could not be made.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// A step failed in the kernel.
    #[error("Cannot {doing}: {source}")]
    Step { doing: String, source: io::Error },
    /// The program cannot be executed; the text is what callers look for.
    #[error("exec: {name:?}: {reason}")]
    Executable {
        name: String,
        reason: String,
        kind: FailureKind,
        errno: Option<i32>,
    },
    /// Something that is not allowed was found only now.
    #[error("{what}: {reason}")]
    Refused { what: String, reason: &'static str },
    /// What is to be copied is not there.
    #[error("{path:?} does not exist")]
    Missing { path: PathBuf },
    /// An archive that is not understood, or that asks for what is not allowed.
    #[error("The archive cannot be unpacked: {name:?}: {reason}")]
    Archive { name: String, reason: String },
    /// The agent or the helper is gone: nobody is there to be told.
    #[error("The agent has gone away")]
    Gone,
}

impl Error {
    /// What the agent is told.
    fn failure(&self) -> Failure {
        let (kind, errno) = match self {
            Self::Step { source, .. } => (FailureKind::Step, source.raw_os_error()),
            Self::Executable { kind, errno, .. } => (*kind, *errno),
            Self::Missing { .. } => (FailureKind::NotFound, None),
            Self::Archive { .. } => (FailureKind::Archive, None),
            Self::Refused { .. } | Self::Gone => (FailureKind::Step, None),
        };
        Failure {
            text: self.to_string(),
            kind,
            errno,
        }
    }
}

type Result<T, E = Error> = std::result::Result<T, E>;

/// Says what was being done when a system call failed.
trait Doing<T> {
    fn doing(self, what: impl Display) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Display) -> Result<T> {
        self.map_err(|e| Error::Step {
            doing: what.to_string(),
            source: e.into(),
        })
    }
}

/// Runs the helper, whose standard input is the channel to the agent; returns
/// its exit code.
pub fn main() -> i32 {
    let Ok(channel) = Channel::from_stdin() else {
        return 1;
    };
    match run(&channel) {
        Ok(Helper::Done) => 0,
        Err(Error::Gone) => 1,
        Err(error) => {
            let failure = error.failure();
            // If the agent cannot be told, it learns from the closed channel.
            let _ = channel.report(&Report::Failed(failure), None);
            1
        }
    }
}

/// How the helper itself comes to its end; its child returns only if its work is done
/// without another program.
enum Helper {
    Done,
}

impl From<Infallible> for Helper {
    fn from(never: Infallible) -> Self {
        match never {}
    }
}

fn run(channel: &Channel) -> Result<Helper> {
    // No process of the container may look into this one before its execve.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .doing("hide the helper")?;
    let (job, fds) = channel.job().doing("read the job")?;
    match job {
        Job::Create { plan, keyring } => create::run(channel, &plan, &keyring, &fds),
        Job::Exec { process, container } => exec::run(channel, &process, &container, &fds),
        Job::Copy { copy, container } => transfer::run(channel, &copy, &container, &fds),
    }
}

/// Clones the helper into a cgroup, or where it is itself.
fn clone_helper(namespaces: i32, cgroup: Option<&OwnedFd>) -> io::Result<Cloned> {
    // SAFETY: the helper never makes a thread.
    unsafe { sys::clone_process(namespaces, cgroup.map(AsFd::as_fd)) }
}

/// Has `clone` copy the helper. The copy takes the `steps` once the helper has
/// prepared what only it can and has reported the copy.
fn clone_and_run(
    channel: &Channel,
    clone: impl FnOnce() -> io::Result<Cloned>,
    prepare: impl FnOnce(u32) -> Result<()>,
    steps: impl FnOnce() -> Result<Helper>,
) -> Result<Helper> {
    let (go, let_go) = pipe_with(PipeFlags::CLOEXEC).doing("make a pipe")?;
    match clone().doing("clone a process into the container")? {
        Cloned::Child => {
            drop(let_go);
            // Without a byte the helper has failed, and has told the agent why.
            File::from(go)
                .read_exact(&mut [0])
                .map_err(|_| Error::Gone)?;
            steps()
        }
        Cloned::Parent(pid) => {
            prepare(pid)?;
            channel
                .report(&Report::Cloned { pid }, None)
                .doing("report the process")?;
            File::from(let_go)
                .write_all(&[0])
                .doing("let the process go")?;
            Ok(Helper::Done)
        }
    }
}
