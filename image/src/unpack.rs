//! One layer's tar onto the tree of the layers below it.
//!
//! The tree is a directory, or an overlay whose upper directory becomes the layer:
//! what a layer removes, replaces and only adds to is then the kernel's affair. The
//! rules are those of containerd and Docker: names count from the image's root, links
//! on the way are followed within it, a later entry replaces an earlier one unless
//! both are directories, whiteouts (image-spec, layer.md) hide what is below and
//! never what their own layer brings.
//!
//! A hostile archive cannot touch anything outside: links are resolved here, word by
//! word, and each word is opened alone, by openat2(2) with RESOLVE_BENEATH and
//! RESOLVE_NO_SYMLINKS, or is the last one, which nothing follows. What does not fit
//! is refused with the entry's name.

use std::{
    collections::HashSet,
    fs::File,
    hash::{BuildHasher, RandomState},
    io::{self, Read},
    os::fd::OwnedFd,
    rc::Rc,
};

use rustix::{
    fs::{
        AtFlags, FileType, Gid, Mode, OFlags, RawMode, Timespec, Timestamps, Uid, chmodat, chownat,
        linkat, makedev, mkdirat, mknodat, openat, readlinkat, statat, symlinkat, unlinkat,
        utimensat,
    },
    io::Errno,
};

use bulkhead_tar::{Entry, Kind, Reader, Time, write_content};

use crate::{Error, Result};

mod files;
mod meta;

use files::{make_dir, names, open_dir, remove, words};
use meta::Meta;

/// A file that removes the one of the layers below.
const WHITEOUT: &[u8] = b".wh.";
/// A file that removes all that the layers below have in its directory.
const OPAQUE: &[u8] = b".wh..wh..opq";
/// Names of other tools' own files.
const RESERVED: &[u8] = b".wh..wh.";

/// Longest path within an image: nothing longer has a name that the kernel takes.
const MAX_PATH: usize = 4095;
/// Most symbolic links on the way to one entry, as for containerd.
const MAX_LINKS: usize = 255;

/// What unpacking leaves to its caller.
#[derive(Debug)]
pub(crate) struct Rest {
    /// A directory of the layer's own root with what was replaced: moved there, for it
    /// may be large, and is to be removed where the layers below are not seen.
    pub(crate) trash: Option<String>,
}

/// Unpacks `tar` onto `root`, the root of a tree; `layer` names it in errors.
pub(crate) fn unpack(tar: impl Read, root: OwnedFd, layer: &str) -> Result<Rest> {
    let mut target = Target {
        root: Rc::new(root),
        parent: None,
        made: HashSet::new(),
        hasher: RandomState::new(),
        times: Vec::new(),
        trash: None,
    };
    let failed = |action, name: &[u8], source| Error::Unpack {
        layer: layer.to_owned(),
        action,
        name: shown(name),
        source,
    };
    let mut reader = Reader::new(tar);
    let mut last = Vec::new();
    while let Some(entry) = reader
        .next_entry()
        .map_err(|source| failed("read after", &last, source))?
    {
        target
            .add(&entry, &mut reader)
            .map_err(|problem| match problem {
                Problem::Refused(reason) => Error::Entry {
                    layer: layer.to_owned(),
                    name: shown(&entry.name),
                    reason,
                },
                Problem::Failed(action, source) => failed(action, &entry.name, source),
            })?;
        last = entry.name;
    }
    let finished = target.finish();
    finished.map_err(|error| failed("set the times of", b"", error.into()))
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
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

/// A directory of the tree.
#[derive(Clone)]
struct Dir {
    fd: Rc<OwnedFd>,
    /// Words from the root, joined by slashes; no links.
    path: Vec<u8>,
}

impl Dir {
    fn child(&self, name: &[u8]) -> Vec<u8> {
        if self.path.is_empty() {
            name.to_vec()
        } else {
            [&self.path, &b"/"[..], name].concat()
        }
    }
}

/// What to do about a directory on the way that does not exist.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Make it.
    Make,
    /// Give up.
    Fail,
}

/// The tree that a layer is unpacked onto.
struct Target {
    root: Rc<OwnedFd>,
    /// The parent of the last entry, by its name: most have the same.
    parent: Option<(Vec<u8>, Dir)>,
    /// Hashes of the paths that this layer brings, and of the directories on the way
    /// to them. A number instead of a name, for there may be millions; a collision
    /// spares a file of the layers below from a whiteout.
    made: HashSet<u64>,
    hasher: RandomState,
    /// Times of directories, set when nothing changes in them any more.
    times: Vec<(Vec<u8>, Timestamps)>,
    trash: Option<Trash>,
}

