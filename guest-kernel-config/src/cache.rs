//! Kernels that were built before, found by the content of what went in.
//!
//! ```text
//! guest-kernel/
//!   inputs-<hash>.json   which kernel the inputs gave, so that nothing is asked of the network
//!   <key>/               vmlinux, System.map, config, kernel.json
//!   build.log            of the last build
//! ```
//!
//! The *inputs* are what this folder and this machine decide: fragments,
//! driver, compiler, the steps of the build. The *key* adds the version of the
//! source, which only the archive knows. An entry appears under its name when
//! it is complete, and is believed only if its hashes are right.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::build::{self, Built};
use crate::{Kernel, fragments, sha256_of};

/// The description of an entry, in it.
const DESCRIPTION: &str = "kernel.json";

/// How the names of directories begin that are gone when their process is.
const SCRATCH: &str = "new-";

/// What is written about an entry.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: String,
    sha256: String,
    config_sha256: String,
    notes: Vec<String>,
}

/// Which entry some inputs led to.
#[derive(Debug, Serialize, Deserialize)]
struct Pointer {
    key: String,
}

/// The folder with all entries, locked against other builds.
#[derive(Debug)]
pub(crate) struct Store {
    path: PathBuf,
    /// Released when dropped.
    _lock: File,
}

/// Hash over all that decides about the kernel but the version of its source.
pub(crate) fn inputs(toolchain: &str) -> String {
    let mut parts = vec![build::RECIPE, toolchain];
    for (name, text) in fragments::FRAGMENTS.iter().chain(build::DRIVER) {
        parts.extend([name, text]);
    }
    hash(&parts)
}

/// Name of the entry that `inputs` and one version of the source make.
pub(crate) fn key(inputs: &str, source_version: &str) -> String {
    hash(&[inputs, source_version])
}

/// Hash of texts, such that moving a boundary between them changes it.
fn hash(parts: &[&str]) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hex::encode(hash.finalize())
}

impl Store {
    /// Opens the folder, and waits while another process builds in it.
    pub(crate) fn open(path: &Path) -> Result<Store> {
        fs::create_dir_all(path).with_context(|| format!("Cannot make {}", path.display()))?;
        let lock = path.join("lock");
        let file =
            File::create(&lock).with_context(|| format!("Cannot make {}", lock.display()))?;
        file.lock()
            .with_context(|| format!("Cannot lock {}", lock.display()))?;
        let store = Store {
            path: path.to_owned(),
            _lock: file,
        };
        store.sweep()?;
        Ok(store)
    }

    /// A directory for something that is not an entry yet, removed when the
    /// result is dropped.
    pub(crate) fn scratch(&self) -> Result<TempDir> {
        tempfile::Builder::new()
            .prefix(SCRATCH)
            .tempdir_in(&self.path)
            .with_context(|| format!("Cannot make a directory in {}", self.path.display()))
    }

