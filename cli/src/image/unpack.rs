//! One layer's tar onto an empty directory.
//!
//! A hostile archive cannot touch anything outside: every name is checked word by
//! word, and its parent is opened by openat2(2) with RESOLVE_BENEATH and
//! RESOLVE_NO_SYMLINKS; what follows acts on the last component only, relative to
//! that descriptor, and never follows a link. What does not fit is refused with the
//! entry's name.
//!
//! Whiteouts (image-spec, layer.md) become what overlayfs takes for them: a
//! character device 0:0, and `trusted.overlay.opaque` on a directory.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
    os::fd::{AsFd, OwnedFd},
    path::Path,
    rc::Rc,
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, RawMode, ResolveFlags, Timespec, Timestamps,
        UTIME_OMIT, Uid, XattrFlags, chmodat, chownat, fchmod, fchown, fsetxattr, futimens, linkat,
        makedev, mkdirat, mknodat, openat, openat2, statat, symlinkat, unlinkat, utimensat,
    },
    io::Errno,
};
use tar::EntryType;

use super::{Error, Result};

/// A file that removes the one of the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// A file that removes all that the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of other tools' own files.
const RESERVED: &[u8] = b".wh..wh.";

/// Attributes that a layer may set. `trusted.` ones would speak to overlayfs.
const XATTRS: [&[u8]; 4] = [
    b"user.",
    b"security.capability",
    b"system.posix_acl_access",
    b"system.posix_acl_default",
];

/// Largest file, in bytes, that a sparse entry may claim. A few stored bytes stand for
/// any size, and its holes are read as zeros, which takes time.
const MAX_SPARSE: u64 = 64 << 30;

/// Bytes that are written, or left out as a hole, at once: a block of file systems.
const BLOCK: usize = 4096;

/// Unpacks `tar` onto `root`, which must be empty; `layer` names it in errors.
pub(crate) fn unpack(tar: impl Read, root: &Path, layer: &str) -> Result<()> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let fd = rustix::fs::open(root, flags, Mode::empty()).map_err(|error| Error::Store {
        action: "open",
        path: root.to_owned(),
        source: error.into(),
    })?;
    let mut target = Target {
        root: Rc::new(fd),
        parent: None,
        times: Vec::new(),
    };
    let broken = |source| Error::Unpack {
        layer: layer.to_owned(),
        action: "read after",
        name: String::new(),
        source,
    };
    let mut archive = tar::Archive::new(tar);
    for entry in archive.entries().map_err(broken)? {
        let mut entry = entry.map_err(broken)?;
        let name = entry.path_bytes().into_owned();
        target.add(&mut entry, &name).map_err(|problem| {
            let name: String = String::from_utf8_lossy(&name).chars().take(200).collect();
            match problem {
                Problem::Refused(reason) => Error::Entry {
                    layer: layer.to_owned(),
                    name,
                    reason,
                },
                Problem::Failed(action, source) => Error::Unpack {
                    layer: layer.to_owned(),
                    action,
                    name,
                    source,
                },
            }
        })?;
    }
    target.finish().map_err(|source| Error::Unpack {
        layer: layer.to_owned(),
        action: "set the times of",
        name: String::new(),
        source: source.into(),
    })
}

/// Why an entry does not become a file.
#[derive(Debug)]
enum Problem {
    /// It is against the rules.
    Refused(String),
    /// The host cannot do it.
    Failed(&'static str, io::Error),
}

fn refused<T>(reason: impl Into<String>) -> Result<T, Problem> {
    Err(Problem::Refused(reason.into()))
}

fn failed<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Problem {
    move |error| Problem::Failed(action, error.into())
}

/// Owner, mode and time of an entry.
struct Meta {
    uid: Uid,
    gid: Gid,
    mode: Mode,
    mtime: Timespec,
    xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Meta {
    fn of<R: Read>(entry: &mut tar::Entry<'_, R>) -> Result<Self, Problem> {
        let header = entry.header();
        let id = |id: io::Result<u64>| match id.map(u32::try_from) {
            Ok(Ok(id)) if id != u32::MAX => Ok(id),
            _ => refused("its owner is no valid number"),
        };
        let uid = Uid::from_raw(id(header.uid())?);
        let gid = Gid::from_raw(id(header.gid())?);
        let mode = header
            .mode()
            .or_else(|_| refused("its mode is no valid number"))?;
        let seconds = header
            .mtime()
            .or_else(|_| refused("its time is no valid number"))?;
        let seconds = i64::try_from(seconds).or_else(|_| refused("its time is no valid number"))?;
        let mut xattrs = Vec::new();
        let extensions = entry
            .pax_extensions()
            .map_err(failed("read the attributes of"))?;
        for extension in extensions.into_iter().flatten() {
            let extension =
                extension.or_else(|_| refused("its extended header is not understood"))?;
            // The reader does not know this form: it would give the map of the holes
            // as content, under a name that is not the file's.
            if extension.key_bytes().starts_with(b"GNU.sparse.") {
                return refused(
                    "sparse files in the pax form are not supported; pack the layer without --sparse",
                );
            }
            let Some(name) = extension.key_bytes().strip_prefix(b"SCHILY.xattr.") else {
                continue;
            };
            if name.starts_with(b"trusted.") {
                return refused("attributes in trusted. belong to the host");
            }
            // Labels of the builder's host mean nothing here.
            if XATTRS.iter().any(|known| name.starts_with(known)) {
                xattrs.push((name.to_vec(), extension.value_bytes().to_vec()));
            }
        }
        Ok(Meta {
            uid,
            gid,
            mode: Mode::from_raw_mode(mode & 0o7777),
            mtime: Timespec {
                tv_sec: seconds,
                tv_nsec: 0,
            },
            xattrs,
        })
    }

    fn times(&self) -> Timestamps {
        Timestamps {
            last_access: Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            },
            last_modification: self.mtime,
        }
    }