struct Trash {
    name: String,
    fd: OwnedFd,
    count: u64,
}

impl Target {
    fn add<R: Read>(&mut self, entry: &Entry, content: &mut Reader<R>) -> Result<(), Problem> {
        let words = words(&entry.name)?;
        let Some((&last, parents)) = words.split_last() else {
            if entry.kind != Kind::Directory {
                return refused("it takes the place of the root directory");
            }
            let meta = Meta::of(entry)?;
            meta.apply_to_directory(&self.root)?;
            self.times.push((Vec::new(), meta.times));
            self.mark(b"");
            return Ok(());
        };
        if entry.name.len() > MAX_PATH {
            return refused("its name is longer than any path");
        }
        let parent = self.parent(parents)?;
        let path = parent.child(last);
        if path.len() > MAX_PATH {
            return refused("its name is longer than any path");
        }
        if last == OPAQUE {
            return self.opaque(&parent);
        }
        if last.starts_with(RESERVED) {
            return Ok(());
        }
        if let Some(hidden) = last.strip_prefix(WHITEOUT) {
            if hidden.is_empty() || hidden == b"." || hidden == b".." {
                return refused("it removes no file");
            }
            return self.hide(&parent, hidden);
        }
        self.place(entry, content, &parent, last)?;
        self.mark(&path);
        Ok(())
    }

    /// Makes the file of an entry.
    fn place<R: Read>(
        &mut self,
        entry: &Entry,
        content: &mut Reader<R>,
        parent: &Dir,
        last: &[u8],
    ) -> Result<(), Problem> {
        let meta = Meta::of(entry)?;
        match entry.kind {
            Kind::Directory => {
                if let Ok(dir) = open_dir(&parent.fd, last) {
                    meta.apply_to_directory(&dir)?;
                } else {
                    self.clear(parent, last)?;
                    let dir = make_dir(&parent.fd, last)?;
                    meta.apply(&dir)?;
                }
                self.times.push((parent.child(last), meta.times));
                Ok(())
            }
            Kind::Regular => {
                self.clear(parent, last)?;
                let flags = OFlags::WRONLY
                    | OFlags::CREATE
                    | OFlags::EXCL
                    | OFlags::NOFOLLOW
                    | OFlags::CLOEXEC;
                let file = openat(&parent.fd, last, flags, Mode::RUSR | Mode::WUSR)
                    .map_err(failed("make"))?;
                let mut file = File::from(file);
                write_content(entry, content, &mut file).map_err(failed("write"))?;
                meta.apply(&file)
            }
            Kind::Link => self.link(parent, last, &entry.link),
            Kind::Symlink => {
                // Whatever it points to is the container's affair.
                if entry.link.is_empty() {
                    return refused("it is a link to nothing");
                }
                self.clear(parent, last)?;
                symlinkat(entry.link.as_slice(), &parent.fd, last).map_err(failed("make"))?;
                own(&parent.fd, last, &meta)
            }
            Kind::Char | Kind::Block | Kind::Fifo => {
                let number = |number: i64| {
                    u32::try_from(number).or_else(|_| refused("its device has no valid number"))
                };
                let (major, minor) = (number(entry.device.0)?, number(entry.device.1)?);
                let (kind, device) = match entry.kind {
                    Kind::Char => (FileType::CharacterDevice, makedev(major, minor)),
                    Kind::Block => (FileType::BlockDevice, makedev(major, minor)),
                    _ => (FileType::Fifo, 0),
                };
                self.clear(parent, last)?;
                if kind == FileType::CharacterDevice && device == 0 {
                    // overlayfs' own whiteout, from a tool that packed its directories.
                    return Ok(());
                }
                mknodat(&parent.fd, last, kind, Mode::RUSR, device).map_err(failed("make"))?;
                own(&parent.fd, last, &meta)?;
                // No link: it was made above, in a tree that only we write to.
                chmodat(&parent.fd, last, meta.mode, AtFlags::empty())
                    .map_err(failed("change the mode of"))?;
                utimensat(&parent.fd, last, &meta.times, AtFlags::SYMLINK_NOFOLLOW)
                    .map_err(failed("set the time of"))
            }
            Kind::Other(letter) => refused(format!(
                "files of type {:?} are not supported",
                char::from(letter)
            )),
        }
    }

