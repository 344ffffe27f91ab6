//! The cgroup of one container: a directory below the fixed parent.
//!
//! Owns its limits, its device program, the list of its processes, its accounts, its
//! freezer and its end.
//! Promises that a [`Cgroup`] that goes away takes its processes with it. The
//! specification's `cgroupsPath` has no say: it names a place in the host's
//! tree, and the container sees its own directory as the root anyway.

mod devices;
mod freezer;
mod oom;
mod stats;

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::chown,
    },
    path::{Path, PathBuf},
};

pub(crate) use self::oom::OomWatch;
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags};
use tokio::io::Interest;

use crate::{
    bpf::{self, Hook},
    error::{Doing, Error},
    spec::{
        InForce,
        plan::{Absent, Resources, Setting},
    },
    sys,
};

/// A container's cgroup; dropping it kills what is in it and removes it.
#[derive(Debug)]
pub(crate) struct Cgroup {
    path: PathBuf,
    directory: Option<OwnedFd>,
}

impl Cgroup {
    /// Makes the cgroup with its limits in force.
    pub(crate) fn create(parent: &Path, id: &str, resources: &Resources) -> Result<Self, Error> {
        let path = parent.join(id);
        fs::create_dir(&path).doing("make the container's cgroup")?;
        let mut cgroup = Self {
            path,
            directory: None,
        };
        let directory = rustix::fs::open(&cgroup.path, DIRECTORY, Mode::empty())
            .doing("open the container's cgroup")?;
        let directory = cgroup.directory.insert(directory);
        let program = bpf::load_program(Hook::Device, &devices::program(&resources.devices))
            .doing("load the device rules")?;
        bpf::attach(Hook::Device, directory, program).doing("attach the device rules")?;
        for setting in limits_of_the_tree().iter().chain(&resources.settings) {
            set(&cgroup.path, setting)?;
        }
        Ok(cgroup)
    }

    /// Changes limits of a container that exists, all or none. May wait for memory to
    /// become free.
    pub(crate) fn change(&self, settings: &[Setting]) -> Result<(), Error> {
        change(&self.path, settings)
    }

    /// The limits that an update may leave as they are.
    pub(crate) fn in_force(&self) -> InForce {
        let cpu = self.text("cpu.max");
        let (quota, period) = cpu.trim_end().split_once(' ').unwrap_or(("max", "100000"));
        InForce {
            memory: stats::number(&self.text("memory.max")),
            quota: stats::number(quota),
            period: stats::number(period).unwrap_or(100_000),
        }
    }

    /// Bytes of memory that it has now.
    pub(crate) fn memory_in_use(&self) -> u64 {
        stats::number(&self.text("memory.current")).unwrap_or(0)
    }

    /// Lets a user of the guest move processes and enable controllers in it, but
    /// not change its limits.
    pub(crate) fn give_to(&self, uid: u32) -> Result<(), Error> {
        /// Every kernel lets these be delegated.
        const FILES: &str = "cgroup.procs\ncgroup.threads\ncgroup.subtree_control\n";
        const DOING: &str = "hand over the container's cgroup";
        let files = fs::read_to_string("/sys/kernel/cgroup/delegate");
        let files = files.unwrap_or_else(|_| FILES.to_owned());
        chown(&self.path, Some(uid), None).doing(DOING)?;
        for file in files.lines() {
            match chown(self.path.join(file), Some(uid), None) {
                // One of a controller that is not there.
                Err(e) if gone(&e) => {}
                result => result.doing(DOING)?,
            }
        }
        Ok(())
    }

    /// The directory, to clone processes into.
    pub(crate) fn directory(&self) -> io::Result<BorrowedFd<'_>> {
        self.directory
            .as_ref()
            .map(AsFd::as_fd)
            .ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    /// The processes in it and below it, by their ids in the guest.
    pub(crate) fn pids(&self) -> io::Result<Vec<u32>> {
        let mut pids = Vec::new();
        list(self.directory()?, &mut pids)?;
        Ok(pids)
    }

