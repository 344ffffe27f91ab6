//! Frames for the guest: from the tap into the buffers that the driver offers.
//!
//! Buffers are taken from the queue before a frame is read, as many as the largest one
//! may need, since a tap does not say how long the next one is; those that it did not
//! need stay here for the next. A frame that has more bytes than they have room for
//! comes whole all the same: what is too much is read into memory of our own, and
//! copied when there are buffers for it. So does one that is longer than expected.
//!
//! For the same reason a frame is read when the limit allows a byte, and those after it
//! wait for all of its bytes.

use std::{collections::VecDeque, io, iter, sync::Arc};

use super::{
    Budget, QUEUE,
    counters::{Counters, count},
    feature,
    header::{HEADER, Header, LONGEST, Terms},
    tap::{Length, Tap},
};
use crate::{
    devices::{
        limit::Limiter,
        queue::{Chain, Ring, State},
    },
    event_loop::Watched,
};

/// For what receiving waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wait {
    /// For the tap to be readable.
    Frame,
    /// For the driver: there are no buffers, or not enough for the frame that was read.
    Buffers,
    /// For the limit's timer.
    Limit,
    /// For nothing: the tap gives no more frames.
    End,
}

pub(super) struct Receive {
    ring: Ring,
    terms: Terms,
    counters: Arc<Counters>,
    limiter: Watched<Arc<Limiter>>,
    /// Buffers that were taken and are empty, in the order of the queue.
    chains: VecDeque<Chain>,
    /// Bytes that they have room for, and the most that it ever was.
    room: usize,
    most_room: usize,
    /// A frame that was read and waits for buffers. It lies in those that are here,
    /// and in `rest`.
    frame: Option<(Header, Length)>,
    /// What does not lie in buffers.
    rest: Vec<u8>,
    /// About the length of the longest of the last frames. The kernel is given buffers
    /// for it and not for more, since forty of them take it as long as a small frame.
    expected: usize,
}

impl Receive {
    pub(super) fn new(
        ring: Ring,
        terms: Terms,
        counters: Arc<Counters>,
        limiter: Watched<Arc<Limiter>>,
    ) -> Receive {
        Receive {
            ring,
            terms,
            counters,
            limiter,
            chains: VecDeque::new(),
            room: 0,
            most_room: 0,
            frame: None,
            // A byte more than a frame can have, by which too long ones are known.
            rest: vec![0; LONGEST.saturating_add(1)],
            expected: terms.longest_whole(),
        }
    }

    /// Takes the notification of new buffers.
    pub(super) fn acknowledge(&self) {
        self.ring.acknowledge();
    }

    /// Takes the notification that more may pass.
    pub(super) fn try_again(&self) {
        self.limiter.acknowledge();
    }

    /// Gives the guest the frames that there are, within a turn's budget.
    pub(super) fn turn(&mut self, tap: &Tap) -> Wait {
        let mut budget = Budget::new();
        let wait = loop {
            if budget.is_spent() {
                break if self.chains.is_empty() {
                    Wait::Buffers
                } else {
                    Wait::Frame
                };
            }
            if let Some(wait) = self.next(tap, &mut budget) {
                break wait;
            }
        };
        if wait == Wait::Buffers && (budget.is_spent() || budget.chains == 0) {
            // There may be some: nobody will say so.
            self.ring.again();
        }
        self.ring.tell();
        wait
    }

    /// How far it came. What was not used is available to whoever goes on.
    pub(super) fn into_state(mut self) -> State {
        self.limiter.leave();
        if self.frame.is_some() {
            count(&self.counters.unfit);
        }
        // The last one first. A driver that made malformed chains available among these
        // gets those again and not all of its others.
        while let Some(chain) = self.chains.pop_back() {
            self.ring.keep(chain);
        }
        self.ring.into_state()
    }

