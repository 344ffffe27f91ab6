//! Drivers that break the rules, want all of a thread's time, or do anything at all.

use std::{
    sync::atomic::AtomicBool,
    thread,
    time::{Duration, Instant},
};

use vm_memory::{Bytes, GuestAddress};

use super::*;

/// A device of the host that takes every frame, and has none to give.
fn sink() -> OwnedFd {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    rustix::fs::open("/dev/null", flags, rustix::fs::Mode::empty()).unwrap()
}

/// Tells another thread to end, also when this one panics: else it would be waited for.
struct Stop<'s>(&'s AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the device's socket gets of a header before a frame of 1000 bytes.
fn passes(header: Header, features: u64) -> bool {
    let mut guest = Guest::with(features, 0, BUFFER);
    guest.send(header, &frame(1000, 1));
    guest.send(plain(), &frame(100, 2));
    guest.notify_sent();
    let passed = guest.host_gets().is_some_and(|got| got.1.len() == 1000);
    if passed {
        assert!(guest.host_gets().is_some());
    }
    assert!(guest.host_gets().is_none());
    assert_eq!(guest.tx.all_used(), [(0, 0), (1, 0)]);
    let malformed = value(&guest.counters().malformed);
    assert_eq!(malformed, u64::from(!passed));
    passed
}

#[test]
fn malformed_headers_never_reach_the_tap_b51() {
    let good = to_be_cut();
    assert!(passes(good, feature::OFFERED));
    for bad in [
        Header {
            hdr_len: 1001,
            ..good
        },
        // The checksum lies beyond the frame, or would.
        Header {
            gso_type: NONE,
            csum_start: 983,
            ..good
        },
        Header {
            csum_start: 983,
            ..good
        },
        Header {
            gso_type: NONE,
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
            ..good
        },
        Header {
            gso_type: 255,
            ..good
        },
        Header {
            gso_type: 3,
            ..good
        },
        Header {
            gso_size: 0,
            ..good
        },
        Header { flags: 0, ..good },
    ] {
        assert!(!passes(bad, feature::OFFERED), "{bad:?}");
    }
    let missing = [feature::CSUM, feature::HOST_TSO4];
    for feature in missing {
        assert!(!passes(good, feature::OFFERED & !feature));
    }
}

#[test]
fn frames_of_no_possible_length_never_reach_the_tap_b51() {
    let mut guest = Guest::new(0);
    let header = to_be_cut().bytes();
    for (header, len) in [
        (header, LONGEST + 1),
        (header, 69_000),
        (plain().bytes(), 1519),
        (plain().bytes(), 13),
        (plain().bytes(), 0),
    ] {
        guest.send_bytes(&[header.as_slice(), &frame(len, 1)].concat());
    }
    // Less than a header.
    guest.send_bytes(&[0; 11]);
    guest.send_bytes(&[0]);
    let sent = [(to_be_cut(), LONGEST), (plain(), 1518), (plain(), 14)];
    for (header, len) in sent {
        guest.send(header, &frame(len, 2));
    }
    guest.notify_sent();
    for (header, len) in sent {
        assert!(guest.host_gets() == Some((header, frame(len, 2))), "{len}");
    }
    assert!(guest.host_gets().is_none());
    assert_eq!(guest.tx.all_used().len(), 10);
    assert_eq!(value(&guest.counters().malformed), 7);
}

