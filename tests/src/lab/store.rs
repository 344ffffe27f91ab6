//! The third disk: `/var/lib/bulkhead` of the lab host, where unpacked images are
//! kept from one session to the next as they are on any host.

use std::path::{Path, PathBuf};

use anyhow::Result;

use super::machine::overlay;
use bulkhead_guest::cache::Entry;
use bulkhead_guest::command::{clean, output};

/// Largest size in MiB; the file is sparse. Part of the saved state, as all devices.
const SIZE_MIB: u32 = 8192;

/// The disk in an entry of the cache.
const DISK: &str = "store.qcow2";

/// A disk that was kept when a session had ended; the next ones begin with it.
#[derive(Debug)]
pub struct Store(Entry);

impl Store {
    /// The one in this entry, which [`super::Session::keep_store`] has filled.
    #[must_use]
    pub fn of(entry: Entry) -> Store {
        Store(entry)
    }
}

/// Makes the disk of a session in `directory`: with what `store` has, or empty.
pub(crate) fn disk(store: Option<&Store>, directory: &Path) -> Result<PathBuf> {
    let disk = directory.join(DISK);
    if let Some(Store(entry)) = store {
        overlay(&entry.file(DISK), "qcow2", &disk)?;
        return Ok(disk);
    }
    let empty = directory.join("empty.img");
    output(
        clean("mke2fs")
            .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"])
            .args(["-E", "lazy_itable_init=1"])
            .arg(&empty)
            .arg(format!("{SIZE_MIB}M")),
    )?;
    overlay(&empty, "raw", &disk)?;
    Ok(disk)
}

/// Copies the disk of a session that has ended into the new entry `to`.
pub(crate) fn keep(disk: &Path, to: &Path) -> Result<()> {
    let mut command = clean("qemu-img");
    command
        .args(["convert", "-O", "qcow2"])
        .arg(disk)
        .arg(to.join(DISK));
    output(&mut command).map(drop)
}
