//! What a virtual machine is made of: the contract with whoever starts the VMM.
//!
//! A [`Config`] is plain data. It reaches the process as JSON on an inherited
//! descriptor (`bulkhead-vmm --config-fd N`) or is built from the command line.
//! Descriptors appear in it by number: the parent opened them and let them be
//! inherited; [`Fd::take`] turns each into an owned one exactly once.
//!
//! Never here: defaults that depend on the host, names of containers.

use std::{
    collections::HashSet,
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

use crate::{
    hotplug::{MOST_INTERFACES, MOST_PLACES},
    memory,
};

/// An inherited descriptor, by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub RawFd);

impl Fd {
    /// Takes possession of the descriptor.
    ///
    /// # Safety
    /// The number is an open descriptor that was inherited for this purpose, and
    /// nothing else in the process owns it or calls this for it.
    pub unsafe fn take(self) -> OwnedFd {
        // SAFETY: the caller vouches for it.
        unsafe { OwnedFd::from_raw_fd(self.0) }
    }
}

/// A virtual machine and its process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// `/dev/kvm`, opened read-write.
    pub kvm: Fd,
    /// Uncompressed x86-64 ELF kernel (`vmlinux`), opened for reading.
    pub kernel: Fd,
    /// Initial RAM file system, opened for reading.
    pub initramfs: Option<Fd>,
    /// Kernel command line. The VMM appends what announces its own devices.
    pub cmdline: String,
    /// Virtual processors, 1 to 64.
    pub vcpus: u8,
    /// Processors that may come while the machine runs; 64 with the others.
    #[serde(default)]
    pub more_vcpus: u8,
    /// Guest memory in MiB, 32 to 1,048,576.
    pub memory_mib: u32,
    /// Memory in MiB that may come while the machine runs; 1,048,576 with the other.
    #[serde(default)]
    pub more_memory_mib: u32,
    /// File systems shared with the guest.
    pub shares: Vec<Share>,
    /// Sockets between guest and host.
    pub vsock: Option<Vsock>,
    /// Block devices, in the order of their names in the guest: vda, vdb, …
    pub disks: Vec<Disk>,
    /// Places for network interfaces that come while the machine runs, up to
    /// [`MOST_INTERFACES`](crate::hotplug::MOST_INTERFACES).
    #[serde(default)]
    pub interfaces: u8,
    /// Places for disks that come while the machine runs, up to
    /// [`MOST_PLACES`](crate::hotplug::MOST_PLACES).
    #[serde(default)]
    pub places: u8,
    /// A console (hvc0); without it the guest has none.
    pub console: Option<Console>,
    /// Offer an entropy device.
    pub rng: bool,
    /// Offer the device by which our guest kernel hears what others change in its
    /// shares of the policy [`Policy::Shared`].
    pub notices: bool,
    /// Confinement before the first guest instruction; `None` runs unconfined.
    pub jail: Option<Jail>,
    /// Unix SOCK_SEQPACKET socket by which the VM is controlled
    /// ([`control`](crate::control)); when its other end closes, the VM ends.
    pub control: Option<Fd>,
    /// Where the reason for the VM's end is written, one JSON line
    /// (`exit::Report`), just before the process exits.
    pub report: Option<Fd>,
}

/// A directory of the host that the guest mounts by virtio-fs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Name by which the guest mounts it: 1 to 36 bytes (virtio 1.2, 5.11.4).
    pub tag: String,
    /// The directory, as named in the VMM's mount namespace. With a [`Jail`] it
    /// must be the jail's root and is looked up before pivoting.
    pub dir: PathBuf,
    /// Refuse every request that would change something.
    pub read_only: bool,
    /// Request queues, 1 to 8. Linux has one for each of its processors.
    pub queues: u8,
    /// What the guest may believe of what it was told.
    pub policy: Policy,
}

