//! Owner, mode, times and attributes of an entry.

use std::os::fd::AsFd;

use rustix::{
    fs::{XattrFlags, fchmod, fchown, flistxattr, fremovexattr, fsetxattr, futimens},
    io::Errno,
};

use super::{Entry, Gid, Mode, Problem, Time, Timespec, Timestamps, Uid, failed, refused};

/// Attributes that a layer may set. `trusted.` ones would speak to overlayfs, labels
/// of the builder's host mean nothing here.
const XATTRS: [&[u8]; 4] = [
    b"user.",
    b"security.capability",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
];

/// Longest list of an inode's attributes (xattr(7)).
const MAX_LIST: usize = 64 << 10;

/// What an entry says of its file.
pub(super) struct Meta {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
    pub(super) mode: Mode,
    pub(super) times: Timestamps,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

fn is_allowed(name: &[u8]) -> bool {
    XATTRS.iter().any(|known| name.starts_with(known))
}

impl Meta {
    pub(super) fn of(entry: &Entry) -> Result<Self, Problem> {
        let id = |id: i64| match u32::try_from(id) {
            Ok(id) if id != u32::MAX => Ok(id),
            _ => refused("its owner is no valid number"),
        };
        let Ok(mode) = u32::try_from(entry.mode & 0o7777) else {
            return refused("its mode is no valid number");
        };
        let mut xattrs = Vec::new();
        for (name, value) in &entry.xattrs {
            if name.starts_with(b"trusted.") {
                return refused("attributes in trusted. belong to the host");
            }
            if is_allowed(name) {
                xattrs.push((name.clone(), value.clone()));
            }
        }
        let atime = entry.atime.unwrap_or(entry.mtime).max(entry.mtime);
        Ok(Meta {
            uid: Uid::from_raw(id(entry.uid)?),
            gid: Gid::from_raw(id(entry.gid)?),
            mode: Mode::from_raw_mode(mode),
            times: Timestamps {
                last_access: bounded(atime),
                last_modification: bounded(entry.mtime),
            },
            xattrs,
        })
    }

    /// On an open file or directory. The order matters: a change of the owner
    /// clears set-id bits and capabilities.
    pub(super) fn apply(&self, file: impl AsFd) -> Result<(), Problem> {
        fchown(&file, Some(self.uid), Some(self.gid)).map_err(failed("change the owner of"))?;
        for (name, value) in &self.xattrs {
            match fsetxattr(&file, name.as_slice(), value, XattrFlags::empty()) {
                // As containerd and Docker: the store's file system has no place for it.
                Ok(()) | Err(Errno::NOTSUP) => {}
                Err(error) => return Err(failed("set an attribute of")(error)),
            }
        }
        // After the access list, whose mask is the mode's middle part.
        fchmod(&file, self.mode).map_err(failed("change the mode of"))?;
        futimens(&file, &self.times).map_err(failed("set the time of"))
    }

    /// On a directory that is there already: attributes that it has below and that
    /// this entry does not name are gone.
    pub(super) fn apply_to_directory(&self, dir: impl AsFd) -> Result<(), Problem> {
        let mut list = Vec::with_capacity(MAX_LIST);
        match flistxattr(&dir, rustix::buffer::spare_capacity(&mut list)) {
            Ok(_) | Err(Errno::NOTSUP) => {}
            Err(error) => return Err(failed("read the attributes of")(error)),
        }
        for name in list.split(|byte| *byte == 0) {
            if is_allowed(name) && !self.xattrs.iter().any(|(known, _)| known == name) {
                fremovexattr(&dir, name).map_err(failed("remove an attribute of"))?;
            }
        }
        self.apply(dir)
    }
}

/// A time as containerd and Docker set it: what lies before 1970, or does not fit into
/// 63 bits of nanoseconds, becomes 1970.
fn bounded(time: Time) -> Timespec {
    const LAST: i64 = i64::MAX / 1_000_000_000;
    if (0..LAST).contains(&time.seconds) {
        Timespec {
            tv_sec: time.seconds,
            tv_nsec: time.nanoseconds.into(),
        }
    } else {
        Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        }
    }
}