    /// On an open file or directory. The order matters: a change of the owner
    /// clears set-id bits and capabilities.
    fn apply(&self, file: impl AsFd) -> Result<(), Problem> {
        fchown(&file, Some(self.uid), Some(self.gid)).map_err(failed("change the owner of"))?;
        fchmod(&file, self.mode).map_err(failed("change the mode of"))?;
        for (name, value) in &self.xattrs {
            fsetxattr(&file, name.as_slice(), value, XattrFlags::empty())
                .map_err(failed("set an attribute of"))?;
        }
        futimens(&file, &self.times()).map_err(failed("set the time of"))
    }
}

/// The directory that a layer is unpacked onto.
struct Target {
    root: Rc<OwnedFd>,
    /// The parent of the last entry: most have the same.
    parent: Option<(Vec<u8>, Rc<OwnedFd>)>,
    /// Times of directories, set when nothing changes in them any more.
    times: Vec<(Vec<u8>, Timespec)>,
}

impl Target {
    fn add<R: Read>(&mut self, entry: &mut tar::Entry<'_, R>, name: &[u8]) -> Result<(), Problem> {
        let kind = entry.header().entry_type();
        if kind == EntryType::XGlobalHeader {
            return Ok(());
        }
        let words = words(name)?;
        let Some((&last, parents)) = words.split_last() else {
            return match kind {
                EntryType::Directory => {
                    let meta = Meta::of(entry)?;
                    self.times.push((b".".to_vec(), meta.mtime));
                    meta.apply(&self.root)
                }
                _ => refused("it takes the place of the root directory"),
            };
        };
        let parent = self.parent(parents)?;
        if last == OPAQUE {
            return opaque(&parent);
        }
        if last.starts_with(RESERVED) {
            return Ok(());
        }
        if let Some(hidden) = last.strip_prefix(WHITEOUT) {
            return whiteout(&parent, hidden);
        }
        let meta = Meta::of(entry)?;
        match kind {
            EntryType::Directory => {
                let dir = directory(&parent, last)?;
                self.times.push((words.join(&b'/'), meta.mtime));
                meta.apply(&dir)
            }
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => {
                if kind == EntryType::GNUSparse && entry.size() > MAX_SPARSE {
                    return refused(format!(
                        "it is a sparse file of {} bytes, more than the {MAX_SPARSE} it may have",
                        entry.size()
                    ));
                }
                clear(&parent, last)?;
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = openat(&parent, last, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(failed("make"))?;
                let mut file = File::from(file);
                copy_with_holes(entry, &mut file).map_err(failed("write"))?;
                meta.apply(&file)
            }
            EntryType::Link => {
                let target = entry
                    .link_name_bytes()
                    .map(|target| target.into_owned())
                    .unwrap_or_default();
                self.link(&parent, last, &target)
            }
            EntryType::Symlink => {
                clear(&parent, last)?;
                // Whatever it points to is the container's affair.
                let target = entry
                    .link_name_bytes()
                    .map(|target| target.into_owned())
                    .unwrap_or_default();
                if target.is_empty() {
                    return refused("it is a link to nothing");
                }
                symlinkat(target.as_slice(), &parent, last).map_err(failed("make"))?;
                chownat(
                    &parent,
                    last,
                    Some(meta.uid),
                    Some(meta.gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                )
                .map_err(failed("change the owner of"))?;
                utimensat(&parent, last, &meta.times(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("set the time of"))
            }
            EntryType::Char | EntryType::Block | EntryType::Fifo => {
                clear(&parent, last)?;
                let header = entry.header();
                let number = |number: io::Result<Option<u32>>| number.ok().flatten().unwrap_or(0);
                let device = makedev(number(header.device_major()), number(header.device_minor()));
                let kind = match kind {
                    EntryType::Char => FileType::CharacterDevice,
                    EntryType::Block => FileType::BlockDevice,
                    _ => FileType::Fifo,
                };
                let device = if kind == FileType::Fifo { 0 } else { device };
                mknodat(&parent, last, kind, Mode::RUSR, device).map_err(failed("make"))?;
                chownat(
                    &parent,
                    last,
                    Some(meta.uid),
                    Some(meta.gid),
                    AtFlags::SYMLINK_NOFOLLOW,
                )
                .map_err(failed("change the owner of"))?;
                // No link: it was made above, in a directory that only we write to.
                chmodat(&parent, last, meta.mode, AtFlags::empty())
                    .map_err(failed("change the mode of"))?;
                utimensat(&parent, last, &meta.times(), AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("set the time of"))
            }
            kind => refused(format!(
                "files of type {:?} are not supported",
                char::from(kind.as_byte())
            )),
        }
    }

    /// Opens the directory of an entry; what is missing of it is made.
    fn parent(&mut self, parents: &[&[u8]]) -> Result<Rc<OwnedFd>, Problem> {
        if parents.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        let name = parents.join(&b'/');
        if let Some((known, fd)) = &self.parent
            && *known == name
        {
            return Ok(Rc::clone(fd));
        }
        let fd = match beneath(&self.root, &name) {
            Ok(fd) => fd,
            Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => self.make_parents(parents)?,
            Err(error) => return Err(failed("open the directory of")(error)),
        };
        let fd = Rc::new(fd);
        self.parent = Some((name, Rc::clone(&fd)));
        Ok(fd)
    }

    fn make_parents(&self, parents: &[&[u8]]) -> Result<OwnedFd, Problem> {
        let mut dir = self
            .root
            .try_clone()
            .map_err(failed("open the directory of"))?;
        for &word in parents {
            dir = match open_dir(&dir, word) {
                Ok(next) => next,
                Err(Errno::NOENT) => directory(&dir, word)?,
                Err(Errno::NOTDIR | Errno::LOOP) if is_whiteout(&dir, word) => {
                    directory(&dir, word)?
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let word = String::from_utf8_lossy(word);
                    return refused(format!(
                        "{word:?} on its way is no directory but a link or a file"
                    ));
                }
                Err(error) => return Err(failed("open the directory of")(error)),
            };
        }
        Ok(dir)
    }

    fn link(&self, parent: &OwnedFd, name: &[u8], target: &[u8]) -> Result<(), Problem> {
        let shown = String::from_utf8_lossy(target).into_owned();
        let words = match words(target) {
            Ok(words) => words,
            Err(_) => {
                return refused(format!(
                    "it is a hard link to {shown:?}, outside of the image"
                ));
            }
        };
        let Some((&last, parents)) = words.split_last() else {
            return refused("it is a hard link to the root directory");
        };
        let missing = |error: Errno| match error {
            Errno::NOENT | Errno::NOTDIR | Errno::LOOP | Errno::XDEV | Errno::PERM => {
                Problem::Refused(format!(
                    "it is a hard link to {shown:?}, which is no file of the layer"
                ))
            }
            error => failed("link")(error),
        };
        let source = if parents.is_empty() {
            self.root
                .try_clone()
                .map_err(failed("open the directory of"))?
        } else {
            beneath(&self.root, &parents.join(&b'/')).map_err(missing)?
        };
        if same(&source, last, parent, name) {
            return Ok(());
        }
        // A link to itself would remove what it is to link.
        statat(&source, last, AtFlags::SYMLINK_NOFOLLOW).map_err(missing)?;
        clear(parent, name)?;
        linkat(&source, last, parent, name, AtFlags::empty()).map_err(missing)
    }

    /// Sets the times of directories.
    fn finish(self) -> Result<(), Errno> {
        for (name, mtime) in self.times.iter().rev() {
            // It may have been replaced by a later entry.
            let Ok(dir) = beneath(&self.root, name) else {
                continue;
            };
            let last_access = Timespec {
                tv_sec: 0,
                tv_nsec: UTIME_OMIT,
            };
            futimens(
                &dir,
                &Timestamps {
                    last_access,
                    last_modification: *mtime,
                },
            )?;
        }
        Ok(())
    }
}

/// Copies all of `from` to `file`, which must be empty. Blocks of zeros become holes:
/// a file takes no more of the disk than its content.
fn copy_with_holes(mut from: impl Read, file: &mut File) -> io::Result<()> {
    let mut buffer = [0; 16 * BLOCK];
    let mut length = 0;
    loop {
        let count = fill(&mut from, &mut buffer)?;
        let read = buffer.get(..count).unwrap_or_default();
        for block in read.chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start(length))?;
                file.write_all(block)?;
            }
            length += block.len() as u64;
        }
        if count < buffer.len() {
            // A hole at the end has no byte after it.
            return file.set_len(length);
        }
    }
}

/// Reads until `buffer` is full or nothing is left; answers how much it is.
fn fill(from: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut count = 0;
    while let Some(rest) = buffer.get_mut(count..).filter(|rest| !rest.is_empty()) {
        match from.read(rest) {
            Ok(0) => break,
            Ok(read) => count += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(count)
}

/// The components of a name; refuses what could lead elsewhere.
fn words(name: &[u8]) -> Result<Vec<&[u8]>, Problem> {
    if name.is_empty() {
        return refused("it has no name");
    }
    if name.starts_with(b"/") {
        return refused("its name is absolute");
    }
    if name.contains(&0) {
        return refused("its name contains NUL");
    }
    let words: Vec<&[u8]> = name
        .split(|byte| *byte == b'/')
        .filter(|word| !word.is_empty() && *word != b".")
        .collect();
    if words.contains(&&b".."[..]) {
        return refused("its name leads out of the image by \"..\"");
    }
    Ok(words)
}

/// Opens a directory below `root` without following any link.
fn beneath(root: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    openat2(root, name, flags, Mode::empty(), resolve)
}

/// Opens the directory `name`, one component, in `dir`.
fn open_dir(dir: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    beneath(dir, name)
}

/// The directory `name` in `parent`: found or made.
fn directory(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Problem> {
    match open_dir(parent, name) {
        Ok(dir) => return Ok(dir),
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
        Err(error) => return Err(failed("open")(error)),
    }
    let hides = is_whiteout(parent, name);
    clear(parent, name)?;
    mkdirat(parent, name, Mode::from_raw_mode(0o755)).map_err(failed("make"))?;
    let dir = open_dir(parent, name).map_err(failed("open"))?;
    // The process's umask must not show in an image.
    fchmod(&dir, Mode::from_raw_mode(0o755)).map_err(failed("change the mode of"))?;
    if hides {
        opaque(&dir)?;
    }
    Ok(dir)
}

/// Makes way for an entry: a later one replaces an earlier one, unless that is a
/// directory.
fn clear(parent: &OwnedFd, name: &[u8]) -> Result<(), Problem> {
    match unlinkat(parent, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(Errno::ISDIR) => refused("the layer has a directory of this name already"),
        Err(error) => Err(failed("replace")(error)),
    }
}

fn opaque(dir: &OwnedFd) -> Result<(), Problem> {
    fsetxattr(dir, "trusted.overlay.opaque", b"y", XattrFlags::empty())
        .map_err(failed("make opaque the directory of"))
}

fn whiteout(parent: &OwnedFd, name: &[u8]) -> Result<(), Problem> {
    if name.is_empty() || name == b"." || name == b".." {
        return refused("it removes no file");
    }
    match mknodat(
        parent,
        name,
        FileType::CharacterDevice,
        Mode::empty(),
        makedev(0, 0),
    ) {
        Ok(()) => Ok(()),
        // It hides the one below, not the layer's own.
        Err(Errno::EXIST) => match open_dir(parent, name) {
            Ok(dir) => opaque(&dir),
            Err(_) => Ok(()),
        },
        Err(error) => Err(failed("make the whiteout")(error)),
    }
}

fn is_whiteout(parent: &OwnedFd, name: &[u8]) -> bool {
    statat(parent, name, AtFlags::SYMLINK_NOFOLLOW).is_ok_and(|stat| {
        FileType::from_raw_mode(stat.st_mode as RawMode) == FileType::CharacterDevice
            && stat.st_rdev == 0
    })
}

/// Are these two names of one file?
fn same(a_dir: &OwnedFd, a: &[u8], b_dir: &OwnedFd, b: &[u8]) -> bool {
    let stat = |dir: &OwnedFd, name: &[u8]| statat(dir, name, AtFlags::SYMLINK_NOFOLLOW);
    match (stat(a_dir, a), stat(b_dir, b)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

#[cfg(test)]
mod tests;
