//! Operations on open files, and on what is in them.

use std::{io, os::fd::AsRawFd, sync::Arc};

use rustix::fs::{self as sys, FallocateFlags, OFlags, SeekFrom};

use super::{
    abi::{Body, OPEN_KILL_SUIDGID, WRITE_KILL_SUIDGID},
    caller::KillPrivileges,
    file::error,
    locks::{self, AsFdSend},
    request::{Copy, Lock, Piece},
    share::Shared,
    table::Handle,
    watch::Watch,
};
use crate::{
    config::Policy,
    devices::queue::{Reader, Writer},
};

/// Most bytes that one request copies between files: it holds a thread meanwhile.
const COPY: u64 = 16 << 20;

/// Parts that the kernel takes at once (UIO_MAXIOV).
const PARTS: usize = 1024;

/// What became of a request for a lock.
pub(super) enum Locked {
    Done,
    /// Somebody else has it: the file on which it is to be tried again.
    Later(Arc<dyn AsFdSend>),
}

impl AsFdSend for Handle {
    fn file(&self) -> &std::fs::File {
        &self.file
    }
}

impl Shared {
    /// The open file that a request means: by its handle, or in a private share by
    /// its node.
    pub(super) fn file(&self, node: u64, handle: u64, writable: bool) -> io::Result<Arc<Handle>> {
        if self.policy == Policy::Shared || handle != 0 {
            return self.table.handle(handle, node);
        }
        let known = self.table.node(node)?;
        let access = match writable {
            true => OFlags::RDWR,
            false => OFlags::RDONLY,
        };
        self.opened
            .get(node, writable, || self.reopen(&known, access.bits()))
    }

    pub(super) fn open(&self, number: u64, flags: u32, open_flags: u32) -> io::Result<Body> {
        let node = self.table.node(number)?;
        if self.policy == Policy::Private {
            // From now on the guest's kernel opens files by itself.
            return Err(error(libc::ENOSYS));
        }
        let file = {
            let _kill = KillPrivileges::when(open_flags & OPEN_KILL_SUIDGID != 0)?;
            self.reopen(&node, flags)?
        };
        if flags & OFlags::TRUNC.bits() != 0 {
            self.did_to(number, libc::IN_MODIFY);
        }
        let mut body = Body::default();
        body.open(self.table.open(number, file)?, 0);
        Ok(body)
    }

    pub(super) fn read(&self, node: u64, piece: Piece, room: &mut Writer<'_>) -> io::Result<()> {
        let handle = self.file(node, piece.handle, false)?;
        let mut offset = piece.offset;
        while !room.is_empty() {
            let count = match room.read_at(&handle.file, offset) {
                Ok(0) => break,
                Ok(count) => count as u64,
                // What has been read is good.
                Err(_) if offset > piece.offset => break,
                Err(error) => return Err(invalid(error)),
            };
            offset = offset.saturating_add(count);
        }
        Ok(())
    }

    pub(super) fn write(
        &self,
        node: u64,
        piece: Piece,
        write_flags: u32,
        flags: u32,
        data: &mut Reader<'_>,
    ) -> io::Result<Body> {
        self.writable()?;
        let handle = self.file(node, piece.handle, true)?;
        // Each write says whether it appends: the guest may change that by
        // fcntl(2) and tells it in no other way. In a private share it knows where
        // the end is.
        let append = self.policy == Policy::Shared && flags & OFlags::APPEND.bits() != 0;
        let _kill = KillPrivileges::when(write_flags & WRITE_KILL_SUIDGID != 0)?;
        let mut offset = piece.offset;
        while !data.is_empty() {
            let written = match append {
                true => append_to(&handle, offset, data),
                false => data.write_at(&handle.file, offset),
            };
            match written {
                Ok(0) => break,
                Ok(count) => offset = offset.saturating_add(count as u64),
                Err(_) if offset > piece.offset => break,
                Err(error) => return Err(invalid(error)),
            }
        }
        let written = offset.saturating_sub(piece.offset);
        self.did_to(node, libc::IN_MODIFY);
        let mut body = Body::default();
        body.u32(u32::try_from(written).unwrap_or(0)).u32(0);
        Ok(body)
    }

    pub(super) fn flush(&self, node: u64, handle: u64, owner: u64) -> io::Result<()> {
        if self.policy == Policy::Private {
            // Nothing is due when a file is closed.
            return Err(error(libc::ENOSYS));
        }
        self.table.handle(handle, node)?;
        self.locks.close(node, owner);
        Ok(())
    }

