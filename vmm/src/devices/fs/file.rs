//! What the share asks and tells of single files: names and attributes that the
//! guest may use, status.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::{
    fs::{self as sys, AtFlags, Statx, StatxFlags},
    path::DecInt,
};

/// Longest name of one component (Linux: NAME_MAX).
const NAME_MAX: usize = 255;

/// What is asked of every file.
const STATUS: StatxFlags = StatxFlags::BASIC_STATS
    .union(StatxFlags::BTIME)
    .union(StatxFlags::MNT_ID);

pub(super) fn error(errno: i32) -> io::Error {
    io::Error::from_raw_os_error(errno)
}

/// A name of the guest is one component of a path and not a special one.
pub(super) fn component(name: &CStr) -> io::Result<()> {
    match name.to_bytes() {
        b"" | b"." | b".." => Err(error(libc::EINVAL)),
        name if name.contains(&b'/') => Err(error(libc::EINVAL)),
        name if name.len() > NAME_MAX => Err(error(libc::ENAMETOOLONG)),
        _ => Ok(()),
    }
}

/// The access control list that steers who may use a file.
pub(super) const ACCESS_LIST: &CStr = c"system.posix_acl_access";

/// Extended attributes that a container may have: its own, capabilities of
/// programs, access control lists. Others do not exist here, neither to be read
/// nor to be set: they steer the host's kernel, or this file server.
pub(super) fn attribute(name: &CStr) -> io::Result<()> {
    let allowed = match name.to_bytes() {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name => name.starts_with(b"user.") && name != super::device::NUMBER.to_bytes(),
    };
    if allowed {
        Ok(())
    } else {
        Err(error(libc::EOPNOTSUPP))
    }
}

/// File systems of kernel interfaces, which are not entered, whoever mounted them
/// there.
pub(super) fn may_enter(magic: i64) -> io::Result<()> {
    const REFUSED: [i64; 4] = [
        libc::PROC_SUPER_MAGIC,
        libc::SYSFS_MAGIC,
        libc::DEBUGFS_MAGIC,
        libc::TRACEFS_MAGIC,
    ];
    if REFUSED.contains(&magic) {
        return Err(error(libc::EACCES));
    }
    Ok(())
}

/// The status of an open file or of what a descriptor names.
pub(super) fn statx(fd: impl AsFd) -> rustix::io::Result<Statx> {
    sys::statx(
        fd,
        "",
        AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
        STATUS,
    )
}

/// The status of a name in a directory, which is not followed.
pub(super) fn statx_at(dir: impl AsFd, name: &CStr) -> rustix::io::Result<Statx> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    sys::statx(dir, name, flags, STATUS)
}

/// What a descriptor names as a path, for the thread whose working directory is
/// `/proc/self/fd`.
pub(super) fn here(fd: &impl AsRawFd) -> DecInt {
    DecInt::new(fd.as_raw_fd())
}
