//! Stopping all processors, and letting them go on.
//!
//! Each processor's thread goes through a [`Gate`] before it enters the guest, and
//! waits there while the gate is closed. Closing it also takes those out that are
//! in the guest: their `immediate_exit` is set, then they get a signal. Whichever
//! way a race between the two ends, KVM_RUN returns: it looks at the one before it
//! enters the guest and at the other while it is there.
//!
//! A machine begins with its gate closed.

use std::{
    collections::BTreeMap,
    fmt, io,
    os::fd::{AsFd, BorrowedFd},
    sync::{
        Arc, Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, Ordering},
    },
    thread::JoinHandle,
};

use libc::{c_int, c_void, siginfo_t};
use vmm_sys_util::{
    eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd},
    signal::{Killable, SIGRTMIN, register_signal_handler},
};

use crate::{event_loop::event_fd, standing::Stand};

/// Where all processors of a machine can be stopped.
#[derive(Debug)]
pub struct Gate {
    /// As in [`State`], for a look without the lock.
    closed: AtomicBool,
    state: Mutex<State>,
    opened: Condvar,
    all_wait: EventFd,
}

#[derive(Debug)]
struct State {
    closed: bool,
    /// Processors of the machine.
    processors: usize,
    /// Those that wait at the gate, by number.
    waiting: BTreeMap<u8, Stand>,
    kicks: Vec<Kick>,
}

impl State {
    fn all_wait(&self) -> bool {
        self.closed && self.waiting.len() == self.processors
    }
}

/// How a processor is taken out of the guest.
pub struct Kick {
    /// `immediate_exit` in its `kvm_run`.
    pub immediate_exit: &'static AtomicU8,
    /// Its thread.
    pub thread: JoinHandle<()>,
}

impl Kick {
    fn send(&self) {
        self.immediate_exit.store(1, Ordering::Release);
        // Fails only for a thread that has ended, and with it the machine.
        let _ = self.thread.kill(SIGRTMIN());
    }
}

impl fmt::Debug for Kick {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Kick").finish_non_exhaustive()
    }
}

impl Gate {
    /// A closed gate for so many processors. Also lets the process take the signal
    /// of a kick.
    pub fn new(processors: usize) -> io::Result<Arc<Gate>> {
        register_signal_handler(SIGRTMIN(), kicked)
            .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))?;
        Ok(Arc::new(Gate {
            closed: AtomicBool::new(true),
            state: Mutex::new(State {
                closed: true,
                processors,
                waiting: BTreeMap::new(),
                kicks: Vec::new(),
            }),
            opened: Condvar::new(),
            all_wait: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
        }))
    }

    /// Makes it known how a processor is taken out of the guest.
    pub fn add(&self, kick: Kick) {
        self.state().kicks.push(kick);
    }

    /// The same of one that began to run while the machine did: it may have passed an
    /// open gate that was closed since.
    pub(crate) fn add_late(&self, kick: Kick) {
        let mut state = self.state();
        if state.closed {
            kick.send();
        }
        state.kicks.push(kick);
    }

    /// The machine gets another processor: it is not stopped before that one waits too.
    pub(crate) fn expect_one_more(&self) {
        let mut state = self.state();
        state.processors = state.processors.saturating_add(1);
    }

    /// It does not get it after all.
    pub(crate) fn expect_one_less(&self) {
        let mut state = self.state();
        state.processors = state.processors.saturating_sub(1);
        if state.all_wait() {
            let _ = self.all_wait.write(1);
        }
    }

    /// Whether the processor that asks must stop.
    pub(crate) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Processor `id`, outside of the guest where it stands so, waits until the gate
    /// is open.
    pub(crate) fn wait(&self, id: u8, stand: Stand, immediate_exit: &AtomicU8) {
        let mut state = self.state();
        state.waiting.insert(id, stand);
        if state.all_wait() {
            // The counter cannot overflow: closing the gate resets it.
            let _ = self.all_wait.write(1);
        }
        while state.closed {
            state = self
                .opened
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
        state.waiting.remove(&id);
        // Under the lock, so that what closes the gate next is not undone.
        immediate_exit.store(0, Ordering::Release);
    }

    /// Closes the gate. Once all processors wait, the gate's event is readable.
    ///
    /// Does not wait itself: a processor may be held up by a device.
    pub fn close(&self) {
        let mut state = self.state();
        if state.closed {
            return;
        }
        // Nothing to read is as good.
        let _ = self.all_wait.read();
        state.closed = true;
        self.closed.store(true, Ordering::Release);
        for kick in &state.kicks {
            kick.send();
        }
        if state.all_wait() {
            let _ = self.all_wait.write(1);
        }
    }

    /// Opens the gate.
    pub fn open(&self) {
        let mut state = self.state();
        state.closed = false;
        self.closed.store(false, Ordering::Release);
        self.opened.notify_all();
    }

    /// Whether the gate is closed and no processor is in the guest.
    #[must_use]
    pub fn all_wait(&self) -> bool {
        self.state().all_wait()
    }

    /// Each processor with where it stands, if it waits here.
    #[must_use]
    pub fn stands(&self) -> Vec<(u8, Option<Stand>)> {
        let state = self.state();
        let stands = (0..).take(state.processors);
        stands
            .map(|id| (id, state.waiting.get(&id).copied()))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AsFd for Gate {
    /// Readable once all processors wait.
    fn as_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.all_wait)
    }
}

