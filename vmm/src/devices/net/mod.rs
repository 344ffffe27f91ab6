//! The network device (virtio 1.2, 5.1): frames between the guest and a tap, which
//! is a network interface of the host whose other side is a descriptor.
//!
//! Nothing is known here of addresses, routes or who may talk to whom: that is the
//! host's, behind the tap. The device knows frames, and what stands before each: the
//! kernel's header of a tap and virtio's are the same (`header.rs`), so that neither
//! side makes checksums or segments that nobody looks at.
//!
//! ```text
//! tap ── read ──► receive.rs ── receive queue ──► driver
//! tap ◄─ write ── transmit.rs ◄─ transmit queue ── driver
//! ```
//!
//! Who cannot take more holds the other back: the tap is read only when there are
//! buffers for a frame, and the transmit queue waits when the tap is full. So it is when
//! a limit allows no more for a while: each direction has one of its own. What is
//! dropped is counted ([`Counters`]), and no frame is cut short.
//!
//! **What the driver does not accept.** The tap's offloads were set before, and the
//! device cannot set them by what a driver accepts: its thread makes no such system
//! call. So a frame that came from the host without a checksum, or to be cut into
//! segments, is dropped if the driver did not offer to do that itself. Drivers that
//! accept neither see little of what the host's own programs send; those of Linux accept
//! all.
//!
//! Not here: several queues, a control queue, offloads of UDP (those of version 1.3
//! need a host's kernel that knows them, which cannot be told from the descriptor), a
//! link that goes down.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod counters;
mod header;
mod receive;
mod tap;
#[cfg(test)]
mod tests;
mod transmit;

use std::{io, os::fd::OwnedFd, sync::Arc};

use rustix::fs::{OFlags, fcntl_getfl};

pub use self::counters::{Counters, Passed, Totals};
pub(crate) use self::header::HEADER;
use self::{
    header::Terms,
    receive::{Receive, Wait},
    tap::Tap,
    transmit::{Room, Transmit},
};
use super::{Device, Io, Worker, limit::Limiter, queue::State};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched};

/// Entries of each queue.
const QUEUE: u16 = 256;
/// Receive, transmit (5.1.2).
pub const QUEUES: &[u16] = &[QUEUE; 2];

/// Feature bits (5.1.3).
mod feature {
    pub(super) const CSUM: u64 = 1 << 0;
    pub(super) const GUEST_CSUM: u64 = 1 << 1;
    pub(super) const MTU: u64 = 1 << 3;
    pub(super) const MAC: u64 = 1 << 5;
    pub(super) const GUEST_TSO4: u64 = 1 << 7;
    pub(super) const GUEST_TSO6: u64 = 1 << 8;
    pub(super) const GUEST_ECN: u64 = 1 << 9;
    pub(super) const HOST_TSO4: u64 = 1 << 11;
    pub(super) const HOST_TSO6: u64 = 1 << 12;
    pub(super) const HOST_ECN: u64 = 1 << 13;
    pub(super) const MRG_RXBUF: u64 = 1 << 15;
    pub(super) const STATUS: u64 = 1 << 16;

    /// All that the device offers.
    pub(super) const OFFERED: u64 = CSUM
        | GUEST_CSUM
        | MTU
        | MAC
        | GUEST_TSO4
        | GUEST_TSO6
        | GUEST_ECN
        | HOST_TSO4
        | HOST_TSO6
        | HOST_ECN
        | MRG_RXBUF
        | STATUS;
}

/// VIRTIO_NET_S_LINK_UP (5.1.4).
const LINK_UP: u16 = 1;

/// Least MTU that may be offered (5.1.4.1).
const LEAST_MTU: u16 = 68;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const READABLE: u32 = 2;
const WRITABLE: u32 = 3;
const MAY_RECEIVE: u32 = 4;
const MAY_TRANSMIT: u32 = 5;

/// Most work of one direction in a turn, so that other devices get theirs: frames,
/// their bytes, and chains that are taken from the queue.
#[derive(Debug)]
struct Budget {
    frames: u16,
    bytes: usize,
    chains: u16,
}

impl Budget {
    fn new() -> Budget {
        Budget {
            frames: QUEUE,
            bytes: 1 << 20,
            chains: QUEUE,
        }
    }

    fn spend(&mut self, bytes: usize) {
        self.frames = self.frames.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(bytes);
    }

    fn is_spent(&self) -> bool {
        self.frames == 0 || self.bytes == 0
    }
}

/// What the driver is told of its interface (virtio 1.2, 5.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Its address.
    pub mac: [u8; 6],
    /// Most bytes of a packet, without the Ethernet header: that of the tap.
    pub mtu: u16,
}

/// The device (virtio 1.2, 5.1).
#[derive(Debug)]
pub struct Net {
    events: Arc<EventLoop>,
    tap: Tap,
    /// The same, to be watched for room beside it.
    to_write: Arc<OwnedFd>,
    options: Options,
    counters: Arc<Counters>,
    limiters: Limiters,
}

/// What bounds each direction: nothing as yet.
#[derive(Clone, Debug)]
pub struct Limiters {
    /// What the guest receives.
    pub receive: Arc<Limiter>,
    /// What it sends.
    pub transmit: Arc<Limiter>,
}

