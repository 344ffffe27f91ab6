//! What the guest holds: nodes that it has looked up, and files that it has open.
//!
//! The guest knows a node by a number that is never used again; the number goes
//! when the guest has forgotten it as often as it has looked it up. The table
//! knows each node's last name, by which the node is found again when its
//! descriptor was given away (see `node.rs`).

use std::{
    collections::HashMap,
    ffi::CStr,
    fs::File,
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use super::{
    file::error,
    node::{Identity, Node, Place, Residents},
};

/// Number of the share's own directory (FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;

/// Most nodes. Each costs some hundred bytes here, and more in the guest.
const NODES: usize = 1 << 20;

/// A file that the guest has open.
#[derive(Debug)]
pub(super) struct Handle {
    node: u64,
    pub(super) file: File,
    /// Held from setting the position of a directory to reading there.
    pub(super) position: Mutex<()>,
}

impl Handle {
    /// An open file of a node.
    pub(super) fn new(node: u64, file: File) -> Handle {
        Handle {
            node,
            file,
            position: Mutex::default(),
        }
    }

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
    /// Most handles: each is a descriptor.
    handle_limit: usize,
    pub(super) residents: Arc<Residents>,
}

#[derive(Debug, Default)]
struct Nodes {
    by_number: HashMap<u64, Known>,
    by_identity: HashMap<Identity, u64>,
    /// The last name of each node: by the number of the directory, and the name.
    by_name: HashMap<u64, HashMap<Arc<CStr>, u64>>,
    next: u64,
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    lookups: u64,
    /// The directory in which its name is.
    parent: u64,
}

impl Table {
    /// A table that knows the share's directory only, with room for `handles`. Others
    /// are numbered from `first` on.
    pub(super) fn new(root: Node, residents: Arc<Residents>, handles: usize, first: u64) -> Table {
        let mut nodes = Nodes {
            next: ROOT,
            ..Nodes::default()
        };
        nodes.add(root, None);
        nodes.next = first;
        Table {
            nodes: Mutex::new(nodes),
            handles: Mutex::default(),
            next_handle: AtomicU64::new(1),
            handle_limit: handles,
            residents,
        }
    }

    /// Forgets all but the share's directory.
    pub(super) fn clear(&self) {
        let handles = std::mem::take(&mut *self.handles());
        drop(handles);
        let mut nodes = self.nodes();
        let root = nodes.by_number.remove(&ROOT);
        let others = std::mem::take(&mut nodes.by_number);
        nodes.by_name.clear();
        nodes.by_identity.clear();
        if let Some(root) = root {
            nodes.by_identity.insert(root.node.identity, ROOT);
            nodes.by_number.insert(ROOT, root);
        }
        drop(nodes);
        // Closing can take its time.
        drop(others);
    }

    /// The node with this number.
    pub(super) fn node(&self, number: u64) -> io::Result<Arc<Node>> {
        self.nodes()
            .by_number
            .get(&number)
            .map(|known| Arc::clone(&known.node))
            .ok_or_else(|| error(libc::ESTALE))
    }

    /// The number of a file, known or new, that was found under a name; one lookup
    /// more to forget. A file without a name has no place. With it the node, if it is
    /// new.
    pub(super) fn look_up(
        &self,
        node: Node,
        parent: (u64, &Arc<Node>),
        name: Option<&CStr>,
    ) -> io::Result<(u64, Option<Arc<Node>>)> {
        let mut unused = None;
        let mut nodes = self.nodes();
        let known = nodes.by_identity.get(&node.identity).copied();
        let same = known.filter(|number| {
            nodes.by_number.get(number).is_some_and(|known| {
                // A descriptor holds its file, so nothing else can have its number.
                known.node.is_resident() || node.birth == known.node.birth
            })
        });
        let (number, new) = match same {
            Some(number) => {
                if let Some(known) = nodes.by_number.get_mut(&number) {
                    known.lookups = known.lookups.saturating_add(1);
                }
                unused = Some(node);
                (number, None)
            }
            None => {
                if nodes.by_number.len() >= NODES {
                    return Err(error(libc::ENFILE));
                }
                let (number, node) = nodes.add(node, Some(parent.0));
                (number, Some(node))
            }
        };
        if let Some(name) = name {
            nodes.found(number, parent, name);
        }
        drop(nodes);
        drop(unused);
        if let Some(node) = &new {
            self.residents.settle(node);
        }
        Ok((number, new))
    }

    /// Takes lookups back; the node, if none is left. The share's directory stays.
    ///
    /// The last to drop the node of a large deleted file waits until it is deleted.
    pub(super) fn forget(&self, number: u64, lookups: u64) -> Option<Arc<Node>> {
        if number == ROOT {
            return None;
        }
        let mut nodes = self.nodes();
        let known = nodes.by_number.get_mut(&number)?;
        known.lookups = known.lookups.saturating_sub(lookups);
        if known.lookups > 0 {
            return None;
        }
        Some(nodes.remove(number)?.node)
    }

    /// A node of each mount that the guest knows, of a kind that can be opened.
    pub(super) fn one_of_each_mount(&self) -> Vec<Arc<Node>> {
        let nodes = self.nodes();
        let mut found: HashMap<u64, &Arc<Node>> = HashMap::new();
        for known in nodes.by_number.values() {
            let node = &known.node;
            if matches!(node.kind, libc::S_IFREG | libc::S_IFDIR) {
                let one = found.entry(node.identity.mount).or_insert(node);
                if node.is_resident() && !one.is_resident() {
                    *one = node;
                }
            }
        }
        found.into_values().map(Arc::clone).collect()
    }

    /// The node whose last name this is, with its number.
    pub(super) fn named(&self, parent: u64, name: &CStr) -> Option<(u64, Arc<Node>)> {
        let nodes = self.nodes();
        let number = *nodes.by_name.get(&parent)?.get(name)?;
        let node = Arc::clone(&nodes.by_number.get(&number)?.node);
        Some((number, node))
    }

    /// The last name of a node, with the number of its directory.
    pub(super) fn place_of(&self, number: u64) -> Option<(u64, Arc<CStr>)> {
        let nodes = self.nodes();
        let known = nodes.by_number.get(&number)?;
        Some((known.parent, known.node.place()?.name))
    }

    /// A name is gone, and with it its node's place.
    pub(super) fn unnamed(&self, parent: u64, name: &CStr) {
        let node = self.nodes().take_name(parent, name);
        if let Some((_, node)) = node {
            node.set_place(None);
        }
    }

    /// A file has another name now. If `exchanged`, the one that had it before has
    /// the old name.
    pub(super) fn renamed(
        &self,
        from: (u64, &Arc<Node>),
        from_name: &CStr,
        to: (u64, &Arc<Node>),
        to_name: &CStr,
        exchanged: bool,
    ) {
        let mut nodes = self.nodes();
        let moved = nodes.take_name(from.0, from_name);
        let replaced = nodes.take_name(to.0, to_name);
        if let Some((number, _)) = moved {
            nodes.found(number, to, to_name);
        }
        match replaced {
            Some((number, _)) if exchanged => nodes.found(number, from, from_name),
            Some((_, node)) => {
                drop(nodes);
                node.set_place(None);
            }
            None => {}
        }
    }

    /// A handle for an open file of a node.
    pub(super) fn open(&self, node: u64, file: File) -> io::Result<u64> {
        let mut handles = self.handles();
        if handles.len() >= self.handle_limit {
            return Err(error(libc::ENFILE));
        }
        let number = self.next_handle.fetch_add(1, Ordering::Relaxed);
        handles.insert(number, Arc::new(Handle::new(node, file)));
        Ok(number)
    }

    /// The handle with this number, which must be one of this node.
    pub(super) fn handle(&self, number: u64, node: u64) -> io::Result<Arc<Handle>> {
        self.handles()
            .get(&number)
            .filter(|handle| handle.node == node)
            .cloned()
            .ok_or_else(|| error(libc::EBADF))
    }

    /// Closes a handle; its last user closes the file.
    pub(super) fn close(&self, number: u64, node: u64) -> io::Result<()> {
        let handle = self.handle(number, node)?;
        let known = self.handles().remove(&number);
        // Not under the lock: this can take its time.
        drop((known, handle));
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
    fn add(&mut self, node: Node, parent: Option<u64>) -> (u64, Arc<Node>) {
        let number = self.next;
        // 2^64 lookups do not happen.
        self.next = self.next.wrapping_add(1);
        self.by_identity.insert(node.identity, number);
        let node = Arc::new(node);
        self.by_number.insert(
            number,
            Known {
                node: Arc::clone(&node),
                lookups: 1,
                parent: parent.unwrap_or(0),
            },
        );
        (number, node)
    }

    /// Notes that a node has this name.
    fn found(&mut self, number: u64, parent: (u64, &Arc<Node>), name: &CStr) {
        let Some(known) = self.by_number.get_mut(&number) else {
            return;
        };
        let before = known.node.place();
        let same = before.as_ref().is_some_and(|place| {
            known.parent == parent.0 && Arc::ptr_eq(&place.parent, parent.1) && *place.name == *name
        });
        if same || Arc::ptr_eq(&known.node, parent.1) {
            return;
        }
        let old_parent = std::mem::replace(&mut known.parent, parent.0);
        let name: Arc<CStr> = name.into();
        known.node.set_place(Some(Place {
            parent: Arc::clone(parent.1),
            name: Arc::clone(&name),
        }));
        if let Some(before) = before {
            self.drop_name(old_parent, &before.name, number);
        }
        self.by_name
            .entry(parent.0)
            .or_default()
            .insert(name, number);
    }

    /// The node of a name, which is no more.
    fn take_name(&mut self, parent: u64, name: &CStr) -> Option<(u64, Arc<Node>)> {
        let number = *self.by_name.get(&parent)?.get(name)?;
        self.drop_name(parent, name, number);
        Some((number, Arc::clone(&self.by_number.get(&number)?.node)))
    }

    fn drop_name(&mut self, parent: u64, name: &CStr, number: u64) {
        let Some(names) = self.by_name.get_mut(&parent) else {
            return;
        };
        if names.get(name) == Some(&number) {
            names.remove(name);
        }
        if names.is_empty() {
            self.by_name.remove(&parent);
        }
    }

    fn remove(&mut self, number: u64) -> Option<Known> {
        let known = self.by_number.remove(&number)?;
        if self.by_identity.get(&known.node.identity) == Some(&number) {
            self.by_identity.remove(&known.node.identity);
        }
        if let Some(place) = known.node.place() {
            self.drop_name(known.parent, &place.name, number);
        }
        Some(known)
    }
}

#[cfg(test)]
mod tests;
