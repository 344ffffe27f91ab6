//! The run-time directory of a pod: `/run/bulkhead/<namespace>/<group id>/`.
//!
//! Mode 0700. Holds `vsock.sock`, the directory `share` (on which the shim mounts
//! the pod's share in its own mount namespace), `processes.json` for `delete`, and
//! after an end that was not asked for `reason`. Removal knows these names and
//! never walks.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};

use crate::names::{GroupId, Namespace};

/// Where all run-time state is.
pub const RUN_DIR: &str = "/run/bulkhead";

/// Files that may be in the directory of a pod.
const FILES: [&str; 4] = [
    "vsock.sock",
    "processes.json",
    "processes.json.new",
    "reason",
];

/// A process that cannot be mistaken for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

impl Process {
    /// Looks up a living process.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name, in parentheses, may contain anything.
        let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
        let start_time = fields
            .split_whitespace()
            .nth(19)
            .and_then(|field| field.parse().ok());
        let start_time = start_time.ok_or_else(|| io::Error::other("no start time in stat"))?;
        Ok(Process { pid, start_time })
    }

    /// A descriptor of the process, unless it has ended.
    pub fn open(self) -> io::Result<Option<OwnedFd>> {
        let Some(pid) = Pid::from_raw(self.pid) else {
            return Ok(None);
        };
        let fd = match pidfd_open(pid, PidfdFlags::empty()) {
            Ok(fd) => fd,
            Err(Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The number may have been given to another process in between.
        match Self::of(self.pid) {
            Ok(now) if now == self => Ok(Some(fd)),
            _ => Ok(None),
        }
    }
}

/// Sends a signal; a process that has ended is no error.
pub fn signal(process: &OwnedFd, signal: Signal) -> io::Result<()> {
    match pidfd_send_signal(process, signal) {
        Ok(()) | Err(Errno::SRCH) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Waits for the end of a process; false if it lives after `limit_ms`.
pub fn ended(process: &OwnedFd, limit_ms: u32) -> bool {
    let limit = Timespec {
        tv_sec: i64::from(limit_ms / 1000),
        tv_nsec: i64::from(limit_ms % 1000) * 1_000_000,
    };
    let mut fds = [PollFd::new(process, PollFlags::IN)];
    poll(&mut fds, Some(&limit)).is_ok_and(|count| count > 0)
}

/// What `delete` must know of a pod.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Processes {
    /// The shim.
    pub shim: Option<Process>,
    /// The VMM, once there is one.
    pub vmm: Option<Process>,
    /// Path of the shim's socket.
    pub socket: Option<PathBuf>,
}

/// The directory of one pod.
#[derive(Clone, Debug)]
pub struct StateDir {
    path: PathBuf,
}

impl StateDir {
    /// Names the directory; it need not exist.
    #[must_use]
    pub fn of(namespace: &Namespace, group: &GroupId) -> Self {
        StateDir {
            path: Path::new(RUN_DIR)
                .join(namespace.as_str())
                .join(group.as_str()),
        }
    }

    /// Makes the directory and those above it.
    pub fn create(&self) -> io::Result<()> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path)?;
        builder.create(self.share())
    }

    /// The directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The mount point of the share.
    #[must_use]
    pub fn share(&self) -> PathBuf {
        self.path.join("share")
    }

    /// Does it exist?
    #[must_use]
    pub fn exists(&self) -> bool {
        self.path.is_dir()
    }

    /// What was written last by [`StateDir::record`].
    #[must_use]
    pub fn processes(&self) -> Processes {
        let text = fs::read(self.path.join("processes.json")).unwrap_or_default();
        serde_json::from_slice(&text).unwrap_or_default()
    }

    /// Writes what `delete` must know.
    pub fn record(&self, processes: &Processes) -> io::Result<()> {
        replace(
            &self.path.join("processes.json"),
            &serde_json::to_vec(processes)?,
        )
    }

    /// Writes why the pod ended.
    pub fn write_reason(&self, reason: &str) -> io::Result<()> {
        replace(&self.path.join("reason"), format!("{reason}\n").as_bytes())
    }

    /// Removes the directory and what is known to be in it. What is gone already
    /// is no error.
    pub fn remove(&self) -> io::Result<()> {
        for name in FILES {
            gone(fs::remove_file(self.path.join(name)))?;
        }
        gone(fs::remove_dir(self.share()))?;
        gone(fs::remove_dir(&self.path))?;
        // The namespace's directory goes with its last pod.
        if let Some(parent) = self.path.parent() {
            let _ = fs::remove_dir(parent);
        }
        Ok(())
    }
}

fn gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

/// Replaces a file by one with this content, at once.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let temporary = PathBuf::from(name);
    gone(fs::remove_file(&temporary))?;
    let mut file = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)?;
    file.write_all(content)?;
    fs::rename(&temporary, path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_known_by_its_start_not_by_its_number_lc_50() {
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let process = Process::of(child.id().cast_signed()).unwrap();
        let other = Process {
            start_time: process.start_time + 1,
            ..process
        };
        assert!(other.open().unwrap().is_none());
        let fd = process.open().unwrap().unwrap();
        assert!(!ended(&fd, 10));
        signal(&fd, Signal::KILL).unwrap();
        assert!(ended(&fd, 5000));
        child.wait().unwrap();
        assert!(process.open().unwrap().is_none());
        signal(&fd, Signal::KILL).unwrap();
    }

    #[test]
    fn removal_is_idempotent_and_touches_only_known_names_lc_49() {
        let root = tempfile::tempdir().unwrap();
        let dir = StateDir {
            path: root.path().join("ns/pod"),
        };
        dir.create().unwrap();
        let processes = Processes {
            socket: Some("/x".into()),
            ..Processes::default()
        };
        dir.record(&processes).unwrap();
        dir.write_reason("guest panic").unwrap();
        assert_eq!(dir.processes(), processes);
        dir.remove().unwrap();
        assert!(!dir.exists());
        dir.remove().unwrap();
        dir.create().unwrap();
        fs::write(dir.share().join("precious"), "x").unwrap();
        assert!(dir.remove().is_err());
        assert!(dir.share().join("precious").exists());
    }
}
