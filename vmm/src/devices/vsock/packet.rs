//! Packets as they lie in descriptor chains (virtio 1.2, 5.10.6).
//!
//! Each field of a header is read from guest memory once, into a [`Header`].
//! Payload is never copied on its way unless the host's socket is full: it goes
//! between the socket and the chain's buffers by one `sendmsg` or `recvmsg`.

use std::{
    io,
    mem::MaybeUninit,
    os::fd::{AsRawFd, BorrowedFd},
};

use virtio_queue::desc::split::Descriptor;
use vm_memory::{GuestMemory, GuestMemoryMmap, VolatileSlice};

/// Length of a header in bytes.
pub(super) const HEADER_LEN: usize = 44;

/// The only socket type offered (VIRTIO_VSOCK_TYPE_STREAM).
pub(super) const TYPE_STREAM: u16 = 1;

/// Operations (virtio 1.2, 5.10.6).
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// `struct virtio_vsock_hdr`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// Bytes of payload.
    pub(super) len: u32,
    /// Socket type.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// From the form on the wire: little-endian, without padding.
    pub(super) fn parse(bytes: &[u8; HEADER_LEN]) -> Header {
        let rest = &mut bytes.as_slice();
        Header {
            src_cid: u64::from_le_bytes(take(rest)),
            dst_cid: u64::from_le_bytes(take(rest)),
            src_port: u32::from_le_bytes(take(rest)),
            dst_port: u32::from_le_bytes(take(rest)),
            len: u32::from_le_bytes(take(rest)),
            kind: u16::from_le_bytes(take(rest)),
            op: u16::from_le_bytes(take(rest)),
            flags: u32::from_le_bytes(take(rest)),
            buf_alloc: u32::from_le_bytes(take(rest)),
            fwd_cnt: u32::from_le_bytes(take(rest)),
        }
    }

    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&self.src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&self.kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&self.op.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&self.fwd_cnt.to_le_bytes());
        bytes
    }
}

/// The next `N` bytes; zeroes at the end, which a header does not reach.
fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    let Some((field, tail)) = rest.split_first_chunk() else {
        return [0; N];
    };
    *rest = tail;
    *field
}

/// The buffers of one descriptor chain.
#[derive(Debug)]
pub(super) struct Buffers<'m>(Vec<VolatileSlice<'m>>);

/// A chain with a buffer outside guest memory.
#[derive(Debug)]
pub(super) struct BadChain;

impl<'m> Buffers<'m> {
    /// The memory that `descriptors` name, in their order. What lies beyond
    /// `limit` bytes is left out.
    pub(super) fn of(
        mem: &'m GuestMemoryMmap,
        descriptors: impl Iterator<Item = Descriptor>,
        limit: usize,
    ) -> Result<Buffers<'m>, BadChain> {
        let mut slices = Vec::with_capacity(4);
        let mut room = limit;
        for descriptor in descriptors {
            let len = room.min(descriptor.len() as usize);
            if len == 0 {
                continue;
            }
            for slice in mem.get_slices(descriptor.addr(), len) {
                slices.push(slice.map_err(|_| BadChain)?);
            }
            room = room.saturating_sub(len);
        }
        Ok(Buffers(slices))
    }

    /// Bytes in all buffers.
    pub(super) fn len(&self) -> usize {
        self.0.iter().map(VolatileSlice::len).sum()
    }

    /// The header at the front, if all of it is there.
    pub(super) fn header(&self) -> Option<Header> {
        let mut bytes = [0; HEADER_LEN];
        let mut rest = bytes.as_mut_slice();
        for slice in &self.0 {
            let len = slice.copy_to(rest);
            rest = rest.get_mut(len..)?;
            if rest.is_empty() {
                return Some(Header::parse(&bytes));
            }
        }
        None
    }

    /// Writes the header at the front. The buffers are long enough.
    pub(super) fn put_header(&self, header: &Header) {
        let bytes = header.bytes();
        let mut rest = bytes.as_slice();
        for slice in &self.0 {
            let (now, later) = rest.split_at(rest.len().min(slice.len()));
            slice.copy_from(now);
            rest = later;
        }
    }

    /// The `len` bytes after the first `skip`, or fewer if there are fewer.
    pub(super) fn part(&self, mut skip: usize, mut len: usize) -> Buffers<'m> {
        let mut slices = Vec::with_capacity(self.0.len());
        for slice in &self.0 {
            let start = skip.min(slice.len());
            skip = skip.saturating_sub(start);
            let take = len.min(slice.len().saturating_sub(start));
            len = len.saturating_sub(take);
            if take > 0 {
                // It lies within the slice, so it cannot fail.
                slices.extend(slice.subslice(start, take));
            }
        }
        Buffers(slices)
    }

    /// Appends all bytes to `to`.
    pub(super) fn copy_to(&self, to: &mut std::collections::VecDeque<u8>) {
        let mut bytes = [0; 4096];
        for slice in &self.0 {
            let mut done = 0;
            while let Ok(part) = slice.offset(done) {
                let len = part.copy_to(&mut bytes[..]);
                if len == 0 {
                    break;
                }
                to.extend(bytes.iter().take(len));
                done = done.saturating_add(len);
            }
        }
    }

    /// Sends the bytes into a socket without waiting; how many it took.
    pub(super) fn send_to(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut parts = self.io_vectors();
        let message = message(&mut parts);
        // SAFETY: `message` points to `parts`, whose entries lie in guest memory
        // that `self` borrows; the kernel only reads from it.
        let sent = unsafe {
            libc::sendmsg(
                socket.as_raw_fd(),
                &raw const message,
                libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL,
            )
        };
        usize::try_from(sent).map_err(|_| io::Error::last_os_error())
    }

    /// Fills the buffers from a socket without waiting; how many bytes came, 0 at
    /// the end of what the peer sends.
    pub(super) fn receive_from(&self, socket: BorrowedFd<'_>) -> io::Result<usize> {
        let mut parts = self.io_vectors();
        let mut message = message(&mut parts);
        // SAFETY: `message` points to `parts`, whose entries lie in guest memory
        // that `self` borrows: nothing of ours has a reference into it, so that
        // the kernel may write there.
        let received = unsafe {
            libc::recvmsg(
                socket.as_raw_fd(),
                &raw mut message,
                libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC,
            )
        };
        usize::try_from(received).map_err(|_| io::Error::last_os_error())
    }

    fn io_vectors(&self) -> Vec<libc::iovec> {
        self.0
            .iter()
            // The kernel takes 1,024 parts at most (UIO_MAXIOV).
            .take(1024)
            .map(|slice| libc::iovec {
                iov_base: slice.ptr_guard_mut().as_ptr().cast(),
                iov_len: slice.len(),
            })
            .collect()
    }
}

