//! One descriptor chain: walked once, then a copy of our own.
//!
//! [`Chain::walk`] reads each descriptor once, checks it against guest memory and
//! never looks at the table again: whatever another processor of the guest writes
//! there meanwhile changes nothing. The bytes in the buffers may change at any
//! time. So a device copies a header once ([`Reader::read_array`]) and decides by
//! its copy, or hands the buffers to the kernel unread ([`Reader::write_at`] and its
//! like).

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd},
    sync::Arc,
};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Bytes of a descriptor (virtio 1.2, 2.7.5).
const DESCRIPTOR: u32 = 16;

/// Flags of a descriptor.
const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Parts that the kernel takes at once (UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// The chain breaks a rule of virtio 1.2, 2.7.5: it leads beyond its table or is
/// longer than the queue, a buffer is empty or not in guest memory, all buffers
/// together have 4 GiB or more, a buffer to be read follows one to be written, or
/// an indirect table is not the end of the chain or has no size that a table can
/// have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// A chain that the driver made available, and that it gets back once.
///
/// It keeps guest memory alive and may go to another thread.
#[derive(Debug)]
pub struct Chain {
    mem: Arc<GuestMemoryMmap>,
    head: u16,
    /// First those that the device reads.
    parts: Vec<Part>,
    /// How many of these there are.
    readable_parts: usize,
    readable: usize,
    writable: usize,
}

/// A buffer that is not empty and lies in one region of guest memory.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    address: GuestAddress,
    len: u32,
}

impl Chain {
    /// Walks the chain that begins at `head` of the descriptor table at `table`,
    /// which has `size` entries. `parts` is a vector to reuse.
    pub(super) fn walk(
        mem: &Arc<GuestMemoryMmap>,
        table: GuestAddress,
        size: u16,
        head: u16,
        mut parts: Vec<Part>,
    ) -> Result<Chain, Malformed> {
        parts.clear();
        let mut chain = Chain {
            mem: Arc::clone(mem),
            head,
            parts,
            readable_parts: 0,
            readable: 0,
            writable: 0,
        };
        let (mut table, mut entries, mut indirect) = (table, u32::from(size), false);
        let mut index = u32::from(head);
        // Ends: each round but one adds a part, and there are at most `size`.
        loop {
            if index >= entries {
                return Err(Malformed);
            }
            let descriptor = Descriptor::read(mem, table, index)?;
            if descriptor.flags & INDIRECT != 0 {
                // 2.7.5.3: once, at the end, and its own WRITE flag means nothing.
                let whole = descriptor.len.is_multiple_of(DESCRIPTOR);
                entries = descriptor.len.div_euclid(DESCRIPTOR);
                if indirect || !whole || descriptor.flags & NEXT != 0 || entries > size.into() {
                    return Err(Malformed);
                }
                (table, index, indirect) = (GuestAddress(descriptor.address), 0, true);
                continue;
            }
            chain.add(&descriptor, size)?;
            if descriptor.flags & NEXT == 0 {
                return Ok(chain);
            }
            index = descriptor.next.into();
        }
    }

    fn add(&mut self, descriptor: &Descriptor, size: u16) -> Result<(), Malformed> {
        let part = Part {
            address: GuestAddress(descriptor.address),
            len: descriptor.len,
        };
        let len = part.len();
        let sum = self.readable.saturating_add(self.writable);
        // 2.7.5.2: below 4 GiB, so that every length fits a used element.
        let fits = u32::try_from(sum).is_ok_and(|sum| sum.checked_add(part.len).is_some());
        if len == 0
            || !fits
            || self.parts.len() >= size.into()
            || self.mem.get_slice(part.address, len).is_err()
        {
            return Err(Malformed);
        }
        if descriptor.flags & WRITE != 0 {
            self.writable = self.writable.saturating_add(len);
        } else if self.writable > 0 {
            // 2.7.4.2: what is to be written comes last.
            return Err(Malformed);
        } else {
            self.readable = self.readable.saturating_add(len);
            self.readable_parts = self.readable_parts.saturating_add(1);
        }
        self.parts.push(part);
        Ok(())
    }

    /// The first descriptor's number, by which the driver knows the chain.
    #[must_use]
    pub fn head(&self) -> u16 {
        self.head
    }

