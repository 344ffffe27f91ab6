//! What is written about the source is true of the source.
//!
//! Tests only: a name in ARCHITECTURE.md that is gone, an id at the end of a test's name
//! that `docs/rules.md` does not explain, or one explained that no test has.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use crate::build::workspace;

/// The families of ids with a dash, as they stand in names: `ta_12` or `ta12`.
const FAMILIES: [&str; 11] = [
    "TT", "LC", "TA", "IO", "FS", "SS", "OC", "CL", "SX", "NW", "K8",
];

/// The families of ids without one.
const LETTERS: [&str; 3] = ["B", "F", "G"];

/// All files below the workspace that end so, without what is built.
fn files(ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![workspace().to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_str().unwrap();
            if entry.file_type().unwrap().is_dir() {
                if !name.starts_with('.') && name != "target" {
                    folders.push(path);
                }
            } else if name.ends_with(ending) {
                found.push(path);
            }
        }
    }
    found
}

/// What stands between back quotes, outside of fenced blocks.
fn quoted(text: &str) -> Vec<&str> {
    let mut fenced = false;
    let mut names = Vec::new();
    for line in text.lines() {
        if line.starts_with("```") {
            fenced = !fenced;
        } else if !fenced {
            names.extend(line.split('`').skip(1).step_by(2));
        }
    }
    names
}

/// The names of functions that are tests, or look like it: sentences.
fn tests() -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for path in files(".rs") {
        let text = fs::read_to_string(&path).unwrap();
        let mut lines = text.lines().peekable();
        while let Some(line) = lines.next() {
            let line = line.trim();
            if !(line.starts_with("#[test]") || line.starts_with("#[tokio::test")) {
                continue;
            }
            while let Some(next) = lines.peek() {
                let next = next.trim();
                if let Some(rest) = next.split("fn ").nth(1) {
                    let end = rest.find(['(', '<']).unwrap_or(rest.len());
                    names.insert(rest[..end].to_owned());
                    break;
                }
                lines.next();
            }
        }
    }
    names
}

/// The ids at the end of a test's name: `_b59_ta_12` gives B59 and TA-12.
fn ids(name: &str) -> Vec<String> {
    let parts: Vec<&str> = name.split('_').collect();
    let mut ids = Vec::new();
    let mut end = parts.len();
    while end > 0 {
        let part = parts[end - 1];
        let digits = part.trim_start_matches(|c: char| c.is_ascii_lowercase());
        let letters = part[..part.len() - digits.len()].to_uppercase();
        if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
            break;
        }
        if LETTERS.contains(&&*letters) {
            ids.push(format!("{letters}{digits}"));
            end -= 1;
        } else if FAMILIES.contains(&&*letters) {
            ids.push(format!("{letters}-{digits:0>2}"));
            end -= 1;
        } else if letters.is_empty()
            && end > 1
            && let family = parts[end - 2].to_uppercase()
            && FAMILIES.contains(&&*family)
        {
            ids.push(format!("{family}-{digits:0>2}"));
            end -= 2;
        } else {
            break;
        }
    }
    ids
}

/// The ids that the tables of `docs/rules.md` explain; `B43 … B48` stands for all
/// between.
fn explained() -> BTreeSet<String> {
    let text = fs::read_to_string(workspace().join("docs/rules.md")).unwrap();
    let tables = text.split("\n## ").skip(1);
    let mut known = BTreeSet::new();
    for line in tables
        .flat_map(str::lines)
        .filter(|line| line.starts_with("| "))
    {
        let cell = line[2..].split(" |").next().unwrap_or_default();
        if cell == "id" || cell.starts_with("---") {
            continue;
        }
        for part in cell.split(", ") {
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

#[test]
fn the_map_names_only_what_exists() {
    let map = fs::read_to_string(workspace().join("ARCHITECTURE.md")).unwrap();
    let sources = files(".rs");
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

#[test]
fn every_id_in_the_name_of_a_test_is_explained() {
    let known = explained();
    let mut unknown: Vec<String> = tests()
        .iter()
        .flat_map(|name| {
            ids(name)
                .into_iter()
                .map(move |id| format!("{id} ({name})"))
        })
        .filter(|text| !known.contains(text.split(' ').next().unwrap_or_default()))
        .collect();
    unknown.sort();
    assert!(
        unknown.is_empty(),
        "docs/rules.md does not explain {unknown:#?}"
    );
}

#[test]
fn every_id_that_is_explained_has_a_test() {
    let tested: BTreeSet<String> = tests().iter().flat_map(|name| ids(name)).collect();
    let idle: Vec<String> = explained().difference(&tested).cloned().collect();
    assert!(idle.is_empty(), "no test carries {idle:?}");
}

#[test]
fn ids_are_read_from_the_end_of_a_name() {
    assert_eq!(ids("a_name_b59"), ["B59"]);
    assert_eq!(ids("a_name_b59_f3"), ["F3", "B59"]);
    assert_eq!(ids("a_name_ta_12_ss_9"), ["SS-09", "TA-12"]);
    assert_eq!(ids("a_name_lc43"), ["LC-43"]);
    assert_eq!(ids("a_name_k8_03"), ["K8-03"]);
    assert!(ids("memory_of_64").is_empty());
    assert!(ids("a_u64").is_empty());
}
