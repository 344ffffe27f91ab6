//! The run-time directory of a pod: `/run/bulkhead/<namespace>/<group id>/`.
//!
//! Mode 0700. Holds `vsock.sock`, the directory `share` (on which the shim mounts
//! the pod's share in its own mount namespace), `processes.json`, `cgroups.json` and
//! `tasks.json` for `delete`, the directory `containers` with what is told of each
//! (`explain.rs`), and after an end that was not asked for `reason`. Removal knows these
//! names, lists `containers` and
//! never walks.
//!
//! Two shims of one id may meet: one at its end, one at its beginning. Whoever makes
//! or removes something here or at the pod's socket holds the [`Lock`], a file beside
//! the directory; a shim removes only what records its own process.

pub mod kept;

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fd::OwnedFd,
    fs::FlockOperation,
    io::Errno,
    process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal},
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    cgroup,
    fate::{self, Fate},
    names::{ContainerId, GroupId, Namespace},
};

/// Where all run-time state is.
pub const RUN_DIR: &str = "/run/bulkhead";

/// Files that may be in the directory of a pod.
const FILES: [&str; 8] = [
    cgroup::RECORD,
    "vsock.sock",
    "processes.json",
    "processes.json.new",
    "reason",
    "reason.new",
    fate::FILE,
    "tasks.json.new",
];
/// Time for a killed process to be gone; it takes what the kernel needs.
const KILLED_MS: u32 = 1000;

/// A process that cannot be mistaken for another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostProcess {
    /// Its number.
    pub pid: i32,
    /// When it started, in clock ticks since boot (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

impl HostProcess {
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
        Ok(HostProcess { pid, start_time })
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
    pub shim: Option<HostProcess>,
    /// The VMM, once there is one.
    pub vmm: Option<HostProcess>,
    /// Path of the shim's socket.
    pub socket: Option<PathBuf>,
    /// The container for which the pod was made; another one than the pod's name
    /// says if a label groups containers.
    #[serde(default)]
    pub owner: Option<String>,
    /// The last time that another program was to take the shim's place.
    #[serde(default)]
    pub upgrade: Option<Upgrade>,
}

/// What came of taking another program for the shim.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Upgrade {
    /// How often that was tried.
    pub tries: u64,
    /// The version that runs since.
    pub version: String,
    /// Why it is still the old program.
    pub refused: Option<String>,
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

    /// The directories of all pods of a namespace.
    pub fn all(namespace: &Namespace) -> Vec<Self> {
        let entries = fs::read_dir(Path::new(RUN_DIR).join(namespace.as_str()));
        entries.map_or_else(
            |_| Vec::new(),
            |entries| {
                entries
                    .filter_map(Result::ok)
                    .map(|entry| StateDir { path: entry.path() })
                    .filter(StateDir::exists)
                    .collect()
            },
        )
    }

    /// Those of all pods of this host.
    #[must_use]
    pub fn everywhere() -> Vec<Self> {
        let below = |dir: PathBuf| {
            let entries = fs::read_dir(dir).into_iter().flatten().flatten();
            entries.map(|entry| entry.path())
        };
        let pods = below(RUN_DIR.into()).flat_map(below);
        let mut pods: Vec<_> = pods
            .map(|path| StateDir { path })
            .filter(StateDir::exists)
            .collect();
        pods.sort_by(|a, b| a.path.cmp(&b.path));
        pods
    }

    /// containerd's namespace.
    #[must_use]
    pub fn namespace(&self) -> String {
        let parent = self.path.parent().and_then(Path::file_name);
        parent.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// The pod's name.
    #[must_use]
    pub fn group(&self) -> String {
        let name = self.path.file_name();
        name.map_or_else(String::new, |name| name.to_string_lossy().into_owned())
    }

    /// Has it this container?
    #[must_use]
    pub fn has(&self, id: &ContainerId) -> bool {
        kept::file(&self.path, id).exists()
    }

    /// Waits until nobody else makes or removes anything of this pod.
    pub fn lock(&self) -> io::Result<Lock> {
        let parent = self.path.parent().unwrap_or_else(|| Path::new(RUN_DIR));
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        // No id begins with a dot.
        let path = parent.join(format!(".{name}.lock"));
        let flags = rustix::fs::OFlags::NOFOLLOW | rustix::fs::OFlags::CLOEXEC;
        loop {
            let mut builder = DirBuilder::new();
            match builder.recursive(true).mode(0o700).create(parent) {
                // It went while it was looked at, and may be there again.
                Err(error)
                    if error.kind() == io::ErrorKind::AlreadyExists
                        && fs::metadata(parent).map_or(true, |found| found.is_dir()) =>
                {
                    continue;
                }
                created => created?,
            }
            let opened = File::options()
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(flags.bits().cast_signed())
                .open(&path);
            let file = match opened {
                // The last pod of the namespace went in between.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => {
                    let _ = fs::remove_dir(parent);
                    return Err(error);
                }
                Ok(file) => file,
            };
            while let Err(error) = rustix::fs::flock(&file, FlockOperation::LockExclusive) {
                if error != Errno::INTR {
                    return Err(error.into());
                }
            }
            // Whoever had the lock before may have removed its file.
            let inode = file.metadata()?.ino();
            if fs::symlink_metadata(&path).is_ok_and(|there| there.ino() == inode) {
                return Ok(Lock {
                    _file: file,
                    path,
                    dir: self.path.clone(),
                });
            }
        }
    }

    /// Makes the directory the calling process's own, and clears what an earlier
    /// pod of the same name left.
    ///
    /// A pod whose shim lives is left alone: that is an error.
    pub fn take(&self, owner: &str, socket: Option<PathBuf>) -> io::Result<Held> {
        let me = HostProcess::of(std::process::id().cast_signed())?;
        let _lock = self.lock()?;
        self.sweep()?;
        let held = Held {
            dir: self.clone(),
            me,
        };
        let made = self.create().and_then(|()| {
            self.record(&Processes {
                shim: Some(me),
                vmm: None,
                socket,
                owner: Some(owner.to_owned()),
                upgrade: None,
            })
        });
        if let Err(error) = made {
            // It may record nobody yet.
            let _ = self.remove();
            return Err(error);
        }
        Ok(held)
    }

    /// That of the program before this one, which was the same process.
    pub(crate) fn unpack(&self) -> io::Result<Held> {
        let me = HostProcess::of(std::process::id().cast_signed())?;
        Ok(Held {
            dir: self.clone(),
            me,
        })
    }

    fn sweep(&self) -> io::Result<()> {
        if !self.exists() {
            return Ok(());
        }
        let processes = self.processes();
        if let Some(shim) = processes.shim
            && let Some(process) = shim.open()?
            && !ended(&process, 0)
        {
            let text = format!("it is in use by a shim with pid {}", shim.pid);
            return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
        }
        kill(processes.vmm);
        if let Err(error) = cgroup::remove_recorded(&self.path, cgroup::LEAVE_DELETE) {
            warn!(error = error.text(), "something is left of an earlier VMM");
        }
        self.remove()
    }

    /// Makes the directory and those above it.
    fn create(&self) -> io::Result<()> {
        let mut builder = DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(&self.path)?;
        builder.create(kept::dir(self))?;
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
    fn record(&self, processes: &Processes) -> io::Result<()> {
        replace(
            &self.path.join("processes.json"),
            &serde_json::to_vec(processes)?,
        )
    }

    /// Removes the directory and what is known to be in it. What is gone already
    /// is no error.
    pub fn remove(&self) -> io::Result<()> {
        for name in FILES {
            gone(fs::remove_file(self.path.join(name)))?;
        }
        kept::remove(self)?;
        gone(fs::remove_dir(self.share()))?;
        gone(fs::remove_dir(&self.path))?;
        Ok(())
    }
}

