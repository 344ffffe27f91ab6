//! The guest's kernel and root image: opened, and their hashes compared.
//!
//! A file is hashed once for each state it is in: a stamp in the run-time
//! directory remembers device, inode, size and both times of what was verified, so
//! that the next start only looks at these. The descriptor that was compared is
//! the one that is handed on.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::OwnedFd,
        unix::fs::{MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use bulkhead_vmm::assets::{Asset, MANIFEST, Manifest};
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Largest manifest, in bytes.
const MAX_MANIFEST: u64 = 64 << 10;

/// Assets that cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// A file that cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The manifest is not understood.
    #[error("{} is not a manifest: {reason}", path.display())]
    Manifest {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// The content is not what was built.
    #[error("{} has the SHA-256 {found}, its manifest says {expected}", path.display())]
    Hash {
        /// The file.
        path: PathBuf,
        /// What it has.
        found: String,
        /// What it should have.
        expected: String,
    },
}

/// Verified files, opened for reading.
#[derive(Debug)]
pub struct Assets {
    /// The kernel.
    pub kernel: OwnedFd,
    /// The root image.
    pub root: OwnedFd,
}

impl Assets {
    /// Opens and verifies the assets in `dir`; stamps are kept in `stamps`.
    pub fn open(dir: &Path, stamps: &Path) -> Result<Self, Error> {
        let path = dir.join(MANIFEST);
        let mut text = Vec::new();
        let file = open(&path)?;
        file.take(MAX_MANIFEST)
            .read_to_end(&mut text)
            .map_err(|source| Error::Read {
                path: path.clone(),
                source,
            })?;
        let wrong = |reason: String| Error::Manifest {
            path: path.clone(),
            reason,
        };
        let manifest: Manifest =
            serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        for asset in [&manifest.kernel, &manifest.root] {
            if asset.file.is_empty() || asset.file.contains('/') || asset.file.starts_with('.') {
                return Err(wrong(format!(
                    "{:?} is not the name of a file beside it",
                    asset.file
                )));
            }
        }
        Ok(Assets {
            kernel: verified(dir, &manifest.kernel, stamps)?,
            root: verified(dir, &manifest.root, stamps)?,
        })
    }
}

fn open(path: &Path) -> Result<File, Error> {
    let read = |source| Error::Read {
        path: path.to_owned(),
        source,
    };
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let file = File::options()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map_err(read)?;
    let meta = file.metadata().map_err(read)?;
    if !meta.is_file() {
        return Err(read(io::Error::other("it is not a regular file")));
    }
    Ok(file)
}

fn verified(dir: &Path, asset: &Asset, stamps: &Path) -> Result<OwnedFd, Error> {
    let path = dir.join(&asset.file);
    let read = |source| Error::Read {
        path: path.clone(),
        source,
    };
    let mut file = open(&path)?;
    let meta = file.metadata().map_err(read)?;
    let state = format!(
        "{}:{} {} {}.{} {}.{} {}",
        meta.dev(),
        meta.ino(),
        meta.size(),
        meta.mtime(),
        meta.mtime_nsec(),
        meta.ctime(),
        meta.ctime_nsec(),
        asset.sha256
    );
    let stamp = stamps.join(format!(
        "verified-{}",
        asset.sha256.get(..32).unwrap_or("short")
    ));
    if fs::read_to_string(&stamp).is_ok_and(|seen| seen == state) {
        return Ok(file.into());
    }
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match file.read(&mut buffer).map_err(read)? {
            0 => break,
            count => hash.update(buffer.get(..count).unwrap_or_default()),
        }
    }
    let found = hex::encode(hash.finalize());
    if !found.eq_ignore_ascii_case(&asset.sha256) {
        return Err(Error::Hash {
            path,
            found,
            expected: asset.sha256.clone(),
        });
    }
    // Without a stamp the next start hashes again; that is all. A file changed
    // while it was read has another ctime by now.
    if asset.sha256.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        let _ = crate::statedir::replace(&stamp, state.as_bytes());
    }
    io::Seek::rewind(&mut file).map_err(read)?;
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Dir {
        assets: tempfile::TempDir,
        stamps: tempfile::TempDir,
    }

    fn dir() -> Dir {
        let dir = Dir {
            assets: tempfile::tempdir().unwrap(),
            stamps: tempfile::tempdir().unwrap(),
        };
        fs::write(dir.assets.path().join("vmlinux"), b"kernel").unwrap();
        fs::write(dir.assets.path().join("root"), b"image").unwrap();
        let hash = |bytes: &[u8]| hex::encode(Sha256::digest(bytes));
        let manifest = serde_json::json!({
            "kernel": {"file": "vmlinux", "sha256": hash(b"kernel"), "version": "6.12.1"},
            "root": {"file": "root", "sha256": hash(b"image")},
            "kernel_config_sha256": "00",
        });
        fs::write(dir.assets.path().join(MANIFEST), manifest.to_string()).unwrap();
        dir
    }

    fn text(dir: &Dir) -> String {
        let error = Assets::open(dir.assets.path(), dir.stamps.path()).unwrap_err();
        let cause = std::error::Error::source(&error).map(ToString::to_string);
        format!("{error} {}", cause.unwrap_or_default())
    }

    #[test]
    fn good_assets_are_verified_once_and_read_from_the_start() {
        let dir = dir();
        for _ in 0..2 {
            let assets = Assets::open(dir.assets.path(), dir.stamps.path()).unwrap();
            let mut content = String::new();
            File::from(assets.kernel)
                .read_to_string(&mut content)
                .unwrap();
            assert_eq!(content, "kernel");
        }
        assert_eq!(fs::read_dir(dir.stamps.path()).unwrap().count(), 2);
    }

    #[test]
    fn a_missing_kernel_is_named_f32() {
        let dir = dir();
        fs::remove_file(dir.assets.path().join("vmlinux")).unwrap();
        let text = text(&dir);
        assert!(
            text.contains("vmlinux") && text.contains("No such file"),
            "{text}"
        );
    }

    #[test]
    fn a_changed_kernel_is_refused_even_after_it_was_verified_f32() {
        let dir = dir();
        Assets::open(dir.assets.path(), dir.stamps.path()).unwrap();
        fs::write(dir.assets.path().join("vmlinux"), b"KERNEL").unwrap();
        let text = text(&dir);
        assert!(
            text.contains(&hex::encode(Sha256::digest(b"kernel"))),
            "{text}"
        );
        assert!(text.contains("vmlinux"), "{text}");
    }

    #[test]
    fn a_manifest_cannot_point_elsewhere() {
        let dir = dir();
        let path = dir.assets.path().join(MANIFEST);
        let manifest = fs::read_to_string(&path)
            .unwrap()
            .replace("\"root\":{\"file\":\"root\"", "\"root\":{\"file\":\"../x\"");
        fs::write(&path, manifest).unwrap();
        assert!(text(&dir).contains("../x"));
    }
}