    /// Removes what builds left behind that were killed. The lock is ours, so
    /// nobody is at work in them.
    fn sweep(&self) -> Result<()> {
        let describe = || format!("Cannot clear {}", self.path.display());
        for entry in fs::read_dir(&self.path).with_context(describe)? {
            let entry = entry.with_context(describe)?;
            if entry.file_name().to_string_lossy().starts_with(SCRATCH) {
                fs::remove_dir_all(entry.path()).with_context(describe)?;
            }
        }
        Ok(())
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The kernel that `inputs` gave when they were last built.
    pub(crate) fn find_inputs(&self, inputs: &str) -> Result<Option<Kernel>> {
        let Some(Pointer { key }) = read_json(&self.pointer(inputs))? else {
            return Ok(None);
        };
        self.entry(&key)
    }

    /// The entry `key`, which `inputs` lead to from now on.
    pub(crate) fn find_key(&self, inputs: &str, key: &str) -> Result<Option<Kernel>> {
        let kernel = self.entry(key)?;
        if kernel.is_some() {
            self.point(inputs, key)?;
        }
        Ok(kernel)
    }

    /// Takes what was built into the cache.
    pub(crate) fn add(
        &self,
        inputs: &str,
        key: &str,
        built: &Built,
        notes: Vec<String>,
    ) -> Result<Kernel> {
        let new = self.scratch()?;
        for (file, name) in [
            (&built.vmlinux, build::VMLINUX),
            (&built.system_map, build::SYSTEM_MAP),
            (&built.config, build::CONFIG),
        ] {
            fs::copy(file, new.path().join(name))
                .with_context(|| format!("Cannot copy {}", file.display()))?;
        }
        let description = Description {
            version: built.version.clone(),
            sha256: sha256_of(&built.vmlinux)?,
            config_sha256: sha256_of(&built.config)?,
            notes,
        };
        write_json(&new.path().join(DESCRIPTION), &description)?;

        let entry = self.path.join(key);
        if entry.try_exists()? {
            // It was there and did not have the right hash.
            fs::remove_dir_all(&entry)
                .with_context(|| format!("Cannot remove {}", entry.display()))?;
        }
        fs::rename(new.keep(), &entry)
            .with_context(|| format!("Cannot make {}", entry.display()))?;
        self.point(inputs, key)?;
        self.entry(key)?
            .with_context(|| format!("{} changes while it is read", entry.display()))
    }

    /// The entry `key`, if it is there and what it says of itself is true.
    fn entry(&self, key: &str) -> Result<Option<Kernel>> {
        let entry = self.path.join(key);
        let Some(description) = read_json::<Description>(&entry.join(DESCRIPTION))? else {
            return Ok(None);
        };
        let path = entry.join(build::VMLINUX);
        let config = entry.join(build::CONFIG);
        if !path.exists()
            || !config.exists()
            || sha256_of(&path)? != description.sha256
            || sha256_of(&config)? != description.config_sha256
        {
            return Ok(None);
        }
        let Description {
            version,
            sha256,
            config_sha256,
            notes,
        } = description;
        Ok(Some(Kernel {
            path,
            version,
            sha256,
            config_sha256,
            notes,
        }))
    }

    fn pointer(&self, inputs: &str) -> PathBuf {
        self.path.join(format!("inputs-{inputs}.json"))
    }

    fn point(&self, inputs: &str, key: &str) -> Result<()> {
        write_json(
            &self.pointer(inputs),
            &Pointer {
                key: key.to_owned(),
            },
        )
    }
}

/// The content of a JSON file; none if it is absent or damaged.
fn read_json<T: for<'a> Deserialize<'a>>(path: &Path) -> Result<Option<T>> {
    match fs::read(path) {
        Ok(bytes) => Ok(serde_json::from_slice(&bytes).ok()),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("Cannot read {}", path.display())),
    }
}

fn write_json<T: Serialize>(path: &Path, value: &T) -> Result<()> {
    let bytes = serde_json::to_vec_pretty(value)?;
    fs::write(path, bytes).with_context(|| format!("Cannot write {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn built(directory: &Path) -> Built {
        let file = |name: &str| {
            let path = directory.join(name);
            fs::write(&path, name).unwrap();
            path
        };
        Built {
            vmlinux: file("vmlinux"),
            system_map: file("System.map"),
            config: file(".config"),
            version: "6.12.1".to_owned(),
        }
    }

    #[test]
    fn what_was_added_is_found_by_its_inputs_and_by_its_key() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("cache")).unwrap();
        assert_eq!(store.find_inputs("i").unwrap(), None);
        let kernel = store
            .add(
                "i",
                "k",
                &built(directory.path()),
                vec!["A note".to_owned()],
            )
            .unwrap();
        assert_eq!(kernel.version, "6.12.1");
        assert_eq!(kernel.notes, ["A note"]);
        assert_eq!(store.find_inputs("i").unwrap().as_ref(), Some(&kernel));
        assert_eq!(store.find_inputs("other").unwrap(), None);
        assert_eq!(
            store.find_key("other", "k").unwrap().as_ref(),
            Some(&kernel)
        );
        assert_eq!(store.find_inputs("other").unwrap().as_ref(), Some(&kernel));
    }

    #[test]
    fn a_kernel_with_the_wrong_hash_is_not_found_and_can_be_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(&directory.path().join("cache")).unwrap();
        let kernel = store
            .add("i", "k", &built(directory.path()), Vec::new())
            .unwrap();
        fs::write(&kernel.path, "vmlinuX").unwrap();
        assert_eq!(store.find_inputs("i").unwrap(), None);
        assert_eq!(
            store
                .add("i", "k", &built(directory.path()), Vec::new())
                .unwrap(),
            kernel
        );
        fs::write(directory.path().join("cache/k").join(DESCRIPTION), "{").unwrap();
        assert_eq!(store.find_inputs("i").unwrap(), None);
    }

    #[test]
    fn what_a_killed_build_left_is_removed() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let left = store.scratch().unwrap().keep();
        drop(store);
        assert!(left.exists());
        Store::open(directory.path()).unwrap();
        assert!(!left.exists());
    }

    #[test]
    fn the_key_depends_on_each_part_and_on_where_it_ends() {
        assert_ne!(key("a", "b"), key("a", "c"));
        assert_ne!(hash(&["ab", "c"]), hash(&["a", "bc"]));
        assert_ne!(inputs("gcc 12"), inputs("gcc 14"));
        assert_eq!(inputs("gcc 12"), inputs("gcc 12"));
    }
}
