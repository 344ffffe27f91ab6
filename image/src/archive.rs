//! Where an image's files are: a directory, or a tar that is read in place.

use std::{
    collections::HashMap,
    fs::File,
    io::{self, BufReader, Read, Seek, SeekFrom, Take, Write},
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

use bulkhead_tar::{self as tar, Reader};
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, openat, openat2};

use crate::{
    Error, Result,
    store::{Watched, decompress, is_compressed},
};

/// Most entries of an archive; images have some hundred.
const MAX_ENTRIES: usize = 100_000;
/// Largest document, in bytes.
const MAX_DOCUMENT: u64 = 8 << 20;
/// Most links in a row within an archive.
const MAX_LINKS: usize = 8;

/// An image's files.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    Directory(OwnedFd),
    Archive {
        file: File,
        entries: HashMap<String, Entry>,
    },
}

#[derive(Clone, Debug)]
enum Entry {
    File { offset: u64, size: u64 },
    Link(String),
}

/// Content of one file.
pub(crate) type Content = Take<File>;

impl Source {
    /// Opens a directory or a tar, which may be compressed. Ends early once `stop` is
    /// set.
    pub(crate) fn open(path: &Path, stop: &AtomicBool) -> Result<Self> {
        let read = |source: io::Error| Error::Read {
            path: path.to_owned(),
            source,
        };
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let fd = openat(CWD, path, flags, Mode::empty()).map_err(|error| read(error.into()))?;
        let stat = rustix::fs::fstat(&fd).map_err(|error| read(error.into()))?;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Kind::Directory(fd),
            FileType::RegularFile => {
                let file = plain_file(path, File::from(fd), stop)?;
                let entries = index(path, &file)?;
                Kind::Archive { file, entries }
            }
            _ => return Err(no_image(path, "it is neither a directory nor a file")),
        };
        Ok(Source {
            path: path.to_owned(),
            kind,
        })
    }

    /// Where it was opened.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The content of `name`, and its size; `None` if there is no such file.
    pub(crate) fn find(&self, name: &str) -> Result<Option<(Content, u64)>> {
        let read = |source: io::Error| Error::Read {
            path: self.path.join(name),
            source,
        };
        match &self.kind {
            Kind::Directory(dir) => {
                let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
                let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
                let fd = match openat2(dir, name, flags, Mode::empty(), resolve) {
                    Ok(fd) => fd,
                    Err(rustix::io::Errno::NOENT) => return Ok(None),
                    Err(error) => return Err(read(error.into())),
                };
                let stat = rustix::fs::fstat(&fd).map_err(|error| read(error.into()))?;
                if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
                    return Err(read(io::Error::other("it is not a regular file")));
                }
                let size = u64::try_from(stat.st_size).unwrap_or(0);
                Ok(Some((File::from(fd).take(size), size)))
            }
            Kind::Archive { file, entries } => {
                let mut name = name.to_owned();
                for _ in 0..MAX_LINKS {
                    match entries.get(&name) {
                        None => return Ok(None),
                        Some(Entry::Link(target)) => name.clone_from(target),
                        Some(&Entry::File { offset, size }) => {
                            // A description of its own: two layers can be read in turn.
                            let fd =
                                format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(file));
                            let mut file = File::open(fd).map_err(read)?;
                            file.seek(SeekFrom::Start(offset)).map_err(read)?;
                            return Ok(Some((file.take(size), size)));
                        }
                    }
                }
                Err(read(io::Error::other("its links do not end")))
            }
        }
    }

    /// The whole of a document; `None` if there is none.
    pub(crate) fn document(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let Some((content, size)) = self.find(name)? else {
            return Ok(None);
        };
        if size > MAX_DOCUMENT {
            let reason = format!("{size} bytes are more than the {MAX_DOCUMENT} it may have");
            return Err(Error::Document {
                what: name.to_owned(),
                reason,
            });
        }
        let mut bytes = Vec::new();
        content
            .take(MAX_DOCUMENT)
            .read_to_end(&mut bytes)
            .map_err(|source| Error::Read {
                path: self.path.join(name),
                source,
            })?;
        Ok(Some(bytes))
    }
}

fn no_image(path: &Path, reason: &str) -> Error {
    Error::NoImage {
        path: path.to_owned(),
        reason: reason.to_owned(),
    }
}

