//! The virtio-mmio transport, version 2 (virtio 1.2, 4.2).
//!
//! The guest reads registers from memory: all devices' pages form one read-only
//! slot of guest memory, so that no read leaves the guest, and an interrupt costs
//! none either. Writes do leave it. Those that change what can be read are
//! served at once; of the others KVM collects the frequent ones ([`COLLECTED`]) and
//! delivers them with the next exit, in order.
//!
//! Two registers change without the driver's doing: the status, when a device
//! cannot go on, and InterruptStatus with the configuration, when that changes
//! ([`Interrupt`]).
//!
//! The driver's moves through the status register are the pure function
//! [`step`]. Queues are plain numbers until DRIVER_OK; then they are checked as a
//! whole, frozen, and moved into the device's worker. What a driver does out of
//! order is ignored; what it gets wrong sets DEVICE_NEEDS_RESET. A reset waits for
//! what the device is doing, but nobody else waits for it ([`Stopping`]).
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod interrupt;
mod window;

use std::{
    fmt,
    ops::Range,
    sync::{Arc, atomic::Ordering},
};

use vm_memory::{Bytes, GuestAddress, GuestMemory, MmapRegion, VolatileMemory};
use vmm_sys_util::eventfd::EventFd;

pub use self::{
    interrupt::{CHANGE_ACKNOWLEDGED, Clear, Interrupt},
    window::{Stopping, Unplugged, Window},
};
use crate::{
    devices::{
        Device, Io, Worker,
        queue::{Ring, State},
    },
    memory::Memory,
    standing::Progress,
};

/// Bytes of registers of one device.
pub const PAGE: usize = 0x1000;
/// Offset of QueueNotify.
pub const QUEUE_NOTIFY: u64 = 0x050;
/// Offset of InterruptACK.
pub const INTERRUPT_ACK: u64 = 0x064;

/// Ranges of offsets whose writes KVM may collect, since they change no register
/// that can be read: DriverFeatures with its selector, QueueNum, InterruptACK and the
/// addresses of the rings.
pub const COLLECTED: [Range<u64>; 4] = [0x020..0x028, 0x038..0x03c, 0x064..0x068, 0x080..0x0a8];

