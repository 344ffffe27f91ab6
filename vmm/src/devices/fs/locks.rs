//! Locks on shared files, which exclude the host and other pods as well.
//!
//! A BSD lock (flock(2)) belongs to an open file of the guest and is taken on the
//! host's open file that stands for it. A POSIX lock belongs to a process of the
//! guest: each owner has an open file of its own for each file that it locks, with
//! open file description locks (fcntl(2), F_OFD_SETLK) on it, and they go when it
//! is closed.
//!
//! Whoever waits for a lock keeps no thread from its work: one thread tries again
//! for all who wait, at once when the guest gives a lock back, and after a moment
//! for locks that somebody else holds.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    fs::File,
    io,
    os::fd::{AsFd, AsRawFd},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use rustix::fs::{FlockOperation, flock};

use super::{file::error, request::Lock};

/// Most who wait at the same time.
const WAITING: usize = 1024;

/// How many interrupts are remembered that came before those whom they mean waited.
const EARLY: usize = 64;

/// How long it takes to notice that somebody outside has given a lock back: from
/// the first to the longest pause.
const PAUSES: (Duration, Duration) = (Duration::from_millis(1), Duration::from_millis(50));

/// The locks of a share, and who waits for one.
#[derive(Debug)]
pub(super) struct Locks {
    state: Mutex<State>,
    changed: Condvar,
    /// Most owners with files.
    limit: usize,
}

#[derive(Debug, Default)]
struct State {
    /// By node and owner.
    owners: HashMap<(u64, u64), Arc<File>>,
    waiting: Vec<Waiting>,
    /// Interrupted before they waited: the queue of what must not wait can be faster.
    early: VecDeque<u64>,
    /// Counts what may let somebody go on.
    changes: u64,
}

/// A request that waits.
pub(super) struct Waiting {
    unique: u64,
    lock: Lock,
    file: Arc<dyn AsFdSend>,
    /// Answers it, with a number of errno or 0.
    reply: Box<dyn FnOnce(i32) + Send>,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting")
            .field("unique", &self.unique)
            .finish_non_exhaustive()
    }
}

/// What a lock is taken on.
pub(super) trait AsFdSend: Send + Sync {
    fn file(&self) -> &File;
}

impl AsFdSend for File {
    fn file(&self) -> &File {
        self
    }
}

impl Locks {
    /// For so many owners at the same time.
    pub(super) fn new(limit: usize) -> Locks {
        Locks {
            state: Mutex::default(),
            changed: Condvar::new(),
            limit,
        }
    }

    /// The file on which an owner's POSIX locks of a node are, opened if there is
    /// none and `open` is given.
    pub(super) fn owner(
        &self,
        node: u64,
        owner: u64,
        open: Option<&dyn Fn() -> io::Result<File>>,
    ) -> io::Result<Option<Arc<File>>> {
        if let Some(file) = self.state().owners.get(&(node, owner)) {
            return Ok(Some(Arc::clone(file)));
        }
        let Some(open) = open else { return Ok(None) };
        let file = Arc::new(open()?);
        let mut state = self.state();
        if state.owners.len() >= self.limit {
            return Err(error(libc::ENOLCK));
        }
        Ok(Some(Arc::clone(
            state.owners.entry((node, owner)).or_insert(file),
        )))
    }

    /// Waits for a lock that could not be had; `reply` comes later, from another
    /// thread.
    pub(super) fn wait(
        &self,
        unique: u64,
        lock: Lock,
        file: Arc<dyn AsFdSend>,
        reply: Box<dyn FnOnce(i32) + Send>,
    ) {
        let mut state = self.state();
        let refused = if state.early.contains(&unique) {
            Some(libc::EINTR)
        } else if state.waiting.len() >= WAITING {
            Some(libc::ENOLCK)
        } else {
            None
        };
        if let Some(errno) = refused {
            drop(state);
            return reply(errno);
        }
        state.waiting.push(Waiting {
            unique,
            lock,
            file,
            reply,
        });
        state.changes = state.changes.wrapping_add(1);
        self.changed.notify_all();
    }

    /// Whoever waits by this number waits no more, nor will.
    pub(super) fn interrupt(&self, unique: u64) {
        let mut state = self.state();
        let at = state.waiting.iter().position(|one| one.unique == unique);
        let Some(at) = at else {
            if state.early.len() >= EARLY {
                state.early.pop_front();
            }
            state.early.push_back(unique);
            return;
        };
        let waiting = state.waiting.swap_remove(at);
        drop(state);
        (waiting.reply)(libc::EINTR);
    }

    /// A process has closed a file: its locks on it go.
    pub(super) fn close(&self, node: u64, owner: u64) {
        let file = self.state().owners.remove(&(node, owner));
        if file.is_some() {
            drop(file);
            self.given_back();
        }
    }

    /// A lock may be free now.
    pub(super) fn given_back(&self) {
        let mut state = self.state();
        if !state.waiting.is_empty() {
            state.changes = state.changes.wrapping_add(1);
            self.changed.notify_all();
        }
    }

