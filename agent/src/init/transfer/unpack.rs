//! An archive into a directory.
//!
//! What the archive names stays below the directory: links on the way are followed
//! where they lead on within it, and refused where they lead out. A name that is taken
//! is taken over: a file is overwritten in place, as its other names and whoever has it
//! open see; a link or special file makes way; a directory stays what it is, also as
//! to mode and owner. No device is made, and no extended attribute is set.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::{Path, PathBuf},
};

use bulkhead_tar::{Entry, Kind, Reader, Time, write_content};
use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, UTIME_OMIT, Uid, chownat,
        fchmod, fchown, fstat, futimens, linkat, mkdirat, mknodat, openat, statat, symlinkat,
        unlinkat, utimensat,
    },
    io::Errno,
};

use crate::{
    channel::Owners,
    init::{Doing, Error, Result, paths::Root},
};

/// Longest name in an archive: longer ones are no paths.
const NAME_BYTES_MAX: usize = 4095;

/// Most directories whose times are set at the end. Those of further ones are what
/// they are.
const TIMES_MAX: usize = 10_000;

/// How often a name is tried that others take meanwhile.
const RACES_MAX: usize = 100;

/// Unpacks `archive` into the directory `path` of `root`, which is made if missing.
pub(super) fn unpack(root: &Root, path: &Path, owners: Owners, archive: impl Read) -> Result<()> {
    let target = root.narrowed(path).doing(format!("copy into {path:?}"))?;
    let mut unpacker = Unpacker {
        target,
        owners,
        parent: None,
        times: Vec::new(),
    };
    let mut reader = Reader::new(archive);
    let mut last = Vec::new();
    while let Some(entry) = reader.next_entry().map_err(|e| failed(&last, e))? {
        unpacker.add(&entry, &mut reader)?;
        last = entry.name;
    }
    unpacker.finish();
    Ok(())
}

struct Unpacker {
    target: Root,
    owners: Owners,
    /// The directory of the last file, by its name: most have the same.
    parent: Option<(PathBuf, OwnedFd)>,
    /// Of directories that were made.
    times: Vec<(PathBuf, Timestamps)>,
}

