//! The rings of a split queue (virtio 1.2, 2.7), and who wakes whom when.
//!
//! Device and driver share two rings and never a lock. Each side publishes an index
//! and then looks whether the other wants to be woken; each says that it wants to,
//! and then looks at the other's index once more. The fences between the two steps
//! make it impossible that both miss the other: `races.rs` tries all orders.
//!
//! Reads each word once, and trusts none of them.

use std::sync::{
    Arc,
    atomic::{Ordering, fence},
};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// A word that both sides know.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Word {
    /// How many chains the driver has made available.
    Available,
    /// Up to where the driver is to make chains available before it notifies.
    AvailableEvent,
    /// How many chains the device has used.
    Used,
    /// Whether the driver is to notify at all, without the event index.
    UsedFlags,
    /// Up to where the device is to use chains before it interrupts.
    UsedEvent,
}

/// VIRTQ_USED_F_NO_NOTIFY.
const NO_NOTIFY: u16 = 1;

/// The driver broke the ring, or it does not lie in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Broken;

/// Where the rings are. An error says that they are not in memory.
pub(super) trait Rings {
    fn load(&self, word: Word, order: Ordering) -> Result<u16, Broken>;
    fn store(&self, word: Word, value: u16, order: Ordering) -> Result<(), Broken>;
    /// The head in this slot of the available ring.
    fn head(&self, slot: u16) -> Result<u16, Broken>;
    /// Fills this slot of the used ring.
    fn put(&self, slot: u16, head: u16, written: u32) -> Result<(), Broken>;
    /// A fence of all memory accesses.
    fn fence(&self);
}

/// Where a queue lies and how far the device has come with it: enough to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State {
    /// Entries, a power of two.
    pub size: u16,
    /// VIRTIO_F_EVENT_IDX is negotiated.
    pub event_index: bool,
    /// Guest-physical address of the descriptor table.
    pub descriptors: u64,
    /// The same of the driver's, the available ring.
    pub available: u64,
    /// The same of the device's, the used ring.
    pub used: u64,
    /// Chains taken so far, modulo 2^16.
    pub next_available: u16,
    /// Chains used so far, modulo 2^16.
    pub next_used: u16,
}

/// The device's half of a split queue.
#[derive(Debug)]
pub(super) struct Split<R> {
    rings: R,
    size: u16,
    event_index: bool,
    next_available: u16,
    next_used: u16,
    /// `next_used` when the driver's wish to be interrupted was last looked at.
    told: u16,
}

impl<R: Rings> Split<R> {
    pub(super) fn new(rings: R, state: &State) -> Split<R> {
        Split {
            rings,
            size: state.size,
            event_index: state.event_index,
            next_available: state.next_available,
            next_used: state.next_used,
            told: state.next_used,
        }
    }

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// Chains taken and used so far.
    pub(super) fn positions(&self) -> (u16, u16) {
        (self.next_available, self.next_used)
    }

    /// The head of the next available chain, if there is one.
    pub(super) fn take(&mut self) -> Result<Option<u16>, Broken> {
        // Acquire: what the driver wrote before is seen.
        if self.waiting(Ordering::Acquire)? == 0 {
            return Ok(None);
        }
        let head = self.rings.head(self.slot(self.next_available))?;
        if head >= self.size {
            return Err(Broken);
        }
        self.next_available = self.next_available.wrapping_add(1);
        Ok(Some(head))
    }

    /// Makes the chain that was taken last available again.
    pub(super) fn put_back(&mut self) {
        self.next_available = self.next_available.wrapping_sub(1);
    }

    /// Gives a chain back.
    pub(super) fn use_up(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.fill(head, written)?;
        self.publish()
    }

