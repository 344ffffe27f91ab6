//! What the kernel of the guest allows to all of its programs together.
//!
//! Owns the numbers that a fresh kernel derives from the size of its memory or
//! takes from days of smaller machines. Promises two things. A container is not
//! stopped by a limit that nobody asked for: a machine of its own has a small
//! memory and would get small limits. And containers cannot use up what the agent
//! needs to look after them: a part of the memory and of the threads is never
//! theirs, limits or not.

use std::{fs, io};

/// What the guest has, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Memory {
    /// All that the kernel manages.
    pub total: u64,
    /// What nothing uses yet.
    pub free: u64,
}

impl Memory {
    /// That of this machine now.
    pub(crate) fn of_this_machine() -> Self {
        let info = rustix::system::sysinfo();
        let unit = u64::from(info.mem_unit);
        Self {
            total: info.totalram.saturating_mul(unit),
            free: info.freeram.saturating_mul(unit),
        }
    }

    /// The same with so many bytes more, of which nothing is used yet.
    pub(crate) fn and(self, more: u64) -> Self {
        Self {
            total: self.total.saturating_add(more),
            free: self.free.saturating_add(more),
        }
    }

    /// What all containers together may use. The rest is for the agent, its
    /// helpers and what the kernel does not account to anybody.
    pub(crate) fn for_containers(self) -> u64 {
        const RESERVE_MIN: u64 = 8 << 20;
        const RESERVE_MAX: u64 = 64 << 20;
        let reserve = (self.total / 16).clamp(RESERVE_MIN, RESERVE_MAX);
        // A guest that is too small for this has no reserve worth the name.
        self.free.saturating_sub(reserve).max(self.free / 2)
    }

    /// How many threads there may be: so many that their stacks and descriptions
    /// alone fill the memory, of which a container may have less.
    fn threads(self) -> u64 {
        const BYTES_OF_A_THREAD: u64 = 32 << 10;
        (self.total / BYTES_OF_A_THREAD).clamp(THREADS_MIN, PID_MAX)
    }

    /// How many threads all containers together may have.
    pub(crate) fn threads_of_containers(self) -> u64 {
        // Threads of the kernel, the agent and its helpers.
        const RESERVE: u64 = 1_024;
        self.threads() - RESERVE
    }
}

const THREADS_MIN: u64 = 4_096;

/// The most that the kernel can number.
const PID_MAX: u64 = 4_194_304;

/// Kernel parameters below `/proc/sys` and their values.
pub(crate) fn parameters(memory: Memory) -> [(&'static str, String); 5] {
    // As systemd sets both on a host: descriptors are bounded by memory.
    const OPEN_FILES: u64 = 1_073_741_816;
    [
        ("fs/file-max", i64::MAX.to_string()),
        ("fs/nr_open", OPEN_FILES.to_string()),
        ("kernel/pid_max", PID_MAX.to_string()),
        ("kernel/threads-max", memory.threads().to_string()),
        // The kernel's messages tell of other containers.
        ("kernel/dmesg_restrict", "1".to_owned()),
    ]
}

/// Sets the parameters.
pub(crate) fn apply(memory: Memory) -> Result<(), (String, io::Error)> {
    for (name, value) in parameters(memory) {
        let path = format!("/proc/sys/{name}");
        match fs::write(&path, &value) {
            // A kernel that can do without it.
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            result => result.map_err(|e| (format!("write {value} to {path}"), e))?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_part_of_the_memory_is_never_the_containers_f55() {
        let check = |total: u64, free: u64, expected: u64| {
            let memory = Memory {
                total: total * MIB,
                free: free * MIB,
            };
            assert_eq!(memory.for_containers(), expected * MIB, "{total} {free}");
        };
        check(64, 40, 32);
        check(256, 220, 204);
        check(2_048, 2_000, 1_936);
        check(65_536, 65_000, 64_936);
        check(16, 10, 5);
        check(0, 0, 0);
    }

    #[test]
    fn a_part_of_the_threads_is_never_the_containers_f58() {
        for (total, threads) in [(0, 4_096), (128, 4_096), (256, 8_192), (1 << 20, PID_MAX)] {
            let memory = Memory {
                total: total * MIB,
                free: 0,
            };
            assert_eq!(memory.threads(), threads);
            assert_eq!(memory.threads_of_containers(), threads - 1_024);
        }
    }

    #[test]
    fn each_parameter_is_one_that_the_kernel_has() {
        let memory = Memory::of_this_machine();
        assert!(memory.total > memory.free && memory.free > 0);
        for (name, value) in parameters(memory) {
            assert!(
                std::path::Path::new("/proc/sys").join(name).exists(),
                "{name}"
            );
            value.parse::<i64>().unwrap();
        }
    }
}
