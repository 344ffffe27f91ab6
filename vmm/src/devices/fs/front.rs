//! What a FUSE request must look like before the server may see it.
//!
//! The server behind decodes messages for a kernel that it trusts. Here the guest
//! is not trusted: a request whose lengths, names or reply buffer do not fit its
//! operation is answered with an error by the device and goes no further, and
//! operations that the share does not offer never arrive there.
//!
//! This is about form. The guest can change its memory after the check, so the
//! share checks each name again, in the copy that it works on.

/// Length of `struct fuse_in_header`.
pub(super) const IN_HEADER: usize = 40;
/// Length of `struct fuse_out_header`.
pub(super) const OUT_HEADER: usize = 16;

/// Most data in one READ or WRITE: 256 pages, as the reply to INIT says.
pub(super) const MAX_DATA: usize = 1 << 20;

/// Longest value of an extended attribute (Linux: XATTR_SIZE_MAX).
pub(super) const MAX_XATTR: usize = 64 * 1024;

/// Longest name that is looked at at all: the target of a symbolic link
/// (Linux: PATH_MAX), its end included.
const MAX_NAME: usize = 4096;

/// Requests whose number appears here. The numbers are those of
/// `include/uapi/linux/fuse.h`.
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
    pub(crate) const INIT: u32 = 26;
    pub(crate) const OPENDIR: u32 = 27;
    pub(crate) const READDIR: u32 = 28;
    pub(crate) const RELEASEDIR: u32 = 29;
    pub(crate) const FSYNCDIR: u32 = 30;
    pub(crate) const CREATE: u32 = 35;
    pub(crate) const INTERRUPT: u32 = 36;
    pub(crate) const DESTROY: u32 = 38;
    pub(crate) const BATCH_FORGET: u32 = 42;
    pub(crate) const FALLOCATE: u32 = 43;
    pub(crate) const RENAME2: u32 = 45;
    pub(crate) const LSEEK: u32 = 46;
}

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
    /// Bytes to be written.
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
fn form(opcode: u32) -> Option<Form> {
    use opcode::*;
    let (fixed, tail, reply) = match opcode {
        LOOKUP => (0, Tail::Name, 128),
        FORGET => (8, Tail::Nothing, 0),
        GETATTR => (16, Tail::Nothing, 104),
        SETATTR => (88, Tail::Nothing, 104),
        READLINK | DESTROY => (0, Tail::Nothing, 0),
        SYMLINK => (0, Tail::TwoNames, 128),
        MKNOD => (16, Tail::Name, 128),
        MKDIR | LINK => (8, Tail::Name, 128),
        UNLINK | RMDIR | REMOVEXATTR => (0, Tail::Name, 0),
        RENAME => (8, Tail::TwoNames, 0),
        RENAME2 => (16, Tail::TwoNames, 0),
        OPEN | OPENDIR => (8, Tail::Nothing, 16),
        READ | READDIR => (40, Tail::Nothing, 0),
        WRITE => (40, Tail::Data, 8),
        STATFS => (0, Tail::Nothing, 80),
        RELEASE | RELEASEDIR => (24, Tail::Nothing, 0),
        FSYNC | FSYNCDIR => (16, Tail::Nothing, 0),
        SETXATTR => (8, Tail::NameAndValue, 0),
        GETXATTR => (8, Tail::Name, 0),
        LISTXATTR => (8, Tail::Nothing, 0),
        INIT => (16, Tail::Extension, 64),
        CREATE => (16, Tail::Name, 144),
        INTERRUPT => (8, Tail::Nothing, 0),
        BATCH_FORGET => (8, Tail::Nodes, 0),
        FALLOCATE => (32, Tail::Nothing, 0),
        LSEEK => (24, Tail::Nothing, 8),
        _ => return None,
    };
    Some(Form { fixed, tail, reply })
}

/// Whether the driver expects a reply to a request.
pub(super) fn wants_reply(opcode: u32) -> bool {
    use opcode::*;
    !matches!(opcode, FORGET | BATCH_FORGET | INTERRUPT)
}

/// The parts of `struct fuse_in_header` that matter here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Header {
    /// Bytes in the request, the header included.
    pub(super) len: u32,
    pub(super) opcode: u32,
    /// By which the driver knows the reply.
    pub(super) unique: u64,
}

