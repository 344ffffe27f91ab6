//! What the lab host and its images are made of, for people who want to know.
//!
//! Each entry made from Debian packages has a list of them; the archive's present
//! versions can be laid beside it. Modules and toolchain are pinned.

use std::collections::BTreeMap;
use std::fs;

use anyhow::{Context, Result};
use bulkhead_guest::debian::{Apt, Mirror};

use super::packages::STABLE;
use super::system::PACKAGES;
use super::{image, programs, root};
use bulkhead_guest::cache::{Cache, Entry};

/// A thing that is made once and kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// What it is, for people.
    pub name: String,
    /// Hash of all its files; none if it has not been made yet.
    pub content: Option<String>,
    /// Names and versions of the Debian packages or modules in it.
    pub inputs: BTreeMap<String, String>,
}

/// What there is for the present lists and pins.
///
/// # Errors
///
/// The cache cannot be read.
pub fn made(cache: &Cache) -> Result<Vec<Made>> {
    let mut all = vec![of_packages("lab host", root::find(cache)?)?];
    for (name, entry) in image::find(cache)? {
        all.push(of_packages(&format!("image {name}"), entry)?);
    }
    for (name, version, entry) in programs::find(cache)? {
        all.push(Made {
            name: format!("{name} {version}"),
            content: entry.map(|entry| entry.content().to_owned()),
            inputs: BTreeMap::from([("go".to_owned(), programs::TOOLCHAIN.to_owned())]),
        });
    }
    Ok(all)
}

fn of_packages(name: &str, entry: Option<Entry>) -> Result<Made> {
    let inputs = match &entry {
        Some(entry) => {
            let list = entry.file(PACKAGES);
            let text = fs::read_to_string(&list)
                .with_context(|| format!("Cannot read {}", list.display()))?;
            pairs(&text)
        }
        None => BTreeMap::new(),
    };
    Ok(Made {
        name: name.to_owned(),
        content: entry.map(|entry| entry.content().to_owned()),
        inputs,
    })
}

/// Lines of a name and a version.
fn pairs(text: &str) -> BTreeMap<String, String> {
    text.lines()
        .filter_map(|line| line.split_once(' '))
        .map(|(name, version)| (name.to_owned(), version.to_owned()))
        .collect()
}

/// The versions of all Debian packages that the archive would give today.
///
/// # Errors
///
/// The archive cannot be reached.
pub fn today() -> Result<BTreeMap<String, String>> {
    let work = tempfile::tempdir()?;
    let apt = Apt::new(work.path(), &Mirror::of_this_machine()?, STABLE)?;
    apt.candidates()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_of_packages_is_read_with_their_versions() {
        let list = pairs("acl 2.3.2-2\nlinux-image-cloud-amd64 6.12.117-1\n\n");
        assert_eq!(list["acl"], "2.3.2-2");
        assert_eq!(list.len(), 2);
    }
}