#[test]
fn chains_of_the_other_direction_come_back_unused_b45() {
    let mut guest = Guest::new(0);
    let at = 0x300_0000;
    guest.tx.write(at, &[0; 0x1000]);
    guest.tx.offer(&[(at, 112, WRITE)]);
    guest.tx.offer(&[(at, 112, READ), (at + 112, 100, WRITE)]);
    guest.tx.offer(&[(at, 112, WRITE), (at + 112, 100, READ)]);
    guest.tx.offer(&[(at, 72, READ)]);
    guest.notify_sent();
    assert_eq!(guest.host_gets(), Some((plain(), vec![0; 60])));
    assert!(guest.host_gets().is_none());
    assert_eq!(guest.tx.all_used(), [(0, 0), (1, 0), (3, 0), (5, 0)]);
    assert_eq!(value(&guest.counters().malformed), 2);

    guest.rx.offer(&[(at, 2000, READ)]);
    guest.rx.offer(&[(at, 12, READ), (at + 12, 2000, WRITE)]);
    guest.rx.offer(&[(at, 12, WRITE), (at + 12, 2000, READ)]);
    // No room for a header, and just that.
    guest.rx.offer(&[(at, 11, WRITE)]);
    guest.rx.offer(&[(at + 0x1000, 12, WRITE)]);
    guest.rx.offer(&[(at + 0x2000, 1000, WRITE)]);
    guest.rx.notify();
    guest.host_sends(plain(), &frame(100, 1));
    guest.turns();
    let used = [(0, 0), (1, 0), (3, 0), (5, 0), (6, 12), (7, 100)];
    assert_eq!(guest.rx.all_used(), used);
    assert_eq!(value(&guest.counters().unusable), 3);
    assert!(guest.rx.read(at + 0x2000, 100) == frame(100, 1));
    assert_eq!(guest.rx.read(at, 2000), [0; 2000]);
}

#[test]
fn a_turn_ends_although_there_is_more_to_send_b46() {
    let (_, host) = pair();
    let mut guest = Guest::at(sink(), host, feature::OFFERED, 0, BUFFER);
    // Of the largest frames, some; with a budget that small ones do not use up.
    for _ in 0..QUEUE {
        guest.send_bytes(&[&to_be_cut().bytes(), &[0; LONGEST][..]].concat());
    }
    guest.tx.notify();
    guest.events.turn().unwrap();
    assert_eq!(guest.tx.all_used().len(), 16);
    assert!(guest.events.is_ready(), "another turn is due");
    guest.turns();
    assert_eq!(guest.tx.all_used().len(), 240);
}

/// Has another processor make this chain available again and again, and gives the
/// device one turn; how many chains it gave back.
fn used_in_a_turn(events: &EventLoop, mut driver: Driver, head: u16) -> usize {
    let stop = AtomicBool::new(false);
    let event = driver.event.try_clone().unwrap();
    thread::scope(|scope| {
        let processor = scope.spawn(|| {
            for _ in 0..QUEUE {
                driver.make_available(head);
            }
            event.write(1).unwrap();
            let mut used = 0;
            while !stop.load(Ordering::Relaxed) {
                let back = driver.all_used().len();
                used += back;
                for _ in 0..back {
                    driver.make_available(head);
                }
            }
            used + driver.all_used().len()
        });
        let ends = Stop(&stop);
        let started = Instant::now();
        events.turn().unwrap();
        assert!(started.elapsed() < Duration::from_secs(5));
        drop(ends);
        processor.join().unwrap()
    })
}

#[test]
fn a_driver_that_offers_chains_without_end_does_not_keep_the_thread_b46() {
    // Frames, frames that are none, and buffers that are none.
    for (len, is_tx) in [(112, true), (5, true), (5, false)] {
        let (_, host) = pair();
        let mut guest = Guest::at(sink(), host, feature::OFFERED, 0, BUFFER);
        let mem = &guest.tx.mem;
        let other = Driver::with_size(mem, 0x380_0000, SLOT, QUEUE);
        let queue = if is_tx { &mut guest.tx } else { &mut guest.rx };
        let flags = if is_tx { READ } else { WRITE };
        queue.write_descriptor(0, (0x300_0000, len, flags, 0));
        let queue = std::mem::replace(queue, other);
        let used = used_in_a_turn(&guest.events, queue, 0);
        assert_eq!(used, usize::from(QUEUE), "{len} {is_tx}");
        assert!(guest.events.is_ready(), "another turn is due");
    }
}

#[test]
fn frames_without_end_for_the_guest_do_not_keep_the_thread() {
    for (header, received) in [(plain(), 200), (to_be_cut(), 0)] {
        let Ok((tap, host)) = datagrams() else {
            println!("skipped: this machine has no loopback interface");
            return;
        };
        let features = feature::OFFERED & !feature::GUEST_TSO4;
        let mut guest = Guest::at(tap, host, features, 200, BUFFER);
        for _ in 0..QUEUE + 100 {
            guest.host_sends(header, &frame(100, 1));
        }
        // With buffers for each, and without one of use.
        guest.events.turn().unwrap();
        let counters = guest.counters();
        assert_eq!(value(&counters.received.frames), received);
        let dropped = value(&counters.not_negotiated);
        assert_eq!(dropped, u64::from(QUEUE) * u64::from(received == 0));
        guest.offer(56);
        guest.rx.notify();
        guest.turns();
        let counted = value(&counters.received.frames) + value(&counters.not_negotiated);
        assert_eq!(counted, if received == 0 { 356 } else { 256 });
    }
}