impl Header {
    /// From the first bytes of a request.
    pub(super) fn parse(bytes: &[u8; IN_HEADER]) -> Header {
        Header {
            len: word(bytes, 0),
            opcode: word(bytes, 4),
            unique: u64::from(word(bytes, 12)) << 32 | u64::from(word(bytes, 8)),
        }
    }
}

/// Bytes of the body that [`check`] needs to see: all of it where names are,
/// else only the fixed part.
pub(super) fn to_look_at(header: &Header) -> usize {
    let body = (header.len as usize).saturating_sub(IN_HEADER);
    match form(header.opcode).map(|form| form.tail) {
        Some(Tail::Name | Tail::TwoNames) => body.min(16 + 2 * MAX_NAME),
        Some(Tail::NameAndValue) => body.min(8 + MAX_NAME),
        Some(Tail::Data | Tail::Nodes) => body.min(40),
        _ => 0,
    }
}

/// Checks a request of `readable` bytes, of which `body` are the first after the
/// header, for which the driver left `writable` bytes.
///
/// The error is a number of errno.
pub(super) fn check(
    header: &Header,
    body: &[u8],
    readable: usize,
    writable: usize,
) -> Result<(), i32> {
    let form = form(header.opcode).ok_or(libc::ENOSYS)?;
    let len = header.len as usize;
    if len != readable {
        return Err(libc::EINVAL);
    }
    let tail_len = len
        .checked_sub(IN_HEADER)
        .and_then(|body| body.checked_sub(form.fixed))
        .ok_or(libc::EINVAL)?;
    if wants_reply(header.opcode) && writable < OUT_HEADER.saturating_add(form.reply) {
        return Err(libc::EINVAL);
    }
    let tail = body.get(form.fixed..).unwrap_or(&[]);
    let fits = match form.tail {
        Tail::Nothing => tail_len == 0,
        Tail::Name => tail.len() == tail_len && ends(tail) == [tail_len],
        Tail::TwoNames => {
            tail.len() == tail_len && matches!(ends(tail)[..], [_, second] if second == tail_len)
        }
        Tail::NameAndValue => {
            let name = ends(tail).first().copied();
            let size = word(body, 0) as usize;
            size <= MAX_XATTR && name.and_then(|name| tail_len.checked_sub(name)) == Some(size)
        }
        Tail::Data => {
            let size = word(body, 16) as usize;
            size <= MAX_DATA && tail_len == size
        }
        Tail::Nodes => {
            tail_len <= MAX_DATA && 16_u64.saturating_mul(word(body, 0).into()) == tail_len as u64
        }
        Tail::Extension => tail_len <= 48,
    };
    if fits { Ok(()) } else { Err(libc::EINVAL) }
}

/// Where each name ends: the lengths up to and with each zero byte.
fn ends(names: &[u8]) -> Vec<usize> {
    (1..)
        .zip(names)
        .filter(|&(_, &byte)| byte == 0)
        .map(|(end, _)| end)
        .take(3)
        .collect()
}

