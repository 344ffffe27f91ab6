//! Operations on what is known about files.

use std::{
    ffi::CStr,
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use rustix::{
    fs::{self as sys, AtFlags, Mode, OFlags, Timespec, Timestamps, XattrFlags},
    path::DecInt,
};

use super::{
    abi::{Attributes, Body, set},
    caller::KillPrivileges,
    device::{self, Device},
    file::{ACCESS_LIST, attribute, error, here, seen_attribute, statx},
    node::Node,
    request::{Change, MAX_XATTR},
    share::{Shared, attributes},
};
use crate::config::Policy;

impl Shared {
    /// Attributes of a node, or of the open file if there is a handle.
    fn attributes(&self, number: u64, handle: Option<u64>) -> io::Result<(Attributes, Arc<Node>)> {
        let node = self.table.node(number);
        let handle = handle.filter(|&handle| self.policy == Policy::Shared || handle != 0);
        let Some(handle) = handle else {
            let node = node?;
            let attr = self.attributes_of(&node, &*node.fd()?)?;
            return Ok((attr, node));
        };
        let handle = self.table.handle(handle, number)?;
        let node = node?;
        let mut attr = attributes(&statx(&handle.file)?, None);
        attr.inode ^= node.salt;
        Ok((attr, node))
    }

    pub(super) fn getattr(&self, number: u64, handle: Option<u64>) -> io::Result<Body> {
        let (attr, node) = self.attributes(number, handle)?;
        let mut body = Body::default();
        body.attr_out(&attr, self.attr_valid(node.identity.mount, node.kind));
        Ok(body)
    }

    pub(super) fn statx(&self, number: u64, handle: Option<u64>) -> io::Result<Body> {
        let (attr, node) = self.attributes(number, handle)?;
        let mut body = Body::default();
        body.statx(&attr, self.attr_valid(node.identity.mount, node.kind));
        Ok(body)
    }

    pub(super) fn setattr(&self, number: u64, change: &Change) -> io::Result<Body> {
        self.writable()?;
        let node = self.table.node(number)?;
        let fd = node.fd()?;
        let has = |what| change.what & what != 0;
        let handle = has(set::FH).then_some(change.handle);
        let as_device = matches!(node.kind, libc::S_IFCHR | libc::S_IFBLK)
            && has(set::MODE | set::UID | set::GID)
            && change_device(&fd, change)?;
        if has(set::MODE) && !as_device {
            let mode = Mode::from_raw_mode(change.mode & 0o7777);
            sys::chmodat(
                &self.proc_self_fd,
                DecInt::from_fd(&*fd),
                mode,
                AtFlags::empty(),
            )?;
        }
        if has(set::UID | set::GID) && !as_device {
            let uid = has(set::UID).then_some(change.uid);
            let gid = has(set::GID).then_some(change.gid);
            sys::chownat(
                &*fd,
                "",
                uid.map(sys::Uid::from_raw),
                gid.map(sys::Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if has(set::SIZE) {
            let _kill = KillPrivileges::when(has(set::KILL_SUIDGID))?;
            match handle {
                Some(handle) => {
                    sys::ftruncate(&self.file(number, handle, true)?.file, change.size)?;
                }
                None => {
                    let file = self.reopen(&node, OFlags::WRONLY.bits())?;
                    sys::ftruncate(file, change.size)?;
                    // Overlayfs may have made another file of it.
                    self.opened.forget(number);
                }
            }
        }
        if has(set::ATIME | set::MTIME) {
            let time = |wanted, now, (tv_sec, nanoseconds): (i64, u32)| Timespec {
                tv_sec,
                tv_nsec: if has(now) {
                    sys::UTIME_NOW
                } else if has(wanted) {
                    nanoseconds.into()
                } else {
                    sys::UTIME_OMIT
                },
            };
            let times = Timestamps {
                last_access: time(set::ATIME, set::ATIME_NOW, change.atime),
                last_modification: time(set::MTIME, set::MTIME_NOW, change.mtime),
            };
            let path = DecInt::from_fd(&*fd);
            sys::utimensat(&self.proc_self_fd, path, &times, AtFlags::empty())?;
        }
        let size = if has(set::SIZE) { libc::IN_MODIFY } else { 0 };
        self.did_to(number, libc::IN_ATTRIB | size);
        self.getattr(number, handle)
    }

    pub(super) fn statfs(&self, number: u64) -> io::Result<Body> {
        let fd = self.table.node(number)?.fd()?;
        let mut status = MaybeUninit::<libc::statfs64>::uninit();
        // SAFETY: `fd` is open and `status` has room.
        let outcome = unsafe { libc::fstatfs64(fd.as_raw_fd(), status.as_mut_ptr()) };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded and so filled it.
        let status = unsafe { status.assume_init() };
        let word = |value: i64| u32::try_from(value).unwrap_or(u32::MAX);
        let mut body = Body::default();
        body.u64(status.f_blocks)
            .u64(status.f_bfree)
            .u64(status.f_bavail)
            .u64(status.f_files)
            .u64(status.f_ffree)
            .u32(word(status.f_bsize))
            .u32(word(status.f_namelen))
            .u32(word(status.f_frsize))
            .zeroes(28);
        Ok(body)
    }

    pub(super) fn setxattr(
        &self,
        number: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        kill_sgid: bool,
    ) -> io::Result<()> {
        self.writable()?;
        let host = attribute(name)?;
        let fd = self.table.node(number)?.fd()?;
        let flags = XattrFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        sys::setxattr(here(&*fd), &*host, value, flags)?;
        self.did_to(number, libc::IN_ATTRIB);
        // The guest's kernel found that whoever sets the list must lose the bit;
        // the host's would let root keep it.
        if kill_sgid && name == ACCESS_LIST {
            let mode = u32::from(statx(&*fd)?.stx_mode);
            if mode & libc::S_ISGID != 0 {
                let mode = Mode::from_raw_mode(mode & 0o7777 & !libc::S_ISGID);
                sys::chmodat(
                    &self.proc_self_fd,
                    DecInt::from_fd(&*fd),
                    mode,
                    AtFlags::empty(),
                )?;
            }
        }
        Ok(())
    }

    pub(super) fn getxattr(&self, number: u64, name: &CStr, size: u32) -> io::Result<Body> {
        let name = &*attribute(name)?;
        let fd = self.table.node(number)?.fd()?;
        let mut body = Body::default();
        if size == 0 {
            let len = sys::getxattr_query(here(&*fd), name)?;
            body.u32(u32::try_from(len).unwrap_or(0)).u32(0);
            return Ok(body);
        }
        let mut value = vec![0; MAX_XATTR.min(size as usize)];
        let len = sys::getxattr(here(&*fd), name, &mut value[..])?;
        value.truncate(len);
        Ok(Body(value))
    }

    pub(super) fn listxattr(&self, number: u64, size: u32) -> io::Result<Body> {
        let fd = self.table.node(number)?.fd()?;
        let mut all = vec![0; MAX_XATTR];
        let len = sys::listxattr(here(&*fd), &mut all[..])?;
        all.truncate(len);
        let names = all.split(|&byte| byte == 0).filter(|name| !name.is_empty());
        let names: Vec<u8> = names
            .filter_map(seen_attribute)
            .flat_map(|name| name.iter().copied().chain([0]))
            .collect();
        match size as usize {
            0 => {
                let mut body = Body::default();
                body.u32(u32::try_from(names.len()).unwrap_or(0)).u32(0);
                Ok(body)
            }
            size if size < names.len() => Err(error(libc::ERANGE)),
            _ => Ok(Body(names)),
        }
    }

    pub(super) fn removexattr(&self, number: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        let fd = self.table.node(number)?.fd()?;
        sys::removexattr(here(&*fd), &*attribute(name)?)?;
        self.did_to(number, libc::IN_ATTRIB);
        Ok(())
    }
}

/// Changes permissions or owner of a device node that a container made; whether
/// it is one.
fn change_device(fd: &OwnedFd, change: &Change) -> io::Result<bool> {
    let Some(device) = device::read(fd, &statx(fd)?) else {
        return Ok(false);
    };
    let pick = |what, new, old| if change.what & what != 0 { new } else { old };
    let mode = device.mode & libc::S_IFMT | change.mode & 0o7777;
    device::change(
        fd,
        Device {
            mode: pick(set::MODE, mode, device.mode),
            uid: pick(set::UID, change.uid, device.uid),
            gid: pick(set::GID, change.gid, device.gid),
            number: device.number,
        },
    )?;
    Ok(true)
}
