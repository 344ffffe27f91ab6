//! What was made once and is found again by the hash of what went into it.
//!
//! ```text
//! $XDG_CACHE_HOME/bulkhead/
//!   <kind>/<key>/           the files, entry.json with the hash of each, and
//!                           checked.json, which says what was hashed
//!   <kind>/new-<key>/       locked by whoever makes the entry
//!   <kind>/lock             held while the kind's list of entries changes
//! ```
//!
//! An entry appears under its name, by a rename, when it is complete. It is
//! used only if its hashes are right; else it is made again. A file is hashed
//! again only when it is another one or has changed since. Of each kind the
//! [`KEPT`] entries are kept that were used last, so that checkouts of several
//! branches do not take each other's away; nor do they wait for each other, but
//! for an entry that both want.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::Progress;

#[cfg(test)]
mod tests;

/// The description of an entry, in it.
const DESCRIPTION: &str = "entry.json";

/// How many entries of a kind are kept, beside those that are in use.
pub const KEPT: usize = 6;

/// What was hashed last, in the entry. Its own time says when the entry was used.
const CHECKED: &str = "checked.json";

/// How the names of directories begin in which an entry is being made.
const NEW: &str = "new-";

/// The lock of a kind, and of anything else that a directory of the cache is.
pub const LOCK: &str = "lock";

/// What tells a file from every other, and from itself before a change, by its path in
/// the entry.
type Stamps = BTreeMap<String, [u64; 7]>;

/// SHA-256 of each file of an entry, by its path in it.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    sha256: BTreeMap<String, String>,
}

/// The project's cache directory.
#[derive(Clone, Debug)]
pub struct Cache {
    path: PathBuf,
}

/// A complete entry whose hashes are right. It stays while this lives.
#[derive(Debug)]
pub struct Entry {
    path: PathBuf,
    content: String,
    /// A shared lock on the description: whoever removes entries spares it.
    _in_use: File,
}

impl Cache {
    /// `$XDG_CACHE_HOME/bulkhead`, or `~/.cache/bulkhead`.
    ///
    /// # Errors
    ///
    /// Neither variable is set, or the directory cannot be made.
    pub fn of_this_user() -> Result<Cache> {
        let base = match std::env::var_os("XDG_CACHE_HOME").filter(|value| !value.is_empty()) {
            Some(base) => PathBuf::from(base),
            None => PathBuf::from(
                std::env::var_os("HOME")
                    .context("Neither XDG_CACHE_HOME nor HOME says where the cache is")?,
            )
            .join(".cache"),
        };
        Cache::at(&base.join("bulkhead"))
    }

