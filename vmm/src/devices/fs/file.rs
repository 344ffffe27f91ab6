//! What the share asks and tells of single files: names and attributes that the
//! guest may use, identity, status.

use std::{
    ffi::CStr,
    fs::File,
    io,
    mem::{ManuallyDrop, MaybeUninit},
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    sync::Mutex,
};

use rustix::{
    fs::{self as sys, AtFlags, Statx, StatxFlags},
    path::DecInt,
};

use super::table::{Identity, Node};

pub(super) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// A name of the guest is one component of a path and not a special one.
pub(super) fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(error(libc::EINVAL)),
        name if name.len() > 255 => Err(error(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// Extended attributes that a container may have: its own, capabilities of
/// programs, access control lists. Others do not exist here, neither to be read
/// nor to be set: they steer the host's kernel.
pub(super) fn attribute(name: &CStr) -> io::Result<()> {
    let allowed = match name.to_bytes() {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name => name.starts_with(b"user."),
    };
    if allowed {
        Ok(())
    } else {
        Err(error(libc::EOPNOTSUPP))
    }
}

/// Mounts of kernel interfaces are not entered, whoever put them there.
pub(super) fn may_enter(node: &Node) -> io::Result<()> {
    const REFUSED: [i64; 4] = [
        libc::PROC_SUPER_MAGIC,
        libc::SYSFS_MAGIC,
        libc::DEBUGFS_MAGIC,
        libc::TRACEFS_MAGIC,
    ];
    if REFUSED.contains(&sys::fstatfs(node)?.f_type) {
        return Err(error(libc::EACCES));
    }
    Ok(())
}

pub(super) fn statx(fd: BorrowedFd<'_>) -> rustix::io::Result<Statx> {
    sys::statx(
        fd,
        "",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        StatxFlags::BASIC_STATS | StatxFlags::MNT_ID,
    )
}

pub(super) fn identify(fd: OwnedFd) -> io::Result<(Node, Statx)> {
    let status = statx(fd.as_fd())?;
    let node = Node {
        fd,
        identity: Identity {
            device: (status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            mount: status.stx_mnt_id,
        },
        kind: u32::from(status.stx_mode) & libc::S_IFMT,
        seen: Mutex::default(),
    };
    Ok((node, status))
}

pub(super) fn attributes(status: &Statx) -> libc::stat64 {
    // SAFETY: all zeroes is a `stat64`: it is made of integers.
    let mut attr: libc::stat64 = unsafe { MaybeUninit::zeroed().assume_init() };
    attr.st_ino = status.stx_ino;
    attr.st_mode = status.stx_mode.into();
    attr.st_nlink = status.stx_nlink.into();
    attr.st_uid = status.stx_uid;
    attr.st_gid = status.stx_gid;
    attr.st_rdev = libc::makedev(status.stx_rdev_major, status.stx_rdev_minor);
    attr.st_size = status.stx_size.cast_signed();
    attr.st_blksize = status.stx_blksize.into();
    attr.st_blocks = status.stx_blocks.cast_signed();
    attr.st_atime = status.stx_atime.tv_sec;
    attr.st_atime_nsec = status.stx_atime.tv_nsec.into();
    attr.st_mtime = status.stx_mtime.tv_sec;
    attr.st_mtime_nsec = status.stx_mtime.tv_nsec.into();
    attr.st_ctime = status.stx_ctime.tv_sec;
    attr.st_ctime_nsec = status.stx_ctime.tv_nsec.into();
    attr
}

/// A node as a path, for the thread whose working directory is `/proc/self/fd`.
pub(super) fn here(node: &Node) -> DecInt {
    DecInt::from_fd(&node.fd)
}

/// The file for functions that want it mutable and do not close it.
pub(super) fn borrow(file: &File) -> ManuallyDrop<File> {
    // SAFETY: `file` keeps the descriptor open, and the copy never closes it.
    ManuallyDrop::new(unsafe { File::from_raw_fd(file.as_raw_fd()) })
}
