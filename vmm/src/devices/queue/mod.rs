//! Queues: what the driver makes available, and what it gets back.
//!
//! A device takes a [`Chain`] and gives it back once. A driver that breaks the
//! ring itself (an index that jumps, a head beyond the table) gets nothing more:
//! the queue is dead until the reset. A chain that is malformed goes back unused,
//! and the queue lives.
//!
//! A device on an event loop takes its turn with [`Ring::turn`], which serves at most
//! as many chains as the queue is long and interrupts once. A queue with a thread
//! of its own uses [`Ring::pop`], [`Ring::give_back`] and [`Ring::tell`] for each
//! chain: the next one may take its time.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod chain;
#[cfg(test)]
mod hostile;
#[cfg(test)]
mod races;
mod split;
#[cfg(test)]
mod tests;

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
};

use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EventFd;

use self::{
    chain::Part,
    split::{Broken, InMemory, Split},
};
pub use self::{
    chain::{Chain, Malformed, Reader, Writer},
    split::State,
};
use super::Interrupt;
use crate::{
    event_loop::{EventFlags, Watch, Watched, event_fd},
    memory::Memory,
};

/// What became of a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Served {
    /// It goes back, with this many bytes written to it.
    Used(usize),
    /// It stays available; no further one is looked at.
    Kept,
}

/// A queue of an activated device, and what goes with it.
#[derive(Debug)]
pub struct Ring {
    memory: Memory,
    split: Split<InMemory>,
    /// As it was in the beginning.
    state: State,
    notify: EventFd,
    /// A copy of it, if an event loop watches it.
    watched: Option<Watched<OwnedFd>>,
    interrupt: Interrupt,
    /// The driver broke the ring.
    broken: bool,
    /// Of a chain that is done.
    spare: Vec<Part>,
}

impl Ring {
    /// A queue whose rings lie in `memory`, which goes on where `state` stands. `notify`
    /// is signalled when the driver made chains available.
    #[must_use]
    pub fn new(state: State, memory: Memory, notify: EventFd, interrupt: Interrupt) -> Ring {
        Ring {
            split: Split::new(InMemory::new(memory.now(), &state), &state),
            memory,
            state,
            notify,
            watched: None,
            interrupt,
            broken: false,
            spare: Vec::new(),
        }
    }

    /// Readable when the driver made chains available.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        event_fd(&self.notify)
    }

    /// The line to the driver.
    #[must_use]
    pub fn interrupt(&self) -> &Interrupt {
        &self.interrupt
    }

    /// Has an event loop watch the event, as long as the queue is served. The
    /// first event comes in any case: what the driver did before made none here.
    pub fn watch(&mut self, watch: &Watch<'_>, token: u32) -> io::Result<()> {
        let event = self.event().try_clone_to_owned()?;
        self.watched = Some(watch.add(event, token, EventFlags::IN)?);
        self.again();
        Ok(())
    }

    /// Takes the notification, so that the event is not readable any more.
    pub fn acknowledge(&self) {
        // Fails only if there is none.
        let _ = self.notify.read();
    }

    /// Signals the queue's own event: there is, or may be, more to do.
    pub fn again(&self) {
        // A counter that would overflow is a signal as well.
        let _ = self.notify.write(1);
    }

    /// The next chain. If there is none, the driver will notify of the next.
    ///
    /// Malformed ones go back on the way, at most as many as the queue is long:
    /// then the queue's own event is signalled, and there is none.
    pub fn pop(&mut self) -> Option<Chain> {
        for _ in 0..self.split.size() {
            match self.next()? {
                Ok(chain) => return Some(chain),
                Err(head) => self.put_used(head, 0),
            }
        }
        self.again();
        None
    }

    /// Gives a chain back, `written` bytes of which were written.
    pub fn give_back(&mut self, chain: Chain, written: usize) {
        let head = chain.head();
        self.spare = chain.into_parts();
        self.put_used(head, written);
    }

    /// Gives chains back that belong together, each with the number of bytes that
    /// were written to it: the driver sees none of them before it sees all.
    pub fn give_back_together(&mut self, chains: impl IntoIterator<Item = (Chain, usize)>) {
        for (chain, written) in chains {
            let head = chain.head();
            self.spare = chain.into_parts();
            if !self.broken && self.split.fill(head, in_element(written)).is_err() {
                self.break_off();
            }
        }
        if !self.broken && self.split.publish().is_err() {
            self.break_off();
        }
    }

    /// Puts back the chain that was popped last, as if it never had been.
    pub fn keep(&mut self, chain: Chain) {
        self.spare = chain.into_parts();
        self.split.put_back();
    }

    /// Interrupts the driver, if chains went back since the last time and it wants
    /// to know.
    pub fn tell(&mut self) {
        if self.broken {
            return;
        }
        match self.split.interrupts() {
            Ok(true) => self.interrupt.used_buffer(),
            Ok(false) => {}
            Err(Broken) => self.break_off(),
        }
    }

    /// Hands available chains to `serve`, at most as many as the queue is long: if
    /// there may be more, the queue's own event is signalled for another turn. Then
    /// tells the driver.
    pub fn turn(&mut self, mut serve: impl FnMut(&Chain) -> Served) {
        // Without the event index this saves the driver its notifications.
        let _ = self.split.silence();
        for _ in 0..self.split.size() {
            match self.next() {
                None => return self.tell(),
                Some(Err(head)) => self.put_used(head, 0),
                Some(Ok(chain)) => match serve(&chain) {
                    Served::Used(written) => self.give_back(chain, written),
                    Served::Kept => {
                        self.keep(chain);
                        let _ = self.split.listen();
                        return self.tell();
                    }
                },
            }
        }
        self.again();
        self.tell();
    }

    /// Ends the work on the queue: what a later ring needs to go on.
    #[must_use]
    pub fn into_state(self) -> State {
        let (next_available, next_used) = self.split.positions();
        State {
            next_available,
            next_used,
            ..self.state
        }
    }

    /// The next available chain, or the head of a malformed one. Before it says
    /// that there is none it asks the driver to notify and looks again.
    fn next(&mut self) -> Option<Result<Chain, u16>> {
        if self.broken {
            return None;
        }
        match self.next_head() {
            Ok(head) => {
                let head = head?;
                let table = GuestAddress(self.state.descriptors);
                // It may have grown since the queue was made.
                let mem = self.memory.now();
                let parts = std::mem::take(&mut self.spare);
                let chain = Chain::walk(&mem, table, self.split.size(), head, parts);
                Some(chain.map_err(|Malformed| head))
            }
            Err(Broken) => {
                self.break_off();
                None
            }
        }
    }

    fn next_head(&mut self) -> Result<Option<u16>, Broken> {
        for _ in 0..2 {
            if let Some(head) = self.split.take()? {
                return Ok(Some(head));
            }
            if !self.split.listen()? {
                return Ok(None);
            }
        }
        // An index that goes to and fro: others get their turn.
        self.again();
        Ok(None)
    }

    fn put_used(&mut self, head: u16, written: usize) {
        if !self.broken && self.split.use_up(head, in_element(written)).is_err() {
            self.break_off();
        }
    }

    fn break_off(&mut self) {
        if !std::mem::replace(&mut self.broken, true) {
            self.interrupt.needs_reset();
        }
    }
}

/// A length as a used element has it: below 4 GiB, as all of the chain is.
fn in_element(written: usize) -> u32 {
    u32::try_from(written).unwrap_or(u32::MAX)
}