impl Net {
    /// A device served by `events`, which is the other side of `tap`.
    ///
    /// The tap was made with IFF_TAP, IFF_NO_PI and IFF_VNET_HDR, its header has 12
    /// bytes (TUNSETVNETHDRSZ), and its offloads are TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6
    /// and TUN_F_TSO_ECN at most (TUNSETOFFLOAD): with fewer, frames come that the host
    /// has finished. It stays as it is, and does not block.
    ///
    /// # Errors
    /// InvalidInput: the descriptor blocks, the MTU is less than 68, or the address is
    /// none of one station.
    pub fn new(events: Arc<EventLoop>, tap: OwnedFd, options: Options) -> io::Result<Net> {
        let invalid = |text| Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        if !fcntl_getfl(&tap)?.contains(OFlags::NONBLOCK) {
            return invalid("The tap's descriptor blocks");
        }
        if options.mtu < LEAST_MTU {
            return invalid("The MTU is less than 68");
        }
        let [first, ..] = options.mac;
        if first & 1 != 0 || options.mac == [0; 6] {
            return invalid("The MAC address is none of one station");
        }
        Ok(Net {
            events,
            to_write: Arc::new(tap.try_clone()?),
            tap: Tap(Arc::new(tap)),
            options,
            counters: Arc::default(),
            limiters: Limiters {
                receive: Arc::new(Limiter::new()?),
                transmit: Arc::new(Limiter::new()?),
            },
        })
    }

    /// What passes and what does not.
    #[must_use]
    pub fn counters(&self) -> Arc<Counters> {
        Arc::clone(&self.counters)
    }

    /// What bounds it.
    #[must_use]
    pub fn limiters(&self) -> Limiters {
        self.limiters.clone()
    }
}

impl Device for Net {
    fn id(&self) -> u32 {
        1
    }

    fn features(&self) -> u64 {
        feature::OFFERED
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        // 5.1.4: mac, status, max_virtqueue_pairs, mtu.
        [
            self.options.mac.as_slice(),
            &LINK_UP.to_le_bytes(),
            &1_u16.to_le_bytes(),
            &self.options.mtu.to_le_bytes(),
        ]
        .concat()
    }

    fn activate(&mut self, io: Io) -> io::Result<Box<dyn Worker>> {
        let registration = self.events.add(|watch| Server::new(self, io, watch))?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        Registration::stop(*self).map_or_else(Vec::new, |server| {
            vec![
                Some(server.receive.into_state()),
                Some(server.transmit.into_state()),
            ]
        })
    }
}

struct Server {
    tap: Tap,
    to_write: Arc<OwnedFd>,
    receive: Receive,
    transmit: Transmit,
    /// The tap is watched while there are buffers and no frames.
    readable: Option<Watched<Arc<OwnedFd>>>,
    /// The tap is watched while there are frames and it takes none.
    writable: Option<Watched<Arc<OwnedFd>>>,
}

impl Handler for Server {
    fn ready(&mut self, token: u32, events: EventFlags, watch: &Watch<'_>) -> io::Result<()> {
        match token {
            RECEIVE => {
                self.receive.acknowledge();
                // Else the next frame is waited for, not buffers.
                if self.readable.is_none() {
                    self.receive(EventFlags::empty(), watch)?;
                }
            }
            READABLE => self.receive(events, watch)?,
            TRANSMIT => {
                self.transmit.acknowledge();
                if self.writable.is_none() {
                    self.transmit(watch)?;
                }
            }
            MAY_RECEIVE => {
                self.receive.try_again();
                self.receive(EventFlags::empty(), watch)?;
            }
            MAY_TRANSMIT => {
                self.transmit.try_again();
                self.transmit(watch)?;
            }
            _ => self.transmit(watch)?,
        }
        Ok(())
    }
}

impl Server {
    /// Takes the queues over and watches them.
    fn new(net: &Net, mut io: Io, watch: &Watch<'_>) -> io::Result<Server> {
        let terms = Terms::new(io.features, net.options.mtu);
        let mut take = |index| {
            io.take(index)
                .ok_or_else(|| io::Error::other("The driver left a queue of the network out"))
        };
        let (mut receive, mut transmit) = (take(0)?, take(1)?);
        receive.watch(watch, RECEIVE)?;
        transmit.watch(watch, TRANSMIT)?;
        let limiters = net.limiters();
        let may_receive = watch.add(limiters.receive, MAY_RECEIVE, EventFlags::IN)?;
        let may_transmit = watch.add(limiters.transmit, MAY_TRANSMIT, EventFlags::IN)?;
        Ok(Server {
            tap: net.tap.clone(),
            to_write: Arc::clone(&net.to_write),
            receive: Receive::new(receive, terms, net.counters(), may_receive),
            transmit: Transmit::new(transmit, terms, net.counters(), may_transmit),
            readable: None,
            writable: None,
        })
    }

    fn receive(&mut self, events: EventFlags, watch: &Watch<'_>) -> io::Result<()> {
        // An interface that was removed would be reported again and again.
        let removed = events.intersects(EventFlags::ERR | EventFlags::HUP);
        let waits = self.receive.turn(&self.tap) == Wait::Frame && !removed;
        if !waits {
            self.readable = None;
        } else if self.readable.is_none() {
            let tap = Arc::clone(&self.tap.0);
            self.readable = Some(watch.add(tap, READABLE, EventFlags::IN)?);
        }
        Ok(())
    }

    fn transmit(&mut self, watch: &Watch<'_>) -> io::Result<()> {
        match self.transmit.turn(&self.tap) {
            Room::Left => self.writable = None,
            Room::None if self.writable.is_none() => {
                let tap = Arc::clone(&self.to_write);
                self.writable = Some(watch.add(tap, WRITABLE, EventFlags::OUT)?);
            }
            Room::None => {}
        }
        Ok(())
    }
}