    pub(super) fn release(&self, node: u64, handle: u64) -> io::Result<()> {
        if self.watch.as_ref().is_some_and(Watch::has_others) {
            let flags = sys::fcntl_getfl(&self.table.handle(handle, node)?.file)?;
            if flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
                self.did_to(node, libc::IN_CLOSE_WRITE);
            }
        }
        self.table.close(handle, node)?;
        // A BSD lock may have gone with it.
        self.locks.given_back();
        Ok(())
    }

    pub(super) fn fsync(&self, node: u64, handle: u64, data_only: bool) -> io::Result<()> {
        let handle = self.file(node, handle, false)?;
        if data_only {
            sys::fdatasync(&handle.file)?;
        } else {
            sys::fsync(&handle.file)?;
        }
        Ok(())
    }

    /// All that the guest has written anywhere in the share is on disk afterwards.
    pub(super) fn syncfs(&self) -> io::Result<()> {
        let mut outcome = Ok(());
        for node in self.table.one_of_each_mount() {
            let synced = self
                .reopen(&node, OFlags::RDONLY.bits())
                .and_then(|file| Ok(sys::syncfs(&file)?));
            // All the others first.
            if synced
                .as_ref()
                .is_err_and(|error| error.raw_os_error() != Some(libc::ESTALE))
            {
                outcome = synced;
            }
        }
        outcome
    }

    pub(super) fn fallocate(
        &self,
        node: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.writable()?;
        let handle = self.file(node, handle, true)?;
        let mode = FallocateFlags::from_bits_retain(mode);
        sys::fallocate(&handle.file, mode, offset, length)?;
        self.did_to(node, libc::IN_MODIFY);
        Ok(())
    }

    pub(super) fn lseek(
        &self,
        node: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<Body> {
        let handle = self.file(node, handle, false)?;
        if i64::try_from(offset).is_err() {
            return Err(error(libc::EINVAL));
        }
        // The guest keeps its own position and asks only what is where.
        let target = match i32::try_from(whence) {
            Ok(libc::SEEK_DATA) => SeekFrom::Data(offset),
            Ok(libc::SEEK_HOLE) => SeekFrom::Hole(offset),
            _ => return Err(error(libc::EINVAL)),
        };
        let _position = handle.lock();
        let mut body = Body::default();
        body.u64(sys::seek(&handle.file, target)?);
        Ok(body)
    }

    pub(super) fn copy(&self, node: u64, copy: Copy) -> io::Result<Body> {
        self.writable()?;
        if copy.flags != 0 || i64::try_from(copy.offset.max(copy.to_offset)).is_err() {
            return Err(error(libc::EINVAL));
        }
        let to = self.file(copy.to_node, copy.to_handle, true)?;
        let from = self.file(node, copy.handle, false)?;
        let (mut offset, mut to_offset) = (copy.offset, copy.to_offset);
        let len = usize::try_from(copy.len.min(COPY)).unwrap_or(0);
        let copied = sys::copy_file_range(
            &from.file,
            Some(&mut offset),
            &to.file,
            Some(&mut to_offset),
            len,
        )
        .map_err(|errno| match errno {
            // Else the guest would never ask again.
            rustix::io::Errno::NOSYS => error(libc::EOPNOTSUPP),
            errno => errno.into(),
        })?;
        self.did_to(copy.to_node, libc::IN_MODIFY);
        let mut body = Body::default();
        body.u32(u32::try_from(copied).unwrap_or(0)).u32(0);
        Ok(body)
    }

    /// Takes a lock or gives it back, if nobody else has to be waited for.
    pub(super) fn set_lock(&self, node: u64, lock: &Lock) -> io::Result<Locked> {
        let handle = self.table.handle(lock.handle, node)?;
        let file: Arc<dyn AsFdSend> = if lock.whole {
            handle
        } else {
            let open = || self.lock_file(node);
            let open: &dyn Fn() -> io::Result<std::fs::File> = &open;
            let open = (lock.kind != libc::F_UNLCK).then_some(open);
            match self.locks.owner(node, lock.owner, open)? {
                Some(file) => file,
                None => return Ok(Locked::Done),
            }
        };
        match locks::set(file.file(), lock) {
            Err(error) if locks::would_wait(&error) => Ok(Locked::Later(file)),
            outcome => {
                outcome?;
                self.locks.given_back();
                Ok(Locked::Done)
            }
        }
    }

    pub(super) fn get_lock(&self, node: u64, lock: &Lock) -> io::Result<Body> {
        let handle = self.table.handle(lock.handle, node)?;
        let own = self.locks.owner(node, lock.owner, None)?;
        let (start, last, kind) = match &own {
            Some(file) => locks::get(file, lock)?,
            None => locks::get(&handle.file, lock)?,
        };
        let mut body = Body::default();
        body.u64(start)
            .u64(last)
            .u32(kind.cast_unsigned())
            // Whoever it is, it is no process of the guest that it could name.
            .u32(0);
        Ok(body)
    }

    /// A file for the locks of one owner: for reading and writing, since it may
    /// come to want both kinds.
    fn lock_file(&self, node: u64) -> io::Result<std::fs::File> {
        let node = self.table.node(node)?;
        self.reopen(&node, OFlags::RDWR.bits())
            .or_else(|_| self.reopen(&node, OFlags::RDONLY.bits()))
    }
}

/// Appends to a file, in one step with finding its end.
fn append_to(handle: &Handle, offset: u64, data: &mut Reader<'_>) -> io::Result<usize> {
    let offset = i64::try_from(offset).map_err(|_| error(libc::EINVAL))?;
    let slices: Vec<_> = data.slices().take(PARTS).collect();
    let guards: Vec<_> = slices.iter().map(|slice| slice.ptr_guard()).collect();
    let parts: Vec<_> = guards
        .iter()
        .map(|guard| libc::iovec {
            iov_base: guard.as_ptr().cast_mut().cast(),
            iov_len: guard.len(),
        })
        .collect();
    let count = libc::c_int::try_from(parts.len()).unwrap_or(0);
    // SAFETY: the parts lie in guest memory, which `data` borrows; the kernel only
    // reads them.
    let written = unsafe {
        libc::pwritev2(
            handle.file.as_raw_fd(),
            parts.as_ptr(),
            count,
            offset,
            libc::RWF_APPEND,
        )
    };
    let written = usize::try_from(written).map_err(|_| io::Error::last_os_error())?;
    data.skip(written);
    Ok(written)
}

/// An offset that no file has is an argument without sense.
fn invalid(error: io::Error) -> io::Error {
    match error.kind() {
        io::ErrorKind::InvalidInput if error.raw_os_error().is_none() => {
            super::file::error(libc::EINVAL)
        }
        _ => error,
    }
}
