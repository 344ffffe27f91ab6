//! What comes while the machine runs: disks and network interfaces, which also go, memory
//! and processors.
//!
//! The guest knows the places of devices from its start; an empty one is an absent
//! device. Who starts the machine hands over a disk and then has the guest's driver look
//! at the place, and has it let go before the disk is taken away; a guest that keeps it
//! finds nothing there any more. Memory comes by a device at a place of its own.
//! Processors are known to the guest from its start too, which is told to leave those
//! alone that do not exist yet.
//!
//! All of this is done by one thread, since it may have to wait for the host: for a
//! disk that is busy, or for what a guest still asked of it. So the thread that serves
//! the control socket waits for nobody.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod memory;
mod places;
mod processors;
mod reserved;

use std::{
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc},
    thread::{self, JoinHandle},
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

pub(crate) use self::{
    memory::More,
    places::Places,
    processors::Processors,
    reserved::{Reserved, starters},
};
use crate::{
    control::Answer,
    devices::{
        block::{Access, Block},
        net::{Net, Options},
    },
    event_loop::{EventLoop, event_fd},
    exit::{End, Ending},
    jail::{Confined, Seal, threads::ThreadKind},
    present::{Known, Present},
};

/// Most disks that can be there at once.
pub const MOST_PLACES: u8 = 8;
/// Most network interfaces that can be there at once.
pub const MOST_INTERFACES: u8 = 4;

/// Stack of a device's thread, in bytes.
const STACK: usize = 256 << 10;

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Order {
    /// Puts a disk at a free place.
    Attach(File, Access),
    /// Puts the interface of this tap at a free place.
    AttachInterface(OwnedFd, Options),
    /// Takes what is at this device's place away.
    Detach(u8),
    /// Has the guest have so much memory in all, in MiB.
    Memory(u32),
    /// Makes processors until there are so many.
    Processors(u8),
}

/// Orders that are done, by the numbers of their requests.
type Done = Arc<Mutex<Vec<(u64, Answer)>>>;

/// Takes orders for the thread that does them.
#[derive(Debug)]
pub(crate) struct Hotplug {
    orders: mpsc::Sender<(u64, Order)>,
    done: Done,
    event: Arc<EventFd>,
}

impl AsFd for Hotplug {
    /// Readable when something is done.
    fn as_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.event)
    }
}

impl Hotplug {
    /// Starts the thread.
    pub(crate) fn start(mut keeper: Keeper, confined: &Confined) -> io::Result<Hotplug> {
        let event = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let done = Done::default();
        let (orders, taken) = mpsc::channel();
        let (finished, told) = (Arc::clone(&done), Arc::clone(&event));
        confined.spawn(ThreadKind::Hotplug, "hotplug".into(), move || {
            for (number, order) in taken {
                let answer = keeper.serve(order).unwrap_or_else(Answer::Refused);
                lock(&finished).push((number, answer));
                // The counter cannot overflow.
                let _ = told.write(1);
            }
        })?;
        Ok(Hotplug {
            orders,
            done,
            event,
        })
    }

    /// Has this done; [`Hotplug::finished`] answers.
    pub(crate) fn order(&self, number: u64, order: Order) -> io::Result<()> {
        let sent = self.orders.send((number, order));
        sent.map_err(|_| io::Error::other("the thread has ended"))
    }

    /// What was done since this was asked last.
    pub(crate) fn finished(&self) -> Vec<(u64, Answer)> {
        // Nothing was signalled: then there is nothing.
        let _ = self.event.read();
        std::mem::take(&mut *lock(&self.done))
    }
}

/// Does what is ordered.
#[derive(Debug)]
pub(crate) struct Keeper {
    pub(crate) disks: Places,
    pub(crate) interfaces: Places,
    pub(crate) present: Present,
    /// None if the machine's memory is what it is.
    pub(crate) memory: Option<More>,
    pub(crate) processors: Processors,
}

impl Keeper {
    fn serve(&mut self, order: Order) -> Result<Answer, String> {
        match order {
            Order::Attach(file, access) => {
                let mut known = None;
                let device = self.disks.attach(|device, events| {
                    let name = format!("bulkhead-at-{device}");
                    let disk = Block::new(events, file, access, name)?;
                    known = Some(Known::from(&disk));
                    Ok(Box::new(disk))
                })?;
                Ok(self.attached(device, known))
            }
            Order::AttachInterface(tap, options) => {
                let mut known = None;
                let device = self.interfaces.attach(|_, events| {
                    let net = Net::new(events, tap, options)?;
                    known = Some(Known::from(&net));
                    Ok(Box::new(net))
                })?;
                Ok(self.attached(device, known))
            }
            Order::Detach(device) => {
                let places = [&mut self.disks, &mut self.interfaces];
                let place = places.into_iter().find(|places| places.has(device));
                let place =
                    place.ok_or_else(|| format!("nothing was attached as device {device}"))?;
                place.detach(device)?;
                self.present.remove(device);
                Ok(Answer::Done)
            }
            Order::Memory(mib) => match &mut self.memory {
                Some(memory) => memory.ask(mib).map(Answer::Attached),
                None => Err("the machine's memory cannot change".into()),
            },
            Order::Processors(count) => self.processors.have(count).map(|()| Answer::Done),
        }
    }

    /// What was made is there.
    fn attached(&self, device: u8, known: Option<Known>) -> Answer {
        if let Some(known) = known {
            self.present.add(device, known);
        }
        Answer::Attached(device)
    }
}

/// A panic ends the process: what it left is never seen.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How threads are started that serve what comes.
#[derive(Clone, Debug)]
pub(crate) struct Starter {
    pub(crate) seal: Seal,
    pub(crate) ending: Ending,
}

impl Starter {
    /// One that seals itself and then runs `body`.
    fn thread(
        &self,
        name: String,
        body: impl FnOnce(&Ending) + Send + 'static,
    ) -> io::Result<JoinHandle<()>> {
        let Starter { seal, ending } = self.clone();
        let builder = thread::Builder::new().name(name.clone()).stack_size(STACK);
        builder.spawn(move || match seal.narrow() {
            Ok(()) => body(&ending),
            Err(error) => ending.end(End::Device, format!("{name} is not confined: {error}")),
        })
    }

    /// A loop with a thread of its own, for a device.
    fn events(&self, kind: &'static str, device: u8) -> io::Result<Arc<EventLoop>> {
        let events = EventLoop::new(kind)?;
        let served = Arc::clone(&events);
        self.thread(format!("{kind}-{device}"), move |ending| served.run(ending))?;
        Ok(events)
    }
}
