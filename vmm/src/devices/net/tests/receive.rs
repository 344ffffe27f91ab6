//! Frames for the guest, and the buffers that there are for them.

use super::*;

#[test]
fn a_frame_that_needs_what_was_not_accepted_is_dropped_and_counted() {
    let small = frame(100, 1);
    let sum_only = Header {
        gso_type: NONE,
        ..to_be_cut()
    };
    let ecn = Header {
        gso_type: TCP_V4 | ECN,
        ..to_be_cut()
    };
    for (header, missing) in [
        (sum_only, feature::GUEST_CSUM),
        (to_be_cut(), feature::GUEST_TSO4),
        (ecn, feature::GUEST_ECN),
    ] {
        let mut guest = Guest::with(feature::OFFERED & !missing, 8, BUFFER);
        guest.host_sends(header, &frame(1000, 2));
        guest.host_sends(plain(), &small);
        guest.turns();
        guest.expect(&small);
        assert_eq!(value(&guest.counters().not_negotiated), 1);
    }
}

#[test]
fn a_large_frame_lies_in_several_buffers() {
    let mut guest = Guest::new(150);
    for (len, buffers) in [
        (1524, 1),
        (1525, 2),
        (1536 * 2 - 12, 2),
        (1536 * 2 - 11, 3),
        (LONGEST, 43),
    ] {
        let bytes = frame(len, 7);
        guest.host_sends(to_be_cut(), &bytes);
        guest.turns();
        assert_eq!(guest.expect(&bytes).num_buffers, buffers, "{len}");
    }
    assert!(guest.received().is_none());
}

#[test]
fn without_mergeable_buffers_a_frame_lies_in_one() {
    let features = feature::OFFERED & !feature::MRG_RXBUF;
    let mut guest = Guest::with(features, 3, SLOT);
    for len in [60, LONGEST] {
        guest.host_sends(to_be_cut(), &frame(len, 5));
        guest.turns();
        assert_eq!(guest.expect(&frame(len, 5)).num_buffers, 1);
    }
}

#[test]
fn a_frame_that_does_not_fit_is_dropped_and_counted_and_the_next_one_arrives() {
    let one = feature::OFFERED & !feature::MRG_RXBUF;
    // One buffer, or all that there ever were, are a byte too short.
    for (features, buffers, longest) in [(one, 3, 988), (feature::OFFERED, 3, 2988)] {
        let mut guest = Guest::with(features, buffers, 1000);
        guest.host_sends(to_be_cut(), &frame(longest + 1, 1));
        guest.host_sends(to_be_cut(), &frame(60_000, 1));
        guest.host_sends(to_be_cut(), &frame(longest, 2));
        guest.turns();
        guest.expect(&frame(longest, 2));
        assert!(guest.received().is_none());
        assert_eq!(value(&guest.counters().unfit), 2);
        assert_eq!(value(&guest.counters().received.frames), 1);
    }
}

#[test]
fn frames_of_no_possible_length_are_dropped_and_counted() {
    let mut guest = Guest::new(100);
    for (header, len) in [
        // With its header, longer than any frame.
        (to_be_cut(), LONGEST + 1),
        (to_be_cut(), LONGEST + 10_000),
        // Not to be cut, and longer than the MTU with a tag.
        (plain(), 1519),
        (plain(), 13),
        (plain(), 0),
    ] {
        guest.host_sends(header, &frame(len, 1));
    }
    net::send(&guest.host, &[0; 5], SendFlags::empty()).unwrap();
    guest.host_sends(plain(), &frame(1518, 2));
    guest.turns();
    guest.expect(&frame(1518, 2));
    assert_eq!(value(&guest.counters().unfit), 6);
}

#[test]
fn a_large_frame_waits_for_buffers_if_there_were_enough_before() {
    let mut guest = Guest::new(8);
    let (all, large, small) = (frame(8 * 1536 - 12, 1), frame(5000, 2), frame(100, 3));
    guest.host_sends(to_be_cut(), &all);
    guest.turns();
    guest.offer_and_notify(2);
    guest.host_sends(to_be_cut(), &large);
    guest.host_sends(plain(), &small);
    guest.turns();
    assert_eq!(guest.expect(&all).num_buffers, 8);
    assert!(guest.received().is_none());
    // Still one too few, and enough.
    guest.offer_and_notify(1);
    assert!(guest.received().is_none());
    guest.offer_and_notify(2);
    assert_eq!(guest.expect(&large).num_buffers, 4);
    guest.expect(&small);
    assert_eq!(value(&guest.counters().unfit), 0);
}

#[test]
fn without_buffers_the_tap_is_not_read_and_nothing_spins_b51() {
    let mut guest = Guest::new(0);
    let frames: Vec<_> = (0..5).map(|mark| frame(500, mark)).collect();
    for bytes in &frames {
        guest.host_sends(plain(), bytes);
        assert!(!guest.events.is_ready(), "nobody waits for frames");
    }
    // As the driver gives buffers: none too many, and with more than there are frames.
    for (count, arrive) in [(1, 0..1), (2, 1..3), (7, 3..5)] {
        guest.offer_and_notify(count);
        for bytes in &frames[arrive] {
            guest.expect(bytes);
        }
        assert!(guest.received().is_none());
    }
    guest.host_sends(plain(), &frames[0]);
    assert!(guest.events.is_ready(), "now somebody waits");
    guest.turns();
    guest.expect(&frames[0]);
}

#[test]
fn the_driver_is_interrupted_once_a_turn() {
    let mut guest = Guest::new(100);
    let _ = guest.irq.read();
    for mark in 0..10 {
        guest.host_sends(plain(), &frame(100, mark));
    }
    guest.turns();
    assert_eq!(guest.irq.read().unwrap(), 1);
    for mark in 0..10 {
        guest.send(plain(), &frame(100, mark));
    }
    guest.notify_sent();
    assert_eq!(guest.irq.read().unwrap(), 1);
}
