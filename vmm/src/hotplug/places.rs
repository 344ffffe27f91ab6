//! Devices that come and go. Each place has a thread of its own, which is kept for the
//! next one.

use std::{
    io,
    sync::{Arc, MutexGuard},
};

use super::{Starter, lock};
use crate::{devices::Device, event_loop::EventLoop, mmio::Window, vcpu::Machine};

/// The places for devices of one kind.
#[derive(Debug)]
pub(crate) struct Places {
    /// The name of their threads, and what they are called.
    thread: &'static str,
    called: &'static str,
    places: Vec<Place>,
    machine: Arc<Machine>,
    starter: Starter,
}

/// Where a device can be.
#[derive(Debug)]
struct Place {
    /// Its number, in the order in which the guest is told of them.
    device: u8,
    /// What serves its devices, once there was one.
    events: Option<Arc<EventLoop>>,
    taken: bool,
}

impl Places {
    /// Places of these devices, which are absent as yet. `thread` names their threads,
    /// `called` them in messages.
    pub(crate) fn new(
        [thread, called]: [&'static str; 2],
        devices: &[u8],
        machine: &Arc<Machine>,
        starter: Starter,
    ) -> Places {
        let places = devices.iter().map(|device| Place {
            device: *device,
            events: None,
            taken: false,
        });
        Places {
            thread,
            called,
            places: places.collect(),
            machine: Arc::clone(machine),
            starter,
        }
    }

    /// Puts the device that `make` makes, of its number and the loop that will serve it,
    /// at a free place.
    pub(super) fn attach(
        &mut self,
        make: impl FnOnce(u8, Arc<EventLoop>) -> io::Result<Box<dyn Device>>,
    ) -> Result<u8, String> {
        let (all, called) = (self.places.len(), self.called);
        let place = self.places.iter_mut().find(|place| !place.taken);
        let place = place.ok_or_else(|| match all {
            0 => format!("the machine has no places for {called}"),
            _ => format!("all {all} places for {called} are taken"),
        })?;
        let events = place.events(self.thread, &self.starter);
        let events =
            events.map_err(|error| format!("the device's thread does not start: {error}"))?;
        let device = make(place.device, events);
        let device = device.map_err(|error| format!("the device cannot be used: {error}"))?;
        if !window(&self.machine).plug(place.device.into(), device) {
            return Err("the guest is still resetting the place: ask again".into());
        }
        place.taken = true;
        Ok(place.device)
    }

    /// Whether a device is at this place.
    pub(super) fn has(&self, device: u8) -> bool {
        let mut places = self.places.iter();
        places.any(|place| place.device == device && place.taken)
    }

    /// Takes it away, and closes what it had.
    pub(super) fn detach(&mut self, device: u8) -> Result<(), String> {
        let unplugged = window(&self.machine).unplug(device.into());
        let unplugged = unplugged.ok_or("the guest is still resetting the device: ask again")?;
        // Waits for what it is doing.
        unplugged.finish(&self.machine.window);
        let place = self.places.iter_mut().find(|place| place.device == device);
        if let Some(place) = place {
            place.taken = false;
        }
        Ok(())
    }
}

impl Place {
    fn events(&mut self, thread: &'static str, starter: &Starter) -> io::Result<Arc<EventLoop>> {
        if let Some(events) = &self.events {
            return Ok(Arc::clone(events));
        }
        let events = starter.events(thread, self.device)?;
        Ok(Arc::clone(self.events.insert(events)))
    }
}

pub(super) fn window(machine: &Machine) -> MutexGuard<'_, Window> {
    lock(&machine.window)
}
