//! The driver's side of a queue, for tests of devices.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

/// Descriptors of a queue.
pub(crate) const SIZE: u16 = 64;

/// Another descriptor follows (VIRTQ_DESC_F_NEXT).
pub(crate) const NEXT: u16 = 1;

/// The device writes to the buffer (VIRTQ_DESC_F_WRITE).
pub(crate) const WRITE: u16 = 2;

/// A queue in guest memory, with a buffer for each descriptor behind its rings.
pub(crate) struct Ring {
    pub(crate) base: u64,
    pub(crate) buffer_len: u32,
    pub(crate) event: EventFd,
    avail: u16,
    seen: u16,
}

impl Ring {
    /// A queue at `base`, with buffers of this length each.
    pub(crate) fn new(base: u64, buffer_len: u32) -> Ring {
        Ring {
            base,
            buffer_len,
            avail: 0,
            seen: 0,
            event: EventFd::new(0).unwrap(),
        }
    }

    /// What the transport hands to the device.
    pub(crate) fn queue(&self) -> Queue {
        let mut queue = Queue::new(SIZE).unwrap();
        let low = |addr: u64| Some(u32::try_from(addr).unwrap());
        queue.set_desc_table_address(low(self.base), Some(0));
        queue.set_avail_ring_address(low(self.base + 0x1000), Some(0));
        queue.set_used_ring_address(low(self.base + 0x2000), Some(0));
        queue.set_ready(true);
        queue
    }

    /// Where the buffer of a descriptor is.
    pub(crate) fn buffer(&self, index: u16) -> GuestAddress {
        GuestAddress(self.base + 0x3000 + u64::from(index) * u64::from(self.buffer_len))
    }

    /// Fills a descriptor for the first `len` bytes of its buffer; the one that
    /// may follow is the next in number.
    pub(crate) fn describe(&self, mem: &GuestMemoryMmap, index: u16, len: u32, flags: u16) {
        let at = GuestAddress(self.base + u64::from(index) * 16);
        mem.write_obj(self.buffer(index).0, at).unwrap();
        mem.write_obj(len, GuestAddress(at.0 + 8)).unwrap();
        mem.write_obj(flags, GuestAddress(at.0 + 12)).unwrap();
        mem.write_obj(index + 1, GuestAddress(at.0 + 14)).unwrap();
    }

    /// Makes the chain that begins with this descriptor available.
    pub(crate) fn offer(&mut self, mem: &GuestMemoryMmap, head: u16) {
        let slot = self.base + 0x1004 + u64::from(self.avail % SIZE) * 2;
        mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.avail = self.avail.wrapping_add(1);
        mem.store(
            self.avail,
            GuestAddress(self.base + 0x1002),
            Ordering::Release,
        )
        .unwrap();
    }

    /// Notifies the device.
    pub(crate) fn notify(&self) {
        self.event.write(1).unwrap();
    }

    /// The next used chain: its head and how many bytes the device wrote.
    pub(crate) fn used(&mut self, mem: &GuestMemoryMmap) -> Option<(u16, u32)> {
        let now: u16 = mem
            .load(GuestAddress(self.base + 0x2002), Ordering::Acquire)
            .unwrap();
        if now == self.seen {
            return None;
        }
        let at = self.base + 0x2004 + u64::from(self.seen % SIZE) * 8;
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = mem.read_obj(GuestAddress(at)).unwrap();
        let len = mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }
}