/// Two sockets that keep hundreds of messages apart.
fn datagrams() -> io::Result<(OwnedFd, OwnedFd)> {
    let ours = std::net::UdpSocket::bind("127.0.0.1:0")?;
    let theirs = std::net::UdpSocket::bind("127.0.0.1:0")?;
    ours.connect(theirs.local_addr()?)?;
    theirs.connect(ours.local_addr()?)?;
    ours.set_nonblocking(true)?;
    theirs.set_nonblocking(true)?;
    let ours = OwnedFd::from(ours);
    net::sockopt::set_socket_recv_buffer_size_force(&ours, 4 << 20)?;
    Ok((ours, theirs.into()))
}

#[test]
fn a_processor_that_rewrites_a_header_meanwhile_says_nothing_to_the_kernel_b46() {
    let mut guest = Guest::new(0);
    let mem = Arc::clone(&guest.tx.mem);
    let at = guest.tx.buffer(0).0;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let good = to_be_cut().bytes();
            let headers = [
                [0xff; HEADER],
                good,
                Header {
                    csum_start: 2000,
                    ..to_be_cut()
                }
                .bytes(),
                good,
                Header {
                    hdr_len: 2000,
                    ..to_be_cut()
                }
                .bytes(),
                good,
            ];
            for header in headers.iter().cycle() {
                mem.write_slice(header, GuestAddress(at)).unwrap();
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let _stop = Stop(&stop);
        guest.tx.describe(0, 1012, READ);
        let (mut sent, mut refused) = (0, 0);
        let deadline = Instant::now() + Duration::from_secs(60);
        while sent < 5000 || refused < 100 {
            guest.tx.make_available(0);
            guest.notify_sent();
            assert_eq!(guest.tx.all_used(), [(0, 0)]);
            if let Some((header, bytes)) = guest.host_gets() {
                assert_eq!(bytes.len(), 1000);
                let terms = Terms::new(feature::OFFERED, OPTIONS.mtu);
                assert_eq!(header.for_tap(terms, 1000), Some(header));
                sent += 1;
            } else {
                refused += 1;
            }
            assert!(Instant::now() < deadline, "{sent} {refused}");
        }
    });
}

/// Numbers that are the same in each run (xorshift).
struct Numbers(u64);

impl Numbers {
    /// One that is less than `below`, and fits.
    fn next<T: TryFrom<u64>>(&mut self, below: u64) -> T {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        T::try_from((self.0 >> 16) % below).ok().unwrap()
    }

    /// Whether the one case of so many is there.
    fn one_in(&mut self, cases: u64) -> bool {
        self.next::<u64>(cases) == 0
    }

    fn of<T: Copy>(&mut self, values: &[T]) -> T {
        values[self.next::<usize>(values.len() as u64)]
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next(256)).collect()
    }

    fn header(&mut self) -> Header {
        if self.one_in(4) {
            return Header::parse(self.bytes(HEADER)[..].try_into().unwrap());
        }
        let mut near = |value: u16| {
            if self.one_in(4) {
                self.next(2000)
            } else {
                value
            }
        };
        Header {
            flags: near(1).to_le_bytes()[0],
            gso_type: near(1).to_le_bytes()[0],
            hdr_len: near(54),
            gso_size: near(1448),
            csum_start: near(34),
            csum_offset: near(16),
            num_buffers: near(0),
        }
    }

    /// `elsewhere` are addresses that it may have, too.
    fn descriptor(&mut self, flags: u16, elsewhere: &[u64]) -> (u64, u32, u16, u16) {
        let buffer = 0x300_0000 + self.next::<u64>(0x10_0000);
        let address = if self.one_in(20) {
            self.of(elsewhere)
        } else {
            buffer
        };
        let len = match self.next::<u64>(20) {
            0 => self.of(&[0, 1, u32::MAX, 0x8000_0000]),
            1..4 => self.next(70_000),
            4..8 => self.next(40),
            _ => self.next(1600),
        };
        let flags = match self.next::<u64>(12) {
            0 => self.next(8),
            1..4 => flags | NEXT,
            _ => flags,
        };
        let next = match self.next::<u64>(40) {
            0 => self.next(0x1_0000),
            _ => self.next(QUEUE.into()),
        };
        (address, len, flags, next)
    }
}

