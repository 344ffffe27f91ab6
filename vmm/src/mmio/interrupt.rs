//! How a device tells its driver something: the interrupt line, and the registers
//! that say why it was raised.
//!
//! ```text
//! InterruptStatus   1  "used buffer", always: a driver takes an interrupt without
//!                      used buffers as spurious, so nothing needs to be cleared
//!                   3  and "configuration changed", from a change until the driver
//!                      has acknowledged it
//! ```
//!
//! A used buffer therefore costs no exit, and its acknowledgement (a write of 1) is
//! collected. That of a change is a write of 3, which signals an event
//! ([`Interrupt::clear_on`]). It may have been written for an earlier change, whose
//! configuration the driver has read before this one: such an event is taken back
//! before a change is shown. What is written later belongs to a driver that reads
//! the configuration later. A device without that event shows its first change
//! until the reset.
//!
//! DEVICE_NEEDS_RESET is told in the same way (virtio 1.2, 2.1.2) and stays until
//! the reset, whatever is written to the status register.

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError},
};

use vmm_sys_util::eventfd::EventFd;

use super::{
    Registers, reg,
    status::{DRIVER_OK, NEEDS_RESET},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched, event_fd};

/// Bits of InterruptStatus (virtio 1.2, 4.2.2).
const USED_BUFFER: u32 = 1;
const CONFIG_CHANGED: u32 = 2;

/// What a driver writes to InterruptACK when it has seen a change of the
/// configuration.
pub const CHANGE_ACKNOWLEDGED: u32 = USED_BUFFER | CONFIG_CHANGED;

/// A device's line to its driver. Clones are the same line.
#[derive(Clone, Debug)]
pub struct Interrupt(Arc<Line>);

#[derive(Debug)]
struct Line {
    event: Arc<EventFd>,
    page: Registers,
    shown: Mutex<Shown>,
    /// Signalled by the driver's acknowledgements of changes.
    acknowledged: OnceLock<EventFd>,
}

/// What the registers show that both transport and device change.
#[derive(Debug, Default)]
struct Shown {
    /// As the driver has set it.
    status: u8,
    needs_reset: bool,
    generation: u32,
}

impl Interrupt {
    /// The line of the device with these registers. Each write to `event` is one
    /// edge.
    #[must_use]
    pub fn new(event: Arc<EventFd>, page: Registers) -> Interrupt {
        page.set(reg::INTERRUPT_STATUS, USED_BUFFER);
        Interrupt(Arc::new(Line {
            event,
            page,
            shown: Mutex::default(),
            acknowledged: OnceLock::new(),
        }))
    }

    /// Has changes of the configuration shown no longer than until the driver has
    /// seen them: `acknowledged` is signalled when it writes
    /// [`CHANGE_ACKNOWLEDGED`] to InterruptACK.
    pub fn clear_on(
        &self,
        acknowledged: EventFd,
        events: &Arc<EventLoop>,
    ) -> io::Result<Registration<Clear>> {
        let copy = event_fd(&acknowledged).try_clone_to_owned()?;
        let registration = events.add(|watch| {
            Ok(Clear {
                interrupt: self.clone(),
                _acknowledged: watch.add(copy, 0, EventFlags::IN)?,
            })
        })?;
        self.0
            .acknowledged
            .set(acknowledged)
            .map_err(|_| io::ErrorKind::AlreadyExists)?;
        Ok(registration)
    }

    /// Tells the driver that buffers of some queue were used.
    pub fn used_buffer(&self) {
        // The counter cannot overflow: the kernel takes each write at once.
        let _ = self.0.event.write(1);
    }

    /// Shows the driver this configuration and tells it of the change.
    pub fn config_change(&self, config: &[u8]) {
        let mut shown = self.shown();
        self.show_config(&mut shown, config);
        self.tell_change(&shown);
    }

    /// Shows this configuration to a driver that knows of the change.
    pub fn show(&self, config: &[u8]) {
        self.show_config(&mut self.shown(), config);
    }

    /// Tells the driver that the device cannot go on until it is reset.
    pub fn needs_reset(&self) {
        let mut shown = self.shown();
        if !std::mem::replace(&mut shown.needs_reset, true) {
            self.show_status(&shown);
            self.tell_change(&shown);
        }
    }

    /// The device status, with the device's own bit.
    pub(super) fn status(&self) -> u8 {
        self.shown().status()
    }

    /// Shows this status, and the device's own bit if it is set.
    pub(super) fn set_status(&self, status: u8) {
        let mut shown = self.shown();
        shown.status = status & !NEEDS_RESET;
        self.show_status(&shown);
    }

    /// Shows a device that the driver has not touched.
    pub(super) fn reset(&self, config: &[u8]) {
        let mut shown = self.shown();
        shown.needs_reset = false;
        shown.status = 0;
        self.0.page.set(reg::INTERRUPT_STATUS, USED_BUFFER);
        self.show_config(&mut shown, config);
        // Last: it says that the reset is done.
        self.show_status(&shown);
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        // A panic ends the process: what it left is never seen.
        self.0.shown.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn show_status(&self, shown: &Shown) {
        self.0.page.set(reg::STATUS, u32::from(shown.status()));
    }

    fn show_config(&self, shown: &mut Shown, config: &[u8]) {
        // 4.2.2.1: a driver that read a part of each sees another generation, or
        // is told of the change after that.
        shown.generation = shown.generation.wrapping_add(1);
        self.0.page.set(reg::CONFIG_GENERATION, shown.generation);
        self.0.page.set_config(config);
        shown.generation = shown.generation.wrapping_add(1);
        self.0.page.set(reg::CONFIG_GENERATION, shown.generation);
    }

    /// 2.1.2, 2.3: nobody is told before DRIVER_OK.
    fn tell_change(&self, shown: &Shown) {
        if shown.status & DRIVER_OK == 0 {
            return;
        }
        if let Some(acknowledged) = self.0.acknowledged.get() {
            // Of an earlier change. Fails if there is none.
            let _ = acknowledged.read();
        }
        let status = USED_BUFFER | CONFIG_CHANGED;
        self.0.page.set(reg::INTERRUPT_STATUS, status);
        let _ = self.0.event.write(1);
    }

    /// The driver has acknowledged a change.
    fn clear(&self) {
        let _shown = self.shown();
        let acknowledged = self.0.acknowledged.get();
        if acknowledged.is_some_and(|event| event.read().is_ok()) {
            self.0.page.set(reg::INTERRUPT_STATUS, USED_BUFFER);
        }
    }
}

impl Shown {
    fn status(&self) -> u8 {
        if self.needs_reset {
            self.status | NEEDS_RESET
        } else {
            self.status
        }
    }
}

/// Waits for acknowledgements of changes.
#[derive(Debug)]
pub struct Clear {
    interrupt: Interrupt,
    _acknowledged: Watched<OwnedFd>,
}

impl Handler for Clear {
    fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        self.interrupt.clear();
        Ok(())
    }
}
