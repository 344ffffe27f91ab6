//! Debian's kernel source: which version there is, and how it is had.
//!
//! The archive itself is the business of [`crate::debian`].

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::command::{clean, output};
use crate::debian::{Apt, Mirror};

/// The source package: the long-term series that the configuration is for.
pub(crate) const PACKAGE: &str = "linux-source-6.12";

/// The version with which the configuration was last gone through. Debian keeps
/// only the newest patch release; a newer one is taken, with a note.
const KNOWN: &str = "6.12.107-1";

/// Debian suites that carry the package, the best first.
const SUITES: [&str; 2] = ["trixie", "bookworm-backports"];

/// Parts of the tree that no file of this kernel is compiled from: half of its
/// size. What Kconfig reads there stays.
const NOT_UNPACKED: [&str; 3] = [
    "*/drivers/gpu/*.[ch]",
    "*/sound/*.[ch]",
    "*/Documentation/*.rst",
];

/// One version of the package in a mirror.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) version: String,
    apt: Apt,
}

/// The unpacked tree.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) path: PathBuf,
    /// When Debian made the package, in seconds since 1970: the kernel's date.
    pub(crate) date: u64,
    /// The same as `uname -v` shows it.
    pub(crate) date_text: String,
}

/// The newest version of the package that `mirror` has. `state` becomes the
/// directory of apt's files.
pub(crate) fn newest(mirror: &Mirror, state: &Path) -> Result<Package> {
    let mut errors = Vec::new();
    for suite in SUITES {
        let apt = Apt::new(&state.join(suite), mirror, suite)?;
        match apt.candidate(PACKAGE) {
            Ok(version) => return Ok(Package { version, apt }),
            Err(error) => errors.push(format!("{suite}: {error:#}")),
        }
    }
    bail!(
        "Cannot find {PACKAGE} in the Debian archive: {}",
        errors.join("; ")
    )
}

impl Package {
    /// What a person should know about this version.
    pub(crate) fn note(&self) -> Option<String> {
        (self.version != KNOWN).then(|| {
            format!(
                "The Debian archive has {PACKAGE} {}; the configuration was checked with {KNOWN}",
                self.version
            )
        })
    }

    /// Fetches the package and unpacks the sources below `work`.
    pub(crate) fn unpack(&self, work: &Path) -> Result<Tree> {
        let deb = self.apt.download(PACKAGE)?;
        let contents = work.join("package");
        output(clean("dpkg-deb").arg("-x").arg(&deb).arg(&contents))?;
        fs::remove_file(&deb).with_context(|| format!("Cannot remove {}", deb.display()))?;

        let archive = contents.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
        let date = fs::metadata(&archive)
            .and_then(|metadata| metadata.modified())
            .with_context(|| format!("No {} in the package", archive.display()))?;
        let path = work.join("linux");
        fs::create_dir(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        let mut tar = clean("tar");
        tar.arg("-C")
            .arg(&path)
            .args(["--strip-components=1", "-xf"])
            .arg(&archive);
        tar.args(NOT_UNPACKED.map(|pattern| format!("--exclude={pattern}")));
        output(&mut tar)?;
        fs::remove_dir_all(&contents)
            .with_context(|| format!("Cannot remove {}", contents.display()))?;
        let date = seconds(date)?;
        let date_text = output(clean("date").arg(format!("--date=@{date}")))?;
        Ok(Tree {
            path,
            date,
            date_text: date_text.trim().to_owned(),
        })
    }
}

fn seconds(time: SystemTime) -> Result<u64> {
    Ok(time
        .duration_since(UNIX_EPOCH)
        .context("The package is dated before 1970")?
        .as_secs())
}
