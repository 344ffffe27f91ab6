//! Operations on names: what is where, and what comes, moves and goes.

use std::{ffi::CStr, fs::File, io, os::fd::OwnedFd, sync::Arc};

use rustix::{
    fs::{self as sys, AtFlags, FileType, Mode, OFlags, RenameFlags},
    path::DecInt,
};

use super::{
    abi::{Body, OPEN_KILL_SUIDGID, unpack_device},
    caller::{self, KillPrivileges},
    device::{self, Device, WHITEOUT},
    file::{component, error},
    node::Node,
    request::Create,
    share::{Caller, Shared},
    watch::Deed,
};
use crate::config::Policy;

impl Shared {
    pub(super) fn lookup(&self, parent: u64, name: &CStr) -> io::Result<Body> {
        component(name)?;
        let node = self.table.node(parent)?;
        let mut body = Body::default();
        match self.find(parent, &node, name) {
            Ok(entry) => {
                body.entry(&entry);
            }
            Err(error) => match self.absent_valid(&node) {
                Some(valid) if error.raw_os_error() == Some(libc::ENOENT) => {
                    body.no_entry(valid);
                }
                _ => return Err(error),
            },
        }
        Ok(body)
    }

    pub(super) fn forget(&self, number: u64, lookups: u64) {
        let Some(node) = self.table.forget(number, lookups) else {
            return;
        };
        self.opened.forget(number);
        if let Some(watch) = &self.watch {
            watch.forget(number, node);
        }
    }

    pub(super) fn readlink(&self, number: u64) -> io::Result<Body> {
        let fd = self.table.node(number)?.fd()?;
        Ok(Body(sys::readlinkat(&*fd, "", Vec::new())?.into_bytes()))
    }

    /// A directory in which something is to be created under a name.
    fn place(&self, parent: u64, name: &CStr) -> io::Result<(Arc<Node>, Arc<OwnedFd>)> {
        self.writable()?;
        component(name)?;
        let node = self.table.node(parent)?;
        let fd = node.fd()?;
        Ok((node, fd))
    }

    /// What was created there.
    fn created(&self, parent: u64, node: &Arc<Node>, name: &CStr) -> io::Result<Body> {
        let mut body = Body::default();
        let entry = self.find(parent, node, name)?;
        self.did(parent, name, libc::IN_CREATE | directory(entry.attr.mode));
        body.entry(&entry);
        Ok(body)
    }

    pub(super) fn symlink(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        target: &CStr,
    ) -> io::Result<Body> {
        let (node, dir) = self.place(parent, name)?;
        {
            let _caller = caller::Caller::become_(caller.uid, caller.gid, 0)?;
            sys::symlinkat(target, &*dir, name)?;
        }
        self.created(parent, &node, name)
    }

    pub(super) fn mknod(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        mode: u32,
        number: u32,
        umask: u32,
    ) -> io::Result<Body> {
        let (node, dir) = self.place(parent, name)?;
        let kind = match mode & libc::S_IFMT {
            libc::S_IFREG => FileType::RegularFile,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            libc::S_IFCHR | libc::S_IFBLK => {
                let device = Device {
                    mode: mode & (libc::S_IFMT | 0o7777) & !(umask & 0o777),
                    uid: caller.uid,
                    gid: caller.gid,
                    number: unpack_device(number),
                };
                device::make(&*dir, name, device)?;
                return self.created(parent, &node, name);
            }
            _ => return Err(error(libc::EINVAL)),
        };
        {
            let _caller = caller::Caller::become_(caller.uid, caller.gid, umask)?;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            sys::mknodat(&*dir, name, kind, mode, 0)?;
        }
        self.created(parent, &node, name)
    }

