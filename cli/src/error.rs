//! What a command fails with: one sentence with the cause, and where there is one
//! the next step; and the exit code.

use std::{error::Error as _, io, path::PathBuf};

use thiserror::Error;

/// The result of a step.
pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

/// Exit code for failures of bulkhead itself.
pub(crate) const OWN_FAILURE: u8 = 125;

/// Why a command failed.
#[derive(Debug, Error)]
pub(crate) enum Error {
    /// Something on the command line or in a file of the caller.
    #[error("{what} {value:?} is refused: {reason}")]
    Refused {
        /// What it should have been.
        what: &'static str,
        /// The value.
        value: String,
        /// Why, and what to do.
        reason: String,
    },
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
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] bulkhead_image::Error),
    /// Only root can mount file systems and open what a VM needs.
    #[error("Only root can do this; run it with sudo")]
    NotRoot,
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

impl Error {
    /// The exit code of the command.
    pub(crate) fn exit_code(&self) -> u8 {
        match self {
            Error::Program { code, .. } | Error::Ended { code, .. } => *code,
            Error::Gone { started: true, .. } => 137,
            Error::Interrupted(signal) => signal.saturating_add(128),
            Error::Refused { .. }
            | Error::Path { .. }
            | Error::Host { .. }
            | Error::Image(_)
            | Error::NotRoot
            | Error::Exists(_)
            | Error::NoContainer(_)
            | Error::NotRunning(_)
            | Error::Running(_)
            | Error::NoBinary(_)
            | Error::ShimStart(_)
            | Error::Call(_)
            | Error::Gone { started: false, .. } => OWN_FAILURE,
        }
    }

    /// The text with all causes.
    pub(crate) fn text(&self) -> String {
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

/// Names what was done with a path when a call failed.
pub(crate) fn at<E: Into<io::Error>>(
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
pub(crate) fn host<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Error {
    move |error| Error::Host {
        action,
        source: error.into(),
    }
}
