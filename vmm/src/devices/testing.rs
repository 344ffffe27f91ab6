//! The driver's half of a queue in ordinary memory, for tests of devices.

use std::sync::{Arc, atomic::Ordering};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap, MmapRegion};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{
    Interrupt,
    queue::{Ring, State},
};
use crate::mmio::{PAGE, Registers};

/// Flags of a descriptor (virtio 1.2, 2.7.5).
pub(crate) const READ: u16 = 0;
pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

/// Descriptors of a queue, if a test does not say.
pub(crate) const SIZE: u16 = 64;

/// Memory of a guest, from 0 on.
pub(crate) fn memory(bytes: usize) -> Arc<GuestMemoryMmap> {
    Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), bytes)]).unwrap())
}

/// A device's line to its driver, with registers that nobody looks at.
pub(crate) fn interrupt(irq: &Arc<EventFd>) -> Interrupt {
    let page = Registers::new(Arc::new(MmapRegion::new(PAGE).unwrap()), 0);
    Interrupt::new(Arc::clone(irq), page)
}

/// A queue in guest memory as its driver has it: descriptors at `base`, the
/// available ring 0x1000 behind it, the used ring 0x2000, and behind 0x3000 a
/// buffer for each descriptor.
pub(crate) struct Driver {
    pub(crate) mem: Arc<GuestMemoryMmap>,
    pub(crate) base: u64,
    pub(crate) size: u16,
    pub(crate) buffer_len: u32,
    /// VIRTIO_F_EVENT_IDX is negotiated.
    pub(crate) event_index: bool,
    /// What the device waits for.
    pub(crate) event: EventFd,
    next: u16,
    available: u16,
    seen: u16,
}

impl Driver {
    /// A queue at `base`, with buffers of this length each.
    pub(crate) fn new(mem: &Arc<GuestMemoryMmap>, base: u64, buffer_len: u32) -> Driver {
        Driver::with_size(mem, base, buffer_len, SIZE)
    }

    pub(crate) fn with_size(
        mem: &Arc<GuestMemoryMmap>,
        base: u64,
        buffer_len: u32,
        size: u16,
    ) -> Driver {
        Driver {
            mem: Arc::clone(mem),
            base,
            size,
            buffer_len,
            event_index: false,
            event: EventFd::new(EFD_NONBLOCK).unwrap(),
            next: 0,
            available: 0,
            seen: 0,
        }
    }

    /// The device's half, as the transport makes it.
    pub(crate) fn ring(&self, interrupt: Interrupt) -> Ring {
        let state = State {
            size: self.size,
            event_index: self.event_index,
            descriptors: self.base,
            available: self.available_ring(),
            used: self.used_ring(),
            next_available: 0,
            next_used: 0,
        };
        let event = self.event.try_clone().unwrap();
        Ring::new(state, Arc::clone(&self.mem).into(), event, interrupt)
    }

    pub(crate) fn available_ring(&self) -> u64 {
        self.base + 0x1000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base + 0x2000
    }

    /// Where the buffer of a descriptor is.
    pub(crate) fn buffer(&self, index: u16) -> GuestAddress {
        GuestAddress(self.base + 0x3000 + u64::from(index) * u64::from(self.buffer_len))
    }

    /// Writes a descriptor as it stands: (address, length, flags, next).
    pub(crate) fn write_descriptor(&self, index: u16, raw: (u64, u32, u16, u16)) {
        let at = self.base + u64::from(index) * 16;
        self.write(at, &descriptor(raw));
    }

    /// Fills a descriptor for the first `len` bytes of its buffer; the one that
    /// may follow is the next in number.
    pub(crate) fn describe(&self, index: u16, len: u32, flags: u16) {
        self.write_descriptor(index, (self.buffer(index).0, len, flags, index + 1));
    }

    /// Adds a head to the available ring.
    pub(crate) fn make_available(&mut self, head: u16) {
        let slot = self.available_ring() + 4 + u64::from(self.available % self.size) * 2;
        self.mem.write_obj(head, GuestAddress(slot)).unwrap();
        self.set_available(self.available.wrapping_add(1));
    }

    /// Sets the index of the available ring.
    pub(crate) fn set_available(&mut self, index: u16) {
        self.available = index;
        let at = GuestAddress(self.available_ring() + 2);
        self.mem.store(index, at, Ordering::Release).unwrap();
    }

    /// Makes one chain of (address, length, flags) available, of descriptors that
    /// were not used before; its head.
    pub(crate) fn offer(&mut self, descriptors: &[(u64, u32, u16)]) -> u16 {
        let head = self.next;
        for (index, (address, length, flags)) in (head..).zip(descriptors) {
            let last = usize::from(index - head) + 1 == descriptors.len();
            let next = if last { 0 } else { NEXT };
            self.write_descriptor(index, (*address, *length, flags | next, index + 1));
        }
        self.next += u16::try_from(descriptors.len()).unwrap();
        self.make_available(head);
        head
    }

    /// Notifies the device.
    pub(crate) fn notify(&self) {
        self.event.write(1).unwrap();
    }

    /// The next used chain: its head and how many bytes the device wrote.
    pub(crate) fn used(&mut self) -> Option<(u16, u32)> {
        let at = GuestAddress(self.used_ring() + 2);
        let now: u16 = self.mem.load(at, Ordering::Acquire).unwrap();
        if now == self.seen {
            return None;
        }
        let at = self.used_ring() + 4 + u64::from(self.seen % self.size) * 8;
        self.seen = self.seen.wrapping_add(1);
        let head: u32 = self.mem.read_obj(GuestAddress(at)).unwrap();
        let len = self.mem.read_obj(GuestAddress(at + 4)).unwrap();
        Some((u16::try_from(head).unwrap(), len))
    }

    /// All that was used since the last look.
    pub(crate) fn all_used(&mut self) -> Vec<(u16, u32)> {
        std::iter::from_fn(|| self.used()).collect()
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

/// A descriptor in its form: (address, length, flags, next).
pub(crate) fn descriptor(raw: (u64, u32, u16, u16)) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&raw.0.to_le_bytes());
    bytes[8..12].copy_from_slice(&raw.1.to_le_bytes());
    bytes[12..14].copy_from_slice(&raw.2.to_le_bytes());
    bytes[14..].copy_from_slice(&raw.3.to_le_bytes());
    bytes
}

/// Both halves of one queue of 16 descriptors in 2 MiB of memory.
pub(crate) struct Guest {
    pub(crate) driver: Driver,
    pub(crate) ring: Ring,
    pub(crate) irq: Arc<EventFd>,
}

impl Guest {
    pub(crate) fn new() -> Guest {
        let driver = Driver::with_size(&memory(2 << 20), 0x1000, 0x1000, 16);
        let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let ring = driver.ring(interrupt(&irq));
        Guest { driver, ring, irq }
    }
}
