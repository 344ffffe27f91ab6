//! What passed and what did not, to be read while the device runs.

use std::sync::atomic::{AtomicU64, Ordering};

use serde::{Deserialize, Serialize};

use super::Limiters;

/// What a network device did so far, over all resets.
///
/// Each is a sum of its own: they are not taken at one moment.
#[derive(Debug, Default)]
pub struct Counters {
    /// What the guest received.
    pub received: Passed,
    /// What the guest sent and the tap took.
    pub transmitted: Passed,
    /// Frames for the guest that fit none of its buffers, are longer than the MTU or
    /// than any frame, or shorter than an Ethernet header, or for which the device was
    /// stopped.
    pub unfit: AtomicU64,
    /// Frames for the guest whose checksum or segments its driver did not offer to
    /// make.
    pub not_negotiated: AtomicU64,
    /// Buffers for frames that cannot take one: not to be written to, or shorter than a
    /// header.
    pub unusable: AtomicU64,
    /// Frames of the guest that are too long or too short, or whose header makes no
    /// sense for them.
    pub malformed: AtomicU64,
    /// Frames of the guest that the tap refused: its interface is down, or the kernel
    /// finds no sense in them.
    pub refused: AtomicU64,
}

/// Frames, and their bytes without the header of virtio.
#[derive(Debug, Default)]
pub struct Passed {
    /// Frames. One that is to be cut into segments is one.
    pub frames: AtomicU64,
    /// Bytes.
    pub bytes: AtomicU64,
}

/// What [`Counters`] say at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Frames that the guest received.
    pub received_frames: u64,
    /// Their bytes.
    pub received_bytes: u64,
    /// Frames for the guest that it did not get.
    pub received_dropped: u64,
    /// Microseconds for which the tap was not read since the limit allowed no more.
    pub received_held_us: u64,
    /// Frames that the guest sent and the tap took.
    pub transmitted_frames: u64,
    /// Their bytes.
    pub transmitted_bytes: u64,
    /// Frames of the guest that went nowhere.
    pub transmitted_dropped: u64,
    /// Microseconds for which a frame of the guest waited for the limit.
    pub transmitted_held_us: u64,
}

impl Counters {
    /// The sums as they are now, of a device with these limits.
    #[must_use]
    pub fn totals(&self, limiters: &Limiters) -> Totals {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let both = |one, other| get(one).saturating_add(get(other));
        Totals {
            received_frames: get(&self.received.frames),
            received_bytes: get(&self.received.bytes),
            received_dropped: both(&self.unfit, &self.not_negotiated),
            received_held_us: limiters.receive.held_us(),
            transmitted_frames: get(&self.transmitted.frames),
            transmitted_bytes: get(&self.transmitted.bytes),
            transmitted_dropped: both(&self.malformed, &self.refused),
            transmitted_held_us: limiters.transmit.held_us(),
        }
    }
}

impl Passed {
    pub(super) fn add(&self, bytes: usize) {
        // usize has 64 bits here.
        let bytes = u64::try_from(bytes).unwrap_or(0);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        count(&self.frames);
    }
}

pub(super) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
