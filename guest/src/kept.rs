//! Kernels in the cache.
//!
//! ```text
//! guest-kernel/
//!   inputs-<hash>.json   which kernel the inputs gave, so that nothing is asked of the network
//!   <key>/               vmlinux, System.map, config, kernel.json
//!   build-<hash>.log     of the last build
//! ```
//!
//! The *inputs* are what this folder and this machine decide: fragments,
//! driver, patches, compiler, the steps of the build. The *key* adds the version of the
//! source, which only the archive knows.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::build::{self, Built};
use crate::cache::{self, Cache, Entry, sha256_of};
use crate::{Kernel, fragments};

/// The kind of the entries.
pub(crate) const KIND: &str = "guest-kernel";

/// The description of a kernel, in its entry.
const DESCRIPTION: &str = "kernel.json";

/// What is written about a kernel.
#[derive(Debug, Serialize, Deserialize)]
struct Description {
    version: String,
    sha256: String,
    config_sha256: String,
    inputs: BTreeMap<String, String>,
    notes: Vec<String>,
}

/// Which entry some inputs led to.
#[derive(Debug, Serialize, Deserialize)]
struct Pointer {
    key: String,
}

/// Hash over all that decides about the kernel but the version of its source.
pub(crate) fn inputs(toolchain: &BTreeMap<String, String>) -> String {
    let versions = toolchain.values().map(|version| format!("{version}\n"));
    let versions: String = versions.collect();
    let mut parts = vec![build::RECIPE, &versions];
    let texts = fragments::FRAGMENTS.iter().chain(build::DRIVER);
    for (name, text) in texts.chain(build::PATCHES) {
        parts.extend([name, text]);
    }
    cache::key(parts)
}

/// Name of the entry that `inputs` and one version of the source make.
pub(crate) fn key(inputs: &str, source_version: &str) -> String {
    cache::key([inputs, source_version])
}

/// Where the output of a build goes.
pub(crate) fn log(cache: &Cache, inputs: &str) -> Result<PathBuf> {
    let folder = folder(cache)?;
    Ok(folder.join(format!("build-{inputs}.log")))
}

fn folder(cache: &Cache) -> Result<PathBuf> {
    let folder = cache.path().join(KIND);
    fs::create_dir_all(&folder).with_context(|| format!("Cannot make {}", folder.display()))?;
    Ok(folder)
}

fn pointer(cache: &Cache, inputs: &str) -> Result<PathBuf> {
    Ok(folder(cache)?.join(format!("inputs-{inputs}.json")))
}

/// The kernel that `inputs` gave when they were last built.
pub(crate) fn find_inputs(cache: &Cache, inputs: &str) -> Result<Option<Kernel>> {
    let Some(Pointer { key }) = read_json(&pointer(cache, inputs)?)? else {
        return Ok(None);
    };
    let entry = cache.find(KIND, &key)?;
    entry.map(|entry| read(&entry)).transpose()
}

/// From now on `inputs` lead to the entry `key`.
pub(crate) fn point(cache: &Cache, inputs: &str, key: &str) -> Result<()> {
    let key = key.to_owned();
    write_json(&pointer(cache, inputs)?, &Pointer { key })
}

/// Puts what was built into the new entry `entry`.
pub(crate) fn keep(
    entry: &Path,
    built: &Built,
    inputs: BTreeMap<String, String>,
    notes: Vec<String>,
) -> Result<()> {
    for (file, name) in [
        (&built.vmlinux, build::VMLINUX),
        (&built.system_map, build::SYSTEM_MAP),
        (&built.config, build::CONFIG),
    ] {
        fs::copy(file, entry.join(name))
            .with_context(|| format!("Cannot copy {}", file.display()))?;
    }
    let description = Description {
        version: built.version.clone(),
        sha256: sha256_of(&built.vmlinux)?,
        config_sha256: sha256_of(&built.config)?,
        inputs,
        notes,
    };
    write_json(&entry.join(DESCRIPTION), &description)
}

/// The kernel in an entry.
pub(crate) fn read(entry: &Entry) -> Result<Kernel> {
    let description = entry.file(DESCRIPTION);
    let Description {
        version,
        sha256,
        config_sha256,
        inputs,
        notes,
    } = read_json(&description)?
        .with_context(|| format!("{} is damaged", description.display()))?;
    Ok(Kernel {
        path: entry.file(build::VMLINUX),
        version,
        sha256,
        config_sha256,
        inputs,
        notes,
    })
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
    use crate::Progress;

    struct Silent;

    impl Progress for Silent {
        fn step(&self, _: &str) {}

        fn advance(&self, _: u64, _: u64) {}
    }

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

    fn gcc(version: &str) -> BTreeMap<String, String> {
        BTreeMap::from([("gcc".to_owned(), version.to_owned())])
    }

    #[test]
    fn a_kernel_is_found_by_the_inputs_that_led_to_it_as_long_as_it_is_unharmed() {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::at(&directory.path().join("cache")).unwrap();
        assert_eq!(find_inputs(&cache, "i").unwrap(), None);
        let entry = cache.entry(KIND, "k", &Silent, |entry, work| {
            keep(entry, &built(work), gcc("12"), vec!["A note".to_owned()])
        });
        let kernel = read(&entry.unwrap()).unwrap();
        assert_eq!(kernel.version, "6.12.1");
        assert_eq!(kernel.notes, ["A note"]);
        assert_eq!(kernel.inputs["gcc"], "12");
        point(&cache, "i", "k").unwrap();
        assert_eq!(find_inputs(&cache, "i").unwrap().as_ref(), Some(&kernel));
        assert_eq!(find_inputs(&cache, "other").unwrap(), None);
        fs::write(&kernel.path, "vmlinuX").unwrap();
        assert_eq!(find_inputs(&cache, "i").unwrap(), None);
    }

    #[test]
    fn the_inputs_depend_on_the_compiler() {
        assert_ne!(inputs(&gcc("12")), inputs(&gcc("14")));
        assert_eq!(inputs(&gcc("12")), inputs(&gcc("12")));
        assert_ne!(key("a", "b"), key("a", "c"));
    }
}
