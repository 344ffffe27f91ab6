//! What is written about the source is true of the source.
//!
//! Tests only: a name in ARCHITECTURE.md that is gone, a test that `docs/faults.md` names
//! and that nobody wrote or somebody renamed, an id at the end of a test's name
//! that neither `docs/rules.md` nor `docs/contract.md` explains, an id that is explained
//! and that no test has, or a rule of which nobody says whether it is met.

use std::{collections::BTreeSet, fs, path::Path};

use crate::{
    build::workspace,
    rules::Contract,
    sources::{self, files, ids},
};

/// What stands between back quotes, outside of fenced blocks.
fn quoted(text: &str) -> Vec<&str> {
    let mut fenced = false;
    let mut names = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            names.extend(sources::quoted(line));
        }
    }
    names
}

/// The ids that the tables of `docs/rules.md` explain; `B43 … B48` stands for all
/// between.
fn explained() -> BTreeSet<String> {
    let text = fs::read_to_string(workspace().join("docs/rules.md")).unwrap();
    let mut known = BTreeSet::new();
    for cells in sources::rows(&text) {
        for part in cells[0].split(", ") {
            match part.split_once(" … ") {
                Some((first, last)) => {
                    let letters = first.trim_end_matches(|c: char| c.is_ascii_digit());
                    let number = |id: &str| id[letters.len()..].parse::<u32>().unwrap();
                    for number in number(first)..=number(last) {
                        known.insert(format!("{letters}{number}"));
                    }
                }
                None => {
                    known.insert(part.to_owned());
                }
            }
        }
    }
    known
}

/// The ids that `docs/contract.md` explains.
fn ruled() -> BTreeSet<String> {
    let contract = Contract::of_the_workspace().unwrap();
    contract.ids().map(str::to_owned).collect()
}

/// The ids of all tests, each with its test.
fn of_tests() -> Vec<(String, String)> {
    let tests = sources::tests().unwrap();
    tests
        .keys()
        .flat_map(|name| ids(name).into_iter().map(|id| (id, name.clone())))
        .collect()
}

#[test]
fn the_map_names_only_what_exists() {
    let map = fs::read_to_string(workspace().join("ARCHITECTURE.md")).unwrap();
    let sources = files(".rs").unwrap();
    let all: String = sources
        .iter()
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let mut gone = Vec::new();
    for name in quoted(&map) {
        let exists = if name.contains(' ') || name.starts_with('/') || name.starts_with('-') {
            // A command, or a place on a host.
            true
        } else if name.ends_with(".rs") {
            sources.iter().any(|path| path.ends_with(name))
        } else if name.ends_with('/') {
            let folder = Path::new(name);
            workspace().join(folder).is_dir()
                || sources
                    .iter()
                    .any(|path| path.ancestors().any(|ancestor| ancestor.ends_with(folder)))
        } else if name.contains('/') {
            workspace().join(name).exists()
        } else if let Some((_, item)) = name.rsplit_once("::") {
            [" ", "\t"]
                .iter()
                .any(|before| all.contains(&format!("{before}{item}")))
        } else {
            true
        };
        if !exists {
            gone.push(name);
        }
    }
    assert!(
        gone.is_empty(),
        "ARCHITECTURE.md names what is not there: {gone:?}"
    );
}

/// Is this the name of a test, in which `*` and `…` stand for anything?
fn is_named(test: &str, name: &str) -> bool {
    let mut rest = test;
    let mut parts = name.split(['*', '…']);
    let first = parts.next().unwrap_or_default();
    let Some(after) = rest.strip_prefix(first) else {
        return false;
    };
    rest = after;
    let parts: Vec<&str> = parts.collect();
    let Some((last, between)) = parts.split_last() else {
        return rest.is_empty();
    };
    for part in between {
        match rest.find(part) {
            Some(at) => rest = &rest[at + part.len()..],
            None => return false,
        }
    }
    rest.ends_with(last)
}

#[test]
fn every_test_that_a_fault_names_exists() {
    let text = fs::read_to_string(workspace().join("docs/faults.md")).unwrap();
    let tests = sources::tests().unwrap();
    let (mut found, mut gone) = (0, Vec::new());
    for cells in sources::rows(&text) {
        for quoted in sources::quoted(cells.last().unwrap()) {
            let (place, name) = quoted.rsplit_once("::").unwrap_or(("", quoted));
            let name = name.rsplit_once(": ").map_or(name, |(_, name)| name);
            // All of a module, or a test by its name, which is a sentence.
            let exists = if name == "*" {
                let modules = place.split("::").filter(|module| *module != "tests");
                let folders: Vec<&str> = modules.collect();
                tests.values().flatten().any(|file| {
                    let file = file.with_extension("");
                    let parts: Vec<_> = file.iter().filter_map(|part| part.to_str()).collect();
                    folders.iter().all(|module| parts.contains(module))
                })
            } else if name.contains(['*', '…']) || name.matches('_').count() > 2 {
                tests.keys().any(|test| is_named(test, name))
            } else {
                continue;
            };
            found += 1;
            if !exists {
                gone.push(quoted);
            }
        }
    }
    assert!(found > 200, "{found} names were found");
    assert!(
        gone.is_empty(),
        "docs/faults.md names tests that are not there: {gone:#?}"
    );
}

#[test]
fn a_name_may_leave_something_out() {
    assert!(is_named("a_b_c", "a_b_c") && !is_named("a_b_c", "a_b"));
    assert!(is_named("a_b_c", "…_c") && is_named("a_b_c", "a_…_c") && is_named("a_b_c", "*"));
    assert!(!is_named("a_b_c", "…_b") && !is_named("a_b", "a_…_b"));
}

#[test]
fn every_id_in_the_name_of_a_test_is_explained() {
    let known = &explained() | &ruled();
    let unknown = of_tests().into_iter().filter(|(id, _)| !known.contains(id));
    let unknown: BTreeSet<_> = unknown.collect();
    assert!(unknown.is_empty(), "nobody explains {unknown:#?}");
}

#[test]
fn every_id_is_explained_in_one_place() {
    let both = &explained() & &ruled();
    assert!(both.is_empty(), "both documents explain {both:?}");
}

#[test]
fn every_id_that_is_explained_has_a_test() {
    let tested: BTreeSet<String> = of_tests().into_iter().map(|(id, _)| id).collect();
    let idle: Vec<String> = explained().difference(&tested).cloned().collect();
    assert!(idle.is_empty(), "no test carries {idle:?}");
}

#[test]
fn every_rule_has_a_test_or_a_line_that_says_why_not() {
    let faults = Contract::of_the_workspace().unwrap().faults();
    assert!(faults.is_empty(), "docs/contract.md: {faults:#?}");
}
