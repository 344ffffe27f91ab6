//! A copy of a directory's content, for a tmpfs that begins with it.
//!
//! Copies what an image can hold: files, directories, links and special files,
//! with owner, mode and time. Follows no link, enters no other mount, and keeps
//! open two descriptors for each level of directories.

use std::{
    ffi::CStr,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
};

use rustix::{
    fs::{
        AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps,
        UTIME_OMIT, Uid, openat2,
    },
    io::Errno,
};

/// Deepest tree that is copied.
const DEPTH_MAX: usize = 128;

/// Copies what is in `from` into `to`, an empty directory, which gets the owner,
/// mode and time of the other one.
pub(super) fn content(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    const FLAGS: OFlags = OFlags::RDONLY
        .union(OFlags::DIRECTORY)
        .union(OFlags::CLOEXEC);
    let from = rustix::fs::openat(from, c".", FLAGS, Mode::empty())?;
    let to = rustix::fs::openat(to, c".", FLAGS, Mode::empty())?;
    directory(&from, &to, DEPTH_MAX)
}

fn directory(from: &OwnedFd, to: &OwnedFd, depth_left: usize) -> io::Result<()> {
    for entry in Dir::read_from(from)? {
        let entry = entry?;
        let name = entry.file_name();
        if name == c"." || name == c".." {
            continue;
        }
        self::entry(from, to, name, depth_left)
            .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", name.to_string_lossy())))?;
    }
    // Only now, since each entry has changed the time.
    let stat = rustix::fs::fstat(from)?;
    let (uid, gid) = owner(&stat);
    rustix::fs::fchown(to, Some(uid), Some(gid))?;
    rustix::fs::fchmod(to, mode(&stat))?;
    Ok(rustix::fs::futimens(to, &times(&stat))?)
}

fn entry(from: &OwnedFd, to: &OwnedFd, name: &CStr, depth_left: usize) -> io::Result<()> {
    let stat = rustix::fs::statat(from, name, AtFlags::SYMLINK_NOFOLLOW)?;
    let private = Mode::from_raw_mode(0o700);
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::Directory => {
            rustix::fs::mkdirat(to, name, private)?;
            let to = open(to, name, OFlags::DIRECTORY)?;
            match open(from, name, OFlags::DIRECTORY) {
                Ok(from) if depth_left > 0 => return directory(&from, &to, depth_left - 1),
                Ok(_) => return Err(io::Error::other("it is too deep to be copied")),
                // Another mount: its place is enough.
                Err(Errno::XDEV) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        FileType::RegularFile => {
            let mut data = File::from(open(from, name, OFlags::NONBLOCK)?);
            let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
            let mut copy = File::from(rustix::fs::openat(to, name, flags, private)?);
            // Another container may have put something else there: no more than a
            // file can be read.
            if !data.metadata()?.is_file() {
                return Err(io::Error::other("it changes while it is copied"));
            }
            io::copy(&mut data, &mut copy)?;
        }
        FileType::Symlink => {
            let target = rustix::fs::readlinkat(from, name, Vec::new())?;
            rustix::fs::symlinkat(&target, to, name)?;
        }
        kind @ (FileType::CharacterDevice | FileType::BlockDevice | FileType::Fifo) => {
            rustix::fs::mknodat(to, name, kind, private, stat.st_rdev)?;
        }
        // A socket without its owner is of no use.
        FileType::Socket | FileType::Unknown => return Ok(()),
    }
    attributes(to, name, &stat)
}

fn open(at: &OwnedFd, name: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    let flags = flags | OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(at, name, flags, Mode::empty(), how)
}

fn attributes(to: &OwnedFd, name: &CStr, stat: &Stat) -> io::Result<()> {
    let (uid, gid) = owner(stat);
    let no_follow = AtFlags::SYMLINK_NOFOLLOW;
    rustix::fs::chownat(to, name, Some(uid), Some(gid), no_follow)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::Symlink {
        // A change of the owner can clear bits of the mode.
        rustix::fs::chmodat(to, name, mode(stat), AtFlags::empty())?;
    }
    Ok(rustix::fs::utimensat(to, name, &times(stat), no_follow)?)
}

fn owner(stat: &Stat) -> (Uid, Gid) {
    (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid))
}

