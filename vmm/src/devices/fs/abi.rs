//! The messages of FUSE 7.31 to 7.41, as `include/uapi/linux/fuse.h` defines them.
//!
//! Numbers, flags and layouts only: what a message may be stands in `request.rs`,
//! what is done with it in the files of operations. Everything is little-endian,
//! as the machines of both sides are.

use std::time::Duration;

use rustix::fs::{Statx, StatxTimestamp};

/// Length of `struct fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// Length of `struct fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;
/// Length of `struct fuse_entry_out`.
pub(super) const ENTRY_OUT: usize = 128;
/// Length of `struct fuse_attr_out`.
pub(super) const ATTR_OUT: usize = 104;
/// Length of `struct fuse_open_out`.
pub(super) const OPEN_OUT: usize = 16;
/// Length of `struct fuse_statx_out`.
pub(super) const STATX_OUT: usize = 288;
/// Length of `struct fuse_init_out`.
pub(super) const INIT_OUT: usize = 64;
/// Length of `struct fuse_dirent` before the name.
pub(super) const DIRENT: usize = 24;

/// The version of the protocol that is spoken here. A client of an older minor
/// version than the least is refused: replies had other lengths.
pub(super) const MAJOR: u32 = 7;
pub(super) const MINOR: u32 = 41;
pub(super) const LEAST_MINOR: u32 = 31;

/// Kinds of requests.
pub(super) mod opcode {
    pub(crate) const LOOKUP: u32 = 1;
    pub(crate) const FORGET: u32 = 2;
    pub(crate) const GETATTR: u32 = 3;
    pub(crate) const SETATTR: u32 = 4;
    pub(crate) const READLINK: u32 = 5;
    pub(crate) const SYMLINK: u32 = 6;
    pub(crate) const MKNOD: u32 = 8;
    pub(crate) const MKDIR: u32 = 9;
    pub(crate) const UNLINK: u32 = 10;
    pub(crate) const RMDIR: u32 = 11;
    pub(crate) const RENAME: u32 = 12;
    pub(crate) const LINK: u32 = 13;
    pub(crate) const OPEN: u32 = 14;
    pub(crate) const READ: u32 = 15;
    pub(crate) const WRITE: u32 = 16;
    pub(crate) const STATFS: u32 = 17;
    pub(crate) const RELEASE: u32 = 18;
    pub(crate) const FSYNC: u32 = 20;
    pub(crate) const SETXATTR: u32 = 21;
    pub(crate) const GETXATTR: u32 = 22;
    pub(crate) const LISTXATTR: u32 = 23;
    pub(crate) const REMOVEXATTR: u32 = 24;
    pub(crate) const FLUSH: u32 = 25;
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const GETLK: u32 = 31;
    pub(crate) const SETLK: u32 = 32;
    pub(crate) const SETLKW: u32 = 33;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const READDIRPLUS: u32 = 44;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
    pub(crate) const COPY_FILE_RANGE: u32 = 47;
    pub(crate) const SYNCFS: u32 = 50;
    pub(crate) const TMPFILE: u32 = 51;
    pub(crate) const STATX: u32 = 52;
}

/// What both sides of a connection can do. The upper half travels apart.
pub(super) mod feature {
    pub(crate) const ASYNC_READ: u64 = 1;
    pub(crate) const POSIX_LOCKS: u64 = 1 << 1;
    pub(crate) const ATOMIC_O_TRUNC: u64 = 1 << 3;
    pub(crate) const BIG_WRITES: u64 = 1 << 5;
    pub(crate) const DONT_MASK: u64 = 1 << 6;
    pub(crate) const FLOCK_LOCKS: u64 = 1 << 10;
    pub(crate) const AUTO_INVAL_DATA: u64 = 1 << 12;
    pub(crate) const DO_READDIRPLUS: u64 = 1 << 13;
    pub(crate) const READDIRPLUS_AUTO: u64 = 1 << 14;
    pub(crate) const ASYNC_DIO: u64 = 1 << 15;
    pub(crate) const NO_OPEN_SUPPORT: u64 = 1 << 17;
    pub(crate) const PARALLEL_DIROPS: u64 = 1 << 18;
    pub(crate) const POSIX_ACL: u64 = 1 << 20;
    pub(crate) const MAX_PAGES: u64 = 1 << 22;
    pub(crate) const CACHE_SYMLINKS: u64 = 1 << 23;
    pub(crate) const NO_OPENDIR_SUPPORT: u64 = 1 << 24;
    pub(crate) const EXPLICIT_INVAL_DATA: u64 = 1 << 25;
    pub(crate) const HANDLE_KILLPRIV_V2: u64 = 1 << 28;
    pub(crate) const SETXATTR_EXT: u64 = 1 << 29;
    pub(crate) const INIT_EXT: u64 = 1 << 30;
}