    /// Gives a chain back, which the driver does not see yet.
    pub(super) fn fill(&mut self, head: u16, written: u32) -> Result<(), Broken> {
        self.rings.put(self.slot(self.next_used), head, written)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Shows the driver all that went back.
    pub(super) fn publish(&mut self) -> Result<(), Broken> {
        // Release: the slots and the buffers are seen with it.
        self.rings
            .store(Word::Used, self.next_used, Ordering::Release)
    }

    /// Asks the driver not to notify. It may all the same.
    pub(super) fn silence(&mut self) -> Result<(), Broken> {
        // With the event index it notifies only where it was asked to.
        if self.event_index {
            return Ok(());
        }
        self.rings
            .store(Word::UsedFlags, NO_NOTIFY, Ordering::Relaxed)
    }

    /// Asks the driver to notify of the next chain. Whether there is one already:
    /// of that it may have seen no reason to notify.
    pub(super) fn listen(&mut self) -> Result<bool, Broken> {
        let (word, value) = if self.event_index {
            (Word::AvailableEvent, self.next_available)
        } else {
            (Word::UsedFlags, 0)
        };
        self.rings.store(word, value, Ordering::Relaxed)?;
        self.rings.fence();
        Ok(self.waiting(Ordering::Relaxed)? > 0)
    }

    /// Whether the driver wants an interrupt for what was used since the last call.
    pub(super) fn interrupts(&mut self) -> Result<bool, Broken> {
        let told = std::mem::replace(&mut self.told, self.next_used);
        if told == self.next_used {
            return Ok(false);
        }
        // The flag by which a driver without the event index can ask for none is
        // only a hint (2.7.7.1).
        if !self.event_index {
            return Ok(true);
        }
        self.rings.fence();
        let wanted = self.rings.load(Word::UsedEvent, Ordering::Relaxed)?;
        // 2.7.7.2: whether the entry that it waits for is among the new ones.
        let new = self.next_used.wrapping_sub(told);
        let behind = self.next_used.wrapping_sub(wanted).wrapping_sub(1);
        Ok(behind < new)
    }

    /// How many chains are available: at most as many as there are entries.
    fn waiting(&self, order: Ordering) -> Result<u16, Broken> {
        let index = self.rings.load(Word::Available, order)?;
        let waiting = index.wrapping_sub(self.next_available);
        if waiting > self.size {
            return Err(Broken);
        }
        Ok(waiting)
    }

    fn slot(&self, position: u16) -> u16 {
        position.checked_rem(self.size).unwrap_or(0)
    }
}

/// Rings in guest memory.
#[derive(Debug)]
pub(super) struct InMemory {
    mem: Arc<GuestMemoryMmap>,
    available: u64,
    used: u64,
    size: u64,
}

impl InMemory {
    pub(super) fn new(mem: Arc<GuestMemoryMmap>, state: &State) -> InMemory {
        InMemory {
            mem,
            available: state.available,
            used: state.used,
            size: state.size.into(),
        }
    }

    /// 2.7.6, 2.7.8: flags, index, entries, event.
    fn address(&self, word: Word) -> Result<GuestAddress, Broken> {
        let (ring, offset) = match word {
            Word::Available => (self.available, Some(2)),
            Word::UsedEvent => (self.available, self.size.checked_mul(2)),
            Word::UsedFlags => (self.used, Some(0)),
            Word::Used => (self.used, Some(2)),
            Word::AvailableEvent => (self.used, self.size.checked_mul(8)),
        };
        let behind = match word {
            Word::UsedEvent | Word::AvailableEvent => 4,
            _ => 0,
        };
        offset
            .and_then(|offset| offset.checked_add(behind))
            .and_then(|offset| ring.checked_add(offset))
            .map(GuestAddress)
            .ok_or(Broken)
    }

    /// Entry `slot` of a ring at `ring` with entries of `len` bytes.
    fn entry(ring: u64, slot: u16, len: u64) -> Result<GuestAddress, Broken> {
        u64::from(slot)
            .checked_mul(len)
            .and_then(|offset| offset.checked_add(4))
            .and_then(|offset| ring.checked_add(offset))
            .map(GuestAddress)
            .ok_or(Broken)
    }
}

impl Rings for InMemory {
    fn load(&self, word: Word, order: Ordering) -> Result<u16, Broken> {
        let value = self.mem.load(self.address(word)?, order);
        value.map(u16::from_le).map_err(|_| Broken)
    }

    fn store(&self, word: Word, value: u16, order: Ordering) -> Result<(), Broken> {
        let stored = self.mem.store(value.to_le(), self.address(word)?, order);
        stored.map_err(|_| Broken)
    }

    fn head(&self, slot: u16) -> Result<u16, Broken> {
        let at = InMemory::entry(self.available, slot, 2)?;
        let head = self.mem.load(at, Ordering::Relaxed);
        head.map(u16::from_le).map_err(|_| Broken)
    }

    fn put(&self, slot: u16, head: u16, written: u32) -> Result<(), Broken> {
        let at = InMemory::entry(self.used, slot, 8)?;
        let entry = [u32::from(head).to_le(), written.to_le()];
        self.mem.write_obj(entry, at).map_err(|_| Broken)
    }

    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}
