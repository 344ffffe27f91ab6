//! What a virtual machine is made of: the contract with whoever starts the VMM.
//!
//! A [`Config`] is plain data. It reaches the process as JSON on an inherited
//! descriptor (`bulkhead-vmm --config-fd N`) or is built from the command line.
//! Descriptors appear in it by number: the parent opened them and let them be
//! inherited; [`Fd::take`] turns each into an owned one exactly once.
//!
//! Never here: defaults that depend on the host, names of containers.

use std::{
    os::fd::{FromRawFd, OwnedFd, RawFd},
    path::PathBuf,
};

use serde::{Deserialize, Serialize};

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
    /// Guest memory in MiB, 32 to 1,048,576.
    pub memory_mib: u32,
    /// File systems shared with the guest.
    pub shares: Vec<Share>,
    /// Sockets between guest and host.
    pub vsock: Option<Vsock>,
    /// Block devices, in the order of their names in the guest: vda, vdb, …
    pub disks: Vec<Disk>,
    /// A console (hvc0); without it the guest has none.
    pub console: Option<Console>,
    /// Offer an entropy device.
    pub rng: bool,
    /// Confinement before the first guest instruction; `None` runs unconfined.
    pub jail: Option<Jail>,
    /// Read end of a pipe or a socket: when its other end closes, the VM ends.
    pub alive: Option<Fd>,
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
    /// Request queues, 1 to 8; each has a thread.
    pub queues: u8,
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
}
