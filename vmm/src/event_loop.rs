//! One thread that waits for descriptors on behalf of several devices.
//!
//! A [`Handler`] is added with the descriptors that it watches and runs on the
//! loop's thread when one of them is ready. Each of these is held by a guard,
//! [`Watched`], without which it is not watched: closing a descriptor would not be
//! enough, since the kernel watches what is open, and copies may be. Dropping the
//! handler's [`Registration`] takes it out: when the drop returns, the handler has
//! run for the last time and all that it owned is closed.
//!
//! All handlers of a loop share one lock, which the thread holds while one of
//! them runs. So a handler never blocks, and never adds to, or drops a
//! registration of, its own loop.

use std::{
    any::Any,
    collections::HashMap,
    fmt, io,
    marker::PhantomData,
    ops::Deref,
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
pub trait Handler: Any + Send {
    /// The descriptor that was added under `token` is ready for `events`.
    ///
    /// # Errors
    /// An error says that the device cannot go on: it ends the virtual machine.
    fn ready(&mut self, token: u32, events: EventFlags, watch: &Watch<'_>) -> io::Result<()>;
}

/// The descriptors of one handler.
#[derive(Debug)]
pub struct Watch<'a> {
    epoll: &'a Arc<OwnedFd>,
    id: u32,
}

impl Watch<'_> {
    /// Watches `fd`, level-triggered, as long as the guard lives. Error and hang-up
    /// are always reported.
    pub fn add<F: AsFd>(&self, fd: F, token: u32, events: EventFlags) -> io::Result<Watched<F>> {
        epoll::add(&**self.epoll, &fd, self.data(token), events)?;
        Ok(Watched {
            epoll: Arc::clone(self.epoll),
            fd,
        })
    }

    fn data(&self, token: u32) -> EventData {
        EventData::new_u64(u64::from(self.id) << 32 | u64::from(token))
    }
}

/// A descriptor that is watched until this is dropped.
#[must_use = "dropping it ends the watch"]
#[derive(Debug)]
pub struct Watched<F: AsFd> {
    epoll: Arc<OwnedFd>,
    fd: F,
}

impl<F: AsFd> AsFd for Watched<F> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl<F: AsFd> Deref for Watched<F> {
    type Target = F;

    fn deref(&self) -> &F {
        &self.fd
    }
}

impl<F: AsFd> Drop for Watched<F> {
    fn drop(&mut self) {
        // It was added under this number, which is still open.
        let _ = epoll::delete(&*self.epoll, &self.fd);
    }
}

/// The loop; a thread serves it by [`EventLoop::run`].
pub struct EventLoop {
    name: &'static str,
    epoll: Arc<OwnedFd>,
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
            epoll: Arc::new(epoll::create(CreateFlags::CLOEXEC)?),
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
    ) -> io::Result<Registration<H>> {
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
            handler: PhantomData,
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

    /// Whether a watched descriptor is ready.
    #[cfg(test)]
    pub(crate) fn is_ready(&self) -> bool {
        self.is_ready_within(std::time::Duration::ZERO)
    }

    /// Whether one is, or becomes it before so much time has passed.
    #[cfg(test)]
    pub(crate) fn is_ready_within(&self, limit: std::time::Duration) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let mut ready = [PollFd::new(&self.epoll, PollFlags::IN)];
        let limit = Timespec::try_from(limit).unwrap();
        poll(&mut ready, Some(&limit)).unwrap() == 1
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
pub struct Registration<H> {
    events: Arc<EventLoop>,
    id: u32,
    handler: PhantomData<fn() -> H>,
}

impl<H> fmt::Debug for Registration<H> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registration")
            .field("events", &self.events)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<H: Handler> Registration<H> {
    /// Takes the handler out, after it has run for the last time. It still watches
    /// its descriptors, but is not told.
    #[must_use]
    pub fn stop(self) -> Option<H> {
        let handler: Box<dyn Any> = self.take()?;
        // It was added as an `H`.
        handler.downcast().ok().map(|handler| *handler)
    }
}

impl<H> Registration<H> {
    fn take(&self) -> Option<Box<dyn Handler>> {
        self.events.served().handlers.remove(&self.id)
    }
}

impl<H> Drop for Registration<H> {
    fn drop(&mut self) {
        let handler = self.take();
        // Dropped without the lock.
        drop(handler);
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn copy(event: &EventFd) -> OwnedFd {
        event_fd(event).try_clone_to_owned().unwrap()
    }

    struct Tell {
        event: Watched<OwnedFd>,
        sender: mpsc::Sender<u32>,
    }

    impl Handler for Tell {
        fn ready(&mut self, token: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
            rustix::io::read(&self.event, &mut [0; 8])?;
            self.sender.send(token).map_err(io::Error::other)
        }
    }

    #[test]
    fn a_ready_descriptor_reaches_its_handler_until_the_registration_is_dropped() {
        let events = EventLoop::new("test").unwrap();
        let event = EventFd::new(0).unwrap();
        let (sender, receiver) = mpsc::channel();
        let registration = events
            .add(|watch| {
                let event = watch.add(copy(&event), 7, EventFlags::IN)?;
                Ok(Tell { event, sender })
            })
            .unwrap();
        event.write(1).unwrap();
        events.turn().unwrap();
        assert_eq!(receiver.recv(), Ok(7));
        drop(registration);
        assert!(receiver.recv().is_err(), "the handler is dropped");
    }

    #[test]
    fn a_watch_ends_with_its_guard_although_a_copy_of_the_descriptor_stays_open_b48() {
        let events = EventLoop::new("test").unwrap();
        let event = EventFd::new(0).unwrap();
        event.write(1).unwrap();
        for _ in 0..2 {
            let (sender, _receiver) = mpsc::channel();
            let registration = events
                .add(|watch| {
                    let event = watch.add(copy(&event), 7, EventFlags::IN)?;
                    Ok(Tell { event, sender })
                })
                .unwrap();
            assert!(events.is_ready());
            let handler = registration.stop().unwrap();
            assert!(events.is_ready(), "still watched");
            drop(handler);
            assert!(!events.is_ready());
        }
    }

    #[test]
    fn a_handlers_error_ends_the_machine() {
        struct Fail {
            _event: Watched<OwnedFd>,
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
                let event = watch.add(copy(&event), 0, EventFlags::IN)?;
                Ok(Fail { _event: event })
            })
            .unwrap();
        events.spawn(ending.clone()).unwrap();
        assert_eq!(ending.wait(), (End::Device, "test: no more".into()));
    }
}
