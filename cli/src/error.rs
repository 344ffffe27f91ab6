//! What a command fails with: one sentence with the cause, and where there is one
//! the next step; and the exit code.

use std::error::Error as _;

pub(crate) use bulkhead_client::{at, host};

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
    /// The container.
    #[error(transparent)]
    Container(#[from] bulkhead_client::Error),
    /// What the shim says of a specification.
    #[error("{0}")]
    Shim(String),
    /// The network of containers.
    #[error(
        "Cannot {action} for the network of the container; `bulkhead check` says what is \
         missing, and `--network none` does without"
    )]
    Network {
        /// A verb and its object.
        action: &'static str,
        /// The cause.
        source: std::io::Error,
    },
    /// The image cannot be used.
    #[error(transparent)]
    Image(#[from] bulkhead_image::Error),
    /// Only root can mount file systems and open what a VM needs.
    #[error("Only root can do this; run it with sudo")]
    NotRoot,
}

impl Error {
    /// The exit code of the command.
    pub(crate) fn exit_code(&self) -> u8 {
        use bulkhead_client::Error as Client;
        match self {
            Error::Container(error) => match error {
                Client::Program { code, .. } | Client::Ended { code, .. } => *code,
                Client::Gone { started: true, .. } => 137,
                Client::Interrupted(signal) => signal.saturating_add(128),
                Client::Path { .. }
                | Client::Host { .. }
                | Client::Exists(_)
                | Client::NoContainer(_)
                | Client::NotRunning(_)
                | Client::Running(_)
                | Client::Starting(_)
                | Client::Silent(_)
                | Client::Stubborn(..)
                | Client::Damaged { .. }
                | Client::Output(_)
                | Client::NoBinary(_)
                | Client::ShimStart(_)
                | Client::Call(_)
                | Client::Gone { started: false, .. } => OWN_FAILURE,
            },
            Error::Refused { .. }
            | Error::Shim(_)
            | Error::Network { .. }
            | Error::Image(_)
            | Error::NotRoot => OWN_FAILURE,
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

/// A refusal of a value.
pub(crate) fn refused(what: &'static str, value: &str, reason: &str) -> Error {
    Error::Refused {
        what,
        value: value.to_owned(),
        reason: reason.to_owned(),
    }
}
