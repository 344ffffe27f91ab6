//! How much a device may do: so many bytes and so many operations in a second.
//!
//! A [`Limiter`] belongs to a device, not to what runs while its driver does: a reset
//! gives the guest nothing more. The device asks it before each operation and tells it
//! afterwards what that took; who is refused leaves the operation where it is, and is
//! woken by the limiter's timer when there is enough for it. So nothing is dropped, and
//! nothing passes another.
//!
//! An operation that is larger than the burst passes when as much as that is there, and
//! those after it wait the longer.
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
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde::{Deserialize, Serialize};

/// What may pass, of one thing that is counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rate {
    /// In a second. 0 is no limit.
    #[serde(default)]
    pub per_second: u64,
    /// At once, after a pause. 0 is as much as in a second.
    #[serde(default)]
    pub burst: u64,
}

/// What may pass in one direction, or of a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limit {
    /// Bytes of data.
    #[serde(default)]
    pub bytes: Rate,
    /// A disk's requests, or frames. A frame that is to be cut into segments is one.
    #[serde(default)]
    pub operations: Rate,
}

/// The limits of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Limits {
    /// Of a disk: all of its requests together.
    Disk(Limit),
    /// Of a network interface.
    Interface {
        /// What the guest receives.
        #[serde(default)]
        receive: Limit,
        /// What the guest sends.
        #[serde(default)]
        transmit: Limit,
    },
}

impl Limit {
    /// What makes no sense of it, if something does: how a sentence about the device
    /// goes on.
    #[must_use]
    pub fn fault(&self) -> Option<String> {
        [(self.bytes, "bytes"), (self.operations, "operations")]
            .into_iter()
            .find(|(rate, _)| rate.per_second == 0 && rate.burst > 0)
            .map(|(Rate { burst, .. }, what)| {
                format!("cannot have a burst of {burst} {what} without a rate")
            })
    }
}

/// The least time after which one that waits is woken, unless its burst is smaller than
/// what that adds: else a high rate would have it woken for each operation.
const PAUSE: Duration = Duration::from_millis(1);

/// How soon one that waits is woken when the limit changes.
const AT_ONCE: Duration = Duration::from_nanos(1);

/// What may pass of one thing that is counted, in billionths of it: so a nanosecond adds
/// a whole number of them, and nothing is ever rounded away.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    per_second: u128,
    /// What it holds when it is full.
    size: u128,
    /// What is missing until it is full. More than the size after something large.
    missing: u128,
    /// Up to when it was filled.
    since: Instant,
}

fn billionths(count: u64) -> u128 {
    u128::from(count).saturating_mul(1_000_000_000)
}

impl Bucket {
    /// A full one; `None` without a limit.
    fn new(rate: Rate, now: Instant) -> Option<Bucket> {
        let Rate { per_second, burst } = rate;
        let size = if burst == 0 { per_second } else { burst };
        (per_second > 0).then(|| Bucket {
            per_second: per_second.into(),
            size: billionths(size),
            missing: 0,
            since: now,
        })
    }

    /// How long it is until `count` may pass; `None` if that is now.
    fn wait(&mut self, count: u64, now: Instant) -> Option<Duration> {
        self.fill(now);
        // What is larger passes when the bucket is full.
        let needed = billionths(count).min(self.size);
        if self.missing.saturating_add(needed) <= self.size {
            return None;
        }
        let pause = PAUSE.as_nanos().saturating_mul(self.per_second);
        let wanted = needed.max(pause.min(self.size));
        let lacks = self.missing.saturating_add(wanted);
        let lacks = lacks.saturating_sub(self.size);
        // It is not 0: without a rate there is no bucket.
        let nanos = lacks.div_ceil(self.per_second);
        let nanos = u64::try_from(nanos).unwrap_or(u64::MAX);
        Some(Duration::from_nanos(nanos))
    }

    fn fill(&mut self, now: Instant) {
        // A clock that goes back adds nothing.
        let passed = now.saturating_duration_since(self.since).as_nanos();
        let more = passed.saturating_mul(self.per_second);
        self.missing = self.missing.saturating_sub(more);
        self.since = self.since.max(now);
    }

    fn spend(&mut self, count: u64) {
        self.missing = self.missing.saturating_add(billionths(count));
    }
}

