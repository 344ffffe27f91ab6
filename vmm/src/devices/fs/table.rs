//! What the guest holds: nodes that it has looked up, and files that it has open.
//!
//! A node is a descriptor that names a file without opening it (O_PATH). The
//! guest knows it by a number that is never used again; the number goes when the
//! guest has forgotten it as often as it has looked it up. Descriptors pin what
//! they name, so the identity of a file cannot pass to another one while its node
//! lives.

use std::{
    collections::HashMap,
    fs::File,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
};

/// Number of the share's own directory (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;

/// What makes two names the same file. The mount belongs to it: one directory
/// may be mounted twice, once read-only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    pub(super) device: (u32, u32),
    pub(super) inode: u64,
    pub(super) mount: u64,
}

/// A file that the guest knows.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) fd: OwnedFd,
    pub(super) identity: Identity,
    /// Type of the file, as in `S_IFMT`; it never changes.
    pub(super) kind: u32,
    /// How the content looked when it was last opened.
    pub(super) seen: Mutex<Option<Seen>>,
}

/// A trace of a file's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Seen {
    /// Size, and times of the last modification and change.
    pub(super) stamp: (u64, (i64, u32), (i64, u32)),
    /// The last change was then so long ago that any further one shows in the
    /// times, however coarse the clock and lazy a memory-mapped write.
    pub(super) settled: bool,
}

impl AsFd for Node {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A file that the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
    node: u64,
    pub(super) file: File,
    /// Status flags of the descriptor that a guest may change.
    pub(super) append: AtomicU32,
    /// Held from setting the position of a directory to reading there.
    pub(super) position: Mutex<()>,
}

impl Handle {
    pub(super) fn lock(&self) -> MutexGuard<'_, ()> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Nodes and handles.
#[derive(Debug)]
pub(super) struct Table {
    nodes: Mutex<Nodes>,
    handles: Mutex<HashMap<u64, Arc<Handle>>>,
    next_handle: AtomicU64,
    /// Most nodes and handles together: each is a descriptor.
    limit: usize,
}

#[derive(Debug, Default)]
struct Nodes {
    by_number: HashMap<u64, Known>,
    by_identity: HashMap<Identity, u64>,
    next: u64,
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
}

impl Table {
    /// A table that knows the share's directory only.
    pub(super) fn new(root: Node, limit: usize) -> Table {
        let mut nodes = Nodes {
            next: ROOT,
            ..Nodes::default()
        };
        nodes.add(root);
        Table {
            nodes: Mutex::new(nodes),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            limit,
        }
    }

    /// Forgets all but the share's directory.
    pub(super) fn clear(&self) {
        self.handles().clear();
        let mut nodes = self.nodes();
        nodes.by_number.retain(|&number, _| number == ROOT);
        nodes.by_identity.retain(|_, number| *number == ROOT);
    }

    /// The node with this number.
    pub(super) fn node(&self, number: u64) -> io::Result<Arc<Node>> {
        self.nodes()
            .by_number
            .get(&number)
            .map(|known| Arc::clone(&known.node))
            .ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
    }

    /// The number of a file, known or new; one lookup more to forget.
    pub(super) fn look_up(&self, node: Node) -> io::Result<u64> {
        let mut nodes = self.nodes();
        if let Some(&number) = nodes.by_identity.get(&node.identity) {
            if let Some(known) = nodes.by_number.get_mut(&number) {
                known.lookups = known.lookups.saturating_add(1);
            }
            return Ok(number);
        }
        if nodes.by_number.len().saturating_add(self.handles().len()) >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        Ok(nodes.add(node))
    }

    /// Takes lookups back. The share's directory stays.
    pub(super) fn forget(&self, number: u64, lookups: u64) {
        if number == ROOT {
            return;
        }
        let mut nodes = self.nodes();
        let Some(known) = nodes.by_number.get_mut(&number) else {
            return;
        };
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups == 0
            && let Some(known) = nodes.by_number.remove(&number)
        {
            nodes.by_identity.remove(&known.node.identity);
        }
    }

