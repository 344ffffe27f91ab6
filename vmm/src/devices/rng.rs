//! The entropy device (virtio 1.2, 5.4): fills buffers from the host's pool, with
//! 1 MiB in a second at most. What is asked for beyond that waits.
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

use super::{
    Device, Io, Worker,
    limit::{Limit, Limiter, Rate},
    queue::{Chain, Ring, Served, State},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched};

/// Most bytes given for one buffer, however long it is.
const LARGEST: usize = 64 << 10;

/// What is given: a hundred times what a guest's own generator asks for.
const LIMIT: Limit = Limit {
    bytes: Rate {
        per_second: 1 << 20,
        burst: LARGEST as u64,
    },
    operations: Rate {
        per_second: 0,
        burst: 0,
    },
};

/// Bytes taken from the pool at once.
const PART: usize = 16 << 10;

const REQUESTS: u32 = 0;
const TIMER: u32 = 1;

/// The device.
#[derive(Debug)]
pub struct Rng {
    events: Arc<EventLoop>,
    limiter: Arc<Limiter>,
}

impl Rng {
    /// A device served by `events`.
    pub fn new(events: Arc<EventLoop>) -> io::Result<Rng> {
        let limiter = Arc::new(Limiter::new()?);
        limiter.set(LIMIT);
        Ok(Rng { events, limiter })
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
        let limiter = Arc::clone(&self.limiter);
        let registration = self.events.add(|watch| {
            if let Some(ring) = &mut ring {
                ring.watch(watch, REQUESTS)?;
            }
            Ok(Server {
                ring,
                limiter: watch.add(limiter, TIMER, EventFlags::IN)?,
            })
        })?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        let server = Registration::stop(*self);
        vec![server.and_then(|server| server.ring.map(Ring::into_state))]
    }
}

struct Server {
    ring: Option<Ring>,
    limiter: Watched<Arc<Limiter>>,
}

impl Handler for Server {
    fn ready(&mut self, token: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        if token == TIMER {
            self.limiter.acknowledge();
        }
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        ring.acknowledge();
        ring.turn(|chain| {
            let len = chain.writable_len().min(LARGEST);
            if !self.limiter.allows(len) {
                return Served::Kept;
            }
            self.limiter.spend(len);
            Served::Used(fill(chain, len))
        });
        Ok(())
    }
}

/// Fills the first `len` bytes of the chain's writable part; returns the number of
/// bytes written.
fn fill(chain: &Chain, len: usize) -> usize {
    let mut writer = chain.writer().split(len);
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
    use std::time::{Duration, Instant};

    use super::super::testing::{Driver, Guest, READ, WRITE};
    use super::*;

    /// A guest's queue, served by a device on a loop without a thread.
    fn started(descriptors: &[(u64, u32, u16)]) -> (Driver, Arc<EventLoop>, Box<dyn Worker>) {
        let mut guest = Guest::new();
        for descriptor in descriptors {
            guest.driver.offer(&[*descriptor]);
        }
        let events = EventLoop::new("test").unwrap();
        let io = Io {
            queues: vec![Some(guest.ring)],
            features: 0,
        };
        let worker = Rng::new(Arc::clone(&events)).unwrap().activate(io).unwrap();
        (guest.driver, events, worker)
    }

    fn filled(descriptor: (u64, u32, u16)) -> (Driver, u32) {
        let (mut driver, events, _worker) = started(&[descriptor]);
        events.turn().unwrap();
        let used = driver.all_used();
        assert_eq!(used.len(), 1, "each chain is returned once");
        (driver, used[0].1)
    }

    #[test]
    fn a_buffer_is_filled() {
        let (driver, written) = filled((0x1_0000, 1000, WRITE));
        assert_eq!(written, 1000);
        assert!(driver.read(0x1_0000, 1000).iter().any(|byte| *byte != 0));
        assert!(driver.read(0x1_0000 + 1000, 100).iter().all(|b| *b == 0));
    }

    #[test]
    fn a_large_buffer_gets_64_kib_b52() {
        assert_eq!(filled((0x1_0000, 0x10_0000, WRITE)).1, 64 << 10);
    }

    #[test]
    fn who_asks_for_more_than_the_rate_waits_b52() {
        let (mut driver, events, worker) = started(&[(0x1_0000, 0x1_0000, WRITE); 3]);
        let started = Instant::now();
        events.turn().unwrap();
        assert_eq!(driver.all_used(), [(0, 0x1_0000)]);
        for head in 1..3 {
            assert!(!events.is_ready(), "without the timer nothing happens");
            // Waits for it.
            events.turn().unwrap();
            assert_eq!(driver.all_used(), [(head, 0x1_0000)]);
        }
        // 192 KiB, of which 64 were there.
        assert!(started.elapsed() >= Duration::from_millis(125));
        drop(worker);
        assert!(!events.is_ready());
    }

    #[test]
    fn a_reset_gives_nothing_more_b52() {
        let events = EventLoop::new("test").unwrap();
        let mut rng = Rng::new(Arc::clone(&events)).unwrap();
        // What a minute brings.
        rng.limiter.spend(60 << 20);
        for _ in 0..5 {
            let mut guest = Guest::new();
            guest.driver.offer(&[(0x1_0000, 1, WRITE)]);
            let io = Io {
                queues: vec![Some(guest.ring)],
                features: 0,
            };
            let worker = rng.activate(io).unwrap();
            events.turn().unwrap();
            assert_eq!(guest.driver.used(), None);
            drop(worker);
        }
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
            assert_eq!(filled(descriptor).1, 0, "{descriptor:x?}");
        }
    }
}
