//! Disks that come and go while the machine runs.
//!
//! The guest knows the places from its start; an empty one is an absent device. Who
//! starts the machine hands over a disk and then has the guest's driver look at the
//! place, and has it let go before the disk is taken away; a guest that keeps it finds
//! nothing there any more.
//!
//! All of this is done by one thread, since it may have to wait for the host: for a
//! disk that is busy, or for what a guest still asked of it. Each disk has a thread of
//! its own, which is kept for the next one. So the thread that serves the control
//! socket waits for nobody.
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
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    control::Answer,
    devices::block::{Access, Block},
    event_loop::{EventLoop, event_fd},
    exit::Ending,
    jail::{Confined, threads::ThreadKind},
    mmio::Window,
    vcpu::Machine,
};

/// Most disks that can be there at once.
pub const MOST_PLACES: u8 = 8;

/// Stack of a disk's thread, in bytes.
const STACK: usize = 64 << 10;

/// What is to be done.
#[derive(Debug)]
pub(crate) enum Order {
    /// Puts a disk at a free place.
    Attach(File, Access),
    /// Takes the one at this device's place away.
    Detach(u8),
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
    /// Starts the thread for the places of these devices, which are absent as yet.
    pub(crate) fn start(
        devices: &[u8],
        machine: &Arc<Machine>,
        confined: &Confined,
        ending: &Ending,
    ) -> io::Result<Hotplug> {
        let event = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        let done = Done::default();
        let (orders, taken) = mpsc::channel();
        let places = devices.iter().map(|device| Place {
            device: *device,
            events: None,
            taken: false,
        });
        let mut keeper = Keeper {
            places: places.collect(),
            machine: Arc::clone(machine),
            ending: ending.clone(),
        };
        let (finished, told) = (Arc::clone(&done), Arc::clone(&event));
        confined.spawn(ThreadKind::Hotplug, "hotplug".into(), move || {
            for (number, order) in taken {
                let answer = keeper.serve(order).unwrap_or_else(Answer::Refused);
                finished
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .push((number, answer));
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
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut *done)
    }
}

/// Where a disk can be.
#[derive(Debug)]
struct Place {
    /// Number of the device, in the order in which the guest is told of them.
    device: u8,
    /// What serves its disks, once there was one.
    events: Option<Arc<EventLoop>>,
    taken: bool,
}

/// Does what is ordered.
#[derive(Debug)]
struct Keeper {
    places: Vec<Place>,
    machine: Arc<Machine>,
    ending: Ending,
}

impl Keeper {
    fn serve(&mut self, order: Order) -> Result<Answer, String> {
        match order {
            Order::Attach(file, access) => self.attach(file, access).map(Answer::Attached),
            Order::Detach(device) => self.detach(device).map(|()| Answer::Done),
        }
    }

    fn attach(&mut self, file: File, access: Access) -> Result<u8, String> {
        let all = self.places.len();
        let place = self.places.iter_mut().find(|place| !place.taken);
        let place = place.ok_or_else(|| format!("all {all} places for disks are taken"))?;
        let events = place.events(&self.ending);
        let events = events.map_err(|error| format!("a disk's thread does not start: {error}"))?;
        let name = format!("bulkhead-at-{}", place.device);
        let block = Block::new(events, file, access, name);
        let block = block.map_err(|error| format!("the disk cannot be used: {error}"))?;
        if !window(&self.machine).plug(place.device.into(), Box::new(block)) {
            return Err("the guest is still resetting the place: ask again".into());
        }
        place.taken = true;
        Ok(place.device)
    }

    fn detach(&mut self, device: u8) -> Result<(), String> {
        let place = self.places.iter_mut().find(|place| place.device == device);
        let place = place.filter(|place| place.taken);
        let place = place.ok_or_else(|| format!("no disk was attached as device {device}"))?;
        let unplugged = window(&self.machine).unplug(device.into());
        let unplugged = unplugged.ok_or("the guest is still resetting the disk: ask again")?;
        // Waits for what the disk is doing, then closes the file.
        unplugged.finish(&self.machine.window);
        place.taken = false;
        Ok(())
    }
}

impl Place {
    fn events(&mut self, ending: &Ending) -> io::Result<Arc<EventLoop>> {
        if let Some(events) = &self.events {
            return Ok(Arc::clone(events));
        }
        let events = EventLoop::new("disk")?;
        let (served, ending) = (Arc::clone(&events), ending.clone());
        thread::Builder::new()
            .name(format!("disk-{}", self.device))
            .stack_size(STACK)
            .spawn(move || served.run(&ending))?;
        Ok(Arc::clone(self.events.insert(events)))
    }
}

fn window(machine: &Machine) -> std::sync::MutexGuard<'_, Window> {
    // A panic ends the process: what it left is never seen.
    machine
        .window
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
}
