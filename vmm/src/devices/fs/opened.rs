//! Files of a private share, which the guest does not open.
//!
//! Requests name the node only. The file is opened at the first of them and stays
//! open for the next ones, as long as few others are used in between.

use std::{
    collections::HashMap,
    fs::File,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use super::table::Handle;

/// Open files, by the numbers of their nodes.
#[derive(Debug)]
pub(super) struct Opened {
    files: Mutex<Files>,
    limit: usize,
}

#[derive(Debug, Default)]
struct Files {
    by_node: HashMap<u64, Open>,
    clock: u64,
}

#[derive(Debug)]
struct Open {
    handle: Arc<Handle>,
    writable: bool,
    used: u64,
}

impl Opened {
    /// With room for so many files.
    pub(super) fn new(limit: usize) -> Opened {
        Opened {
            files: Mutex::default(),
            limit,
        }
    }

    /// The file of a node, opened by `open` if it is not open, or not for writing
    /// where that is needed. A file that was open for reading only is replaced:
    /// overlayfs would go on to show through it what was before the first write.
    pub(super) fn get(
        &self,
        node: u64,
        writable: bool,
        open: impl FnOnce() -> io::Result<File>,
    ) -> io::Result<Arc<Handle>> {
        if let Some(handle) = self.known(node, writable) {
            return Ok(handle);
        }
        let handle = Arc::new(Handle::new(node, open()?));
        let mut files = self.files();
        files.clock = files.clock.saturating_add(1);
        let open = Open {
            handle: Arc::clone(&handle),
            writable,
            used: files.clock,
        };
        let before = files.by_node.insert(node, open);
        let oldest = if files.by_node.len() > self.limit {
            let oldest = files.by_node.iter().min_by_key(|(_, open)| open.used);
            let oldest = oldest.map(|(&node, _)| node);
            oldest.and_then(|node| files.by_node.remove(&node))
        } else {
            None
        };
        drop(files);
        // Closing can take its time.
        drop((before, oldest));
        Ok(handle)
    }

    fn known(&self, node: u64, writable: bool) -> Option<Arc<Handle>> {
        let mut files = self.files();
        files.clock = files.clock.saturating_add(1);
        let now = files.clock;
        let open = files.by_node.get_mut(&node)?;
        if writable && !open.writable {
            return None;
        }
        open.used = now;
        Some(Arc::clone(&open.handle))
    }

    /// The guest has forgotten a node.
    pub(super) fn forget(&self, node: u64) {
        let open = self.files().by_node.remove(&node);
        drop(open);
    }

    /// Closes all.
    pub(super) fn clear(&self) {
        let all = std::mem::take(&mut self.files().by_node);
        drop(all);
    }

    fn files(&self) -> MutexGuard<'_, Files> {
        // A panic ends the process: what it left is never seen.
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_not_used_for_longest_is_closed_and_writing_replaces_reading() {
        let opened = Opened::new(2);
        let open = || File::open("/dev/null");
        let first = opened.get(1, false, open).unwrap();
        opened.get(2, false, open).unwrap();
        let again = opened.get(1, false, || panic!("it is open")).unwrap();
        assert!(Arc::ptr_eq(&first, &again));
        opened.get(3, false, open).unwrap();
        assert!(opened.known(2, false).is_none(), "closed");
        let writing = opened.get(1, true, open).unwrap();
        assert!(!Arc::ptr_eq(&first, &writing));
        let reading = opened.get(1, false, || panic!("it is open")).unwrap();
        assert!(Arc::ptr_eq(&reading, &writing));
        opened.forget(1);
        assert!(opened.known(1, false).is_none());
    }
}
