//! A request, from bytes that the guest wrote to what it asks for.
//!
//! The header is copied once, then as much of the body as the operation needs
//! besides data, and everything is checked and taken out of that copy: the guest
//! can change its memory at any time. Lengths are checked here and nowhere else:
//! a request whose lengths, names or room for a reply do not fit its operation is
//! not decoded.

use std::ffi::CStr;

use super::abi::{
    ATTR_OUT, ENTRY_OUT, IN_HEADER, INIT_OUT, OPEN_OUT, OUT_HEADER, STATX_OUT, opcode,
};

/// Most data in one READ or WRITE: 256 pages, as the reply to INIT says.
pub(super) const MAX_DATA: usize = 1 << 20;

/// Longest value of an extended attribute (Linux: XATTR_SIZE_MAX).
pub(super) const MAX_XATTR: usize = 64 * 1024;

/// Longest name that is looked at at all: the target of a symbolic link
/// (Linux: PATH_MAX), its end included.
const MAX_NAME: usize = 4096;

/// What follows the fixed part of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tail {
    Nothing,
    /// One name with its end.
    Name,
    /// Two names, each with its end.
    TwoNames,
    /// A name with its end, then bytes.
    NameAndValue,
    /// Bytes to be written, which stay where they are.
    Data,
    /// Nodes to be forgotten, 16 bytes each.
    Nodes,
    /// What newer kernels add to INIT.
    Extension,
}

/// The form of one kind of request.
#[derive(Clone, Copy, Debug)]
struct Form {
    /// Bytes between the header and the tail.
    fixed: usize,
    tail: Tail,
    /// Bytes of a successful reply after its header, at least.
    reply: usize,
}

/// The form of a request; `None` if the share does not offer it.
fn form(operation: u32) -> Option<Form> {
    use opcode::*;
    let (fixed, tail, reply) = match operation {
        LOOKUP => (0, Tail::Name, ENTRY_OUT),
        FORGET | INTERRUPT => (8, Tail::Nothing, 0),
        GETATTR => (16, Tail::Nothing, ATTR_OUT),
        SETATTR => (88, Tail::Nothing, ATTR_OUT),
        READLINK | DESTROY => (0, Tail::Nothing, 0),
        SYMLINK => (0, Tail::TwoNames, ENTRY_OUT),
        MKNOD => (16, Tail::Name, ENTRY_OUT),
        MKDIR | LINK => (8, Tail::Name, ENTRY_OUT),
        UNLINK | RMDIR | REMOVEXATTR => (0, Tail::Name, 0),
        RENAME => (8, Tail::TwoNames, 0),
        RENAME2 => (16, Tail::TwoNames, 0),
        OPEN | OPENDIR => (8, Tail::Nothing, OPEN_OUT),
        READ | READDIR | READDIRPLUS => (40, Tail::Nothing, 0),
        WRITE => (40, Tail::Data, 8),
        STATFS => (0, Tail::Nothing, 80),
        RELEASE | RELEASEDIR | FLUSH => (24, Tail::Nothing, 0),
        FSYNC | FSYNCDIR => (16, Tail::Nothing, 0),
        SETXATTR => (16, Tail::NameAndValue, 0),
        GETXATTR => (8, Tail::Name, 0),
        LISTXATTR => (8, Tail::Nothing, 0),
        INIT => (16, Tail::Extension, INIT_OUT),
        GETLK => (48, Tail::Nothing, 24),
        SETLK | SETLKW => (48, Tail::Nothing, 0),
        CREATE | TMPFILE => (16, Tail::Name, ENTRY_OUT + OPEN_OUT),
        BATCH_FORGET => (8, Tail::Nodes, 0),
        FALLOCATE => (32, Tail::Nothing, 0),
        LSEEK => (24, Tail::Nothing, 8),
        COPY_FILE_RANGE => (56, Tail::Nothing, 8),
        SYNCFS => (8, Tail::Nothing, 0),
        STATX => (24, Tail::Nothing, STATX_OUT),
        _ => return None,
    };
    Some(Form { fixed, tail, reply })
}

/// Whether the driver expects a reply to a request.
pub(super) fn wants_reply(operation: u32) -> bool {
    use opcode::*;
    !matches!(operation, FORGET | BATCH_FORGET | INTERRUPT)
}

