//! Serving a queue, whatever the driver has put into it.
//!
//! A chain that is taken is returned exactly once. One turn takes at most as many
//! as the queue is long, so that no queue keeps a thread for itself.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{Interrupt, Io};

/// What became of a descriptor chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chain {
    /// Used, with this many bytes written to it. A malformed chain is used with 0.
    Used(u32),
    /// It stays available; no further one is looked at.
    Kept,
}

/// A queue that is being served, and what goes with it.
#[derive(Debug)]
pub struct Ring {
    /// The queue.
    pub queue: Queue,
    /// Signalled when the driver made buffers available.
    pub notify: EventFd,
    /// How the driver is told of used ones.
    pub interrupt: Interrupt,
    /// All of the guest's memory.
    pub mem: GuestMemoryMmap,
}

impl Ring {
    /// Hands available chains to `serve`, at most as many as the queue is long:
    /// if there are more, the queue's own event is signalled for another turn.
    /// Each chain that `serve` uses is returned exactly once.
    pub fn drain(&mut self, mut serve: impl FnMut(DescriptorChain<&GuestMemoryMmap>) -> Chain) {
        let mem = &self.mem;
        let mut left = self.queue.size();
        let mut used_any = false;
        let mut promised = false;
        'available: loop {
            let before = left;
            // Errors mean rings outside RAM, which was checked at activation.
            let _ = self.queue.disable_notification(mem);
            while left > 0 {
                let Some(chain) = self.queue.pop_descriptor_chain(mem) else {
                    break;
                };
                let head = chain.head_index();
                match serve(chain) {
                    Chain::Used(written) => {
                        used_any |= self.queue.add_used(mem, head, written).is_ok();
                        left = left.saturating_sub(1);
                    }
                    Chain::Kept => {
                        self.queue.go_to_previous_position();
                        let _ = self.queue.enable_notification(mem);
                        break 'available;
                    }
                }
            }
            let more = self.queue.enable_notification(mem).unwrap_or(false);
            if more && left == 0 {
                // A counter that overflows is a signal as well.
                let _ = self.notify.write(1);
            }
            // An index that jumped promises chains and gives none.
            if !more || left == 0 || promised && left == before {
                break;
            }
            promised = more;
        }
        if used_any && self.queue.needs_notification(mem).unwrap_or(true) {
            self.interrupt.used_buffer();
        }
    }
}

impl Io {
    /// Takes queue `index`, if the driver made it ready.
    pub fn take(&mut self, index: usize) -> Option<Ring> {
        let (queue, notify) = self.queues.get_mut(index)?.take()?;
        Some(Ring {
            queue,
            notify,
            interrupt: self.interrupt.clone(),
            mem: self.mem.clone(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    /// Heads and numbers of descriptors of the chains that come out.
    fn drained(guest: &mut Guest) -> Vec<(u16, usize)> {
        let mut seen = Vec::new();
        guest.ring.drain(|chain| {
            let head = chain.head_index();
            seen.push((head, chain.count()));
            Chain::Used(0)
        });
        seen
    }

    const NEXT: u16 = 1;
    const INDIRECT: u16 = 4;

    #[test]
    fn loops_and_strange_successors_end_and_come_back_once_b43() {
        // (flags, next) of descriptor 0 and 1, and the descriptors seen.
        for (raw, seen) in [
            // Itself.
            ([(NEXT, 0), (0, 0)], 16),
            // Each other.
            ([(NEXT, 1), (NEXT, 0)], 16),
            // Beyond the table.
            ([(NEXT, 16), (0, 0)], 1),
            ([(NEXT, u16::MAX), (0, 0)], 1),
            // Indirect: with a successor, of no or of odd length.
            ([(INDIRECT | NEXT, 1), (0, 0)], 0),
            ([(INDIRECT, 0), (0, 0)], 0),
        ] {
            let mut guest = Guest::new();
            for (index, (flags, next)) in (0..).zip(raw) {
                let length = if flags & INDIRECT == 0 { 16 } else { 17 };
                guest.write_descriptor(index, (0x1_0000, length, flags, next));
            }
            guest.make_available(0);
            let chains = drained(&mut guest);
            assert_eq!(chains.len(), 1, "{raw:?}");
            assert!(chains[0].1 <= seen, "{raw:?}: {chains:?}");
            assert_eq!(guest.used(), [(0, 0)]);
            // Alive: the next one is served.
            guest.write_descriptor(2, (0x1_0000, 16, WRITE, 0));
            guest.make_available(2);
            assert_eq!(drained(&mut guest), [(2, 1)]);
        }
    }

    #[test]
    fn an_indirect_table_may_not_lead_to_another_b43() {
        let mut guest = Guest::new();
        guest.write_descriptor(0, (0x1_0000, 32, INDIRECT, 0));
        let mut table = [0; 32];
        table[..8].copy_from_slice(&0x1_0000u64.to_le_bytes());
        table[8] = 32;
        table[12] = u8::try_from(INDIRECT).unwrap();
        guest.write(0x1_0000, &table);
        guest.make_available(0);
        assert_eq!(drained(&mut guest).len(), 1);
        assert_eq!(guest.used(), [(0, 0)]);
    }

    #[test]
    fn a_head_beyond_the_table_is_not_used() {
        let mut guest = Guest::new();
        guest.make_available(16);
        guest.make_available(u16::MAX);
        drained(&mut guest);
        assert!(guest.used().is_empty());
    }

    #[test]
    fn an_index_that_jumps_stops_the_queue_and_nothing_else_b46() {
        let mut guest = Guest::new();
        guest.offer(&[(0x1_0000, 16, READ)]);
        guest.set_available(18);
        assert!(drained(&mut guest).is_empty());
        guest.set_available(1);
        assert_eq!(drained(&mut guest), [(0, 1)]);
        // Backwards is a jump as well.
        guest.set_available(0);
        assert!(drained(&mut guest).is_empty());
    }

    #[test]
    fn one_turn_serves_no_more_than_the_queue_is_long_b46() {
        let mut guest = Guest::new();
        guest.offer(&[(0x1_0000, 16, READ)]);
        let (mem, at) = (guest.mem.clone(), guest.ring.queue.avail_ring() + 2);
        let mut served = 0u16;
        guest.ring.drain(|_| {
            served += 1;
            // Another processor makes the same chain available again and again.
            let index = vm_memory::GuestAddress(at);
            vm_memory::Bytes::write_obj(&mem, served + 1, index).unwrap();
            Chain::Used(0)
        });
        assert_eq!(served, 16);
        assert_eq!(guest.ring.notify.read().unwrap(), 1, "another turn is due");
    }

    #[test]
    fn a_kept_chain_comes_again() {
        let mut guest = Guest::new();
        guest.offer(&[(0x1_0000, 16, READ)]);
        guest.ring.drain(|_| Chain::Kept);
        assert!(guest.used().is_empty());
        assert!(guest.irq.read().is_err(), "nothing to tell");
        assert_eq!(drained(&mut guest), [(0, 1)]);
        assert_eq!(guest.irq.read().unwrap(), 1);
    }
}
