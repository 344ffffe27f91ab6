//! Paths inside a container's root.
//!
//! Promises that no path given here, and no link that an image or another
//! container puts in its way, leads out of the root: the kernel resolves it
//! with the root as `/` (`RESOLVE_IN_ROOT`) and follows no magic link. All that
//! is then done is done to the descriptor, never to the path again.

use std::{
    ffi::{OsStr, OsString},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::{Component, Path},
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, openat, openat2},
    io::Errno,
};

/// How often a resolution is tried that a rename elsewhere disturbs: the
/// kernel gives up with EAGAIN rather than guess.
const RACES_MAX: usize = 1_000;

/// The root directory of a container, or one below which everything has to stay.
#[derive(Debug)]
pub(super) struct Root {
    directory: OwnedFd,
    beyond: Beyond,
}

/// What becomes of a path that leads beyond the root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Beyond {
    /// It goes on at the root, as at `/`.
    Stays,
    /// It is refused with EXDEV, as are absolute ones.
    Refused,
}

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.directory.as_fd()
    }
}

impl Root {
    /// Takes a descriptor of the directory.
    pub(super) fn new(directory: OwnedFd) -> Self {
        Self {
            directory,
            beyond: Beyond::Stays,
        }
    }

    /// The directory `path`, made if missing, as a root that nothing leads out of:
    /// links that would are refused rather than taken for others, unless it is this
    /// very root.
    pub(super) fn narrowed(&self, path: &Path) -> io::Result<Self> {
        let directory = self.make_dir(path)?;
        let [there, here] = [directory.as_fd(), self.as_fd()].map(rustix::fs::fstat);
        let (there, here) = (there?, here?);
        let is_root = (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino);
        Ok(Self {
            directory,
            beyond: if is_root {
                self.beyond
            } else {
                Beyond::Refused
            },
        })
    }

    /// The root of the calling process.
    pub(super) fn of_this_process() -> io::Result<Self> {
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        Ok(Self::new(rustix::fs::open("/", flags, Mode::empty())?))
    }

    /// Opens what is there.
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::empty())
    }

    /// Refers to a directory that is reached without any link.
    pub(super) fn plain_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        let plain = || {
            self.resolve(
                path,
                OFlags::PATH | OFlags::DIRECTORY,
                ResolveFlags::NO_SYMLINKS,
            )
        };
        match plain() {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                self.make_dir(path)?;
                plain()
            }
            result => result,
        }
    }

    /// Refers to a directory; makes it, and those above it, if missing.
    pub(super) fn make_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH | OFlags::DIRECTORY) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.make(path, make_dir_at),
            result => result,
        }
    }

    /// Refers to whatever is there; makes an empty file if nothing is.
    pub(super) fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => self.make(path, make_file_at),
            result => result,
        }
    }

    /// The directory that holds `path`, made if missing, and the last name.
    pub(super) fn make_parent<'a>(&self, path: &'a Path) -> io::Result<(OwnedFd, &'a OsStr)> {
        match (path.parent(), path.file_name()) {
            (Some(parent), Some(name)) => Ok((self.make_dir(parent)?, name)),
            // A missing "..": there is no name that could be made.
            _ => Err(io::ErrorKind::NotFound.into()),
        }
    }

    /// Makes what is missing of `path`: directories on the way, and what `last`
    /// makes at its end. A link on the way that leads to nothing is followed all
    /// the same, inside the root, and what it names is made: images have
    /// `/var/run -> /run` without a `/run`.
    ///
    /// One name at a time, each looked up in the directory that was found or made
    /// before and never followed by the kernel. `..` goes back the way that was
    /// come, so that it cannot lead above the root whatever is renamed meanwhile.
    fn make(
        &self,
        path: &Path,
        last: fn(&OwnedFd, &OsStr) -> Result<(), Errno>,
    ) -> io::Result<OwnedFd> {
        const LINKS_MAX: usize = 40;
        let mut links = 0;
        // Directories from the root on; names that are left, the next one last.
        let mut way = vec![self.directory.try_clone()?];
        let mut left = Vec::new();
        push_names(&mut left, path);
        while let Some(name) = left.pop() {
            let Some(here) = way.last() else {
                return Err(io::ErrorKind::InvalidData.into());
            };
            match name {
                Name::Root if self.beyond == Beyond::Refused => return Err(Errno::XDEV.into()),
                Name::Root => way.truncate(1),
                Name::Up if way.len() == 1 && self.beyond == Beyond::Refused => {
                    return Err(Errno::XDEV.into());
                }
                Name::Up if way.len() == 1 => {}
                Name::Up => drop(way.pop()),
                Name::Plain(name) => {
                    // What is left after a link at the end is made as that end.
                    let make = if left.is_empty() { last } else { make_dir_at };
                    let found = look_up_or(here, &name, make)?;
                    let kind = FileType::from_raw_mode(rustix::fs::fstat(&found)?.st_mode);
                    match kind {
                        FileType::Symlink => {
                            links += 1;
                            if links > LINKS_MAX || is_of_procfs(&found)? {
                                return Err(Errno::LOOP.into());
                            }
                            let target = rustix::fs::readlinkat(&found, "", Vec::new())?;
                            push_names(&mut left, Path::new(OsStr::from_bytes(target.as_bytes())));
                        }
                        _ if left.is_empty() => return Ok(found),
                        FileType::Directory => way.push(found),
                        _ => return Err(Errno::NOTDIR.into()),
                    }
                }
            }
        }
        // The end was "..", or a link to the root.
        way.pop().ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    fn resolve(&self, path: &Path, flags: OFlags, how: ResolveFlags) -> io::Result<OwnedFd> {
        let bounds = match self.beyond {
            Beyond::Stays => ResolveFlags::IN_ROOT,
            Beyond::Refused => ResolveFlags::BENEATH,
        };
        let how = how | bounds | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..RACES_MAX {
            match openat2(
                &self.directory,
                path,
                flags | OFlags::CLOEXEC,
                Mode::empty(),
                how,
            ) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
        Err(Errno::AGAIN.into())
    }
}

/// A part of a path that is still to be gone.
enum Name {
    Root,
    Up,
    Plain(OsString),
}

/// Puts the names of `path` on top of those that are left.
fn push_names(left: &mut Vec<Name>, path: &Path) {
    left.extend(path.components().rev().filter_map(|part| match part {
        Component::RootDir => Some(Name::Root),
        Component::ParentDir => Some(Name::Up),
        Component::Normal(name) => Some(Name::Plain(name.to_owned())),
        Component::CurDir | Component::Prefix(_) => None,
    }));
}

/// Refers to what `name` is, a link itself if it is one; has it made if missing.
fn look_up_or(
    directory: &OwnedFd,
    name: &OsStr,
    make: fn(&OwnedFd, &OsStr) -> Result<(), Errno>,
) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let look_up = || openat(directory, name, flags, Mode::empty());
    match look_up() {
        Err(Errno::NOENT) => {
            unless_there(make(directory, name))?;
            Ok(look_up()?)
        }
        result => Ok(result?),
    }
}