    fn link(&mut self, parent: &Dir, name: &[u8], target: &[u8]) -> Result<(), Problem> {
        let shown = shown(target);
        let Ok(words) = words(target) else {
            return refused(format!(
                "it is a hard link to {shown:?}, outside of the image"
            ));
        };
        let missing = || {
            Problem::Refused(format!(
                "it is a hard link to {shown:?}, which is no file of the image"
            ))
        };
        let (&last, parents) = words.split_last().ok_or_else(missing)?;
        let source = self.walk(parents, Missing::Fail)?.ok_or_else(missing)?;
        let stat = statat(&source.fd, last, AtFlags::SYMLINK_NOFOLLOW).map_err(|_| missing())?;
        if kind_of(stat.st_mode) == FileType::Directory {
            return Err(missing());
        }
        // A link to itself would remove what it is to link.
        if source.child(last) == parent.child(name) {
            return Ok(());
        }
        self.clear(parent, name)?;
        match linkat(&source.fd, last, &parent.fd, name, AtFlags::empty()) {
            // It was in the directory that had to go.
            Err(Errno::NOENT) => Err(missing()),
            result => result.map_err(failed("link")),
        }
    }

    /// Removes what the layers below have by this name.
    fn hide(&mut self, parent: &Dir, name: &[u8]) -> Result<(), Problem> {
        let path = parent.child(name);
        if !self.is_made(&path) {
            return self.clear(parent, name);
        }
        match open_dir(&parent.fd, name) {
            Ok(fd) => self.opaque(&Dir {
                fd: Rc::new(fd),
                path,
            }),
            Err(_) => Ok(()),
        }
    }

    /// Removes all that the layers below have in a directory, at any depth.
    fn opaque(&mut self, dir: &Dir) -> Result<(), Problem> {
        for name in names(&dir.fd)? {
            if self.trash.as_ref().is_some_and(|trash| {
                dir.path.is_empty() && trash.name.as_bytes() == name.as_slice()
            }) {
                continue;
            }
            self.hide(dir, &name)?;
        }
        Ok(())
    }

    /// Makes way for an entry.
    fn clear(&mut self, parent: &Dir, name: &[u8]) -> Result<(), Problem> {
        let stat = match statat(&parent.fd, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(failed("replace")(error)),
        };
        match kind_of(stat.st_mode) {
            FileType::Directory => {
                self.parent = None;
                match self.discard(parent, name) {
                    // overlayfs cannot move every directory.
                    Err(Errno::XDEV | Errno::INVAL | Errno::NAMETOOLONG) => {
                        remove(&parent.fd, name)
                    }
                    result => result.map_err(failed("replace")),
                }
            }
            kind => {
                if kind == FileType::Symlink {
                    self.parent = None;
                }
                unlinkat(&parent.fd, name, AtFlags::empty()).map_err(failed("replace"))
            }
        }
    }

    /// Moves a directory out of the way, with all that is in it.
    fn discard(&mut self, parent: &Dir, name: &[u8]) -> Result<(), Errno> {
        let trash = match &mut self.trash {
            Some(trash) => trash,
            none => {
                // No archive knows the name.
                let name = format!(".bulkhead-{:016x}", self.hasher.hash_one("trash"));
                mkdirat(&self.root, name.as_str(), Mode::RWXU)?;
                let fd = open_dir(&self.root, name.as_bytes())?;
                none.insert(Trash { name, fd, count: 0 })
            }
        };
        trash.count += 1;
        rustix::fs::renameat(&parent.fd, name, &trash.fd, trash.count.to_string())
    }

    /// Opens the directory of an entry; what is missing of it is made.
    fn parent(&mut self, parents: &[&[u8]]) -> Result<Dir, Problem> {
        let name = parents.join(&b'/');
        if let Some((known, dir)) = &self.parent
            && *known == name
        {
            return Ok(dir.clone());
        }
        let Some(dir) = self.walk(parents, Missing::Make)? else {
            return refused("its directory does not exist");
        };
        self.parent = Some((name, dir.clone()));
        Ok(dir)
    }

