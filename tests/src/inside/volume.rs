//! Volumes of the host's disk, and containers that have one.

use tempfile::TempDir;

use super::command::{Command, Outcome};
use crate::DEBIAN;

/// A directory of the host's disk as a volume at `/v`: tmpfs of the lab host's kernel
/// lacks some of what disks have.
///
/// # Panics
///
/// It cannot be made.
#[must_use]
pub fn volume() -> (TempDir, String) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory on the disk");
    let volume = format!("{}:/v", dir.path().display());
    (dir, volume)
}

/// Runs a shell line in the Debian image with a volume.
#[must_use]
pub fn debian(volume: &str, line: &str) -> Outcome {
    Command::bulkhead([
        "run",
        "--rm",
        "--network",
        "none",
        "--memory",
        "512M",
        "-v",
        volume,
        DEBIAN,
        "--",
        "sh",
        "-c",
        line,
    ])
    .run()
}