    /// Bytes that the driver gives, below 4 GiB together with the writable ones.
    #[must_use]
    pub fn readable_len(&self) -> usize {
        self.readable
    }

    /// Bytes that the driver has room for.
    #[must_use]
    pub fn writable_len(&self) -> usize {
        self.writable
    }

    /// A cursor over what the driver gives. Each call begins at the front.
    #[must_use]
    pub fn reader(&self) -> Reader<'_> {
        let (parts, _) = self.parts.split_at(self.readable_parts);
        Reader(self.cursor(parts, self.readable))
    }

    /// A cursor over what the driver has room for. Each call begins at the front.
    #[must_use]
    pub fn writer(&self) -> Writer<'_> {
        let (_, parts) = self.parts.split_at(self.readable_parts);
        Writer {
            cursor: self.cursor(parts, self.writable),
            written: 0,
        }
    }

    fn cursor<'c>(&'c self, parts: &'c [Part], left: usize) -> Cursor<'c> {
        Cursor {
            mem: &self.mem,
            parts,
            skip: 0,
            left,
        }
    }

    /// The vector, to be used again.
    pub(super) fn into_parts(self) -> Vec<Part> {
        self.parts
    }
}

struct Descriptor {
    address: u64,
    len: u32,
    flags: u16,
    next: u16,
}

impl Descriptor {
    /// Copies entry `index` of `table`.
    fn read(
        mem: &GuestMemoryMmap,
        table: GuestAddress,
        index: u32,
    ) -> Result<Descriptor, Malformed> {
        let at = u64::from(index)
            .checked_mul(DESCRIPTOR.into())
            .and_then(|offset| table.0.checked_add(offset))
            .ok_or(Malformed)?;
        // Little-endian, as the host is (virtio 1.2, 2.7.5).
        let [low, high] = mem
            .read_obj::<[u64; 2]>(GuestAddress(at))
            .map_err(|_| Malformed)?
            .map(u64::to_le_bytes);
        let [a, b, c, d, flags_low, flags_high, next_low, next_high] = high;
        Ok(Descriptor {
            address: u64::from_le_bytes(low),
            len: u32::from_le_bytes([a, b, c, d]),
            flags: u16::from_le_bytes([flags_low, flags_high]),
            next: u16::from_le_bytes([next_low, next_high]),
        })
    }
}

impl Part {
    fn len(self) -> usize {
        // usize has 64 bits here.
        usize::try_from(self.len).unwrap_or(usize::MAX)
    }
}

/// A place in the buffers, and where they end for its owner.
#[derive(Clone, Copy, Debug)]
struct Cursor<'c> {
    mem: &'c GuestMemoryMmap,
    parts: &'c [Part],
    /// Bytes of the first part that are behind.
    skip: usize,
    left: usize,
}

impl<'c> Cursor<'c> {
    /// What is left, as (address, length), none empty.
    fn ranges(self) -> impl Iterator<Item = (GuestAddress, usize)> + use<'c> {
        let (mut skip, mut left) = (self.skip, self.left);
        self.parts.iter().map_while(move |part| {
            let start = std::mem::take(&mut skip);
            let len = part.len().saturating_sub(start).min(left);
            left = left.saturating_sub(len);
            // In a region, so the sum does not overflow.
            let start = u64::try_from(start).unwrap_or(0);
            (len > 0).then(|| (GuestAddress(part.address.0.saturating_add(start)), len))
        })
    }

    fn slices(self) -> impl Iterator<Item = VolatileSlice<'c>> + use<'c> {
        let mem = self.mem;
        // All lie in guest memory: that was checked, and no region ever goes away.
        self.ranges()
            .map_while(|(address, len)| mem.get_slice(address, len).ok())
    }

    /// Goes on by `count` bytes, or to the end; by how many.
    fn advance(&mut self, count: usize) -> usize {
        let count = count.min(self.left);
        self.left = self.left.saturating_sub(count);
        self.skip = self.skip.saturating_add(count);
        while let Some((part, rest)) = self.parts.split_first()
            && self.skip >= part.len()
        {
            self.skip = self.skip.saturating_sub(part.len());
            self.parts = rest;
        }
        count
    }

    /// Takes the next `count` bytes off, or all that are left.
    fn split(&mut self, count: usize) -> Cursor<'c> {
        let mut front = *self;
        front.left = self.advance(count);
        front
    }

    /// Hands the next parts, as many as the kernel takes, to a call that says how
    /// many bytes it moved, and goes on by these.
    fn transfer(
        &mut self,
        call: impl FnOnce(&[libc::iovec]) -> libc::ssize_t,
    ) -> io::Result<usize> {
        /// More than the usual chain has parts.
        const FEW: usize = 18;
        let none = libc::iovec {
            iov_base: std::ptr::null_mut(),
            iov_len: 0,
        };
        let mem = self.mem;
        let parts = self.ranges().map_while(|(address, iov_len)| {
            let iov_base = mem.get_host_address(address).ok()?.cast();
            Some(libc::iovec { iov_base, iov_len })
        });
        let moved = if self.parts.len() <= FEW {
            let mut few = [none; FEW];
            let count = few
                .iter_mut()
                .zip(parts)
                .map(|(to, from)| *to = from)
                .count();
            call(few.split_at(count).0)
        } else {
            call(&parts.take(IOV_MAX).collect::<Vec<_>>())
        };
        let moved = usize::try_from(moved).map_err(|_| io::Error::last_os_error())?;
        Ok(self.advance(moved))
    }
}

