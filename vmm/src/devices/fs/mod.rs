//! virtio-fs: a directory of the host as a file system of the guest (virtio 1.2,
//! 5.11).
//!
//! The driver's FUSE messages pass three stages: `front.rs` refuses what is not
//! well-formed, the FUSE server of `fuse-backend-rs` decodes and encodes, and
//! `share.rs` does the work. The library's own passthrough file system is not
//! used: it knows at most 255 mounts in its life, remembers every file ever seen
//! and names files by absolute paths in `/proc`, which a jailed process lacks.
//!
//! Each queue has a thread. The threads start with the device, before the guest,
//! because they alone keep the capabilities that a file server needs.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod caller;
mod file;
mod front;
mod queue;
mod share;
mod table;
#[cfg(test)]
mod tests;

use std::{io, sync::Arc};

use fuse_backend_rs::api::server::Server;
use rustix::{
    fs::{Mode, OFlags},
    process::{Resource, getrlimit},
};

use self::{queue::QueueThread, share::Shared};
use crate::{
    config::Share,
    devices::{Device, Io, Worker, queue::State},
    jail::{Confined, threads::ThreadKind},
};

/// Bytes of the tag in the configuration space.
const TAG: usize = 36;

/// Most request queues.
const QUEUES: u8 = 8;

/// Descriptors in the high-priority queue.
const HIPRIO_SIZE: u16 = 64;

/// Descriptors in a request queue: enough for 256 pages and the headers, to which
/// Linux limits its requests.
const REQUEST_SIZE: u16 = 512;

/// Descriptors that other parts of the process may need; a quarter of them, if
/// there are few.
const RESERVED_DESCRIPTORS: u64 = 1024;

/// The device as the driver finds it.
#[derive(Debug)]
pub struct Fs {
    config: [u8; TAG + 4],
    sizes: Vec<u16>,
    threads: Arc<[QueueThread]>,
}

impl Fs {
    /// Opens the directory and starts a thread for each queue, which works once
    /// the driver is ready.
    ///
    /// The calling thread still has the capabilities that the threads keep; see
    /// [`jail`](crate::jail).
    pub fn new(share: &Share, confined: &Confined) -> io::Result<Fs> {
        let invalid = |text: String| io::Error::new(io::ErrorKind::InvalidInput, text);
        let tag = share.tag.as_bytes();
        if tag.is_empty() || tag.len() > TAG || tag.contains(&0) {
            return Err(invalid(format!(
                "The tag {:?} has not 1 to {TAG} bytes",
                share.tag
            )));
        }
        if !(1..=QUEUES).contains(&share.queues) {
            return Err(invalid(format!(
                "{} request queues are not 1 to {QUEUES}",
                share.queues
            )));
        }
        let root = rustix::fs::open(
            confined.place_of(&share.dir),
            OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        let limit = descriptors.saturating_sub(RESERVED_DESCRIPTORS.min(descriptors / 4));
        let shared = Arc::new(Shared::new(
            root,
            confined.proc_self_fd()?,
            share.read_only,
            usize::try_from(limit).unwrap_or(usize::MAX),
        )?);
        let server = Arc::new(Server::new(Arc::clone(&shared)));
        let threads = (0..=share.queues)
            .map(|index| {
                let seal = confined.seal(ThreadKind::Files);
                QueueThread::spawn(index, Arc::clone(&server), Arc::clone(&shared), seal)
            })
            .collect::<io::Result<_>>()?;
        let mut config = [0; TAG + 4];
        for (to, from) in config.iter_mut().zip(tag) {
            *to = *from;
        }
        config[TAG..].copy_from_slice(&u32::from(share.queues).to_le_bytes());
        let requests = std::iter::repeat_n(REQUEST_SIZE, share.queues.into());
        let sizes = std::iter::once(HIPRIO_SIZE).chain(requests).collect();
        Ok(Fs {
            config,
            sizes,
            threads,
        })
    }
}

impl Device for Fs {
    fn id(&self) -> u32 {
        26
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn activate(&mut self, io: Io) -> io::Result<Box<dyn Worker>> {
        let running = Running(Arc::clone(&self.threads));
        // If one fails, dropping `running` takes the others down again.
        for (thread, queue) in self.threads.iter().zip(io.queues) {
            if let Some(ring) = queue {
                thread.start(ring)?;
            }
        }
        Ok(Box::new(running))
    }
}

/// The activated device.
#[derive(Debug)]
struct Running(Arc<[QueueThread]>);

impl Worker for Running {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        self.0.iter().map(QueueThread::stop).collect()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        for thread in &*self.0 {
            thread.stop();
        }
        if let Some(thread) = self.0.first() {
            thread.forget_all();
        }
    }
}
