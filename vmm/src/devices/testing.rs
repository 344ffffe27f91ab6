//! A driver's half of a queue, for tests of devices.

use std::sync::Arc;

use virtio_queue::{
    Queue, QueueT, desc::RawDescriptor, desc::split::Descriptor, mock::MockSplitQueue,
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Interrupt, queue::Ring};

/// Flags of a descriptor that the device reads or writes.
pub(crate) const READ: u16 = 0;
pub(crate) const WRITE: u16 = 2;
const NEXT: u16 = 1;
const SIZE: u16 = 16;

/// 2 MiB of memory with a queue at its beginning.
pub(crate) struct Guest {
    pub(crate) mem: GuestMemoryMmap,
    pub(crate) ring: Ring,
    pub(crate) irq: Arc<EventFd>,
    offered: u16,
}

impl Guest {
    pub(crate) fn new() -> Guest {
        let mem = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 2 << 20)]).unwrap();
        let queue: Queue = MockSplitQueue::new(&mem, SIZE).create_queue().unwrap();
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let ring = Ring {
            queue,
            notify: EventFd::new(EFD_NONBLOCK).unwrap(),
            interrupt: Interrupt::new(Arc::clone(&irq)),
            mem: mem.clone(),
        };
        Guest {
            mem,
            ring,
            irq,
            offered: 0,
        }
    }

    /// Makes one chain of (address, length, flags) available.
    pub(crate) fn offer(&mut self, descriptors: &[(u64, u32, u16)]) {
        let head = self.offered;
        for (index, (address, length, flags)) in (head..).zip(descriptors) {
            let last = usize::from(index - head) + 1 == descriptors.len();
            let next = if last { 0 } else { NEXT };
            self.write_descriptor(index, (*address, *length, flags | next, index + 1));
        }
        self.make_available(head);
        self.offered += u16::try_from(descriptors.len()).unwrap();
    }

    /// Writes a descriptor as it stands: (address, length, flags, next).
    pub(crate) fn write_descriptor(&mut self, index: u16, raw: (u64, u32, u16, u16)) {
        let (address, length, flags, next) = raw;
        let descriptor = RawDescriptor::from(Descriptor::new(address, length, flags, next));
        let at = self.ring.queue.desc_table() + u64::from(index) * 16;
        self.mem.write_obj(descriptor, GuestAddress(at)).unwrap();
    }

    /// Adds a head to the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let ring = self.ring.queue.avail_ring();
        let index: u16 = self.mem.read_obj(GuestAddress(ring + 2)).unwrap();
        let slot = ring + 4 + u64::from(index % SIZE) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(index.wrapping_add(1));
    }

    /// Sets the index of the available ring.
    pub(crate) fn set_available(&mut self, index: u16) {
        let at = self.ring.queue.avail_ring() + 2;
        self.mem.write_obj(index, GuestAddress(at)).unwrap();
    }

    /// Used (head, length) so far.
    pub(crate) fn used(&self) -> Vec<(u32, u32)> {
        let ring = self.ring.queue.used_ring();
        let count: u16 = self.mem.read_obj(GuestAddress(ring + 2)).unwrap();
        (0..count)
            .map(|index| {
                let at = ring + 4 + u64::from(index % SIZE) * 8;
                let head = self.mem.read_obj(GuestAddress(at)).unwrap();
                let length = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
                (head, length)
            })
            .collect()
    }

    pub(crate) fn read(&self, address: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.mem
            .read_slice(&mut bytes, GuestAddress(address))
            .unwrap();
        bytes
    }

    pub(crate) fn write(&self, address: u64, bytes: &[u8]) {
        self.mem.write_slice(bytes, GuestAddress(address)).unwrap();
    }
}