/// To have interrupted a system call is all that the signal is for.
extern "C" fn kicked(_: c_int, _: *mut siginfo_t, _: *mut c_void) {}

#[cfg(test)]
mod tests {
    use std::{sync::atomic::AtomicU64, thread, time::Instant};

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;

    fn readable(gate: &Gate, seconds: i64) -> bool {
        let limit = rustix::event::Timespec {
            tv_sec: seconds,
            tv_nsec: 0,
        };
        let mut fds = [PollFd::new(gate, PollFlags::IN)];
        poll(&mut fds, Some(&limit)).unwrap() == 1
    }

    /// Processors whose guest is an endless `poll` that a signal or a set
    /// `immediate_exit` ends, as with KVM_RUN.
    fn processors(gate: &Arc<Gate>, count: usize, rounds: &Arc<AtomicU64>) {
        for id in (0..).take(count) {
            let immediate_exit: &'static AtomicU8 = Box::leak(Box::default());
            let (its_gate, rounds) = (Arc::clone(gate), Arc::clone(rounds));
            let thread = thread::spawn(move || {
                loop {
                    if its_gate.is_closed() {
                        its_gate.wait(id, Stand::default(), immediate_exit);
                    }
                    rounds.fetch_add(1, Ordering::Relaxed);
                    // Like KVM, in slices: this cannot look and sleep in one.
                    while immediate_exit.load(Ordering::Acquire) == 0 {
                        let slice = rustix::event::Timespec {
                            tv_sec: 0,
                            tv_nsec: 1_000_000,
                        };
                        if poll(&mut [], Some(&slice)).is_err() {
                            break;
                        }
                    }
                }
            });
            gate.add(Kick {
                immediate_exit,
                thread,
            });
        }
    }

    #[test]
    fn processors_stop_at_a_closed_gate_and_go_on_when_it_opens() {
        let gate = Gate::new(3).unwrap();
        let rounds = Arc::new(AtomicU64::new(0));
        processors(&gate, 3, &rounds);
        assert!(readable(&gate, 10) && gate.all_wait());
        assert_eq!(rounds.load(Ordering::Relaxed), 0, "nothing runs before");
        for round in 1..200 {
            assert!(gate.stands().iter().all(|(_, stand)| stand.is_some()));
            gate.open();
            assert!(!gate.all_wait());
            let begun = Instant::now();
            while rounds.load(Ordering::Relaxed) < round * 3 {
                assert!(begun.elapsed().as_secs() < 10, "they do not go on");
                thread::yield_now();
            }
            gate.close();
            assert!(readable(&gate, 10) && gate.all_wait());
            let stopped = rounds.load(Ordering::Relaxed);
            gate.close();
            assert!(readable(&gate, 10), "closed already");
            assert_eq!(rounds.load(Ordering::Relaxed), stopped);
        }
    }
}
