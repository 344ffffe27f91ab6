//! The host's notices of changes, as this process may have them: fanotify(7) without
//! any privilege.
//!
//! Such a group may mark single files that the process could read anyway, is told of
//! files by handles that it cannot open, and learns which changes are its own, but not
//! who made the others. It belongs to the pod's user, in whose name the host counts
//! groups and marks.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::sys::fanotify::{EventFFlags, Fanotify, InitFlags, MarkFlags, MaskFlags};

/// What is heard of a directory and of the files in it.
const DIRECTORY: MaskFlags = MaskFlags::FAN_CREATE
    .union(MaskFlags::FAN_DELETE)
    .union(MaskFlags::FAN_RENAME)
    .union(MaskFlags::FAN_DELETE_SELF)
    .union(MaskFlags::FAN_ONDIR)
    .union(MaskFlags::FAN_EVENT_ON_CHILD)
    .union(FILE);

/// What is heard of a single file.
const FILE: MaskFlags = MaskFlags::FAN_MODIFY
    .union(MaskFlags::FAN_ATTRIB)
    .union(MaskFlags::FAN_CLOSE_WRITE);

/// Longest handle of a file (Linux: MAX_HANDLE_SZ).
const HANDLE: usize = 128;

/// Bytes of `struct fanotify_event_metadata`.
const METADATA: usize = 24;

/// What tells a file from all others of the host: the number of its file system and
/// its handle there, as events carry them.
pub(super) type Key = Box<[u8]>;

/// A group of marks.
#[derive(Debug)]
pub(super) struct Group(Fanotify);

/// What is marked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Directory,
    File,
}

impl Group {
    /// An empty one. The kernel must be 5.17 or newer, for both halves of a rename.
    pub(super) fn new() -> io::Result<Group> {
        // FAN_REPORT_DFID_NAME: directory and name of what changed; FAN_REPORT_FID:
        // which file it is, for those that are marked themselves.
        let report = InitFlags::from_bits_retain(libc::FAN_REPORT_DFID_NAME | libc::FAN_REPORT_FID);
        let flags =
            InitFlags::FAN_CLASS_NOTIF | InitFlags::FAN_CLOEXEC | InitFlags::FAN_NONBLOCK | report;
        Ok(Group(Fanotify::init(flags, EventFFlags::empty())?))
    }

    /// Marks the file of this name; nothing happens if it is marked already.
    pub(super) fn mark(&self, dir: impl AsFd, name: &CStr, kind: Kind) -> io::Result<()> {
        let (flags, mask) = aim(kind);
        Ok(self
            .0
            .mark(flags | MarkFlags::FAN_MARK_ADD, mask, dir, Some(name))?)
    }

    /// Takes a mark away.
    pub(super) fn unmark(&self, dir: impl AsFd, name: &CStr, kind: Kind) -> io::Result<()> {
        let (flags, mask) = aim(kind);
        Ok(self
            .0
            .mark(flags | MarkFlags::FAN_MARK_REMOVE, mask, dir, Some(name))?)
    }

    /// Takes all marks away.
    pub(super) fn clear(&self, dir: impl AsFd) -> io::Result<()> {
        let flags = MarkFlags::FAN_MARK_FLUSH;
        Ok(self.0.mark(flags, MaskFlags::empty(), dir, Some(c"."))?)
    }

    /// Reads events; how many bytes.
    pub(super) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buffer)?)
    }
}

