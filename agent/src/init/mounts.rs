//! The mounts of a specification, one after the other.
//!
//! Each mount is complete, attributes included, before it is attached; it is
//! attached to a descriptor that was resolved inside the container's root.

use std::{
    io::{self, ErrorKind::PermissionDenied, Read},
    os::fd::OwnedFd,
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
        fsconfig_set_string, fsmount, fsopen,
    },
};

use super::{
    Doing, Error, Result, copy,
    paths::Root,
    rootfs::{READONLY, clone_tree, file_type, move_to, refuse_procfs},
};
use crate::{
    spec::plan::{Attributes, Filesystem, Mount, MountKind},
    sys,
};

/// Makes all mounts. Returns the memory file systems that must become
/// read-only, once what belongs into them is there.
pub(super) fn mount_all(root: &Root, mounts: &[Mount], own_user: bool) -> Result<Vec<OwnedFd>> {
    let mut readonly_later = Vec::new();
    for mount in mounts {
        let doing = format!("mount {}", mount.destination.display());
        match &mount.kind {
            MountKind::Bind { source, recursive } => {
                let tree = bind_source(source, *recursive)?;
                let onto = destination(root, mount, &tree)?;
                set_attributes(&tree, mount.attributes, mount).doing(&doing)?;
                move_to(&tree, &onto).doing(&doing)?;
            }
            MountKind::Filesystem { fs, data, copy_up } => {
                let data = with_mode_of_covered(root, mount, *fs, data);
                let tree = filesystem(*fs, &data, own_user).doing(&doing)?;
                let onto = destination(root, mount, &tree)?;
                if *copy_up {
                    let place = mount.destination.display();
                    copy::content(&onto, &tree).doing(format!("copy {place} into its tmpfs"))?;
                }
                let mut attributes = mount.attributes;
                if *fs == Filesystem::Tmpfs && attributes.set & libc::MOUNT_ATTR_RDONLY != 0 {
                    attributes.set &= !libc::MOUNT_ATTR_RDONLY;
                    readonly_later.push(rustix::io::dup(&tree).doing(&doing)?);
                }
                set_attributes(&tree, attributes, mount).doing(&doing)?;
                move_to(&tree, &onto).doing(&doing)?;
            }
            MountKind::Remount => {
                let there = root.open(&mount.destination, OFlags::PATH).doing(&doing)?;
                refuse_procfs(&there, &mount.destination)?;
                set_attributes(&there, mount.attributes, mount).doing(&doing)?;
            }
        }
    }
    Ok(readonly_later)
}

/// Ends the time in which mounts could be filled.
pub(super) fn make_readonly(mounts: Vec<OwnedFd>) -> Result<()> {
    for mount in mounts {
        sys::set_mount_attributes(&mount, false, READONLY).doing("make a tmpfs read-only")?;
    }
    Ok(())
}

/// The own attributes of a mount, then those of the whole tree.
fn set_attributes(tree: &OwnedFd, own: Attributes, mount: &Mount) -> io::Result<()> {
    if !own.is_empty() {
        sys::set_mount_attributes(tree, false, own)?;
    }
    if !mount.recursive_attributes.is_empty() {
        sys::set_mount_attributes(tree, true, mount.recursive_attributes)?;
    }
    Ok(())
}

fn bind_source(source: &Path, recursive: bool) -> Result<OwnedFd> {
    let doing = format!("open the mount source {}", source.display());
    let how = ResolveFlags::NO_SYMLINKS;
    let there = openat2(
        CWD,
        source,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        how,
    )
    .doing(&doing)?;
    match file_type(&there).doing(&doing)? {
        FileType::Directory | FileType::RegularFile | FileType::Socket => {}
        _ => {
            return Err(Error::Refused {
                what: format!("mount source {}", source.display()),
                reason: "only files, directories and sockets can be mounted",
            });
        }
    }
    let tree = clone_tree(&there, recursive).doing(&doing)?;
    sys::make_mounts_private(&tree).doing(&doing)?;
    Ok(tree)
}

