//! Arithmetic on times that are made up, and the timer.

use proptest::{collection::vec, prelude::*};
use rustix::event::{PollFd, PollFlags, poll};

use super::*;

fn rate(per_second: u64, burst: u64) -> Rate {
    Rate { per_second, burst }
}

fn bytes(per_second: u64, burst: u64) -> Limit {
    Limit {
        bytes: rate(per_second, burst),
        operations: Rate::default(),
    }
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

/// Whether `count` passes now. What passes is taken.
fn passes(bucket: &mut Bucket, count: u64, now: Instant) -> bool {
    let passes = bucket.wait(count, now).is_none();
    if passes {
        bucket.spend(count);
    }
    passes
}

fn is_ready(limiter: &Limiter) -> bool {
    let mut ready = [PollFd::new(limiter, PollFlags::IN)];
    poll(&mut ready, Some(&Timespec::default())).unwrap() == 1
}

/// Numbers of every size.
fn number() -> impl Strategy<Value = u64> {
    (any::<u64>(), 0..64_u32).prop_map(|(number, shift)| number >> shift)
}

#[test]
fn a_burst_passes_at_once_and_then_what_each_second_brings() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(10, 30), start).unwrap();
    for _ in 0..3 {
        assert!(passes(&mut bucket, 10, start));
    }
    assert_eq!(bucket.wait(1, start), Some(Duration::from_millis(100)));
    assert_eq!(bucket.wait(10, start), Some(seconds(1)));
    let almost = start + seconds(1) - Duration::from_nanos(1);
    assert_eq!(bucket.wait(10, almost), Some(Duration::from_nanos(1)));
    assert!(passes(&mut bucket, 10, start + seconds(1)));
    assert!(!passes(&mut bucket, 1, start + seconds(1)));
    // However long the pause is, it makes one burst.
    let later = start + seconds(1_000_000);
    assert!(passes(&mut bucket, 30, later) && !passes(&mut bucket, 1, later));
}

#[test]
fn without_a_burst_as_much_as_in_a_second_passes_at_once() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(10, 0), start).unwrap();
    assert!(passes(&mut bucket, 10, start));
    assert_eq!(bucket.wait(10, start), Some(seconds(1)));
}

#[test]
fn what_is_larger_than_the_burst_passes_when_that_is_full_and_those_after_it_wait_longer() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(10, 5), start).unwrap();
    assert!(passes(&mut bucket, 1, start));
    assert_eq!(bucket.wait(100, start), Some(Duration::from_millis(100)));
    let full = start + Duration::from_millis(100);
    assert!(passes(&mut bucket, 100, full));
    // 95 are owed.
    assert_eq!(bucket.wait(1, full), Some(Duration::from_millis(9600)));
    assert_eq!(bucket.wait(5, full), Some(seconds(10)));
}

#[test]
fn nothing_is_rounded_away_however_often_one_asks() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(3, 2), start).unwrap();
    let times = (0..=10_000_000).step_by(333).map(Duration::from_micros);
    let passed = times.filter(|after| passes(&mut bucket, 1, start + *after));
    assert_eq!(
        passed.count(),
        2 + 29,
        "the thirtieth comes with the tenth second"
    );
    assert!(passes(&mut bucket, 1, start + seconds(10)));
}

#[test]
fn a_clock_that_goes_back_adds_nothing() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(1, 5), start + seconds(5)).unwrap();
    assert!(passes(&mut bucket, 5, start + seconds(5)));
    for _ in 0..3 {
        assert!(!passes(&mut bucket, 1, start));
        assert!(!passes(&mut bucket, 1, start + seconds(5)));
    }
    assert!(passes(&mut bucket, 1, start + seconds(6)));
}

#[test]
fn the_highest_rate_after_ages_makes_one_burst() {
    let start = Instant::now();
    let mut bucket = Bucket::new(rate(1 << 63, u64::MAX), start).unwrap();
    for _ in 0..5 {
        bucket.spend(u64::MAX);
    }
    // Together more than 128 bits of billionths.
    let later = start + seconds(1 << 56);
    assert!(passes(&mut bucket, u64::MAX, later) && !passes(&mut bucket, 1, later));
}

#[test]
fn a_high_rate_does_not_wake_up_for_each_operation() {
    let start = Instant::now();
    for (burst, wait) in [
        (1_000_000, PAUSE),
        (100, Duration::from_micros(100)),
        (1, Duration::from_micros(1)),
    ] {
        let mut bucket = Bucket::new(rate(1_000_000, burst), start).unwrap();
        assert!(passes(&mut bucket, burst, start));
        assert_eq!(bucket.wait(1, start), Some(wait), "{burst}");
    }
}

proptest! {
    #[test]
    fn never_passes_more_than_a_burst_and_what_time_brings(
        per_second in number(),
        burst in number(),
        asked in vec((number(), number()), 1..50),
    ) {
        let start = Instant::now();
        let Some(mut bucket) = Bucket::new(rate(per_second, burst), start) else {
            return Ok(());
        };
        let (mut elapsed, mut passed, mut most) = (Duration::ZERO, 0, bucket.size);
        for (pause, count) in asked {
            elapsed += Duration::from_nanos(pause);
            if passes(&mut bucket, count, start + elapsed) {
                passed += billionths(count);
            }
            // One that is larger than the burst may be the last one.
            most = most.max(billionths(count));
            let brought = elapsed.as_nanos().saturating_mul(per_second.into());
            prop_assert!(passed <= most.saturating_add(brought));
        }
    }

    #[test]
    fn who_waits_as_long_as_was_said_passes(
        per_second in number(),
        burst in number(),
        counts in vec(number(), 1..20),
    ) {
        let mut now = Instant::now();
        let Some(mut bucket) = Bucket::new(rate(per_second, burst), now) else {
            return Ok(());
        };
        for count in counts {
            if let Some(wait) = bucket.wait(count, now) {
                if wait == Duration::from_nanos(u64::MAX) {
                    // In some centuries it asks once more.
                    return Ok(());
                }
                now += wait;
            }
            prop_assert!(passes(&mut bucket, count, now));
        }
    }
}

