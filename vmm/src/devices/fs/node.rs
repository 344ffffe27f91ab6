//! A file that the guest knows, and the descriptor by which it is reached.
//!
//! A node's descriptor names the file without opening it (O_PATH). Descriptors
//! are few, files that a guest knows can be many: a node that nobody has used for
//! a while lends its descriptor to others and is found again by its name in its
//! directory when it is needed. What is found must be the same file, else the
//! node is stale (ESTALE), and the guest's kernel looks the name up anew.

use std::{
    collections::VecDeque,
    ffi::CStr,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError, Weak,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use rustix::fs::{self as sys, Mode, OFlags};

use super::file::{error, statx};

/// Longest way from a file up to the share's directory. Linux has no paths of
/// more components than that.
const DEPTH: usize = 2048;

/// What makes two names the same file. The mount belongs to it: one directory
/// may be mounted twice, once read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
    pub(super) mount: u64,
}

/// How a file can be told from a later one with the same identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Birth {
    /// The time at which it was made.
    Time(i64, u32),
    /// Its file system gives no numbers twice while it is known (overlayfs, whose
    /// times of birth change when a file is copied up).
    Sure,
    /// Not at all: its descriptor must be kept.
    Unknown,
}

/// A file that the guest knows.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) identity: Identity,
    pub(super) birth: Birth,
    /// Type of the file as the guest sees it, as in `S_IFMT`; it never changes.
    pub(super) kind: u32,
    /// By which the guest tells files of this mount from those of others.
    pub(super) salt: u64,
    state: Mutex<State>,
    used: AtomicBool,
    residents: Arc<Residents>,
}

#[derive(Debug, Default)]
struct State {
    fd: Option<Arc<OwnedFd>>,
    place: Option<Place>,
}

/// Where a file was found.
#[derive(Clone, Debug)]
pub(super) struct Place {
    pub(super) parent: Arc<Node>,
    pub(super) name: Arc<CStr>,
}

impl Node {
    /// The descriptor, found again if it had been given away.
    pub(super) fn fd(self: &Arc<Node>) -> io::Result<Arc<OwnedFd>> {
        self.used.store(true, Ordering::Relaxed);
        if let Some(fd) = &self.state().fd {
            return Ok(Arc::clone(fd));
        }
        let fd = self.fd_within(DEPTH)?;
        self.residents.trim();
        Ok(fd)
    }

    fn fd_within(self: &Arc<Node>, depth: usize) -> io::Result<Arc<OwnedFd>> {
        let place = {
            let state = self.state();
            match &state.fd {
                Some(fd) => return Ok(Arc::clone(fd)),
                None => state.place.clone(),
            }
        };
        let place = place.ok_or_else(|| error(libc::ESTALE))?;
        let fd = Arc::new(self.walk(&place, depth)?);
        let mut state = self.state();
        if let Some(fd) = &state.fd {
            return Ok(Arc::clone(fd));
        }
        state.fd = Some(Arc::clone(&fd));
        drop(state);
        self.residents.count.fetch_add(1, Ordering::Relaxed);
        self.residents.clock().push_back(Arc::downgrade(self));
        Ok(fd)
    }

    /// Opens what is at a place, if it is this file.
    fn walk(&self, place: &Place, depth: usize) -> io::Result<OwnedFd> {
        let depth = depth.checked_sub(1).ok_or_else(|| error(libc::ESTALE))?;
        let parent = place.parent.fd_within(depth)?;
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let fd =
            sys::openat(&*parent, &*place.name, flags, Mode::empty()).map_err(
                |errno| match errno {
                    rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR => error(libc::ESTALE),
                    errno => errno.into(),
                },
            )?;
        let status = statx(fd.as_fd())?;
        if self.is(&status) && self.birth != Birth::Unknown {
            Ok(fd)
        } else {
            Err(error(libc::ESTALE))
        }
    }

    /// Whether a status is this file's, as far as that can be told.
    pub(super) fn is(&self, status: &sys::Statx) -> bool {
        Identity::of(status) == self.identity
            && match self.birth {
                Birth::Time(..) => Birth::of(status) == self.birth,
                Birth::Sure | Birth::Unknown => true,
            }
    }

    /// Whether the node has its descriptor at present.
    pub(super) fn is_resident(&self) -> bool {
        self.state().fd.is_some()
    }

    /// The descriptor, if the node has it at present.
    pub(super) fn resident_fd(&self) -> Option<Arc<OwnedFd>> {
        self.state().fd.clone()
    }

    pub(super) fn place(&self) -> Option<Place> {
        self.state().place.clone()
    }