/// Which attributes SETATTR sets.
pub(super) mod set {
    pub(crate) const MODE: u32 = 1;
    pub(crate) const UID: u32 = 1 << 1;
    pub(crate) const GID: u32 = 1 << 2;
    pub(crate) const SIZE: u32 = 1 << 3;
    pub(crate) const ATIME: u32 = 1 << 4;
    pub(crate) const MTIME: u32 = 1 << 5;
    pub(crate) const FH: u32 = 1 << 6;
    pub(crate) const ATIME_NOW: u32 = 1 << 7;
    pub(crate) const MTIME_NOW: u32 = 1 << 8;
    pub(crate) const KILL_SUIDGID: u32 = 1 << 11;
}

/// In the reply to OPEN: cached content stays.
#[cfg(test)]
pub(super) const FOPEN_KEEP_CACHE: u32 = 1 << 1;
/// In OPEN and CREATE: set-id bits go if the file is truncated.
pub(super) const OPEN_KILL_SUIDGID: u32 = 1;
/// In WRITE: set-id bits go.
pub(super) const WRITE_KILL_SUIDGID: u32 = 1 << 2;
/// In RELEASE: the BSD lock goes.
pub(super) const GETATTR_FH: u32 = 1;
/// In FSYNC: content only.
pub(super) const FSYNC_FDATASYNC: u32 = 1;
/// In GETLK, SETLK, SETLKW: it is a BSD lock.
pub(super) const LK_FLOCK: u32 = 1;
/// In SETXATTR: the set-group-id bit goes with a new access control list.
pub(super) const SETXATTR_ACL_KILL_SGID: u32 = 1;

/// A reply's body in the making.
#[derive(Debug, Default)]
pub(super) struct Body(pub(super) Vec<u8>);

