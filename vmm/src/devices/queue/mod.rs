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
mod tests;

use std::{
    io,
    os::fd::{BorrowedFd, OwnedFd},
    sync::Arc,
};

use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use self::chain::Part;
pub use self::chain::{Chain, Malformed, Reader, Writer};
use super::Interrupt;
use crate::event_loop::{EventFlags, Watch, Watched, event_fd};

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
    queue: Queue,
    mem: Arc<GuestMemoryMmap>,
    notify: EventFd,
    /// A copy of it, if an event loop watches it.
    watched: Option<Watched<OwnedFd>>,
    interrupt: Interrupt,
    /// The driver broke the ring.
    broken: bool,
    /// Chains went back since the driver was told.
    used: bool,
    /// Of a chain that is done.
    spare: Vec<Part>,
}

impl Ring {
    /// A queue whose rings lie in `mem`. `notify` is signalled when the driver made
    /// chains available.
    #[must_use]
    pub fn new(
        queue: Queue,
        mem: Arc<GuestMemoryMmap>,
        notify: EventFd,
        interrupt: Interrupt,
    ) -> Ring {
        Ring {
            queue,
            mem,
            notify,
            watched: None,
            interrupt,
            broken: false,
            used: false,
            spare: Vec::new(),
        }
    }

    /// Readable when the driver made chains available.
    #[must_use]
    pub fn event(&self) -> BorrowedFd<'_> {
        event_fd(&self.notify)
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
        for _ in 0..self.queue.size() {
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

    /// Puts back the chain that was popped last, as if it never had been.
    pub fn keep(&mut self, chain: Chain) {
        self.spare = chain.into_parts();
        self.queue.go_to_previous_position();
    }

    /// Interrupts the driver, if chains went back since the last time and it wants
    /// to know.
    pub fn tell(&mut self) {
        if std::mem::take(&mut self.used)
            && !self.broken
            && self.queue.needs_notification(&*self.mem).unwrap_or(true)
        {
            self.interrupt.used_buffer();
        }
    }

    /// Hands available chains to `serve`, at most as many as the queue is long: if
    /// there may be more, the queue's own event is signalled for another turn. Then
    /// tells the driver.
    pub fn turn(&mut self, mut serve: impl FnMut(&Chain) -> Served) {
        // Without the event index this saves the driver its notifications.
        let _ = self.queue.disable_notification(&*self.mem);
        for _ in 0..self.queue.size() {
            match self.next() {
                None => return self.tell(),
                Some(Err(head)) => self.put_used(head, 0),
                Some(Ok(chain)) => match serve(&chain) {
                    Served::Used(written) => self.give_back(chain, written),
                    Served::Kept => {
                        self.keep(chain);
                        let _ = self.queue.enable_notification(&*self.mem);
                        return self.tell();
                    }
                },
            }
        }
        self.again();
        self.tell();
    }

    /// Its parts, for a device that walks chains by itself.
    pub(super) fn into_parts(self) -> (Queue, EventFd, Arc<GuestMemoryMmap>, Interrupt) {
        (self.queue, self.notify, self.mem, self.interrupt)
    }

    /// Ends the work on the queue: what a later ring needs to go on.
    #[must_use]
    pub fn into_state(self) -> QueueState {
        self.queue.state()
    }

    /// The next available chain, or the head of a malformed one. Before it says
    /// that there is none it asks the driver to notify and looks again.
    fn next(&mut self) -> Option<Result<Chain, u16>> {
        if self.broken {
            return None;
        }
        let mem = &*self.mem;
        for _ in 0..2 {
            let head = match self.queue.iter(mem) {
                Ok(mut chains) => chains.next().map(|chain| chain.head_index()),
                Err(_) => return self.break_off(),
            };
            if let Some(head) = head {
                if head >= self.queue.size() {
                    return self.break_off();
                }
                let table = GuestAddress(self.queue.desc_table());
                let parts = std::mem::take(&mut self.spare);
                let chain = Chain::walk(&self.mem, table, self.queue.size(), head, parts);
                return Some(chain.map_err(|Malformed| head));
            }
            match self.queue.enable_notification(mem) {
                Ok(true) => {}
                Ok(false) => return None,
                Err(_) => return self.break_off(),
            }
        }
        // An index that goes to and fro: others get their turn.
        self.again();
        None
    }

    fn put_used(&mut self, head: u16, written: usize) {
        // Below 4 GiB, as all of the chain is.
        let written = u32::try_from(written).unwrap_or(u32::MAX);
        self.used = true;
        if self.queue.add_used(&*self.mem, head, written).is_err() {
            let _: Option<()> = self.break_off();
        }
    }

    fn break_off<T>(&mut self) -> Option<T> {
        if !std::mem::replace(&mut self.broken, true) {
            self.interrupt.needs_reset();
        }
        None
    }
}