/// The little-endian word at an offset; 0 if it is not there.
fn word(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..)
        .and_then(|bytes| bytes.first_chunk())
        .map_or(0, |word| u32::from_le_bytes(*word))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, body: &[u8]) -> Result<(), i32> {
        let len = IN_HEADER + body.len();
        let header = Header {
            len: u32::try_from(len).unwrap(),
            opcode,
            unique: 1,
        };
        let seen = &body[..body.len().min(to_look_at(&header))];
        check(&header, seen, len, 4096)
    }

    fn with(fixed: usize, tail: &[u8]) -> Vec<u8> {
        let mut body = vec![0; fixed];
        body.extend(tail);
        body
    }

    #[test]
    fn names_end_once_and_at_the_end_b59() {
        for (opcode, fixed) in [
            (opcode::LOOKUP, 0),
            (opcode::MKNOD, 16),
            (opcode::MKDIR, 8),
            (opcode::LINK, 8),
            (opcode::UNLINK, 0),
            (opcode::RMDIR, 0),
            (opcode::CREATE, 16),
            (opcode::GETXATTR, 8),
            (opcode::REMOVEXATTR, 0),
        ] {
            for (tail, fits) in [
                (&b"name\0"[..], true),
                (b"\0", true),
                (b"name", false),
                (b"", false),
                (b"na\0me\0", false),
                (b"name\0\0", false),
            ] {
                let outcome = request(opcode, &with(fixed, tail));
                assert_eq!(outcome.is_ok(), fits, "{opcode} {tail:?}");
            }
        }
        for (opcode, fixed) in [
            (opcode::SYMLINK, 0),
            (opcode::RENAME, 8),
            (opcode::RENAME2, 16),
        ] {
            for (tail, fits) in [
                (&b"a\0b\0"[..], true),
                (b"\0\0", true),
                (b"a\0", false),
                (b"a\0b", false),
                (b"a\0b\0c\0", false),
            ] {
                let outcome = request(opcode, &with(fixed, tail));
                assert_eq!(outcome.is_ok(), fits, "{opcode} {tail:?}");
            }
        }
        let long = vec![b'x'; 100_000];
        assert_eq!(request(opcode::LOOKUP, &long), Err(libc::EINVAL));
    }

    #[test]
    fn lengths_that_do_not_fit_the_operation_are_refused_b61() {
        for opcode in 0..200 {
            let Some(form) = form(opcode) else {
                assert_eq!(request(opcode, &[0; 64]), Err(libc::ENOSYS), "{opcode}");
                continue;
            };
            if form.fixed > 0 {
                let short = vec![0; form.fixed - 1];
                assert_eq!(request(opcode, &short), Err(libc::EINVAL), "{opcode}");
            }
            let header = Header {
                len: 4000,
                opcode,
                unique: 0,
            };
            assert_eq!(check(&header, &[], 3999, 4096), Err(libc::EINVAL));
            assert_eq!(check(&header, &[], 4001, 4096), Err(libc::EINVAL));
        }
        for opcode in [65_535, u32::MAX, 436_207_616] {
            assert_eq!(request(opcode, &[]), Err(libc::ENOSYS));
        }
    }

    #[test]
    fn counts_within_a_request_must_be_true_b60_b62() {
        let count = |count: u32, fixed: usize, at: usize, tail: usize| {
            let mut body = with(fixed, &vec![0; tail]);
            body[at..at + 4].copy_from_slice(&count.to_le_bytes());
            body
        };
        for (opcode, body, fits) in [
            (opcode::BATCH_FORGET, count(2, 8, 0, 32), true),
            (opcode::BATCH_FORGET, count(3, 8, 0, 32), false),
            (opcode::BATCH_FORGET, count(u32::MAX, 8, 0, 32), false),
            (opcode::WRITE, count(5, 40, 16, 5), true),
            (opcode::WRITE, count(6, 40, 16, 5), false),
            (opcode::WRITE, count(u32::MAX, 40, 16, 5), false),
            (opcode::SETXATTR, count(1, 8, 0, 2), true),
            (opcode::SETXATTR, count(2, 8, 0, 2), false),
            (opcode::SETXATTR, count(u32::MAX, 8, 0, 2), false),
        ] {
            assert_eq!(request(opcode, &body).is_ok(), fits, "{opcode}");
        }
    }

    #[test]
    fn a_reply_buffer_one_byte_too_small_is_refused_before_anything_happens_b62() {
        for opcode in 0..64 {
            let Some(form) = form(opcode) else { continue };
            if !wants_reply(opcode) {
                continue;
            }
            let body = match form.tail {
                Tail::Name => with(form.fixed, b"a\0"),
                Tail::TwoNames => with(form.fixed, b"a\0b\0"),
                Tail::NameAndValue => with(form.fixed, b"a\0"),
                _ => with(form.fixed, b""),
            };
            let len = IN_HEADER + body.len();
            let header = Header {
                len: u32::try_from(len).unwrap(),
                opcode,
                unique: 0,
            };
            let needed = OUT_HEADER + form.reply;
            assert_eq!(check(&header, &body, len, needed), Ok(()), "{opcode}");
            assert_eq!(check(&header, &body, len, needed - 1), Err(libc::EINVAL));
        }
    }
}
