//! The guest's kernel: what it is built from, and how.
//!
//! Owns the configuration (`fragments/`, a reason on each line), the one driver
//! that is ours (`driver/`), and the way from Debian's kernel source package to
//! a `vmlinux` that the VMM boots: [`ensure`].
//!
//! Promises:
//! - The same inputs give the same bytes, in whatever directory.
//! - A kernel that was built once is found again by the content of what went
//!   in, checked by its hash, without network.
//! - A required option is in the kernel, or the build fails and names it. If the
//!   newest version of the source does not yield one, older versions that the
//!   archive has are tried.
//!
//! Never touches the system: packages are fetched with private state of apt's
//! own, sources are unpacked below the cache, nothing is installed.

mod build;
mod cache;
mod command;
pub mod debian;
mod elf;
mod fragments;
mod source;

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::cache::Store;
use crate::debian::Mirror;
use crate::fragments::Lack;
use crate::source::Attempt;

/// Debian packages that a build needs, for whoever installs them.
pub const PACKAGES: &[&str] = &[
    "bc",
    "binutils",
    "bison",
    "debian-archive-keyring",
    "dpkg",
    "flex",
    "gcc",
    "libc6-dev",
    "libelf-dev",
    "make",
    "tar",
    "xz-utils",
];

/// Who wants to know how far a build is.
pub trait Progress {
    /// A new step begins; `text` says which, without a full stop.
    fn step(&self, text: &str);
    /// The present step has done `done` of about `total` equal parts.
    fn advance(&self, done: u64, total: u64);
}

/// A guest kernel in the cache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// The uncompressed ELF file. It carries no symbols; `System.map` and
    /// `config` lie beside it.
    pub path: PathBuf,
    /// Version as `uname -r` in the guest shows it.
    pub version: String,
    /// SHA-256 of the file, in hexadecimal digits.
    pub sha256: String,
    /// SHA-256 of the complete configuration, in hexadecimal digits.
    pub config_sha256: String,
    /// What a person should know about this build: one sentence each.
    pub notes: Vec<String>,
}

/// The guest kernel for the present fragments, driver and compiler: out of the
/// cache below the directory `cache`, or built now, which takes minutes.
///
/// # Errors
///
/// The compiler is missing, the source package cannot be had or is not signed
/// by Debian, no version of it yields a required option, or the compilation fails.
pub fn ensure(cache: &Path, progress: &dyn Progress) -> Result<Kernel> {
    let store = Store::open(&cache.join("guest-kernel"))?;
    let inputs = cache::inputs(&build::toolchain()?);
    if let Some(kernel) = store.find_inputs(&inputs)? {
        return Ok(kernel);
    }

    // 2 GiB of sources and objects.
    let work = store.scratch()?;
    progress.step("Looking for the kernel source");
    let mirror = Mirror::of_this_machine()?;
    let packages = source::versions(&mirror, &work.path().join("apt"))?;
    let log = store.path().join("build.log");
    source::first_that_serves(&packages, |package| {
        let key = cache::key(&inputs, &package.version);
        if let Some(kernel) = store.find_key(&inputs, &key)? {
            return Ok(Attempt::Done(kernel));
        }
        progress.step(&format!(
            "Fetching and unpacking {} {}",
            source::PACKAGE,
            package.version
        ));
        let place = store.scratch()?;
        let tree = package.unpack(place.path())?;
        progress.step("Configuring the guest kernel");
        let lacks = build::configure(&tree, &log)?;
        let (required, wished): (Vec<Lack>, _) = lacks.into_iter().partition(|lack| lack.required);
        if !required.is_empty() {
            return Ok(Attempt::Lacks(required));
        }
        let built = build::vmlinux(&tree, &log, progress)?;
        let wished = wished.into_iter().map(|lack| format!("A wish: {lack}"));
        let notes = package.note().into_iter().chain(wished).collect();
        Ok(Attempt::Done(store.add(&inputs, &key, &built, notes)?))
    })
}

/// Removes every kernel from the cache below the directory `cache`.
///
/// # Errors
///
/// A file cannot be removed.
pub fn forget(cache: &Path) -> Result<()> {
    let path = cache.join("guest-kernel");
    if path.try_exists()? {
        fs::remove_dir_all(&path).with_context(|| format!("Cannot remove {}", path.display()))?;
    }
    Ok(())
}

/// SHA-256 of a file, in hexadecimal digits.
fn sha256_of(path: &Path) -> Result<String> {
    use sha2::{Digest, Sha256};
    let describe = || format!("Cannot read {}", path.display());
    let mut file = File::open(path).with_context(describe)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        let n = std::io::Read::read(&mut file, &mut buffer).with_context(describe)?;
        if n == 0 {
            return Ok(hex::encode(hash.finalize()));
        }
        hash.update(&buffer[..n]);
    }
}
