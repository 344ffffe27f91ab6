//! The entropy device (virtio 1.2, 5.4): fills buffers from the host's pool.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::{
    io::{self, Write},
    sync::Arc,
};

use rustix::rand::{GetRandomFlags, getrandom};
use virtio_queue::DescriptorChain;
use vm_memory::GuestMemoryMmap;

use super::{
    Device, Io, Worker,
    queue::{Chain, Ring},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Watch, event_fd};

/// Most bytes given for one buffer, however long it is.
const LARGEST: usize = 64 << 10;

/// The device.
#[derive(Debug)]
pub struct Rng {
    events: Arc<EventLoop>,
}

impl Rng {
    /// A device served by `events`.
    #[must_use]
    pub fn new(events: Arc<EventLoop>) -> Rng {
        Rng { events }
    }
}

impl Device for Rng {
    fn id(&self) -> u32 {
        4
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64]
    }

    fn activate(&mut self, mut io: Io) -> io::Result<Box<dyn Worker>> {
        let ring = io.take(0);
        let registration = self.events.add(|watch| {
            if let Some(ring) = &ring {
                watch.add(event_fd(&ring.notify), 0, EventFlags::IN)?;
            }
            Ok(Server { ring })
        })?;
        Ok(Box::new(registration))
    }
}

struct Server {
    ring: Option<Ring>,
}

impl Handler for Server {
    fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        if let Some(ring) = &mut self.ring {
            ring.notify.read()?;
            let mem = ring.mem.clone();
            ring.drain(|chain| Chain::Used(fill(chain, &mem)));
        }
        Ok(())
    }
}

/// Fills the chain's writable part; returns the number of bytes written.
fn fill(chain: DescriptorChain<&GuestMemoryMmap>, mem: &GuestMemoryMmap) -> u32 {
    let Ok(mut writer) = chain.writer(mem) else {
        return 0;
    };
    let mut left = writer.available_bytes().min(LARGEST);
    let mut written = 0u32;
    let mut random = [0; 512];
    while left > 0 {
        let (part, _) = random.split_at_mut(left.min(512));
        // The pool of a running host is ready and never asks to try again.
        let Ok(count) = getrandom(&mut *part, GetRandomFlags::empty()) else {
            break;
        };
        let (part, _) = part.split_at(count);
        if count == 0 || writer.write_all(part).is_err() {
            break;
        }
        left = left.saturating_sub(count);
        written = written.saturating_add(u32::try_from(count).unwrap_or(0));
    }
    written
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    fn filled(descriptors: &[(u64, u32, u16)]) -> (Guest, u32) {
        let mut guest = Guest::new();
        guest.offer(descriptors);
        let mem = guest.mem.clone();
        guest.ring.drain(|chain| Chain::Used(fill(chain, &mem)));
        let used = guest.used();
        assert_eq!(used.len(), 1, "each chain is returned once");
        (guest, used[0].1)
    }

    #[test]
    fn a_buffer_is_filled() {
        let (guest, written) = filled(&[(0x1_0000, 1000, WRITE)]);
        assert_eq!(written, 1000);
        assert!(guest.read(0x1_0000, 1000).iter().any(|byte| *byte != 0));
        assert!(guest.read(0x1_0000 + 1000, 100).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_large_buffer_gets_64_kib_b52() {
        assert_eq!(filled(&[(0x1_0000, 0x10_0000, WRITE)]).1, 64 << 10);
    }

    #[test]
    fn what_cannot_be_written_is_returned_empty_b44_b45() {
        for descriptor in [
            (0x1_0000, 100, READ),
            (0x1_0000, 0, WRITE),
            (0x1_0000, u32::MAX, WRITE),
            (0xffff_ffff_ffff_f000, 0x2000, WRITE),
            (0x1_0000_0000, 16, WRITE),
        ] {
            assert_eq!(filled(&[descriptor]).1, 0, "{descriptor:x?}");
        }
    }
}
