//! The guest's wall clock follows the host's.
//!
//! A guest takes the time from the host once, at its boot. Here the host looks at
//! the guest's clock now and then, and at once when its own clock is set (a timer
//! of the kernel says so), and has the agent move it. Promises that the clock of an
//! idle guest costs one wake-up a minute and that the guest is told nothing but a
//! difference.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use rustix::{
    io::Errno,
    time::{
        Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
        timerfd_settime,
    },
};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::{debug, warn};

use crate::{error::Result, guest::Guest};

/// How often the clock of a guest is looked at: it drifts by a few milliseconds.
const PERIOD: Duration = Duration::from_secs(60);

/// A difference that is left alone.
const TOLERANCE: Duration = Duration::from_millis(5);

/// A difference from which on the agent moves the clock at once.
const STEP: Duration = Duration::from_millis(500);

/// How often a clock that was moved is looked at again.
const LOOKS: usize = 4;

/// Keeps the guest's clock right until it ends.
pub(crate) async fn follow(guest: Arc<dyn Guest>) {
    tokio::select! {
        _ = guest.ended() => {}
        result = keep_right(&*guest) => if let Err(error) = result {
            warn!(%error, "the guest's clock will not follow that of the host");
        }
    }
}

async fn keep_right(guest: &dyn Guest) -> io::Result<()> {
    let alarm = Alarm::new()?;
    loop {
        alarm.next(PERIOD).await?;
        // A guest that does not answer is another one's business.
        if let Err(error) = correct(|by| guest.agent().clock(by)).await {
            debug!(error = error.text(), "the guest's clock cannot be seen");
        }
    }
}

/// Looks at a clock and moves it if it is wrong. `clock` moves it by so many
/// nanoseconds and says what it shows then.
async fn correct<F: Future<Output = Result<u64>>>(clock: impl Fn(i64) -> F) -> Result<()> {
    for _ in 0..LOOKS {
        let look = Look::at(&clock).await?;
        if look.difference.unsigned_abs() <= look.unsure.max(TOLERANCE).as_nanos() {
            return Ok(());
        }
        let by = i64::try_from(look.difference).unwrap_or(match look.difference {
            ..0 => i64::MIN,
            _ => i64::MAX,
        });
        debug!(by_ns = by, "the guest's clock is moved");
        clock(by).await?;
        // What is made up for slowly is not so by the next look.
        if look.difference.unsigned_abs() < STEP.as_nanos() {
            return Ok(());
        }
    }
    Ok(())
}

/// What one look at the guest's clock tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Look {
    /// By how many nanoseconds the guest must go forward.
    difference: i128,
    /// How wrong that may be.
    unsure: Duration,
}

impl Look {
    async fn at<F: Future<Output = Result<u64>>>(clock: &impl Fn(i64) -> F) -> Result<Self> {
        let (asked, began) = (now_ns(), Instant::now());
        let guest = clock(0).await?;
        Ok(Self::new(asked, guest, began.elapsed()))
    }

    /// The guest looked at its clock at some time between question and answer.
    fn new(asked_ns: u128, guest_ns: u64, took: Duration) -> Self {
        let unsure = took / 2;
        let host = i128::try_from(asked_ns.saturating_add(unsure.as_nanos())).unwrap_or(i128::MAX);
        Self {
            difference: host.saturating_sub(i128::from(guest_ns)),
            unsure,
        }
    }
}

fn now_ns() -> u128 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.unwrap_or_default().as_nanos()
}

/// A timer that also goes off when the host's clock is set, or the host wakes up
/// from a suspension.
#[derive(Debug)]
struct Alarm(AsyncFd<OwnedFd>);

impl Alarm {
    fn new() -> io::Result<Self> {
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Realtime, flags)?;
        // SAFETY: an OwnedFd is open and stays the same descriptor until its end,
        // which is that of the AsyncFd.
        let timer = unsafe { AsyncFd::register_with_interest(timer, Interest::READABLE) }?;
        Ok(Self(timer))
    }

    /// Returns after `period` or when the clock is set, whichever is first.
    async fn next(&self, period: Duration) -> io::Result<()> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let at = now.unwrap_or_default().saturating_add(period);
        let zero = Timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        let alarm = Itimerspec {
            it_interval: zero,
            it_value: Timespec {
                tv_sec: i64::try_from(at.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: at.subsec_nanos().into(),
            },
        };
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        match timerfd_settime(self.0.as_fd(), flags, &alarm) {
            // It was set between two calls: the timer is armed all the same.
            Err(Errno::CANCELED) => return Ok(()),
            result => {
                result?;
            }
        }
        let went_off = self.0.async_io(Interest::READABLE, |timer| {
            let mut times = [0; 8];
            Ok(rustix::io::read(timer, &mut times)?)
        });
        match went_off.await {
            Err(error) if error.raw_os_error() != Some(libc::ECANCELED) => Err(error),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    const MS: i128 = 1_000_000;

    #[test]
    fn a_look_is_as_exact_as_its_answer_was_fast_f16() {
        let look = Look::new(10_000, 9_000, Duration::from_nanos(400));
        assert_eq!((look.difference, look.unsure.as_nanos()), (1_200, 200));
        // Whatever a guest says.
        let look = Look::new(0, u64::MAX, Duration::MAX);
        assert!(look.difference > 0);
        let look = Look::new(u128::MAX, 0, Duration::ZERO);
        assert_eq!(look.difference, i128::MAX);
    }

    /// Corrects a clock that is off by so much; what it was moved by.
    async fn corrections(off: i128, steps_work: bool) -> Vec<i64> {
        let off = Cell::new(off);
        let moves = RefCell::new(Vec::new());
        correct(|by| {
            if by != 0 {
                moves.borrow_mut().push(by);
                if steps_work && by.unsigned_abs() >= 500_000_000 {
                    off.set(off.get() + i128::from(by));
                }
            }
            let shows = i128::try_from(now_ns()).unwrap() + off.get();
            std::future::ready(Ok(u64::try_from(shows).unwrap()))
        })
        .await
        .unwrap();
        moves.into_inner()
    }

    #[tokio::test]
    async fn a_wrong_clock_is_moved_and_a_right_one_left_alone_f16() {
        for off in [0, -4 * MS] {
            assert!(corrections(off, true).await.is_empty(), "{off}");
        }
        for off in [-300, 300, -3_600_000, 3_600_000] {
            let moves = corrections(off * MS, true).await;
            let [by] = moves[..] else {
                panic!("{off} ms: moved by {moves:?}");
            };
            let left = i128::from(by) + off * MS;
            assert!(left.abs() < 100 * MS, "{off} ms: moved by {by}");
        }
        // One that cannot be moved is not tried for ever.
        assert_eq!(corrections(3_600_000 * MS, false).await.len(), LOOKS);
    }

    #[tokio::test]
    async fn the_alarm_goes_off_after_its_period() {
        let alarm = Alarm::new().unwrap();
        for _ in 0..2 {
            let began = Instant::now();
            alarm.next(Duration::from_millis(20)).await.unwrap();
            assert!(began.elapsed() >= Duration::from_millis(19));
        }
    }
}
