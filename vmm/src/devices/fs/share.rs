//! One directory of the host as the guest's file system.
//!
//! Names are not paths: each is one component, checked, and used only relative to
//! a descriptor, never following a symbolic link. What lies below the directory
//! can be mounts of any number, also such that come later; numbers of files from
//! different mounts are kept apart. procfs and sysfs are not entered.
//!
//! Only regular files and directories are ever opened. Device nodes, FIFOs and
//! sockets exist as names with attributes: what they lead to is the guest's.
//!
//! What the guest may believe, and for how long, is the share's policy:
//!
//! - **shared**: the host may change every file, so the guest's kernel asks for
//!   each name that it walks, and what it opens or looks at by name is what is
//!   there now. Through an open descriptor it sees changes after 10 ms at most:
//!   without that much, each `read` of cached content would cost a request. Names
//!   of directories inside a mount, and attributes of directories, are good for a
//!   second, so that a long path does not cost a request for each of its parts.
//!   Content is read anew after each open: no change of a memory-mapped file shows
//!   in its times before it is written back. Locks are the host's.
//! - **private**: while the guest lives nobody else changes what is inside a
//!   mount, so names, absent names, attributes and content stay valid until the
//!   guest itself changes them, and files and directories are not opened at all.
//!   Locks are the guest's own affair.
//!
//! In either, the directory itself is where containers come and go: of its own
//! mount no name is kept.
//!
//! A read-only share answers EROFS here, whatever is mounted how.

use std::{
    collections::HashMap,
    ffi::CStr,
    fs::File,
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use rustix::{
    fs::{self as sys, Mode, OFlags, Statx},
    path::DecInt,
};

use super::{
    abi::{self, Attributes, Body, Entry, feature},
    device,
    file::{error, may_enter, statx},
    locks::Locks,
    node::{About, Birth, Identity, Node, Residents},
    opened::Opened,
    request::{Header, MAX_DATA},
    table::{ROOT, Table},
    watch::{Deed, Watch},
};
use crate::config::Policy;

/// How long the guest may believe what it was told of a directory.
const DIRECTORY_TIMEOUT: Duration = Duration::from_secs(1);

/// How long it may believe the attributes of anything else. No name is valid for
/// any time, and attributes come with it, so this matters for open files only.
const FILE_TIMEOUT: Duration = Duration::from_millis(10);

/// As long as the guest lives.
const FOREVER: Duration = Duration::from_secs(1 << 31);

/// Flags of open(2) that the host honours; the rest is the guest's business.
/// O_APPEND is not among them: each write says whether it appends.
pub(super) const OPEN_FLAGS: u32 = OFlags::ACCMODE
    .union(OFlags::TRUNC)
    .union(OFlags::DSYNC)
    .union(OFlags::SYNC)
    .union(OFlags::NOATIME)
    .bits();

/// First number of a node in a private share: none is that of one in a shared share,
/// of which the guest is told by numbers alone.
const PRIVATE_NODES: u64 = 1 << 62;

/// What the guest may send without waiting for answers.
const BACKGROUND: u16 = 64;

/// The shared directory.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) table: Table,
    pub(super) locks: Locks,
    /// Files of a private share that were read or written lately.
    pub(super) opened: Opened,
    /// The mount in which the directory itself is.
    root_mount: u64,
    mounts: Mutex<HashMap<u64, Mount>>,
    /// `/proc/self/fd`: through it a node's descriptor becomes an open file.
    pub(super) proc_self_fd: OwnedFd,
    read_only: bool,
    pub(super) policy: Policy,
    /// Tells the guest what others change.
    pub(super) watch: Option<Watch>,
    initialized: AtomicBool,
}

