//! The channel between the agent and a container's init.
//!
//! A pair of `SOCK_SEQPACKET` sockets: a message is whole or not there, and
//! descriptors travel with it. Order of messages, and no others:
//!
//! ```text
//! agent → helper   job       descriptors (see `Fds`); the job itself is in a memfd
//! helper → agent   Cloned    the new process is there
//! init → agent     Ready     with the terminal's master, if there is one
//! agent → init     start     one byte
//! init → agent     (closed)  the program runs
//! any → agent      Failed    instead of any of the above
//! ```

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Seek, Write},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::PathBuf,
};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::{Deserialize, Serialize};

use crate::spec::plan::{ContainerPlan, ProcessPlan};

/// Most bytes of a report: a cause with its paths.
const REPORT_BYTES_MAX: usize = 16 * 1024;

/// Most descriptors in one message.
const FDS_MAX: usize = 6;

/// What the helper has to do.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Job {
    /// Create a container and its first process.
    Create {
        /// The container.
        plan: Box<ContainerPlan>,
        /// Name of the session keyring of its processes.
        keyring: String,
    },
    /// Create a further process in a container.
    Exec {
        /// The process.
        process: Box<ProcessPlan>,
        /// Where.
        container: Place,
    },
    /// Copy files into a container or out of it.
    Copy {
        /// Which way, and what.
        copy: Copy,
        /// Where.
        container: Place,
    },
}

/// A copy: one end is a tar archive in the process's standard input or output, the
/// other one a path of a container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Copy {
    /// Into a directory, which is made if it is missing.
    In {
        /// The directory.
        path: PathBuf,
        /// Whose the files will be.
        owners: Owners,
    },
    /// Of a file or a directory.
    Out {
        /// What.
        path: PathBuf,
        /// How much of it.
        extent: Extent,
    },
}

/// Whose files are that are copied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Owners {
    /// All are of the container's root.
    Root,
    /// As the archive tells.
    Archive,
}

/// How much is copied out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Extent {
    /// A file with its content, a directory with all that is in it.
    Whole,
    /// What stands in its header.
    Header,
}

/// A container, as a further process of it must know it.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Place {
    /// Id of its first process in the guest.
    pub init: u32,
    /// Last names of its cgroup, `containers/ID`.
    pub cgroup: PathBuf,
    /// Whether it has a user namespace of its own.
    pub own_user: bool,
    /// Name of the session keyring of its processes.
    pub keyring: String,
}

/// The descriptors that a job needs.
#[derive(Debug)]
pub(crate) struct Fds {
    /// Standard input, output and error of the process; with a terminal all
    /// are `/dev/null` and are replaced by it.
    pub stdio: [OwnedFd; 3],
    /// Directory of the container's cgroup.
    pub cgroup: OwnedFd,
    /// The container's first process, for a further one.
    pub container: Option<OwnedFd>,
}

/// What the helper and the container's init tell the agent.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The process exists.
    Cloned {
        /// Its id, in the agent's namespace.
        pid: u32,
    },
    /// All that can fail before the start has been done.
    Ready,
    /// It could not be made.
    Failed(Failure),
}

/// Why a process could not be made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// One sentence with the cause.
    pub text: String,
    /// What failed.
    pub kind: FailureKind,
    /// The kernel's error number, if it had a part in it.
    pub errno: Option<i32>,
}

/// What failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FailureKind {
    /// The program, or what is to be copied, does not exist.
    NotFound,
    /// The program exists, but cannot be executed.
    NotExecutable,
    /// A step before it.
    Step,
    /// What the archive says is refused.
    Archive,
}

/// Makes a channel: the agent's end (not blocking) and the helper's.
pub(crate) fn pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC,
        None,
    )?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Sends a job; a fresh channel always has room for it.
pub(crate) fn send_job(channel: impl AsFd, job: &Job, fds: &Fds) -> io::Result<()> {
    let memfd = rustix::fs::memfd_create("job", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memfd);
    file.write_all(&serde_json::to_vec(job)?)?;
    file.rewind()?;
    let mut list = vec![file.as_fd(), fds.cgroup.as_fd()];
    list.extend(fds.stdio.iter().map(AsFd::as_fd));
    list.extend(fds.container.iter().map(AsFd::as_fd));
    send(channel, b"job", &list)
}