/// The archive as a file that can be read anywhere: itself, or what it holds in a
/// file without a name. Blocks of zeros take no room there.
fn plain_file(path: &Path, mut file: File, stop: &AtomicBool) -> Result<File> {
    let read = |source: io::Error| Error::Read {
        path: path.to_owned(),
        source,
    };
    let mut magic = [0_u8; 6];
    let mut count = 0;
    while let Some(rest) = magic.get_mut(count..).filter(|rest| !rest.is_empty()) {
        match file.read(rest).map_err(read)? {
            0 => break,
            more => count += more,
        }
    }
    if count == 0 {
        return Err(no_image(path, "it is empty"));
    }
    file.rewind().map_err(read)?;
    if !is_compressed(&magic) {
        return Ok(file);
    }
    let input = Watched {
        inner: file,
        progress: &(),
        stop,
    };
    // As large as what it holds: not in memory, which /tmp may be.
    let place = Path::new("/var/tmp");
    let failed = |source| Error::Store {
        action: "decompress an archive into",
        path: place.to_owned(),
        source,
    };
    let mut plain = tempfile::tempfile_in(place).map_err(failed)?;
    let mut content = decompress(BufReader::with_capacity(256 << 10, input)).map_err(|error| {
        no_image(
            path,
            &format!("it is compressed in a way that is not known ({error})"),
        )
    })?;
    let mut buffer = vec![0; 256 << 10];
    let mut length = 0;
    loop {
        let count = match content.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(read(error)),
        };
        let part = buffer.get(..count).unwrap_or_default();
        length += part.len() as u64;
        if part.iter().all(|byte| *byte == 0) {
            plain.seek(SeekFrom::Start(length)).map_err(failed)?;
        } else {
            plain
                .write_all(part)
                .map_err(|error| failed(error).of_a_full(place))?;
        }
    }
    plain.set_len(length).map_err(failed)?;
    plain.rewind().map_err(failed)?;
    Ok(plain)
}

/// Finds the files of a tar without reading them.
fn index(path: &Path, file: &File) -> Result<HashMap<String, Entry>> {
    let length = file.metadata().map_err(|source| Error::Read {
        path: path.to_owned(),
        source,
    })?;
    let length = length.len();
    let broken = |error: io::Error| no_image(path, &format!("it is not a complete tar ({error})"));
    let mut archive = Reader::new(BufReader::new(file));
    let mut entries = HashMap::new();
    while let Some(entry) = archive.next_seeking().map_err(broken)? {
        let offset = archive.position();
        if entry.kind == tar::Kind::Regular && offset.saturating_add(entry.size) > length {
            return Err(broken(io::ErrorKind::UnexpectedEof.into()));
        }
        let Some(name) = plain(&entry.name) else {
            continue;
        };
        let found = match entry.kind {
            // No builder makes an image of files with holes.
            tar::Kind::Regular if entry.segments.is_none() => Entry::File {
                offset,
                size: entry.size,
            },
            tar::Kind::Link => match plain(&entry.link) {
                Some(target) => Entry::Link(target),
                None => continue,
            },
            // Old versions of `docker save` share layers by links to ../ID/layer.tar.
            tar::Kind::Symlink => match relative(&name, &entry.link) {
                Some(target) => Entry::Link(target),
                None => continue,
            },
            _ => continue,
        };
        entries.insert(name, found);
        if entries.len() > MAX_ENTRIES {
            return Err(no_image(path, "it has more entries than any image"));
        }
    }
    Ok(entries)
}

/// A name without `.` and doubled slashes; `None` for one that leaves the archive.
fn plain(name: &[u8]) -> Option<String> {
    relative("", name)
}

/// The name that `target` means for a link called `name`.
fn relative(name: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    if target.starts_with('/') {
        return None;
    }
    let mut parts: Vec<&str> = name.split('/').collect();
    parts.pop();
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    (!parts.is_empty()).then(|| parts.join("/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_stay_inside_the_archive() {
        assert_eq!(
            plain(b"./blobs//sha256/x").as_deref(),
            Some("blobs/sha256/x")
        );
        assert_eq!(
            relative("a/layer.tar", b"../b/layer.tar").as_deref(),
            Some("b/layer.tar")
        );
        for name in [&b"../x"[..], b"/x", b".", b"a/../../x", b"\xff"] {
            assert_eq!(plain(name), None, "{name:?}");
        }
    }

    #[test]
    fn what_is_no_archive_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        for (content, words) in [
            (&b""[..], "empty"),
            (b"\xfd7zXZ\0", "compressed"),
            (&[7; 2000], "not a complete tar"),
        ] {
            std::fs::write(&path, content).unwrap();
            let text = Source::open(&path, &AtomicBool::new(false))
                .unwrap_err()
                .to_string();
            assert!(text.contains(words), "{text}");
        }
        assert!(
            Source::open(Path::new("/dev/null"), &AtomicBool::new(false))
                .unwrap_err()
                .to_string()
                .contains("neither")
        );
        assert!(Source::open(&dir.path().join("none"), &AtomicBool::new(false)).is_err());
    }
}
