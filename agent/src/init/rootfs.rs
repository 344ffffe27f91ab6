//! The container's root: attached, entered, then closed where asked.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat2},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsmount, fsopen, mount_change, move_mount,
        open_tree, unmount,
    },
};

use super::{Doing, Error, Result, paths::Root};
use crate::{spec::plan::Attributes, sys};

/// What makes a mount read-only.
pub(super) const READONLY: Attributes = Attributes {
    set: libc::MOUNT_ATTR_RDONLY,
    clear: 0,
};

/// Makes the rootfs a mount of its own, cut off from every other namespace.
pub(super) fn attach(rootfs: &Path) -> Result<Root> {
    let doing = format!("attach the rootfs {}", rootfs.display());
    mount_change(
        "/",
        MountPropagationFlags::PRIVATE | MountPropagationFlags::REC,
    )
    .doing("make the mounts private")?;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = openat2(CWD, rootfs, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)
        .doing(format!("open the rootfs {}", rootfs.display()))?;
    let tree = clone_tree(&directory, true).doing(&doing)?;
    sys::make_mounts_private(&tree).doing(&doing)?;
    move_to(&tree, &directory).doing(&doing)?;
    Ok(Root::new(tree))
}

/// Makes the rootfs `/` and lets go of everything else.
pub(super) fn enter(root: &Root) -> Result<()> {
    const DOING: &str = "enter the rootfs";
    rustix::process::fchdir(root).doing(DOING)?;
    // With both arguments the same the old root is stacked on the new one.
    rustix::process::pivot_root(".", ".").doing(DOING)?;
    unmount(".", UnmountFlags::DETACH).doing("leave the guest's root")?;
    rustix::process::chdir("/").doing(DOING)
}

/// Makes `/` read-only, and nothing that is mounted below it.
pub(super) fn make_readonly(root: &Root) -> Result<()> {
    sys::set_mount_attributes(root, false, READONLY).doing("make the rootfs read-only")
}

/// Makes each path read-only with all below it; one that is absent is no fault.
pub(super) fn make_paths_readonly(root: &Root, paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let doing = format!("make {} read-only", path.display());
        if let Some(there) = open_unless_absent(root, path).doing(&doing)? {
            let tree = clone_tree(&there, true).doing(&doing)?;
            sys::set_mount_attributes(&tree, true, READONLY).doing(&doing)?;
            move_to(&tree, &there).doing(&doing)?;
        }
    }
    Ok(())
}

/// Covers each path: a directory with an empty one, anything else with
/// `/dev/null`; one that is absent is no fault.
pub(super) fn mask_paths(root: &Root, paths: &[PathBuf]) -> Result<()> {
    for path in paths {
        let doing = format!("mask {}", path.display());
        if let Some(there) = open_unless_absent(root, path).doing(&doing)? {
            let cover = match file_type(&there).doing(&doing)? {
                FileType::Directory => empty_directory(),
                _ => null_device(root),
            };
            move_to(&cover.doing(&doing)?, &there).doing(&doing)?;
        }
    }
    Ok(())
}

fn empty_directory() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_RDONLY,
    )?)
}

fn null_device(root: &Root) -> io::Result<OwnedFd> {
    let null = root.open(Path::new("/dev/null"), OFlags::PATH | OFlags::NOFOLLOW)?;
    let stat = rustix::fs::fstat(&null)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice
        || stat.st_rdev != rustix::fs::makedev(1, 3)
    {
        return Err(io::Error::other(
            "/dev/null of the container is something else",
        ));
    }
    clone_tree(&null, false)
}

fn open_unless_absent(root: &Root, path: &Path) -> io::Result<Option<OwnedFd>> {
    match root.open(path, OFlags::PATH) {
        Ok(there) => Ok(Some(there)),
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR)) => Ok(None),
        Err(e) => Err(e),
    }
}

/// The kind of file that a descriptor refers to.
pub(super) fn file_type(fd: impl AsFd) -> io::Result<FileType> {
    Ok(FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode))
}

/// A detached copy of the mount at `from`, with those below it if asked.
pub(super) fn clone_tree(from: impl AsFd, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    Ok(open_tree(from, "", flags)?)
}

/// Mounts a detached mount on what `onto` refers to.
pub(super) fn move_to(mount: impl AsFd, onto: impl AsFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, "", onto, "", flags)?)
}

/// Refuses a mount point in `/proc` that is not known to be harmless.
pub(super) fn refuse_procfs(onto: impl AsFd, path: &Path) -> Result<()> {
    let kind = rustix::fs::fstatfs(onto)
        .doing(format!("look at {}", path.display()))?
        .f_type;
    if kind == libc::PROC_SUPER_MAGIC && !crate::spec::allowed_in_proc(path) {
        return Err(Error::Refused {
            what: format!("mount on {}", path.display()),
            reason: "nothing can be mounted inside /proc",
        });
    }
    Ok(())
}