/// `struct fuse_in_header`, but for what is of no use here.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes in the request, the header included.
    pub(super) len: u32,
    pub(super) opcode: u32,
    /// By which the driver knows the reply.
    pub(super) unique: u64,
    pub(super) node: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    /// Length of extensions, of which none was agreed on.
    extensions: u16,
}

impl Header {
    /// From the first bytes of a request.
    pub(super) fn parse(bytes: &[u8; IN_HEADER]) -> Header {
        Header {
            len: u32_at(bytes, 0),
            opcode: u32_at(bytes, 4),
            unique: u64_at(bytes, 8),
            node: u64_at(bytes, 16),
            uid: u32_at(bytes, 24),
            gid: u32_at(bytes, 28),
            extensions: u16::try_from(u32_at(bytes, 36) & 0xffff).unwrap_or(0),
        }
    }

    /// How many bytes after the header [`Request::decode`] is to get, for a
    /// request of `readable` bytes to which the reply may have `writable`. All
    /// but data; the error is a number of errno.
    pub(super) fn body(&self, readable: usize, writable: usize) -> Result<usize, i32> {
        let form = form(self.opcode).ok_or(libc::ENOSYS)?;
        let tail = readable
            .checked_sub(IN_HEADER)
            .and_then(|body| body.checked_sub(form.fixed))
            .filter(|_| self.len as usize == readable && self.extensions == 0)
            .ok_or(libc::EINVAL)?;
        if wants_reply(self.opcode) && writable < OUT_HEADER.saturating_add(form.reply) {
            return Err(libc::EINVAL);
        }
        let most = match form.tail {
            Tail::Nothing => 0,
            Tail::Name => MAX_NAME,
            Tail::TwoNames => 2 * MAX_NAME,
            Tail::NameAndValue => MAX_NAME + MAX_XATTR,
            Tail::Data | Tail::Nodes => MAX_DATA,
            Tail::Extension => 48,
        };
        if tail > most {
            return Err(libc::EINVAL);
        }
        match form.tail {
            Tail::Data => Ok(form.fixed),
            _ => Ok(form.fixed.saturating_add(tail)),
        }
    }
}

/// A byte-range or BSD lock, as asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Lock {
    pub(super) handle: u64,
    pub(super) owner: u64,
    pub(super) start: u64,
    /// The last byte, which is in the range.
    pub(super) end: u64,
    /// `F_RDLCK`, `F_WRLCK` or `F_UNLCK`.
    pub(super) kind: i32,
    /// It is about the whole file (flock(2)).
    pub(super) whole: bool,
}

/// What SETATTR is to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Change {
    /// Of the numbers in [`set`](super::abi::set).
    pub(super) what: u32,
    pub(super) handle: u64,
    pub(super) size: u64,
    pub(super) atime: (i64, u32),
    pub(super) mtime: (i64, u32),
    pub(super) mode: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
}

/// A piece of a file or directory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) size: u32,
}

/// How a file is to be created.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Create {
    pub(super) flags: u32,
    pub(super) mode: u32,
    pub(super) umask: u32,
    pub(super) open_flags: u32,
}

/// COPY_FILE_RANGE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Copy {
    pub(super) handle: u64,
    pub(super) offset: u64,
    pub(super) to_node: u64,
    pub(super) to_handle: u64,
    pub(super) to_offset: u64,
    pub(super) len: u64,
    pub(super) flags: u64,
}