impl Unpacker {
    fn add<R: Read>(&mut self, entry: &Entry, content: &mut Reader<R>) -> Result<()> {
        let path = inside(&entry.name)?;
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            return match entry.kind {
                Kind::Directory => Ok(()),
                _ => refused(&entry.name, "it takes the place of the directory itself"),
            };
        };
        let directory = self.directory(directory, entry)?;
        let meta = Meta::of(entry, self.owners)?;
        let made = match entry.kind {
            Kind::Regular => write(&directory, name, entry, content, &meta),
            Kind::Directory => self.make_directory(&directory, &path, name, &meta),
            Kind::Symlink => make(&directory, name, || {
                symlinkat(entry.link.as_slice(), &directory, name)
            })
            .and_then(|()| meta.apply_to_name(&directory, name)),
            Kind::Fifo => make(&directory, name, || {
                mknodat(&directory, name, FileType::Fifo, meta.mode, 0)
            })
            .and_then(|()| meta.apply_to_name(&directory, name)),
            Kind::Link => self.link(&directory, name, entry)?,
            Kind::Char | Kind::Block => {
                return refused(&entry.name, "devices are not copied into a container");
            }
            Kind::Other(letter) => {
                let reason = format!("files of type {:?} are not known", char::from(letter));
                return refused(&entry.name, &reason);
            }
        };
        made.map_err(|error| failed(&entry.name, error))?;
        match entry.kind {
            Kind::Regular => self.parent = Some((parent_of(&path), directory)),
            // A link may have made way, over which the directory was reached.
            _ => self.parent = None,
        }
        Ok(())
    }

    /// Refers to the directory of an entry, which is made if missing.
    fn directory(&mut self, path: &Path, entry: &Entry) -> Result<OwnedFd> {
        if let Some((known, directory)) = self.parent.take()
            && known == path
        {
            return Ok(directory);
        }
        let here = Path::new(".");
        let path = if path.as_os_str().is_empty() {
            here
        } else {
            path
        };
        let directory = self.target.make_dir(path);
        directory.map_err(|error| failed(&entry.name, error))
    }

    fn make_directory(
        &mut self,
        parent: &OwnedFd,
        path: &Path,
        name: &OsStr,
        meta: &Meta,
    ) -> io::Result<()> {
        match mkdirat(parent, name, Mode::RWXU) {
            // Perhaps over a link, as systems have for /bin.
            Err(Errno::EXIST) => {
                let flags = OFlags::PATH | OFlags::DIRECTORY;
                return self.target.open(path, flags).map(drop);
            }
            made => made?,
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let directory = openat(parent, name, flags, Mode::empty())?;
        meta.apply(&directory)?;
        if self.times.len() < TIMES_MAX {
            self.times.push((path.to_owned(), meta.times.clone()));
        }
        Ok(())
    }

    /// Gives a file one more name.
    fn link(&self, parent: &OwnedFd, name: &OsStr, entry: &Entry) -> Result<io::Result<()>> {
        let path = inside(&entry.link)?;
        let Some(source) = path.file_name() else {
            return refused(&entry.name, "it is a hard link to a directory");
        };
        let directory = Path::new(".").join(parent_of(&path));
        let linked = || {
            let flags = OFlags::PATH | OFlags::DIRECTORY;
            let from = self.target.open(&directory, flags)?;
            let stat = |at, name| statat(at, name, AtFlags::SYMLINK_NOFOLLOW);
            let there = stat(&from, source)?;
            // To make way for itself would leave none.
            if let Ok(here) = stat(parent, name)
                && (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
            {
                return Ok(());
            }
            make(parent, name, || {
                linkat(&from, source, parent, name, AtFlags::empty())
            })
        };
        Ok(linked())
    }

    /// Sets the times of directories, now that nothing is put into them any more.
    fn finish(self) {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW;
        for (path, times) in self.times.iter().rev() {
            // One that somebody has replaced or removed meanwhile is theirs.
            if let Ok(directory) = self.target.open(path, flags) {
                let _ = futimens(directory, times);
            }
        }
    }
}

/// Makes something, in place of what is no directory.
fn make(parent: &OwnedFd, name: &OsStr, make: impl Fn() -> Result<(), Errno>) -> io::Result<()> {
    for _ in 0..RACES_MAX {
        match make() {
            Err(Errno::EXIST) => make_way(parent, name)?,
            made => return Ok(made?),
        }
    }
    Err(Errno::EXIST.into())
}

/// Removes a file that is no directory.
fn make_way(parent: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        error => error,
    }
}

/// Writes a file, over the one that is there.
fn write<R: Read>(
    parent: &OwnedFd,
    name: &OsStr,
    entry: &Entry,
    content: &mut Reader<R>,
    meta: &Meta,
) -> io::Result<()> {
    let mut file = File::from(file(parent, name)?);
    file.set_len(0)?;
    write_content(entry, content, &mut file)?;
    Ok(meta.apply(&file.into())?)
}

/// Opens a file to be written, which is made if missing. What is neither a file nor a
/// directory makes way.
fn file(parent: &OwnedFd, name: &OsStr) -> io::Result<OwnedFd> {
    const FLAGS: OFlags = OFlags::WRONLY
        .union(OFlags::NOFOLLOW)
        // FIFOs are not waited for, terminals not taken.
        .union(OFlags::NONBLOCK)
        .union(OFlags::NOCTTY)
        .union(OFlags::CLOEXEC);
    let regular = |mode| FileType::from_raw_mode(mode) == FileType::RegularFile;
    for _ in 0..RACES_MAX {
        let new = FLAGS | OFlags::CREATE | OFlags::EXCL;
        match openat(parent, name, new, Mode::RUSR | Mode::WUSR) {
            Err(Errno::EXIST) => {}
            made => return Ok(made?),
        }
        let there = match statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
            Err(Errno::NOENT) => continue,
            there => there?,
        };
        if regular(there.st_mode) {
            match openat(parent, name, FLAGS, Mode::empty()) {
                Ok(file) if regular(fstat(&file)?.st_mode) => return Ok(file),
                // It was replaced meanwhile, or is a program that runs.
                Ok(_) | Err(Errno::NOENT | Errno::LOOP | Errno::NXIO | Errno::TXTBSY) => {}
                Err(error) => return Err(error.into()),
            }
        }
        make_way(parent, name)?;
    }
    Err(Errno::EXIST.into())
}

