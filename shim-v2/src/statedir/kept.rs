//! A file for each container in its pod's directory, as long as the container is there.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{Held, StateDir, gone, replace};
use crate::names::ContainerId;

/// The name of the directory.
const DIR: &str = "containers";

/// A file that is kept. Dropping it removes it.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
}

impl Kept {
    /// Keeps this for a container.
    pub fn new(pod: &Held, id: &ContainerId, content: &[u8]) -> io::Result<Self> {
        let path = file(pod.dir().path(), id);
        pod.while_ours(|_| replace(&path, content))?;
        Ok(Kept { path })
    }

    /// One that the program before this one has kept.
    pub(crate) fn unpack(path: PathBuf) -> Self {
        Kept { path }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Kept {
    fn drop(&mut self) {
        // With the pod's directory it is gone already.
        let _ = fs::remove_file(&self.path);
    }
}

/// Where the file of a container is in the directory of its pod.
#[must_use]
pub fn file(pod: &Path, id: &ContainerId) -> PathBuf {
    pod.join(DIR).join(format!("{id}.json"))
}

/// Those that were left.
#[must_use]
pub fn all(pod: &StateDir) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir(pod)).into_iter().flatten().flatten();
    entries.map(|entry| entry.path()).collect()
}

/// The directory of all of them.
pub(super) fn dir(pod: &StateDir) -> PathBuf {
    pod.path().join(DIR)
}

/// Removes the directory with what is left in it.
pub(super) fn remove(pod: &StateDir) -> io::Result<()> {
    for path in all(pod) {
        gone(fs::remove_file(path))?;
    }
    gone(fs::remove_dir(dir(pod)))
}
