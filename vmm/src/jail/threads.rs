//! The kinds of threads, and what each may do: one table, read by the process
//! that confines itself and by the tests that look at it from outside.
//!
//! All threads share one address space, so what separates kinds from each other
//! is hygiene; the wall around all of them is that none can reach beyond the pod.

use rustix::thread::CapabilitySet;

use super::syscalls::{self, Rule};

/// Most descriptors. The file server lets go of files that are idle and finds them again,
/// so this bounds what a guest can pin in the host's kernel, not how many files there may
/// be. A third of it can be files that are open in volumes: a database has thousands.
pub const DESCRIPTORS: u64 = 1 << 14;

/// Most threads that may run as the pod's user: as which no thread starts another,
/// but for KVM.
pub const THREADS: u64 = 512;

/// Most threads of a share: those that serve requests, who waits for locks, and who
/// hears of changes.
pub const FILE_THREADS: usize = 11;

/// Threads of KVM that are tasks of the process (its page recovery), and room for some
/// that other kernels may have.
const KVM_THREADS: usize = 4;

/// Most tasks of a machine that can have so many processors, shares and places for
/// devices that come later, and without disks from the start: what its cgroup is limited
/// to.
#[must_use]
pub const fn most(processors: u8, shares: usize, places: u8) -> u64 {
    // The main thread, that of the devices, and who brings what comes later; one for each
    // place.
    let own = 3 + processors as usize + shares * FILE_THREADS + places as usize;
    (own + KVM_THREADS) as u64
}

/// What a thread is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ThreadKind {
    /// Waits for the end and serves the control socket.
    Main,
    /// Runs a virtual processor.
    Processor,
    /// Serves devices that never block: vsock, console, entropy.
    Devices,
    /// Serves a disk.
    Disk,
    /// Brings devices and processors while the guest runs. Their threads may do what it
    /// may and their own kind, too.
    Hotplug,
    /// Serves the device by which memory comes.
    Memory,
    /// Serves a network interface.
    Network,
    /// Serves files of the share.
    Files,
}

/// As whom a thread runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Identity {
    /// As the pod's own user and group, without any other group.
    Pod,
    /// As root, whose capabilities are those of [`ThreadKind::capabilities`]: some
    /// file systems of the host serve their owner only.
    Root,
}

impl ThreadKind {
    /// Every kind.
    pub const ALL: [ThreadKind; 8] = [
        ThreadKind::Main,
        ThreadKind::Processor,
        ThreadKind::Devices,
        ThreadKind::Disk,
        ThreadKind::Hotplug,
        ThreadKind::Memory,
        ThreadKind::Network,
        ThreadKind::Files,
    ];

    /// The kind of the thread that the kernel knows under this name.
    #[must_use]
    pub fn of(name: &str) -> Option<ThreadKind> {
        match name {
            "bulkhead-vmm" => Some(ThreadKind::Main),
            "devices" => Some(ThreadKind::Devices),
            "disk" => Some(ThreadKind::Disk),
            "hotplug" => Some(ThreadKind::Hotplug),
            _ if name.starts_with("disk-") => Some(ThreadKind::Disk),
            _ if name.starts_with("memory-") => Some(ThreadKind::Memory),
            _ if name.starts_with("net-") => Some(ThreadKind::Network),
            _ if name.starts_with("vcpu") => Some(ThreadKind::Processor),
            _ if name.starts_with("fs-") => Some(ThreadKind::Files),
            _ => None,
        }
    }

    /// Whether the thread of this name was started by that of [`ThreadKind::Hotplug`].
    #[must_use]
    pub fn came_later(name: &str) -> bool {
        ["disk-", "memory-", "net-", "vcpu-"]
            .iter()
            .any(|kind| name.starts_with(kind))
    }

    /// Its capabilities: effective and permitted; none is inheritable, ambient or
    /// in the bounding set.
    ///
    /// | capability | for |
    /// | --- | --- |
    /// | CHOWN, FOWNER, FSETID | owners and modes as the guest says |
    /// | DAC_OVERRIDE | the guest has checked permissions, the host must not again |
    /// | SETUID, SETGID | a new file belongs to whoever made it |
    /// | SETFCAP | capabilities of programs, as package managers set them |
    ///
    /// Not among them: DAC_READ_SEARCH, with which files can be opened by handle.
    /// It would save descriptors, but reaches everything on the file system of
    /// which the share is a part. Nor MKNOD: a device node would mean the host's
    /// device to whoever meets it on the host.
    #[must_use]
    pub fn capabilities(self) -> CapabilitySet {
        match self {
            ThreadKind::Files => CapabilitySet::CHOWN
                .union(CapabilitySet::DAC_OVERRIDE)
                .union(CapabilitySet::FOWNER)
                .union(CapabilitySet::FSETID)
                .union(CapabilitySet::SETUID)
                .union(CapabilitySet::SETGID)
                .union(CapabilitySet::SETFCAP),
            _ => CapabilitySet::empty(),
        }
    }

    /// As whom it runs.
    #[must_use]
    pub fn identity(self) -> Identity {
        match self {
            ThreadKind::Files => Identity::Root,
            _ => Identity::Pod,
        }
    }

    /// The system calls that it may make. Any other ends the process.
    pub(super) fn system_calls(self) -> Vec<Rule> {
        let own: &[&[Rule]] = match self {
            ThreadKind::Main => &[syscalls::MAIN],
            ThreadKind::Processor => &[syscalls::PROCESSOR],
            ThreadKind::Devices => &[syscalls::EVENTS, syscalls::DEVICES],
            ThreadKind::Disk => &[syscalls::EVENTS, syscalls::DISK],
            ThreadKind::Hotplug => &[
                syscalls::EVENTS,
                syscalls::DISK,
                syscalls::THREADS,
                syscalls::HOTPLUG,
                syscalls::PROCESSOR,
            ],
            ThreadKind::Memory => &[syscalls::EVENTS],
            ThreadKind::Network => &[syscalls::EVENTS, syscalls::NETWORK],
            ThreadKind::Files => &[syscalls::EVENTS, syscalls::FILES, syscalls::THREADS],
        };
        let files: &[Rule] = match self {
            ThreadKind::Files => &[],
            _ => syscalls::NO_FILES,
        };
        [syscalls::EVERY, files]
            .iter()
            .chain(own)
            .flat_map(|rules| rules.iter().copied())
            .collect()
    }
}