    /// A handle for an open file of a node.
    pub(super) fn open(&self, node: u64, file: File, append: u32) -> io::Result<u64> {
        let nodes = self.nodes().by_number.len();
        let mut handles = self.handles();
        if nodes.saturating_add(handles.len()) >= self.limit {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        let handle = Handle {
            node,
            file,
            append: AtomicU32::new(append),
            position: Mutex::default(),
        };
        handles.insert(number, Arc::new(handle));
        Ok(number)
    }

    /// The handle with this number, which must be one of this node.
    pub(super) fn handle(&self, number: u64, node: u64) -> io::Result<Arc<Handle>> {
        self.handles()
            .get(&number)
            .filter(|handle| handle.node == node)
            .cloned()
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// Closes a handle; its last user closes the file.
    pub(super) fn close(&self, number: u64, node: u64) -> io::Result<()> {
        let handle = self.handle(number, node)?;
        self.handles().remove(&number);
        drop(handle);
        Ok(())
    }

    fn nodes(&self) -> MutexGuard<'_, Nodes> {
        // A panic ends the process: what it left is never seen.
        self.nodes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn handles(&self) -> MutexGuard<'_, HashMap<u64, Arc<Handle>>> {
        self.handles.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Nodes {
    fn add(&mut self, node: Node) -> u64 {
        let number = self.next;
        // 2^64 lookups do not happen.
        self.next = self.next.wrapping_add(1);
        self.by_identity.insert(node.identity, number);
        self.by_number.insert(
            number,
            Known {
                node: Arc::new(node),
                lookups: 1,
            },
        );
        number
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(inode: u64) -> Node {
        Node {
            fd: File::open("/").unwrap().into(),
            identity: Identity {
                device: (0, 1),
                inode,
                mount: 1,
            },
            kind: libc::S_IFDIR,
            seen: Mutex::default(),
        }
    }

    fn error<T>(result: io::Result<T>) -> Option<i32> {
        result.err().and_then(|error| error.raw_os_error())
    }

    #[test]
    fn a_node_lives_until_all_its_lookups_are_forgotten_b60() {
        let table = Table::new(node(1), 100);
        let number = table.look_up(node(2)).unwrap();
        assert_eq!(table.look_up(node(2)).unwrap(), number);
        table.forget(number, 1);
        assert!(table.node(number).is_ok());
        table.forget(number, u64::MAX);
        assert_eq!(error(table.node(number)), Some(libc::ESTALE));
        table.forget(number, 1);
        assert_ne!(table.look_up(node(2)).unwrap(), number, "never used again");
        table.forget(ROOT, u64::MAX);
        assert!(table.node(ROOT).is_ok());
    }

    #[test]
    fn a_handle_serves_its_own_node_only_b60() {
        let table = Table::new(node(1), 100);
        let handle = table.open(ROOT, File::open("/").unwrap(), 0).unwrap();
        assert!(table.handle(handle, ROOT).is_ok());
        for (number, of) in [(handle, 2), (handle + 1, ROOT), (0, ROOT), (u64::MAX, 0)] {
            assert_eq!(error(table.handle(number, of)), Some(libc::EBADF));
            assert_eq!(error(table.close(number, of)), Some(libc::EBADF));
        }
        table.close(handle, ROOT).unwrap();
        assert_eq!(error(table.close(handle, ROOT)), Some(libc::EBADF));
    }

    #[test]
    fn nodes_and_handles_end_at_the_limit_and_come_back_f44() {
        let table = Table::new(node(1), 3);
        let number = table.look_up(node(2)).unwrap();
        let handle = table.open(ROOT, File::open("/").unwrap(), 0).unwrap();
        assert_eq!(error(table.look_up(node(3))), Some(libc::ENFILE));
        assert_eq!(
            table.look_up(node(2)).unwrap(),
            number,
            "known ones are free"
        );
        assert_eq!(
            error(table.open(ROOT, File::open("/").unwrap(), 0)),
            Some(libc::ENFILE)
        );
        table.close(handle, ROOT).unwrap();
        assert!(table.look_up(node(3)).is_ok());
    }
}