    /// Whether there is a process in it or below it.
    pub(crate) fn is_populated(&self) -> io::Result<bool> {
        let events = fs::read_to_string(self.path.join("cgroup.events"))?;
        Ok(value(&events, "populated") != Some(0))
    }

    /// Kills every process in it and below it, those that are being made too.
    pub(crate) fn kill(&self) -> io::Result<()> {
        kill(&self.path)
    }

    /// How often the OOM killer has struck in it.
    pub(crate) fn oom_kills(&self) -> u64 {
        // Without a memory controller there is no such killer.
        self.watch_oom()
            .and_then(|watch| watch.kills())
            .unwrap_or(0)
    }

    /// Watches the OOM killer; does not keep the cgroup.
    pub(crate) fn watch_oom(&self) -> io::Result<OomWatch> {
        OomWatch::new(&self.path)
    }

    /// Kills what is in it, waits for its end, and removes it.
    pub(crate) async fn remove(mut self) -> io::Result<()> {
        self.directory = None;
        let path = std::mem::take(&mut self.path);
        remove(&path).await
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let path = std::mem::take(&mut self.path);
        if path.as_os_str().is_empty() {
            return;
        }
        // Nobody is left to be told of a failure.
        let _ = kill(&path);
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { remove(&path).await });
        }
    }
}

fn set(cgroup: &Path, setting: &Setting) -> Result<(), Error> {
    // Only existing files: the name comes from the specification.
    match write(&cgroup.join(&setting.file), &setting.value) {
        Err(e) if e.kind() == io::ErrorKind::NotFound && setting.absent == Absent::Kept => Ok(()),
        result => result.map_err(|source| Error::Limit {
            file: setting.file.clone(),
            value: setting.value.clone(),
            source,
        }),
    }
}

fn write(file: &Path, text: &str) -> io::Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    io::Write::write_all(&mut file, text.as_bytes())
}

/// Writes these files. If one refuses, those before it get back what they held: of files
/// with a line for each device, the lines that were there; of a set of processors, none.
fn change(cgroup: &Path, settings: &[Setting]) -> Result<(), Error> {
    let mut before: Vec<(PathBuf, String)> = Vec::new();
    for setting in settings {
        let file = cgroup.join(&setting.file);
        let held = fs::read_to_string(&file).unwrap_or_default();
        if let Err(error) = set(cgroup, setting) {
            for (file, held) in before.into_iter().rev() {
                let nothing = held.trim().is_empty().then_some("\n");
                for line in held.lines().chain(nothing) {
                    // The first refusal is the one to be told.
                    let _ = write(&file, line);
                }
            }
            return Err(error);
        }
        before.push((file, held));
    }
    Ok(())
}

fn kill(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.kill"), "1")
}

async fn remove(path: &Path) -> io::Result<()> {
    kill(path)?;
    wait_until(path, "populated", 0).await?;
    remove_below(&rustix::fs::open(path, DIRECTORY, Mode::empty())?)?;
    fs::remove_dir(path)
}