#[test]
fn both_rates_hold_and_the_longer_wait_counts() {
    let start = Instant::now();
    let mut state = State::default();
    let limit = Limit {
        bytes: rate(100, 100),
        operations: rate(1, 2),
    };
    state.set(limit, start);
    assert_eq!(state.wait(100, start), None);
    state.spend(100);
    assert_eq!(state.wait(50, start), Some(Duration::from_millis(500)));
    assert_eq!(
        state.wait(0, start),
        None,
        "of operations there is one left"
    );
    state.spend(0);
    assert_eq!(state.wait(50, start), Some(seconds(1)));
    assert_eq!(
        state.wait(50, start + Duration::from_millis(999)),
        Some(PAUSE)
    );
    assert_eq!(state.wait(50, start + seconds(1)), None);
}

#[test]
fn the_same_limit_again_gives_nothing_and_another_one_begins_anew() {
    let start = Instant::now();
    let mut state = State::default();
    assert_eq!(state.wait(u64::MAX, start), None, "there is no limit");
    state.set(bytes(1, 10), start);
    state.spend(10);
    state.set(bytes(1, 10), start);
    assert!(state.wait(10, start).is_some());
    state.set(bytes(1, 11), start);
    assert_eq!(state.wait(11, start), None);
    state.spend(11);
    state.set(Limit::default(), start);
    assert_eq!(state.wait(u64::MAX, start), None);
}

#[test]
fn the_time_that_something_waits_is_counted_once() {
    let start = Instant::now();
    let at = |after| start + seconds(after);
    let mut state = State::default();
    state.set(bytes(1, 1), start);
    assert_eq!(state.wait(1, at(1)), None);
    state.spend(10);
    assert_eq!(state.held(at(2)), seconds(0), "nobody waits");
    assert!(state.wait(1, at(2)).is_some());
    assert!(state.wait(1, at(4)).is_some(), "it asks again");
    assert_eq!(state.held(at(5)), seconds(3));
    assert_eq!(state.wait(1, at(11)), None);
    assert_eq!(state.held(at(20)), seconds(9));
    state.spend(10);
    assert!(state.wait(1, at(20)).is_some());
    state.leave(at(21));
    state.leave(at(25));
    assert_eq!(state.held(at(30)), seconds(10));
}

#[test]
fn the_timer_tells_when_what_was_refused_may_pass() {
    let limiter = Limiter::new().unwrap();
    assert!(limiter.allows(usize::MAX));
    limiter.set(bytes(1000, 10));
    assert!(!is_ready(&limiter), "nothing waits");
    let start = Instant::now();
    limiter.spend(20);
    assert!(!limiter.allows(10));
    let mut ready = [PollFd::new(&limiter, PollFlags::IN)];
    poll(&mut ready, None).unwrap();
    assert!(limiter.allows(10));
    assert!(start.elapsed() >= Duration::from_millis(20));
    assert!(limiter.held_us() >= 19_000);
    limiter.acknowledge();
    assert!(!is_ready(&limiter), "it comes once");
}

#[test]
fn what_waits_is_woken_at_once_by_another_limit() {
    let limiter = Limiter::new().unwrap();
    limiter.set(bytes(1, 1000));
    limiter.spend(usize::MAX);
    assert!(!limiter.allows(1));
    assert!(!is_ready(&limiter), "it waits for years");
    limiter.set(Limit::default());
    let mut ready = [PollFd::new(&limiter, PollFlags::IN)];
    poll(&mut ready, Some(&Timespec::try_from(seconds(30)).unwrap())).unwrap();
    assert!(is_ready(&limiter) && limiter.allows(usize::MAX));
}

#[test]
fn a_burst_without_a_rate_is_named() {
    let fault = |bytes, operations| Limit { bytes, operations }.fault();
    assert_eq!(fault(rate(0, 0), rate(1, 0)), None);
    assert_eq!(fault(rate(1, u64::MAX), rate(0, 0)), None);
    let text = "cannot have a burst of 4096 bytes without a rate";
    assert_eq!(fault(rate(0, 4096), rate(1, 1)), Some(text.into()));
    let text = "cannot have a burst of 7 operations without a rate";
    assert_eq!(fault(rate(1, 1), rate(0, 7)), Some(text.into()));
}

#[test]
fn what_is_left_out_is_not_limited_and_what_is_unknown_is_refused() {
    let read = |text| serde_json::from_str::<Limits>(text);
    let only = r#"{"disk":{"bytes":{"per_second":5}}}"#;
    assert_eq!(read(only).unwrap(), Limits::Disk(bytes(5, 0)));
    let only = r#"{"interface":{"transmit":{"bytes":{"per_second":5,"burst":6}}}}"#;
    let expected = Limits::Interface {
        receive: Limit::default(),
        transmit: bytes(5, 6),
    };
    assert_eq!(read(only).unwrap(), expected);
    for wrong in [
        r#"{"disk":{"byte":{}}}"#,
        r#"{"disk":{"bytes":{"per_minute":5}}}"#,
        r#"{"disk":{"bytes":{"per_second":-1}}}"#,
        r#"{"interface":{"recieve":{}}}"#,
    ] {
        assert!(read(wrong).is_err(), "{wrong}");
    }
}
