//! A file or a directory into an archive.
//!
//! Names in the archive begin with the last one of the path. Links are told, not
//! followed; sockets are left out, and so is what the kernel's file systems (`/proc`,
//! `/sys`) have below a directory that is copied. Nothing but files and directories is
//! ever opened.

use std::{
    ffi::{CStr, OsStr},
    fs::File,
    io::{self, Write},
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
};

use bulkhead_tar::{Entry, Kind, Time, Writer};
use rustix::{
    fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat, fstat, fstatfs, openat, readlinkat, statat},
    io::Errno,
};

use crate::{
    channel::Extent,
    init::{Doing, Error, Result, paths::Root},
};

/// Deepest tree that is packed: each level has two descriptors.
const DEPTH_MAX: usize = 256;

/// File systems of which every file is made up: procfs, sysfs, cgroups (both versions),
/// debugfs, tracefs, securityfs and bpffs.
const KERNELS: [u32; 8] = [
    0x9fa0,
    0x6265_6572,
    0x6367_7270,
    0x0027_e0eb,
    0x6462_6720,
    0x7472_6163,
    0x7363_6673,
    0xcafe_4a11,
];

/// Flags for whatever is read.
const READ: OFlags = OFlags::RDONLY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::NONBLOCK)
    .union(OFlags::NOCTTY)
    .union(OFlags::CLOEXEC);

/// Packs what `path` names in `root` into `archive`.
pub(super) fn pack(root: &Root, path: &Path, extent: Extent, archive: impl Write) -> Result<()> {
    let top = root.open(path, OFlags::PATH | OFlags::NOFOLLOW);
    let top = top.map_err(|error| match error.raw_os_error() {
        Some(libc::ENOENT | libc::ENOTDIR) => Error::Missing {
            path: path.to_owned(),
        },
        _ => Error::Step {
            doing: format!("find {path:?}"),
            source: error,
        },
    })?;
    let stat = fstat(&top).doing(format!("look at {path:?}"))?;
    let name = path.file_name().unwrap_or_else(|| OsStr::new("."));
    let mut packer = Packer {
        writer: Writer::new(archive),
    };
    let target = || readlinkat(&top, c"", Vec::new());
    let Some(mut entry) = entry(name.as_bytes(), &stat, target).doing(format!("read {path:?}"))?
    else {
        return Err(Errno::OPNOTSUPP).doing(format!("pack the socket {path:?}"));
    };
    // Not by the descriptor: one that only refers to a file cannot read it.
    let open = |more| open_same(&stat, || root.open(path, READ | more));
    match (extent, entry.kind) {
        (Extent::Header, Kind::Regular) => packer.header(&entry),
        (Extent::Whole, Kind::Regular) => packer.file(&mut entry, open(OFlags::empty())),
        (Extent::Whole, Kind::Directory) => packer
            .entry(&entry)
            .and_then(|()| open(OFlags::DIRECTORY).doing(format!("read {path:?}")))
            .and_then(|directory| packer.directory(&directory, &stat, &entry.name, DEPTH_MAX)),
        _ => packer.entry(&entry),
    }?;
    packer.writer.finish().doing("end the archive")
}

struct Packer<W> {
    writer: Writer<W>,
}

impl<W: Write> Packer<W> {
    fn entry(&mut self, entry: &Entry) -> Result<()> {
        self.writer.entry(entry).doing(packing(&entry.name))
    }

    /// Of a file nothing but its header, which tells the size all the same.
    fn header(&mut self, entry: &Entry) -> Result<()> {
        self.writer.header(entry).doing(packing(&entry.name))
    }

    fn file(&mut self, entry: &mut Entry, file: io::Result<OwnedFd>) -> Result<()> {
        let packed = file.and_then(|file| {
            let mut file = File::from(file);
            // The latest: it may have grown.
            entry.size = file.metadata()?.len();
            self.writer.file(entry, &mut file)
        });
        packed.doing(packing(&entry.name))
    }

    fn directory(
        &mut self,
        directory: &OwnedFd,
        stat: &Stat,
        name: &[u8],
        depth_left: usize,
    ) -> Result<()> {
        let doing = || format!("read the directory {:?}", shown(name));
        for found in Dir::read_from(directory).doing(doing())? {
            let found = found.doing(doing())?;
            let child = found.file_name();
            if child != c"." && child != c".." {
                self.child(directory, stat, name, child, depth_left)?;
            }
        }
        Ok(())
    }

