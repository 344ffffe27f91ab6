//! One thread that waits for descriptors on behalf of several devices.
//!
//! A [`Handler`] is added with the descriptors that it watches and runs on the
//! loop's thread when one of them is ready. Dropping its [`Registration`] takes
//! it out: when the drop returns, the handler has run for the last time and all
//! that it owned is closed.
//!
//! All handlers of a loop share one lock, which the thread holds while one of
//! them runs. So a handler never blocks, and never adds to, or drops a
//! registration of, its own loop.

use std::{
    collections::HashMap,
    fmt, io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rustix::event::epoll::{self, CreateFlags, EventData};
use vmm_sys_util::eventfd::EventFd;

use crate::exit::{End, Ending};

pub use rustix::event::epoll::EventFlags;

/// Most events taken from the kernel at once.
const BATCH: usize = 32;

/// The descriptor of an event, which does not offer it itself.
#[must_use]
pub fn event_fd(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: `event` owns the descriptor and outlives the borrow.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}

/// Who is told of ready descriptors.
pub trait Handler: Send {
    /// The descriptor that was added under `token` is ready for `events`.
    ///
    /// # Errors
    /// An error says that the device cannot go on: it ends the virtual machine.
    fn ready(&mut self, token: u32, events: EventFlags, watch: &Watch<'_>) -> io::Result<()>;
}

/// The descriptors of one handler.
#[derive(Debug)]
pub struct Watch<'a> {
    epoll: &'a OwnedFd,
    id: u32,
}

impl Watch<'_> {
    /// Watches `fd`, level-triggered. Error and hang-up are always reported.
    pub fn add(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::add(self.epoll, fd, self.data(token), events)?)
    }

    /// Changes what a watched descriptor is watched for.
    pub fn modify(&self, fd: impl AsFd, token: u32, events: EventFlags) -> io::Result<()> {
        Ok(epoll::modify(self.epoll, fd, self.data(token), events)?)
    }

    /// Watches `fd` no longer. Closing its last copy has the same effect.
    pub fn remove(&self, fd: impl AsFd) -> io::Result<()> {
        Ok(epoll::delete(self.epoll, fd)?)
    }

    fn data(&self, token: u32) -> EventData {
        EventData::new_u64(u64::from(self.id) << 32 | u64::from(token))
    }
}

/// The loop; a thread serves it by [`EventLoop::run`].
pub struct EventLoop {
    name: &'static str,
    epoll: OwnedFd,
    served: Mutex<Served>,
}

#[derive(Default)]
struct Served {
    handlers: HashMap<u32, Box<dyn Handler>>,
    last_id: u32,
}

impl fmt::Debug for EventLoop {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLoop")
            .field("name", &self.name)
            .finish_non_exhaustive()
    }
}

impl EventLoop {
    /// A loop without a thread yet. `name` is the thread's, at most 15 bytes.
    pub fn new(name: &'static str) -> io::Result<Arc<EventLoop>> {
        Ok(Arc::new(EventLoop {
            name,
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            served: Mutex::default(),
        }))
    }

    /// Serves events as long as the process runs. A handler's error ends the virtual
    /// machine through `ending`.
    pub fn run(&self, ending: &Ending) {
        loop {
            if let Err(error) = self.turn() {
                ending.end(End::Device, format!("{}: {error}", self.name));
                return;
            }
        }
    }

    /// [`EventLoop::run`] in a thread that nothing confines.
    #[cfg(test)]
    pub(crate) fn spawn(self: &Arc<Self>, ending: Ending) -> io::Result<()> {
        let this = Arc::clone(self);
        std::thread::Builder::new().spawn(move || this.run(&ending))?;
        Ok(())
    }

    /// Its name, for the thread.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Adds the handler that `build` makes, with the descriptors that it watches.
    pub fn add<H: Handler + 'static>(
        self: &Arc<Self>,
        build: impl FnOnce(&Watch<'_>) -> io::Result<H>,
    ) -> io::Result<Registration> {
        let mut served = self.served();
        let mut id = served.last_id.wrapping_add(1);
        while served.handlers.contains_key(&id) {
            id = id.wrapping_add(1);
        }
        let handler = build(&Watch {
            epoll: &self.epoll,
            id,
        })?;
        served.last_id = id;
        served.handlers.insert(id, Box::new(handler));
        Ok(Registration {
            events: Arc::clone(self),
            id,
        })
    }

    /// Waits for events and serves them.
    pub(crate) fn turn(&self) -> io::Result<()> {
        let mut batch = Vec::with_capacity(BATCH);
        match epoll::wait(
            &self.epoll,
            rustix::buffer::spare_capacity(&mut batch),
            None,
        ) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
        for event in batch {
            let data = event.data.u64();
            let (id, token) = split(data);
            // The lock is taken anew for each event, so that a reset waits for
            // one handler at most.
            let mut served = self.served();
            // None: the handler was taken out after the kernel reported.
            if let Some(handler) = served.handlers.get_mut(&id) {
                let watch = Watch {
                    epoll: &self.epoll,
                    id,
                };
                handler.ready(token, event.flags, &watch)?;
            }
        }
        Ok(())
    }

    fn served(&self) -> MutexGuard<'_, Served> {
        // A panic ends the process; what it left behind is not looked at.
        self.served.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[expect(clippy::cast_possible_truncation, reason = "it takes the two halves")]
fn split(data: u64) -> (u32, u32) {
    ((data >> 32) as u32, data as u32)
}

/// A handler's place in its loop. Dropping it stops and drops the handler.
#[must_use = "dropping it takes the handler out of the loop"]
#[derive(Debug)]
pub struct Registration {
    events: Arc<EventLoop>,
    id: u32,
}

impl Drop for Registration {
    fn drop(&mut self) {
        let handler = self.events.served().handlers.remove(&self.id);
        // Dropped without the lock; its descriptors leave the epoll set as they
        // are closed.
        drop(handler);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    struct Tell {
        event: Arc<EventFd>,
        sender: mpsc::Sender<u32>,
    }

    impl Handler for Tell {
        fn ready(&mut self, token: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
            self.event.read()?;
            self.sender.send(token).map_err(io::Error::other)
        }
    }

    #[test]
    fn a_ready_descriptor_reaches_its_handler_until_the_registration_is_dropped() {
        let events = EventLoop::new("test").unwrap();
        let event = Arc::new(EventFd::new(0).unwrap());
        let (sender, receiver) = mpsc::channel();
        let registration = events
            .add(|watch| {
                watch.add(event_fd(&event), 7, EventFlags::IN)?;
                Ok(Tell {
                    event: Arc::clone(&event),
                    sender,
                })
            })
            .unwrap();
        event.write(1).unwrap();
        events.turn().unwrap();
        assert_eq!(receiver.recv(), Ok(7));
        drop(registration);
        assert!(receiver.recv().is_err(), "the handler is dropped");
        assert_eq!(Arc::strong_count(&event), 1);
    }

    #[test]
    fn a_handlers_error_ends_the_machine() {
        struct Fail {
            _event: EventFd,
        }
        impl Handler for Fail {
            fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
                Err(io::Error::other("no more"))
            }
        }
        let events = EventLoop::new("test").unwrap();
        let ending = Ending::new().unwrap();
        let event = EventFd::new(0).unwrap();
        event.write(1).unwrap();
        let _registration = events
            .add(|watch| {
                watch.add(event_fd(&event), 0, EventFlags::IN)?;
                Ok(Fail { _event: event })
            })
            .unwrap();
        events.spawn(ending.clone()).unwrap();
        assert_eq!(ending.wait(), (End::Device, "test: no more".into()));
    }
}
