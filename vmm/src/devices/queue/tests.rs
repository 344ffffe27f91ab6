//! The engine and its chains against drivers that break every rule.

use std::sync::Arc;

use super::super::testing::{Guest, INDIRECT, NEXT, READ, WRITE, descriptor};
use super::*;

/// Heads and lengths, readable and writable, of the chains that come out.
fn turn(guest: &mut Guest) -> Vec<(u16, usize, usize)> {
    let mut seen = Vec::new();
    guest.ring.turn(|chain| {
        seen.push((chain.head(), chain.readable_len(), chain.writable_len()));
        Served::Used(0)
    });
    seen
}

#[test]
fn loops_and_strange_successors_come_back_unserved_and_once_b43() {
    // (flags, next) of descriptors 0 and 1.
    for raw in [
        // Itself.
        [(NEXT, 0), (0, 0)],
        // Each other.
        [(NEXT, 1), (NEXT, 0)],
        // Beyond the table.
        [(NEXT, 16), (0, 0)],
        [(NEXT, u16::MAX), (0, 0)],
        // Indirect: with a successor, of odd length, of none.
        [(INDIRECT | NEXT, 1), (0, 0)],
        [(INDIRECT, 17), (0, 0)],
        [(INDIRECT, 0), (0, 0)],
    ] {
        let mut guest = Guest::new();
        for (index, (flags, next)) in (0..).zip(raw) {
            let length = if flags & INDIRECT == 0 {
                16
            } else {
                next.into()
            };
            let raw = (0x1_0000, length, flags, next);
            guest.driver.write_descriptor(index, raw);
        }
        guest.driver.make_available(0);
        assert_eq!(turn(&mut guest), [], "{raw:?}");
        assert_eq!(guest.driver.all_used(), [(0, 0)], "{raw:?}");
        // Alive: the next one is served.
        let raw = (0x1_0000, 16, WRITE, 0);
        guest.driver.write_descriptor(2, raw);
        guest.driver.make_available(2);
        assert_eq!(turn(&mut guest), [(2, 0, 16)]);
    }
}

#[test]
fn an_indirect_table_is_walked_and_may_not_lead_to_another_b43() {
    let table = |entries: &[(u64, u32, u16, u16)]| {
        entries
            .iter()
            .copied()
            .map(descriptor)
            .collect::<Vec<_>>()
            .concat()
    };
    let few = table(&[
        (0x2_0000, 10, NEXT, 2),
        (0, 0, 0, 0),
        (0x3_0000, 7, WRITE, 0),
    ]);
    let nested = table(&[(0x1_0000, 16, INDIRECT, 0), (0, 0, 0, 0)]);
    let beyond = table(&[(0x2_0000, 10, NEXT, 2), (0x2_0000, 10, 0, 0)]);
    let full = |count: u16| {
        let entries = (0..count).map(|at| {
            let next = if at + 1 == count { 0 } else { NEXT };
            (0x2_0000, 1, next, at + 1)
        });
        table(&entries.collect::<Vec<_>>())
    };
    for (table, seen) in [
        (few, Some((10, 7))),
        (nested, None),
        (beyond, None),
        // As long as the queue, and longer.
        (full(16), Some((16, 0))),
        (full(17), None),
    ] {
        let mut guest = Guest::new();
        guest.driver.write(0x1_0000, &table);
        let len = u32::try_from(table.len()).unwrap();
        // The flag WRITE means nothing here (virtio 1.2, 2.7.5.3.2).
        let raw = (0x1_0000, len, INDIRECT | WRITE, 0);
        guest.driver.write_descriptor(0, raw);
        guest.driver.make_available(0);
        let expected: Vec<_> = seen.map(|(r, w)| (0, r, w)).into_iter().collect();
        assert_eq!(turn(&mut guest), expected, "{table:x?}");
        assert_eq!(guest.driver.all_used(), [(0, 0)]);
    }
}

#[test]
fn buffers_that_are_empty_outside_memory_or_too_much_are_no_chain_b44_b45() {
    const END: u64 = 2 << 20;
    for chain in [
        &[(0x1_0000, 0, READ)][..],
        &[(0x1_0000, 4, READ), (0x1_0000, 0, WRITE)],
        &[(END, 1, READ)],
        &[(END - 1, 2, READ)],
        &[(0xd000_0000, 16, WRITE)],
        &[(u64::MAX, 1, READ)],
        &[(u64::MAX - 3, 8, WRITE)],
        &[(0x1_0000, u32::MAX, READ)],
        // What is to be read comes first.
        &[(0x1_0000, 4, WRITE), (0x1_0000, 4, READ)],
    ] {
        let mut guest = Guest::new();
        guest.driver.offer(chain);
        assert_eq!(turn(&mut guest), [], "{chain:x?}");
        assert_eq!(guest.driver.all_used(), [(0, 0)], "{chain:x?}");
    }
    let mut guest = Guest::new();
    guest.driver.offer(&[(END - 1, 1, READ), (0, 4, WRITE)]);
    assert_eq!(turn(&mut guest), [(0, 1, 4)]);
}

