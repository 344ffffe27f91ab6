//! Everything that a request can fail with, and the code that its caller gets.

use std::io;

use ttrpc::{Code, get_status};

use crate::{
    container::state::{Op, State},
    spec,
};

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No container has this id.
    #[error("No container {0:?} in this pod")]
    NoContainer(String),
    /// No process has this id.
    #[error("No process {exec_id:?} in container {container_id:?}")]
    NoProcess {
        /// The container.
        container_id: String,
        /// The process.
        exec_id: String,
    },
    /// The process has ended.
    #[error("Process {pid} has ended")]
    Ended {
        /// Its id in the guest.
        pid: u32,
    },
    /// The id of a container is taken.
    #[error("Container {0:?} exists already")]
    ContainerExists(String),
    /// The id of a process is taken.
    #[error("Process {exec_id:?} exists already in container {container_id:?}")]
    ProcessExists {
        /// The container.
        container_id: String,
        /// The process.
        exec_id: String,
    },
    /// The container is in a state in which this cannot be done.
    #[error("Container {id:?} is {state:?}: cannot {op:?} it")]
    WrongState {
        /// The container.
        id: String,
        /// Its state.
        state: State,
        /// What was asked for.
        op: Op,
    },
    /// The process has not ended.
    #[error("Process {pid} is still running: cannot delete it")]
    Running {
        /// Its id in the guest.
        pid: u32,
    },
    /// An id that is not one.
    #[error(
        "{0:?} is not an id: 1 to 128 letters, digits, '_', '.' or '-', the first a letter or digit"
    )]
    BadId(String),
    /// A number that is no signal.
    #[error("{0} is not a signal")]
    BadSignal(u32),
    /// A stream id that another request has named.
    #[error("Stream {0} has been claimed already")]
    StreamTaken(u64),
    /// A size that no terminal can have.
    #[error("A terminal cannot have {columns} columns and {rows} rows")]
    BadSize {
        /// Columns asked for.
        columns: u32,
        /// Rows asked for.
        rows: u32,
    },
    /// The process has pipes.
    #[error("Process {pid} has no terminal")]
    NoTerminal {
        /// Its id in the guest.
        pid: u32,
    },
    /// The specification is refused.
    #[error(transparent)]
    Spec(#[from] spec::Error),
    /// The program is missing or cannot be executed.
    #[error("{0}")]
    Executable(String),
    /// The new process reported that a step failed.
    #[error("{0}")]
    Init(String),
    /// The new process ended without a report.
    #[error("The process was killed before it was ready")]
    InitKilled,
    /// A cgroup file could not be used.
    #[error("Cannot set {file} of the container's cgroup to {value:?}: {source}")]
    Limit {
        /// The file.
        file: String,
        /// What was written.
        value: String,
        /// The cause.
        source: io::Error,
    },
    /// The guest could not do it.
    #[error("Cannot {doing}: {source}")]
    System {
        /// What was being done.
        doing: &'static str,
        /// The cause.
        source: io::Error,
    },
}

impl Error {
    /// The one mapping to status codes.
    #[deny(clippy::wildcard_enum_match_arm)]
    pub fn code(&self) -> Code {
        match self {
            Self::NoContainer(_) | Self::NoProcess { .. } | Self::Ended { .. } => Code::NOT_FOUND,
            Self::ContainerExists(_) | Self::ProcessExists { .. } => Code::ALREADY_EXISTS,
            Self::WrongState { .. } | Self::Running { .. } | Self::NoTerminal { .. } => {
                Code::FAILED_PRECONDITION
            }
            Self::BadId(_)
            | Self::BadSignal(_)
            | Self::BadSize { .. }
            | Self::StreamTaken(_)
            | Self::Spec(_)
            | Self::Executable(_)
            | Self::Limit { .. } => Code::INVALID_ARGUMENT,
            Self::Init(_) | Self::InitKilled | Self::System { .. } => Code::INTERNAL,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(get_status(error.code(), error.to_string()))
    }
}

/// Says what was being done when a system call failed.
pub(crate) trait Doing<T> {
    fn doing(self, what: &'static str) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Doing<T> for Result<T, E> {
    fn doing(self, doing: &'static str) -> Result<T, Error> {
        self.map_err(|e| Error::System {
            doing,
            source: e.into(),
        })
    }
}
