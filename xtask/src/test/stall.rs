//! Was this machine held up?
//!
//! A machine that is itself virtual may be stopped and go on minutes later. Its clocks
//! jump then, and whatever waits with a limit believes that the limit has passed: a lab
//! host's kernel calls its processor stuck, a test calls its peer silent. That tells
//! nothing of the code under test, and only a clock of this machine's own can tell it
//! apart from a lab host that hangs.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How often the clock is looked at.
const TICK: Duration = Duration::from_secs(1);

/// A look that comes later than this after the one before was held up. However busy a
/// machine is, a thread that sleeps for a second is back long before.
const LATE: Duration = Duration::from_secs(20);

/// Looks at the clock, and remembers when it jumped.
#[derive(Debug)]
pub(super) struct Watch(Mutex<Seen>);

#[derive(Debug)]
struct Seen {
    last: Instant,
    /// When each jump was over, and by how much.
    jumps: Vec<(Instant, Duration)>,
}

impl Seen {
    fn look(&mut self, now: Instant) {
        let passed = now.saturating_duration_since(self.last);
        if passed > LATE {
            self.jumps.push((now, passed));
        }
        self.last = now;
    }

    fn since(&self, began: Instant) -> Option<Duration> {
        let jumps = self.jumps.iter().filter(|(over, _)| *over > began);
        let sum: Duration = jumps.map(|(_, by)| *by).sum();
        (!sum.is_zero()).then_some(sum)
    }
}

impl Watch {
    /// One that nobody looks after yet: see [`keep`](Watch::keep).
    pub(super) fn new() -> Watch {
        Watch(Mutex::new(Seen {
            last: Instant::now(),
            jumps: Vec::new(),
        }))
    }

    /// Looks at the clock until `done` says so.
    pub(super) fn keep(&self, done: impl Fn() -> bool) {
        self.with(|seen| seen.last = Instant::now());
        while !done() {
            std::thread::sleep(TICK);
            self.with(|seen| seen.look(Instant::now()));
        }
    }

    /// For how long this machine stood still since `began`, if it did.
    pub(super) fn since(&self, began: Instant) -> Option<Duration> {
        self.with(|seen| {
            seen.look(Instant::now());
            seen.since(began)
        })
    }

    fn with<T>(&self, act: impl FnOnce(&mut Seen) -> T) -> T {
        act(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_jump_of_the_clock_that_ends_after_the_beginning_counts() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut seen = Seen {
            last: start,
            jumps: Vec::new(),
        };
        for second in [1, 2, 12, 13, 913, 914] {
            seen.look(at(second));
        }
        assert_eq!(seen.since(at(0)), Some(Duration::from_secs(900)));
        assert_eq!(seen.since(at(500)), Some(Duration::from_secs(900)));
        assert_eq!(seen.since(at(914)), None);
    }
}
