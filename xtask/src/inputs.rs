//! `cargo xtask inputs`: what everything was made from, and what the archive has now.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{Write as _, stdout};

use anyhow::Result;
use bulkhead_guest::Progress;
use bulkhead_tests::lab::cache::Cache;
use bulkhead_tests::lab::inputs::{self, Made};

use crate::progress::Bar;
use crate::{build, packages};

/// Prints it.
pub(crate) fn show() -> Result<()> {
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    let cache = Cache::of_this_user()?;
    let mut all = vec![guest_kernel(&cache)?];
    all.extend(inputs::made(&cache)?);
    bar.step("Asking the Debian archive for its present versions");
    let mut today = inputs::today()?;
    today.extend([bulkhead_guest::source_today()?]);
    drop(bar);
    stdout().write_all(text(&all, &today, &build::rustc()?).as_bytes())?;
    Ok(())
}

/// The guest kernel, as the other things are told.
fn guest_kernel(cache: &Cache) -> Result<Made> {
    let kernel = bulkhead_guest::find(cache)?;
    Ok(Made {
        name: match &kernel {
            Some(kernel) => format!("guest kernel {}", kernel.version),
            None => "guest kernel".to_owned(),
        },
        content: kernel.as_ref().map(|kernel| kernel.sha256.clone()),
        inputs: kernel.map_or_else(BTreeMap::new, |kernel| named(kernel.inputs)),
    })
}

/// The names of compilers and linkers are those of packages, too: told apart from them.
fn named(inputs: BTreeMap<String, String>) -> BTreeMap<String, String> {
    let named = inputs.into_iter().map(|(name, version)| {
        let is_package = name.starts_with("linux-source");
        let name = if is_package {
            name
        } else {
            format!("program {name}:")
        };
        (name, version)
    });
    named.collect()
}

/// A heading for each thing, a line for each input; what the archive has in another
/// version today is told in the same line.
fn text(all: &[Made], today: &BTreeMap<String, String>, rustc: &str) -> String {
    let mut text = format!("our own programs\n  {rustc}\n");
    for made in all {
        let content = made.content.as_deref().unwrap_or("not made yet");
        // Writing to a text cannot fail.
        let _ = writeln!(text, "{}  {content}", made.name);
        for (name, version) in &made.inputs {
            let now = match today.get(name) {
                Some(now) if now != version => format!(" (today {now})"),
                _ => String::new(),
            };
            let _ = writeln!(text, "  {name} {version}{now}");
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(of: &[(&str, &str)]) -> BTreeMap<String, String> {
        let own = |(name, version): &(&str, &str)| ((*name).to_owned(), (*version).to_owned());
        of.iter().map(own).collect()
    }

    #[test]
    fn a_compiler_is_not_taken_for_the_package_of_its_name() {
        let named = named(pairs(&[
            ("gcc", "gcc 12"),
            ("linux-source-6.12", "6.12.118-1"),
        ]));
        let names: Vec<&String> = named.keys().collect();
        assert_eq!(names, ["linux-source-6.12", "program gcc:"]);
    }

    #[test]
    fn what_the_archive_has_in_another_version_is_told_beside() {
        let made = [
            Made {
                name: "lab host".to_owned(),
                content: Some("abc".to_owned()),
                inputs: pairs(&[("acl", "1"), ("attr", "1")]),
            },
            Made {
                name: "containerd 1.7.35".to_owned(),
                content: None,
                inputs: pairs(&[("go", "go1.26.8")]),
            },
        ];
        let today = pairs(&[("acl", "2"), ("attr", "1")]);
        assert_eq!(
            text(&made, &today, "rustc 1.95.0"),
            "our own programs\n  rustc 1.95.0\n\
             lab host  abc\n  acl 1 (today 2)\n  attr 1\n\
             containerd 1.7.35  not made yet\n  go go1.26.8\n"
        );
    }
}
