//! Layers on disk, each unpacked once.
//!
//! A layer is a directory `NAME/fs`; the name is made of the digests of the layer and
//! of all below it, for what a layer consists of depends on them: directories that it
//! only passes keep their attributes, links of the layers below are followed. When
//! `NAME` itself was changed last is when the layer was used last.
//!
//! A layer appears whole or not at all: those that an image lacks are unpacked beside
//! their places and renamed when the digests were compared and the disk has them. One process unpacks at a time; what a killed
//! one left is removed by the next.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File},
    io::{self, BufReader, Read},
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
    time::{Duration, SystemTime},
};

use rustix::fs::{FlockOperation, Timespec, Timestamps, UTIME_NOW, flock, futimens};
use sha2::{Digest as _, Sha256};

use crate::{
    Error, OVERLAYFS, Progress, Result,
    archive::Source,
    layout::{Description, Layer},
    remove_tree,
    stack::{Stack, Upper},
    unpack,
};

/// Prefix of what is not finished; no name of a layer begins so.
const UNFINISHED: &str = ".unpacking-";

/// The files of a layer, below its directory.
const FILES: &str = "fs";

/// The lock on the store.
const LOCK: &str = ".lock";

/// Part of every name. What unpacks differently makes other layers.
const FORM: &[u8] = b"bulkhead layers, form 2\n";

/// How often a lock that somebody else holds is asked for: flock(2) cannot be waited
/// for together with anything else.
const ASK_AGAIN: Duration = Duration::from_millis(50);

/// The directories of an image's layers, lowest first.
pub(crate) fn provide(
    store: &Path,
    source: &Source,
    image: &Description,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Vec<PathBuf>> {
    let places: Vec<PathBuf> = names(&image.layers)
        .iter()
        .map(|name| store.join(name))
        .collect();
    let is_missing = |place: &PathBuf| !place.join(FILES).is_dir();
    if places.iter().any(is_missing) {
        let lock = Lock::take(store, progress, stop)?;
        lock.remove_unfinished()?;
        let missing = image.layers.iter().zip(&places);
        let missing: Vec<_> = missing.filter(|(_, place)| is_missing(place)).collect();
        let mut total = 0;
        for (layer, _) in &missing {
            total += source.find(&layer.file)?.map_or(0, |(_, size)| size);
        }
        progress.begin(total);
        let unpacking = Unpacking::new(store, source, progress, stop)?;
        let added = unpacking.add(image, &places);
        added.map_err(|error| error.of_a_full(store))?;
        progress.end();
    }
    for place in &places {
        touch(place).map_err(store_error("note the use of", place))?;
    }
    Ok(places.iter().map(|place| place.join(FILES)).collect())
}

/// Removes the layers that nothing keeps and nobody has used for `age`. Waits for
/// nobody: if another process is at work nothing is removed. Answers how many were.
pub fn collect(store: &Path, keep: &HashSet<PathBuf>, age: Duration) -> Result<usize> {
    let Some(lock) = Lock::try_take(store)? else {
        return Ok(0);
    };
    lock.remove_unfinished()?;
    let old = |entry: &fs::DirEntry| -> io::Result<bool> {
        let used = entry.metadata()?.modified()?;
        Ok(SystemTime::now()
            .duration_since(used)
            .is_ok_and(|unused| unused >= age))
    };
    let failed = || store_error("clear", store);
    let mut count = 0;
    for entry in fs::read_dir(store).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        let name = entry.file_name();
        let is_layer = name.len() == 64 && entry.file_type().is_ok_and(|kind| kind.is_dir());
        if !is_layer || keep.contains(&entry.path().join(FILES)) || !old(&entry).map_err(failed())?
        {
            continue;
        }
        // Out of everybody's sight first: a layer is whole or not there.
        let gone = store.join(format!("{UNFINISHED}{}", name.to_string_lossy()));
        fs::rename(entry.path(), &gone).map_err(failed())?;
        remove_tree(&gone).map_err(failed())?;
        count += 1;
    }
    Ok(count)
}

/// Why layers cannot be mounted, as far as the kernel's answer does not say.
fn explained(error: io::Error, path: &Path) -> io::Error {
    let on_overlay = rustix::fs::statfs(path).is_ok_and(|found| found.f_type == OVERLAYFS);
    if !on_overlay {
        return error;
    }
    io::Error::new(
        error.kind(),
        "an overlay cannot hold layers: mount a file system of another kind there (in a \
         container, a volume)",
    )
}

fn store_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Store {
        action,
        path: path.to_owned(),
        source,
    }
}

