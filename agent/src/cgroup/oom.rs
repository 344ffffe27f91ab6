//! The OOM killer's deeds in one cgroup, as they happen.

use std::{fs::File, io, os::fd::OwnedFd, path::Path};

use tokio::io::{Interest, unix::AsyncFd};

use super::value;
use crate::sys;

/// `memory.events` of a cgroup.
#[derive(Debug)]
pub(crate) struct OomWatch {
    file: AsyncFd<OwnedFd>,
}

impl OomWatch {
    pub(super) fn new(cgroup: &Path) -> io::Result<Self> {
        let file = File::open(cgroup.join("memory.events"))?;
        Ok(OomWatch {
            file: sys::watch(file.into(), Interest::PRIORITY)?,
        })
    }

    /// How often it has struck by now.
    pub(super) fn kills(&self) -> io::Result<u64> {
        let mut bytes = [0; 512];
        let length = rustix::io::pread(&self.file, &mut bytes, 0)?;
        let text = String::from_utf8_lossy(bytes.get(..length).unwrap_or_default());
        Ok(value(&text, "oom_kill").unwrap_or(0))
    }

    /// Waits until it has struck more often than `seen` times; answers how often.
    /// The kernel says by a priority event that the file has changed.
    pub(crate) async fn beyond(&self, seen: u64) -> io::Result<u64> {
        loop {
            let kills = self.kills()?;
            if kills > seen {
                return Ok(kills);
            }
            self.file.ready(Interest::PRIORITY).await?.clear_ready();
        }
    }
}
