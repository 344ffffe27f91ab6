//! What procfs tells of a process.

use std::fs;

/// Resident KiB.
///
/// # Panics
///
/// The process is gone.
#[must_use]
pub fn resident(pid: u32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).expect("the process lives");
    let size = status
        .lines()
        .find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB"));
    size.and_then(|kib| kib.parse().ok())
        .expect("a process has a size")
}
