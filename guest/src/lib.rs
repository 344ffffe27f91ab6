//! The guest's kernel: what it is built from, and how.
//!
//! Owns the configuration (`fragments/`, a reason on each line), the two drivers
//! that are ours (`driver/`), and the way from Debian's kernel source package to
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
//! The lab host and its images are made by the same means, which are public: the
//! [`cache`] with its entries, Debian's archive ([`debian`]), [`command`]s.
//!
//! Never touches the system: packages are fetched with private state of apt's
//! own, sources are unpacked below the cache, nothing is installed.

mod build;
pub mod cache;
pub mod command;
pub mod cpio;
pub mod debian;
mod elf;
mod fragments;
mod kept;
pub mod root;
mod source;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::cache::Cache;
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
    "patch",
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
    /// What went into it: the source package, the compiler, the linker, and the version
    /// of each.
    pub inputs: BTreeMap<String, String>,
    /// What a person should know about this build: one sentence each.
    pub notes: Vec<String>,
}

/// The guest kernel for the present fragments, driver, patches and compiler: out of the
/// `cache`, or built now, which takes minutes.
///
/// # Errors
///
/// The compiler is missing, the source package cannot be had or is not signed
/// by Debian, no version of it yields a required option, or the compilation fails.
pub fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Kernel> {
    let toolchain = build::toolchain()?;
    let inputs = kept::inputs(&toolchain);
    if let Some(kernel) = kept::find_inputs(cache, &inputs)? {
        return Ok(kernel);
    }
    progress.step("Looking for the kernel source");
    let mirror = Mirror::of_this_machine()?;
    let apt = tempfile::tempdir()?;
    let packages = source::versions(&mirror, apt.path())?;
    let log = kept::log(cache, &inputs)?;
    source::first_that_serves(&packages, |package| {
        let mut required = Vec::new();
        let key = kept::key(&inputs, &package.version);
        let entry = cache.entry(kept::KIND, &key, progress, |entry, work| {
            progress.step(&format!(
                "Fetching and unpacking {} {}",
                source::PACKAGE,
                package.version
            ));
            // 2 GiB of sources and objects.
            let tree = package.unpack(work)?;
            progress.step("Configuring the guest kernel");
            let unfit = build::patch(&tree)?;
            let lacks = build::configure(&tree, &log)?;
            let wished;
            (required, wished) = lacks.into_iter().partition(|lack| lack.required);
            ensure!(required.is_empty(), "A required option is lacking");
            let built = build::vmlinux(&tree, &log, progress)?;
            let mut went_in = toolchain.clone();
            went_in.insert(source::PACKAGE.to_owned(), package.version.clone());
            let wished: Vec<Lack> = wished;
            let wished = wished.iter().map(|lack| format!("A wish: {lack}"));
            let unfit = unfit
                .iter()
                .map(|name| format!("The patch {name} does not fit this version and is left out"));
            let notes = package.note().into_iter().chain(wished).chain(unfit);
            kept::keep(entry, &built, went_in, notes.collect())
        });
        match entry {
            Ok(entry) => {
                kept::point(cache, &inputs, &key)?;
                Ok(Attempt::Done(kept::read(&entry)?))
            }
            Err(_) if !required.is_empty() => Ok(Attempt::Lacks(required)),
            Err(error) => Err(error),
        }
    })
}

/// The kernel for the present fragments, driver and compiler, if it has been built.
///
/// # Errors
///
/// The compiler is missing, or the cache cannot be read.
pub fn find(cache: &Cache) -> Result<Option<Kernel>> {
    kept::find_inputs(cache, &kept::inputs(&build::toolchain()?))
}

/// The newest version of the kernel source that the archive has now, with the
/// package's name.
///
/// # Errors
///
/// The archive cannot be reached, or has none.
pub fn source_today() -> Result<(String, String)> {
    let work = tempfile::tempdir()?;
    let packages = source::versions(&Mirror::of_this_machine()?, work.path())?;
    let newest = packages.first().context("The archive has no version")?;
    Ok((source::PACKAGE.to_owned(), newest.version.clone()))
}
