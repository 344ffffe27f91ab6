//! Everything that a request can fail with, and the code that its caller gets.

use std::{io, time::Duration};

use bulkhead_agent_api::{
    agent::{Cause, cause::Kind},
    cause,
};
use ttrpc::{Code, get_status};

use crate::{
    channel::{Failure, FailureKind},
    container::state::{Op, State},
    spec::{self, capacity::Beyond},
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
    /// A stream that a request names and the host has not opened.
    #[error("Stream {0} has not come")]
    StreamMissing(u64),
    /// This is not the first process of a machine.
    #[error("The size of this machine is not the agent's to change")]
    NotTheMachine,
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
    /// The new process reported why it cannot become the program.
    #[error("{}", .0.text)]
    Init(Failure),
    /// The copying process reported why it cannot go on.
    #[error("{}", .0.text)]
    Copy(Failure),
    /// The copying process ended without a report.
    #[error("The copy was killed: its container has ended, or has no memory left")]
    CopyKilled,
    /// The host has given a copy up.
    #[error("The copy over stream {0} was given up")]
    CopyGivenUp(u64),
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
    /// A limit beyond what the machine has.
    #[error(
        "linux.resources.{} = {}: the virtual machine has at most {}",
        _0.what, _0.asked, _0.most
    )]
    Beyond(Beyond),
    /// A limit below what is in use.
    #[error("linux.resources.memory.limit = {limit}: {used} bytes are in use")]
    InUse {
        /// The limit.
        limit: u64,
        /// What is in use.
        used: u64,
    },
    /// Processes that go on.
    #[error("The container does not stand still within {0:?}")]
    Restless(Duration),
    /// Files that are not with the host.
    #[error("The container's files are not written back within {0:?}")]
    Unwritten(Duration),
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
            Self::WrongState { .. }
            | Self::Running { .. }
            | Self::NoTerminal { .. }
            | Self::Beyond(_)
            | Self::InUse { .. }
            | Self::NotTheMachine
            | Self::StreamMissing(_) => Code::FAILED_PRECONDITION,
            Self::BadId(_)
            | Self::BadSignal(_)
            | Self::BadSize { .. }
            | Self::StreamTaken(_)
            | Self::Spec(_)
            | Self::Limit { .. } => Code::INVALID_ARGUMENT,
            Self::Init(failure) => match failure.kind {
                FailureKind::NotFound | FailureKind::NotExecutable => Code::INVALID_ARGUMENT,
                FailureKind::Step | FailureKind::Archive => Code::INTERNAL,
            },
            Self::Copy(failure) => of_copy(failure),
            Self::CopyKilled => Code::FAILED_PRECONDITION,
            Self::CopyGivenUp(_) => Code::CANCELLED,
            Self::Restless(_) | Self::Unwritten(_) => Code::DEADLINE_EXCEEDED,
            Self::InitKilled | Self::System { .. } => Code::INTERNAL,
        }
    }

    /// What the caller can tell apart beside the code.
    #[deny(clippy::wildcard_enum_match_arm)]
    fn cause(&self) -> Cause {
        let (kind, errno) = match self {
            Self::Spec(_) => (Kind::SPECIFICATION, None),
            Self::Init(failure) => {
                let kind = match failure.kind {
                    FailureKind::NotFound => Kind::PROGRAM_NOT_FOUND,
                    FailureKind::NotExecutable => Kind::PROGRAM_NOT_EXECUTABLE,
                    FailureKind::Step | FailureKind::Archive => Kind::STEP,
                };
                (kind, failure.errno)
            }
            Self::Copy(failure) => (Kind::OTHER, failure.errno),
            Self::InitKilled | Self::CopyKilled => (Kind::KILLED, None),
            Self::Limit { source, .. } => (Kind::LIMIT, source.raw_os_error()),
            Self::System { source, .. } => (Kind::STEP, source.raw_os_error()),
            Self::NoContainer(_)
            | Self::NoProcess { .. }
            | Self::Ended { .. }
            | Self::ContainerExists(_)
            | Self::ProcessExists { .. }
            | Self::WrongState { .. }
            | Self::Running { .. }
            | Self::BadId(_)
            | Self::BadSignal(_)
            | Self::BadSize { .. }
            | Self::StreamTaken(_)
            | Self::StreamMissing(_)
            | Self::Beyond(_)
            | Self::InUse { .. }
            | Self::Restless(_)
            | Self::Unwritten(_)
            | Self::CopyGivenUp(_)
            | Self::NoTerminal { .. }
            | Self::NotTheMachine => (Kind::OTHER, None),
        };
        let kind = match errno {
            Some(libc::ENOMEM) => Kind::OUT_OF_MEMORY,
            _ => kind,
        };
        Cause {
            kind: kind.into(),
            errno: errno.map_or(0, i32::unsigned_abs),
            ..Cause::default()
        }
    }
}

