//! The notice device: what the host changed in a shared directory, told to the
//! guest's kernel.
//!
//! No device of the virtio specification does this: our driver in the guest's kernel
//! (`guest/driver/bulkhead_notify.c`) offers buffers in the one queue,
//! and gets a [`Notice`] in each. So neither the one who started the machine nor a
//! program of the guest is on the way, and none of them has to read what a VMM says.
//!
//! A guest that offers nothing is told nothing: whoever posts decides how long to
//! wait for it.
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
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::{
    Device, Io, Worker,
    queue::{Ring, State},
};

/// The number for what has none (virtio 1.2, 5): it will not be given to a device.
const ID: u32 = 65535;

/// Descriptors in the queue.
const SIZE: u16 = 16;

/// Longest name of a file (Linux: NAME_MAX).
const NAME_MAX: usize = 255;

/// One change, or several of one file, as the driver reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notice {
    /// A directory by its number in the share, or any file if there is no name.
    pub node: u64,
    /// The file of this name by its number, if it has one that matters: the one that
    /// was changed, or that is no more.
    pub child: u64,
    /// What happened, as in inotify(7). `IN_DELETE_SELF` and `IN_MOVE_SELF` are about
    /// the child.
    pub mask: u32,
    /// The same in both halves of a rename.
    pub cookie: u32,
    /// Name in the directory: at most 255 bytes.
    pub name: Vec<u8>,
}

impl Notice {
    fn encode(&self) -> Vec<u8> {
        let name = self.name.split_at_checked(NAME_MAX);
        let name = name.map_or(&*self.name, |(name, _)| name);
        let mut bytes = Vec::with_capacity(300);
        bytes.extend(self.node.to_le_bytes());
        bytes.extend(self.child.to_le_bytes());
        bytes.extend(self.mask.to_le_bytes());
        bytes.extend(self.cookie.to_le_bytes());
        bytes.extend(u32::try_from(name.len()).unwrap_or(0).to_le_bytes());
        bytes.extend(name);
        bytes
    }
}

/// What became of a notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Posted {
    /// It went out, or there is no driver that would hear it.
    Done,
    /// The driver has offered no buffer for it yet.
    Later,
}

/// Where notices are posted.
#[derive(Debug, Default)]
pub struct Outbox {
    /// Of the driver, while there is one.
    ring: Mutex<Option<Ring>>,
}

impl Outbox {
    /// Tells the driver.
    pub fn post(&self, notice: &Notice) -> Posted {
        let mut ring = self.ring();
        let Some(ring) = ring.as_mut() else {
            return Posted::Done;
        };
        let Some(chain) = ring.pop() else {
            // Malformed ones may have gone back.
            ring.tell();
            return Posted::Later;
        };
        // A buffer that is too small goes back as it is, and the notice is lost.
        let mut writer = chain.writer();
        let written = writer
            .write_all(&notice.encode())
            .map(|()| writer.written());
        ring.give_back(chain, written.unwrap_or(0));
        ring.tell();
        Posted::Done
    }

    /// Waits until the driver offers a buffer, but not for longer than this.
    pub fn wait(&self, limit: Duration) -> io::Result<()> {
        let event = match &*self.ring() {
            Some(ring) => ring.event().try_clone_to_owned()?,
            None => return Ok(()),
        };
        let limit = Timespec::try_from(limit).map_err(io::Error::other)?;
        poll(&mut [PollFd::new(&event, PollFlags::IN)], Some(&limit))?;
        if let Some(ring) = &*self.ring() {
            ring.acknowledge();
        }
        Ok(())
    }

    fn ring(&self) -> MutexGuard<'_, Option<Ring>> {
        // A panic ends the process: what it left is never seen.
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The device.
#[derive(Debug, Default)]
pub struct Notices(Arc<Outbox>);

impl Notices {
    /// Where what it tells is posted.
    #[must_use]
    pub fn outbox(&self) -> Arc<Outbox> {
        Arc::clone(&self.0)
    }
}

impl Device for Notices {
    fn id(&self) -> u32 {
        ID
    }

    fn queue_sizes(&self) -> &[u16] {
        &[SIZE]
    }

    fn activate(&mut self, mut io: Io) -> io::Result<Box<dyn Worker>> {
        *self.0.ring() = io.take(0);
        Ok(Box::new(Running(self.outbox())))
    }
}

/// The activated device. Dropped, it takes the queue away.
#[derive(Debug)]
struct Running(Arc<Outbox>);

impl Worker for Running {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        vec![self.0.ring().take().map(Ring::into_state)]
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        drop(self.0.ring().take());
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    fn started(descriptors: &[(u64, u32, u16)]) -> (Notices, Guest, Box<dyn Worker>) {
        let mut guest = Guest::new();
        for descriptor in descriptors {
            guest.driver.offer(&[*descriptor]);
        }
        let ring = guest
            .driver
            .ring(super::super::testing::interrupt(&guest.irq));
        let mut notices = Notices::default();
        let io = Io {
            queues: vec![Some(ring)],
            features: 0,
        };
        let worker = notices.activate(io).unwrap();
        (notices, guest, worker)
    }

    fn notice(name: &[u8]) -> Notice {
        Notice {
            node: 7,
            child: 8,
            mask: 0x100,
            cookie: 9,
            name: name.to_vec(),
        }
    }

    #[test]
    fn a_notice_is_what_the_driver_reads() {
        let (notices, mut guest, _worker) = started(&[(0x1_0000, 284, WRITE)]);
        let outbox = notices.outbox();
        assert_eq!(outbox.post(&notice(b"name")), Posted::Done);
        assert_eq!(guest.driver.all_used(), [(0, 32)]);
        let expected = b"\x07\0\0\0\0\0\0\0\x08\0\0\0\0\0\0\0\0\x01\0\0\x09\0\0\0\x04\0\0\0name";
        assert_eq!(guest.driver.read(0x1_0000, 32), expected);
        assert_eq!(guest.irq.read().unwrap(), 1);
        // The next one waits for a buffer.
        assert_eq!(outbox.post(&notice(&[b'x'; 300])), Posted::Later);
        guest.driver.offer(&[(0x1_0000, 284, WRITE)]);
        guest.driver.notify();
        outbox.wait(Duration::from_secs(100)).unwrap();
        assert_eq!(outbox.post(&notice(&[b'x'; 300])), Posted::Done);
        assert_eq!(guest.driver.all_used(), [(1, 28 + 255)]);
    }

    #[test]
    fn what_cannot_be_written_goes_back_empty_and_is_not_told() {
        for descriptor in [
            (0x1_0000, 30, WRITE),
            (0x1_0000, 300, READ),
            (0x1_0000_0000, 300, WRITE),
        ] {
            let (notices, mut guest, _worker) = started(&[descriptor]);
            // A chain that is malformed goes back while the next one is looked for.
            notices.outbox().post(&notice(b"name"));
            assert_eq!(guest.driver.all_used(), [(0, 0)], "{descriptor:x?}");
        }
    }

    #[test]
    fn without_a_driver_nobody_waits() {
        let (notices, _guest, worker) = started(&[]);
        let outbox = notices.outbox();
        assert_eq!(outbox.post(&notice(b"a")), Posted::Later);
        let states = worker.stop();
        assert!(matches!(states.as_slice(), [Some(_)]));
        assert_eq!(outbox.post(&notice(b"a")), Posted::Done);
        outbox.wait(Duration::from_secs(100)).unwrap();
    }
}