    fn child(
        &mut self,
        parent: &OwnedFd,
        parent_stat: &Stat,
        parent_name: &[u8],
        child: &CStr,
        depth_left: usize,
    ) -> Result<()> {
        let name = [parent_name, child.to_bytes()].concat();
        let stat = match statat(parent, child, AtFlags::SYMLINK_NOFOLLOW) {
            // Removed meanwhile.
            Err(Errno::NOENT) => return Ok(()),
            stat => stat.doing(packing(&name))?,
        };
        let target = || readlinkat(parent, child, Vec::new());
        let mut entry = match entry(&name, &stat, target) {
            Ok(Some(entry)) => entry,
            Ok(None) | Err(Errno::NOENT) => return Ok(()),
            Err(error) => return Err(error).doing(packing(&name)),
        };
        let open = |more| {
            open_same(&stat, || {
                Ok(openat(parent, child, READ | more, Mode::empty())?)
            })
        };
        match entry.kind {
            Kind::Regular => match open(OFlags::empty()) {
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
                file => self.file(&mut entry, file),
            },
            Kind::Directory => {
                let directory = match open(OFlags::DIRECTORY) {
                    Err(error) if error.raw_os_error() == Some(libc::ENOENT) => return Ok(()),
                    directory => directory.doing(packing(&name))?,
                };
                self.entry(&entry)?;
                if stat.st_dev != parent_stat.st_dev && is_kernels(&directory) {
                    return Ok(());
                }
                let Some(depth_left) = depth_left.checked_sub(1) else {
                    return Err(Errno::NAMETOOLONG).doing(format!(
                        "pack {:?}: it lies deeper than {DEPTH_MAX} directories",
                        shown(&name)
                    ));
                };
                self.directory(&directory, &stat, &entry.name, depth_left)
            }
            _ => self.entry(&entry),
        }
    }
}

/// Opens what was looked at. What has taken its place meanwhile counts as not there:
/// it could be anything.
fn open_same(stat: &Stat, open: impl FnOnce() -> io::Result<OwnedFd>) -> io::Result<OwnedFd> {
    let file = match open() {
        Err(error) if error.raw_os_error() == Some(libc::ELOOP) => {
            return Err(Errno::NOENT.into());
        }
        file => file?,
    };
    let now = fstat(&file)?;
    let kind = |stat: &Stat| FileType::from_raw_mode(stat.st_mode);
    let same = (now.st_dev, now.st_ino, kind(&now)) == (stat.st_dev, stat.st_ino, kind(stat));
    same.then_some(file).ok_or_else(|| Errno::NOENT.into())
}

fn is_kernels(directory: &OwnedFd) -> bool {
    let kind = fstatfs(directory).map(|stat| u32::try_from(stat.f_type));
    matches!(kind, Ok(Ok(kind)) if KERNELS.contains(&kind))
}

/// The header of a file; `None` for what an archive cannot tell. Directories have a
/// slash at the end of their names.
fn entry(
    name: &[u8],
    stat: &Stat,
    target: impl FnOnce() -> Result<std::ffi::CString, Errno>,
) -> Result<Option<Entry>, Errno> {
    let mut entry = Entry {
        name: name.to_vec(),
        mode: i64::from(stat.st_mode & 0o7777),
        uid: i64::from(stat.st_uid),
        gid: i64::from(stat.st_gid),
        mtime: Time {
            seconds: stat.st_mtime,
            nanoseconds: 0,
        },
        ..Entry::default()
    };
    entry.kind = match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            entry.size = u64::try_from(stat.st_size).unwrap_or(0);
            Kind::Regular
        }
        FileType::Directory => {
            entry.name.push(b'/');
            Kind::Directory
        }
        FileType::Symlink => {
            entry.link = target()?.into_bytes();
            Kind::Symlink
        }
        FileType::Fifo => Kind::Fifo,
        kind @ (FileType::CharacterDevice | FileType::BlockDevice) => {
            let (major, minor) = (
                rustix::fs::major(stat.st_rdev),
                rustix::fs::minor(stat.st_rdev),
            );
            entry.device = (i64::from(major), i64::from(minor));
            if kind == FileType::CharacterDevice {
                Kind::Char
            } else {
                Kind::Block
            }
        }
        FileType::Socket | FileType::Unknown => return Ok(None),
    };
    Ok(Some(entry))
}

fn packing(name: &[u8]) -> String {
    format!("pack {:?}", shown(name))
}

fn shown(name: &[u8]) -> String {
    String::from_utf8_lossy(name).chars().take(200).collect()
}

#[cfg(test)]
mod tests;
