//! What the sources say of themselves: which files there are, which tests are in them,
//! and which ids their names end with.
//!
//! Reads text, and runs nothing. Tables of ids in documents are read here too.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::PathBuf,
};

use anyhow::{Context, Result};

use crate::build::workspace;

/// The families of ids with a dash, as they stand in names: `ta_12` or `ta12`.
const FAMILIES: [&str; 12] = [
    "TT", "LC", "TA", "IO", "FS", "SS", "OC", "CL", "SX", "NW", "RS", "K8",
];

/// The families of ids without one.
const LETTERS: [&str; 4] = ["A", "B", "F", "G"];

/// The names of tests, each with the files in which it is, as paths in the workspace.
pub(crate) type Tests = BTreeMap<String, BTreeSet<PathBuf>>;

/// All files below the workspace that end so, without what is built.
pub(crate) fn files(ending: &str) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![workspace().to_owned()];
    while let Some(folder) = folders.pop() {
        let entries =
            fs::read_dir(&folder).with_context(|| format!("Cannot list {}", folder.display()))?;
        for entry in entries {
            let entry = entry?;
            let (path, name) = (entry.path(), entry.file_name());
            let name = name.to_string_lossy();
            if entry.file_type()?.is_dir() {
                if !name.starts_with('.') && name != "target" {
                    folders.push(path);
                }
            } else if name.ends_with(ending) {
                found.push(path);
            }
        }
    }
    Ok(found)
}

/// The functions that are tests, or look like it: sentences.
pub(crate) fn tests() -> Result<Tests> {
    let mut tests = Tests::new();
    for path in files(".rs")? {
        let text =
            fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))?;
        let file = path.strip_prefix(workspace()).unwrap_or(&path).to_owned();
        for name in names(&text) {
            tests.entry(name).or_default().insert(file.clone());
        }
    }
    Ok(tests)
}

/// The names of the tests of one source.
fn names(text: &str) -> Vec<String> {
    let mut names = Vec::new();
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
                names.push(rest[..end].to_owned());
                break;
            }
            lines.next();
        }
    }
    names
}

/// The ids at the end of a test's name: `_b59_ta_12` gives B59 and TA-12.
pub(crate) fn ids(name: &str) -> Vec<String> {
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

/// The rows of the tables below the headings of a document, cell by cell.
pub(crate) fn rows(text: &str) -> Vec<Vec<&str>> {
    text.split("\n## ")
        .skip(1)
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("| "))
        .map(|row| row.trim_end().trim_end_matches('|'))
        .map(|row| row.split(" | ").map(str::trim).collect::<Vec<_>>())
        .filter(|cells| cells[0] != "id" && !cells[0].starts_with("---"))
        .collect()
}

/// What stands between back quotes in a line.
pub(crate) fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_read_from_the_end_of_a_name() {
        assert_eq!(ids("a_name_b59"), ["B59"]);
        assert_eq!(ids("a_name_b59_f3"), ["F3", "B59"]);
        assert_eq!(ids("a_name_ta_12_ss_9"), ["SS-09", "TA-12"]);
        assert_eq!(ids("a_name_lc43"), ["LC-43"]);
        assert_eq!(ids("a_name_a_5"), [""; 0]);
        assert_eq!(ids("a_name_a5"), ["A5"]);
        assert_eq!(ids("a_name_k8_03"), ["K8-03"]);
        assert!(ids("memory_of_64").is_empty());
        assert!(ids("a_u64").is_empty());
    }

    #[test]
    fn cells_of_a_table_are_told_apart_and_may_be_empty() {
        let text =
            "| x | y |\n## A\n\n| id | what |\n| --- | --- |\n| B1 | b `c` |\n| B2 | d | |\n";
        assert_eq!(rows(text), [vec!["B1", "b `c`"], vec!["B2", "d", ""]]);
        assert_eq!(quoted("a `b` c `d`").collect::<Vec<_>>(), ["b", "d"]);
    }
}
