//! What was made once and is found again by the hash of what went into it.
//!
//! ```text
//! $XDG_CACHE_HOME/bulkhead/
//!   <kind>/<key>/           the files, entry.json with the hash of each, and
//!                           checked.json, which says what was hashed
//!   <kind>/lock             held while an entry of the kind is made
//! ```
//!
//! An entry appears under its name, by a rename, when it is complete. It is
//! used only if its hashes are right; else it is made again. A file is hashed
//! again only when it is another one or has changed since. One entry of a kind
//! is kept: a new one takes the place of the others.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// The description of an entry, in it.
const DESCRIPTION: &str = "entry.json";

/// What was hashed last, in the entry.
const CHECKED: &str = "checked.json";

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
    key: String,
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

    /// The entry `key` of `kind`: found, or made by `make` in the empty
    /// directory that it is given. Other processes that want an entry of the
    /// kind wait meanwhile.
    ///
    /// # Errors
    ///
    /// `make` fails, or files cannot be written.
    pub fn entry(
        &self,
        kind: &str,
        key: &str,
        make: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<Entry> {
        let folder = self.path.join(kind);
        fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let lock = folder.join("lock");
        let lock =
            File::create(&lock).with_context(|| format!("Cannot make {}", lock.display()))?;
        lock.lock().context("Cannot lock the cache")?;

        let path = folder.join(key);
        if let Some(entry) = Entry::open(&path, key)? {
            return Ok(entry);
        }
        forget_unused(&folder)?;
        let new = tempfile::Builder::new()
            .prefix("new-")
            .tempdir_in(&folder)?;
        make(new.path())?;
        let mut sha256 = BTreeMap::new();
        for file in files(new.path())? {
            sha256.insert(file.clone(), sha256_of(&new.path().join(&file))?);
        }
        let bytes = serde_json::to_vec_pretty(&Description { sha256 })?;
        fs::write(new.path().join(DESCRIPTION), bytes)?;
        fs::rename(new.keep(), &path).with_context(|| format!("Cannot make {}", path.display()))?;
        Entry::open(&path, key)?
            .with_context(|| format!("{} changes while it is read", path.display()))
    }
}

impl Entry {
    /// The file `name` of the entry.
    #[must_use]
    pub fn file(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// The hash of what went into it.
    #[must_use]
    pub fn key(&self) -> &str {
        &self.key
    }

    /// The entry in `path`, if it is complete and its hashes are right.
    fn open(path: &Path, key: &str) -> Result<Option<Entry>> {
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
        if let Some(stamps) = &stamps
            && stamps != known
        {
            fs::write(&checked, serde_json::to_vec_pretty(stamps)?)
                .with_context(|| format!("Cannot write {}", checked.display()))?;
        }
        let right = stamps.is_some();
        Ok(right.then(|| Entry {
            path: path.to_owned(),
            key: key.to_owned(),
            _in_use: file,
        }))
    }
}

/// Removes the entries in `folder` that nobody uses, and what builds that were
/// interrupted left.
fn forget_unused(folder: &Path) -> Result<()> {
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let unused = path.is_dir()
            && File::open(path.join(DESCRIPTION)).map_or(true, |file| file.try_lock().is_ok());
        if unused {
            fs::remove_dir_all(&path)
                .with_context(|| format!("Cannot remove {}", path.display()))?;
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
pub(crate) fn sha256_of(path: &Path) -> Result<String> {
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

#[cfg(test)]
mod tests {
    use super::*;

    fn make(text: &'static str) -> impl FnOnce(&Path) -> Result<()> {
        move |path| {
            fs::create_dir(path.join("d"))?;
            Ok(fs::write(path.join("d/f"), text)?)
        }
    }

    fn read(entry: &Entry) -> String {
        fs::read_to_string(entry.file("d/f")).unwrap()
    }

    #[test]
    fn an_entry_is_made_once_and_again_when_its_hash_is_wrong() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let entry = cache.entry("kind", "k", make("one")).unwrap();
        assert_eq!(read(&entry), "one");
        drop(entry);
        let entry = cache.entry("kind", "k", make("two")).unwrap();
        assert_eq!(read(&entry), "one");
        fs::write(entry.file("d/f"), "bad").unwrap();
        drop(entry);
        assert_eq!(read(&cache.entry("kind", "k", make("two")).unwrap()), "two");
    }

    #[test]
    fn a_new_entry_takes_the_place_of_those_that_nobody_uses() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        drop(cache.entry("kind", "old", make("old")).unwrap());
        let used = cache.entry("kind", "used", make("used")).unwrap();
        assert!(!directory.path().join("kind/old").exists());
        drop(cache.entry("kind", "new", make("new")).unwrap());
        assert_eq!(read(&used), "used");
    }

    #[test]
    fn a_build_that_fails_leaves_no_entry() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(directory.path()).unwrap();
        let fails = |_: &Path| anyhow::bail!("No");
        assert!(cache.entry("kind", "k", fails).is_err());
        let names: Vec<_> = fs::read_dir(directory.path().join("kind"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name())
            .collect();
        assert_eq!(names, ["lock"]);
    }

    #[test]
    fn a_key_depends_on_each_part_and_on_where_it_ends() {
        assert_ne!(key(["ab", "c"]), key(["a", "bc"]));
        assert_eq!(key(["ab", "c"]), key(["ab", "c"]));
    }
}
