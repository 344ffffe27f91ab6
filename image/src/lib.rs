//! Images: read from a layout or an archive, verified, unpacked once, kept while
//! something needs them.
//!
//! Everything an image says is hostile: digests are compared before content is
//! used, and nothing that the image made leads out of it (`unpack.rs`).
//!
//! Read order: `lib.rs`, `archive.rs`, `layout.rs`, `store.rs`, `unpack.rs`.

mod archive;
mod layout;
mod remove;
mod stack;
mod store;
#[cfg(test)]
mod tests;
mod unpack;
pub mod users;

use std::{
    io,
    path::{Path, PathBuf},
    sync::atomic::AtomicBool,
};

pub use crate::{remove::remove_tree, store::collect};

use serde::Deserialize;
use thiserror::Error;

/// OVERLAYFS_SUPER_MAGIC of statfs(2).
const OVERLAYFS: rustix::fs::FsWord = 0x794c_7630;

/// The result of a step.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why an image cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// A file of the host or of an archive.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// Not one of the forms.
    #[error("{} is no image: {reason}; make one with `docker save` or `skopeo copy … oci-archive:FILE`", path.display())]
    NoImage {
        /// The file.
        path: PathBuf,
        /// What is missing.
        reason: String,
    },
    /// A document of the image that is refused.
    #[error("The image's {what} is refused: {reason}")]
    Document {
        /// Its name.
        what: String,
        /// Why.
        reason: String,
    },
    /// Content that is not what its digest says.
    #[error(
        "The image's {what} has the digest {found}, but should have {expected}; fetch the image again"
    )]
    Digest {
        /// Its name.
        what: String,
        /// As computed.
        found: String,
        /// As promised.
        expected: String,
    },
    /// An entry of a layer that is refused.
    #[error("Entry {name:?} of layer {layer} is refused: {reason}")]
    Entry {
        /// The layer's digest.
        layer: String,
        /// The entry's name.
        name: String,
        /// Why.
        reason: String,
    },
    /// A layer that cannot be unpacked.
    #[error("Cannot unpack layer {layer} ({action} {name:?})")]
    Unpack {
        /// The layer's digest.
        layer: String,
        /// What failed.
        action: &'static str,
        /// The entry.
        name: String,
        /// The cause.
        source: io::Error,
    },
    /// The store of layers.
    #[error("Cannot {action} {}", path.display())]
    Store {
        /// A verb.
        action: &'static str,
        /// The path.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The disk of the store is full.
    #[error(
        "No room is left for the image's layers on the disk of {}; make some, or remove containers with `bulkhead rm`",
        store.display()
    )]
    Full {
        /// The store.
        store: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A user that is not known.
    #[error("User {user:?} is refused: {reason}")]
    User {
        /// As given.
        user: String,
        /// Why.
        reason: String,
    },
}

impl Error {
    /// Tells of a full disk what it is, whatever it kept from being done.
    fn of_a_full(self, store: &Path) -> Self {
        use io::ErrorKind::{QuotaExceeded, StorageFull};
        match self {
            Error::Unpack { source, .. }
            | Error::Store { source, .. }
            | Error::Read { source, .. }
                if matches!(source.kind(), StorageFull | QuotaExceeded) =>
            {
                Error::Full {
                    store: store.to_owned(),
                    source,
                }
            }
            error => error,
        }
    }
}

/// Hears how far unpacking is. Nothing has to be done with it.
pub trait Progress: Sync {
    /// Another process unpacks; it is waited for.
    fn waiting(&self) {}
    /// So many bytes will be read.
    fn begin(&self, _bytes: u64) {}
    /// So many more were.
    fn read(&self, _bytes: u64) {}
    /// All is done.
    fn end(&self) {}
}

/// Nobody listens.
impl Progress for () {}

/// What an image says of the process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// First words of the command.
    pub entrypoint: Vec<String>,
    /// Further words, unless the caller gives others.
    pub cmd: Vec<String>,
    /// `USER[:GROUP]`, may be empty.
    pub user: String,
    /// May be empty.
    pub working_dir: String,
}

/// An image whose layers are unpacked.
#[derive(Clone, Debug)]
pub struct Image {
    /// Directories, lowest layer first.
    pub layers: Vec<PathBuf>,
    /// What it says of the process.
    pub config: Config,
}

/// Opens the image at `path`, and unpacks into `store` the layers it lacks.
/// Ends early once `stop` is set.
pub fn open(
    path: &Path,
    store: &Path,
    progress: &dyn Progress,
    stop: &AtomicBool,
) -> Result<Image> {
    let source = archive::Source::open(path, stop)?;
    let description = layout::describe(&source)?;
    let layers = store::provide(store, &source, &description, progress, stop)?;
    Ok(Image {
        layers,
        config: description.config,
    })
}

/// A digest of an image: SHA-256 only, which all builders write.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Deserialize)]
#[serde(try_from = "String")]
pub(crate) struct Digest {
    hex: String,
}

impl Digest {
    /// 64 hexadecimal digits: a safe name of a file.
    pub(crate) fn hex(&self) -> &str {
        &self.hex
    }
}

impl TryFrom<String> for Digest {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        let hex = text.strip_prefix("sha256:").unwrap_or_default();
        let lower = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        if hex.len() == 64 && hex.bytes().all(lower) {
            Ok(Digest {
                hex: hex.to_owned(),
            })
        } else {
            Err(format!(
                "{:?} is no SHA-256 digest",
                text.chars().take(100).collect::<String>()
            ))
        }
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "sha256:{}", self.hex)
    }
}
