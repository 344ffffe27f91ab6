//! What a request is refused with, and the status code that the caller sees.
//!
//! Variants by what a caller can do; the only mapping to ttrpc is
//! [`Error::code`].

use std::{error::Error as _, io, path::PathBuf};

use bulkhead_agent_api::agent::cause::Kind;
use bulkhead_agent_api::spec::capacity::Beyond;
use thiserror::Error;
use ttrpc::Code;

use crate::{
    assets, config, json,
    names::{self, ContainerId, ExecId},
    spec,
    state::{Op, State},
};

/// The result of a request.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a request failed.
#[derive(Debug, Error)]
pub enum Error {
    /// An id that is not one.
    #[error(transparent)]
    Name(#[from] names::Error),
    /// The container is not known, or no longer.
    #[error("No container {0:?} in this pod")]
    NoContainer(ContainerId),
    /// The exec is not known, or no longer.
    #[error("No exec {exec:?} in container {container:?}")]
    NoExec {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// The id is taken.
    #[error("Container {0:?} exists already")]
    ContainerExists(ContainerId),
    /// The id is taken.
    #[error("Exec {exec:?} exists already in container {container:?}")]
    ExecExists {
        /// The container.
        container: ContainerId,
        /// The exec.
        exec: ExecId,
    },
    /// The call does not fit the state.
    #[error("Process {process} is {state}: cannot {op} it")]
    WrongState {
        /// Container, and exec if any.
        process: String,
        /// Its state.
        state: State,
        /// The call.
        op: Op,
    },
    /// There is nothing left to signal. Callers test the words.
    #[error("Process {0}: process already finished")]
    Finished(String),
    /// The container does not run. Callers test the words.
    #[error("Container {0:?}: init process is not running")]
    InitNotRunning(ContainerId),
    /// The container stands still.
    #[error("Container {0:?} is paused: resume it first")]
    Paused(ContainerId),
    /// A specification that is refused.
    #[error("Invalid specification")]
    Spec(#[from] spec::Error),
    /// JSON that is refused.
    #[error("Cannot read {what} as JSON")]
    Json {
        /// What it should have been.
        what: String,
        /// Why not.
        source: json::Error,
    },
    /// An argument that is refused.
    #[error("{what} {value:?} is refused: {reason}")]
    Argument {
        /// The field of the request.
        what: &'static str,
        /// Its value.
        value: String,
        /// Why.
        reason: String,
    },
    /// A limit beyond what the virtual machine can become.
    #[error(
        "linux.resources.{} = {}: the virtual machine can have at most {}; \
         most_vcpus and most_memory_mib in the configuration say how much",
        _0.what, _0.asked, _0.most
    )]
    Beyond(Beyond),
    /// A call or option that does not exist here.
    #[error("{0} is not supported by bulkhead")]
    Unsupported(&'static str),
    /// A transfer of a kind that does not exist here.
    #[error(
        "{0} is not supported by bulkhead: only tar archives (application/x-tar) between a container's path and a stream are"
    )]
    NoTransfer(String),
    /// A stream that nobody has opened.
    #[error("No stream {0:?} is open")]
    NoStream(String),
    /// As many copies as may be are under way.
    #[error("{0} copies are under way already")]
    TooManyCopies(usize),
    /// Whoever wanted the copy has gone.
    #[error("The caller has given the copy up")]
    GivenUp,
    /// What is under way must come to its end first.
    #[error("This must come to its end first: {0}")]
    Busy(String),
    /// A host path that cannot be used.
    #[error("Cannot {action} {}", path.display())]
    Path {
        /// A verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The configuration file is wrong.
    #[error("Cannot load the configuration")]
    Config(#[from] config::Error),
    /// Kernel or root image of the guest cannot be used.
    #[error("Cannot use the guest's assets")]
    Assets(#[from] assets::Error),
    /// `/dev/kvm` cannot be used.
    #[error("Cannot use /dev/kvm ({advice})")]
    Kvm {
        /// What to do.
        advice: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The virtual machine did not come up.
    #[error("Cannot start the virtual machine: {0}")]
    Boot(String),
    /// The virtual machine has ended.
    #[error("The virtual machine is gone: {0}")]
    VmGone(String),
    /// The guest, or its VMM, takes no connection for a stream.
    #[error("Cannot connect a stream to the guest")]
    Stream(#[source] io::Error),
    /// The guest refuses. The text comes from there, escaped and cut.
    #[error("{context}: {text}")]
    Agent {
        /// Words that callers expect before it.
        context: &'static str,
        /// The class.
        code: Code,
        /// What failed, as far as it can be told apart.
        cause: Kind,
        /// The text.
        text: String,
    },
    /// The guest did not answer in time.
    #[error("The guest did not answer {call} within {limit_ms} ms")]
    Deadline {
        /// The call.
        call: &'static str,
        /// The limit.
        limit_ms: u128,
    },
    /// The caller deleted what was being created.
    #[error("The creation of container {0:?} was cancelled")]
    Cancelled(ContainerId),
    /// A hook failed.
    #[error("Hook {hook} failed: {reason}")]
    Hook {
        /// Its moment, place and path.
        hook: String,
        /// One line, with what it said last.
        reason: String,
    },
    /// A system call on the host failed.
    #[error("Cannot {action}")]
    Host {
        /// A verb and its object.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// A handler panicked: our mistake.
    #[error("The shim made a mistake in {0}; its log says more")]
    Panicked(&'static str),
}

impl Error {
    /// The status code of the answer.
    #[must_use]
    #[deny(
        clippy::wildcard_enum_match_arm,
        reason = "a new variant must choose its code"
    )]
    pub fn code(&self) -> Code {
        match self {
            Error::Name(_) | Error::Spec(_) | Error::Json { .. } | Error::Argument { .. } => {
                Code::INVALID_ARGUMENT
            }
            Error::NoContainer(_)
            | Error::NoExec { .. }
            | Error::NoStream(_)
            | Error::Finished(_) => Code::NOT_FOUND,
            Error::ContainerExists(_) | Error::ExecExists { .. } => Code::ALREADY_EXISTS,
            Error::WrongState { .. }
            | Error::InitNotRunning(_)
            | Error::Paused(_)
            | Error::Config(_)
            | Error::Assets(_)
            | Error::Hook { .. }
            | Error::Beyond(_)
            | Error::Busy(_)
            | Error::Kvm { .. } => Code::FAILED_PRECONDITION,
            Error::Unsupported(_) | Error::NoTransfer(_) => Code::UNIMPLEMENTED,
            Error::TooManyCopies(_) => Code::RESOURCE_EXHAUSTED,
            Error::GivenUp => Code::CANCELLED,
            Error::Path { source, .. } | Error::Host { source, .. } => of_io(source),
            Error::Boot(_) | Error::Panicked(_) => Code::INTERNAL,
            Error::VmGone(_) => Code::UNAVAILABLE,
            // That a socket is not there does not mean that a process is not.
            Error::Stream(source) if of_io(source) == Code::RESOURCE_EXHAUSTED => {
                Code::RESOURCE_EXHAUSTED
            }
            Error::Stream(_) => Code::UNAVAILABLE,
            Error::Agent { code, .. } => *code,
            Error::Deadline { .. } => Code::DEADLINE_EXCEEDED,
            Error::Cancelled(_) => Code::ABORTED,
        }
    }

    /// The text with all causes.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.to_string();
        let mut next = self.source();
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text
    }
}

fn of_io(error: &io::Error) -> Code {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Code::NOT_FOUND,
        Some(libc::EACCES | libc::EPERM) => Code::PERMISSION_DENIED,
        Some(
            libc::EMFILE | libc::ENFILE | libc::ENOSPC | libc::ENOMEM | libc::EAGAIN | libc::EDQUOT,
        ) => Code::RESOURCE_EXHAUSTED,
        _ => Code::INTERNAL,
    }
}

impl From<&Error> for ttrpc::Error {
    fn from(error: &Error) -> Self {
        ttrpc::Error::RpcStatus(ttrpc::get_status(error.code(), error.text()))
    }
}

/// Names the system call that failed.
pub(crate) fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Host {
        action,
        source: error.into(),
    }
}
