//! Frames of the guest: from the driver's buffers to the tap.
//!
//! The header is copied once and checked, and the kernel gets the copy: what another
//! processor of the guest writes meanwhile is heard by nobody. The frame itself goes
//! unread; it may change until the kernel has copied it, as on any wire.

use std::{io, sync::Arc};

use super::{
    Budget,
    counters::{Counters, count},
    header::{HEADER, Header, Terms},
    tap::Tap,
};
use crate::{
    devices::{
        limit::Limiter,
        queue::{Chain, Ring, Served, State},
    },
    event_loop::Watched,
};

/// Whether the tap takes more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    Left,
    /// It took no more: what it did not take is still available.
    None,
}

pub(super) struct Transmit {
    ring: Ring,
    terms: Terms,
    counters: Arc<Counters>,
    limiter: Watched<Arc<Limiter>>,
}

impl Transmit {
    pub(super) fn new(
        ring: Ring,
        terms: Terms,
        counters: Arc<Counters>,
        limiter: Watched<Arc<Limiter>>,
    ) -> Transmit {
        Transmit {
            ring,
            terms,
            counters,
            limiter,
        }
    }

    /// Takes the notification of new frames.
    pub(super) fn acknowledge(&self) {
        self.ring.acknowledge();
    }

    /// Takes the notification that more may pass.
    pub(super) fn try_again(&self) {
        self.limiter.acknowledge();
    }

    /// Gives the tap the frames that there are, within a turn's budget.
    pub(super) fn turn(&mut self, tap: &Tap) -> Room {
        let mut budget = Budget::new();
        let mut room = Room::Left;
        let (terms, counters, limiter) = (self.terms, &self.counters, &self.limiter);
        self.ring.turn(|chain| {
            if budget.is_spent() {
                return Served::Kept;
            }
            let frame = chain.readable_len().saturating_sub(HEADER);
            if !limiter.allows(frame) {
                return Served::Kept;
            }
            room = send(chain, tap, terms, counters);
            budget.spend(chain.readable_len());
            match room {
                Room::Left => {
                    limiter.spend(frame);
                    Served::Used(0)
                }
                Room::None => Served::Kept,
            }
        });
        if budget.is_spent() && room == Room::Left {
            // There may be more: nobody will say so.
            self.ring.again();
        }
        room
    }

    /// How far it came.
    pub(super) fn into_state(self) -> State {
        self.limiter.leave();
        self.ring.into_state()
    }
}

/// Sends one frame, or drops it.
fn send(chain: &Chain, tap: &Tap, terms: Terms, counters: &Counters) -> Room {
    let mut reader = chain.reader();
    let header = reader
        .read_array()
        .ok()
        .map(|header| Header::parse(&header));
    let header = header
        // 5.1.6.2: nothing is written to what is sent.
        .filter(|_| chain.writable_len() == 0)
        .and_then(|header| header.for_tap(terms, reader.len()));
    let Some(header) = header else {
        count(&counters.malformed);
        return Room::Left;
    };
    match tap.write(&header.bytes(), &reader) {
        Ok(()) => counters.transmitted.add(reader.len()),
        Err(error) => match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => return Room::None,
            _ => count(&counters.refused),
        },
    }
    Room::Left
}
