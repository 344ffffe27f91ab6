//! From a request's decoded form to the operation, and from its outcome to the
//! reply.

use std::io;

use rustix::fs::AtFlags;

use super::{
    abi::{Body, IN_HEADER, OUT_HEADER, opcode},
    content::Locked,
    locks::AsFdSend,
    request::{self, Header, Lock, Request},
    share::{Caller, Shared},
};
use crate::devices::queue::{Chain, Writer};

/// What became of a request.
pub(super) enum Answer {
    /// So many bytes were written.
    Written(usize),
    /// It waits for a lock.
    Waits(Lock, std::sync::Arc<dyn AsFdSend>),
}

/// A request of which the header is known.
pub(super) struct Message<'c> {
    chain: &'c Chain,
    header: Header,
}

impl<'c> Message<'c> {
    /// Copies the header out of a chain; `None` if there is none.
    pub(super) fn header(chain: &Chain) -> Option<Header> {
        let header = chain.reader().read_array::<IN_HEADER>().ok()?;
        Some(Header::parse(&header))
    }

    /// A request with this header.
    pub(super) fn new(chain: &'c Chain, header: Header) -> Message<'c> {
        Message { chain, header }
    }

    /// Does what is asked. `urgent` says that it came by the queue of what must
    /// not wait.
    pub(super) fn answer(&self, shared: &Shared, urgent: bool) -> Answer {
        let outcome = self.serve(shared, urgent);
        let header = &self.header;
        let outcome = match outcome {
            Ok(Outcome::Waits(lock, file)) => return Answer::Waits(lock, file),
            Ok(Outcome::Reply(body)) => self.reply(&body),
            Ok(Outcome::Data(count)) => self.head(0, count).map(|()| count),
            Err(error) => Err(error.raw_os_error().unwrap_or(libc::EIO)),
        };
        Answer::Written(match outcome {
            _ if !request::wants_reply(header.opcode) => 0,
            Ok(body) => OUT_HEADER.saturating_add(body),
            Err(errno) => refuse(self.chain, header.unique, errno),
        })
    }

    fn reply(&self, body: &Body) -> Result<usize, i32> {
        let mut room = self.chain.writer();
        let mut head = room.split(OUT_HEADER);
        // The room was measured before anything was done; where it varies, the
        // operation knew it.
        room.write_all(&body.0).map_err(|_| libc::ERANGE)?;
        write_head(&mut head, self.header.unique, 0, body.0.len())?;
        Ok(body.0.len())
    }

    fn head(&self, errno: i32, body: usize) -> Result<(), i32> {
        let mut head = self.chain.writer().split(OUT_HEADER);
        write_head(&mut head, self.header.unique, errno, body)
    }

    fn serve(&self, shared: &Shared, urgent: bool) -> io::Result<Outcome> {
        let header = &self.header;
        let errno = io::Error::from_raw_os_error;
        let (readable, writable) = (self.chain.readable_len(), self.chain.writable_len());
        let body_len = header.body(readable, writable).map_err(errno)?;
        check_order(shared, header.opcode, urgent).map_err(errno)?;
        let mut input = self.chain.reader();
        input.skip(IN_HEADER);
        let mut body = vec![0; body_len];
        input.read_exact(&mut body)?;
        let request = Request::decode(header, &body, input.len()).map_err(errno)?;
        let (node, caller) = (header.node, Caller::from(header));
        let nothing = |outcome: io::Result<()>| outcome.map(|()| Body::default());
        let room = writable.saturating_sub(OUT_HEADER);
        let body = match request {
            Request::Init {
                major,
                minor,
                readahead,
                features,
            } => shared.init(major, minor, readahead, features),
            Request::Destroy => {
                shared.destroy();
                Ok(Body::default())
            }
            Request::Lookup(name) => shared.lookup(node, name),
            Request::Forget(count) => {
                shared.forget(node, count);
                Ok(Body::default())
            }
            Request::BatchForget(pairs) => {
                for (node, count) in request::forgotten(pairs) {
                    shared.forget(node, count);
                }
                Ok(Body::default())
            }
            Request::Interrupt(unique) => {
                shared.locks.interrupt(unique);
                Ok(Body::default())
            }
            Request::Getattr(handle) => shared.getattr(node, handle),
            Request::Statx(handle) => shared.statx(node, handle),
            Request::Setattr(change) => shared.setattr(node, &change),
            Request::Readlink => shared.readlink(node),
            Request::Symlink { name, target } => shared.symlink(caller, node, name, target),
            Request::Mknod {
                name,
                mode,
                device,
                umask,
            } => shared.mknod(caller, node, name, mode, device, umask),
            Request::Mkdir { name, mode, umask } => shared.mkdir(caller, node, name, mode, umask),
            Request::Unlink(name) => nothing(shared.unlink(node, name, AtFlags::empty())),
            Request::Rmdir(name) => nothing(shared.unlink(node, name, AtFlags::REMOVEDIR)),
            Request::Rename {
                name,
                to,
                to_name,
                flags,
            } => nothing(shared.rename(node, name, to, to_name, flags)),
            Request::Link { node: file, name } => shared.link(file, node, name),
            Request::Open { flags, open_flags } => shared.open(node, flags, open_flags),
            Request::Opendir => shared.opendir(node),
            Request::Create(args, name) => shared.create(caller, node, name, args),
            Request::Tmpfile(args) => shared.tmpfile(caller, node, args),
            Request::Read(piece) => {
                let mut output = self.chain.writer();
                output.skip(OUT_HEADER);
                let mut data = output.split(piece.size as usize);
                shared.read(node, piece, &mut data)?;
                return Ok(Outcome::Data(data.written()));
            }
            Request::Write {
                piece,
                write_flags,
                flags,
            } => shared.write(node, piece, write_flags, flags, &mut input),
            Request::Flush { handle, owner } => nothing(shared.flush(node, handle, owner)),
            Request::Release(handle) | Request::Releasedir(handle) => {
                nothing(shared.release(node, handle))
            }
            Request::Fsync { handle, data_only } | Request::Fsyncdir { handle, data_only } => {
                nothing(shared.fsync(node, handle, data_only))
            }
            Request::Readdir { piece, plus } => shared.readdir(node, piece, plus, room),
            Request::Statfs => shared.statfs(node),
            Request::Syncfs => nothing(shared.syncfs()),
            Request::Setxattr {
                name,
                value,
                flags,
                kill_sgid,
            } => nothing(shared.setxattr(node, name, value, flags, kill_sgid)),
            Request::Getxattr { name, size } => shared.getxattr(node, name, size),
            Request::Listxattr(size) => shared.listxattr(node, size),
            Request::Removexattr(name) => nothing(shared.removexattr(node, name)),
            Request::Fallocate {
                handle,
                offset,
                length,
                mode,
            } => nothing(shared.fallocate(node, handle, mode, offset, length)),
            Request::Lseek {
                handle,
                offset,
                whence,
            } => shared.lseek(node, handle, offset, whence),
            Request::CopyFileRange(copy) => shared.copy(node, copy),
            Request::Getlk(lock) => shared.get_lock(node, &lock),
            Request::Setlk { lock, wait } => match shared.set_lock(node, &lock)? {
                Locked::Done => Ok(Body::default()),
                Locked::Later(file) if wait => return Ok(Outcome::Waits(lock, file)),
                Locked::Later(_) => Err(errno(libc::EAGAIN)),
            },
        };
        body.map(Outcome::Reply)
    }
}

enum Outcome {
    Reply(Body),
    /// So many bytes of data are behind where the header will be.
    Data(usize),
    Waits(Lock, std::sync::Arc<dyn AsFdSend>),
}

/// What may come when, and where.
fn check_order(shared: &Shared, operation: u32, urgent: bool) -> Result<(), i32> {
    if urgent && request::wants_reply(operation) {
        return Err(libc::EINVAL);
    }
    match (operation == opcode::INIT, shared.is_initialized()) {
        (true, true) => Err(libc::EINVAL),
        (false, false) => Err(libc::EIO),
        (true, false) | (false, true) => Ok(()),
    }
}

fn write_head(head: &mut Writer<'_>, unique: u64, errno: i32, body: usize) -> Result<(), i32> {
    let len = u32::try_from(OUT_HEADER.saturating_add(body)).unwrap_or(u32::MAX);
    let mut header = Body::default();
    header
        .u32(len)
        .u32(errno.wrapping_neg().cast_unsigned())
        .u64(unique);
    head.write_all(&header.0).map_err(|_| libc::ERANGE)
}

/// Writes a reply that says only which error there was; how many bytes it has.
pub(super) fn refuse(chain: &Chain, unique: u64, errno: i32) -> usize {
    let mut head = chain.writer().split(OUT_HEADER);
    match write_head(&mut head, unique, errno, 0) {
        Ok(()) => OUT_HEADER,
        Err(_) => 0,
    }
}