/// What the directories of layers are called.
fn names(layers: &[Layer]) -> Vec<String> {
    let mut name = String::new();
    layers
        .iter()
        .map(|layer| {
            let hash = Sha256::new().chain_update(FORM);
            let hash = hash.chain_update(&name).chain_update(layer.diff_id.hex());
            name = hex::encode(hash.finalize());
            name.clone()
        })
        .collect()
}

fn touch(place: &Path) -> io::Result<()> {
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: UTIME_NOW,
    };
    let times = Timestamps {
        last_access: now,
        last_modification: now,
    };
    Ok(futimens(File::open(place)?, &times)?)
}

/// The right to add to a store and to remove from it; given up when this is dropped,
/// also by the end of the process.
struct Lock<'a> {
    store: &'a Path,
    _file: File,
}

impl<'a> Lock<'a> {
    fn open(store: &Path) -> Result<File> {
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(store)
            .map_err(store_error("make", store))?;
        File::create(store.join(LOCK)).map_err(store_error("lock", store))
    }

    fn try_take(store: &'a Path) -> Result<Option<Self>> {
        let file = Lock::open(store)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Lock { store, _file: file })),
            Err(rustix::io::Errno::WOULDBLOCK | rustix::io::Errno::INTR) => Ok(None),
            Err(error) => Err(store_error("lock", store)(error.into())),
        }
    }

    fn take(store: &'a Path, progress: &dyn Progress, stop: &AtomicBool) -> Result<Self> {
        let mut told = false;
        loop {
            if let Some(lock) = Lock::try_take(store)? {
                return Ok(lock);
            }
            if stop.load(Ordering::Relaxed) {
                return Err(store_error("lock", store)(interrupted()));
            }
            if !told {
                progress.waiting();
                told = true;
            }
            std::thread::sleep(ASK_AGAIN);
        }
    }

    fn remove_unfinished(&self) -> Result<()> {
        let remove = || -> io::Result<()> {
            for entry in fs::read_dir(self.store)? {
                let entry = entry?;
                if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
                    remove_tree(&entry.path())?;
                }
            }
            Ok(())
        };
        remove().map_err(store_error("clean up", self.store))
    }
}

fn interrupted() -> io::Error {
    io::Error::other("interrupted")
}

/// What is not finished: a directory that is removed, however deep it has become.
struct Unpacking<'a> {
    source: &'a Source,
    progress: &'a dyn Progress,
    stop: &'a AtomicBool,
    path: PathBuf,
}

impl Drop for Unpacking<'_> {
    fn drop(&mut self) {
        // The next one to take the lock tries again.
        let _ = remove_tree(&self.path);
    }
}

impl<'a> Unpacking<'a> {
    fn new(
        store: &Path,
        source: &'a Source,
        progress: &'a dyn Progress,
        stop: &'a AtomicBool,
    ) -> Result<Self> {
        let dir = tempfile::Builder::new()
            .prefix(UNFINISHED)
            .tempdir_in(store)
            .map_err(store_error("make a directory in", store))?;
        Ok(Unpacking {
            source,
            progress,
            stop,
            path: dir.keep(),
        })
    }

    /// Unpacks what is not at its place, and moves all of it there at once: the disk
    /// is waited for one time.
    fn add(&self, image: &Description, places: &[PathBuf]) -> Result<()> {
        let failed = || store_error("use", &self.path);
        let scratch = self.path.join("scratch");
        make(&scratch, 0o700)?;
        let mut below = Stack::new(scratch).map_err(failed())?;
        let mut made = Vec::new();
        for (number, (layer, place)) in image.layers.iter().zip(places).enumerate() {
            let mut files = place.join(FILES);
            if !files.is_dir() {
                let own = self.path.join(number.to_string());
                self.unpack(layer, &below, &own)?;
                files = own.join(FILES);
                made.push((own, place));
            }
            below.push(files).map_err(failed())?;
        }
        let dir = File::open(&self.path).map_err(store_error("sync", &self.path))?;
        rustix::fs::syncfs(&dir).map_err(|error| store_error("sync", &self.path)(error.into()))?;
        for (own, place) in made {
            fs::rename(own, place).map_err(store_error("move a layer to", place))?;
        }
        Ok(())
    }