/// Reads what the driver gives, from front to back.
///
/// A clone reads the same bytes again, which the guest may have changed since.
#[derive(Clone, Debug)]
pub struct Reader<'c>(Cursor<'c>);

impl<'c> Reader<'c> {
    /// Bytes that are left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.left
    }

    /// Whether nothing is left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.left == 0
    }

    /// Leaves `count` bytes out, or all that are left; how many.
    pub fn skip(&mut self, count: usize) -> usize {
        self.0.advance(count)
    }

    /// Takes the next `count` bytes off, or all that are left.
    #[must_use]
    pub fn split(&mut self, count: usize) -> Reader<'c> {
        Reader(self.0.split(count))
    }

    /// Copies bytes to the front of `to`, as many as there are; how many.
    pub fn read(&mut self, to: &mut [u8]) -> usize {
        let mut rest = to;
        let mut total: usize = 0;
        for slice in self.0.slices() {
            if rest.is_empty() {
                break;
            }
            let count = slice.copy_to(rest);
            total = total.saturating_add(count);
            rest = rest.split_at_mut(count).1;
        }
        self.0.advance(total)
    }

    /// Fills `to`. UnexpectedEof if so much is not left; then nothing is taken.
    pub fn read_exact(&mut self, to: &mut [u8]) -> io::Result<()> {
        if to.len() > self.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read(to);
        Ok(())
    }

    /// The next `N` bytes.
    pub fn read_array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// What is left, part by part, in guest memory.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'c>> + use<'c> {
        self.0.slices()
    }

    /// Writes to `file` at `offset` by one `pwritev`, without a copy; how many
    /// bytes it took.
    pub fn write_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let (file, offset) = (file.as_fd(), file_offset(offset)?);
        self.0.transfer(|parts| {
            // SAFETY: the parts lie in guest memory, which the cursor borrows; the
            // kernel only reads them.
            unsafe { libc::pwritev(file.as_raw_fd(), parts.as_ptr(), count(parts), offset) }
        })
    }

    /// Writes to `file` by one `writev`; how many bytes it took.
    pub fn write_to(&mut self, file: impl AsFd) -> io::Result<usize> {
        let file = file.as_fd();
        self.0.transfer(|parts| {
            // SAFETY: the parts lie in guest memory, which the cursor borrows; the
            // kernel only reads them.
            unsafe { libc::writev(file.as_raw_fd(), parts.as_ptr(), count(parts)) }
        })
    }

    /// Sends into `socket` without waiting and without SIGPIPE; how many bytes it
    /// took.
    pub fn send_to(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let socket = socket.as_fd();
        self.0.transfer(|parts| {
            let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
            let message = message(parts);
            // SAFETY: `message` points to `parts`, which lie in guest memory that
            // the cursor borrows; the kernel only reads them.
            unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, flags) }
        })
    }
}

/// Writes to where the driver has room, from front to back.
#[derive(Debug)]
pub struct Writer<'c> {
    cursor: Cursor<'c>,
    written: usize,
}

