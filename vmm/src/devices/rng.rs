//! The entropy device (virtio 1.2, 5.4): fills buffers from the host's pool, with
//! [`RATE`] bytes in a second at most. What is asked for beyond that waits.
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
    io,
    os::fd::OwnedFd,
    sync::Arc,
    time::{Duration, Instant},
};

use rustix::{
    rand::{GetRandomFlags, getrandom},
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};

use super::{
    Device, Io, Worker,
    queue::{Chain, Ring, Served, State},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched};

/// Most bytes given for one buffer, however long it is, and most given at once.
const LARGEST: usize = 64 << 10;

/// Bytes in a second: a hundred times what a guest's own generator asks for.
const RATE: usize = 1 << 20;

/// Bytes taken from the pool at once.
const PART: usize = 16 << 10;

const REQUESTS: u32 = 0;
const TIMER: u32 = 1;

/// The device.
#[derive(Debug)]
pub struct Rng {
    events: Arc<EventLoop>,
    timer: Arc<OwnedFd>,
}

impl Rng {
    /// A device served by `events`.
    pub fn new(events: Arc<EventLoop>) -> io::Result<Rng> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer = Arc::new(timerfd_create(TimerfdClockId::Monotonic, flags)?);
        Ok(Rng { events, timer })
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
        let timer = Arc::clone(&self.timer);
        let registration = self.events.add(|watch| {
            if let Some(ring) = &mut ring {
                ring.watch(watch, REQUESTS)?;
            }
            Ok(Server {
                ring,
                timer: watch.add(timer, TIMER, EventFlags::IN)?,
                allowance: Allowance::new(Instant::now()),
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
    timer: Watched<Arc<OwnedFd>>,
    allowance: Allowance,
}

impl Handler for Server {
    fn ready(&mut self, token: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        let Some(ring) = &mut self.ring else {
            return Ok(());
        };
        match token {
            REQUESTS => ring.acknowledge(),
            // Fails only if it was read already.
            _ => drop(rustix::io::read(&self.timer, &mut [0; 8])),
        }
        self.allowance.grow(Instant::now());
        let mut waits = false;
        ring.turn(|chain| {
            let len = chain.writable_len().min(LARGEST);
            waits = !self.allowance.take(len);
            if waits {
                return Served::Kept;
            }
            Served::Used(fill(chain, len))
        });
        if waits {
            let when = Itimerspec {
                it_interval: Timespec::default(),
                it_value: Timespec::try_from(FULL).map_err(io::Error::other)?,
            };
            timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &when)?;
        }
        Ok(())
    }
}

/// After this time there is as much again as is ever given at once.
const FULL: Duration = Duration::from_nanos(1_000_000_000 / (RATE / LARGEST) as u64);

/// How many bytes may be given now.
struct Allowance {
    bytes: usize,
    since: Instant,
}

impl Allowance {
    fn new(now: Instant) -> Allowance {
        Allowance {
            bytes: LARGEST,
            since: now,
        }
    }

    fn grow(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.since).min(FULL);
        let more = passed.as_nanos().saturating_mul(RATE as u128) / 1_000_000_000;
        if let Ok(more @ 1..) = usize::try_from(more) {
            self.bytes = self.bytes.saturating_add(more).min(LARGEST);
            self.since = now;
        }
    }

    /// Takes `count` bytes, at most [`LARGEST`]; whether there were so many.
    fn take(&mut self, count: usize) -> bool {
        let left = self.bytes.checked_sub(count);
        self.bytes = left.unwrap_or(self.bytes);
        left.is_some()
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
        let (mut driver, events, worker) = started(&[(0x1_0000, 0xc000, WRITE); 3]);
        let started = Instant::now();
        events.turn().unwrap();
        assert_eq!(driver.all_used(), [(0, 0xc000)]);
        for head in 1..3 {
            assert!(!events.is_ready(), "without the timer nothing happens");
            // Waits for it.
            events.turn().unwrap();
            assert_eq!(driver.all_used(), [(head, 0xc000)]);
        }
        // 144 KiB, of which 64 were there.
        assert!(started.elapsed() >= Duration::from_millis(78));
        drop(worker);
        assert!(!events.is_ready());
    }

    #[test]
    fn the_allowance_grows_with_time_and_to_its_limit_only_b52() {
        let start = Instant::now();
        let mut allowance = Allowance::new(start);
        assert!(!allowance.take(LARGEST + 1));
        assert!(allowance.take(LARGEST));
        assert!(allowance.take(0) && !allowance.take(1));
        // Too short for a byte, again and again, makes a byte in the end.
        for micros in 1..=1000 {
            allowance.grow(start + Duration::from_nanos(micros * 500));
        }
        let bytes = allowance.bytes;
        assert!((500..=524).contains(&bytes), "{bytes}");
        allowance.grow(start + Duration::from_secs(3600));
        assert_eq!(allowance.bytes, LARGEST);
        // A clock that goes back gives nothing.
        assert!(allowance.take(LARGEST));
        allowance.grow(start);
        assert_eq!(allowance.bytes, 0);
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