/// The mount point, made like what will cover it if it is missing.
fn destination(root: &Root, mount: &Mount, tree: &OwnedFd) -> Result<OwnedFd> {
    let path = &mount.destination;
    let doing = format!("find or make the mount point {}", path.display());
    let is_dir = file_type(tree).doing(&doing)? == FileType::Directory;
    let onto = match &mount.kind {
        // An image must not decide where the kernel's own trees appear.
        MountKind::Filesystem {
            fs: Filesystem::Proc | Filesystem::Sysfs,
            ..
        } => {
            return root.plain_dir(path).doing(&doing);
        }
        _ if is_dir => root.make_dir(path),
        _ => root.make_file(path),
    };
    let onto = onto.doing(&doing)?;
    refuse_procfs(&onto, path)?;
    Ok(onto)
}

/// The options of a file system; a tmpfs that is not told its mode has that of the
/// directory that it covers, so that `/run` and `/tmp` stay what the image made them.
fn with_mode_of_covered(
    root: &Root,
    mount: &Mount,
    fs: Filesystem,
    data: &[(String, Option<String>)],
) -> Vec<(String, Option<String>)> {
    let mut data = data.to_vec();
    if fs != Filesystem::Tmpfs || data.iter().any(|(name, _)| name == "mode") {
        return data;
    }
    // What is missing is made later, and anything else fails there.
    let flags = OFlags::PATH | OFlags::DIRECTORY;
    let covered = root.open(&mount.destination, flags);
    if let Ok(stat) = covered.and_then(|directory| Ok(rustix::fs::fstat(directory)?)) {
        let mode = format!("{:o}", stat.st_mode & 0o7777);
        data.push(("mode".to_owned(), Some(mode)));
    }
    data
}

/// A file system of the container's own, mounted nowhere yet.
fn filesystem(
    fs: Filesystem,
    data: &[(String, Option<String>)],
    own_user: bool,
) -> io::Result<OwnedFd> {
    match new_filesystem(fs, data) {
        // The network namespace is the guest's, so a container with users of
        // its own may see its devices only through the guest's own mount.
        Err(e) if own_user && fs == Filesystem::Sysfs && e.kind() == PermissionDenied => {
            let flags = OFlags::PATH | OFlags::CLOEXEC;
            let tree = clone_tree(rustix::fs::open("/sys", flags, Mode::empty())?, true)?;
            sys::set_mount_attributes(&tree, true, READONLY)?;
            Ok(tree)
        }
        result => result,
    }
}

fn new_filesystem(fs: Filesystem, data: &[(String, Option<String>)]) -> io::Result<OwnedFd> {
    let context = fsopen(fs.name(), FsOpenFlags::FSOPEN_CLOEXEC)?;
    match configure(&context, fs, data) {
        Ok(()) => Ok(fsmount(
            &context,
            FsMountFlags::FSMOUNT_CLOEXEC,
            MountAttrFlags::empty(),
        )?),
        Err(errno) => Err(with_kernel_log(context, errno)),
    }
}

fn configure(
    context: &OwnedFd,
    fs: Filesystem,
    data: &[(String, Option<String>)],
) -> Result<(), Errno> {
    fsconfig_set_string(context, "source", fs.name())?;
    for (name, value) in data {
        match value {
            Some(value) => fsconfig_set_string(context, name.as_str(), value.as_str())?,
            None => fsconfig_set_flag(context, name.as_str())?,
        }
    }
    fsconfig_create(context)
}

/// The kernel says in the context's log which option it did not like.
fn with_kernel_log(context: OwnedFd, errno: Errno) -> io::Error {
    let mut line = [0; 256];
    match std::fs::File::from(context).read(&mut line) {
        Ok(length) if length > 0 => {
            let text = String::from_utf8_lossy(&line[..length]);
            io::Error::new(
                io::Error::from(errno).kind(),
                format!("{errno}: {}", text.trim_end()),
            )
        }
        _ => errno.into(),
    }
}
