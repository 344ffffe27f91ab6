//! The device between a driver made of two rings in ordinary memory and a pair of
//! sockets that keeps messages apart, as a tap does. `tap.rs` has real ones.
//!
//! The loop has no thread: a test turns it, and so knows when it rests.

mod hostile;
mod life;
mod limits;
mod receive;
mod tap;
mod transmit;

use std::{collections::VecDeque, sync::atomic::Ordering};

use rustix::{
    io::Errno,
    net::{self, AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType},
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::header::{ECN, HEADER, Header, LONGEST, NEEDS_CSUM, NONE, TCP_V4};
use super::*;
use crate::devices::{
    queue::Ring,
    testing::{Driver, INDIRECT, NEXT, READ, WRITE, descriptor, interrupt, memory},
};

const OPTIONS: Options = Options {
    mac: [2, 0, 0, 0, 0, 1],
    mtu: 1500,
};

/// As Linux fills its queue: 256 of these are more than any frame.
const BUFFER: u32 = 1536;

/// Most bytes of what a test puts in one place.
const SLOT: u32 = 0x1_1000;

struct Guest {
    rx: Driver,
    tx: Driver,
    /// Descriptors of the receive queue that are the driver's.
    free: VecDeque<u16>,
    /// Frames sent so far, modulo the queue's length the slot of the next.
    sent: u16,
    events: Arc<EventLoop>,
    net: Net,
    worker: Option<Box<dyn Worker>>,
    irq: Arc<EventFd>,
    /// The other side of the tap.
    host: OwnedFd,
}

fn pair() -> (OwnedFd, OwnedFd) {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap()
}

fn value(counter: &std::sync::atomic::AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

/// A frame of so many bytes, by which it can be told from others.
fn frame(len: usize, mark: u8) -> Vec<u8> {
    (0..len)
        .map(|at| mark ^ u8::try_from(at % 251).unwrap())
        .collect()
}

impl Guest {
    /// A guest that has accepted all and offers this many receive buffers.
    fn new(buffers: usize) -> Guest {
        Guest::with(feature::OFFERED, buffers, BUFFER)
    }

    fn with(features: u64, buffers: usize, buffer_len: u32) -> Guest {
        let (ours, theirs) = pair();
        Guest::at(ours, theirs, features, buffers, buffer_len)
    }

    /// With `tap` for a tap.
    fn at(tap: OwnedFd, host: OwnedFd, features: u64, buffers: usize, buffer_len: u32) -> Guest {
        let mem = memory(64 << 20);
        let events = EventLoop::new("test").unwrap();
        let net = Net::new(Arc::clone(&events), tap, OPTIONS).unwrap();
        let mut guest = Guest {
            rx: Driver::with_size(&mem, 0x1000, buffer_len, QUEUE),
            tx: Driver::with_size(&mem, 0x200_0000, SLOT, QUEUE),
            free: (0..QUEUE).collect(),
            sent: 0,
            events,
            net,
            worker: None,
            irq: Arc::new(EventFd::new(EFD_NONBLOCK).unwrap()),
            host,
        };
        guest.offer(buffers);
        let rings = [&guest.rx, &guest.tx].map(|queue| queue.ring(interrupt(&guest.irq)));
        guest.activate(rings, features);
        guest.turns();
        guest
    }

    fn activate(&mut self, rings: [Ring; 2], features: u64) {
        let queues = rings.into_iter().map(Some).collect();
        let worker = self.net.activate(Io { queues, features });
        self.worker = Some(worker.unwrap());
    }

    /// Stops the device and starts another at the place to which it came.
    fn restart(&mut self) {
        let states = self.worker.take().unwrap().stop();
        let [Some(rx), Some(tx)] = states[..] else {
            panic!("{states:?}");
        };
        let ring = |state, queue: &Driver| {
            let event = queue.event.try_clone().unwrap();
            Ring::new(
                state,
                Arc::clone(&queue.mem).into(),
                event,
                interrupt(&self.irq),
            )
        };
        let rings = [ring(rx, &self.rx), ring(tx, &self.tx)];
        self.activate(rings, feature::OFFERED);
    }

    /// Turns the loop until it rests.
    fn turns(&self) {
        for _ in 0..1000 {
            if !self.events.is_ready() {
                return;
            }
            self.events.turn().unwrap();
        }
        panic!("it does not come to rest");
    }

    /// Lets the tap take few frames at once, none of which is large.
    fn narrow(&self) {
        net::sockopt::set_socket_send_buffer_size(&*self.net.tap.0, 1).unwrap();
    }

    /// Makes 30 frames available, more than a narrow tap takes; how many it took.
    fn fill_the_tap(&mut self) -> usize {
        self.narrow();
        for mark in 0..30 {
            self.send(plain(), &frame(100, mark));
        }
        self.notify_sent();
        let taken = self.tx.all_used().len();
        assert!((1..30).contains(&taken), "{taken}");
        taken
    }

    fn counters(&self) -> Arc<Counters> {
        self.net.counters()
    }

    /// Offers receive buffers, without a notification.
    fn offer(&mut self, count: usize) {
        for index in self.free.drain(..count) {
            self.rx.describe(index, self.rx.buffer_len, WRITE);
            self.rx.make_available(index);
        }
    }

    fn offer_and_notify(&mut self, count: usize) {
        self.offer(count);
        self.rx.notify();
        self.turns();
    }

    /// The next buffer that the device used.
    fn used_buffer(&mut self) -> Option<Vec<u8>> {
        let (head, len) = self.rx.used()?;
        self.free.push_back(head);
        let at = self.rx.buffer(head).0;
        Some(self.rx.read(at, usize::try_from(len).unwrap()))
    }

    /// The next frame that the guest has received, all of whose buffers are there.
    fn received(&mut self) -> Option<(Header, Vec<u8>)> {
        let mut bytes = self.used_buffer()?;
        let header = Header::parse(bytes[..HEADER].try_into().unwrap());
        for _ in 1..header.num_buffers {
            bytes.extend(self.used_buffer().expect("all at once"));
        }
        Some((header, bytes.split_off(HEADER)))
    }

    fn expect(&mut self, expected: &[u8]) -> Header {
        let (header, bytes) = self.received().expect("a frame");
        assert!(bytes == expected, "{} bytes, {:?}", bytes.len(), header);
        header
    }

    /// Makes a frame available to the device, which is not notified.
    fn send(&mut self, header: Header, bytes: &[u8]) {
        self.send_bytes(&[&header.bytes(), bytes].concat());
    }

    fn send_bytes(&mut self, bytes: &[u8]) {
        let index = self.sent % QUEUE;
        self.sent = self.sent.wrapping_add(1);
        self.tx.write(self.tx.buffer(index).0, bytes);
        let len = u32::try_from(bytes.len()).unwrap();
        self.tx.describe(index, len, READ);
        self.tx.make_available(index);
    }

    fn notify_sent(&self) {
        self.tx.notify();
        self.turns();
    }

    fn host_sends(&self, header: Header, bytes: &[u8]) {
        let bytes = [&header.bytes(), bytes].concat();
        net::send(&self.host, &bytes, SendFlags::empty()).unwrap();
    }

    /// The next frame that the host got.
    fn host_gets(&self) -> Option<(Header, Vec<u8>)> {
        let mut bytes = vec![0; LONGEST + HEADER + 1];
        match net::recv(&self.host, &mut bytes[..], RecvFlags::empty()) {
            Err(Errno::AGAIN) => None,
            Err(error) => panic!("{error}"),
            Ok((_, len)) => {
                bytes.truncate(len);
                let header = Header::parse(bytes[..HEADER].try_into().unwrap());
                Some((header, bytes.split_off(HEADER)))
            }
        }
    }
}

/// What stands before a frame that is complete.
fn plain() -> Header {
    Header::default()
}

/// The same of one of TCP over IPv4 that is to be cut.
fn to_be_cut() -> Header {
    Header {
        flags: NEEDS_CSUM,
        gso_type: TCP_V4,
        hdr_len: 54,
        gso_size: 1448,
        csum_start: 34,
        csum_offset: 16,
        num_buffers: 0,
    }
}

#[test]
fn a_frame_goes_each_way() {
    let mut guest = Guest::new(2);
    let (there, back) = (frame(1514, 1), frame(60, 2));
    guest.host_sends(plain(), &there);
    guest.turns();
    let header = guest.expect(&there);
    assert_eq!(
        header,
        Header {
            num_buffers: 1,
            ..plain()
        }
    );
    assert!(guest.received().is_none());
    guest.send(plain(), &back);
    guest.notify_sent();
    assert_eq!(guest.host_gets(), Some((plain(), back)));
    assert_eq!(guest.tx.all_used(), [(0, 0)]);
    let counters = guest.counters();
    assert_eq!(value(&counters.received.frames), 1);
    assert_eq!(value(&counters.received.bytes), 1514);
    assert_eq!(value(&counters.transmitted.frames), 1);
    assert_eq!(value(&counters.transmitted.bytes), 60);
}

#[test]
fn what_is_left_to_the_other_side_is_said_as_negotiated() {
    let mut guest = Guest::new(100);
    let big = frame(30_000, 3);
    guest.host_sends(to_be_cut(), &big);
    guest.turns();
    let header = guest.expect(&big);
    let num_buffers = 20;
    assert_eq!(
        header,
        Header {
            num_buffers,
            ..to_be_cut()
        }
    );
    guest.send(to_be_cut(), &big);
    guest.notify_sent();
    assert_eq!(guest.host_gets(), Some((to_be_cut(), big)));
}