fn mode(stat: &Stat) -> Mode {
    Mode::from_raw_mode(stat.st_mode & 0o7777)
}

fn times(stat: &Stat) -> Timestamps {
    Timestamps {
        last_access: Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_OMIT,
        },
        last_modification: Timespec {
            tv_sec: stat.st_mtime,
            tv_nsec: stat.st_mtime_nsec.cast_signed(),
        },
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt, symlink},
        path::Path,
        time::{Duration, SystemTime},
    };

    use rustix::fs::CWD;

    use super::*;

    fn copy(from: &Path, to: &Path) -> io::Result<()> {
        let open = |path: &Path| rustix::fs::open(path, OFlags::PATH, Mode::empty()).unwrap();
        content(open(from), open(to))
    }

    #[test]
    fn files_directories_and_links_arrive_with_their_attributes() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let at = |name: &str| from.path().join(name);
        fs::create_dir_all(at("a/b")).unwrap();
        fs::write(at("a/b/file"), vec![7; 300_000]).unwrap();
        fs::write(at("empty"), "").unwrap();
        symlink("/etc/passwd", at("a/link")).unwrap();
        symlink("nowhere", at("dangling")).unwrap();
        let fifo = |name: &str| {
            let mode = Mode::from_raw_mode(0o600);
            rustix::fs::mknodat(CWD, at(name), FileType::Fifo, mode, 0).unwrap();
        };
        fifo("fifo");
        fs::set_permissions(at("a/b/file"), fs::Permissions::from_mode(0o4711)).unwrap();
        fs::set_permissions(at("a"), fs::Permissions::from_mode(0o1733)).unwrap();
        fs::set_permissions(from.path(), fs::Permissions::from_mode(0o750)).unwrap();
        let old = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let file = File::options().write(true).open(at("a/b/file")).unwrap();
        file.set_modified(old).unwrap();
        File::open(at("a")).unwrap().set_modified(old).unwrap();

        copy(from.path(), to.path()).unwrap();
        let meta = |name: &str| fs::symlink_metadata(to.path().join(name)).unwrap();
        assert_eq!(
            fs::read(to.path().join("a/b/file")).unwrap(),
            vec![7; 300_000]
        );
        assert_eq!(meta("a/b/file").mode(), 0o104_711);
        assert_eq!(meta("a/b/file").modified().unwrap(), old);
        assert_eq!(meta("a").mode(), 0o041_733);
        assert_eq!(meta("a").modified().unwrap(), old);
        assert_eq!(meta("").mode(), 0o040_750);
        assert_eq!(meta("empty").len(), 0);
        assert_eq!(meta("fifo").mode() & 0o170_000, 0o010_000);
        let link = |name: &str| fs::read_link(to.path().join(name)).unwrap();
        assert_eq!(link("a/link"), Path::new("/etc/passwd"));
        assert_eq!(link("dangling"), Path::new("nowhere"));
    }

    #[test]
    fn a_tree_that_is_too_deep_is_refused() {
        let (from, to) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let deep = |levels: usize| (0..levels).fold(from.path().to_owned(), |at, _| at.join("d"));
        fs::create_dir_all(deep(DEPTH_MAX)).unwrap();
        copy(from.path(), to.path()).unwrap();
        fs::create_dir(deep(DEPTH_MAX + 1)).unwrap();
        let again = tempfile::tempdir().unwrap();
        let text = copy(from.path(), again.path()).unwrap_err().to_string();
        assert!(text.contains("too deep"), "{text}");
    }
}