#[test]
fn a_head_beyond_the_table_breaks_the_queue_b43() {
    for head in [16, u16::MAX] {
        let mut guest = Guest::new();
        guest.driver.make_available(head);
        guest.driver.offer(&[(0x1_0000, 16, READ)]);
        assert_eq!(turn(&mut guest), []);
        assert_eq!(turn(&mut guest), [], "dead until the reset");
        assert!(guest.driver.all_used().is_empty());
    }
}

#[test]
fn an_index_that_jumps_breaks_the_queue_b46() {
    // Forwards, and backwards.
    for index in [18, u16::MAX] {
        let mut guest = Guest::new();
        guest.driver.offer(&[(0x1_0000, 16, READ)]);
        assert_eq!(turn(&mut guest), [(0, 16, 0)]);
        guest.driver.set_available(index);
        assert_eq!(turn(&mut guest), []);
        guest.driver.set_available(1);
        guest.driver.offer(&[(0x1_0000, 16, READ)]);
        assert_eq!(turn(&mut guest), [], "dead until the reset");
        assert_eq!(guest.driver.all_used(), [(0, 0)]);
    }
}

#[test]
fn one_turn_serves_no_more_than_the_queue_is_long_b46() {
    let mut guest = Guest::new();
    guest.driver.offer(&[(0x1_0000, 16, READ)]);
    let mut served = 0;
    let driver = &mut guest.driver;
    guest.ring.turn(|_| {
        served += 1;
        // Another processor makes a chain available again and again.
        driver.make_available(0);
        Served::Used(0)
    });
    assert_eq!(served, 16);
    assert_eq!(driver.event.read().unwrap(), 1, "another turn is due");
}

#[test]
fn malformed_chains_without_end_do_not_keep_a_thread_b46() {
    let mut guest = Guest::new();
    guest.driver.write_descriptor(0, (0, 0, 0, 0));
    for _ in 0..16 {
        guest.driver.make_available(0);
    }
    assert!(guest.ring.pop().is_none());
    assert_eq!(guest.driver.all_used().len(), 16);
    assert_eq!(guest.driver.event.read().unwrap(), 1, "another look is due");
}

#[test]
fn a_kept_chain_comes_again() {
    let mut guest = Guest::new();
    guest.driver.offer(&[(0x1_0000, 16, READ)]);
    guest.ring.turn(|_| Served::Kept);
    assert!(guest.driver.all_used().is_empty());
    assert!(guest.irq.read().is_err(), "nothing to tell");
    assert_eq!(turn(&mut guest), [(0, 16, 0)]);
    assert_eq!(guest.irq.read().unwrap(), 1);
}

#[test]
fn a_queue_goes_on_where_its_state_was_taken() {
    let mut guest = Guest::new();
    for _ in 0..5 {
        guest.driver.offer(&[(0x1_0000, 16, READ)]);
    }
    let (first, second) = (guest.ring.pop().unwrap(), guest.ring.pop().unwrap());
    guest.ring.give_back(first, 0);
    guest.ring.keep(second);
    let interrupt = guest.ring.interrupt.clone();
    let state = guest.ring.into_state();
    guest.ring = Ring::new(
        state,
        Arc::clone(&guest.driver.mem).into(),
        guest.driver.event.try_clone().unwrap(),
        interrupt,
    );
    let heads: Vec<u16> = turn(&mut guest).iter().map(|chain| chain.0).collect();
    assert_eq!(heads, [1, 2, 3, 4]);
    let used: Vec<u16> = guest.driver.all_used().iter().map(|used| used.0).collect();
    assert_eq!(used, [0, 1, 2, 3, 4]);
}

#[test]
fn chains_that_belong_together_are_seen_together() {
    let mut guest = Guest::new();
    for _ in 0..3 {
        guest.driver.offer(&[(0x1_0000, 16, WRITE)]);
    }
    let chains: Vec<_> = std::iter::from_fn(|| guest.ring.pop()).collect();
    let mut lens = [16, 16, 3].into_iter();
    let driver = &mut guest.driver;
    // The next one is asked for once the one before is in its place.
    guest
        .ring
        .give_back_together(chains.into_iter().map(|chain| {
            assert_eq!(driver.used(), None);
            (chain, lens.next().unwrap())
        }));
    assert_eq!(guest.driver.all_used(), [(0, 16), (1, 16), (2, 3)]);
    guest.ring.tell();
    assert_eq!(guest.irq.read().unwrap(), 1);
    guest.ring.give_back_together([]);
    guest.ring.tell();
    assert!(guest.irq.read().is_err(), "nothing to tell");
}
