//! How fast this machine's time stamp counter counts.

use std::arch::x86_64::_rdtsc;
use std::thread;
use std::time::{Duration, Instant};

/// How long it is watched. Two moments are known to less than a microsecond each.
const WATCHED: Duration = Duration::from_millis(50);

/// How often a moment is looked for in which nothing came between clock and counter.
const LOOKS: u32 = 20;

/// Its frequency in kilohertz.
pub(crate) fn khz() -> u128 {
    let (began, first) = moment();
    thread::sleep(WATCHED);
    let (ended, last) = moment();
    let nanoseconds = (ended - began).as_nanos();
    u128::from(last - first) * 1_000_000 / nanoseconds
}

/// What clock and counter show at the same time.
fn moment() -> (Instant, u64) {
    let look = |_| {
        let before = Instant::now();
        // SAFETY: every processor of 64 bits has the counter.
        let count = unsafe { _rdtsc() };
        (before.elapsed(), before, count)
    };
    let looks = (0..LOOKS).map(look);
    let (_, at, count) = looks.min().unwrap_or_else(|| look(0));
    (at, count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_counter_is_found_to_be_equally_fast_twice() {
        let (one, other) = (khz(), khz());
        assert!(one.abs_diff(other) < one / 100, "{one} and {other} kHz");
    }
}