/// Who else changes what is in a share, below the mounts that are in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Policy {
    /// Anybody, at any time: the guest asks again.
    Shared,
    /// Nobody while the guest lives: it keeps what it knows.
    Private,
}

/// The virtio-vsock device.
///
/// Host to guest: a client connects to the listening socket, writes
/// `CONNECT <port>\n` and reads `OK <local port>\n` or end of file. Guest to
/// host: a connection to one of `ports` becomes a Unix socket whose host end is
/// sent over `acceptor`; every other port is refused by a reset.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vsock {
    /// Context id of the guest, 3 or more.
    pub guest_cid: u32,
    /// Listening Unix stream socket.
    pub listener: Option<Fd>,
    /// Unix SOCK_SEQPACKET socket. One message for each connection that the
    /// guest opens: the port as four little-endian bytes, with the host's end of
    /// the connection attached (SCM_RIGHTS).
    pub acceptor: Option<Fd>,
    /// Host ports that the guest may connect to.
    pub ports: Vec<u32>,
}

/// A raw disk image or block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Disk {
    /// Opened for reading, and for writing unless `read_only`.
    pub fd: Fd,
    /// Refuse writes.
    pub read_only: bool,
}

/// The virtio console.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Console {
    /// Where the guest's output goes as it comes, if anywhere; the last 64 KiB
    /// are kept in any case for the report of a failure.
    pub output: Option<Fd>,
    /// Where input for the guest comes from.
    pub input: Option<Fd>,
}

/// Confinement of the process before the first guest instruction.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Jail {
    /// Directory that becomes the root of the process, as seen in the mount
    /// namespace in which it was started. Mounts made below it later, by whoever
    /// holds the namespace from which this one was copied, appear inside.
    pub root: PathBuf,
    /// User and group id of all threads that need no files: of nobody else on the
    /// host, and not root's.
    pub user: u32,
}

/// Virtual processors that a machine may have.
pub const VCPUS: std::ops::RangeInclusive<u8> = 1..=64;
/// Most devices in one machine.
pub const MOST_DEVICES: usize = 17;

/// Why a configuration is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Outside [`VCPUS`].
    #[error("{0} virtual processors are not possible: 1 to 64 are")]
    Vcpus(u8),
    /// Outside [`memory::SIZES_MIB`].
    #[error("Guest memory of {0} MiB is not possible: 32 to 1048576 MiB are")]
    Memory(u32),
    /// virtio 1.2, 5.11.4.
    #[error("The share's tag {0:?} does not have 1 to 36 bytes")]
    Tag(String),
    /// Two shares that the guest could not tell apart.
    #[error("Two shares have the tag {0:?}")]
    SameTag(String),
    /// A share without or with too many threads.
    #[error("The share {tag:?} cannot have {queues} request queues: 1 to 8 are possible")]
    ShareQueues {
        /// Which share.
        tag: String,
        /// How many were asked for.
        queues: u8,
    },
    /// virtio 1.2, 5.10.4: 0 to 2 are reserved.
    #[error("The guest cannot have the vsock context id {0}: 3 or more are possible")]
    GuestCid(u32),
    /// Together more than [`VCPUS`].
    #[error("{0} virtual processors and {1} later are not possible: at most 64 in all are")]
    MoreVcpus(u8, u8),
    /// Together more than [`memory::SIZES_MIB`].
    #[error(
        "Guest memory of {0} MiB and {1} MiB later is not possible: at most 1048576 MiB in all are"
    )]
    MoreMemory(u32, u32),
    /// The same of network interfaces.
    #[error("{0} places for interfaces are too many: at most {MOST_INTERFACES} are possible")]
    Interfaces(u8),
    /// Each costs the guest a look.
    #[error("{0} places for disks are too many: at most {MOST_PLACES} are possible")]
    Places(u8),
    /// There are as many interrupts as that.
    #[error("{0} devices are too many: at most {MOST_DEVICES} are possible")]
    Devices(usize),
    /// A descriptor can be taken once.
    #[error("Descriptor {0} is named twice")]
    SameDescriptor(RawFd),
    /// Negative, or a standard stream, which others use.
    #[error("Descriptor {0} cannot be taken: 3 and more can")]
    Descriptor(RawFd),
    /// 0 is root, the largest number means none.
    #[error("The jail's user cannot be {0}")]
    User(u32),
}

