//! The threads that serve the queues of a file system.
//!
//! All threads wait on all queues, and the kernel wakes one for each notification:
//! a request that takes its time holds one thread and no queue. Whoever takes a
//! request looks whether there is another one and, if so, wakes another thread; if
//! not, the driver is asked to notify of the next.
//!
//! A guest that boots asks little, so one thread starts with the device. Whoever is
//! about to work on a mount, which may take its time, and is the last that waits,
//! starts another one first, up to [`THREADS`].
//!
//! Requests about one mount hold a third of the threads at most; more of them are
//! put aside until one is done. So a volume whose server is dead stops those who
//! use it, and nobody else.
//!
//! The first thread starts before the guest and waits for queues. A reset takes the
//! queues away. It waits for requests that are being worked on, but not for ever:
//! one that the host never ends keeps the device from being used again, and what
//! it says in the end is not heard.

use std::{
    collections::{HashMap, VecDeque},
    io,
    mem::MaybeUninit,
    os::fd::OwnedFd,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak},
    thread,
    time::{Duration, Instant},
};

use rustix::event::{
    EventfdFlags,
    epoll::{self, CreateFlags, Event, EventData, EventFlags},
    eventfd,
};

use super::{
    request::Header,
    server::{Answer, Message, refuse},
    share::Shared,
};
use crate::{
    config::Policy,
    devices::queue::{self, Chain, Ring},
    jail::{Seal, threads::FILE_THREADS},
};

/// The queue that serves only what must not wait behind other requests (virtio
/// 1.2, 5.11.6.2).
const HIPRIO: usize = 0;

/// Most threads of a share whose volumes can hang, and of one that is on the host's
/// own disks.
const THREADS: (usize, usize) = (9, 3);
const _: () = assert!(THREADS.0 + 2 <= FILE_THREADS);

/// How long a reset waits for what is being worked on.
const PATIENCE: Duration = Duration::from_secs(2);

/// Stack of a thread. No request needs more, whatever it asks for.
const STACK: usize = 256 * 1024;

/// How a thread is told that requests were taken that it may work on.
const MORE: u64 = u64::MAX;

/// The threads of a file system.
#[derive(Debug)]
pub(super) struct Pool {
    shared: Arc<Shared>,
    state: Mutex<State>,
    /// A request has been answered.
    done: Condvar,
    more: OwnedFd,
    /// Most threads.
    threads: usize,
    /// Most of them that work on one mount.
    most: usize,
}

#[derive(Debug, Default)]
struct State {
    /// For each thread, where it waits.
    waits: Vec<Arc<OwnedFd>>,
    /// The thread of those who wait for locks runs.
    locks: bool,
    rings: Vec<Option<Ring>>,
    /// Counts activations; answers to requests of an earlier one are dropped.
    generation: u64,
    /// Taken, and to be worked on by whoever comes first.
    taken: VecDeque<Job>,
    /// By mount: requests that are being worked on, and such that are put aside.
    mounts: HashMap<u64, Mount>,
    working: usize,
}

#[derive(Debug, Default)]
struct Mount {
    working: usize,
    aside: VecDeque<Job>,
}

/// A request that was taken from a queue.
#[derive(Debug)]
struct Job {
    queue: usize,
    generation: u64,
    chain: Chain,
}

impl Pool {
    /// Starts the first thread. It runs as long as the process, confined by `seal`, and
    /// so do those that it starts.
    pub(super) fn spawn(shared: Arc<Shared>, seal: &Seal) -> io::Result<Arc<Pool>> {
        let threads = match shared.policy {
            Policy::Shared => THREADS.0,
            Policy::Private => THREADS.1,
        };
        let pool = Arc::new(Pool {
            shared,
            state: Mutex::default(),
            done: Condvar::new(),
            more: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            threads,
            most: threads.div_ceil(3),
        });
        let (ready, prepared) = std::sync::mpsc::sync_channel(1);
        let (its, seal) = (Arc::clone(&pool), seal.clone());
        let wait = pool.new_wait(&mut pool.state())?;
        thread_of("fs-0".into()).spawn(move || {
            let prepared = its.shared.enter_thread().and_then(|()| seal.apply());
            let go_on = prepared.is_ok();
            // Fails only if `spawn` has given up.
            if ready.send(prepared).is_ok() && go_on {
                its.run(&wait);
            }
        })?;
        prepared
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(pool)
    }