impl Body {
    pub(super) fn u16(&mut self, value: u16) -> &mut Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u32(&mut self, value: u32) -> &mut Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn u64(&mut self, value: u64) -> &mut Body {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub(super) fn zeroes(&mut self, count: usize) -> &mut Body {
        self.0.resize(self.0.len().saturating_add(count), 0);
        self
    }

    /// `struct fuse_attr`.
    fn attr(&mut self, attr: &Attributes) -> &mut Body {
        let status = &attr.status;
        self.u64(attr.inode)
            .u64(status.stx_size)
            .u64(status.stx_blocks);
        let times = [status.stx_atime, status.stx_mtime, status.stx_ctime];
        for time in &times {
            self.u64(time.tv_sec.cast_unsigned());
        }
        for time in &times {
            self.u32(time.tv_nsec);
        }
        self.u32(attr.mode)
            .u32(status.stx_nlink)
            .u32(attr.uid)
            .u32(attr.gid)
            .u32(device(attr.device))
            .u32(status.stx_blksize)
            .u32(0)
    }

    /// `struct fuse_attr_out`.
    pub(super) fn attr_out(&mut self, attr: &Attributes, valid: Duration) -> &mut Body {
        self.u64(valid.as_secs())
            .u32(valid.subsec_nanos())
            .u32(0)
            .attr(attr)
    }

    /// `struct fuse_entry_out`.
    pub(super) fn entry(&mut self, entry: &Entry) -> &mut Body {
        self.u64(entry.node)
            .u64(0)
            .u64(entry.name_valid.as_secs())
            .u64(entry.attr_valid.as_secs())
            .u32(entry.name_valid.subsec_nanos())
            .u32(entry.attr_valid.subsec_nanos())
            .attr(&entry.attr)
    }

    /// The entry that says that there is no such name, and for how long.
    pub(super) fn no_entry(&mut self, valid: Duration) -> &mut Body {
        self.u64(0)
            .u64(0)
            .u64(valid.as_secs())
            .u64(0)
            .u32(valid.subsec_nanos())
            .zeroes(ENTRY_OUT - 36)
    }

    /// `struct fuse_open_out`.
    pub(super) fn open(&mut self, handle: u64, flags: u32) -> &mut Body {
        self.u64(handle).u32(flags).u32(0)
    }

    /// `struct fuse_statx_out`.
    pub(super) fn statx(&mut self, attr: &Attributes, valid: Duration) -> &mut Body {
        let status = &attr.status;
        self.u64(valid.as_secs())
            .u32(valid.subsec_nanos())
            .u32(0)
            .zeroes(16)
            .u32(status.stx_mask)
            .u32(status.stx_blksize)
            .u64(0)
            .u32(status.stx_nlink)
            .u32(attr.uid)
            .u32(attr.gid)
            .u16(u16::try_from(attr.mode).unwrap_or(0))
            .u16(0)
            .u64(attr.inode)
            .u64(status.stx_size)
            .u64(status.stx_blocks)
            .u64(0);
        for time in [
            status.stx_atime,
            status.stx_btime,
            status.stx_ctime,
            status.stx_mtime,
        ] {
            let StatxTimestamp {
                tv_sec, tv_nsec, ..
            } = time;
            self.u64(tv_sec.cast_unsigned()).u32(tv_nsec).u32(0);
        }
        self.u32(attr.device.0)
            .u32(attr.device.1)
            .u32(0)
            .u32(0)
            .zeroes(112)
    }

    /// `struct fuse_dirent` with its name and padding.
    pub(super) fn dirent(&mut self, entry: &Dirent<'_>) -> &mut Body {
        self.u64(entry.inode)
            .u64(entry.next)
            .u32(u32::try_from(entry.name.len()).unwrap_or(0))
            .u32(entry.kind);
        self.0.extend(entry.name);
        let padding = self.0.len().wrapping_neg() % 8;
        self.zeroes(padding)
    }
}

/// Major and minor number in one word, as the kernel packs them for its clients.
fn device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & !0xff) << 12
}

/// The major and minor number in such a word.
pub(super) fn unpack_device(word: u32) -> (u32, u32) {
    (word >> 8 & 0xfff, word & 0xff | word >> 12 & !0xff)
}

/// What the guest is told of a file.
#[derive(Clone, Copy, Debug)]
pub(super) struct Attributes {
    /// What the host says.
    pub(super) status: Statx,
    /// The number by which the guest's programs tell files apart.
    pub(super) inode: u64,
    /// Type and permissions.
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Major and minor number of a device.
    pub(super) device: (u32, u32),
}

/// A name that was found.
#[derive(Clone, Copy, Debug)]
pub(super) struct Entry {
    pub(super) node: u64,
    pub(super) attr: Attributes,
    /// How long the guest may take the name for this file.
    pub(super) name_valid: Duration,
    /// How long it may believe the attributes.
    pub(super) attr_valid: Duration,
}

/// An entry of a directory that is read.
#[derive(Clone, Copy, Debug)]
pub(super) struct Dirent<'a> {
    pub(super) inode: u64,
    /// Where the next one is.
    pub(super) next: u64,
    /// `DT_…`.
    pub(super) kind: u32,
    pub(super) name: &'a [u8],
}

impl Dirent<'_> {
    /// Bytes that it takes in a reply to READDIR.
    pub(super) fn len(&self) -> usize {
        DIRENT
            .saturating_add(self.name.len())
            .checked_next_multiple_of(8)
            .unwrap_or(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_survive_the_word_that_carries_them() {
        for number in [(1, 3), (8, 300), (259, 0xf_ffff), (4095, 255), (0, 0)] {
            assert_eq!(unpack_device(device(number)), number);
        }
        assert_eq!(device((1, 3)), 0x103);
    }
}