/// Lets the process start.
pub(crate) fn send_start(channel: impl AsFd) -> io::Result<()> {
    send(channel, b"s", &[])
}

/// Receives a report and the descriptor with it; `None` when the channel is
/// closed.
pub(crate) fn receive_report(channel: impl AsFd) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    let mut bytes = vec![0; REPORT_BYTES_MAX];
    let (length, mut fds) = receive(channel, &mut bytes)?;
    if length == 0 {
        return Ok(None);
    }
    let report = serde_json::from_slice(&bytes[..length])?;
    Ok(Some((report, fds.pop())))
}

/// The end of the helper and of the container's init.
#[derive(Debug)]
pub(crate) struct Channel(OwnedFd);

impl Channel {
    /// Takes the channel from standard input, which remains a copy of it until
    /// the process gets its own.
    pub(crate) fn from_stdin() -> io::Result<Self> {
        const AFTER_STDIO: i32 = 3;
        Ok(Self(rustix::io::fcntl_dupfd_cloexec(
            rustix::stdio::stdin(),
            AFTER_STDIO,
        )?))
    }

    /// Receives the job.
    pub(crate) fn job(&self) -> io::Result<(Job, Fds)> {
        let mut bytes = [0; 8];
        let (_, fds) = receive(&self.0, &mut bytes)?;
        let mut fds = fds.into_iter();
        let mut next = || fds.next().ok_or(io::ErrorKind::UnexpectedEof);
        let mut memfd = File::from(next()?);
        let cgroup = next()?;
        let stdio = [next()?, next()?, next()?];
        let mut json = Vec::new();
        memfd.read_to_end(&mut json)?;
        Ok((
            serde_json::from_slice(&json)?,
            Fds {
                stdio,
                cgroup,
                container: fds.next(),
            },
        ))
    }

    /// Sends a report, with a descriptor if there is one.
    pub(crate) fn report(&self, report: &Report, fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        send(&self.0, &report_bytes(report)?, fd.as_slice())
    }

    /// Waits for the agent's word to start; false if the agent has gone away.
    ///
    /// A plain read, since a system call filter may be in force already.
    pub(crate) fn wait_for_start(&self) -> bool {
        let mut byte = [0];
        matches!(
            rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut byte)),
            Ok(1)
        )
    }
}

/// A report as a message; of a cause that is too long the end is missing.
fn report_bytes(report: &Report) -> io::Result<Vec<u8>> {
    /// In JSON a character takes twelve bytes at most.
    const TEXT_CHARS_MAX: usize = REPORT_BYTES_MAX / 16;
    let bytes = serde_json::to_vec(report)?;
    let failure = match report {
        Report::Failed(failure) if bytes.len() > REPORT_BYTES_MAX => failure,
        _ => return Ok(bytes),
    };
    let mut text: String = failure.text.chars().take(TEXT_CHARS_MAX).collect();
    text.push('…');
    let cut = Failure {
        text,
        kind: failure.kind,
        errno: failure.errno,
    };
    Ok(serde_json::to_vec(&Report::Failed(cut))?)
}

fn send(channel: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let data = [IoSlice::new(bytes)];
    rustix::io::retry_on_intr(|| sendmsg(&channel, &data, &mut control, SendFlags::NOSIGNAL))?;
    Ok(())
}

fn receive(channel: impl AsFd, bytes: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(bytes)];
    let message = rustix::io::retry_on_intr(|| {
        recvmsg(&channel, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)
    })?;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_cause_arrives_cut_and_keeps_its_kind() {
        for text in [
            "x".repeat(20_000),
            "\u{1}\u{10ffff}".repeat(20_000),
            "é".into(),
        ] {
            let failure = Failure {
                text: text.clone(),
                kind: FailureKind::NotExecutable,
                errno: Some(libc::E2BIG),
            };
            let bytes = report_bytes(&Report::Failed(failure)).unwrap();
            assert!(bytes.len() <= REPORT_BYTES_MAX, "{}", bytes.len());
            let Report::Failed(seen) = serde_json::from_slice(&bytes).unwrap() else {
                panic!("another report");
            };
            let seen_text = seen.text.trim_end_matches('…');
            assert!(!seen_text.is_empty() && text.starts_with(seen_text));
            assert_eq!(seen.kind, FailureKind::NotExecutable);
            assert_eq!(seen.errno, Some(libc::E2BIG));
        }
    }
}
