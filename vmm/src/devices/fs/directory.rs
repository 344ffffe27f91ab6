//! Reading directories, with or without the attributes of what is in them.

use std::{ffi::CStr, io, mem::MaybeUninit, sync::Arc};

use rustix::fs::{self as sys, FileType, Mode, OFlags, RawDir, RawDirEntry, SeekFrom};

use super::{
    abi::{Body, Dirent, ENTRY_OUT, Entry},
    device::{self, Device},
    file::{error, statx, statx_at},
    node::Node,
    request::Piece,
    share::Shared,
};
use crate::config::Policy;

/// Bytes of directory entries taken from the host at once.
const DIRECTORY: usize = 32 * 1024;

impl Shared {
    pub(super) fn opendir(&self, number: u64) -> io::Result<Body> {
        let node = self.table.node(number)?;
        if node.kind != libc::S_IFDIR {
            return Err(error(libc::ENOTDIR));
        }
        if self.policy == Policy::Private {
            // From now on the guest's kernel opens directories by itself.
            return Err(error(libc::ENOSYS));
        }
        let file = self.reopen(&node, OFlags::RDONLY.bits())?;
        let mut body = Body::default();
        body.open(self.table.open(number, file)?, 0);
        Ok(body)
    }

    pub(super) fn readdir(
        &self,
        number: u64,
        piece: Piece,
        plus: bool,
        room: usize,
    ) -> io::Result<Body> {
        let node = self.table.node(number)?;
        let handle = self.file(number, piece.handle, false)?;
        let most = room.min(piece.size as usize);
        let mut space = vec![MaybeUninit::uninit(); DIRECTORY.min(most.max(512))];
        let mut body = Body(Vec::with_capacity(most));
        let _position = handle.lock();
        sys::seek(&handle.file, SeekFrom::Start(piece.offset))?;
        let mut entries = RawDir::new(&handle.file, &mut space);
        while let Some(entry) = entries.next() {
            let entry = match entry {
                Ok(entry) => entry,
                Err(errno) if body.0.is_empty() => return Err(errno.into()),
                // What was found so far is worth more than the error, which the
                // next call meets again.
                Err(_) => break,
            };
            let mut dirent = Dirent {
                inode: entry.ino() ^ node.salt,
                next: entry.next_entry_cookie(),
                kind: entry.file_type().as_raw_mode() >> 12,
                name: entry.file_name().to_bytes(),
            };
            let len = dirent
                .len()
                .saturating_add(if plus { ENTRY_OUT } else { 0 });
            if body.0.len().saturating_add(len) > most {
                break;
            }
            if plus {
                match self.look_up_listed(number, &node, &entry) {
                    Some(found) => {
                        dirent.inode = found.attr.inode;
                        dirent.kind = found.attr.mode >> 12;
                        body.entry(&found);
                    }
                    // The guest will ask for it if it wants to know.
                    None => {
                        body.zeroes(ENTRY_OUT);
                    }
                }
            }
            if !plus
                && entry.file_type() == FileType::RegularFile
                && let Some(device) = listed_device(&node, entry.file_name())
            {
                dirent.kind = device.mode >> 12;
            }
            body.dirent(&dirent);
        }
        Ok(body)
    }

    /// A file that was listed, as the guest will know it. It stays without a
    /// descriptor until it is used.
    fn look_up_listed(
        &self,
        number: u64,
        node: &Arc<Node>,
        entry: &RawDirEntry<'_>,
    ) -> Option<Entry> {
        let name: &CStr = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            return None;
        }
        let status = statx_at(&*node.fd().ok()?, name).ok()?;
        match self.entry_by_status((number, node), name, &status) {
            Some(found) => found.ok(),
            None => self.find(number, node, name).ok(),
        }
    }
}

/// The device node that a listed file stands for.
fn listed_device(node: &Arc<Node>, name: &CStr) -> Option<Device> {
    let dir = node.fd().ok()?;
    if !device::may_be(&statx_at(&*dir, name).ok()?) {
        return None;
    }
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let fd = sys::openat(&*dir, name, flags, Mode::empty()).ok()?;
    device::read(&fd, &statx(&fd).ok()?)
}
