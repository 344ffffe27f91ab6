//! Frames of the guest, a tap that is full, and chains of very small parts.

use super::*;

#[test]
fn a_full_tap_holds_the_guest_back_and_order_is_kept() {
    let mut guest = Guest::new(0);
    let taken = guest.fill_the_tap();
    guest.send(plain(), &frame(100, 30));
    guest.notify_sent();
    assert!(guest.tx.used().is_none());
    for mark in 0..31 {
        if guest.events.is_ready() {
            guest.turns();
        }
        let got = guest.host_gets().expect("a frame");
        assert!(got == (plain(), frame(100, mark)), "{mark}");
    }
    assert!(guest.host_gets().is_none());
    guest.turns();
    assert_eq!(guest.tx.all_used().len(), 31 - taken);
    assert_eq!(value(&guest.counters().transmitted.frames), 31);
    // And nothing waits for room any more.
    guest.send(plain(), &frame(100, 1));
    guest.notify_sent();
    assert!(guest.host_gets().is_some() && !guest.events.is_ready());
}

#[test]
fn a_full_tap_does_not_keep_frames_for_the_guest() {
    let mut guest = Guest::new(5);
    guest.fill_the_tap();
    guest.host_sends(plain(), &frame(200, 1));
    guest.turns();
    guest.expect(&frame(200, 1));
}

#[test]
fn chains_of_parts_of_one_byte_are_frames_too() {
    let mut guest = Guest::new(0);
    let bytes = frame(usize::from(QUEUE) - HEADER, 9);
    let sent = [&plain().bytes(), bytes.as_slice()].concat();
    guest.tx.write(0x300_0000, &sent);
    let chain: Vec<_> = (0..sent.len() as u64)
        .map(|at| (0x300_0000 + at, 1, READ))
        .collect();
    guest.tx.offer(&chain);
    guest.notify_sent();
    assert_eq!(guest.host_gets(), Some((plain(), bytes)));

    // Eight tables of 200: more parts than the kernel takes at once.
    let (tables, data) = (0x310_0000, 0x320_0000);
    for table in 0..8_u16 {
        for part in 0..200_u16 {
            let at = u64::from(table * 200 + part);
            let next = if part == 199 { 0 } else { NEXT };
            // Every other byte of memory.
            let raw = (data + 2 * at, 1, WRITE | next, part + 1);
            let entry = tables + u64::from(table) * 0x1000 + u64::from(part) * 16;
            guest.rx.write(entry, &descriptor(raw));
        }
        let at = tables + u64::from(table) * 0x1000;
        guest.rx.write_descriptor(table, (at, 3200, INDIRECT, 0));
        guest.rx.make_available(table);
    }
    guest.rx.notify();
    guest.turns();
    let bytes = frame(1518, 4);
    guest.host_sends(plain(), &bytes);
    guest.turns();
    let mut used: Vec<_> = (0..7).map(|head| (head, 200)).collect();
    used.push((7, 130));
    assert_eq!(guest.rx.all_used(), used);
    let got = guest.rx.read(data, 2 * 1600);
    let header = Header {
        num_buffers: 8,
        ..plain()
    };
    let expected = [&header.bytes(), bytes.as_slice(), &[0; 70]].concat();
    let (even, odd): (Vec<_>, Vec<_>) = got.chunks(2).map(|pair| (pair[0], pair[1])).unzip();
    assert!(even == expected && odd.iter().all(|byte| *byte == 0));
}
