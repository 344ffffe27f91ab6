//! The directory of guest assets and its manifest.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::Serialize;

use super::{Image, sha256};
use crate::Kernel;

/// File names in the directory.
const MANIFEST: &str = "manifest.json";
const KERNEL: &str = "vmlinux";
const ROOT: &str = "guest-root.cpio";

/// The form that `bulkhead_vmm::assets::Manifest` reads.
#[derive(Debug, Serialize)]
struct Manifest<'a> {
    kernel: Asset<'a>,
    root: Asset<'a>,
    kernel_config_sha256: &'a str,
    /// For people: the versions of what all this was made from.
    inputs: BTreeMap<&'a str, &'a str>,
    /// For people: what is special about this build.
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    notes: &'a [String],
}

#[derive(Debug, Serialize)]
struct Asset<'a> {
    file: &'a str,
    sha256: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<&'a str>,
}

/// Copies `kernel` and `image` into the directory `dir`, which is made if
/// need be, and writes `manifest.json` beside them; `rustc` is what the compiler of
/// the agent says of its version. Each file appears complete
/// under its name, the manifest last.
///
/// # Errors
///
/// A file cannot be read or written, or no longer has the hash that it had when
/// it was built.
pub fn write_manifest(dir: &Path, kernel: &Kernel, image: &Image, rustc: &str) -> Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    copy(&kernel.path, &kernel.sha256, dir, KERNEL)?;
    copy(&image.path, &image.sha256, dir, ROOT)?;
    let inputs = kernel.inputs.iter();
    let inputs = inputs.map(|(name, version)| (name.as_str(), version.as_str()));
    let manifest = Manifest {
        kernel: Asset {
            file: KERNEL,
            sha256: &kernel.sha256,
            version: Some(&kernel.version),
        },
        root: Asset {
            file: ROOT,
            sha256: &image.sha256,
            version: None,
        },
        kernel_config_sha256: &kernel.config_sha256,
        inputs: inputs.chain([("rustc", rustc)]).collect(),
        notes: &kernel.notes,
    };
    let mut text = serde_json::to_string_pretty(&manifest)?;
    text.push('\n');
    put(dir, MANIFEST, text.as_bytes())
}

fn copy(from: &Path, expected: &str, dir: &Path, name: &str) -> Result<()> {
    let bytes = fs::read(from).with_context(|| format!("Cannot read {}", from.display()))?;
    ensure!(
        sha256(&bytes) == expected,
        "{} has changed since it was built: its SHA-256 is not {expected}",
        from.display()
    );
    put(dir, name, &bytes)
}

/// Writes a file under another name first, so that a reader sees the old one or
/// the new one.
fn put(dir: &Path, name: &str, bytes: &[u8]) -> Result<()> {
    let path = dir.join(name);
    let new = dir.join(format!("{name}.new"));
    fs::write(&new, bytes).with_context(|| format!("Cannot write {}", new.display()))?;
    fs::rename(&new, &path).with_context(|| format!("Cannot write {}", path.display()))
}
