//! A thread that serves one queue of the file system.
//!
//! It starts before the guest and then waits for a queue; it serves the queue
//! until the device is reset, and waits again.

use std::{
    fmt,
    io::{self, Read, Write},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use fuse_backend_rs::{
    api::{filesystem::FileSystem, server::Server},
    transport::{Reader, VirtioFsWriter, Writer},
};
use rustix::event::{PollFd, PollFlags, poll};
use virtio_queue::{DescriptorChain, Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use super::{
    front::{self, Header, IN_HEADER, OUT_HEADER, opcode},
    share::Shared,
};
use crate::{
    devices::{
        Interrupt,
        queue::{self, Ring},
    },
    event_loop::event_fd,
    jail::Seal,
};

/// The queue that serves only what must not wait behind other requests (virtio
/// 1.2, 5.11.6.2).
const HIPRIO: u8 = 0;

/// Length of a reply that has only a header.
const BARE_REPLY: u32 = 16;

/// The thread of one queue.
#[derive(Debug)]
pub(super) struct QueueThread {
    slot: Arc<Slot>,
    shared: Arc<Shared>,
}

/// Where the thread finds its work, and is told to leave it.
#[derive(Debug, Default)]
struct Slot {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
enum State {
    #[default]
    Idle,
    /// Idle, and how far it came.
    Left(queue::State),
    Given(Box<Work>),
    /// The event wakes the thread up, the flag tells it to leave.
    Serving(EventFd, Arc<AtomicBool>),
}

struct Work {
    begun: queue::State,
    queue: Queue,
    event: EventFd,
    mem: Arc<GuestMemoryMmap>,
    interrupt: Interrupt,
    leave: Arc<AtomicBool>,
}

impl Work {
    fn state(&self) -> queue::State {
        queue::State {
            next_available: self.queue.next_avail(),
            next_used: self.queue.next_used(),
            ..self.begun
        }
    }
}

impl fmt::Debug for Work {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Work").finish_non_exhaustive()
    }
}

impl Slot {
    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed
            .wait(state)
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueThread {
    /// Starts the thread for the queue of this number. It runs as long as the
    /// process, confined by `seal`.
    pub(super) fn spawn(
        index: u8,
        server: Arc<Server<Arc<Shared>>>,
        shared: Arc<Shared>,
        seal: Seal,
    ) -> io::Result<QueueThread> {
        let slot = Arc::new(Slot::default());
        let (ready, prepared) = std::sync::mpsc::sync_channel(1);
        let thread = Requests {
            hiprio: index == HIPRIO,
            server,
            shared: Arc::clone(&shared),
        };
        let its_slot = Arc::clone(&slot);
        thread::Builder::new()
            .name(format!("fs-{index}"))
            .spawn(move || {
                let prepared = thread.shared.enter_thread().and_then(|()| seal.apply());
                let go_on = prepared.is_ok();
                // Fails only if `spawn` has given up.
                if ready.send(prepared).is_ok() && go_on {
                    thread.run(&its_slot);
                }
            })?;
        prepared
            .recv()
            .unwrap_or_else(|_| Err(io::ErrorKind::BrokenPipe.into()))?;
        Ok(QueueThread { slot, shared })
    }

    /// Gives the thread its queue.
    pub(super) fn start(&self, ring: Ring) -> io::Result<()> {
        let (begun, event, mem, interrupt) = ring.into_parts();
        let queue = Queue::try_from(virtio_queue::QueueState {
            max_size: begun.size,
            next_avail: begun.next_available,
            next_used: begun.next_used,
            event_idx_enabled: begun.event_index,
            size: begun.size,
            ready: true,
            desc_table: begun.descriptors,
            avail_ring: begun.available,
            used_ring: begun.used,
        })
        .map_err(io::Error::other)?;
        let mut state = self.slot.state();
        if !matches!(*state, State::Idle | State::Left(_)) {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        // What the driver did before this moment made no event for the thread.
        event.write(1)?;
        *state = State::Given(Box::new(Work {
            begun,
            queue,
            event,
            mem,
            interrupt,
            leave: Arc::default(),
        }));
        self.slot.changed.notify_all();
        Ok(())
    }

    /// Takes the queue away, after the request that the thread is working on. How
    /// far it came with it.
    pub(super) fn stop(&self) -> Option<queue::State> {
        let mut state = self.slot.state();
        if let State::Given(work) = &*state {
            *state = State::Left(work.state());
        }
        if let State::Serving(event, leave) = &*state {
            leave.store(true, Ordering::Release);
            // The counter cannot overflow: the thread reads it.
            let _ = event.write(1);
        }
        loop {
            match std::mem::take(&mut *state) {
                State::Idle => return None,
                State::Left(queue) => return Some(queue),
                other => *state = other,
            }
            state = self.slot.wait(state);
        }
    }

    /// The driver is gone, and with it all that it held.
    pub(super) fn forget_all(&self) {
        self.shared.destroy();
    }
}

/// What a thread needs to answer requests.
struct Requests {
    hiprio: bool,
    server: Arc<Server<Arc<Shared>>>,
    shared: Arc<Shared>,
}

impl Requests {
    fn run(&self, slot: &Slot) {
        loop {
            let mut state = slot.state();
            let mut work = loop {
                match std::mem::take(&mut *state) {
                    State::Given(work) => break work,
                    other => *state = other,
                }
                state = slot.wait(state);
            };
            // Without a second descriptor nobody could wake us up: not served.
            if let Ok(event) = work.event.try_clone() {
                *state = State::Serving(event, Arc::clone(&work.leave));
                drop(state);
                self.serve(&mut work);
                state = slot.state();
            }
            *state = State::Left(work.state());
            drop(work);
            slot.changed.notify_all();
        }
    }

    /// Serves the queue until it is time to leave or the driver breaks the ring.
    fn serve(&self, work: &mut Work) {
        while !work.leave.load(Ordering::Acquire) {
            let event = &work.event;
            let ready = poll(
                &mut [PollFd::from_borrowed_fd(event_fd(event), PollFlags::IN)],
                None,
            );
            match ready {
                Ok(_) => {
                    let _ = work.event.read();
                }
                Err(rustix::io::Errno::INTR) => continue,
                Err(_) => return,
            }
            if self.drain(work).is_err() {
                return;
            }
        }
    }

    /// Answers what is in the queue. An error says that the ring is broken.
    fn drain(&self, work: &mut Work) -> Result<(), virtio_queue::Error> {
        let shared = Arc::clone(&work.mem);
        let mem = &*shared;
        loop {
            loop {
                if work.leave.load(Ordering::Acquire) {
                    return Ok(());
                }
                let Some(chain) = work.queue.iter(mem)?.next() else {
                    break;
                };
                let head = chain.head_index();
                let len = self.answer(mem, chain);
                work.queue.add_used(mem, head, len)?;
                // At once: the next request may take its time.
                if work.queue.needs_notification(mem)? {
                    work.interrupt.used_buffer();
                }
            }
            if !work.queue.enable_notification(mem)? {
                return Ok(());
            }
        }
    }

    /// Answers one request; the length of the reply.
    fn answer(&self, mem: &GuestMemoryMmap, chain: DescriptorChain<&GuestMemoryMmap>) -> u32 {
        let (Ok(mut request), Ok(room)) = (
            Reader::from_descriptor_chain(mem, chain.clone()),
            VirtioFsWriter::new(mem, chain.clone()),
        ) else {
            // A buffer outside of memory: there is no place for a reply.
            return 0;
        };
        let (readable, writable) = (request.available_bytes(), room.available_bytes());
        let mut bytes = [0; IN_HEADER];
        if request.read_exact(&mut bytes).is_err() {
            return 0;
        }
        let header = Header::parse(&bytes);
        let mut body = vec![0; front::to_look_at(&header).min(request.available_bytes())];
        if request.read_exact(&mut body).is_err() {
            return 0;
        }
        let checked = front::check(&header, &body, readable, writable)
            .and_then(|()| self.check_order(header.opcode));
        let outcome = checked.and_then(|()| {
            let reader = Reader::from_descriptor_chain(mem, chain.clone());
            let writer = VirtioFsWriter::new(mem, chain);
            let (Ok(reader), Ok(writer)) = (reader, writer) else {
                return Err(libc::EINVAL);
            };
            // The server fails where it cannot decode, or has no room to reply.
            self.server
                .handle_message(reader, Writer::VirtioFs(writer), None, None)
                .map_err(|_| libc::EINVAL)
        });
        match outcome {
            // It answers DESTROY and does not say so.
            Ok(_) if header.opcode == opcode::DESTROY => BARE_REPLY,
            Ok(len) => u32::try_from(len).unwrap_or(0),
            Err(_) if !front::wants_reply(header.opcode) => 0,
            Err(errno) => refuse(room, header.unique, errno),
        }
    }

    /// What may come when, and where.
    fn check_order(&self, operation: u32) -> Result<(), i32> {
        if self.hiprio && front::wants_reply(operation) {
            return Err(libc::EINVAL);
        }
        match (operation == opcode::INIT, self.shared.is_initialized()) {
            (true, true) => Err(libc::EINVAL),
            (false, false) => Err(libc::EIO),
            (true, false) | (false, true) => Ok(()),
        }
    }
}

/// Writes a reply that says only which error there was.
fn refuse(mut room: VirtioFsWriter<'_>, unique: u64, errno: i32) -> u32 {
    let mut reply = [0; OUT_HEADER];
    reply[..4].copy_from_slice(&BARE_REPLY.to_le_bytes());
    reply[4..8].copy_from_slice(&errno.wrapping_neg().to_le_bytes());
    reply[8..].copy_from_slice(&unique.to_le_bytes());
    match room.write_all(&reply) {
        Ok(()) => BARE_REPLY,
        Err(_) => 0,
    }
}