/// A limit, what is left of it, and how long it held the device back.
#[derive(Debug, Default)]
struct State {
    limit: Limit,
    bytes: Option<Bucket>,
    operations: Option<Bucket>,
    /// Since when an operation waits, if one does.
    waits_since: Option<Instant>,
    /// How long others have waited.
    waited: Duration,
}

impl State {
    /// Begins anew, with full bursts. The same limit again changes nothing.
    fn set(&mut self, limit: Limit, now: Instant) {
        if limit != self.limit {
            self.limit = limit;
            self.bytes = Bucket::new(limit.bytes, now);
            self.operations = Bucket::new(limit.operations, now);
        }
    }

    /// How long an operation of so many bytes has to wait; `None` if it may be done.
    fn wait(&mut self, bytes: u64, now: Instant) -> Option<Duration> {
        let wait = self
            .each(bytes)
            .filter_map(|(bucket, count)| bucket.wait(count, now));
        let wait = wait.max();
        if wait.is_some() {
            self.waits_since.get_or_insert(now);
        } else {
            self.leave(now);
        }
        wait
    }

    fn spend(&mut self, bytes: u64) {
        for (bucket, count) in self.each(bytes) {
            bucket.spend(count);
        }
    }

    /// The buckets, and what an operation takes of each.
    fn each(&mut self, bytes: u64) -> impl Iterator<Item = (&mut Bucket, u64)> {
        let of_bytes = self.bytes.as_mut().map(|bucket| (bucket, bytes));
        let of_operations = self.operations.as_mut().map(|bucket| (bucket, 1));
        of_bytes.into_iter().chain(of_operations)
    }

    /// Nothing waits any more.
    fn leave(&mut self, now: Instant) {
        self.waited = self.held(now);
        self.waits_since = None;
    }

    fn held(&self, now: Instant) -> Duration {
        let since = self.waits_since;
        let now = since.map(|since| now.saturating_duration_since(since));
        self.waited.saturating_add(now.unwrap_or_default())
    }
}

/// The limit of a device, or of one direction of it. Readable, as its timer, when what
/// had to wait is to be tried again.
#[derive(Debug)]
pub struct Limiter {
    timer: OwnedFd,
    state: Mutex<State>,
}

impl AsFd for Limiter {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

impl Limiter {
    /// One without a limit.
    pub fn new() -> io::Result<Limiter> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Limiter {
            timer: timerfd_create(TimerfdClockId::Monotonic, flags)?,
            state: Mutex::default(),
        })
    }

    /// Sets another limit, with full bursts; what waits is tried again at once. The
    /// same limit again changes nothing.
    pub fn set(&self, limit: Limit) {
        let mut state = self.state();
        state.set(limit, Instant::now());
        if state.waits_since.is_some() {
            self.wake(&state, AT_ONCE);
        }
    }

    /// Whether an operation of so many bytes may be done now. If not, the timer tells
    /// when to ask again.
    #[must_use]
    pub fn allows(&self, bytes: usize) -> bool {
        let mut state = self.state();
        if state.limit == Limit::default() && state.waits_since.is_none() {
            return true;
        }
        let wait = state.wait(in_64_bits(bytes), Instant::now());
        if let Some(wait) = wait {
            self.wake(&state, wait);
        }
        wait.is_none()
    }

    /// One was done, and had so many bytes.
    pub fn spend(&self, bytes: usize) {
        self.state().spend(in_64_bits(bytes));
    }

    /// Takes the timer's notification.
    pub fn acknowledge(&self) {
        // Fails only if there is none.
        let _ = rustix::io::read(&self.timer, &mut [0; 8]);
    }

    /// Nothing waits any more: the device was stopped.
    pub fn leave(&self) {
        self.state().leave(Instant::now());
    }

    /// How long an operation had to wait so far, in microseconds.
    #[must_use]
    pub fn held_us(&self) -> u64 {
        let held = self.state().held(Instant::now());
        u64::try_from(held.as_micros()).unwrap_or(u64::MAX)
    }

    /// Sets the timer. With the state locked: else a wait that was found with an earlier
    /// limit might take the place of what wakes up for a new one.
    fn wake(&self, _: &MutexGuard<'_, State>, after: Duration) {
        let when = Itimerspec {
            it_interval: Timespec::default(),
            it_value: Timespec {
                tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: after.subsec_nanos().into(),
            },
        };
        // Fails only for what is no timer, or no time.
        let _ = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &when);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn in_64_bits(bytes: usize) -> u64 {
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
