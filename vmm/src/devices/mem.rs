//! Memory that the guest gets and gives back while it runs (virtio 1.2, 5.15).
//!
//! The driver plugs blocks of [`BLOCK`] bytes until it has what is asked of it, and
//! unplugs those that it can do without when it is asked for less. Which it takes is its
//! own choice; a block that it gave back is the host's again at once.
//!
//! What it can touch is bounded by what it was ever asked to have: beyond that there is
//! no memory of the host. A driver that goes on using what it gave back, which nothing
//! in the processor forbids, gains no more than that.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::{
    fmt, io,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    Device, Interrupt, Io, Worker,
    queue::{Chain, Ring, Served, State},
};
use crate::{
    event_loop::{EventFlags, EventLoop, Handler, Registration, Watch},
    memory::Memory,
    mmio::Clear,
};

/// Bytes of a block: a huge page.
pub const BLOCK: u64 = 2 << 20;

/// The queue of the driver's requests.
pub const QUEUES: &[u16] = &[64];

/// VIRTIO_MEM_F_UNPLUGGED_INACCESSIBLE (5.15.3): there may be nothing where nothing is
/// plugged.
const UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// Bytes of a request and of an answer (5.15.6).
const REQUEST: usize = 24;
const ANSWER: usize = 10;

/// Requests (5.15.6).
mod request {
    pub(super) const PLUG: u16 = 0;
    pub(super) const UNPLUG: u16 = 1;
    pub(super) const UNPLUG_ALL: u16 = 2;
    pub(super) const STATE: u16 = 3;
}

/// How a request is answered (5.15.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    /// It is done; of a question for the state, what that is.
    Ack(u16),
    /// More than is asked for.
    Nack,
    /// The host does not do it.
    Busy,
    /// The driver breaks a rule.
    Error,
}

impl Answer {
    /// States of blocks.
    const PLUGGED: u16 = 0;
    const UNPLUGGED: u16 = 1;
    const MIXED: u16 = 2;

    fn encode(self) -> [u8; ANSWER] {
        let (kind, state) = match self {
            Answer::Ack(state) => (0, state),
            Answer::Nack => (1, 0),
            Answer::Busy => (2, 0),
            Answer::Error => (3, 0),
        };
        let [kind, _] = u16::to_le_bytes(kind);
        let [low, high] = state.to_le_bytes();
        [kind, 0, 0, 0, 0, 0, 0, 0, low, high]
    }
}

/// What the driver can have, and what it has of it.
#[derive(Debug)]
pub struct Pool {
    /// Guest-physical address.
    start: u64,
    /// Bytes of address space.
    size: u64,
    memory: Memory,
    held: Mutex<Held>,
}

#[derive(Debug, Default)]
struct Held {
    /// Bytes from the start behind which there is nothing.
    usable: u64,
    /// Bytes that the driver is to have.
    requested: u64,
    /// Bytes that it has.
    plugged: u64,
    /// The same by block.
    blocks: Vec<bool>,
    /// To the driver, while there is one.
    interrupt: Option<Interrupt>,
}

impl Pool {
    /// Address space of `size` bytes from `start` on, both multiples of [`BLOCK`], in
    /// which there is nothing as yet.
    #[must_use]
    pub fn new(start: u64, size: u64, memory: Memory) -> Pool {
        Pool {
            start,
            size,
            memory,
            held: Mutex::default(),
        }
    }

    /// Bytes from the start that are memory of the host.
    #[must_use]
    pub fn usable(&self) -> u64 {
        self.held().usable
    }

    /// Bytes that the driver has.
    #[must_use]
    pub fn plugged(&self) -> u64 {
        self.held().plugged
    }

    /// Asks the driver to have `requested` bytes; the first `usable` bytes are memory by
    /// now, or as many as ever before.
    pub fn ask(&self, requested: u64, usable: u64) {
        let mut held = self.held();
        held.requested = requested;
        held.usable = usable.max(held.usable).min(self.size);
        let blocks = usize::try_from(held.usable.div_euclid(BLOCK)).unwrap_or(0);
        held.blocks.resize(blocks, false);
        if let Some(interrupt) = &held.interrupt {
            interrupt.config_change(&self.config(&held));
        }
    }

