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

use std::{io, sync::Arc};

use rustix::rand::{GetRandomFlags, getrandom};

use virtio_queue::QueueState;

use super::{
    Device, Io, Worker,
    queue::{Chain, Ring, Served},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch};

/// Most bytes given for one buffer, however long it is.
const LARGEST: usize = 64 << 10;

/// Bytes taken from the pool at once.
const PART: usize = 16 << 10;

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
        let mut ring = io.take(0);
        let registration = self.events.add(|watch| {
            if let Some(ring) = &mut ring {
                ring.watch(watch, 0)?;
            }
            Ok(Server { ring })
        })?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<QueueState>> {
        let server = Registration::stop(*self);
        vec![server.and_then(|server| server.ring.map(Ring::into_state))]
    }
}

struct Server {
    ring: Option<Ring>,
}

impl Handler for Server {
    fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        if let Some(ring) = &mut self.ring {
            ring.acknowledge();
            ring.turn(|chain| Served::Used(fill(chain)));
        }
        Ok(())
    }
}

/// Fills the chain's writable part; returns the number of bytes written.
fn fill(chain: &Chain) -> usize {
    let mut writer = chain.writer().split(LARGEST);
    let mut random = [0; PART];
    while !writer.is_empty() {
        let (part, _) = random.split_at_mut(writer.len().min(PART));
        // The pool of a running host is ready and never asks to try again.
        match getrandom(&mut *part, GetRandomFlags::empty()) {
            Ok(count @ 1..) => writer.write(part.split_at(count).0),
            Ok(0) | Err(_) => break,
        };
    }
    writer.written()
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    fn filled(descriptors: &[(u64, u32, u16)]) -> (Guest, u32) {
        let mut guest = Guest::new();
        guest.driver.offer(descriptors);
        guest.ring.turn(|chain| Served::Used(fill(chain)));
        let used = guest.driver.all_used();
        assert_eq!(used.len(), 1, "each chain is returned once");
        (guest, used[0].1)
    }

    #[test]
    fn a_buffer_is_filled() {
        let (guest, written) = filled(&[(0x1_0000, 1000, WRITE)]);
        assert_eq!(written, 1000);
        assert!(
            guest
                .driver
                .read(0x1_0000, 1000)
                .iter()
                .any(|byte| *byte != 0)
        );
        assert!(
            guest
                .driver
                .read(0x1_0000 + 1000, 100)
                .iter()
                .all(|b| *b == 0)
        );
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