    /// Unpacks one layer, on top of those below, into `own`.
    fn unpack(&self, layer: &Layer, below: &Stack, own: &Path) -> Result<()> {
        let Some((content, _)) = self.source.find(&layer.file)? else {
            let reason = format!("{} is missing from the image", layer.file);
            return Err(Error::Document {
                what: "layer".to_owned(),
                reason,
            });
        };
        make(own, 0o700)?;
        let upper = Upper {
            dir: own.join(FILES),
            work: self.path.join("work"),
        };
        make(&upper.dir, 0o755)?;
        like_below(&upper.dir, below.top()).map_err(store_error("make", &upper.dir))?;
        make(&upper.work, 0o700)?;
        let tree = below
            .open(Some(&upper))
            .map_err(|error| explained(error, &self.path))
            .map_err(store_error("mount the layers of", &self.path))?;

        let read = |source: io::Error| Error::Read {
            path: PathBuf::from(&layer.file),
            source,
        };
        let mut file = Hashing::new(Watched {
            inner: content,
            progress: self.progress,
            stop: self.stop,
        });
        let (found, rest) = {
            let mut input = BufReader::with_capacity(256 << 10, &mut file);
            let mut tar = Hashing::new(decompress(&mut input).map_err(read)?);
            let rest = unpack::unpack(&mut tar, tree, &layer.diff_id.to_string())?;
            // Padding after the end of the archive belongs to its digest.
            io::copy(&mut tar, &mut io::sink()).map_err(read)?;
            let found = tar.digest();
            io::copy(&mut input, &mut io::sink()).map_err(read)?;
            (found, rest)
        };
        compare("layer", &found, layer.diff_id.hex())?;
        if let Some(digest) = &layer.digest {
            compare("layer's file", &file.digest(), digest.hex())?;
        }
        let clean_up = || -> io::Result<()> {
            if let Some(trash) = rest.trash {
                without_trace(&upper.dir, &trash)?;
            }
            remove_tree(&upper.work)
        };
        clean_up().map_err(store_error("clean up", &self.path))
    }
}

fn make(path: &Path, mode: u32) -> Result<()> {
    let made = DirBuilder::new().mode(mode).create(path);
    made.map_err(store_error("make", path))
}

/// The mount shows the root directory of the uppermost layer: unless the layer says
/// otherwise it is as the one below.
fn like_below(dir: &Path, below: Option<&Path>) -> io::Result<()> {
    let Some(below) = below else {
        return fs::set_permissions(dir, fs::Permissions::from_mode(0o755));
    };
    let meta = fs::metadata(below)?;
    chown(dir, Some(meta.uid()), Some(meta.gid()))?;
    fs::set_permissions(dir, fs::Permissions::from_mode(meta.mode() & 0o7777))?;
    File::open(dir)?.set_modified(meta.modified()?)
}

/// Removes what was replaced, without a trace in the time of the root.
fn without_trace(root: &Path, trash: &str) -> io::Result<()> {
    let meta = fs::metadata(root)?;
    remove_tree(&root.join(trash))?;
    File::open(root)?.set_modified(meta.modified()?)
}

fn compare(what: &str, found: &str, expected: &str) -> Result<()> {
    if found == expected {
        return Ok(());
    }
    let expected = format!("sha256:{expected}");
    Err(Error::Digest {
        what: what.to_owned(),
        found: format!("sha256:{found}"),
        expected,
    })
}

/// The content of what may be compressed, by its first bytes: what media types say is
/// wrong often enough.
pub(crate) fn decompress<'a, R: io::BufRead + 'a>(mut input: R) -> io::Result<Box<dyn Read + 'a>> {
    let magic = input.fill_buf()?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input)))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) || is_skippable(magic) {
        Ok(Box::new(zstd::stream::read::Decoder::with_buffer(input)?))
    } else if magic.starts_with(b"\xfd7zXZ") || magic.starts_with(b"BZh") {
        Err(io::Error::other(
            "its compression is not supported; gzip, zstd and none are",
        ))
    } else {
        Ok(Box::new(input))
    }
}

/// A frame of zstd that holds no content (RFC 8878, 3.1.2); some files begin with one.
fn is_skippable(magic: &[u8]) -> bool {
    matches!(magic, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// Is this compressed, by its first bytes?
pub(crate) fn is_compressed(magic: &[u8]) -> bool {
    magic.starts_with(&[0x1f, 0x8b])
        || magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd])
        || is_skippable(magic)
        || magic.starts_with(b"\xfd7zXZ")
        || magic.starts_with(b"BZh")
}

/// Computes the SHA-256 of what is read.
struct Hashing<R> {
    inner: R,
    hash: Sha256,
}

impl<R> Hashing<R> {
    fn new(inner: R) -> Self {
        Hashing {
            inner,
            hash: Sha256::new(),
        }
    }

    fn digest(self) -> String {
        hex::encode(self.hash.finalize())
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.hash.update(buffer.get(..count).unwrap_or_default());
        Ok(count)
    }
}

/// Shows how far reading is, and ends it when it shall stop.
pub(crate) struct Watched<'a, R> {
    pub(crate) inner: R,
    pub(crate) progress: &'a dyn Progress,
    pub(crate) stop: &'a AtomicBool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(interrupted());
        }
        let count = self.inner.read(buffer)?;
        self.progress.read(u64::try_from(count).unwrap_or(0));
        Ok(count)
    }
}