    /// 5.15.4
    fn config(&self, held: &Held) -> Vec<u8> {
        // No node of memory is told.
        let words = [
            BLOCK,
            0,
            self.start,
            self.size,
            held.usable,
            held.plugged,
            held.requested,
        ];
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn serve(&self, [kind, address, count]: [u64; 3]) -> Answer {
        let mut held = self.held();
        let answer = match u16::try_from(kind & 0xffff).unwrap_or(u16::MAX) {
            request::UNPLUG_ALL => self.unplug(&mut held, 0, None),
            kind => match self.blocks(&held, address, count & 0xffff) {
                Some(blocks) => self.change(&mut held, kind, blocks),
                None => Answer::Error,
            },
        };
        if let Some(interrupt) = &held.interrupt {
            interrupt.show(&self.config(&held));
        }
        answer
    }

    fn change(&self, held: &mut Held, kind: u16, blocks: Range<usize>) -> Answer {
        let first = blocks.start;
        let length = bytes(blocks.len());
        let have = held.blocks.get_mut(blocks).unwrap_or_default();
        let plugged = have.iter().filter(|plugged| **plugged).count();
        match kind {
            request::STATE if plugged == 0 => Answer::Ack(Answer::UNPLUGGED),
            request::STATE if plugged == have.len() => Answer::Ack(Answer::PLUGGED),
            request::STATE => Answer::Ack(Answer::MIXED),
            request::PLUG if plugged > 0 => Answer::Error,
            request::PLUG if held.plugged.saturating_add(length) > held.requested => Answer::Nack,
            request::PLUG => {
                have.fill(true);
                held.plugged = held.plugged.saturating_add(length);
                Answer::Ack(0)
            }
            request::UNPLUG if plugged < have.len() => Answer::Error,
            request::UNPLUG => {
                let end = first.saturating_add(have.len());
                self.unplug(held, first, Some(end))
            }
            _ => Answer::Error,
        }
    }

    /// Gives blocks back to the host, to the last one if no end is said.
    fn unplug(&self, held: &mut Held, first: usize, end: Option<usize>) -> Answer {
        let end = end.unwrap_or(held.blocks.len());
        let (start, length) = (bytes(first), bytes(end.saturating_sub(first)));
        let start = self.start.saturating_add(start);
        if length > 0 && self.memory.discard(start, length).is_err() {
            return Answer::Busy;
        }
        let blocks = held.blocks.get_mut(first..end).unwrap_or_default();
        for block in blocks {
            if std::mem::take(block) {
                held.plugged = held.plugged.saturating_sub(BLOCK);
            }
        }
        Answer::Ack(0)
    }

    /// The blocks of a request, if there is memory for all of them.
    fn blocks(&self, held: &Held, address: u64, count: u64) -> Option<Range<usize>> {
        let offset = address.checked_sub(self.start)?;
        if count == 0 || !offset.is_multiple_of(BLOCK) {
            return None;
        }
        let first = usize::try_from(offset.div_euclid(BLOCK)).ok()?;
        let end = first.checked_add(usize::try_from(count).ok()?)?;
        (end <= held.blocks.len()).then_some(first..end)
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        // A panic ends the process: what it left is never seen.
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn bytes(blocks: usize) -> u64 {
    u64::try_from(blocks).unwrap_or(0).saturating_mul(BLOCK)
}

/// The device.
pub struct Mem {
    events: Arc<EventLoop>,
    pool: Arc<Pool>,
    /// Signalled by the driver's acknowledgements of changes.
    acknowledged: Option<EventFd>,
    clear: Option<Registration<Clear>>,
}

impl fmt::Debug for Mem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mem")
            .field("pool", &self.pool)
            .finish_non_exhaustive()
    }
}

impl Mem {
    /// A device for this memory, served by `events`. `acknowledged` is signalled when the
    /// driver has seen a change of the configuration.
    #[must_use]
    pub fn new(events: Arc<EventLoop>, pool: Arc<Pool>, acknowledged: EventFd) -> Mem {
        Mem {
            events,
            pool,
            acknowledged: Some(acknowledged),
            clear: None,
        }
    }
}

impl Device for Mem {
    fn id(&self) -> u32 {
        24
    }

    fn features(&self) -> u64 {
        UNPLUGGED_INACCESSIBLE
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.pool.config(&self.pool.held())
    }

    fn activate(&mut self, mut io: Io) -> io::Result<Box<dyn Worker>> {
        let mut ring = io.take(0).ok_or(io::ErrorKind::InvalidInput)?;
        if let Some(acknowledged) = self.acknowledged.take() {
            let clear = ring.interrupt().clear_on(acknowledged, &self.events)?;
            self.clear = Some(clear);
        }
        let pool = Arc::clone(&self.pool);
        // What was asked for since the driver read it, it is told of.
        pool.held().interrupt = Some(ring.interrupt().clone());
        let registration = self.events.add(|watch| {
            ring.watch(watch, 0)?;
            Ok(Server { ring, pool })
        })?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        let server = Registration::stop(*self);
        vec![server.map(|server| {
            // The blocks stay as they are (5.15.5.1).
            server.pool.held().interrupt = None;
            server.ring.into_state()
        })]
    }
}

struct Server {
    ring: Ring,
    pool: Arc<Pool>,
}

impl Handler for Server {
    fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        self.ring.acknowledge();
        let pool = &self.pool;
        self.ring.turn(|chain| Served::Used(serve(pool, chain)));
        Ok(())
    }
}

/// Answers a request; how many bytes were written.
fn serve(pool: &Pool, chain: &Chain) -> usize {
    let mut writer = chain.writer();
    if writer.len() < ANSWER {
        return 0;
    }
    let answer = match chain.reader().read_array::<REQUEST>() {
        Ok(request) => {
            let mut words = [0; 3];
            for (word, bytes) in words.iter_mut().zip(request.as_chunks().0) {
                *word = u64::from_le_bytes(*bytes);
            }
            pool.serve(words)
        }
        Err(_) => Answer::Error,
    };
    writer.write(&answer.encode());
    writer.written()
}

#[cfg(test)]
mod tests;
