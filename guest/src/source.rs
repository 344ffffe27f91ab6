//! Debian's kernel source: which version there is, and how it is had.
//!
//! The archive itself is the business of [`crate::debian`].

use std::cmp::Ordering;
use std::fs;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};

use crate::command::{clean, output};
use crate::debian::{self, Apt, Mirror};
use crate::fragments::Lack;

/// The source package: the long-term series that the configuration is for.
pub(crate) const PACKAGE: &str = "linux-source-6.12";

/// The version with which the configuration was last gone through. Debian keeps
/// only the newest patch release; a newer one is taken, with a note.
const KNOWN: &str = "6.12.118-1";

/// Debian suites that carry the package.
const SUITES: [&str; 4] = [
    "trixie",
    "trixie-updates",
    "trixie-security",
    "bookworm-backports",
];

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
    pub(crate) suite: &'static str,
    apt: Rc<Apt>,
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

/// The versions of the package that `mirror` has, the newest first. `state`
/// becomes the directory of apt's files.
pub(crate) fn versions(mirror: &Mirror, state: &Path) -> Result<Vec<Package>> {
    let mut packages = Vec::new();
    let mut errors = Vec::new();
    for suite in SUITES {
        let apt = Rc::new(Apt::new(&state.join(suite), mirror, suite)?);
        match apt.versions(PACKAGE) {
            Ok(versions) => packages.extend(versions.into_iter().map(|version| Package {
                version,
                suite,
                apt: Rc::clone(&apt),
            })),
            Err(error) => errors.push(format!("{suite}: {error:#}")),
        }
    }
    if packages.is_empty() {
        bail!(
            "Cannot find {PACKAGE} in the Debian archive: {}",
            errors.join("; ")
        );
    }
    newest_first(packages, |package| &package.version)
}

/// Sorts by Debian's order of versions, and drops all but the first of a version.
fn newest_first<T>(items: Vec<T>, version: impl Fn(&T) -> &str) -> Result<Vec<T>> {
    let mut sorted: Vec<T> = Vec::new();
    for item in items {
        let mut place = 0;
        let mut known = false;
        for other in &sorted {
            match debian::compare(version(&item), version(other))? {
                Ordering::Less => place += 1,
                Ordering::Equal => known = true,
                Ordering::Greater => break,
            }
        }
        if !known {
            sorted.insert(place, item);
        }
    }
    Ok(sorted)
}

/// What one version of the source led to.
#[derive(Debug)]
pub(crate) enum Attempt<T> {
    /// It serves.
    Done(T),
    /// It does not yield these required options.
    Lacks(Vec<Lack>),
}

/// What comes of the first of `packages` that yields every required option. The
/// error names what each of them lacks.
pub(crate) fn first_that_serves<T>(
    packages: &[Package],
    mut attempt: impl FnMut(&Package) -> Result<Attempt<T>>,
) -> Result<T> {
    let mut refused = String::new();
    for package in packages {
        match attempt(package)? {
            Attempt::Done(done) => return Ok(done),
            Attempt::Lacks(lacks) => {
                for lack in lacks {
                    refused.push_str(&format!(
                        "\n  {PACKAGE} {} of {}: {lack}",
                        package.version, package.suite
                    ));
                }
            }
        }
    }
    bail!(
        "No version of the kernel source yields what the fragments in \
         guest/fragments require:{refused}"
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
        let deb = self.apt.download(&format!("{PACKAGE}={}", self.version))?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fragments;

    fn package(version: &str, suite: &'static str) -> Package {
        let directory = tempfile::tempdir().unwrap();
        let mirror = Mirror::at("http://one.example/debian/");
        Package {
            version: version.to_owned(),
            suite,
            apt: Rc::new(Apt::new(directory.path(), &mirror, suite).unwrap()),
        }
    }

    /// What a version lacks whose configuration is `config`.
    fn lacks(config: &str) -> Vec<Lack> {
        let requests = fragments::parse("f", "CONFIG_NEW=y # needed\n").unwrap();
        fragments::lacks(&requests, config)
    }

    #[test]
    fn versions_are_tried_from_the_newest_and_each_once() {
        let versions = vec![
            "6.12.99-1",
            "6.12.117-1",
            "6.12.107-1~bpo12+1",
            "6.12.117-1",
        ];
        assert_eq!(
            newest_first(versions, |version| version).unwrap(),
            ["6.12.117-1", "6.12.107-1~bpo12+1", "6.12.99-1"]
        );
    }

    #[test]
    fn a_version_that_lacks_a_required_option_is_passed_over() {
        let packages = [package("2", "a"), package("1", "b"), package("0", "c")];
        let mut asked = Vec::new();
        let found = first_that_serves(&packages, |package| {
            asked.push(package.version.clone());
            let config = if package.suite == "b" {
                "CONFIG_NEW=y"
            } else {
                ""
            };
            Ok(match lacks(config) {
                lacks if lacks.is_empty() => Attempt::Done(package.suite),
                lacks => Attempt::Lacks(lacks),
            })
        });
        assert_eq!(found.unwrap(), "b");
        assert_eq!(asked, ["2", "1"]);
    }

    #[test]
    fn if_none_serves_option_version_and_file_are_named() {
        let packages = [package("2", "a"), package("1", "b")];
        let found = first_that_serves(&packages, |_| Ok(Attempt::<()>::Lacks(lacks(""))));
        assert_eq!(
            found.unwrap_err().to_string(),
            "No version of the kernel source yields what the fragments in \
             guest/fragments require:\n  \
             linux-source-6.12 2 of a: f:1 asks for CONFIG_NEW=y (needed) and gets n\n  \
             linux-source-6.12 1 of b: f:1 asks for CONFIG_NEW=y (needed) and gets n"
        );
    }

    #[test]
    fn what_else_goes_wrong_is_not_taken_for_a_lack() {
        let packages = [package("2", "a"), package("1", "b")];
        let mut asked = 0;
        let found = first_that_serves::<()>(&packages, |_| {
            asked += 1;
            bail!("The disk is full")
        });
        assert_eq!(found.unwrap_err().to_string(), "The disk is full");
        assert_eq!(asked, 1);
    }
}