/// A mount below the directory.
#[derive(Clone, Copy, Debug)]
struct Mount {
    /// What tells its files' numbers from those of others.
    salt: u64,
    /// See [`Birth::Sure`].
    overlay: bool,
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl From<&Header> for Caller {
    fn from(header: &Header) -> Caller {
        Caller {
            uid: header.uid,
            gid: header.gid,
        }
    }
}

impl Shared {
    /// Shares `root`, an O_PATH descriptor of a directory. `limit` is the most
    /// descriptors that the guest can make this hold.
    pub(super) fn new(
        root: OwnedFd,
        proc_self_fd: OwnedFd,
        read_only: bool,
        policy: Policy,
        limit: usize,
    ) -> io::Result<Shared> {
        let status = statx(&root)?;
        let residents = Residents::new(limit / 4);
        let mount = Mount {
            salt: 0,
            overlay: false,
        };
        let about = About {
            identity: Identity::of(&status),
            // It has no name: its descriptor stays.
            birth: Birth::Unknown,
            kind: libc::S_IFDIR,
            salt: mount.salt,
        };
        let root = residents.admit(Some(root), about);
        let first = match policy {
            Policy::Shared => ROOT.saturating_add(1),
            Policy::Private => PRIVATE_NODES,
        };
        Ok(Shared {
            root_mount: root.identity.mount,
            mounts: Mutex::new(HashMap::from([(root.identity.mount, mount)])),
            table: Table::new(root, residents, (limit / 2).max(1), first),
            locks: Locks::new((limit / 8).max(1)),
            opened: Opened::new((limit / 8).max(1)),
            proc_self_fd,
            read_only,
            policy,
            watch: None,
            initialized: AtomicBool::new(false),
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

    /// INIT: what both sides can do.
    pub(super) fn init(
        &self,
        major: u32,
        minor: u32,
        readahead: u32,
        theirs: u64,
    ) -> io::Result<Body> {
        let needed = feature::MAX_PAGES | feature::SETXATTR_EXT | feature::INIT_EXT;
        let mut ours = needed
            | feature::ASYNC_READ
            | feature::BIG_WRITES
            | feature::ASYNC_DIO
            | feature::CACHE_SYMLINKS
            | feature::PARALLEL_DIROPS
            | feature::HANDLE_KILLPRIV_V2
            | feature::DO_READDIRPLUS
            | feature::READDIRPLUS_AUTO
            // The guest's umask comes with each request, because a default ACL of
            // the directory, which only we see in time, overrides it.
            | feature::DONT_MASK
            | feature::POSIX_ACL;
        ours |= match self.policy {
            Policy::Shared => {
                feature::ATOMIC_O_TRUNC
                    | feature::AUTO_INVAL_DATA
                    | feature::POSIX_LOCKS
                    | feature::FLOCK_LOCKS
            }
            Policy::Private => {
                // Not WRITEBACK_CACHE: with it Linux asks for the attributes of a file
                // after each time that it was closed, and sets the times of one
                // that is removed.
                feature::EXPLICIT_INVAL_DATA
                    | feature::NO_OPEN_SUPPORT
                    | feature::NO_OPENDIR_SUPPORT
            }
        };
        if major != abi::MAJOR || minor < abi::LEAST_MINOR || theirs & needed != needed {
            return Err(error(libc::EPROTO));
        }
        let agreed = ours & theirs;
        let pages = u16::try_from(MAX_DATA / 4096).unwrap_or(u16::MAX);
        let mut body = Body::default();
        body.u32(abi::MAJOR)
            .u32(abi::MINOR.min(minor))
            .u32(readahead)
            .u32(u32::try_from(agreed & u64::from(u32::MAX)).unwrap_or(0))
            .u16(BACKGROUND)
            .u16(BACKGROUND / 4 * 3)
            .u32(u32::try_from(MAX_DATA).unwrap_or(0))
            // Times are exact to the nanosecond.
            .u32(1)
            .u16(pages)
            .u16(0)
            .u32(u32::try_from(agreed >> 32).unwrap_or(0))
            .zeroes(28);
        self.initialized.store(true, Ordering::Release);
        Ok(body)
    }

    /// The driver is gone, and with it all that it held.
    pub(super) fn destroy(&self) {
        self.initialized.store(false, Ordering::Release);
        self.locks.clear();
        self.opened.clear();
        self.table.clear();
        if let Some(watch) = &self.watch {
            watch.clear();
        }
    }

    pub(super) fn writable(&self) -> io::Result<()> {
        if self.read_only {
            Err(error(libc::EROFS))
        } else {
            Ok(())
        }
    }

    /// The mount in which a node is.
    pub(super) fn mount_of(&self, number: u64) -> Option<u64> {
        Some(self.table.node(number).ok()?.identity.mount)
    }

    /// Whether what is inside this mount changes by the guest only.
    fn is_private(&self, mount: u64) -> bool {
        self.policy == Policy::Private && mount != self.root_mount
    }

    /// How long the guest may believe that a directory has no such name.
    pub(super) fn absent_valid(&self, parent: &Node) -> Option<Duration> {
        self.is_private(parent.identity.mount).then_some(FOREVER)
    }

    fn name_valid(&self, parent: &Node, mount: u64, kind: u32) -> Duration {
        // What is mounted on a name of the share's own mount can be another mount
        // in the next moment.
        if parent.identity.mount == self.root_mount {
            Duration::ZERO
        } else if self.is_private(mount) {
            FOREVER
        } else if kind == libc::S_IFDIR {
            DIRECTORY_TIMEOUT
        } else {
            Duration::ZERO
        }
    }

    /// How long attributes of a node are good for.
    pub(super) fn attr_valid(&self, mount: u64, kind: u32) -> Duration {
        if self.is_private(mount) {
            FOREVER
        } else if kind == libc::S_IFDIR {
            DIRECTORY_TIMEOUT
        } else {
            FILE_TIMEOUT
        }
    }

    /// The file of this name, as the guest will know it.
    pub(super) fn find(&self, number: u64, parent: &Arc<Node>, name: &CStr) -> io::Result<Entry> {
        let dir = parent.fd()?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd = sys::openat(&*dir, name, flags, Mode::empty())?;
        self.entry((number, parent), fd, Some(name))
    }

    /// What the guest will know of a file that was found in a directory.
    pub(super) fn entry(
        &self,
        parent: (u64, &Arc<Node>),
        fd: OwnedFd,
        name: Option<&CStr>,
    ) -> io::Result<Entry> {
        let status = statx(&fd)?;
        let attr = attributes(&status, device::read(&fd, &status));
        let mount = if status.stx_mnt_id == parent.1.identity.mount {
            Mount {
                salt: parent.1.salt,
                overlay: parent.1.birth == Birth::Sure,
            }
        } else {
            self.enter_mount(&fd, status.stx_mnt_id)?
        };
        self.known(parent, Some(fd), name, &status, attr, mount)
    }

    /// As [`entry`](Self::entry), without a descriptor, for a file of which the
    /// status is known; `None` if that does not do.
    pub(super) fn entry_by_status(
        &self,
        parent: (u64, &Arc<Node>),
        name: &CStr,
        status: &Statx,
    ) -> Option<io::Result<Entry>> {
        let node = parent.1;
        let mount = Mount {
            salt: node.salt,
            overlay: node.birth == Birth::Sure,
        };
        let unknown = !mount.overlay && Birth::of(status) == Birth::Unknown;
        if status.stx_mnt_id != node.identity.mount || device::may_be(status) || unknown {
            return None;
        }
        let attr = attributes(status, None);
        Some(self.known(parent, None, Some(name), status, attr, mount))
    }

    fn known(
        &self,
        parent: (u64, &Arc<Node>),
        fd: Option<OwnedFd>,
        name: Option<&CStr>,
        status: &Statx,
        mut attr: Attributes,
        mount: Mount,
    ) -> io::Result<Entry> {
        let about = About {
            identity: Identity::of(status),
            birth: if mount.overlay {
                Birth::Sure
            } else {
                Birth::of(status)
            },
            kind: attr.mode & libc::S_IFMT,
            salt: mount.salt,
        };
        attr.inode ^= about.salt;
        let node = self.table.residents.admit(fd, about);
        let (number, new) = self.table.look_up(node, parent, name)?;
        if let (Some(watch), Some(node), Some(name)) = (&self.watch, new, name) {
            watch.hold(number, &node, parent.1, name);
        }
        Ok(Entry {
            node: number,
            attr,
            name_valid: self.name_valid(parent.1, about.identity.mount, about.kind),
            attr_valid: self.attr_valid(about.identity.mount, about.kind),
        })
    }

    /// A mount that is not that of the directory in which it was found.
    fn enter_mount(&self, fd: &OwnedFd, id: u64) -> io::Result<Mount> {
        let magic = sys::fstatfs(fd)?.f_type;
        may_enter(magic)?;
        let mut mounts = self.mounts.lock().unwrap_or_else(PoisonError::into_inner);
        let next = u64::try_from(mounts.len()).unwrap_or(0);
        // Numbers of files have fewer bits than that, but for some of network file
        // systems.
        let salt = next.wrapping_shl(48);
        let mount = mounts.entry(id).or_insert_with(|| Mount {
            salt,
            overlay: false,
        });
        mount.overlay = magic == libc::OVERLAYFS_SUPER_MAGIC;
        Ok(*mount)
    }

    /// Something was done for the guest to a name in a directory: it is told to who has
    /// the directory by another mount.
    pub(super) fn did(&self, parent: u64, name: &CStr, mask: u32) {
        if let Some(watch) = &self.watch {
            watch.did(parent, || Deed::Changed((parent, name.into()), mask));
        }
    }

    /// As [`did`](Self::did), to a file or to what is in it.
    pub(super) fn did_to(&self, number: u64, mask: u32) {
        if self.watch.as_ref().is_some_and(Watch::has_others) {
            // It may be a volume by itself.
            self.did(number, c"", mask);
            if let Some((parent, name)) = self.table.place_of(number) {
                self.did(parent, &name, mask);
            }
        }
    }

    /// Opens a node's file. `flags` may have any bits.
    pub(super) fn reopen(&self, node: &Arc<Node>, flags: u32) -> io::Result<File> {
        if !matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
            return Err(error(libc::ENXIO));
        }
        let flags = OFlags::from_bits_retain(flags & OPEN_FLAGS);
        if flags.intersects(OFlags::ACCMODE | OFlags::TRUNC) {
            self.writable()?;
        }
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let fd = node.fd()?;
        let path = DecInt::from_fd(&*fd);
        Ok(sys::openat(&self.proc_self_fd, path, flags, Mode::empty())?.into())
    }

    /// What the guest is told of a node, by one of its descriptors.
    pub(super) fn attributes_of(&self, node: &Node, fd: &OwnedFd) -> io::Result<Attributes> {
        let status = statx(fd)?;
        let mut attr = attributes(&status, device::read(fd, &status));
        attr.inode ^= node.salt;
        Ok(attr)
    }
}

/// The attributes that belong to a status, or to the device that it stands for.
pub(super) fn attributes(status: &Statx, device: Option<device::Device>) -> Attributes {
    let attr = Attributes {
        status: *status,
        inode: status.stx_ino,
        mode: status.stx_mode.into(),
        uid: status.stx_uid,
        gid: status.stx_gid,
        device: (status.stx_rdev_major, status.stx_rdev_minor),
    };
    match device {
        Some(device) => Attributes {
            mode: device.mode,
            uid: device.uid,
            gid: device.gid,
            device: device.number,
            ..attr
        },
        None => attr,
    }
}
