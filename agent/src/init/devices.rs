//! Device nodes and the links in `/dev`.
//!
//! In a tmpfs they are nodes. On a share from the host nodes are inert, and in
//! a user namespace they cannot be made: there the guest's own node is mounted
//! on a file instead.

use std::{io, os::fd::OwnedFd, path::Path};

use rustix::{
    fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, Uid},
    io::Errno,
};

use super::{
    Doing, Error, Result,
    paths::Root,
    rootfs::{clone_tree, move_to, refuse_procfs},
};
use crate::spec::{
    devices::{DEVICES, default_nodes},
    plan::{DeviceNode, NodeKind},
};

const LINKS: [(&str, &str); 5] = [
    ("/dev/fd", "/proc/self/fd"),
    ("/dev/stdin", "/proc/self/fd/0"),
    ("/dev/stdout", "/proc/self/fd/1"),
    ("/dev/stderr", "/proc/self/fd/2"),
    ("/dev/core", "/proc/kcore"),
];

/// Makes the default devices, those of the specification, and the links.
pub(super) fn make_all(root: &Root, devices: &[DeviceNode]) -> Result<()> {
    for device in default_nodes() {
        // What the specification says about one of them counts.
        if !devices.iter().any(|other| other.path == device.path) {
            make(root, &device)?;
        }
    }
    for device in devices {
        make(root, device)?;
    }
    for (link, target) in LINKS {
        make_link(root, Path::new(link), target, Replace::Nothing)?;
    }
    make_link(root, Path::new("/dev/ptmx"), "pts/ptmx", Replace::File)
}

fn make(root: &Root, device: &DeviceNode) -> Result<()> {
    let doing = format!("make the device {}", device.path.display());
    let (kind, numbers) = match device.kind {
        // The multiplexer for terminals must be that of the container's devpts.
        NodeKind::Char(5, 2) => return Ok(()),
        NodeKind::Char(major, minor) => (FileType::CharacterDevice, (major, minor)),
        NodeKind::Block(major, minor) => (FileType::BlockDevice, (major, minor)),
        NodeKind::Fifo => (FileType::Fifo, (0, 0)),
    };
    let (parent, name) = root.make_parent(&device.path).doing(&doing)?;
    refuse_procfs(&parent, &device.path)?;
    let in_tmpfs = rustix::fs::fstatfs(&parent).doing(&doing)?.f_type == libc::TMPFS_MAGIC;
    if in_tmpfs || kind == FileType::Fifo {
        let number = rustix::fs::makedev(numbers.0, numbers.1);
        let mode = Mode::from_raw_mode(device.mode);
        match rustix::fs::mknodat(&parent, name, kind, mode, number) {
            Ok(()) => return give_to(&parent, name, device).doing(&doing),
            Err(Errno::PERM | Errno::EXIST) if kind != FileType::Fifo => {}
            Err(errno) => return Err(errno).doing(&doing),
        }
    }
    let onto = root.make_file(&device.path).doing(&doing)?;
    let node = guest_node(device.kind)?;
    move_to(&clone_tree(&node, false).doing(&doing)?, &onto).doing(&doing)
}

fn give_to(parent: &OwnedFd, name: &std::ffi::OsStr, device: &DeviceNode) -> io::Result<()> {
    let (uid, gid) = (Uid::from_raw(device.uid), Gid::from_raw(device.gid));
    rustix::fs::chownat(
        parent,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    // A change of the owner can clear bits of the mode.
    Ok(rustix::fs::chmodat(
        parent,
        name,
        Mode::from_raw_mode(device.mode),
        AtFlags::empty(),
    )?)
}

/// The guest's node of the same kind, with the same numbers.
fn guest_node(kind: NodeKind) -> Result<OwnedFd> {
    let (path, (major, minor)) = match kind {
        NodeKind::Char(major, minor) => {
            let mut known = DEVICES.iter();
            let known = known.find(|known| (known.major, known.minor) == (major, minor));
            (known.map(|known| known.path.into()), (major, minor))
        }
        NodeKind::Block(major, minor) => {
            // A link to the device, whose name is that of its node.
            let link = format!("/sys/dev/block/{major}:{minor}");
            let device = std::fs::read_link(link).ok();
            let name = device.as_deref().and_then(Path::file_name);
            (
                name.map(|name| Path::new("/dev").join(name)),
                (major, minor),
            )
        }
        NodeKind::Fifo => (None, (0, 0)),
    };
    let path = path.ok_or_else(|| Error::Refused {
        what: format!("device {major}:{minor}"),
        reason: "the guest has no such device",
    })?;
    let doing = format!("open {} of the guest", path.display());
    rustix::fs::openat(CWD, &path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).doing(doing)
}

/// What gives way to a link.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Replace {
    Nothing,
    File,
}

fn make_link(root: &Root, link: &Path, target: &str, replace: Replace) -> Result<()> {
    let doing = format!("make the link {}", link.display());
    let (parent, name) = root.make_parent(link).doing(&doing)?;
    let made = match rustix::fs::symlinkat(target, &parent, name) {
        Err(Errno::EXIST) if replace == Replace::Nothing => Ok(()),
        Err(Errno::EXIST) => rustix::fs::unlinkat(&parent, name, AtFlags::empty())
            .and_then(|()| rustix::fs::symlinkat(target, &parent, name)),
        result => result,
    };
    made.doing(doing)
}
