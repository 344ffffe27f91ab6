//! Block devices of the host with the content of a file.

use std::{
    fs,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, major, minor};

use super::command::Command;

/// A loop device. Dropped, it is given back.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// One with the content of this file.
    ///
    /// # Panics
    ///
    /// It cannot be had.
    #[must_use]
    pub fn new(image: &Path) -> LoopDevice {
        let image = image.to_str().expect("UTF-8");
        let found = Command::new("losetup", ["--find", "--show", image]).run();
        let path = PathBuf::from(found.success().trim());
        LoopDevice { path }
    }

    /// Its node.
    #[must_use]
    pub fn path(&self) -> &str {
        self.path.to_str().expect("UTF-8")
    }

    /// Its numbers: major and minor.
    ///
    /// # Panics
    ///
    /// It is gone.
    #[must_use]
    pub fn numbers(&self) -> (u32, u32) {
        let device = fs::metadata(&self.path).expect("a node").rdev();
        (major(device), minor(device))
    }

    /// Whether nobody has it for himself.
    #[must_use]
    pub fn is_free(&self) -> bool {
        let flags = OFlags::EXCL | OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty()).is_ok()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup", ["--detach", self.path()]).run();
    }
}
