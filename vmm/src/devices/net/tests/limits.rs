//! Limits of each direction: what waits for them, and that all of it passes in the end.

use std::time::{Duration, Instant};

use super::*;
use crate::devices::limit::{Limit, Rate};

/// How long a test waits for what does not come.
const LIMIT: Duration = Duration::from_secs(30);

/// So little a second that a test sees no more than the burst.
fn bytes(burst: u64) -> Limit {
    Limit {
        bytes: Rate {
            per_second: 1,
            burst,
        },
        ..Limit::default()
    }
}

/// So many frames a second, one by one.
fn frames(per_second: u64) -> Limit {
    Limit {
        operations: Rate {
            per_second,
            burst: 1,
        },
        ..Limit::default()
    }
}

/// Sets both limits of a guest of whom nothing waits.
fn limit(guest: &Guest, receive: Limit, transmit: Limit) {
    guest.net.limiters.receive.set(receive);
    guest.net.limiters.transmit.set(transmit);
}

/// Each side makes frames of 100 bytes available to the other.
fn both_send(guest: &mut Guest, count: u8) {
    for mark in 0..count {
        guest.host_sends(plain(), &frame(100, mark));
        guest.send(plain(), &frame(100, mark));
    }
    guest.tx.notify();
}

/// Turns the loop, which may wait for timers, until so many frames have passed each way
/// since the beginning.
fn turn_until(guest: &Guest, received: u64, transmitted: u64) {
    let counters = guest.counters();
    while value(&counters.received.frames) < received
        || value(&counters.transmitted.frames) < transmitted
    {
        assert!(guest.events.is_ready_within(LIMIT), "nobody is woken");
        guest.events.turn().unwrap();
    }
}

/// The marks of the frames that each side got since it was asked last.
fn got(guest: &mut Guest) -> [Vec<u8>; 2] {
    let mark = |bytes: Vec<u8>| bytes[0];
    let received = std::iter::from_fn(|| guest.received()).map(|(_, bytes)| mark(bytes));
    let received = received.collect();
    let sent = std::iter::from_fn(|| guest.host_gets()).map(|(_, bytes)| mark(bytes));
    [received, sent.collect()]
}

#[test]
fn what_is_too_much_waits_in_order_and_passes_when_the_limit_is_lifted() {
    let mut guest = Guest::new(100);
    limit(&guest, bytes(250), bytes(300));
    both_send(&mut guest, 10);
    guest.turns();
    // Of the third that is received only half was allowed.
    assert_eq!(got(&mut guest), [[0, 1, 2]; 2]);
    assert!(!guest.events.is_ready(), "nothing spins");
    assert_eq!(guest.tx.all_used().len(), 3);
    limit(&guest, Limit::default(), Limit::default());
    turn_until(&guest, 10, 10);
    let rest: Vec<u8> = (3..10).collect();
    assert_eq!(got(&mut guest), [rest.clone(), rest]);
    assert_eq!(guest.tx.all_used().len(), 7);
    let totals = guest.counters().totals(&guest.net.limiters());
    assert_eq!(
        (totals.received_dropped, totals.transmitted_dropped),
        (0, 0)
    );
    assert!(totals.received_held_us > 0 && totals.transmitted_held_us > 0);
}

#[test]
fn each_direction_has_a_limit_of_its_own() {
    let (none, some) = (Limit::default(), bytes(100));
    for (receive, transmit, expected) in [(some, none, [1, 10]), (none, some, [10, 1])] {
        let mut guest = Guest::new(100);
        limit(&guest, receive, transmit);
        both_send(&mut guest, 10);
        guest.turns();
        assert_eq!(got(&mut guest).map(|marks| marks.len()), expected);
    }
}