/// What is there, and what there is room for, is the container's affair; what fails
/// for another reason should not.
fn of_copy(failure: &Failure) -> Code {
    match (failure.kind, failure.errno) {
        (FailureKind::NotFound, _) => Code::NOT_FOUND,
        (FailureKind::Archive, _) | (_, Some(libc::EINVAL | libc::ENAMETOOLONG)) => {
            Code::INVALID_ARGUMENT
        }
        (_, Some(libc::ENOSPC | libc::EDQUOT | libc::ENOMEM | libc::EMFILE | libc::ENFILE)) => {
            Code::RESOURCE_EXHAUSTED
        }
        (
            _,
            Some(
                libc::ENOENT
                | libc::ENOTDIR
                | libc::EISDIR
                | libc::EEXIST
                | libc::ELOOP
                | libc::EXDEV
                | libc::EROFS
                | libc::EACCES
                | libc::EPERM
                | libc::EBUSY
                | libc::EFBIG,
            ),
        ) => Code::FAILED_PRECONDITION,
        _ => Code::INTERNAL,
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        let mut status = get_status(error.code(), error.to_string());
        cause::add(&mut status, &error.cause());
        Self::RpcStatus(status)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_says_its_cause_as_a_code() {
        let check = |error: Error, kind: Kind, errno: u32| {
            let ttrpc::Error::RpcStatus(status) = error.into() else {
                panic!("no status");
            };
            let cause = cause::of(&status);
            assert_eq!((cause.kind.enum_value(), cause.errno), (Ok(kind), errno));
        };
        let failed = |kind, errno| {
            Error::Init(Failure {
                text: String::new(),
                kind,
                errno,
            })
        };
        let (enoent, enomem, eacces) = (Some(libc::ENOENT), Some(libc::ENOMEM), Some(libc::EACCES));
        check(
            failed(FailureKind::NotFound, enoent),
            Kind::PROGRAM_NOT_FOUND,
            2,
        );
        check(
            failed(FailureKind::NotFound, None),
            Kind::PROGRAM_NOT_FOUND,
            0,
        );
        let not_executable = failed(FailureKind::NotExecutable, eacces);
        check(not_executable, Kind::PROGRAM_NOT_EXECUTABLE, 13);
        check(
            failed(FailureKind::NotExecutable, enomem),
            Kind::OUT_OF_MEMORY,
            12,
        );
        check(failed(FailureKind::Step, enomem), Kind::OUT_OF_MEMORY, 12);
        check(failed(FailureKind::Step, eacces), Kind::STEP, 13);
        check(Error::InitKilled, Kind::KILLED, 0);
        check(spec::Error::missing("root").into(), Kind::SPECIFICATION, 0);
        let limit = Error::Limit {
            file: "pids.max".into(),
            value: "1".into(),
            source: io::Error::from_raw_os_error(libc::EINVAL),
        };
        check(limit, Kind::LIMIT, 22);
        check(Error::BadSignal(99), Kind::OTHER, 0);
    }
}
