//! The lab host: a Debian machine, emulated by QEMU with AMD's virtualisation, in
//! which KVM works as on hardware.
//!
//! ```text
//!  root image ──boot──► saved state ──restore──► a call ──► output, exit code
//!  (debootstrap)        (RAM + disk overlay)     (fresh disk with binaries)
//!  minutes, once        a minute, once           seconds, each time
//! ```
//!
//! Owns the images, the saved state and the way of a command into the machine and
//! of its output back. Knows nothing of what runs there. Each call starts from the
//! same saved state and leaves no trace in it.

mod call;
mod image;
mod machine;
mod root;

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use bulkhead_guest_kernel::Progress;

pub use call::{Call, Ended};
pub use image::Images;

/// Debian packages of the building machine that the lab needs.
pub const PACKAGES: &[&str] = &[
    "busybox-static",
    "debian-archive-keyring",
    "debootstrap",
    "e2fsprogs",
    "initramfs-tools",
    "linux-image-cloud-amd64",
    "qemu-system-x86",
    "qemu-utils",
];

/// How the machine's clock runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// As fast as it can, two processors; restored from the saved state.
    Wall,
    /// A function of the instructions executed, one processor; booted afresh.
    Instructions,
}

/// The lab host, ready to be called.
#[derive(Debug)]
pub struct Lab {
    root: root::Root,
    state: PathBuf,
}

impl Lab {
    /// Finds the lab host below `cache`, or builds, boots and saves it.
    ///
    /// # Errors
    /// A package is missing or cannot be fetched, or the machine does not come up.
    pub fn ensure(cache: &Path, images: &Images, progress: &dyn Progress) -> Result<Lab> {
        let dir = cache.join("lab");
        fs::create_dir_all(&dir).with_context(|| format!("Cannot make {}", dir.display()))?;
        let lock = File::create(dir.join("lock"))?;
        lock.lock()?;
        let root = root::ensure(&dir, images, progress)?;
        let state = machine::ensure_saved(&dir, &root, progress)?;
        Ok(Lab { root, state })
    }

    /// Prepares a call.
    #[must_use]
    pub fn call(&self) -> Call<'_> {
        Call::new(self)
    }
}