impl AsFd for Group {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn aim(kind: Kind) -> (MarkFlags, MaskFlags) {
    match kind {
        Kind::Directory => (MarkFlags::FAN_MARK_ONLYDIR, DIRECTORY),
        Kind::File => (MarkFlags::FAN_MARK_DONT_FOLLOW, FILE),
    }
}

/// The key of the file of this name, which is not followed, on the file system of
/// this number.
pub(super) fn key(system: u64, dir: impl AsFd, name: &CStr) -> io::Result<Key> {
    /// `struct file_handle` with room.
    #[repr(C)]
    struct Handle {
        bytes: u32,
        kind: i32,
        handle: [u8; HANDLE],
    }
    let mut handle = Handle {
        bytes: u32::try_from(HANDLE).unwrap_or(0),
        kind: 0,
        handle: [0; HANDLE],
    };
    let mut ask = |flags| {
        let mut mount = 0;
        // SAFETY: `name` ends with its end; `handle` is laid out as the kernel has it
        // and says how much room it has; both are only used within the call.
        let outcome = unsafe {
            libc::name_to_handle_at(
                dir.as_fd().as_raw_fd(),
                name.as_ptr(),
                (&raw mut handle).cast(),
                &raw mut mount,
                flags,
            )
        };
        match outcome {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // One that need not serve to open the file. Kernels before 6.5 know only such.
    if let Err(error) = ask(libc::AT_HANDLE_FID) {
        match error.raw_os_error() {
            Some(libc::EINVAL) => ask(0)?,
            _ => return Err(error),
        }
    }
    let length = usize::try_from(handle.bytes).unwrap_or(HANDLE);
    let mut key = Vec::with_capacity(length.saturating_add(16));
    key.extend(system.to_ne_bytes());
    key.extend(handle.bytes.to_ne_bytes());
    key.extend(handle.kind.to_ne_bytes());
    key.extend(handle.handle.iter().take(length));
    Ok(key.into())
}

/// A directory and a name in it.
pub(super) type Place<'a> = (&'a [u8], &'a CStr);

/// What happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Event<'a> {
    /// `FAN_*`; several, of any order, if they were many.
    pub(super) mask: u64,
    /// This process did it.
    pub(super) own: bool,
    /// Where: the name of a directory itself is `.`.
    pub(super) place: Option<Place<'a>>,
    /// To which file, if that is known.
    pub(super) file: Option<&'a [u8]>,
    /// Where a file that was renamed was before.
    pub(super) from: Option<Place<'a>>,
    /// And where it is now.
    pub(super) to: Option<Place<'a>>,
}

/// Takes apart what was read from a group. `own` is the number of this process.
pub(super) fn events(mut bytes: &[u8], own: u32) -> impl Iterator<Item = Event<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let (event, rest) = bytes.split_at_checked(length)?;
        bytes = rest;
        let (metadata, mut records) = event.split_at_checked(METADATA)?;
        let mask = metadata.get(8..16)?.try_into().ok()?;
        let mut event = Event {
            mask: u64::from_ne_bytes(mask),
            own: u32_at(metadata, 20) == Some(own),
            ..Event::default()
        };
        while let Some((kind, record)) = next_record(&mut records) {
            match kind {
                libc::FAN_EVENT_INFO_TYPE_FID => event.file = split(record).map(|(key, _)| key),
                libc::FAN_EVENT_INFO_TYPE_DFID_NAME => event.place = place(record),
                libc::FAN_EVENT_INFO_TYPE_OLD_DFID_NAME => event.from = place(record),
                libc::FAN_EVENT_INFO_TYPE_NEW_DFID_NAME => event.to = place(record),
                _ => {}
            }
        }
        Some(event)
    })
}

/// Type and content of the next record, as `struct fanotify_event_info_header` says.
fn next_record<'a>(records: &mut &'a [u8]) -> Option<(u8, &'a [u8])> {
    let kind = *records.first()?;
    let length = u16::from_ne_bytes(records.get(2..4)?.try_into().ok()?);
    let (record, rest) = records.split_at_checked(length.into())?;
    *records = rest;
    Some((kind, record.get(4..)?))
}

/// The key, and what is behind it.
fn split(record: &[u8]) -> Option<(&[u8], &[u8])> {
    let handle = usize::try_from(u32_at(record, 8)?).ok()?;
    record.split_at_checked(handle.checked_add(16)?)
}

fn place(record: &[u8]) -> Option<Place<'_>> {
    let (key, name) = split(record)?;
    Some((key, CStr::from_bytes_until_nul(name).ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_that_are_cut_off_or_lie_about_their_length_are_passed_over() {
        let mut event = Vec::new();
        event.extend(24u32.to_ne_bytes());
        event.extend([3, 0, 24, 0]);
        event.extend(0x100u64.to_ne_bytes());
        event.extend((-1i32).to_ne_bytes());
        event.extend(7u32.to_ne_bytes());
        let found: Vec<Event<'_>> = events(&event, 7).collect();
        assert_eq!((found[0].mask, found[0].own, found.len()), (0x100, true, 1));
        for length in 0..event.len() {
            assert_eq!(events(&event[..length], 7).count(), 0, "{length}");
        }
        let key = [[1u8; 8].as_slice(), &2u32.to_ne_bytes(), &[5; 4], &[6; 2]].concat();
        let mut record = vec![libc::FAN_EVENT_INFO_TYPE_DFID_NAME, 0];
        record.extend(28u16.to_ne_bytes());
        record.extend(&key);
        record.extend(b"a\0\0\0\0\0");
        event.extend(&record);
        event[0] = u8::try_from(event.len()).unwrap();
        let found: Vec<Event<'_>> = events(&event, 8).collect();
        assert_eq!(found[0].place, Some((&*key, c"a")));
        assert!(!found[0].own);
        // A handle longer than its record; a record longer than its event; none.
        for (at, value) in [(24 + 12, 200), (24 + 2, 200), (24 + 2, 0), (24 + 2, 3)] {
            let mut bad = event.clone();
            bad[at] = value;
            assert_eq!(events(&bad, 8).next().unwrap().place, None, "{at}");
        }
    }
}