    pub(super) fn mkdir(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Body> {
        let (node, dir) = self.place(parent, name)?;
        {
            let _caller = caller::Caller::become_(caller.uid, caller.gid, umask)?;
            sys::mkdirat(&*dir, name, Mode::from_raw_mode(mode & 0o7777))?;
        }
        self.created(parent, &node, name)
    }

    /// A node that loses its name must have its descriptor: it cannot be found
    /// again.
    fn keep_reachable(&self, parent: u64, name: &CStr) -> Option<Arc<OwnedFd>> {
        let (_, node) = self.table.named(parent, name)?;
        node.fd().ok()
    }

    pub(super) fn unlink(&self, parent: u64, name: &CStr, flags: AtFlags) -> io::Result<()> {
        let (_, dir) = self.place(parent, name)?;
        let kept = self.keep_reachable(parent, name);
        sys::unlinkat(&*dir, name, flags)?;
        self.table.unnamed(parent, name);
        let is_directory = flags.contains(AtFlags::REMOVEDIR);
        let directory = if is_directory { libc::IN_ISDIR } else { 0 };
        self.did(parent, name, libc::IN_DELETE | directory);
        drop(kept);
        Ok(())
    }

    /// Renames a file. The whiteout that an overlay may want in its place is made
    /// afterwards: the guest's kernel lets nobody into the directory meanwhile, and the
    /// host's could only make one that is a device.
    pub(super) fn rename(
        &self,
        from: u64,
        from_name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (from_node, from_dir) = self.place(from, from_name)?;
        let (to_node, to_dir) = self.place(to, to_name)?;
        let flags = RenameFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        let whiteout = flags.contains(RenameFlags::WHITEOUT);
        let flags = flags.difference(RenameFlags::WHITEOUT);
        if whiteout && flags.contains(RenameFlags::EXCHANGE) {
            return Err(error(libc::EINVAL));
        }
        let kept = self.keep_reachable(to, to_name);
        sys::renameat_with(&*from_dir, from_name, &*to_dir, to_name, flags)?;
        let made = match whiteout {
            true => device::make(&*from_dir, from_name, WHITEOUT),
            false => Ok(()),
        };
        let back = RenameFlags::NOREPLACE;
        if made.is_err()
            && sys::renameat_with(&*to_dir, to_name, &*from_dir, from_name, back).is_ok()
        {
            return made;
        }
        self.table.renamed(
            (from, &from_node),
            from_name,
            (to, &to_node),
            to_name,
            flags.contains(RenameFlags::EXCHANGE),
        );
        if let Some(watch) = &self.watch {
            watch.did(to, || Deed::Renamed {
                from: (from, from_name.into()),
                to: (to, to_name.into()),
                directory: self
                    .table
                    .named(to, to_name)
                    .map_or(0, |(_, node)| directory(node.kind)),
            });
        }
        drop(kept);
        made
    }

    pub(super) fn link(&self, number: u64, parent: u64, name: &CStr) -> io::Result<Body> {
        let (node, dir) = self.place(parent, name)?;
        let file = self.table.node(number)?.fd()?;
        // By way of procfs, since AT_EMPTY_PATH wants CAP_DAC_READ_SEARCH. The
        // link in procfs is followed; what it leads to is not.
        sys::linkat(
            &self.proc_self_fd,
            DecInt::from_fd(&*file),
            &*dir,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.created(parent, &node, name)
    }

    pub(super) fn create(
        &self,
        caller: Caller,
        parent: u64,
        name: &CStr,
        args: Create,
    ) -> io::Result<Body> {
        if self.policy == Policy::Private {
            // The guest's kernel makes the file with MKNOD from now on, and does
            // not open it.
            return Err(error(libc::ENOSYS));
        }
        let (node, dir) = self.place(parent, name)?;
        let created = {
            let _caller = caller::Caller::become_(caller.uid, caller.gid, args.umask)?;
            // Exclusive, so that nothing that exists is opened by its name.
            sys::openat(
                &*dir,
                name,
                host_flags(args.flags) | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
                Mode::from_raw_mode(args.mode & 0o7777),
            )
        };
        let (entry, file) = match created {
            Ok(fd) => {
                let entry = self.entry((parent, &node), self.path_of(&fd)?, Some(name))?;
                self.did(parent, name, libc::IN_CREATE);
                (entry, File::from(fd))
            }
            Err(rustix::io::Errno::EXIST) if args.flags & OFlags::EXCL.bits() == 0 => {
                let entry = self.find(parent, &node, name)?;
                let kill = args.open_flags & OPEN_KILL_SUIDGID != 0;
                let opened = KillPrivileges::when(kill).and_then(|_kill| {
                    let node = self.table.node(entry.node)?;
                    self.reopen(&node, args.flags)
                });
                let file = opened.inspect_err(|_| self.forget(entry.node, 1))?;
                (entry, file)
            }
            Err(errno) => return Err(errno.into()),
        };
        self.opened_body(&entry, file)
    }

    pub(super) fn tmpfile(&self, caller: Caller, parent: u64, args: Create) -> io::Result<Body> {
        self.writable()?;
        let node = self.table.node(parent)?;
        let dir = node.fd()?;
        let flags = host_flags(args.flags) | OFlags::TMPFILE;
        let file = {
            let _caller = caller::Caller::become_(caller.uid, caller.gid, args.umask)?;
            let mode = Mode::from_raw_mode(args.mode & 0o7777);
            sys::openat(
                &*dir,
                ".",
                flags | (OFlags::EXCL & wanted(args.flags)),
                mode,
            )?
        };
        let entry = self.entry((parent, &node), self.path_of(&file)?, None)?;
        self.opened_body(&entry, File::from(file))
    }

    fn opened_body(&self, entry: &super::abi::Entry, file: File) -> io::Result<Body> {
        let handle = self
            .table
            .open(entry.node, file)
            .inspect_err(|_| self.forget(entry.node, 1))?;
        let mut body = Body::default();
        body.entry(entry).open(handle, 0);
        Ok(body)
    }

    /// A descriptor that names an open file.
    fn path_of(&self, file: &OwnedFd) -> io::Result<OwnedFd> {
        Ok(sys::openat(
            &self.proc_self_fd,
            DecInt::from_fd(file),
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?)
    }
}

/// `IN_ISDIR` for the mode of a directory.
fn directory(mode: u32) -> u32 {
    if mode & libc::S_IFMT == libc::S_IFDIR {
        libc::IN_ISDIR
    } else {
        0
    }
}

fn wanted(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags)
}

/// What of a guest's flags the host's open(2) gets.
fn host_flags(flags: u32) -> OFlags {
    OFlags::from_bits_retain(flags & super::share::OPEN_FLAGS) | OFlags::CLOEXEC
}