#[test]
fn whatever_a_driver_does_nothing_but_sense_reaches_the_host_b43_b44_b45_b46_b51() {
    let mut numbers = Numbers(0x2545_f491_4f6c_dd1d);
    let (mut sent, mut received, mut broken) = (0, 0, 0);
    let end = 64 << 20;
    let outside = [end, end - 1, u64::MAX, 1 << 40];
    // The rings themselves.
    let rings = [0x1000, 0x2000, 0x3000, 0x200_1000, 0x200_2000];
    for round in 0..80 {
        let over_rings = round % 4 == 3;
        let elsewhere: &[u64] = if over_rings { &rings } else { &outside };
        let features = match round % 3 {
            0 => feature::OFFERED,
            1 => feature::OFFERED & !feature::MRG_RXBUF,
            _ => numbers.next::<u64>(u64::MAX) & feature::OFFERED,
        };
        let terms = Terms::new(features, OPTIONS.mtu);
        let mut guest = Guest::with(features, 0, BUFFER);
        let mut available = [0; 2];
        for _ in 0..1000 {
            let is_tx = numbers.one_in(2);
            let flags = if is_tx { READ } else { WRITE };
            let count = &mut available[usize::from(is_tx)];
            let queue = if is_tx { &mut guest.tx } else { &mut guest.rx };
            match numbers.next::<u64>(16) {
                0..4 => {
                    let index = numbers.next(QUEUE.into());
                    let (address, mut len, flags, next) = numbers.descriptor(flags, elsewhere);
                    if is_tx && (0x300_0000..0x310_0000).contains(&address) {
                        queue.write(address, &numbers.header().bytes());
                        len = len.max(12);
                    }
                    queue.write_descriptor(index, (address, len, flags, next));
                }
                4..10 => {
                    queue.make_available(numbers.next(QUEUE.into()));
                    *count += 1;
                }
                10..12 => queue.notify(),
                12..15 => {
                    let len = numbers.of(&[0, 5, 14, 60, 1000, 1514, 1519, 9000, 65_550, 65_560]);
                    let header = numbers.header();
                    let bytes = [&header.bytes(), &*frame(len, 1)].concat();
                    // Full of what was not read, now and then.
                    let _ = net::send(&guest.host, &bytes, SendFlags::DONTWAIT);
                }
                // Rarely: the queue is dead then.
                _ if numbers.one_in(200) => {
                    queue.make_available(QUEUE + numbers.next::<u16>(1000));
                }
                _ if numbers.one_in(200) => {
                    queue.set_available(numbers.next(0x1_0000));
                    *count += usize::from(QUEUE);
                }
                _ => {}
            }
            if guest.events.is_ready() {
                guest.events.turn().unwrap();
            }
            while let Some((header, bytes)) = guest.host_gets() {
                assert_eq!(header.for_tap(terms, bytes.len()), Some(header));
                sent += 1;
            }
        }
        guest.tx.notify();
        guest.rx.notify();
        // More than once for what waits behind a full socket.
        for _ in 0..10 {
            guest.turns();
            while guest.host_gets().is_some() {}
        }
        received += value(&guest.counters().received.frames);
        if !over_rings {
            let used = [guest.rx.all_used(), guest.tx.all_used()].map(|used| used.len());
            broken += usize::from(used[1] < available[1]);
            // Each once at most.
            assert!(used[0] <= available[0] && used[1] <= available[1]);
        }
        let states = guest.worker.take().unwrap().stop();
        assert!(matches!(states[..], [Some(_), Some(_)]));
    }
    // It was about something.
    println!("{sent} sent, {received} received, {broken} broken");
    assert!(sent > 150 && received > 200 && broken > 5);
}