/// The right to make and remove things of one pod. Dropping it gives it up, and
/// leaves no trace if there is no such pod.
#[derive(Debug)]
pub struct Lock {
    _file: File,
    path: PathBuf,
    dir: PathBuf,
}

impl Drop for Lock {
    fn drop(&mut self) {
        if !self.dir.exists() {
            let _ = fs::remove_file(&self.path);
            // The namespace's directory goes with its last pod.
            if let Some(parent) = self.path.parent() {
                let _ = fs::remove_dir(parent);
            }
        }
    }
}

/// The directory of a pod while it is this process's own. Dropping it removes it.
#[derive(Debug)]
pub struct Held {
    dir: StateDir,
    me: HostProcess,
}

impl Held {
    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &StateDir {
        &self.dir
    }

    /// Records the VMM for `delete`.
    pub fn record_vmm(&self, vmm: HostProcess) -> io::Result<()> {
        self.while_ours(|dir| {
            let mut processes = dir.processes();
            processes.vmm = Some(vmm);
            dir.record(&processes)
        })
    }

    /// Records what came of taking another program for the shim.
    pub fn record_upgrade(&self, refused: Option<String>) -> io::Result<()> {
        self.while_ours(|dir| {
            let mut processes = dir.processes();
            let tries = processes.upgrade.map_or(0, |upgrade| upgrade.tries);
            processes.upgrade = Some(Upgrade {
                tries: tries + 1,
                version: env!("CARGO_PKG_VERSION").to_owned(),
                refused,
            });
            dir.record(&processes)
        })
    }

    /// Records what became of a container; `None` once it is deleted.
    pub fn record_fate(&self, id: &ContainerId, fate: Option<Fate>) -> io::Result<()> {
        self.while_ours(|dir| fate::record(&dir.path, id, fate))
    }

    /// Writes why the pod ended.
    pub fn write_reason(&self, reason: &str) -> io::Result<()> {
        self.while_ours(|dir| replace(&dir.path.join("reason"), format!("{reason}\n").as_bytes()))
    }

    /// Removes the directory, if it is not another shim's by now.
    pub fn remove(&self) -> io::Result<()> {
        self.while_ours(StateDir::remove)
    }

    fn while_ours(&self, act: impl FnOnce(&StateDir) -> io::Result<()>) -> io::Result<()> {
        if !self.dir.exists() {
            return Ok(());
        }
        let _lock = self.dir.lock()?;
        if self.dir.processes().shim == Some(self.me) {
            act(&self.dir)?;
        }
        Ok(())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        if let Err(error) = self.remove() {
            warn!(%error, "cannot remove the state directory");
        }
    }
}

/// Kills a process and waits for its end.
pub fn kill(process: Option<HostProcess>) {
    if let Some(process) = process.and_then(|process| process.open().ok().flatten()) {
        let _ = signal(&process, Signal::KILL);
        ended(&process, KILLED_MS);
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
    let written = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&temporary, path));
    if written.is_err() {
        // On a full disk half a file is worth nothing and in the way.
        let _ = fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests;