/// Waits until `cgroup.events` has this value for this key. The kernel says by a
/// priority event that the file has changed.
async fn wait_until(path: &Path, key: &str, wanted: u64) -> io::Result<()> {
    let path = path.join("cgroup.events");
    let file = sys::watch(fs::File::open(&path)?.into(), Interest::PRIORITY)?;
    loop {
        let mut bytes = [0; 256];
        let length = rustix::io::pread(&file, &mut bytes, 0)?;
        let text = String::from_utf8_lossy(&bytes[..length]);
        if value(&text, key) == Some(wanted) {
            return Ok(());
        }
        file.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// What a container may make below its cgroup: each costs memory of the guest's
/// kernel, and whoever removes them goes as deep as they are.
fn limits_of_the_tree() -> [Setting; 2] {
    [
        ("cgroup.max.descendants", "4096"),
        ("cgroup.max.depth", "64"),
    ]
    .map(|(file, value)| Setting {
        file: file.to_owned(),
        value: value.to_owned(),
        absent: Absent::Refused,
    })
}

const DIRECTORY: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Adds the processes in a cgroup and below it.
fn list(cgroup: BorrowedFd<'_>, pids: &mut Vec<u32>) -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let text = rustix::fs::openat(cgroup, "cgroup.procs", flags, Mode::empty())
        .map_err(io::Error::from)
        .and_then(|file| io::read_to_string(fs::File::from(file)));
    match text {
        Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
        // The container may remove its own cgroups at any time, and a
        // threaded one lists no processes: its parent does.
        Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
        Err(e) => return Err(e),
    }
    for name in children(cgroup)? {
        match rustix::fs::openat(cgroup, &name, DIRECTORY, Mode::empty()) {
            Ok(child) => list(child.as_fd(), pids)?,
            Err(errno) if gone(&errno.into()) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

/// Removes the cgroups below an empty one. By descriptors, since the whole path
/// of a deep one is longer than the kernel takes.
fn remove_below(cgroup: &OwnedFd) -> io::Result<()> {
    for name in children(cgroup.as_fd())? {
        match rustix::fs::openat(cgroup, &name, DIRECTORY, Mode::empty()) {
            Ok(child) => remove_below(&child)?,
            Err(errno) if gone(&errno.into()) => continue,
            Err(errno) => return Err(errno.into()),
        }
        match rustix::fs::unlinkat(cgroup, &name, AtFlags::REMOVEDIR) {
            Err(errno) if !gone(&errno.into()) => return Err(errno.into()),
            _ => {}
        }
    }
    Ok(())
}

fn children(cgroup: BorrowedFd<'_>) -> io::Result<Vec<CString>> {
    let mut names = Vec::new();
    for entry in Dir::read_from(cgroup)? {
        let entry = match entry {
            // It was removed while it was read.
            Err(errno) if gone(&errno.into()) => break,
            entry => entry?,
        };
        let name = entry.file_name();
        if entry.file_type() == FileType::Directory && name != c"." && name != c".." {
            names.push(name.to_owned());
        }
    }
    Ok(names)
}

fn gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

/// The number after `key` in a file of `key value` lines.
fn value(text: &str, key: &str) -> Option<u64> {
    text.lines()
        .find_map(|line| line.strip_prefix(key)?.strip_prefix(' ')?.parse().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_found_only_as_a_whole_word() {
        let text = "low 0\noom 3\noom_kill 2\noom_group_kill 1\n";
        assert_eq!(value(text, "oom_kill"), Some(2));
        assert_eq!(value(text, "oom"), Some(3));
        assert_eq!(value(text, "oo"), None);
        assert_eq!(value("populated x\n", "populated"), None);
    }

    #[test]
    fn a_change_that_is_refused_in_its_middle_changes_nothing_ta_66() {
        let cgroup = tempfile::tempdir().unwrap();
        let file = |name: &str| cgroup.path().join(name);
        for (name, text) in [("cpu.max", "50000 100000\n"), ("cpu.weight", "100\n")] {
            fs::write(file(name), text).unwrap();
        }
        let setting = |file: &str, value: &str| Setting {
            file: file.into(),
            value: value.into(),
            absent: Absent::Refused,
        };
        let mut settings = vec![
            setting("cpu.max", "20000 100000\n"),
            setting("cpu.weight", "200\n"),
            setting("memory.max", "1000000\n"),
        ];
        let error = change(cgroup.path(), &settings).unwrap_err();
        assert!(matches!(error, Error::Limit { file, .. } if file == "memory.max"));
        let held = |name: &str| fs::read_to_string(file(name)).unwrap();
        assert_eq!(held("cpu.max"), "50000 100000\n");
        assert_eq!(held("cpu.weight"), "100\n");
        settings.pop();
        change(cgroup.path(), &settings).unwrap();
        assert_eq!(held("cpu.max"), "20000 100000\n");
        assert_eq!(held("cpu.weight"), "200\n");
    }
}
