//! What the share asks and tells of single files: names and attributes that the
//! guest may use, status.

use std::{
    borrow::Cow,
    ffi::{CStr, CString},
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

/// How the names begin of attributes that only this file server reads and sets.
const OURS: &[u8] = b"user.bulkhead.";

/// What they begin with in a guest that are the guest kernel's alone there, as those of
/// overlays. On the host they would be the host kernel's, and take its privileges; here
/// they are a user's, behind [`OURS`].
const TRUSTED: &[u8] = b"trusted.";

/// Whether an attribute has the same name in a guest and on the host: a container's own,
/// capabilities of programs, access control lists.
fn passes(name: &[u8]) -> bool {
    match name {
        b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default" => true,
        name => name.starts_with(b"user.") && !name.starts_with(OURS),
    }
}

/// The host's name of an extended attribute that a guest may have: what [`passes`], and
/// what its kernel trusts. Others do not exist here, neither to be read nor to be set:
/// they steer the host's kernel, or this file server.
pub(super) fn attribute(name: &CStr) -> io::Result<Cow<'_, CStr>> {
    match name.to_bytes() {
        bytes if passes(bytes) => Ok(Cow::Borrowed(name)),
        bytes if bytes.starts_with(TRUSTED) => {
            Ok(Cow::Owned(CString::new([OURS, bytes].concat())?))
        }
        _ => Err(error(libc::EOPNOTSUPP)),
    }
}

/// The guest's name of an attribute of the host, without its end; nothing if a guest
/// does not see it.
pub(super) fn seen_attribute(name: &[u8]) -> Option<&[u8]> {
    match name.strip_prefix(OURS) {
        Some(trusted) => trusted.starts_with(TRUSTED).then_some(trusted),
        None => passes(name).then_some(name),
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