    /// Where one more thread waits for all that others wait for.
    fn new_wait(&self, state: &mut State) -> io::Result<Arc<OwnedFd>> {
        let wait = Arc::new(epoll::create(CreateFlags::CLOEXEC)?);
        watch(&wait, &self.more, MORE)?;
        for (index, ring) in (0..).zip(&state.rings) {
            if let Some(ring) = ring {
                watch(&wait, ring.event(), index)?;
            }
        }
        state.waits.push(Arc::clone(&wait));
        Ok(wait)
    }

    /// Starts one more thread, from one of them, whose confinement it inherits. If the
    /// host has none to give, those that run do its work.
    fn start_another(self: &Arc<Pool>, state: &mut State) {
        let name = format!("fs-{}", state.waits.len());
        let Ok(wait) = self.new_wait(state) else {
            return;
        };
        let its = Arc::clone(self);
        let started = thread_of(name).spawn(move || {
            if its.shared.enter_thread().is_ok() {
                its.run(&wait);
            }
        });
        if started.is_err() {
            state.waits.pop();
        }
    }

    /// Starts the thread of those who wait for locks, unless it runs.
    fn start_locks(&self) -> io::Result<()> {
        let mut state = self.state();
        if !state.locks {
            let shared = Arc::clone(&self.shared);
            thread_of("fs-locks".into()).spawn(move || shared.locks.run())?;
            state.locks = true;
        }
        Ok(())
    }

    /// Starts the thread that tells what others change, if it is to be started.
    fn start_watch(&self) {
        let Some(watch) = self.shared.watch.as_ref().filter(|watch| watch.begins()) else {
            return;
        };
        let shared = Arc::clone(&self.shared);
        let started = thread_of("fs-watch".into()).spawn(move || {
            if let Some(watch) = &shared.watch {
                watch.run(&shared);
            }
        });
        if started.is_err() {
            watch.begin_later();
        }
    }

    /// Gives the threads their queues.
    pub(super) fn activate(&self, rings: Vec<Option<Ring>>) -> io::Result<()> {
        let mut state = self.state();
        if state.working > 0 || !state.rings.is_empty() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        state.generation = state.generation.wrapping_add(1);
        for (index, ring) in (0..).zip(&rings) {
            let Some(ring) = ring else { continue };
            for wait in &state.waits {
                watch(wait, ring.event(), index)?;
            }
        }
        // What the driver did before this moment made no event for a thread.
        for ring in rings.iter().flatten() {
            ring.again();
        }
        state.rings = rings;
        Ok(())
    }

