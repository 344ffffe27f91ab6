//! Layers on disk: each unpacked once, below a directory named by its diff id.
//!
//! A layer appears whole or not at all: it is unpacked beside its place and renamed
//! when both digests were compared. One process unpacks at a time; what a killed
//! one left is removed by the next.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, BufReader, Read},
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use indicatif::{ProgressBar, ProgressFinish, ProgressStyle};
use sha2::{Digest as _, Sha256};

use super::{
    Error, Result,
    archive::Source,
    layout::{Description, Layer},
    unpack,
};

/// Prefix of what is not finished; no diff id begins so.
const UNFINISHED: &str = ".unpacking-";

/// The directories of an image's layers, lowest first.
pub(crate) fn provide(
    store: &Path,
    source: &Source,
    image: &Description,
    stop: &AtomicBool,
) -> Result<Vec<PathBuf>> {
    let place = |layer: &Layer| store.join(layer.diff_id.hex());
    let missing: Vec<&Layer> = image
        .layers
        .iter()
        .filter(|layer| !place(layer).is_dir())
        .collect();
    if !missing.is_empty() {
        let at = |action| {
            move |source| Error::Store {
                action,
                path: store.to_owned(),
                source,
            }
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(store)
            .map_err(at("make"))?;
        let lock = File::create(store.join(".lock")).map_err(at("lock"))?;
        // Released when `lock` is closed, also by the end of the process.
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::LockExclusive)
            .map_err(|error| at("lock")(error.into()))?;
        remove_unfinished(store).map_err(at("clean up"))?;
        let progress = progress(source, &missing)?;
        for layer in missing {
            if !place(layer).is_dir() {
                add(store, source, layer, &progress, stop)?;
            }
        }
    }
    Ok(image.layers.iter().map(place).collect())
}

fn remove_unfinished(store: &Path) -> io::Result<()> {
    for entry in fs::read_dir(store)? {
        let entry = entry?;
        if entry.file_name().to_string_lossy().starts_with(UNFINISHED) {
            fs::remove_dir_all(entry.path())?;
        }
    }
    Ok(())
}

/// A bar on standard error if that is a terminal, else nothing.
fn progress(source: &Source, layers: &[&Layer]) -> Result<ProgressBar> {
    let mut total = 0;
    for layer in layers {
        total += source.find(&layer.file)?.map_or(0, |(_, size)| size);
    }
    let bar = ProgressBar::new(total).with_finish(ProgressFinish::AndClear);
    if let Ok(style) = ProgressStyle::with_template("Unpacking {bar:30} {bytes}/{total_bytes}") {
        bar.set_style(style);
    }
    Ok(bar)
}

fn add(
    store: &Path,
    source: &Source,
    layer: &Layer,
    progress: &ProgressBar,
    stop: &AtomicBool,
) -> Result<()> {
    let Some((content, _)) = source.find(&layer.file)? else {
        let reason = format!("{} is missing from the image", layer.file);
        return Err(Error::Document {
            what: "layer".to_owned(),
            reason,
        });
    };
    let at = |action| {
        move |source| Error::Store {
            action,
            path: store.to_owned(),
            source,
        }
    };
    let unfinished = tempfile::Builder::new()
        .prefix(UNFINISHED)
        .tempdir_in(store)
        .map_err(at("make a directory in"))?;
    // Unless the layer says otherwise.
    fs::set_permissions(unfinished.path(), fs::Permissions::from_mode(0o755))
        .map_err(at("make a directory in"))?;
    let name = layer.diff_id.to_string();
    let read = |source: io::Error| Error::Read {
        path: PathBuf::from(&layer.file),
        source,
    };
    let mut file = Hashing::new(Watched {
        inner: content,
        progress,
        stop,
    });
    let found = {
        let mut input = BufReader::with_capacity(256 << 10, &mut file);
        let mut tar = Hashing::new(decompress(&mut input).map_err(read)?);
        unpack::unpack(&mut tar, unfinished.path(), &name)?;
        // Padding after the end of the archive belongs to its digest.
        io::copy(&mut tar, &mut io::sink()).map_err(read)?;
        let found = tar.digest();
        io::copy(&mut input, &mut io::sink()).map_err(read)?;
        found
    };
    compare("layer", &found, layer.diff_id.hex())?;
    if let Some(digest) = &layer.digest {
        compare("layer's file", &file.digest(), digest.hex())?;
    }
    let dir = File::open(unfinished.path()).map_err(at("sync"))?;
    rustix::fs::syncfs(&dir).map_err(|error| at("sync")(error.into()))?;
    fs::rename(unfinished.path(), store.join(layer.diff_id.hex()))
        .map_err(at("rename a layer in"))?;
    // It is elsewhere now; its guard finds nothing to remove.
    let _ = unfinished.keep();
    Ok(())
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

/// The tar in a layer's file, by its first bytes.
fn decompress<'a, R: io::BufRead + 'a>(mut input: R) -> io::Result<Box<dyn Read + 'a>> {
    let magic = input.fill_buf()?;
    if magic.starts_with(&[0x1f, 0x8b]) {
        Ok(Box::new(flate2::bufread::MultiGzDecoder::new(input)))
    } else if magic.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        Ok(Box::new(zstd::stream::read::Decoder::with_buffer(input)?))
    } else if magic.starts_with(b"\xfd7zXZ") || magic.starts_with(b"BZh") {
        Err(io::Error::other(
            "its compression is not supported; gzip, zstd and none are",
        ))
    } else {
        Ok(Box::new(input))
    }
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
struct Watched<'a, R> {
    inner: R,
    progress: &'a ProgressBar,
    stop: &'a AtomicBool,
}

impl<R: Read> Read for Watched<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.stop.load(Ordering::Relaxed) {
            return Err(io::Error::other("interrupted"));
        }
        let count = self.inner.read(buffer)?;
        self.progress.inc(u64::try_from(count).unwrap_or(0));
        Ok(count)
    }
}
