//! Device nodes that containers make.
//!
//! A container may make device nodes, and use those that its device list permits:
//! to the guest's kernel they are the guest's devices. To the host they would be
//! the host's, so the file server has no privilege to make any. A device node of
//! a guest is an empty regular file of root here, which nobody may open, with the
//! number in an extended attribute that no guest can read or set.
//!
//! Nobody but root of the host can make such a file: the mark is believed only on
//! a file that is root's, of this mode, and a user's attribute can be set only by
//! who may write to the file.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd},
};

use rustix::fs::{self as sys, Mode, OFlags, Statx, XattrFlags};

use super::file::{error, here};

/// The attribute that makes a file a device node.
pub(super) const NUMBER: &CStr = c"user.bulkhead.device";

/// Permissions of such a file: none, and the mark of a file that never is a
/// program.
const MODE: u32 = 0o1000;

/// A device node, as the guest made it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Device {
    /// Type and permissions.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) number: (u32, u32),
}

/// What says in an overlay's upper directory that a name is gone.
pub(super) const WHITEOUT: Device = Device {
    mode: libc::S_IFCHR,
    uid: 0,
    gid: 0,
    number: (0, 0),
};

impl Device {
    fn text(self) -> String {
        let Device {
            mode,
            uid,
            gid,
            number: (major, minor),
        } = self;
        format!("{mode:o} {uid} {gid} {major} {minor}")
    }

    fn parse(text: &[u8]) -> Option<Device> {
        let mut words = std::str::from_utf8(text).ok()?.split(' ');
        let mode = u32::from_str_radix(words.next()?, 8).ok()?;
        let mut number = || words.next()?.parse().ok();
        let device = Device {
            mode,
            uid: number()?,
            gid: number()?,
            number: (number()?, number()?),
        };
        let kind = mode & libc::S_IFMT;
        let whole = words.next().is_none() && mode & !(libc::S_IFMT | 0o7777) == 0;
        (whole && matches!(kind, libc::S_IFCHR | libc::S_IFBLK)).then_some(device)
    }
}

/// Whether a file may be a device node, by its status.
pub(super) fn may_be(status: &Statx) -> bool {
    u32::from(status.stx_mode) == libc::S_IFREG | MODE
        && (status.stx_uid, status.stx_gid, status.stx_size) == (0, 0, 0)
}

/// The device node that a file stands for. The thread's working directory is
/// `/proc/self/fd`.
pub(super) fn read(fd: &impl AsRawFd, status: &Statx) -> Option<Device> {
    if !may_be(status) {
        return None;
    }
    let mut text = [0; 80];
    let len = sys::getxattr(here(fd), NUMBER, &mut text[..]).ok()?;
    Device::parse(text.get(..len)?)
}

/// Makes a device node.
pub(super) fn make(parent: impl AsFd, name: &CStr, device: Device) -> io::Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = sys::openat(&parent, name, flags, Mode::empty())?;
    let made = sys::fsetxattr(&file, NUMBER, device.text().as_bytes(), XattrFlags::CREATE)
        .and_then(|()| sys::fchmod(&file, Mode::from_raw_mode(MODE)));
    made.map_err(|errno| {
        // Ours a moment ago; if somebody has replaced it, it is theirs to lose.
        let _ = sys::unlinkat(&parent, name, sys::AtFlags::empty());
        match errno {
            rustix::io::Errno::OPNOTSUPP => error(libc::EPERM),
            errno => errno.into(),
        }
    })
}

/// Changes owner or permissions of a device node.
pub(super) fn change(fd: &impl AsRawFd, device: Device) -> io::Result<()> {
    Ok(sys::setxattr(
        here(fd),
        NUMBER,
        device.text().as_bytes(),
        XattrFlags::REPLACE,
    )?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_descriptions_of_devices_are_believed() {
        let device = Device {
            mode: libc::S_IFCHR | 0o620,
            uid: 1000,
            gid: 5,
            number: (136, 3),
        };
        assert_eq!(device.text(), "20620 1000 5 136 3");
        assert_eq!(Device::parse(device.text().as_bytes()), Some(device));
        for bad in [
            "",
            "20620",
            "20620 1 2 3",
            "20620 1 2 3 4 5",
            "20620 1 2 3 -4",
            "100644 0 0 1 3",
            "1020620 0 0 1 3",
            "20620 0 0 1 4294967296",
        ] {
            assert_eq!(Device::parse(bad.as_bytes()), None, "{bad:?}");
        }
    }
}
