//! What can fail with a container: one sentence with the cause, and where there is one
//! the next step.

use std::{io, path::PathBuf};

use thiserror::Error;

/// The result of a step.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why something failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A path of the host that cannot be used.
    #[error("Cannot {action} {}", path.display())]
    Path {
        /// A verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A system call failed.
    #[error("Cannot {action}")]
    Host {
        /// A verb and its object.
        action: &'static str,
        /// The cause.
        source: io::Error,
    },
    /// The id is taken.
    #[error(
        "Container {0:?} exists already; remove it with `bulkhead rm {0}` or choose another --name"
    )]
    Exists(String),
    /// No such container.
    #[error("There is no container {0:?}; `bulkhead list` shows all")]
    NoContainer(String),
    /// It has ended.
    #[error("Container {0:?} does not run; `bulkhead list` shows its state")]
    NotRunning(String),
    /// It has not ended.
    #[error(
        "Container {0:?} still runs; end it with `bulkhead kill {0}` or use `bulkhead rm --force {0}`"
    )]
    Running(String),
    /// It is being made.
    #[error(
        "Container {0:?} is still being started; wait, or end its start with `bulkhead rm --force {0}`"
    )]
    Starting(String),
    /// Its supervisor says nothing.
    #[error(
        "The supervisor of container {0:?} does not answer; end both with `bulkhead rm --force {0}`"
    )]
    Silent(String),
    /// What was to end goes on.
    #[error("The `bulkhead run` of container {0:?} does not end; kill its process {1}")]
    Stubborn(String, String),
    /// What is remembered of it cannot be read.
    #[error(
        "The record of container {id:?} is damaged: {reason}; remove it with `bulkhead rm {id}`"
    )]
    Damaged {
        /// The container.
        id: String,
        /// Why.
        reason: String,
    },
    /// Our own output cannot be written.
    #[error("The command was killed, for its output cannot be written")]
    Output(#[source] io::Error),
    /// A binary of ours is missing.
    #[error(
        "Cannot find {0} beside bulkhead or in PATH; install it, or say with `bulkhead check` what else is missing"
    )]
    NoBinary(&'static str),
    /// The shim did not start.
    #[error("The supervisor did not start: {0}")]
    ShimStart(String),
    /// The shim refused a call.
    #[error("{0}")]
    Call(String),
    /// The program cannot be run.
    #[error("{text}")]
    Program {
        /// 126 or 127.
        code: u8,
        /// The shim's words.
        text: String,
    },
    /// The shim, and with it the VM, is gone.
    #[error("The container was killed: {reason}")]
    Gone {
        /// One sentence.
        reason: String,
        /// Did the program run already?
        started: bool,
    },
    /// The VM ended under the running program.
    #[error("The container was killed: {reason}")]
    Ended {
        /// One sentence.
        reason: String,
        /// What the shim gives as the exit status: 137, or 255 if the VM failed.
        code: u8,
    },
    /// A signal came before the program ran.
    #[error("Interrupted by signal {0} before the command ran")]
    Interrupted(u8),
}

/// Names what was done with a path when a call failed.
pub fn at<E: Into<io::Error>>(
    action: &'static str,
    path: impl Into<PathBuf>,
) -> impl FnOnce(E) -> Error {
    let path = path.into();
    move |error| Error::Path {
        action,
        path,
        source: error.into(),
    }
}

/// Names the system call that failed.
pub fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Host {
        action,
        source: error.into(),
    }
}
