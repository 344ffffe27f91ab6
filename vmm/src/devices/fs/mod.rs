//! virtio-fs: a directory of the host as a file system of the guest (virtio 1.2,
//! 5.11).
//!
//! A request goes through four stages: `queue.rs` takes it and gives it to a
//! thread, `request.rs` decodes it, once and out of a copy, `server.rs` calls the
//! operation (`names.rs`, `content.rs`, `attributes.rs`, `directory.rs`) on the
//! share (`share.rs`) and writes the reply as `abi.rs` lays it out.
//!
//! The threads start with the device, before the guest, because they alone keep
//! the capabilities that a file server needs.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod abi;
mod attributes;
mod caller;
mod content;
mod device;
mod directory;
mod fanotify;
mod file;
mod locks;
mod names;
mod node;
mod opened;
mod queue;
mod request;
mod server;
mod share;
mod table;
#[cfg(test)]
mod tests;
mod watch;

use std::{
    io::{self, Write},
    sync::Arc,
};

use rustix::{
    fs::{Mode, OFlags},
    process::{Resource, getrlimit},
};

use self::{fanotify::Group, queue::Pool, share::Shared, watch::Watch};
use crate::{
    config::{Policy, Share},
    devices::{Device, Io, Worker, notices::Outbox, queue::State},
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
    pool: Arc<Pool>,
}

impl Fs {
    /// Opens the directory and starts the threads, which work once the driver is
    /// ready. What others change in it is told to `outbox`, if the host can tell.
    ///
    /// The calling thread still has the capabilities that the threads keep; see
    /// [`jail`](crate::jail).
    pub fn new(share: &Share, outbox: Option<Arc<Outbox>>, confined: &Confined) -> io::Result<Fs> {
        let descriptors = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
        Fs::with_descriptors(share, outbox, confined, descriptors)
    }

    /// In a process that may have so many descriptors.
    fn with_descriptors(
        share: &Share,
        outbox: Option<Arc<Outbox>>,
        confined: &Confined,
        descriptors: u64,
    ) -> io::Result<Fs> {
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
        let left = descriptors.saturating_sub(RESERVED_DESCRIPTORS.min(descriptors / 4));
        // A machine has one of each. Files of a private one are not held open.
        let limit = match share.policy {
            Policy::Shared => left.saturating_sub(left / 4),
            Policy::Private => left / 4,
        };
        let mut shared = Shared::new(
            root,
            confined.proc_self_fd()?,
            share.read_only,
            share.policy,
            usize::try_from(limit).unwrap_or(usize::MAX),
        )?;
        shared.watch = match outbox {
            Some(outbox) => watch(outbox, confined)?,
            None => None,
        };
        let shared = Arc::new(shared);
        let pool = Pool::spawn(shared, &confined.seal(ThreadKind::Files))?;
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
            pool,
        })
    }
}

/// What tells `outbox` of others' changes; none if the host cannot tell of them.
fn watch(outbox: Arc<Outbox>, confined: &Confined) -> io::Result<Option<Watch>> {
    // The host counts groups and marks by users: the pod's own has nobody else's.
    match confined.as_pod(Group::new)? {
        Ok(group) => Ok(Some(Watch::new(group, outbox)?)),
        Err(error) => {
            // Whoever should read it may be gone.
            let _ = writeln!(
                io::stderr(),
                "Changes of the host in volumes are not told to the guest: {error}"
            );
            Ok(None)
        }
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
        let running = Running(Some(Arc::clone(&self.pool)));
        // If it fails, dropping `running` takes all of it back.
        self.pool.activate(io.queues)?;
        Ok(Box::new(running))
    }
}

/// The activated device; empty once it has been stopped.
#[derive(Debug)]
struct Running(Option<Arc<Pool>>);

impl Worker for Running {
    fn stop(mut self: Box<Self>) -> Vec<Option<State>> {
        self.0.take().map_or_else(Vec::new, |pool| pool.reset())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(pool) = &self.0 {
            pool.reset();
        }
    }
}