mod reg {
    pub(super) const MAGIC: u64 = 0x000;
    pub(super) const VERSION: u64 = 0x004;
    pub(super) const DEVICE_ID: u64 = 0x008;
    pub(super) const VENDOR_ID: u64 = 0x00c;
    pub(super) const DEVICE_FEATURES: u64 = 0x010;
    pub(super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(super) const DRIVER_FEATURES: u64 = 0x020;
    pub(super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(super) const QUEUE_SEL: u64 = 0x030;
    pub(super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(super) const QUEUE_NUM: u64 = 0x038;
    pub(super) const QUEUE_READY: u64 = 0x044;
    pub(super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(super) const STATUS: u64 = 0x070;
    pub(super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(super) const SHM: [u64; 4] = [0x0b0, 0x0b4, 0x0b8, 0x0bc];
    pub(super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(super) const CONFIG: u64 = 0x100;
}

/// "virt"
const MAGIC: u32 = 0x7472_6976;
/// "BULK"
const VENDOR: u32 = 0x4b4c_5542;

/// Device status bits (virtio 1.2, 2.1).
pub mod status {
    /// The driver has noticed the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// Features are agreed upon.
    pub const FEATURES_OK: u8 = 8;
    /// The device cannot go on.
    pub const NEEDS_RESET: u8 = 64;
    /// The driver has given up.
    pub const FAILED: u8 = 128;
}
use status::{ACKNOWLEDGE, DRIVER, DRIVER_OK, FAILED, FEATURES_OK, NEEDS_RESET};

/// Ring features that the transport offers (virtio 1.2, 6): indirect
/// descriptors, event index, version 1.
const TRANSPORT_FEATURES: u64 = 1 << 28 | EVENT_IDX | VERSION_1;
const EVENT_IDX: u64 = 1 << 29;
const VERSION_1: u64 = 1 << 32;

/// What a write to the status register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// Nothing, or something that is not allowed now.
    Ignore,
    /// Back to the beginning.
    Reset,
    /// One bit more.
    Set(u8),
    /// The same, if the features are acceptable.
    AcceptFeatures(u8),
    /// The same, and the device starts.
    Start(u8),
}

/// What writing `value` means when the status is `now` (virtio 1.2, 3.1.1).
fn step(now: u8, value: u32) -> Step {
    let Ok(value) = u8::try_from(value) else {
        return Step::Ignore;
    };
    if value == 0 {
        return Step::Reset;
    }
    // The device's own bit is neither the driver's to set nor to clear.
    let (had, wants) = (now & !NEEDS_RESET, value & !NEEDS_RESET);
    if had & FAILED != 0 || wants & had != had {
        return Step::Ignore;
    }
    let next = wants | now & NEEDS_RESET;
    match (had, wants & !had) {
        (0, ACKNOWLEDGE) => Step::Set(next),
        (ACKNOWLEDGE, DRIVER) => Step::Set(next),
        (0b0011, FEATURES_OK) => Step::AcceptFeatures(next),
        (0b1011, DRIVER_OK) if now & NEEDS_RESET == 0 => Step::Start(next),
        (_, FAILED) => Step::Set(next),
        _ => Step::Ignore,
    }
}

/// A queue as the driver describes it, before DRIVER_OK.
#[derive(Clone, Copy, Debug, Default)]
struct Setup {
    size: u32,
    ready: bool,
    descriptors: u64,
    driver: u64,
    device: u64,
}

/// What a transport needs besides its device.
#[derive(Debug)]
pub struct Wiring {
    /// All of the guest's memory.
    pub memory: Memory,
    /// The page of registers that the guest reads.
    pub page: Registers,
    /// Interrupt line.
    pub interrupt: Interrupt,
    /// One event for each queue, signalled by its notifications.
    pub notify: Vec<EventFd>,
}

/// The page of registers of one device, as the guest reads it.
#[derive(Clone, Debug)]
pub struct Registers {
    file: Arc<MmapRegion>,
    start: usize,
}

impl Registers {
    /// Page number `index` of `file`.
    #[must_use]
    pub fn new(file: Arc<MmapRegion>, index: usize) -> Registers {
        Registers {
            file,
            start: index.saturating_mul(PAGE),
        }
    }

    fn set(&self, register: u64, value: u32) {
        let at = usize::try_from(register)
            .ok()
            .and_then(|register| self.start.checked_add(register));
        let stored = at
            .and_then(|at| self.file.get_slice(at, size_of::<u32>()).ok())
            .map(|slice| slice.store(value.to_le(), 0, Ordering::Release));
        debug_assert!(matches!(stored, Some(Ok(()))), "registers lie in the page");
    }

    fn set_config(&self, config: &[u8]) {
        let words = (reg::CONFIG..).step_by(4).zip(config.chunks(4));
        for (register, bytes) in words.take_while(|(register, _)| *register < 0x1000) {
            let mut word = [0; 4];
            for (to, from) in word.iter_mut().zip(bytes) {
                *to = *from;
            }
            self.set(register, u32::from_le_bytes(word));
        }
    }
}

/// A device behind its registers.
pub struct Transport {
    device: Box<dyn Device>,
    wiring: Wiring,
    worker: Option<Box<dyn Worker>>,
    /// The worker is being stopped.
    resetting: bool,
    device_features_sel: u32,
    driver_features: u64,
    driver_features_sel: u32,
    queue_sel: u32,
    queues: Vec<Setup>,
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("id", &self.device.id())
            .field("status", &self.wiring.interrupt.status())
            .field("queues", &self.queues)
            .finish_non_exhaustive()
    }
}

impl Transport {
    /// Puts `device` behind the registers in `wiring`.
    #[must_use]
    pub fn new(device: Box<dyn Device>, wiring: Wiring) -> Transport {
        let page = &wiring.page;
        page.set(reg::MAGIC, MAGIC);
        page.set(reg::VERSION, 2);
        page.set(reg::DEVICE_ID, device.id());
        page.set(reg::VENDOR_ID, VENDOR);
        for register in reg::SHM {
            // 4.2.2: length and base of a region that does not exist.
            page.set(register, u32::MAX);
        }
        let queues = vec![Setup::default(); device.queue_sizes().len()];
        let mut transport = Transport {
            device,
            wiring,
            worker: None,
            resetting: false,
            device_features_sel: 0,
            driver_features: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            queues,
        };
        transport.finish_reset();
        transport
    }

    /// Puts another device here, which has as many queues. The driver finds it as after
    /// a reset.
    fn replace(&mut self, device: Box<dyn Device>) -> Box<dyn Device> {
        let before = std::mem::replace(&mut self.device, device);
        self.wiring.page.set(reg::DEVICE_ID, self.device.id());
        before
    }

    /// The driver writes to offset `register`. All but aligned 32-bit writes to
    /// registers are ignored, configuration space included, and so are all during
    /// a reset. A worker that comes back must be stopped, and then the reset be
    /// finished.
    fn write(&mut self, register: u64, data: &[u8]) -> Option<Box<dyn Worker>> {
        let value = <[u8; 4]>::try_from(data).map(u32::from_le_bytes).ok()?;
        if self.resetting {
            return None;
        }
        let status = self.wiring.interrupt.status();
        match register {
            reg::STATUS => return self.set_status(status, value),
            reg::DEVICE_FEATURES_SEL => {
                self.device_features_sel = value;
                self.show_features();
            }
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES if status & (DRIVER | FEATURES_OK) == DRIVER => {
                if let Some(shift) = half(self.driver_features_sel) {
                    self.driver_features &= !(u64::from(u32::MAX) << shift);
                    self.driver_features |= u64::from(value) << shift;
                }
            }
            reg::QUEUE_SEL => {
                self.queue_sel = value;
                self.show_queue();
            }
            _ if status & (FEATURES_OK | DRIVER_OK | FAILED) == FEATURES_OK => {
                self.set_queue(register, value);
            }
            _ => {}
        }
        None
    }

    fn set_queue(&mut self, register: u64, value: u32) {
        let Some(queue) = index(self.queue_sel).and_then(|at| self.queues.get_mut(at)) else {
            return;
        };
        match register {
            reg::QUEUE_READY => {
                queue.ready = value == 1;
                self.show_queue();
            }
            // 4.2.2.2: nothing else changes while it is ready.
            _ if queue.ready => {}
            reg::QUEUE_NUM => queue.size = value,
            reg::QUEUE_DESC_LOW => set_low(&mut queue.descriptors, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.descriptors, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.driver, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.driver, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.device, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.device, value),
            _ => {}
        }
    }

    fn set_status(&mut self, now: u8, value: u32) -> Option<Box<dyn Worker>> {
        let interrupt = self.wiring.interrupt.clone();
        match step(now, value) {
            Step::Ignore => {}
            Step::Reset => {
                let worker = self.worker.take();
                self.resetting = worker.is_some();
                if worker.is_none() {
                    self.finish_reset();
                }
                return worker;
            }
            Step::Set(next) => interrupt.set_status(next),
            Step::AcceptFeatures(next) => {
                let features = self.driver_features;
                if features & VERSION_1 != 0 && features & !self.features() == 0 {
                    interrupt.set_status(next);
                }
            }
            Step::Start(next) => {
                interrupt.set_status(next);
                self.worker = self.start();
                if self.worker.is_none() {
                    interrupt.needs_reset();
                }
            }
        }
        None
    }

    /// Everything as in the beginning. No worker runs.
    fn finish_reset(&mut self) {
        self.resetting = false;
        self.driver_features = 0;
        self.driver_features_sel = 0;
        self.device_features_sel = 0;
        self.queue_sel = 0;
        self.queues.fill(Setup::default());
        self.show_features();
        self.show_queue();
        self.wiring.interrupt.reset(&self.device.config());
    }

    /// The device's worker with all queues that are ready; `None` if one of them
    /// or the device refuses.
    fn start(&mut self) -> Option<Box<dyn Worker>> {
        let queues = self.checked_queues()?;
        self.device
            .activate(Io {
                queues,
                features: self.driver_features,
            })
            .ok()
    }

    fn checked_queues(&self) -> Option<Vec<Option<Ring>>> {
        let memory = &self.wiring.memory;
        let mut taken: Vec<Range<u64>> = Vec::new();
        let sizes = self.device.queue_sizes();
        let mut queues = Vec::with_capacity(sizes.len());
        for ((setup, largest), notify) in self.queues.iter().zip(sizes).zip(&self.wiring.notify) {
            if !setup.ready {
                queues.push(None);
                continue;
            }
            let queue = self.checked_queue(setup, *largest)?;
            for ring in rings(setup) {
                let ring = ring?;
                if taken.iter().any(|other| overlap(other, &ring)) {
                    return None;
                }
                taken.push(ring);
            }
            queues.push(Some(Ring::new(
                queue,
                memory.clone(),
                notify.try_clone().ok()?,
                self.wiring.interrupt.clone(),
            )));
        }
        Some(queues)
    }

    /// The queue, if its size is a power of two up to `largest` and its rings are
    /// aligned (virtio 1.2, 2.7) and in RAM.
    fn checked_queue(&self, setup: &Setup, largest: u16) -> Option<State> {
        let size = u16::try_from(setup.size).ok()?;
        let aligned = setup.descriptors.is_multiple_of(16)
            && setup.driver.is_multiple_of(2)
            && setup.device.is_multiple_of(4);
        let in_ram = rings(setup).into_iter().all(|ring| {
            ring.is_some_and(|ring| {
                let length = ring.end.saturating_sub(ring.start);
                let memory = self.wiring.memory.now();
                usize::try_from(length)
                    .is_ok_and(|length| memory.get_slice(GuestAddress(ring.start), length).is_ok())
            })
        });
        (size.is_power_of_two() && size <= largest && aligned && in_ram).then_some(State {
            size,
            event_index: self.driver_features & EVENT_IDX != 0,
            descriptors: setup.descriptors,
            available: setup.driver,
            used: setup.device,
            next_available: 0,
            next_used: 0,
        })
    }

    /// How far the queues that are ready are.
    fn progress(&self) -> Vec<Progress> {
        let memory = self.wiring.memory.now();
        // 2.7.6, 2.7.8: both rings begin with flags and index.
        let index = |ring: u64| {
            let at = GuestAddress(ring.checked_add(2)?);
            let index: u16 = memory.load(at, Ordering::Relaxed).ok()?;
            Some(u16::from_le(index))
        };
        let ready = self.queues.iter().filter(|queue| queue.ready);
        ready
            .filter_map(|queue| {
                Some(Progress {
                    available: index(queue.driver)?,
                    used: index(queue.device)?,
                })
            })
            .collect()
    }

    fn features(&self) -> u64 {
        self.device.features() | TRANSPORT_FEATURES
    }

    fn show_features(&self) {
        let word = half(self.device_features_sel).map_or(0, |shift| {
            u32::try_from(self.features() >> shift & u64::from(u32::MAX)).unwrap_or(0)
        });
        self.wiring.page.set(reg::DEVICE_FEATURES, word);
    }

    fn show_queue(&self) {
        let at = index(self.queue_sel);
        let largest = at.and_then(|at| self.device.queue_sizes().get(at));
        let ready = at
            .and_then(|at| self.queues.get(at))
            .is_some_and(|queue| queue.ready);
        let page = &self.wiring.page;
        page.set(reg::QUEUE_NUM_MAX, largest.copied().map_or(0, u32::from));
        page.set(reg::QUEUE_READY, u32::from(ready));
    }
}

fn index(select: u32) -> Option<usize> {
    usize::try_from(select).ok()
}

/// Which half of the features a selector stands for, as a shift.
fn half(select: u32) -> Option<u32> {
    match select {
        0 => Some(0),
        1 => Some(32),
        _ => None,
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address >> 32 << 32 | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & u64::from(u32::MAX) | u64::from(value) << 32;
}

/// Descriptor table, driver's and device's ring (virtio 1.2, 2.7); `None` for one
/// that ends beyond the address space.
fn rings(setup: &Setup) -> [Option<Range<u64>>; 3] {
    let entries = u64::from(setup.size);
    let ring = |start: u64, entry: u64, fixed: u64| {
        let length = entries.checked_mul(entry)?.checked_add(fixed)?;
        Some(start..start.checked_add(length)?)
    };
    [
        ring(setup.descriptors, 16, 0),
        ring(setup.driver, 2, 6),
        ring(setup.device, 8, 6),
    ]
}

fn overlap(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

#[cfg(test)]
mod tests;