    /// The cache in the directory `path`.
    ///
    /// # Errors
    ///
    /// The directory cannot be made.
    pub fn at(path: &Path) -> Result<Cache> {
        fs::create_dir_all(path).with_context(|| format!("Cannot make {}", path.display()))?;
        Ok(Cache {
            path: path.to_owned(),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The entry `key` of `kind`, if it is there and right.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub fn find(&self, kind: &str, key: &str) -> Result<Option<Entry>> {
        Entry::open(&self.path.join(kind).join(key))
    }

    /// The entry `key` of `kind`: found, or made by `make` in the first of the two
    /// empty directories that it is given; the second one is for its own use. Whoever
    /// wants the same entry meanwhile waits.
    ///
    /// # Errors
    ///
    /// `make` fails, or files cannot be written.
    pub fn entry(
        &self,
        kind: &str,
        key: &str,
        progress: &dyn Progress,
        make: impl FnOnce(&Path, &Path) -> Result<()>,
    ) -> Result<Entry> {
        let folder = self.path.join(kind);
        fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let path = folder.join(key);
        let new = loop {
            let locked = lock(&folder.join(LOCK))?;
            if let Some(entry) = Entry::open(&path)? {
                return Ok(entry);
            }
            match New::begin(&folder, key)? {
                Ok(new) => {
                    // What is there under this name is incomplete, or not as it was made.
                    forget(&folder, KEPT - 1, Some(&path))?;
                    break new;
                }
                Err(other) => {
                    drop(locked);
                    progress.step(&format!("Waiting for {kind}, which is being made"));
                    other.lock_shared().context("Cannot wait for an entry")?;
                }
            }
        };
        make(&new.entry(), &new.work())?;
        let mut sha256 = BTreeMap::new();
        for file in files(&new.entry())? {
            sha256.insert(file.clone(), sha256_of(&new.entry().join(&file))?);
        }
        let bytes = serde_json::to_vec_pretty(&Description { sha256 })?;
        fs::write(new.entry().join(DESCRIPTION), bytes)?;
        let folder = lock(&folder.join(LOCK))?;
        fs::rename(new.entry(), &path)
            .with_context(|| format!("Cannot make {}", path.display()))?;
        drop(folder);
        Entry::open(&path)?.with_context(|| format!("{} changes while it is read", path.display()))
    }

    /// Removes of every kind all entries but the `kept` ones that were used last, and
    /// those that are in use. What else lies in the cache goes if `kept` is none.
    ///
    /// # Errors
    ///
    /// A file cannot be removed.
    pub fn prune(&self, kept: usize) -> Result<()> {
        for child in fs::read_dir(&self.path)? {
            let path = child?.path();
            if !path.is_dir() {
                if kept == 0 {
                    remove(&path)?;
                }
                continue;
            }
            let _locked = lock(&path.join(LOCK))?;
            forget(&path, kept, None)?;
            if kept > 0 {
                continue;
            }
            for child in fs::read_dir(&path)? {
                let child = child?.path();
                let entry = child.join(DESCRIPTION).exists();
                if !entry && !child.ends_with(LOCK) && !is_in_use(&child) {
                    remove(&child)?;
                }
            }
        }
        Ok(())
    }
}

/// Locks the file `path`, which is made if need be.
///
/// # Errors
///
/// It cannot be made.
pub fn lock(path: &Path) -> Result<File> {
    let file = File::create(path).with_context(|| format!("Cannot make {}", path.display()))?;
    file.lock()
        .with_context(|| format!("Cannot lock {}", path.display()))?;
    Ok(file)
}

/// Whether somebody has locked the directory `path` or the lock in it.
fn is_in_use(path: &Path) -> bool {
    [path.to_owned(), path.join(LOCK)]
        .iter()
        .any(|path| File::open(path).is_ok_and(|file| file.try_lock().is_err()))
}

/// Removes a file or a directory with all that is in it.
fn remove(path: &Path) -> Result<()> {
    let removed = if path.is_dir() && !path.is_symlink() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.with_context(|| format!("Cannot remove {}", path.display()))
}

/// The directory in which an entry is made; it is gone when this is.
#[derive(Debug)]
struct New {
    path: PathBuf,
    /// A lock on the directory itself: without it, it was left by a process that was
    /// killed.
    _lock: File,
}

impl New {
    /// Begins an entry, or gives the directory in which another process makes it. The
    /// folder is locked by whoever calls.
    fn begin(folder: &Path, key: &str) -> Result<std::result::Result<New, File>> {
        let path = folder.join(format!("{NEW}{key}"));
        if let Ok(other) = File::open(&path) {
            if other.try_lock().is_err() {
                return Ok(Err(other));
            }
            remove(&path)?;
        }
        fs::create_dir(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        let lock = File::open(&path)?;
        lock.lock().context("Cannot lock an entry of the cache")?;
        let new = New { path, _lock: lock };
        for directory in [new.entry(), new.work()] {
            fs::create_dir(&directory)
                .with_context(|| format!("Cannot make {}", directory.display()))?;
        }
        Ok(Ok(new))
    }

    fn entry(&self) -> PathBuf {
        self.path.join("entry")
    }

    fn work(&self) -> PathBuf {
        self.path.join("work")
    }
}

impl Drop for New {
    fn drop(&mut self) {
        // What cannot be removed now is removed by the next one.
        let _ = fs::remove_dir_all(&self.path);
    }
}

impl Entry {
    /// The file `name` of the entry.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Hash of all its files: what is made from it or on it is named by this.
    #[must_use]
    pub fn content(&self) -> &str {
        &self.content
    }

    /// The entry in `path`, if it is complete and its hashes are right.
    fn open(path: &Path) -> Result<Option<Entry>> {
        let Ok(mut file) = File::open(path.join(DESCRIPTION)) else {
            return Ok(None);
        };
        file.lock_shared().context("Cannot lock a cache entry")?;
        let mut text = String::new();
        file.read_to_string(&mut text)?;
        let Ok(Description { sha256 }) = serde_json::from_str(&text) else {
            return Ok(None);
        };
        let checked = path.join(CHECKED);
        let known = fs::read(&checked).unwrap_or_default();
        let known: Stamps = serde_json::from_slice(&known).unwrap_or_default();
        let known = &known;
        // Some files have a gigabyte: all processors share the work.
        let stamps = std::thread::scope(|scope| {
            let checks: Vec<_> = sha256
                .iter()
                .map(|(name, right)| {
                    scope.spawn(move || {
                        let file = path.join(name);
                        let stamp = stamp_of(&file).ok()?;
                        let good = known.get(name) == Some(&stamp)
                            || sha256_of(&file).is_ok_and(|is| is == *right);
                        good.then(|| (name.clone(), stamp))
                    })
                })
                .collect();
            let joined = checks.into_iter().map(|check| check.join().ok().flatten());
            joined.collect::<Option<Stamps>>()
        });
        if let Some(stamps) = &stamps {
            fs::write(&checked, serde_json::to_vec_pretty(stamps)?)
                .with_context(|| format!("Cannot write {}", checked.display()))?;
        }
        let right = stamps.is_some();
        Ok(right.then(|| Entry {
            path: path.to_owned(),
            content: key(sha256.iter().flat_map(|(name, hash)| [name.as_str(), hash])),
            _in_use: file,
        }))
    }
}

/// Removes the entry `damaged`, the entries in `folder` that nobody uses but the
/// `kept` ones that were used last, and what was left when an entry was not
/// completed. The folder is locked by whoever calls.
fn forget(folder: &Path, kept: usize, damaged: Option<&Path>) -> Result<()> {
    let mut entries = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(NEW) {
            if !is_in_use(&path) {
                remove(&path)?;
            }
            continue;
        }
        let Ok(description) = File::open(path.join(DESCRIPTION)) else {
            continue;
        };
        if description.try_lock().is_err() {
            continue;
        }
        let used = fs::metadata(path.join(CHECKED)).and_then(|file| file.modified());
        // One that was never opened is damaged, too.
        let used = used.ok().filter(|_| damaged != Some(&path));
        entries.push((used, path, description));
    }
    entries.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
    for (place, (used, path, _lock)) in entries.iter().enumerate() {
        if used.is_none() || place >= kept {
            remove(path)?;
        }
    }
    Ok(())
}

/// All files below `path`, by their paths in it.
fn files(path: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(path.join(&folder))? {
            let entry = entry?;
            let name = folder.join(entry.file_name());
            if entry.file_type()?.is_dir() {
                folders.push(name);
            } else {
                let name = name.into_os_string().into_string();
                found.push(name.map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?);
            }
        }
    }
    Ok(found)
}

/// Hash of texts, such that moving a boundary between them changes it.
#[must_use]
pub fn key<'a>(parts: impl IntoIterator<Item = &'a str>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

/// Device, inode, size, and the times of the last changes of content and of inode.
fn stamp_of(path: &Path) -> Result<[u64; 7]> {
    let is = fs::metadata(path).with_context(|| format!("Cannot read {}", path.display()))?;
    let times = [is.mtime(), is.mtime_nsec(), is.ctime(), is.ctime_nsec()];
    let [content, content_ns, inode, inode_ns] = times.map(i64::cast_unsigned);
    Ok([
        is.dev(),
        is.ino(),
        is.size(),
        content,
        content_ns,
        inode,
        inode_ns,
    ])
}

/// SHA-256 of a file, in hexadecimal digits.
///
/// # Errors
///
/// The file cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let describe = || format!("Cannot read {}", path.display());
    let mut file = File::open(path).with_context(describe)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = file.read(&mut buffer).with_context(describe)?;
        if n == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}