    /// Follows `words` from the root, through links, never out of it.
    fn walk(&mut self, words: &[&[u8]], missing: Missing) -> Result<Option<Dir>, Problem> {
        let root = Dir {
            fd: Rc::clone(&self.root),
            path: Vec::new(),
        };
        let mut dir = root.clone();
        if missing == Missing::Make {
            self.pass(&dir)?;
        }
        let mut links = 0;
        // The next word is the last one.
        let mut rest: Vec<Vec<u8>> = words.iter().rev().map(|word| word.to_vec()).collect();
        while let Some(word) = rest.pop() {
            if word == b".." {
                let up = dir.path.iter().rposition(|byte| *byte == b'/');
                let path = dir.path.get(..up.unwrap_or(0)).unwrap_or_default().to_vec();
                let fd = self
                    .reopen(&path)
                    .map_err(failed("open the directory of"))?;
                dir = Dir { fd, path };
                continue;
            }
            let path = dir.child(&word);
            if path.len() > MAX_PATH {
                return refused("its directory has a longer name than any path");
            }
            let next = match open_dir(&dir.fd, &word) {
                Ok(next) => next,
                Err(Errno::NOENT) if missing == Missing::Fail => return Ok(None),
                Err(Errno::NOENT) => make_dir(&dir.fd, &word)?,
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    if let Ok(target) = readlinkat(&dir.fd, word.as_slice(), Vec::new()) {
                        links += 1;
                        if links > MAX_LINKS {
                            return refused("its directory is a link that leads nowhere");
                        }
                        let target = target.as_bytes();
                        if target.starts_with(b"/") {
                            dir = root.clone();
                        }
                        let words = target.split(|byte| *byte == b'/');
                        let words = words.filter(|word| !word.is_empty() && *word != b".");
                        rest.extend(words.rev().map(<[u8]>::to_vec));
                        continue;
                    }
                    if missing == Missing::Fail {
                        return Ok(None);
                    }
                    if self.is_made(&path) {
                        let word = shown(&word);
                        return refused(format!("{word:?} on its way is no directory but a file"));
                    }
                    // A file of the layers below that has become a directory.
                    self.clear(&dir, &word)?;
                    make_dir(&dir.fd, &word)?
                }
                Err(error) => return Err(failed("open the directory of")(error)),
            };
            dir = Dir {
                fd: Rc::new(next),
                path,
            };
            if missing == Missing::Make {
                self.pass(&dir)?;
            }
        }
        Ok(Some(dir))
    }

    /// Notes a directory on the way to an entry: it is part of the layer, and unless
    /// the layer says otherwise it keeps the time that it has below.
    fn pass(&mut self, dir: &Dir) -> Result<(), Problem> {
        if !self.is_made(&dir.path) {
            let stat = rustix::fs::fstat(&dir.fd).map_err(failed("look at the directory of"))?;
            let time = |seconds: i64, nanoseconds: u64| Timespec {
                tv_sec: seconds,
                tv_nsec: i64::try_from(nanoseconds).unwrap_or(0),
            };
            self.times.push((
                dir.path.clone(),
                Timestamps {
                    last_access: time(stat.st_atime, stat.st_atime_nsec),
                    last_modification: time(stat.st_mtime, stat.st_mtime_nsec),
                },
            ));
            self.mark(&dir.path);
        }
        Ok(())
    }

    /// Opens a directory by its path, which has no links.
    fn reopen(&self, path: &[u8]) -> Result<Rc<OwnedFd>, Errno> {
        if path.is_empty() {
            return Ok(Rc::clone(&self.root));
        }
        open_dir(&self.root, path).map(Rc::new)
    }

    fn mark(&mut self, path: &[u8]) {
        self.made.insert(self.hasher.hash_one(path));
    }

    fn is_made(&self, path: &[u8]) -> bool {
        self.made.contains(&self.hasher.hash_one(path))
    }

    /// Sets the times of directories.
    fn finish(self) -> Result<Rest, Errno> {
        for (path, times) in &self.times {
            match self.reopen(path) {
                Ok(dir) => rustix::fs::futimens(&dir, times)?,
                // A later entry has replaced it.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(Rest {
            trash: self.trash.map(|trash| trash.name),
        })
    }
}

fn kind_of(mode: RawMode) -> FileType {
    FileType::from_raw_mode(mode)
}

/// Owner and times of what cannot be opened.
fn own(parent: &OwnedFd, name: &[u8], meta: &Meta) -> Result<(), Problem> {
    let (uid, gid) = (Some(meta.uid), Some(meta.gid));
    chownat(parent, name, uid, gid, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("change the owner of"))?;
    utimensat(parent, name, &meta.times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(failed("set the time of"))
}