/// What a request asks for. The node that it is about is in the header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are those of the protocol")]
pub(super) enum Request<'a> {
    Init {
        major: u32,
        minor: u32,
        readahead: u32,
        features: u64,
    },
    Destroy,
    Lookup(&'a CStr),
    Forget(u64),
    /// Pairs of node and count, 16 bytes each.
    BatchForget(&'a [u8]),
    Interrupt(u64),
    Getattr(Option<u64>),
    Statx(Option<u64>),
    Setattr(Change),
    Readlink,
    Symlink {
        name: &'a CStr,
        target: &'a CStr,
    },
    Mknod {
        name: &'a CStr,
        mode: u32,
        device: u32,
        umask: u32,
    },
    Mkdir {
        name: &'a CStr,
        mode: u32,
        umask: u32,
    },
    Unlink(&'a CStr),
    Rmdir(&'a CStr),
    Rename {
        name: &'a CStr,
        to: u64,
        to_name: &'a CStr,
        flags: u32,
    },
    Link {
        node: u64,
        name: &'a CStr,
    },
    Open {
        flags: u32,
        open_flags: u32,
    },
    Opendir,
    Create(Create, &'a CStr),
    Tmpfile(Create),
    Read(Piece),
    Write {
        piece: Piece,
        write_flags: u32,
        flags: u32,
    },
    Flush {
        handle: u64,
        owner: u64,
    },
    Release(u64),
    Releasedir(u64),
    Fsync {
        handle: u64,
        data_only: bool,
    },
    Fsyncdir {
        handle: u64,
        data_only: bool,
    },
    Readdir {
        piece: Piece,
        plus: bool,
    },
    Statfs,
    Syncfs,
    Setxattr {
        name: &'a CStr,
        value: &'a [u8],
        flags: u32,
        kill_sgid: bool,
    },
    Getxattr {
        name: &'a CStr,
        size: u32,
    },
    Listxattr(u32),
    Removexattr(&'a CStr),
    Fallocate {
        handle: u64,
        offset: u64,
        length: u64,
        mode: u32,
    },
    Lseek {
        handle: u64,
        offset: u64,
        whence: u32,
    },
    CopyFileRange(Copy),
    Getlk(Lock),
    Setlk {
        lock: Lock,
        wait: bool,
    },
}

impl<'a> Request<'a> {
    /// Decodes a request out of as many bytes after its header as
    /// [`Header::body`] said. `data` is how many bytes follow them.
    pub(super) fn decode(header: &Header, body: &'a [u8], data: usize) -> Result<Self, i32> {
        Request::read(header.opcode, body, data).ok_or(libc::EINVAL)
    }

    fn read(operation: u32, body: &'a [u8], data: usize) -> Option<Self> {
        use opcode::*;
        let form = form(operation)?;
        let (fixed, tail) = body.split_at_checked(form.fixed)?;
        let word = |at| u32_at(fixed, at);
        let long = |at| u64_at(fixed, at);
        let with_handle = |flags: u32, at| (flags & super::abi::GETATTR_FH != 0).then(|| long(at));
        let piece = Piece {
            handle: long(0),
            offset: long(8),
            size: word(16),
        };
        let create = Create {
            flags: word(0),
            mode: word(4),
            umask: word(8),
            open_flags: word(12),
        };
        let lock = Lock {
            handle: long(0),
            owner: long(8),
            start: long(16),
            end: long(24),
            kind: i32::try_from(word(32)).unwrap_or(-1),
            whole: word(40) & super::abi::LK_FLOCK != 0,
        };
        Some(match operation {
            LOOKUP => Request::Lookup(name(tail)?),
            FORGET => Request::Forget(long(0)),
            GETATTR => Request::Getattr(with_handle(word(0), 8)),
            STATX => Request::Statx(with_handle(word(0), 8)),
            SETATTR => Request::Setattr(Change {
                what: word(0),
                handle: long(8),
                size: long(16),
                atime: (long(32).cast_signed(), word(56)),
                mtime: (long(40).cast_signed(), word(60)),
                mode: word(68),
                uid: word(76),
                gid: word(80),
            }),
            READLINK => Request::Readlink,
            SYMLINK => {
                let (name, target) = names(tail)?;
                Request::Symlink { name, target }
            }
            MKNOD => Request::Mknod {
                name: name(tail)?,
                mode: word(0),
                device: word(4),
                umask: word(8),
            },
            MKDIR => Request::Mkdir {
                name: name(tail)?,
                mode: word(0),
                umask: word(4),
            },
            UNLINK => Request::Unlink(name(tail)?),
            RMDIR => Request::Rmdir(name(tail)?),
            RENAME | RENAME2 => {
                let (name, to_name) = names(tail)?;
                Request::Rename {
                    name,
                    to: long(0),
                    to_name,
                    // Not there in RENAME.
                    flags: word(8),
                }
            }
            LINK => Request::Link {
                node: long(0),
                name: name(tail)?,
            },
            OPEN => Request::Open {
                flags: word(0),
                open_flags: word(4),
            },
            OPENDIR => Request::Opendir,
            CREATE => Request::Create(create, name(tail)?),
            TMPFILE => {
                // The name says nothing.
                name(tail)?;
                Request::Tmpfile(create)
            }
            READ => Request::Read(piece),
            WRITE => {
                if piece.size as usize != data {
                    return None;
                }
                Request::Write {
                    piece,
                    write_flags: word(20),
                    flags: word(32),
                }
            }
            FLUSH => Request::Flush {
                handle: long(0),
                owner: long(16),
            },
            RELEASE => Request::Release(long(0)),
            RELEASEDIR => Request::Releasedir(long(0)),
            FSYNC | FSYNCDIR => {
                let (handle, data_only) = (long(0), word(8) & super::abi::FSYNC_FDATASYNC != 0);
                match operation {
                    FSYNC => Request::Fsync { handle, data_only },
                    _ => Request::Fsyncdir { handle, data_only },
                }
            }
            READDIR | READDIRPLUS => Request::Readdir {
                piece,
                plus: operation == READDIRPLUS,
            },
            STATFS => Request::Statfs,
            SYNCFS => Request::Syncfs,
            SETXATTR => {
                let end = ends(tail).next()?;
                let (name, value) = tail.split_at_checked(end)?;
                if value.len() != word(0) as usize || value.len() > MAX_XATTR {
                    return None;
                }
                Request::Setxattr {
                    name: CStr::from_bytes_with_nul(name).ok()?,
                    value,
                    flags: word(4),
                    kill_sgid: word(8) & super::abi::SETXATTR_ACL_KILL_SGID != 0,
                }
            }
            GETXATTR => Request::Getxattr {
                name: name(tail)?,
                size: word(0),
            },
            LISTXATTR => Request::Listxattr(word(0)),
            REMOVEXATTR => Request::Removexattr(name(tail)?),
            INIT => {
                let features = u64::from(word(12));
                let more = match features & super::abi::feature::INIT_EXT {
                    0 => 0,
                    _ => u32_at(tail, 0),
                };
                Request::Init {
                    major: word(0),
                    minor: word(4),
                    readahead: word(8),
                    features: features | u64::from(more) << 32,
                }
            }
            GETLK => Request::Getlk(lock),
            SETLK | SETLKW => Request::Setlk {
                lock,
                wait: operation == SETLKW,
            },
            INTERRUPT => Request::Interrupt(long(0)),
            DESTROY => Request::Destroy,
            BATCH_FORGET => {
                if 16_u64.checked_mul(word(0).into())? != tail.len() as u64 {
                    return None;
                }
                Request::BatchForget(tail)
            }
            FALLOCATE => Request::Fallocate {
                handle: long(0),
                offset: long(8),
                length: long(16),
                mode: word(24),
            },
            LSEEK => Request::Lseek {
                handle: long(0),
                offset: long(8),
                whence: word(16),
            },
            COPY_FILE_RANGE => Request::CopyFileRange(Copy {
                handle: long(0),
                offset: long(8),
                to_node: long(16),
                to_handle: long(24),
                to_offset: long(32),
                len: long(40),
                flags: long(48),
            }),
            _ => return None,
        })
    }
}

/// Pairs of node and count in a BATCH_FORGET.
pub(super) fn forgotten(pairs: &[u8]) -> impl Iterator<Item = (u64, u64)> {
    pairs
        .as_chunks::<16>()
        .0
        .iter()
        .map(|pair| (u64_at(pair, 0), u64_at(pair, 8)))
}

/// The only name in these bytes, which ends with them.
fn name(tail: &[u8]) -> Option<&CStr> {
    CStr::from_bytes_with_nul(tail).ok()
}

/// The two names in these bytes; the second one ends with them.
fn names(tail: &[u8]) -> Option<(&CStr, &CStr)> {
    let (first, second) = tail.split_at_checked(ends(tail).next()?)?;
    Some((name(first)?, name(second)?))
}

/// Where each name ends: the lengths up to and with each zero byte.
fn ends(names: &[u8]) -> impl Iterator<Item = usize> {
    (1..)
        .zip(names)
        .filter(|&(_, &byte)| byte == 0)
        .map(|(end, _)| end)
}

/// The word at an offset; 0 if it is not there.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |word| u32::from_le_bytes(*word))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |word| u64::from_le_bytes(*word))
}

#[cfg(test)]
mod tests;
