//! The cgroup of one container: a directory below the fixed parent.
//!
//! Owns its limits, its device program, the list of its processes and its end.
//! Promises that a [`Cgroup`] that goes away takes its processes with it. The
//! specification's `cgroupsPath` has no say: it names a place in the host's
//! tree, and the container sees its own directory as the root anyway.

mod devices;
mod oom;

use std::{
    fs, io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

pub(crate) use self::oom::OomWatch;
use rustix::fs::{Mode, OFlags};
use tokio::io::Interest;

use crate::{
    error::{Doing, Error},
    spec::plan::{Absent, Resources, Setting},
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
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::open(&cgroup.path, flags, Mode::empty())
            .doing("open the container's cgroup")?;
        let directory = cgroup.directory.insert(directory);
        let program = sys::load_device_program(&devices::program(&resources.devices))
            .doing("load the device rules")?;
        sys::attach_device_program(directory, program).doing("attach the device rules")?;
        for setting in &resources.settings {
            cgroup.set(setting)?;
        }
        Ok(cgroup)
    }

    fn set(&self, setting: &Setting) -> Result<(), Error> {
        // Only existing files: the name comes from the specification.
        match fs::OpenOptions::new()
            .write(true)
            .open(self.path.join(&setting.file))
            .and_then(|mut file| io::Write::write_all(&mut file, setting.value.as_bytes()))
        {
            Err(e) if e.kind() == io::ErrorKind::NotFound && setting.absent == Absent::Kept => {
                Ok(())
            }
            result => result.map_err(|source| Error::Limit {
                file: setting.file.clone(),
                value: setting.value.clone(),
                source,
            }),
        }
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
        for directory in subtree(&self.path)? {
            match fs::read_to_string(directory.join("cgroup.procs")) {
                Ok(text) => pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok())),
                // The container may remove its own cgroups at any time, and a
                // threaded one lists no processes: its parent does.
                Err(e) if gone(&e) || e.raw_os_error() == Some(libc::EOPNOTSUPP) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(pids)
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

fn kill(path: &Path) -> io::Result<()> {
    fs::write(path.join("cgroup.kill"), "1")
}

async fn remove(path: &Path) -> io::Result<()> {
    kill(path)?;
    wait_until_empty(path).await?;
    // Depth first: the list has parents before their children.
    for directory in subtree(path)?.iter().rev() {
        match fs::remove_dir(directory) {
            Err(e) if !gone(&e) => return Err(e),
            _ => {}
        }
    }
    Ok(())
}

/// The kernel says by a priority event that `cgroup.events` has changed.
async fn wait_until_empty(path: &Path) -> io::Result<()> {
    let path = path.join("cgroup.events");
    let file = sys::watch(fs::File::open(&path)?.into(), Interest::PRIORITY)?;
    loop {
        let mut bytes = [0; 256];
        let length = rustix::io::pread(&file, &mut bytes, 0)?;
        let text = String::from_utf8_lossy(&bytes[..length]);
        if value(&text, "populated") == Some(0) {
            return Ok(());
        }
        file.ready(Interest::PRIORITY).await?.clear_ready();
    }
}

/// A directory and those below it, parents first.
fn subtree(path: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = vec![path.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next).cloned() {
        next += 1;
        match fs::read_dir(directory) {
            Ok(entries) => {
                let directories = entries
                    .filter_map(Result::ok)
                    .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
                    .map(|entry| entry.path());
                found.extend(directories);
            }
            Err(e) if gone(&e) && next > 1 => {}
            Err(e) => return Err(e),
        }
    }
    Ok(found)
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
}