impl<'c> Writer<'c> {
    /// Bytes that there is room for.
    #[must_use]
    pub fn len(&self) -> usize {
        self.cursor.left
    }

    /// Whether there is no room left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.cursor.left == 0
    }

    /// Bytes written through this cursor.
    #[must_use]
    pub fn written(&self) -> usize {
        self.written
    }

    /// Leaves room for `count` bytes, or all that is left; how many.
    pub fn skip(&mut self, count: usize) -> usize {
        self.cursor.advance(count)
    }

    /// Takes room for the next `count` bytes off, or all that is left. What is
    /// written there counts there.
    #[must_use]
    pub fn split(&mut self, count: usize) -> Writer<'c> {
        Writer {
            cursor: self.cursor.split(count),
            written: 0,
        }
    }

    /// Writes the front of `bytes`, as much as there is room for; how much.
    pub fn write(&mut self, bytes: &[u8]) -> usize {
        let mut rest = bytes;
        let mut total: usize = 0;
        for slice in self.cursor.slices() {
            if rest.is_empty() {
                break;
            }
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            total = total.saturating_add(now.len());
            rest = later;
        }
        self.count(total)
    }

    /// Writes all of `bytes`. WriteZero if there is not so much room; then nothing
    /// is written.
    pub fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        if bytes.len() > self.len() {
            return Err(io::ErrorKind::WriteZero.into());
        }
        self.write(bytes);
        Ok(())
    }

    /// What is left, part by part, in guest memory. What is written there is not
    /// counted.
    pub fn slices(&self) -> impl Iterator<Item = VolatileSlice<'c>> + use<'c> {
        self.cursor.slices()
    }

    /// Fills from `file` at `offset` by one `preadv`, without a copy; how many
    /// bytes came, 0 at its end.
    pub fn read_at(&mut self, file: impl AsFd, offset: u64) -> io::Result<usize> {
        let (file, offset) = (file.as_fd(), file_offset(offset)?);
        self.transfer(|parts| {
            // SAFETY: the parts lie in guest memory, which the cursor borrows and
            // to which no reference exists: the kernel may write there.
            unsafe { libc::preadv(file.as_raw_fd(), parts.as_ptr(), count(parts), offset) }
        })
    }

    /// Fills from `file` by one `readv`; how many bytes came, 0 at its end.
    pub fn read_from(&mut self, file: impl AsFd) -> io::Result<usize> {
        let file = file.as_fd();
        self.transfer(|parts| {
            // SAFETY: the parts lie in guest memory, which the cursor borrows and
            // to which no reference exists: the kernel may write there.
            unsafe { libc::readv(file.as_raw_fd(), parts.as_ptr(), count(parts)) }
        })
    }

    /// Fills from `socket` without waiting; how many bytes came, 0 at the end of
    /// what its peer sends.
    pub fn receive_from(&mut self, socket: impl AsFd) -> io::Result<usize> {
        let socket: BorrowedFd<'_> = socket.as_fd();
        self.transfer(|parts| {
            let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
            let mut message = message(parts);
            // SAFETY: `message` points to `parts`, which lie in guest memory that
            // the cursor borrows and to which no reference exists: the kernel may
            // write there.
            unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, flags) }
        })
    }

    fn transfer(
        &mut self,
        call: impl FnOnce(&[libc::iovec]) -> libc::ssize_t,
    ) -> io::Result<usize> {
        let moved = self.cursor.transfer(call)?;
        self.written = self.written.saturating_add(moved);
        Ok(moved)
    }

    fn count(&mut self, written: usize) -> usize {
        let written = self.cursor.advance(written);
        self.written = self.written.saturating_add(written);
        written
    }
}

fn count(parts: &[libc::iovec]) -> libc::c_int {
    // At most IOV_MAX.
    libc::c_int::try_from(parts.len()).unwrap_or(0)
}

fn file_offset(offset: u64) -> io::Result<libc::off_t> {
    libc::off_t::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput.into())
}

fn message(parts: &[libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a `msghdr` without address, buffers and control data.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // The kernel does not write to the vectors, whatever the type says.
    message.msg_iov = parts.as_ptr().cast_mut();
    message.msg_iovlen = parts.len();
    message
}
