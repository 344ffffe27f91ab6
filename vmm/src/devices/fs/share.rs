//! One directory of the host as the guest's file system.
//!
//! Names are not paths: each is one component, checked, and used only relative to
//! a descriptor, never following a symbolic link. What lies below the directory
//! can be mounts of any number, also such that come later; each is announced to
//! the guest as a mount of its own, so that device and inode numbers mean there
//! what they mean here. procfs and sysfs are not entered.
//!
//! Only regular files and directories are ever opened. Device nodes, FIFOs and
//! sockets exist as names with attributes: what they lead to is the guest's.
//!
//! The host may change every file, so the guest's kernel asks for each name that
//! it walks, and what it opens or looks at by name is what is there now. Through
//! an open descriptor it sees changes after 10 ms at most: without that much, each
//! `read` of cached content would cost a request. Names of directories inside a
//! mount, and attributes of directories, are good for a second, so that a long
//! path does not cost a request for each of its parts. Content that provably did
//! not change since it was last opened stays in the guest's page cache.
//!
//! A read-only share answers EROFS here, whatever is mounted how.

use std::{
    ffi::CStr,
    fs::File,
    io,
    mem::MaybeUninit,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{
        PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use fuse_backend_rs::{
    abi::fuse_abi::{
        ATTR_SUBMOUNT, CreateIn, FsOptions, OpenOptions, SetattrValid, WRITE_KILL_PRIV,
    },
    api::filesystem::{
        Context, DirEntry, Entry, FileSystem, GetxattrReply, ListxattrReply, ZeroCopyReader,
        ZeroCopyWriter,
    },
};
use rustix::{
    fs::{
        self as sys, AtFlags, FallocateFlags, FileType, Mode, OFlags, RawDir, RenameFlags,
        SeekFrom, Timespec, Timestamps, XattrFlags,
    },
    path::DecInt,
};

use super::{
    caller::{Caller, KillPrivileges},
    file::{attribute, attributes, borrow, component, error, here, identify, may_enter, statx},
    front::MAX_XATTR,
    table::{Node, Seen, Table},
};

/// How long the guest may believe what it was told of a directory.
const DIRECTORY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it may believe the attributes of anything else. No name is valid for
/// any time, and attributes come with it, so this matters for open files only.
const FILE_TIMEOUT: Duration = Duration::from_millis(10);

/// A file counts as settled when nothing changed it for this long. Longer than
/// Linux takes to write back, and thereby note, a memory-mapped change.
const SETTLED: Duration = Duration::from_secs(60);

/// Flags of open(2) that the host honours; the rest is the guest's business.
const OPEN_FLAGS: u32 = OFlags::ACCMODE
    .union(OFlags::APPEND)
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .bits();

/// Bytes of directory entries taken from the host at once.
const DIRECTORY: usize = 32 * 1024;

/// Bit of OPEN's second word: the guest wants set-id bits cleared.
const OPEN_KILL_SUIDGID: u32 = 1;

/// The shared directory.
#[derive(Debug)]
pub(super) struct Shared {
    table: Table,
    /// The mount in which the directory itself is.
    root_mount: u64,
    /// `/proc/self/fd`: through it a node's descriptor becomes an open file.
    proc_self_fd: OwnedFd,
    read_only: bool,
    initialized: AtomicBool,
    /// The guest makes mounts of its own out of ours.
    submounts: AtomicBool,
}

impl Shared {
    /// Shares `root`, an O_PATH descriptor of a directory. `limit` is the most
    /// descriptors that the guest can make this hold.
    pub(super) fn new(
        root: OwnedFd,
        proc_self_fd: OwnedFd,
        read_only: bool,
        limit: usize,
    ) -> io::Result<Shared> {
        let (root, _) = identify(root)?;
        Ok(Shared {
            root_mount: root.identity.mount,
            table: Table::new(root, limit),
            proc_self_fd,
            read_only,
            initialized: AtomicBool::new(false),
            submounts: AtomicBool::new(false),
        })
    }

    /// Whether INIT has come and DESTROY has not.
    pub(super) fn is_initialized(&self) -> bool {
        self.initialized.load(Ordering::Acquire)
    }

    /// Where a thread of this share belongs: extended attributes have system calls
    /// for paths only, which are then relative to here.
    pub(super) fn enter_thread(&self) -> io::Result<()> {
        super::caller::prepare_thread()?;
        Ok(rustix::process::fchdir(&self.proc_self_fd)?)
    }

    fn writable(&self) -> io::Result<()> {
        if self.read_only {
            Err(error(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// The file of this name, as the guest will know it.
    fn find(&self, parent: &Node, name: &CStr) -> io::Result<Entry> {
        let fd = sys::openat(
            parent,
            name,
            OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        self.entry(parent, fd)
    }

    fn entry(&self, parent: &Node, fd: OwnedFd) -> io::Result<Entry> {
        let (node, status) = identify(fd)?;
        let mut attr_flags = 0;
        if node.identity.mount != parent.identity.mount {
            may_enter(&node)?;
            if node.kind == libc::S_IFDIR && self.submounts.load(Ordering::Relaxed) {
                attr_flags |= ATTR_SUBMOUNT;
            }
        }
        let attr = attributes(&status);
        // Names that lead to mounts, and those around them, come and go with
        // containers: the same name may be another directory at once.
        let within =
            node.identity.mount == parent.identity.mount && node.identity.mount != self.root_mount;
        Ok(Entry {
            inode: self.table.look_up(node)?,
            generation: 0,
            attr_flags,
            attr_timeout: timeout(&attr),
            entry_timeout: if within {
                timeout(&attr)
            } else {
                Duration::ZERO
            },
            attr,
        })
    }

    /// Opens a node's file. `flags` may have any bits.
    fn reopen(&self, node: &Node, flags: u32) -> io::Result<File> {
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(error(libc::ENXIO));
        }
        let flags = OFlags::from_bits_retain(flags & OPEN_FLAGS);
        if flags.intersects(OFlags::ACCMODE | OFlags::TRUNC) {
            self.writable()?;
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let path = DecInt::from_fd(node);
        Ok(sys::openat(&self.proc_self_fd, path, flags, Mode::empty())?.into())
    }

    /// Whether the pages that the guest has of a file are still good.
    fn unchanged(node: &Node, file: &File) -> bool {
        let Ok(status) = statx(file.as_fd()) else {
            return false;
        };
        let time = |time: sys::StatxTimestamp| (time.tv_sec, time.tv_nsec);
        let changed = Duration::from_secs(status.stx_ctime.tv_sec.unsigned_abs());
        let now = Seen {
            stamp: (
                status.stx_size,
                time(status.stx_mtime),
                time(status.stx_ctime),
            ),
            settled: SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .is_ok_and(|now| now.saturating_sub(changed) > SETTLED),
        };
        let mut seen = node.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let before = seen.replace(now);
        before.is_some_and(|before| before.settled && before.stamp == now.stamp)
    }

    fn status(&self, inode: u64, handle: Option<u64>) -> io::Result<(libc::stat64, Duration)> {
        let status = match handle {
            Some(handle) => statx(self.table.handle(handle, inode)?.file.as_fd())?,
            None => statx(self.table.node(inode)?.as_fd())?,
        };
        let attr = attributes(&status);
        Ok((attr, timeout(&attr)))
    }

    fn resize(&self, inode: u64, handle: Option<u64>, size: u64, kill: bool) -> io::Result<()> {
        let _kill = KillPrivileges::when(kill)?;
        match handle {
            Some(handle) => sys::ftruncate(&self.table.handle(handle, inode)?.file, size)?,
            None => {
                let node = self.table.node(inode)?;
                let file = self.reopen(&node, OFlags::WRONLY.bits())?;
                sys::ftruncate(file, size)?;
            }
        }
        Ok(())
    }
}

impl FileSystem for Shared {
    type Inode = u64;
    type Handle = u64;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.submounts
            .store(capable.contains(FsOptions::SUBMOUNTS), Ordering::Relaxed);
        self.initialized.store(true, Ordering::Release);
        Ok(FsOptions::ASYNC_READ
            | FsOptions::BIG_WRITES
            | FsOptions::MAX_PAGES
            | FsOptions::ATOMIC_O_TRUNC
            | FsOptions::AUTO_INVAL_DATA
            | FsOptions::CACHE_SYMLINKS
            | FsOptions::PARALLEL_DIROPS
            | FsOptions::HANDLE_KILLPRIV_V2
            // The guest's umask comes with each request, because a default ACL of
            // the directory, which only we see in time, overrides it.
            | FsOptions::DONT_MASK
            | FsOptions::POSIX_ACL
            | FsOptions::SUBMOUNTS
            | FsOptions::INIT_EXT)
    }

    fn destroy(&self) {
        self.initialized.store(false, Ordering::Release);
        self.table.clear();
    }

    fn lookup(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        component(name)?;
        self.find(&*self.table.node(parent)?, name)
    }

    fn forget(&self, _: &Context, inode: u64, count: u64) {
        self.table.forget(inode, count);
    }

    fn getattr(
        &self,
        _: &Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.status(inode, handle)
    }

    fn setattr(
        &self,
        _: &Context,
        inode: u64,
        attr: libc::stat64,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(libc::stat64, Duration)> {
        self.writable()?;
        let node = self.table.node(inode)?;
        let path = || DecInt::from_fd(&node.fd);
        if valid.contains(SetattrValid::MODE) {
            let mode = Mode::from_raw_mode(attr.st_mode & 0o7777);
            sys::chmodat(&self.proc_self_fd, path(), mode, AtFlags::empty())?;
        }
        if valid.intersects(SetattrValid::UID | SetattrValid::GID) {
            let uid = valid.contains(SetattrValid::UID).then_some(attr.st_uid);
            let gid = valid.contains(SetattrValid::GID).then_some(attr.st_gid);
            sys::chownat(
                &*node,
                "",
                uid.map(sys::Uid::from_raw),
                gid.map(sys::Gid::from_raw),
                AtFlags::EMPTY_PATH | AtFlags::SYMLINK_NOFOLLOW,
            )?;
        }
        if valid.contains(SetattrValid::SIZE) {
            let kill = valid.contains(SetattrValid::KILL_SUIDGID);
            self.resize(inode, handle, attr.st_size.cast_unsigned(), kill)?;
        }
        if valid.intersects(SetattrValid::ATIME | SetattrValid::MTIME) {
            let time = |set, now, seconds, nanoseconds| Timespec {
                tv_sec: seconds,
                tv_nsec: if valid.contains(now) {
                    sys::UTIME_NOW
                } else if valid.contains(set) {
                    nanoseconds
                } else {
                    sys::UTIME_OMIT
                },
            };
            let times = Timestamps {
                last_access: time(
                    SetattrValid::ATIME,
                    SetattrValid::ATIME_NOW,
                    attr.st_atime,
                    attr.st_atime_nsec,
                ),
                last_modification: time(
                    SetattrValid::MTIME,
                    SetattrValid::MTIME_NOW,
                    attr.st_mtime,
                    attr.st_mtime_nsec,
                ),
            };
            sys::utimensat(&self.proc_self_fd, path(), &times, AtFlags::empty())?;
        }
        self.status(inode, handle)
    }

    fn readlink(&self, _: &Context, inode: u64) -> io::Result<Vec<u8>> {
        let node = self.table.node(inode)?;
        Ok(sys::readlinkat(&*node, "", Vec::new())?.into_bytes())
    }

    fn symlink(
        &self,
        context: &Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
    ) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let parent = self.table.node(parent)?;
        {
            let _caller = Caller::become_(context.uid, context.gid, 0)?;
            sys::symlinkat(target, &*parent, name)?;
        }
        self.find(&parent, name)
    }

    fn mknod(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        rdev: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let kind = match mode & libc::S_IFMT {
            libc::S_IFREG => FileType::RegularFile,
            libc::S_IFIFO => FileType::Fifo,
            libc::S_IFSOCK => FileType::Socket,
            libc::S_IFCHR => FileType::CharacterDevice,
            libc::S_IFBLK => FileType::BlockDevice,
            _ => return Err(error(libc::EINVAL)),
        };
        let parent = self.table.node(parent)?;
        {
            let _caller = Caller::become_(context.uid, context.gid, umask)?;
            let mode = Mode::from_raw_mode(mode & 0o7777);
            sys::mknodat(&*parent, name, kind, mode, u64::from(rdev))?;
        }
        self.find(&parent, name)
    }

    fn mkdir(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        umask: u32,
    ) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let parent = self.table.node(parent)?;
        {
            let _caller = Caller::become_(context.uid, context.gid, umask)?;
            sys::mkdirat(&*parent, name, Mode::from_raw_mode(mode & 0o7777))?;
        }
        self.find(&parent, name)
    }

    fn unlink(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        component(name)?;
        let parent = self.table.node(parent)?;
        Ok(sys::unlinkat(&*parent, name, AtFlags::empty())?)
    }

    fn rmdir(&self, _: &Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        component(name)?;
        let parent = self.table.node(parent)?;
        Ok(sys::unlinkat(&*parent, name, AtFlags::REMOVEDIR)?)
    }

    fn rename(
        &self,
        _: &Context,
        from: u64,
        from_name: &CStr,
        to: u64,
        to_name: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        component(from_name)?;
        component(to_name)?;
        let (from, to) = (self.table.node(from)?, self.table.node(to)?);
        // The server has masked the flags.
        let flags = RenameFlags::from_bits_truncate(flags);
        Ok(sys::renameat_with(&*from, from_name, &*to, to_name, flags)?)
    }

    fn link(&self, _: &Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.writable()?;
        component(name)?;
        let (node, parent) = (self.table.node(inode)?, self.table.node(parent)?);
        // By way of procfs, since AT_EMPTY_PATH wants CAP_DAC_READ_SEARCH. The
        // link in procfs is followed; what it leads to is not.
        sys::linkat(
            &self.proc_self_fd,
            DecInt::from_fd(&node.fd),
            &*parent,
            name,
            AtFlags::SYMLINK_FOLLOW,
        )?;
        self.find(&parent, name)
    }

    fn open(
        &self,
        _: &Context,
        inode: u64,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions, Option<u32>)> {
        let node = self.table.node(inode)?;
        let file = {
            let _kill = KillPrivileges::when(fuse_flags & OPEN_KILL_SUIDGID != 0)?;
            self.reopen(&node, flags)?
        };
        let mut options = OpenOptions::empty();
        if Shared::unchanged(&node, &file) {
            options |= OpenOptions::KEEP_CACHE;
        }
        let handle = self
            .table
            .open(inode, file, flags & OFlags::APPEND.bits())?;
        Ok((Some(handle), options, None))
    }

    fn create(
        &self,
        context: &Context,
        parent: u64,
        name: &CStr,
        args: CreateIn,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions, Option<u32>)> {
        self.writable()?;
        component(name)?;
        let parent = self.table.node(parent)?;
        let flags = OFlags::from_bits_retain(args.flags & OPEN_FLAGS) | OFlags::CLOEXEC;
        let created = {
            let _caller = Caller::become_(context.uid, context.gid, args.umask)?;
            // Exclusive, so that nothing that exists is opened by its name.
            sys::openat(
                &*parent,
                name,
                flags | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW,
                Mode::from_raw_mode(args.mode & 0o7777),
            )
        };
        let (entry, file) = match created {
            Ok(fd) => {
                let path = sys::openat(
                    &self.proc_self_fd,
                    DecInt::from_fd(&fd),
                    OFlags::PATH | OFlags::CLOEXEC,
                    Mode::empty(),
                )?;
                (self.entry(&parent, path)?, File::from(fd))
            }
            Err(rustix::io::Errno::EXIST) if args.flags & OFlags::EXCL.bits() == 0 => {
                let entry = self.find(&parent, name)?;
                let kill = args.fuse_flags & OPEN_KILL_SUIDGID != 0;
                let opened = KillPrivileges::when(kill).and_then(|_kill| {
                    let node = self.table.node(entry.inode)?;
                    self.reopen(&node, args.flags)
                });
                let file = opened.inspect_err(|_| self.table.forget(entry.inode, 1))?;
                (entry, file)
            }
            Err(errno) => return Err(errno.into()),
        };
        let append = args.flags & OFlags::APPEND.bits();
        let handle = self
            .table
            .open(entry.inode, file, append)
            .inspect_err(|_| self.table.forget(entry.inode, 1))?;
        Ok((entry, Some(handle), OpenOptions::empty(), None))
    }

    fn read(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        writer: &mut dyn ZeroCopyWriter,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        let handle = self.table.handle(handle, inode)?;
        let size = writer.available_bytes().min(size as usize);
        writer.write_from(&mut *borrow(&handle.file), size, offset)
    }

    fn write(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        reader: &mut dyn ZeroCopyReader,
        size: u32,
        offset: u64,
        _lock_owner: Option<u64>,
        _delayed: bool,
        flags: u32,
        fuse_flags: u32,
    ) -> io::Result<usize> {
        self.writable()?;
        let handle = self.table.handle(handle, inode)?;
        // The guest may set and clear O_APPEND by fcntl(2), which it does not
        // tell otherwise.
        let append = flags & OFlags::APPEND.bits();
        if handle.append.swap(append, Ordering::Relaxed) != append {
            sys::fcntl_setfl(&handle.file, OFlags::from_bits_retain(append))?;
        }
        let _kill = KillPrivileges::when(fuse_flags & WRITE_KILL_PRIV != 0)?;
        reader.read_to(&mut *borrow(&handle.file), size as usize, offset)
    }

    fn fsync(&self, _: &Context, inode: u64, data_only: bool, handle: u64) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        if data_only {
            sys::fdatasync(&handle.file)?;
        } else {
            sys::fsync(&handle.file)?;
        }
        Ok(())
    }

    fn fallocate(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        let handle = self.table.handle(handle, inode)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        Ok(sys::fallocate(&handle.file, mode, offset, length)?)
    }

    fn release(
        &self,
        _: &Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock_release: bool,
        _lock_owner: Option<u64>,
    ) -> io::Result<()> {
        self.table.close(handle, inode)
    }

    fn statfs(&self, _: &Context, inode: u64) -> io::Result<libc::statvfs64> {
        let node = self.table.node(inode)?;
        let mut status = MaybeUninit::uninit();
        // SAFETY: `node` holds the descriptor open and `status` has room.
        let outcome = unsafe { libc::fstatvfs64(node.fd.as_raw_fd(), status.as_mut_ptr()) };
        if outcome != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded and so filled it.
        Ok(unsafe { status.assume_init() })
    }

    fn setxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
    ) -> io::Result<()> {
        self.writable()?;
        attribute(name)?;
        let node = self.table.node(inode)?;
        let flags = XattrFlags::from_bits(flags).ok_or_else(|| error(libc::EINVAL))?;
        Ok(sys::setxattr(here(&node), name, value, flags)?)
    }

    fn getxattr(
        &self,
        _: &Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        attribute(name)?;
        let node = self.table.node(inode)?;
        if size == 0 {
            let len = sys::getxattr_query(here(&node), name)?;
            return Ok(GetxattrReply::Count(u32::try_from(len).unwrap_or(0)));
        }
        let mut value = vec![0; MAX_XATTR.min(size as usize)];
        let len = sys::getxattr(here(&node), name, &mut value[..])?;
        value.truncate(len);
        Ok(GetxattrReply::Value(value))
    }

    fn listxattr(&self, _: &Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        let node = self.table.node(inode)?;
        let mut all = vec![0; MAX_XATTR];
        let len = sys::listxattr(here(&node), &mut all[..])?;
        all.truncate(len);
        let names: Vec<u8> = all
            .split_inclusive(|&byte| byte == 0)
            .filter(|name| {
                CStr::from_bytes_with_nul(name).is_ok_and(|name| attribute(name).is_ok())
            })
            .flatten()
            .copied()
            .collect();
        match size as usize {
            0 => Ok(ListxattrReply::Count(
                u32::try_from(names.len()).unwrap_or(0),
            )),
            size if size < names.len() => Err(error(libc::ERANGE)),
            _ => Ok(ListxattrReply::Names(names)),
        }
    }

    fn removexattr(&self, _: &Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.writable()?;
        attribute(name)?;
        let node = self.table.node(inode)?;
        Ok(sys::removexattr(here(&node), name)?)
    }

    fn opendir(
        &self,
        _: &Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let node = self.table.node(inode)?;
        if node.kind != libc::S_IFDIR {
            return Err(error(libc::ENOTDIR));
        }
        let file = self.reopen(&node, OFlags::RDONLY.bits())?;
        let handle = self.table.open(inode, file, 0)?;
        Ok((Some(handle), OpenOptions::empty()))
    }

    fn readdir(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        size: u32,
        offset: u64,
        add: &mut dyn FnMut(DirEntry<'_>) -> io::Result<usize>,
    ) -> io::Result<()> {
        let handle = self.table.handle(handle, inode)?;
        let mut space = vec![MaybeUninit::uninit(); DIRECTORY.min(size as usize)];
        let _position = handle.lock();
        sys::seek(&handle.file, SeekFrom::Start(offset))?;
        let mut entries = RawDir::new(&handle.file, &mut space);
        let mut first = true;
        while let Some(entry) = entries.next() {
            let added = entry.map_err(io::Error::from).and_then(|entry| {
                add(DirEntry {
                    ino: entry.ino(),
                    offset: entry.next_entry_cookie(),
                    type_: entry.file_type().as_raw_mode() >> 12,
                    name: entry.file_name().to_bytes(),
                })
            });
            match added {
                Ok(0) => break,
                Ok(_) => first = false,
                Err(error) if first => return Err(error),
                // What was found so far is worth more than the error, which the
                // next call meets again.
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn fsyncdir(&self, context: &Context, inode: u64, data: bool, handle: u64) -> io::Result<()> {
        self.fsync(context, inode, data, handle)
    }

    fn releasedir(&self, _: &Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.table.close(handle, inode)
    }

    fn lseek(
        &self,
        _: &Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        let handle = self.table.handle(handle, inode)?;
        let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
        // The guest keeps its own position and asks only what is where.
        let target = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset.cast_unsigned()),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset.cast_unsigned()),
            _ => return Err(error(libc::EINVAL)),
        };
        let _position = handle.lock();
        Ok(sys::seek(&handle.file, target)?)
    }
}

/// How long attributes are good for.
fn timeout(attr: &libc::stat64) -> Duration {
    if is_directory(attr) {
        DIRECTORY_TIMEOUT
    } else {
        FILE_TIMEOUT
    }
}

fn is_directory(attr: &libc::stat64) -> bool {
    attr.st_mode & libc::S_IFMT == libc::S_IFDIR
}