impl Config {
    /// Checks what can be checked without touching anything.
    pub fn check(&self) -> Result<(), Error> {
        if !VCPUS.contains(&self.vcpus) {
            return Err(Error::Vcpus(self.vcpus));
        }
        if !VCPUS.contains(&self.most_vcpus()) {
            return Err(Error::MoreVcpus(self.vcpus, self.more_vcpus));
        }
        if !memory::SIZES_MIB.contains(&self.memory_mib) {
            return Err(Error::Memory(self.memory_mib));
        }
        let most = self.memory_mib.saturating_add(self.more_memory_mib);
        if !memory::SIZES_MIB.contains(&most) {
            return Err(Error::MoreMemory(self.memory_mib, self.more_memory_mib));
        }
        let mut tags = HashSet::new();
        for Share { tag, queues, .. } in &self.shares {
            if !(1..=36).contains(&tag.len()) {
                return Err(Error::Tag(tag.clone()));
            }
            if !tags.insert(tag) {
                return Err(Error::SameTag(tag.clone()));
            }
            if !(1..=8).contains(queues) {
                return Err(Error::ShareQueues {
                    tag: tag.clone(),
                    queues: *queues,
                });
            }
        }
        if let Some(Vsock { guest_cid, .. }) = self.vsock
            && (guest_cid < 3 || guest_cid == u32::MAX)
        {
            return Err(Error::GuestCid(guest_cid));
        }
        if self.places > MOST_PLACES {
            return Err(Error::Places(self.places));
        }
        if self.interfaces > MOST_INTERFACES {
            return Err(Error::Interfaces(self.interfaces));
        }
        let devices = self.shares.len()
            + self.disks.len()
            + usize::from(self.places)
            + usize::from(self.interfaces)
            + usize::from(self.more_memory_mib > 0)
            + usize::from(self.vsock.is_some())
            + usize::from(self.console.is_some())
            + usize::from(self.rng)
            + usize::from(self.notices);
        if devices > MOST_DEVICES {
            return Err(Error::Devices(devices));
        }
        if let Some(Jail { user, .. }) = self.jail
            && (user == 0 || user == u32::MAX)
        {
            return Err(Error::User(user));
        }
        let mut seen = HashSet::new();
        for fd in self.descriptors() {
            if fd < 3 {
                return Err(Error::Descriptor(fd));
            }
            if !seen.insert(fd) {
                return Err(Error::SameDescriptor(fd));
            }
        }
        Ok(())
    }

    /// The most processors that the machine can have.
    #[must_use]
    pub fn most_vcpus(&self) -> u8 {
        self.vcpus.saturating_add(self.more_vcpus)
    }

