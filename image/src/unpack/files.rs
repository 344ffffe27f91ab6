//! Single steps on files and names; nothing here follows a link.

use std::os::fd::OwnedFd;

use rustix::{
    fs::{AtFlags, Mode, OFlags, ResolveFlags, mkdirat, openat2, unlinkat},
    io::Errno,
};

use super::{Problem, failed, refused};

/// The components of a name, from the root of the image: an absolute one means the
/// same. Refuses what leads elsewhere.
pub(super) fn words(name: &[u8]) -> Result<Vec<&[u8]>, Problem> {
    if name.is_empty() {
        return refused("it has no name");
    }
    if name.contains(&0) {
        return refused("its name contains NUL");
    }
    let mut words = Vec::new();
    for word in name.split(|byte| *byte == b'/') {
        match word {
            b"" | b"." => {}
            b".." if words.pop().is_some() || name.starts_with(b"/") => {}
            b".." => return refused("its name leads out of the image by \"..\""),
            word => words.push(word),
        }
    }
    Ok(words)
}

/// Opens a directory below `dir` without following any link.
pub(super) fn open_dir(dir: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH
        | ResolveFlags::NO_SYMLINKS
        | ResolveFlags::NO_MAGICLINKS
        | ResolveFlags::NO_XDEV;
    openat2(dir, name, flags, Mode::empty(), resolve)
}

/// Makes the directory `name`, which does not exist.
pub(super) fn make_dir(parent: &OwnedFd, name: &[u8]) -> Result<OwnedFd, Problem> {
    let mode = Mode::from_raw_mode(0o755);
    mkdirat(parent, name, mode).map_err(failed("make"))?;
    let dir = open_dir(parent, name).map_err(failed("open"))?;
    // The process's umask must not show in an image.
    rustix::fs::fchmod(&dir, mode).map_err(failed("change the mode of"))?;
    Ok(dir)
}

/// What is in a directory.
pub(super) fn names(dir: &OwnedFd) -> Result<Vec<Vec<u8>>, Problem> {
    let entries = rustix::fs::Dir::read_from(dir).map_err(failed("read the directory of"))?;
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(failed("read the directory of"))?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// Removes a directory with all in it, in place.
pub(super) fn remove(parent: &OwnedFd, name: &[u8]) -> Result<(), Problem> {
    let dir = open_dir(parent, name).map_err(failed("replace"))?;
    for child in names(&dir)? {
        match unlinkat(&dir, child.as_slice(), AtFlags::empty()) {
            Ok(()) => {}
            Err(Errno::ISDIR) => remove(&dir, &child)?,
            Err(error) => return Err(failed("replace")(error)),
        }
    }
    unlinkat(parent, name, AtFlags::REMOVEDIR).map_err(failed("replace"))
}
