//! Changes that others make in a shared share, told to the guest.
//!
//! A directory that the guest knows is marked with the host's fanotify, and so is a
//! file that is a volume by itself: whoever watches one in the guest keeps it known.
//! A mark is set before the guest hears of the directory for the first time, by the
//! thread that looked it up, and taken away by the thread of this file when the guest
//! has forgotten it. That one also reads the events and posts [`Notice`]s with the
//! numbers by which the guest knows the files; `telling.rs` says which.
//!
//! Marks are [`MARKS`] at most. Events wait in the host's kernel, which merges equal
//! ones, keeps 16,384 and drops the others; they are read in pieces of [`BUFFER`] bytes
//! with a [`PAUSE`] after each. So a host that writes without end costs no more than
//! that, and a guest that does not listen nothing.

mod telling;

use std::{
    collections::{HashMap, HashSet, VecDeque},
    ffi::{CStr, CString},
    io::{self, Write},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU8, AtomicU32, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

pub(super) use self::telling::Deed;
use self::telling::is;
use super::{
    fanotify::{self, Group, Key, Kind},
    node::Node,
    share::Shared,
};
use crate::devices::notices::{Notice, Outbox, Posted};

/// Most marks. Each costs the host's kernel about a kilobyte, most of it for the file
/// that it keeps in memory; and so many it lets every user have. A guest that knows more
/// directories is not told of those that it came to know last.
const MARKS: usize = 8192;

/// So many marks of files that cannot be found again are let go of together.
const STRAYS: usize = MARKS / 8;

/// Bytes of events that are read at once: about 150.
const BUFFER: usize = 8 << 10;

/// Most deeds of the file server that wait to be told to others of the same guest.
const DEEDS: usize = 1024;

/// Time in which the host's kernel may merge events.
const PAUSE: Duration = Duration::from_millis(10);

/// How long a guest without room is waited for before it is looked at anew.
const PATIENCE: Duration = Duration::from_secs(1);

/// The bit by which cookies of the host's renames differ from those of the guest's
/// own, which its kernel counts from 1.
const COOKIE: u32 = 1 << 31;

/// Of the thread: nothing is marked, somebody is to start it, it was started.
const IDLE: u8 = 0;
const NEEDED: u8 = 1;
const RUNS: u8 = 2;

/// What the guest is told of.
const CONTENT: u32 = libc::IN_MODIFY | libc::IN_ATTRIB | libc::IN_CLOSE_WRITE;

/// The marks of a share.
#[derive(Debug)]
pub(super) struct Watch {
    group: Group,
    outbox: Arc<Outbox>,
    marks: Mutex<Marks>,
    /// Most marks.
    limit: usize,
    /// Marks are to be taken away, or deeds to be told.
    work: OwnedFd,
    /// Whether the thread that reads what marks tell is needed, and runs.
    thread: AtomicU8,
    /// Some file is known by several numbers.
    has_others: AtomicBool,
    cookies: AtomicU32,
}

#[derive(Debug, Default)]
struct Marks {
    by_key: HashMap<Key, Marked>,
    by_node: HashMap<u64, Key>,
    /// Of forgotten files, whose marks are to be taken away.
    gone: Vec<(Key, Arc<Node>)>,
    deeds: VecDeque<Deed>,
    /// Marks that are set on files which cannot be found.
    strays: usize,
    /// All are to be set anew.
    anew: bool,
    /// Numbers of the file systems, as handles need them, by their devices.
    systems: HashMap<(u32, u32), u64>,
    /// What was said already.
    said: HashSet<String>,
}

/// A marked file.
#[derive(Debug, Default)]
struct Marked {
    /// Its numbers in the guest: several, if it is mounted several times. None, if the
    /// mark is to be taken away.
    nodes: Vec<u64>,
    /// It is among those that are gone: there is at most one entry for each mark,
    /// whatever a guest looks up and forgets.
    is_gone: bool,
}

impl Watch {
    /// Marks of `group`, with notices to `outbox`.
    pub(super) fn new(group: Group, outbox: Arc<Outbox>) -> io::Result<Watch> {
        Ok(Watch {
            group,
            outbox,
            marks: Mutex::default(),
            limit: MARKS,
            work: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
            thread: AtomicU8::new(IDLE),
            has_others: AtomicBool::new(false),
            cookies: AtomicU32::new(0),
        })
    }

    /// The guest comes to know a file, found under this name.
    pub(super) fn hold(&self, number: u64, node: &Arc<Node>, parent: &Arc<Node>, name: &CStr) {
        let Some(kind) = kind(node, parent) else {
            return;
        };
        let marked = match kind {
            Kind::Directory if node.is_resident() => {
                let fd = node.fd();
                fd.and_then(|fd| self.mark(number, node, parent, (&fd, c".")))
            }
            _ => {
                let fd = parent.fd();
                fd.and_then(|fd| self.mark(number, node, parent, (&fd, name)))
            }
        };
        if let Err(error) = marked
            // Else it has gone meanwhile.
            && !matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ENOTDIR | libc::ESTALE)
            )
        {
            let (major, minor) = node.identity.device;
            self.say(&format!(
                "Changes of the host on file system {major}:{minor} are not told: {error}"
            ));
        }
    }

    fn mark(
        &self,
        number: u64,
        node: &Arc<Node>,
        parent: &Node,
        (dir, name): (&OwnedFd, &CStr),
    ) -> io::Result<()> {
        let key = fanotify::key(self.system(node, parent)?, dir, name)?;
        {
            let mut marks = self.marks();
            let full = marks.by_key.len() >= self.limit;
            if let Some(marked) = marks.by_key.get_mut(&key) {
                marked.nodes.push(number);
                self.has_others.store(true, Ordering::Relaxed);
                marks.by_node.insert(number, key);
                return Ok(());
            }
            if full {
                drop(marks);
                self.say(&format!(
                    "Changes of the host are told in {} directories only",
                    self.limit
                ));
                return Ok(());
            }
            let marked = Marked {
                nodes: vec![number],
                is_gone: false,
            };
            marks.by_key.insert(key.clone(), marked);
            marks.by_node.insert(number, key.clone());
        }
        self.moves(IDLE, NEEDED);
        let kind = if node.kind == libc::S_IFDIR {
            Kind::Directory
        } else {
            Kind::File
        };
        self.group
            .mark(dir, name, kind)
            .inspect_err(|_| self.marks().remove(&key))
    }

    /// The number of the file system in which a file is.
    fn system(&self, node: &Arc<Node>, parent: &Node) -> io::Result<u64> {
        let device = node.identity.device;
        // One that is entered may have the device of one that is no more.
        let is_entered = node.identity.mount != parent.identity.mount;
        if let Some(&known) = self.marks().systems.get(&device)
            && !is_entered
        {
            return Ok(known);
        }
        let number = rustix::fs::fstatvfs(&*node.fd()?)?.f_fsid;
        self.marks().systems.insert(device, number);
        Ok(number)
    }

    /// The guest has forgotten a file.
    pub(super) fn forget(&self, number: u64, node: Arc<Node>) {
        let mut marks = self.marks();
        let Some(key) = marks.by_node.remove(&number) else {
            return;
        };
        let Some(marked) = marks.by_key.get_mut(&key) else {
            return;
        };
        marked.nodes.retain(|known| *known != number);
        if marked.nodes.is_empty() && !std::mem::replace(&mut marked.is_gone, true) {
            marks.gone.push((key, node));
            drop(marks);
            self.wake();
        }
    }

    /// The guest has forgotten all.
    pub(super) fn clear(&self) {
        let mut marks = self.marks();
        marks.by_key.clear();
        marks.by_node.clear();
        marks.deeds.clear();
        marks.anew = true;
        let gone = std::mem::take(&mut marks.gone);
        drop(marks);
        // Closing can take its time.
        drop(gone);
        self.wake();
    }

    /// Whether whoever asks is to start the thread that runs this, for the first mark.
    pub(super) fn begins(&self) -> bool {
        self.thread.load(Ordering::Relaxed) == NEEDED && self.moves(NEEDED, RUNS)
    }

    /// The thread could not be started: the next mark asks for it again.
    pub(super) fn begin_later(&self) {
        self.moves(RUNS, IDLE);
    }

    fn moves(&self, from: u8, to: u8) -> bool {
        let order = Ordering::Relaxed;
        self.thread.compare_exchange(from, to, order, order).is_ok()
    }

    /// Whether some file is known by several numbers.
    pub(super) fn has_others(&self) -> bool {
        self.has_others.load(Ordering::Relaxed)
    }

    /// The file server did something in a directory of this number: whoever knows the
    /// same one by another is told.
    pub(super) fn did(&self, number: u64, deed: impl FnOnce() -> Deed) {
        if !self.has_others() {
            return;
        }
        let mut marks = self.marks();
        if marks.others(number).is_empty() || marks.deeds.len() >= DEEDS {
            return;
        }
        let deed = deed();
        // Of many writes to one file in a row.
        if marks.deeds.back() != Some(&deed) {
            marks.deeds.push_back(deed);
            drop(marks);
            self.wake();
        }
    }

    fn wake(&self) {
        // A counter that would overflow is a signal as well.
        let _ = rustix::io::write(&self.work, &1u64.to_ne_bytes());
    }

    /// The life of the thread.
    pub(super) fn run(&self, shared: &Shared) {
        let mut buffer = vec![0; BUFFER];
        let own = std::process::id();
        loop {
            let mut fds = [
                PollFd::new(&self.group, PollFlags::IN),
                PollFd::new(&self.work, PollFlags::IN),
            ];
            match poll(&mut fds, None) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(_) => return,
            }
            self.tidy(shared);
            let deeds = std::mem::take(&mut self.marks().deeds);
            for deed in &deeds {
                for notice in self.others_notices(shared, deed) {
                    self.post(&notice);
                }
            }
            let Ok(length) = self.group.read(&mut buffer) else {
                // There is none. Deeds cost the guest more than their notices do.
                continue;
            };
            let read = buffer.split_at_checked(length);
            for event in fanotify::events(read.map_or(&[], |(read, _)| read), own) {
                for notice in self.notices(shared, &event) {
                    self.post(&notice);
                }
            }
            thread::sleep(PAUSE);
        }
    }

    fn post(&self, notice: &Notice) {
        while self.outbox.post(notice) == Posted::Later {
            // Without a descriptor to wait by, it is asked again as well.
            if self.outbox.wait(PATIENCE).is_err() {
                thread::sleep(PAUSE);
            }
        }
    }

    /// Takes marks away that nobody needs.
    fn tidy(&self, shared: &Shared) {
        // Fails only if nothing is to be done.
        let _ = rustix::io::read(&self.work, &mut [0; 8]);
        let gone = std::mem::take(&mut self.marks().gone);
        for (key, node) in gone {
            if !self.marks().is_idle(&key) {
                continue;
            }
            match self.unmark(&node) {
                Ok(()) => self.marks().take_back(&key),
                Err(_) => self.marks().stray(),
            }
            // Somebody may have looked it up meanwhile: then it is to have a mark.
            if self.marks().by_key.contains_key(&key) {
                let _ = self.mark_again(&node);
            }
        }
        if std::mem::take(&mut self.marks().anew) {
            self.start_anew(shared);
        }
    }

    fn unmark(&self, node: &Arc<Node>) -> io::Result<()> {
        let (dir, name, kind) = spot(node)?;
        self.group.unmark(&*dir, &name, kind)
    }

    fn mark_again(&self, node: &Arc<Node>) -> io::Result<()> {
        let (dir, name, kind) = spot(node)?;
        self.group.mark(&*dir, &name, kind)
    }

    /// Takes all marks away and sets those again that are needed.
    fn start_anew(&self, shared: &Shared) {
        let cleared = self.group.clear(&shared.proc_self_fd);
        let needed: Vec<u64> = {
            let mut marks = self.marks();
            if cleared.is_ok() {
                marks.by_key.retain(|_, marked| !marked.nodes.is_empty());
                marks.strays = 0;
            }
            marks.by_node.keys().copied().collect()
        };
        for number in needed {
            if let Ok(node) = shared.table.node(number) {
                // What is not found is not watched.
                let _ = self.mark_again(&node);
            }
        }
    }

    fn nodes(&self, key: &[u8]) -> Vec<u64> {
        let marks = self.marks();
        let marked = marks.by_key.get(key);
        marked.map_or_else(Vec::new, |marked| marked.nodes.clone())
    }

    /// Says something to whoever reads the log, once.
    fn say(&self, text: &str) {
        /// Of as many file systems.
        const MOST: usize = 64;
        let mut marks = self.marks();
        let is_new = marks.said.len() < MOST && marks.said.insert(text.to_owned());
        drop(marks);
        if is_new {
            // Whoever should read it may be gone.
            let _ = writeln!(io::stderr(), "{text}");
        }
    }

    fn marks(&self) -> MutexGuard<'_, Marks> {
        // A panic ends the process: what it left is never seen.
        self.marks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Marks {
    /// A mark is gone, or was never set.
    fn remove(&mut self, key: &[u8]) {
        let marked = self.by_key.remove(key).unwrap_or_default();
        for number in marked.nodes {
            self.by_node.remove(&number);
        }
    }

    /// By which other numbers the same file is known.
    fn others(&self, number: u64) -> Vec<u64> {
        let marked = self
            .by_node
            .get(&number)
            .and_then(|key| self.by_key.get(key));
        let nodes = marked.map_or(&[][..], |marked| &marked.nodes);
        let others = nodes.iter().filter(|other| **other != number);
        others.copied().collect()
    }

    /// Whether a mark that was of use is not any more: of one that is to be taken away
    /// somebody may have thought otherwise.
    fn is_idle(&mut self, key: &[u8]) -> bool {
        self.by_key.get_mut(key).is_some_and(|marked| {
            marked.is_gone = false;
            marked.nodes.is_empty()
        })
    }

    /// A mark was taken away, unless somebody needs it again, or has forgotten it again
    /// meanwhile: then it is among those that are gone once more.
    fn take_back(&mut self, key: &[u8]) {
        let marked = self.by_key.get(key);
        if marked.is_some_and(|marked| marked.nodes.is_empty() && !marked.is_gone) {
            self.by_key.remove(key);
        }
    }

    /// A mark could not be taken away.
    fn stray(&mut self) {
        self.strays = self.strays.saturating_add(1);
        self.anew |= self.strays > STRAYS;
    }
}

/// What a file is to the watch, if anything.
fn kind(node: &Node, parent: &Node) -> Option<Kind> {
    match node.kind {
        libc::S_IFDIR => Some(Kind::Directory),
        libc::S_IFREG if node.identity.mount != parent.identity.mount => Some(Kind::File),
        _ => None,
    }
}

/// Where a file can be found for its mark.
fn spot(node: &Arc<Node>) -> io::Result<(Arc<OwnedFd>, CString, Kind)> {
    if node.kind == libc::S_IFDIR {
        return Ok((node.fd()?, c".".into(), Kind::Directory));
    }
    let place = node.place().ok_or(io::ErrorKind::NotFound)?;
    let dir = place.parent.fd()?;
    if !is(&place.parent, &place.name, node) {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok((dir, (*place.name).into(), Kind::File))
}

#[cfg(test)]
mod tests;