    /// One frame: `None` if it was given to the guest, or dropped.
    fn next(&mut self, tap: &Tap, budget: &mut Budget) -> Option<Wait> {
        let most = HEADER.saturating_add(self.terms.longest_for_guest());
        self.gather(most, budget);
        let (header, length) = match self.frame.take() {
            Some(frame) => frame,
            None if self.chains.is_empty() => return Some(Wait::Buffers),
            // How long the next one is is known when it is read.
            None if !self.limiter.allows(1) => return Some(Wait::Limit),
            None => match self.read(tap, budget) {
                Ok(frame) => frame?,
                Err(error) if is_temporary(&error) => return Some(Wait::Frame),
                Err(_) => return Some(Wait::End),
            },
        };
        let needed = HEADER.saturating_add(length.frame);
        self.gather(needed, budget);
        if needed <= self.room {
            self.give(header, length);
            self.counters.received.add(length.frame);
            return None;
        }
        if needed <= self.most_room && self.chains.len() < self.most_chains() {
            // The driver had room for it before: the buffers are with it, full.
            self.frame = Some((header, length));
            return Some(Wait::Buffers);
        }
        count(&self.counters.unfit);
        None
    }

    /// Takes buffers until there is room for so many bytes.
    fn gather(&mut self, bytes: usize, budget: &mut Budget) {
        while self.room < bytes && self.chains.len() < self.most_chains() && budget.chains > 0 {
            let Some(chain) = self.ring.pop() else {
                break;
            };
            budget.chains = budget.chains.saturating_sub(1);
            // 5.1.6.3.2: each has room for a header at least.
            if chain.readable_len() > 0 || chain.writable_len() < HEADER {
                count(&self.counters.unusable);
                self.ring.give_back(chain, 0);
                continue;
            }
            self.room = self.room.saturating_add(chain.writable_len());
            self.chains.push_back(chain);
        }
        self.most_room = self.most_room.max(self.room);
    }

    /// In how many buffers a frame may lie.
    fn most_chains(&self) -> usize {
        if self.terms.has(feature::MRG_RXBUF) {
            QUEUE.into()
        } else {
            1
        }
    }

    /// Reads a frame. `None` if it is none for this guest.
    fn read(&mut self, tap: &Tap, budget: &mut Budget) -> io::Result<Option<(Header, Length)>> {
        let mut header = [0; HEADER];
        let length = tap.read(&mut header, &self.chains, self.expected, &mut self.rest)?;
        let frame = length.map_or(0, |length| length.frame);
        budget.spend(frame);
        self.limiter.spend(frame);
        let less = self.expected.saturating_sub(self.expected >> 4);
        self.expected = less.max(frame).max(self.terms.longest_whole());
        let header = Header::parse(&header);
        let Some(length) = length.filter(|length| self.terms.allow(&header, length.frame)) else {
            count(&self.counters.unfit);
            return Ok(None);
        };
        let Some(header) = header.for_guest(self.terms) else {
            count(&self.counters.not_negotiated);
            return Ok(None);
        };
        Ok(Some((header, length)))
    }

    /// Gives a frame for which there is room to the guest.
    fn give(&mut self, header: Header, length: Length) {
        let needed = HEADER.saturating_add(length.frame);
        let mut room: usize = 0;
        let buffers = self.chains.iter().take_while(|chain| {
            let more = room < needed;
            room = room.saturating_add(chain.writable_len());
            more
        });
        let header = Header {
            // At most as many as the queue is long.
            num_buffers: u16::try_from(buffers.count()).unwrap_or(QUEUE),
            ..header
        };
        let header = header.bytes();
        let (mut front, mut direct) = (header.as_slice(), length.direct);
        let (mut rest, _) = self.rest.split_at(length.frame.saturating_sub(direct));
        let mut left = needed;
        let used = iter::from_fn(|| {
            if left == 0 {
                return None;
            }
            let chain = self.chains.pop_front()?;
            self.room = self.room.saturating_sub(chain.writable_len());
            let mut writer = chain.writer().split(left);
            let written = writer.len();
            front = front.split_at(writer.write(front)).1;
            direct = direct.saturating_sub(writer.skip(direct));
            rest = rest.split_at(writer.write(rest)).1;
            left = left.saturating_sub(written);
            Some((chain, written))
        });
        self.ring.give_back_together(used);
    }
}

/// Whether the tap has just nothing to give.
fn is_temporary(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}