    /// Lets go of all locks, and answers nobody.
    pub(super) fn clear(&self) {
        let mut state = self.state();
        let gone = (
            std::mem::take(&mut state.owners),
            std::mem::take(&mut state.waiting),
            std::mem::take(&mut state.early),
        );
        drop(state);
        drop(gone);
    }

    /// Tries for all who wait, for ever.
    pub(super) fn run(&self) {
        let mut pause = PAUSES.0;
        let mut seen = 0;
        loop {
            let mut state = self.state();
            while state.waiting.is_empty() {
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            if state.changes == seen {
                let waited = self.changed.wait_timeout(state, pause);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
            pause = if state.changes == seen {
                pause.saturating_mul(2).min(PAUSES.1)
            } else {
                PAUSES.0
            };
            seen = state.changes;
            // Without waiting, so under the lock: an interrupt finds whom it means.
            let (mut done, mut still) = (Vec::new(), Vec::new());
            for one in std::mem::take(&mut state.waiting) {
                match set(one.file.file(), &one.lock) {
                    Err(error) if would_wait(&error) => still.push(one),
                    outcome => done.push((one, outcome)),
                }
            }
            state.waiting = still;
            drop(state);
            for (one, outcome) in done {
                let errno = outcome
                    .err()
                    .map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO));
                (one.reply)(errno);
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether somebody else has the lock.
pub(super) fn would_wait(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES))
}

/// Sets a lock, or gives it back, without waiting.
pub(super) fn set(file: &File, lock: &Lock) -> io::Result<()> {
    if lock.whole {
        let operation = match lock.kind {
            libc::F_RDLCK => FlockOperation::NonBlockingLockShared,
            libc::F_WRLCK => FlockOperation::NonBlockingLockExclusive,
            libc::F_UNLCK => FlockOperation::NonBlockingUnlock,
            _ => return Err(error(libc::EINVAL)),
        };
        return Ok(flock(file.as_fd(), operation)?);
    }
    let mut range = range(lock)?;
    control(file, libc::F_OFD_SETLK, &mut range)
}

/// The lock that is in the way of this one: start, last byte and kind. `F_UNLCK`
/// if there is none.
pub(super) fn get(file: &File, lock: &Lock) -> io::Result<(u64, u64, i32)> {
    let mut range = range(lock)?;
    control(file, libc::F_OFD_GETLK, &mut range)?;
    let start = range.l_start.cast_unsigned();
    let last = match range.l_len {
        0 => i64::MAX.cast_unsigned(),
        len => start.saturating_add(len.cast_unsigned()).saturating_sub(1),
    };
    Ok((start, last, range.l_type.into()))
}

fn range(lock: &Lock) -> io::Result<libc::flock> {
    let invalid = || error(libc::EINVAL);
    let kind = match lock.kind {
        libc::F_RDLCK | libc::F_WRLCK | libc::F_UNLCK => lock.kind,
        _ => return Err(invalid()),
    };
    let start = i64::try_from(lock.start).map_err(|_| invalid())?;
    let last = i64::try_from(lock.end).unwrap_or(i64::MAX);
    let len = match last {
        // To the end, wherever that will be.
        i64::MAX => 0,
        last => last
            .checked_sub(start)
            .and_then(|len| len.checked_add(1))
            .filter(|&len| len > 0)
            .ok_or_else(invalid)?,
    };
    Ok(libc::flock {
        l_type: libc::c_short::try_from(kind).map_err(|_| invalid())?,
        l_whence: libc::c_short::try_from(libc::SEEK_SET).map_err(|_| invalid())?,
        l_start: start,
        l_len: len,
        // As open file description locks want it.
        l_pid: 0,
    })
}

fn control(file: &File, command: i32, range: &mut libc::flock) -> io::Result<()> {
    let range: *mut libc::flock = range;
    // SAFETY: `file` is open, and `range` is a `flock` that outlives the call.
    let outcome = unsafe { libc::fcntl(file.as_raw_fd(), command, range) };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn an_interrupt_that_overtakes_its_request_is_not_lost_and_old_ones_are_forgotten() {
        let locks = Locks::new(1);
        let lock = Lock {
            handle: 0,
            owner: 0,
            start: 0,
            end: 0,
            kind: libc::F_WRLCK,
            whole: true,
        };
        let file: Arc<dyn AsFdSend> = Arc::new(File::open("/dev/null").unwrap());
        let (answers, answered) = mpsc::channel();
        let wait = |unique| {
            let answers = answers.clone();
            let reply = Box::new(move |errno| answers.send((unique, errno)).unwrap());
            locks.wait(unique, lock, Arc::clone(&file), reply);
        };
        locks.interrupt(2);
        wait(2);
        assert_eq!(answered.try_recv(), Ok((2, libc::EINTR)));
        for unique in 0..=u64::try_from(EARLY).unwrap() {
            locks.interrupt(4 + unique);
        }
        wait(4);
        assert!(answered.try_recv().is_err(), "it waits");
        wait(5);
        assert_eq!(answered.try_recv(), Ok((5, libc::EINTR)));
        locks.interrupt(4);
        assert_eq!(answered.try_recv(), Ok((4, libc::EINTR)));
    }
}
