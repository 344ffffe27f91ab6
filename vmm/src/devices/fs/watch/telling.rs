//! From what happened to what the guest is told.
//!
//! What the guest does itself it knows, but for one case: a directory that two
//! containers have by a mount each is two directories to its kernel, and who watches
//! the one hears nothing of what is done through the other. So the file server says
//! what it did ([`Deed`]) for directories that are known twice, and the others of the
//! same file are told.

use std::{
    ffi::{CStr, CString},
    sync::{Arc, atomic::Ordering},
};

use super::{CONTENT, COOKIE, Watch};
use crate::devices::{
    fs::{
        fanotify::{Event, Place},
        file::{statx, statx_at},
        node::Node,
        share::Shared,
    },
    notices::Notice,
};

/// A name in a directory that the guest knows by its number.
pub(in super::super) type Named = (u64, CString);

/// What the file server did for the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Deed {
    /// This happened to a name, as in inotify(7).
    Changed(Named, u32),
    /// A file got another name, or another place.
    Renamed {
        from: Named,
        to: Named,
        /// `IN_ISDIR`, if it is a directory.
        directory: u32,
    },
}

/// A rename as the nodes of one file see it.
struct Rename<'a> {
    from: (Vec<u64>, Option<&'a CStr>),
    to: (Vec<u64>, Option<&'a CStr>),
    directory: u32,
}

impl Watch {
    /// What the guest is to hear of an event.
    pub(super) fn notices(&self, shared: &Shared, event: &Event<'_>) -> Vec<Notice> {
        let mask = u32::try_from(event.mask & u64::from(u32::MAX)).unwrap_or(0);
        if let (Some((key, _)), true) = (event.place, mask & libc::IN_DELETE_SELF != 0) {
            // Its marks went with it; its directory tells of it.
            self.marks().remove(key);
            return Vec::new();
        }
        if event.own {
            return Vec::new();
        }
        if mask & libc::IN_Q_OVERFLOW != 0 {
            self.say("Changes of the host were too many to tell of all");
            return Vec::new();
        }
        if event.from.is_some() || event.to.is_some() {
            let side =
                |place: Option<Place<'_>>| place.map_or_else(Vec::new, |(key, _)| self.nodes(key));
            let rename = Rename {
                from: (side(event.from), event.from.map(|(_, name)| name)),
                to: (side(event.to), event.to.map(|(_, name)| name)),
                directory: mask & libc::IN_ISDIR,
            };
            return self.renamed(shared, &rename);
        }
        let mut notices = Vec::new();
        let itself = match event.place {
            Some((key, name)) if name == c"." => Some(key),
            Some((key, name)) => {
                for number in self.nodes(key) {
                    changed(shared, (number, name), mask, &mut notices);
                }
                event.file
            }
            None => event.file,
        };
        for node in itself.map_or_else(Vec::new, |key| self.nodes(key)) {
            notices.push(Notice {
                node,
                mask: mask & CONTENT,
                ..Notice::default()
            });
        }
        notices
    }

    /// What those are to hear who watch by another mount what was done by one.
    pub(super) fn others_notices(&self, shared: &Shared, deed: &Deed) -> Vec<Notice> {
        let mut notices = Vec::new();
        match deed {
            Deed::Changed((number, name), mask) => {
                for other in self.marks().others(*number) {
                    changed(shared, (other, name), *mask, &mut notices);
                }
            }
            Deed::Renamed {
                from,
                to,
                directory,
            } => {
                let others = |number| self.marks().others(number);
                let rename = Rename {
                    from: (others(from.0), Some(&from.1)),
                    to: (others(to.0), Some(&to.1)),
                    directory: *directory,
                };
                return self.renamed(shared, &rename);
            }
        }
        notices
    }

    /// A file has another name, or another place.
    fn renamed(&self, shared: &Shared, rename: &Rename<'_>) -> Vec<Notice> {
        let cookie = COOKIE | self.cookies.fetch_add(1, Ordering::Relaxed);
        let notice = |node, child, mask, name: &CStr| Notice {
            node,
            child,
            mask,
            cookie,
            name: name.to_bytes().to_vec(),
        };
        let known = |nodes: &[u64]| -> Vec<(u64, Arc<Node>)> {
            let known = nodes
                .iter()
                .filter_map(|&number| Some((number, shared.table.node(number).ok()?)));
            known.collect()
        };
        let (from, to) = (known(&rename.from.0), known(&rename.to.0));
        let (old_name, name) = (rename.from.1, rename.to.1);
        let mut notices = Vec::new();
        if let Some(name) = old_name {
            let mask = libc::IN_MOVED_FROM | rename.directory;
            notices.extend(from.iter().map(|(node, _)| notice(*node, 0, mask, name)));
        }
        let Some(name) = name else {
            return notices;
        };
        for (number, dir) in &to {
            let mut befores = from.iter();
            let before = befores.find(|(_, before)| before.identity.mount == dir.identity.mount);
            let moved = before.and_then(|(number, _)| shared.table.named(*number, old_name?));
            if let Some(child) = lost_child(shared, (*number, dir), name) {
                notices.push(notice(*number, child, libc::IN_DELETE_SELF, name));
            }
            // If it has moved on since, a later event tells; unless the guest has looked
            // the name up and knows what is there now.
            if let (Some((_, node)), Some((old, old_dir)), Some(old_name)) =
                (&moved, before, old_name)
                && (is(dir, name, node) || shared.table.named(*number, name).is_none())
            {
                let (from, to) = ((*old, old_dir), (*number, dir));
                shared.table.renamed(from, old_name, to, name, false);
            }
            let child = moved.map_or(0, |(child, _)| child);
            let mask = libc::IN_MOVED_TO | libc::IN_MOVE_SELF | rename.directory;
            notices.push(notice(*number, child, mask, name));
        }
        notices
    }
}

/// Something happened to a name in a directory.
fn changed(shared: &Shared, (number, name): (u64, &CStr), mask: u32, notices: &mut Vec<Notice>) {
    let Ok(dir) = shared.table.node(number) else {
        return;
    };
    let directory = mask & libc::IN_ISDIR;
    let mut tell = |mask: u32, child: Option<u64>| {
        if mask != 0 {
            notices.push(Notice {
                node: number,
                child: child.unwrap_or(0),
                mask: mask | directory,
                cookie: 0,
                name: name.to_bytes().to_vec(),
            });
        }
    };
    let named = || Some(shared.table.named(number, name)?.0);
    let made = mask & (CONTENT | libc::IN_CREATE);
    if mask & libc::IN_DELETE == 0 {
        tell(made, named());
        return;
    }
    let lost = lost_child(shared, (number, &dir), name);
    let end = libc::IN_DELETE | lost.map_or(0, |_| libc::IN_DELETE_SELF);
    // Merged events say nothing of their order: what is there now does.
    if dir.fd().is_ok_and(|fd| statx_at(&*fd, name).is_ok()) {
        tell(end, lost);
        tell(made, named());
    } else {
        tell(made, lost);
        tell(end, lost);
    }
}

/// Whether a name in a directory means this file.
pub(super) fn is(dir: &Arc<Node>, name: &CStr, node: &Node) -> bool {
    let status = dir.fd().and_then(|fd| Ok(statx_at(&*fd, name)?));
    status.is_ok_and(|status| node.is(&status))
}

/// The file that had a name in a directory, if it has none any more.
fn lost_child(shared: &Shared, dir: (u64, &Arc<Node>), name: &CStr) -> Option<u64> {
    let (number, node) = shared.table.named(dir.0, name)?;
    match statx_at(&*dir.1.fd().ok()?, name) {
        Ok(status) if node.is(&status) => return None,
        Ok(_) | Err(rustix::io::Errno::NOENT) => {}
        Err(_) => return None,
    }
    shared.table.unnamed(dir.0, name);
    // It may have other names. One that is not open here cannot be asked.
    let links = node
        .resident_fd()
        .and_then(|fd| statx(&*fd).ok())
        .map_or(0, |status| status.stx_nlink);
    (links == 0).then_some(number)
}