    /// The descriptors that it names.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let vsock = self.vsock.iter().flat_map(|v| [v.listener, v.acceptor]);
        let console = self.console.iter().flat_map(|c| [c.output, c.input]);
        [Some(self.kvm), Some(self.kernel), self.initramfs]
            .into_iter()
            .chain([self.control, self.report])
            .chain(vsock)
            .chain(console)
            .chain(self.disks.iter().map(|disk| Some(disk.fd)))
            .flatten()
            .map(|Fd(fd)| fd)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> Config {
        let json = r#"{"kvm":3,"kernel":4,"cmdline":"quiet","vcpus":1,"memory_mib":256,
            "shares":[{"tag":"bulkhead","dir":"/s","read_only":false,"queues":1,"policy":"shared"}],
            "vsock":{"guest_cid":3,"listener":5,"ports":[1024]},"disks":[],"rng":true,"notices":true}"#;
        serde_json::from_str(json).unwrap()
    }

    fn check(change: impl FnOnce(&mut Config), expected: &str) {
        let mut config = config();
        change(&mut config);
        let text = config
            .check()
            .map_or_else(|e| e.to_string(), |()| String::new());
        assert_eq!(text, expected);
    }

    #[test]
    fn the_limits_hold_at_and_beyond_the_last_value() {
        check(|_| {}, "");
        check(|c| c.vcpus = 64, "");
        check(
            |c| c.vcpus = 65,
            "65 virtual processors are not possible: 1 to 64 are",
        );
        check(
            |c| c.vcpus = 0,
            "0 virtual processors are not possible: 1 to 64 are",
        );
        check(|c| c.more_vcpus = 63, "");
        check(
            |c| c.more_vcpus = 64,
            "1 virtual processors and 64 later are not possible: at most 64 in all are",
        );
        check(|c| c.more_memory_mib = 1_048_320, "");
        check(
            |c| c.more_memory_mib = 1_048_321,
            "Guest memory of 256 MiB and 1048321 MiB later is not possible: at most 1048576 MiB in all are",
        );
        check(|c| c.memory_mib = 32, "");
        check(
            |c| c.memory_mib = 31,
            "Guest memory of 31 MiB is not possible: 32 to 1048576 MiB are",
        );
        check(|c| c.shares[0].tag = "x".repeat(36), "");
        check(
            |c| c.shares[0].tag = String::new(),
            "The share's tag \"\" does not have 1 to 36 bytes",
        );
        check(
            |c| c.shares.push(c.shares[0].clone()),
            "Two shares have the tag \"bulkhead\"",
        );
        check(
            |c| c.shares[0].queues = 9,
            "The share \"bulkhead\" cannot have 9 request queues: 1 to 8 are possible",
        );
        check(
            |c| c.vsock.as_mut().unwrap().guest_cid = 2,
            "The guest cannot have the vsock context id 2: 3 or more are possible",
        );
        let disks = |count: i32| {
            (0..count).map(|at| Disk {
                fd: Fd(100 + at),
                read_only: true,
            })
        };
        check(|c| c.disks = disks(13).collect(), "");
        check(
            |c| c.disks = disks(14).collect(),
            "18 devices are too many: at most 17 are possible",
        );
        check(|c| c.interfaces = 4, "");
        check(
            |c| c.interfaces = 5,
            "5 places for interfaces are too many: at most 4 are possible",
        );
        check(|c| c.places = 8, "");
        check(
            |c| c.places = 9,
            "9 places for disks are too many: at most 8 are possible",
        );
        check(|c| c.control = Some(Fd(5)), "Descriptor 5 is named twice");
    }

    #[test]
    fn only_numbers_of_descriptors_that_can_be_taken_are_accepted() {
        let refused = |fd: i32| format!("Descriptor {fd} cannot be taken: 3 and more can");
        for fd in [-1, i32::MIN, 0, 2] {
            check(|c| c.kvm = Fd(fd), &refused(fd));
            check(|c| c.report = Some(Fd(fd)), &refused(fd));
            check(
                |c| c.vsock.as_mut().unwrap().acceptor = Some(Fd(fd)),
                &refused(fd),
            );
        }
        check(|c| c.kvm = Fd(i32::MAX), "");
    }

    #[test]
    fn a_jail_has_a_user_who_is_not_root() {
        let jail = |user| {
            Some(Jail {
                root: "/s".into(),
                user,
            })
        };
        check(|c| c.jail = jail(1000), "");
        check(|c| c.jail = jail(0), "The jail's user cannot be 0");
        check(
            |c| c.jail = jail(u32::MAX),
            "The jail's user cannot be 4294967295",
        );
    }

    #[test]
    fn an_unknown_key_is_refused() {
        let mut value = serde_json::to_value(config()).unwrap();
        value["colour"] = 1.into();
        assert!(serde_json::from_value::<Config>(value).is_err());
    }
}