    /// Says where the file is now, or that it has no name that is known.
    pub(super) fn set_place(&self, place: Option<Place>) {
        let before = std::mem::replace(&mut self.state().place, place);
        // May be the last to know a parent: not under the lock.
        drop(before);
    }

    /// Gives the descriptor away if it can be found again.
    fn release(&self) -> bool {
        let place = {
            let state = self.state();
            match (&state.fd, &state.place) {
                (Some(_), Some(place)) => place.clone(),
                _ => return false,
            }
        };
        if self.birth == Birth::Unknown || self.walk(&place, DEPTH).is_err() {
            return false;
        }
        let mut state = self.state();
        let moved = !state
            .place
            .as_ref()
            .is_some_and(|now| Arc::ptr_eq(&now.parent, &place.parent) && now.name == place.name);
        // Whoever works with it keeps it open.
        if moved || state.fd.as_ref().is_none_or(|fd| Arc::strong_count(fd) > 1) {
            return false;
        }
        let fd = state.fd.take();
        self.residents.count.fetch_sub(1, Ordering::Relaxed);
        drop(state);
        drop(fd);
        true
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic ends the process: what it left is never seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        if state.fd.is_some() {
            self.residents.count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Identity {
    pub(super) fn of(status: &sys::Statx) -> Identity {
        Identity {
            device: (status.stx_dev_major, status.stx_dev_minor),
            inode: status.stx_ino,
            mount: status.stx_mnt_id,
        }
    }
}

impl Birth {
    /// As the status tells.
    pub(super) fn of(status: &sys::Statx) -> Birth {
        if sys::StatxFlags::from_bits_retain(status.stx_mask).contains(sys::StatxFlags::BTIME) {
            Birth::Time(status.stx_btime.tv_sec, status.stx_btime.tv_nsec)
        } else {
            Birth::Unknown
        }
    }
}

/// The nodes that have descriptors.
#[derive(Debug)]
pub(super) struct Residents {
    count: AtomicUsize,
    /// As many as there should be at most.
    budget: usize,
    /// From the one that has had its descriptor for longest.
    clock: Mutex<VecDeque<Weak<Node>>>,
}

impl Residents {
    pub(super) fn new(budget: usize) -> Arc<Residents> {
        Arc::new(Residents {
            count: AtomicUsize::new(0),
            budget: budget.max(2),
            clock: Mutex::default(),
        })
    }

    /// A node for a file that was found; without a descriptor, if one is got by
    /// its name as well.
    pub(super) fn admit(self: &Arc<Residents>, fd: Option<OwnedFd>, about: About) -> Node {
        if fd.is_some() {
            self.count.fetch_add(1, Ordering::Relaxed);
        }
        Node {
            identity: about.identity,
            birth: about.birth,
            kind: about.kind,
            salt: about.salt,
            state: Mutex::new(State {
                fd: fd.map(Arc::new),
                place: None,
            }),
            used: AtomicBool::new(true),
            residents: Arc::clone(self),
        }
    }

    /// How many nodes have a descriptor.
    pub(super) fn count(&self) -> usize {
        self.count.load(Ordering::Relaxed)
    }

    /// Remembers that a new node has a descriptor to give.
    pub(super) fn settle(&self, node: &Arc<Node>) {
        if node.is_resident() {
            self.clock().push_back(Arc::downgrade(node));
        }
        self.trim();
    }

    /// Takes the descriptors of idle nodes if there are too many.
    fn trim(&self) {
        let mut turns = {
            let mut clock = self.clock();
            // Forgotten nodes leave their places here behind.
            if clock.len() > self.count().saturating_mul(2).saturating_add(64) {
                clock.retain(|node| node.strong_count() > 0);
            }
            clock.len().saturating_mul(2)
        };
        while self.count() > self.budget && turns > 0 {
            turns = turns.saturating_sub(1);
            let Some(next) = self.clock().pop_front() else {
                return;
            };
            let Some(next) = next.upgrade() else { continue };
            if !next.is_resident() {
                continue;
            }
            if next.used.swap(false, Ordering::Relaxed) || !next.release() {
                self.clock().push_back(Arc::downgrade(&next));
            }
        }
    }

    fn clock(&self) -> MutexGuard<'_, VecDeque<Weak<Node>>> {
        self.clock.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is known of a file when it is found.
#[derive(Clone, Copy, Debug)]
pub(super) struct About {
    pub(super) identity: Identity,
    pub(super) birth: Birth,
    /// Type, as in `S_IFMT`.
    pub(super) kind: u32,
    pub(super) salt: u64,
}