fn make_dir_at(directory: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    rustix::fs::mkdirat(directory, name, Mode::from_raw_mode(0o755))
}

fn make_file_at(directory: &OwnedFd, name: &OsStr) -> Result<(), Errno> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat(directory, name, flags, Mode::from_raw_mode(0o644)).map(drop)
}

/// Links there may be magic: they lead where no path does.
fn is_of_procfs(file: &OwnedFd) -> io::Result<bool> {
    Ok(rustix::fs::fstatfs(file)?.f_type == libc::PROC_SUPER_MAGIC)
}

/// Another process may have made it in the meantime: as good.
fn unless_there(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    fn root() -> (tempfile::TempDir, Root) {
        let outer = tempfile::tempdir().unwrap();
        std::fs::create_dir(outer.path().join("root")).unwrap();
        let directory = std::fs::File::open(outer.path().join("root")).unwrap();
        (outer, Root::new(directory.into()))
    }

    fn same(root: &Root, found: &OwnedFd, path: &str) {
        let there = root
            .resolve(Path::new(path), OFlags::PATH, ResolveFlags::NO_SYMLINKS)
            .unwrap();
        let [a, b] = [found, &there].map(|fd| rustix::fs::fstat(fd).unwrap().st_ino);
        assert_eq!(a, b, "{path}");
    }

    #[test]
    fn what_a_dangling_link_names_is_made_inside_the_root_b30() {
        let (outer, root) = root();
        let at = outer.path().join("root");
        std::fs::create_dir(at.join("var")).unwrap();
        for (link, target) in [
            ("var/run", "/run"),
            ("up", "../../../../one/two"),
            ("chain", "next"),
            ("next", "/var/../three/."),
            ("out", at.to_str().unwrap()),
            ("file", "/etc/made"),
            ("top", "/"),
        ] {
            symlink(target, at.join(link)).unwrap();
        }
        let check = |path: &str, expected: &str| {
            same(&root, &root.make_dir(Path::new(path)).unwrap(), expected);
        };
        check("/var/run/lock", "/run/lock");
        check("/up/x/../y", "/one/two/y");
        check("/chain", "/three");
        check("/out/z", &format!("{}/z", at.display()));
        check("/top/w", "/w");
        check("/four/..", "/");
        let file = root.make_file(Path::new("/file")).unwrap();
        same(&root, &file, "/etc/made");
        assert!(at.join("etc/made").is_file());
        // Nothing was made beside the root.
        assert_eq!(std::fs::read_dir(outer.path()).unwrap().count(), 1);
        assert!(!at.join("z").exists());
    }

    #[test]
    fn loops_and_files_on_the_way_are_refused_b30() {
        let (outer, root) = root();
        let at = outer.path().join("root");
        symlink("b", at.join("a")).unwrap();
        symlink("a", at.join("b")).unwrap();
        symlink("self/more", at.join("self")).unwrap();
        std::fs::write(at.join("file"), "").unwrap();
        let check = |path: &str, errno: i32| {
            let error = root.make_dir(Path::new(path)).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno), "{path}");
            let error = root.make(Path::new(path), make_dir_at).unwrap_err();
            assert_eq!(error.raw_os_error(), Some(errno), "{path}");
        };
        check("/a/x", libc::ELOOP);
        check("/self", libc::ELOOP);
        check("/file/x", libc::ENOTDIR);
        let plain = root.plain_dir(Path::new("/a")).unwrap_err();
        assert_eq!(plain.raw_os_error(), Some(libc::ELOOP));
    }
}
