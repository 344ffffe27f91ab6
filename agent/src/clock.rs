//! The wall clock of the guest, which follows that of the host.
//!
//! The guest's kernel reads the host's clock once, at boot, and then counts by
//! itself: it knows nothing of a clock that is set on the host, and drifts. The
//! host asks what time it is here and says by how much that is wrong; it sees how
//! long an answer takes and so knows how exact it is. Nothing here wakes up by
//! itself.

use std::{
    io,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::sys;

/// How a clock is put right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Move {
    /// By going a little faster or slower for a while, in microseconds: programs
    /// never see a time twice.
    Slew(i64),
    /// At once: seconds and nanoseconds, the latter forward.
    Step(i64, u32),
}

impl Move {
    fn by(nanoseconds: i64) -> Self {
        /// The kernel gains half a millisecond in a second: what is more than
        /// this would take a quarter of an hour.
        const SLEW_MAX: u64 = 500_000_000;
        const SECOND: i64 = 1_000_000_000;
        if nanoseconds.unsigned_abs() < SLEW_MAX {
            return Self::Slew(nanoseconds / 1_000);
        }
        let rest = nanoseconds.rem_euclid(SECOND);
        Self::Step(
            nanoseconds.div_euclid(SECOND),
            u32::try_from(rest).unwrap_or(0),
        )
    }
}

/// Moves the clock by so many nanoseconds.
pub(crate) fn adjust(nanoseconds: i64) -> io::Result<()> {
    match Move::by(nanoseconds) {
        Move::Slew(microseconds) => sys::slew_clock(microseconds),
        Move::Step(seconds, nanoseconds) => {
            // What is left to gain belongs to the time before.
            sys::slew_clock(0)?;
            sys::step_clock(seconds, nanoseconds)
        }
    }
}

/// Nanoseconds since the epoch.
pub(crate) fn now_ns() -> u64 {
    let since = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_differences_are_slewed_and_large_ones_stepped_f16() {
        let check = |nanoseconds, expected| {
            assert_eq!(Move::by(nanoseconds), expected, "{nanoseconds}");
        };
        check(0, Move::Slew(0));
        check(499_999_999, Move::Slew(499_999));
        check(-499_999_999, Move::Slew(-499_999));
        check(500_000_000, Move::Step(0, 500_000_000));
        check(-500_000_000, Move::Step(-1, 500_000_000));
        check(3_600_000_000_001, Move::Step(3_600, 1));
        check(-3_600_000_000_001, Move::Step(-3_601, 999_999_999));
        check(i64::MAX, Move::Step(9_223_372_036, 854_775_807));
        check(i64::MIN, Move::Step(-9_223_372_037, 145_224_192));
    }
}
