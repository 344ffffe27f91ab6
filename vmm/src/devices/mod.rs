//! Virtio devices: what each offers to the driver, and the worker that serves it.
//!
//! A device is one file here and one arm in the match that builds it. Two types
//! make it up: the [`Device`], which the driver finds and configures through the
//! transport, and its [`Worker`], which exists only while the driver has set
//! DRIVER_OK and owns the queues. The transport (`mmio.rs`) creates the queues,
//! checks them, moves them in at activation and takes the worker down at reset.

pub mod absent;
pub mod block;
pub mod console;
pub mod fs;
pub mod limit;
pub mod mem;
pub mod net;
pub mod notices;
pub mod queue;
pub mod rng;
#[cfg(test)]
pub(crate) mod testing;
pub mod vsock;

use std::io;

use self::queue::{Ring, State};
pub use crate::mmio::Interrupt;

/// What the driver sees before it sets DRIVER_OK.
pub trait Device: Send {
    /// Virtio device id (virtio 1.2, 5).
    fn id(&self) -> u32;

    /// Feature bits of the device itself. The transport adds VIRTIO_F_VERSION_1
    /// and the ring features.
    fn features(&self) -> u64 {
        0
    }

    /// Largest size of each queue, in the order of their numbers. Powers of two.
    fn queue_sizes(&self) -> &[u16];

    /// Device configuration space as it is now. Reads beyond it give 0; drivers'
    /// writes are ignored. A change while the driver is there is told by
    /// [`Interrupt::config_change`].
    fn config(&self) -> Vec<u8> {
        Vec::new()
    }

    /// Called when the driver sets DRIVER_OK, with everything that the worker
    /// needs. After a reset it may be called again.
    fn activate(&mut self, io: Io) -> io::Result<Box<dyn Worker>>;
}

/// What a running device works with. Dropping the worker stops it.
pub trait Worker: Send {
    /// Ends all work on the queues: when this returns, none of the worker's
    /// threads touches guest memory any more. How far it came with each queue, in
    /// the order of their numbers: rings made of this go on from there.
    fn stop(self: Box<Self>) -> Vec<Option<State>>;
}

/// What the driver gives to a device that it activates.
#[derive(Debug)]
pub struct Io {
    /// The queues that the driver made ready, already validated. One that it left
    /// alone is `None`.
    pub queues: Vec<Option<Ring>>,
    /// Features that both sides agreed on.
    pub features: u64,
}

impl Io {
    /// Takes queue `index`, if the driver made it ready.
    pub fn take(&mut self, index: usize) -> Option<Ring> {
        self.queues.get_mut(index)?.take()
    }
}
