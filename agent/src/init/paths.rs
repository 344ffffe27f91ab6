//! Paths inside a container's root.
//!
//! Promises that no path given here, and no link that an image or another
//! container puts in its way, leads out of the root: the kernel resolves it
//! with the root as `/` (`RESOLVE_IN_ROOT`) and follows no magic link. All that
//! is then done is done to the descriptor, never to the path again.

use std::{
    ffi::OsStr,
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

/// How often a resolution is tried that a rename elsewhere disturbs: the
/// kernel gives up with EAGAIN rather than guess.
const RACES_MAX: usize = 1_000;

/// The root directory of a container.
#[derive(Debug)]
pub(super) struct Root(OwnedFd);

impl AsFd for Root {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Root {
    /// Takes a descriptor of the directory.
    pub(super) fn new(directory: OwnedFd) -> Self {
        Self(directory)
    }

    /// The root of the calling process.
    pub(super) fn of_this_process() -> io::Result<Self> {
        Ok(Self(rustix::fs::open(
            "/",
            OFlags::PATH | OFlags::CLOEXEC,
            Mode::empty(),
        )?))
    }

    /// Opens what is there.
    pub(super) fn open(&self, path: &Path, flags: OFlags) -> io::Result<OwnedFd> {
        self.resolve(path, flags, ResolveFlags::empty())
    }

    /// Refers to a directory that is reached without any link.
    pub(super) fn plain_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        self.make_dir(path)?;
        self.resolve(
            path,
            OFlags::PATH | OFlags::DIRECTORY,
            ResolveFlags::NO_SYMLINKS,
        )
    }

    /// Refers to a directory; makes it, and those above it, if missing.
    pub(super) fn make_dir(&self, path: &Path) -> io::Result<OwnedFd> {
        const FLAGS: OFlags = OFlags::PATH.union(OFlags::DIRECTORY);
        match self.open(path, FLAGS) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (parent, name) = self.make_parent(path)?;
                unless_there(rustix::fs::mkdirat(
                    &parent,
                    name,
                    Mode::from_raw_mode(0o755),
                ))?;
                self.open(path, FLAGS)
            }
            result => result,
        }
    }

    /// Refers to whatever is there; makes an empty file if nothing is.
    pub(super) fn make_file(&self, path: &Path) -> io::Result<OwnedFd> {
        match self.open(path, OFlags::PATH) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                let (parent, name) = self.make_parent(path)?;
                let flags = OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = rustix::fs::openat(&parent, name, flags, Mode::from_raw_mode(0o644));
                unless_there(made.map(drop))?;
                self.open(path, OFlags::PATH)
            }
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

    fn resolve(&self, path: &Path, flags: OFlags, how: ResolveFlags) -> io::Result<OwnedFd> {
        let how = how | ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        for _ in 0..RACES_MAX {
            match openat2(&self.0, path, flags | OFlags::CLOEXEC, Mode::empty(), how) {
                Err(Errno::AGAIN | Errno::INTR) => {}
                result => return Ok(result?),
            }
        }
        Err(Errno::AGAIN.into())
    }
}

/// Another process may have made it in the meantime: as good.
fn unless_there(result: Result<(), Errno>) -> io::Result<()> {
    match result {
        Err(Errno::EXIST) => Ok(()),
        result => Ok(result?),
    }
}