    /// Takes the queues away, and lets go of all that the driver held. How far each
    /// queue came.
    pub(super) fn reset(&self) -> Vec<Option<queue::State>> {
        let mut state = self.state();
        for ring in state.rings.iter().flatten() {
            for wait in &state.waits {
                // It was added to each, unless that failed.
                let _ = epoll::delete(wait, ring.event());
            }
        }
        let rings = std::mem::take(&mut state.rings);
        let taken = std::mem::take(&mut state.taken);
        state.generation = state.generation.wrapping_add(1);
        for mount in state.mounts.values_mut() {
            mount.aside.clear();
        }
        let until = Instant::now().checked_add(PATIENCE);
        while state.working > 0 {
            let left = until.and_then(|until| until.checked_duration_since(Instant::now()));
            let Some(left) = left else { break };
            let waited = self.done.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        drop(state);
        drop(taken);
        self.shared.destroy();
        let states = rings.into_iter().map(|ring| Some(ring?.into_state()));
        states.collect()
    }

    /// A thread's life.
    fn run(self: &Arc<Pool>, wait: &OwnedFd) {
        loop {
            let mut events = [MaybeUninit::<Event>::uninit(); 1];
            let queue = match epoll::wait(wait, &mut events, None) {
                Ok((events, _)) => events.first().map(|event| event.data.u64()),
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            };
            while let Some(job) = self.take(queue) {
                self.work(job);
            }
        }
    }

    /// The next request: one that was taken already, or else of this queue.
    fn take(&self, queue: Option<u64>) -> Option<Job> {
        let mut state = self.state();
        let job = match state.taken.pop_front() {
            Some(job) => job,
            None => state.pop(queue)?,
        };
        // Whether there is another one: else the driver is asked to notify.
        if state.taken.is_empty()
            && let Some(next) = state.pop(queue)
        {
            state.taken.push_back(next);
        }
        let more = !state.taken.is_empty();
        state.working = state.working.saturating_add(1);
        drop(state);
        if more {
            // A counter that would overflow is a signal as well.
            let _ = rustix::io::write(&self.more, &1_u64.to_ne_bytes());
        }
        Some(job)
    }

    /// Works on a request, and on such as were put aside for it.
    fn work(self: &Arc<Pool>, job: Job) {
        let mut next = Some(job);
        while let Some(job) = next.take() {
            let Some(header) = Message::header(&job.chain) else {
                self.give_back(job, 0);
                break;
            };
            let mount = self.shared.mount_of(header.node);
            if let Some(mount) = mount {
                let mut state = self.state();
                let at = state.mounts.entry(mount).or_default();
                if at.working >= self.most && job.queue != HIPRIO {
                    at.aside.push_back(job);
                    drop(state);
                    break;
                }
                at.working = at.working.saturating_add(1);
                if state.working >= state.waits.len() && state.waits.len() < self.threads {
                    self.start_another(&mut state);
                }
            }
            self.answer(job, &header);
            if let Some(mount) = mount {
                next = self.leave(mount);
            }
        }
        self.end();
    }

    fn answer(self: &Arc<Pool>, job: Job, header: &Header) {
        let answer = Message::new(&job.chain, *header).answer(&self.shared, job.queue == HIPRIO);
        self.start_watch();
        match answer {
            Answer::Written(len) => self.give_back(job, len),
            Answer::Waits(lock, file) => {
                let (pool, unique) = (Arc::downgrade(self), header.unique);
                let reply = move |errno| Pool::finish(&pool, job, unique, errno);
                if self.start_locks().is_err() {
                    return reply(libc::ENOLCK);
                }
                self.shared.locks.wait(unique, lock, file, Box::new(reply));
            }
        }
    }

    /// Answers a request that waited.
    fn finish(pool: &Weak<Pool>, job: Job, unique: u64, errno: i32) {
        let Some(pool) = pool.upgrade() else { return };
        // Under the lock: after a reset the guest's memory is not touched.
        let mut state = pool.state();
        if state.generation == job.generation {
            let len = refuse(&job.chain, unique, errno);
            state.give_back(job, len);
        }
    }

    fn give_back(&self, job: Job, len: usize) {
        self.state().give_back(job, len);
    }

    /// One request of a mount is done; the next that was put aside.
    fn leave(&self, mount: u64) -> Option<Job> {
        let mut state = self.state();
        let at = state.mounts.get_mut(&mount)?;
        at.working = at.working.saturating_sub(1);
        let next = at.aside.pop_front();
        if next.is_none() && at.working == 0 {
            state.mounts.remove(&mount);
        }
        next
    }

    fn end(&self) {
        let mut state = self.state();
        state.working = state.working.saturating_sub(1);
        if state.working == 0 {
            self.done.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn pop(&mut self, queue: Option<u64>) -> Option<Job> {
        let queue = usize::try_from(queue?).ok()?;
        let ring = self.rings.get_mut(queue)?.as_mut()?;
        let Some(chain) = ring.pop() else {
            // Malformed ones may have gone back.
            ring.tell();
            return None;
        };
        Some(Job {
            queue,
            generation: self.generation,
            chain,
        })
    }

    fn give_back(&mut self, job: Job, len: usize) {
        if self.generation != job.generation {
            return;
        }
        if let Some(Some(ring)) = self.rings.get_mut(job.queue) {
            ring.give_back(job.chain, len);
            // At once: the next request may take its time.
            ring.tell();
        }
    }
}

fn thread_of(name: String) -> thread::Builder {
    thread::Builder::new().name(name).stack_size(STACK)
}

/// Lets a thread wait for an event, for which the kernel wakes one of those who
/// do. The event stays as it is.
fn watch(wait: &OwnedFd, event: impl std::os::fd::AsFd, data: u64) -> io::Result<()> {
    let flags = EventFlags::IN | EventFlags::ET | EventFlags::EXCLUSIVE;
    Ok(epoll::add(wait, event, EventData::new_u64(data), flags)?)
}