#[test]
fn the_timers_let_frames_go_on() {
    let mut guest = Guest::new(100);
    limit(&guest, frames(1000), frames(500));
    let start = Instant::now();
    both_send(&mut guest, 10);
    turn_until(&guest, 10, 10);
    assert!(start.elapsed() >= Duration::from_millis(18));
    let all: Vec<u8> = (0..10).collect();
    assert_eq!(got(&mut guest), [all.clone(), all]);
    // Nothing is left behind.
    both_send(&mut guest, 1);
    turn_until(&guest, 11, 11);
}

#[test]
fn a_guest_that_notifies_gets_no_more() {
    let mut guest = Guest::new(100);
    limit(&guest, bytes(100), bytes(100));
    both_send(&mut guest, 10);
    guest.turns();
    assert_eq!(got(&mut guest), [[0]; 2]);
    for _ in 0..5 {
        guest.offer_and_notify(1);
        guest.notify_sent();
        assert_eq!(got(&mut guest), [[]; 2] as [[u8; 0]; 2]);
    }
}

#[test]
fn a_guest_that_resets_its_device_gets_no_more() {
    let mut guest = Guest::new(100);
    limit(&guest, bytes(100), bytes(100));
    both_send(&mut guest, 10);
    guest.turns();
    assert_eq!(got(&mut guest), [[0]; 2]);
    for _ in 0..5 {
        guest.restart();
        guest.turns();
        assert_eq!(got(&mut guest), [[]; 2] as [[u8; 0]; 2]);
    }
    // Nothing was lost by it.
    limit(&guest, Limit::default(), Limit::default());
    turn_until(&guest, 10, 10);
    let rest: Vec<u8> = (1..10).collect();
    assert_eq!(got(&mut guest), [rest.clone(), rest]);
}

#[test]
fn a_device_that_is_held_back_can_be_stopped_and_leaves_nothing_to_watch_b48() {
    let mut guest = Guest::new(100);
    limit(&guest, frames(1000), frames(1000));
    both_send(&mut guest, 10);
    guest.events.turn().unwrap();
    guest.worker.take().unwrap().stop();
    let limiters = guest.net.limiters();
    let held = || [&limiters.receive, &limiters.transmit].map(|limiter| limiter.held_us());
    let before = held();
    for _ in 0..1000 {
        assert_eq!(held(), before, "nothing waits any more");
    }
    assert!(!guest.events.is_ready());
}

#[test]
fn a_frame_that_the_tap_does_not_take_is_not_paid_twice() {
    let mut guest = Guest::new(0);
    limit(&guest, bytes(1), bytes(3000));
    guest.fill_the_tap();
    let mut sent = 0;
    while guest.host_gets().is_some() {
        sent += 1;
        guest.turns();
    }
    assert_eq!(sent, 30);
    guest.send(plain(), &frame(100, 1));
    guest.notify_sent();
    assert!(guest.host_gets().is_none(), "all was paid");
}

#[test]
fn frames_that_are_dropped_are_paid_too() {
    let mut guest = Guest::new(100);
    limit(&guest, bytes(2000), bytes(2000));
    for _ in 0..2 {
        // Longer than the MTU, and not to be cut.
        guest.host_sends(plain(), &frame(1900, 1));
        guest.send(plain(), &frame(1900, 1));
    }
    both_send(&mut guest, 1);
    guest.turns();
    assert_eq!(got(&mut guest), [[]; 2] as [[u8; 0]; 2]);
    let counters = guest.counters();
    // The limit is found to be passed when the second frame was read.
    assert_eq!(value(&counters.unfit), 2);
    assert_eq!(value(&counters.malformed), 1);
}

#[test]
fn frames_longer_than_the_burst_pass_one_at_a_time() {
    let mut guest = Guest::new(200);
    limit(&guest, bytes(1000), bytes(1000));
    for mark in 0..2 {
        guest.host_sends(to_be_cut(), &frame(30_000, mark));
        guest.send(to_be_cut(), &frame(30_000, mark));
    }
    guest.notify_sent();
    assert_eq!(got(&mut guest), [[0]; 2]);
}