/// What an entry says of its file.
struct Meta {
    owner: (Uid, Gid),
    mode: Mode,
    times: Timestamps,
}

impl Meta {
    fn of(entry: &Entry, owners: Owners) -> Result<Self> {
        let id = |id: i64| match (owners, u32::try_from(id)) {
            (Owners::Root, _) => Ok(0),
            (Owners::Archive, Ok(id)) if id != u32::MAX => Ok(id),
            (Owners::Archive, _) => refused(&entry.name, "its owner is no valid number"),
        };
        let mode = u32::try_from(entry.mode & 0o7777).unwrap_or(0);
        Ok(Self {
            owner: (Uid::from_raw(id(entry.uid)?), Gid::from_raw(id(entry.gid)?)),
            mode: Mode::from_raw_mode(mode),
            times: Timestamps {
                last_access: entry.atime.map_or(OMITTED, timespec),
                last_modification: timespec(entry.mtime),
            },
        })
    }

    /// On what is open. The order matters: a change of the owner clears set-id bits.
    fn apply(&self, file: &OwnedFd) -> Result<(), Errno> {
        fchown(file, Some(self.owner.0), Some(self.owner.1))?;
        fchmod(file, self.mode)?;
        futimens(file, &self.times)
    }

    /// On what is not opened, whose mode was given when it was made.
    fn apply_to_name(&self, parent: &OwnedFd, name: &OsStr) -> io::Result<()> {
        let (uid, gid) = (Some(self.owner.0), Some(self.owner.1));
        chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)?;
        Ok(utimensat(
            parent,
            name,
            &self.times,
            AtFlags::SYMLINK_NOFOLLOW,
        )?)
    }
}

const OMITTED: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: UTIME_OMIT,
};

fn timespec(time: Time) -> Timespec {
    Timespec {
        tv_sec: time.seconds,
        tv_nsec: time.nanoseconds.into(),
    }
}

/// A name of an archive as a path below the directory: an absolute one means the same.
fn inside(name: &[u8]) -> Result<PathBuf> {
    if name.len() > NAME_BYTES_MAX {
        return refused(name, "its name is longer than any path");
    }
    if name.contains(&0) {
        return refused(name, "its name contains NUL");
    }
    let mut path = PathBuf::new();
    for word in name.split(|byte| *byte == b'/') {
        match word {
            b"" | b"." => {}
            b".." => return refused(name, "its name leads upwards by \"..\""),
            word => path.push(OsStr::from_bytes(word)),
        }
    }
    Ok(path)
}

fn parent_of(path: &Path) -> PathBuf {
    path.parent().map(Path::to_owned).unwrap_or_default()
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
}

fn refused<T>(name: &[u8], reason: &str) -> Result<T> {
    Err(Error::Archive {
        name: shown(name),
        reason: reason.to_owned(),
    })
}

/// An error of the kernel, or one of the archive, which has no number.
fn failed(name: &[u8], error: io::Error) -> Error {
    match error.raw_os_error() {
        Some(libc::EXDEV) => Error::Archive {
            name: shown(name),
            reason: "a link on its way leads out of the directory that is copied into".to_owned(),
        },
        Some(_) => Error::Step {
            doing: format!("make {:?}", shown(name)),
            source: error,
        },
        None => Error::Archive {
            name: shown(name),
            reason: format!("what follows is not understood: {error}"),
        },
    }
}

#[cfg(test)]
mod tests;