fn message(parts: &mut [libc::iovec]) -> libc::msghdr {
    // SAFETY: all zeroes is a `msghdr` without address, buffers and control data.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = parts.as_mut_ptr();
    message.msg_iovlen = parts.len();
    message
}

#[cfg(test)]
mod tests {
    use std::{collections::VecDeque, os::fd::AsFd, os::unix::net::UnixStream};

    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1000), (GuestAddress(0x1000), 0x1000)])
            .unwrap()
    }

    fn buffers<'m>(
        mem: &'m GuestMemoryMmap,
        parts: &[(u64, u32)],
        limit: usize,
    ) -> Result<Buffers<'m>, BadChain> {
        Buffers::of(
            mem,
            parts
                .iter()
                .map(|&(addr, len)| Descriptor::new(addr, len, 0, 0)),
            limit,
        )
    }

    #[test]
    fn a_header_may_be_cut_anywhere() {
        let mem = memory();
        let mut header = Header {
            src_cid: 3,
            fwd_cnt: 9,
            ..Header::default()
        };
        for cut in 0..=44 {
            header.len = cut;
            let chain = buffers(&mem, &[(0x100, cut), (0xff0, 44 - cut)], 100).unwrap();
            chain.put_header(&header);
            assert_eq!(chain.header(), Some(header));
        }
        assert_eq!(buffers(&mem, &[(0, 43)], 100).unwrap().header(), None);
    }

    #[test]
    fn buffers_outside_of_memory_are_refused_and_the_limit_is_kept() {
        let mem = memory();
        for bad in [(0x1fff, 2), (0x2000, 1), (u64::MAX, 16), (0, u32::MAX)] {
            assert!(buffers(&mem, &[(0, 16), bad], usize::MAX).is_err());
        }
        let cut = buffers(&mem, &[(0, 16), (0xff8, 16), (0x2000, 1)], 20).unwrap();
        assert_eq!(cut.len(), 20);
    }

    #[test]
    fn bytes_pass_between_sockets_and_scattered_buffers_unchanged() {
        let mem = memory();
        let (near, far) = UnixStream::pair().unwrap();
        let text: Vec<u8> = (0..200).collect();
        mem.write_slice(&text, GuestAddress(0xf80)).unwrap();
        let chain = buffers(&mem, &[(0xf80, 100), (0xfe4, 100)], 1000).unwrap();
        let part = chain.part(44, 150);
        assert_eq!(part.len(), 150);
        assert_eq!(part.send_to(near.as_fd()).unwrap(), 150);
        let back = buffers(&mem, &[(0, 7), (0x10, 300)], 1000).unwrap();
        assert_eq!(back.receive_from(far.as_fd()).unwrap(), 150);
        let mut copy = VecDeque::new();
        back.part(0, 150).copy_to(&mut copy);
        assert_eq!(copy, &text[44..194]);
    }
}
