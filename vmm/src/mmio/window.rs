//! All transports side by side: who is written to, and devices that come and go.

use std::{
    fmt,
    sync::{Mutex, PoisonError},
};

use super::Transport;
use crate::{
    devices::{Device, Worker, absent::Absent},
    standing::Started,
};

/// All devices, side by side in guest-physical memory.
#[derive(Debug)]
pub struct Window {
    base: u64,
    devices: Vec<Transport>,
}

impl Window {
    /// Devices whose pages begin at `base`, one after the other.
    #[must_use]
    pub fn new(base: u64, devices: Vec<Transport>) -> Window {
        Window { base, devices }
    }

    /// The guest writes `data` at guest-physical `address`. Ignored where no
    /// device is. What comes back is to be finished without the window's lock.
    #[must_use]
    pub fn write(&mut self, address: u64, data: &[u8]) -> Option<Stopping> {
        let offset = address.checked_sub(self.base)?;
        let device = usize::try_from(offset >> 12).ok()?;
        let worker = self.devices.get_mut(device)?.write(offset & 0xfff, data)?;
        Some(Stopping { device, worker })
    }

    /// The devices that their drivers have started.
    #[must_use]
    pub fn started(&self) -> Vec<Started> {
        let devices = self.devices.iter().enumerate();
        devices
            .filter(|(_, device)| device.worker.is_some())
            .map(|(place, device)| Started {
                place,
                id: device.device.id(),
                queues: device.progress(),
            })
            .collect()
    }

    /// Puts `device` where an absent one with as many queues is. False if there is
    /// none, or if its driver is in the middle of a reset.
    pub fn plug(&mut self, index: usize, device: Box<dyn Device>) -> bool {
        let transport = self.devices.get_mut(index).filter(|transport| {
            !transport.resetting
                && transport.device.id() == 0
                && transport.queues.len() == device.queue_sizes().len()
        });
        let Some(transport) = transport else {
            return false;
        };
        transport.replace(device);
        transport.finish_reset();
        true
    }

    /// Takes a device away, whatever its driver does: from now on an absent one is
    /// there, and what the driver writes is ignored until [`Unplugged::finish`] has come
    /// back. `None` in the middle of a reset.
    pub fn unplug(&mut self, index: usize) -> Option<Unplugged> {
        let transport = self.devices.get_mut(index)?;
        if transport.resetting {
            return None;
        }
        let absent = Absent(match transport.queues.len() {
            1 => &[1],
            2 => &[1, 1],
            _ => &[],
        });
        transport.resetting = true;
        Some(Unplugged {
            index,
            worker: transport.worker.take(),
            device: transport.replace(Box::new(absent)),
        })
    }
}

/// A device that is being taken away.
#[must_use = "it is not gone yet"]
pub struct Unplugged {
    index: usize,
    worker: Option<Box<dyn Worker>>,
    device: Box<dyn Device>,
}

impl fmt::Debug for Unplugged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Unplugged")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl Unplugged {
    /// Stops its worker, which may wait for the host, and drops it.
    pub fn finish(self, window: &Mutex<Window>) {
        drop(self.worker.map(Worker::stop));
        drop(self.device);
        let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(transport) = window.devices.get_mut(self.index) {
            transport.finish_reset();
        }
    }
}

/// A reset that waits for the device's worker, which may wait for the host: only
/// the processor that asked for it is held up.
#[must_use = "the reset is not done yet"]
pub struct Stopping {
    device: usize,
    worker: Box<dyn Worker>,
}

impl fmt::Debug for Stopping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Stopping")
            .field("device", &self.device)
            .finish_non_exhaustive()
    }
}

impl Stopping {
    /// Stops the worker; then the device is as in the beginning. Until then it
    /// ignores what is written to its registers.
    pub fn finish(self, window: &Mutex<Window>) {
        // The queues are the driver's again: where they stood means nothing.
        drop(self.worker.stop());
        let mut window = window.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(transport) = window.devices.get_mut(self.device) {
            transport.finish_reset();
        }
    }
}
