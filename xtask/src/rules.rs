//! `cargo xtask rules`: what callers expect of us, rule by rule, with state and tests.
//!
//! The rules are the rows of `docs/contract.md`: an id, a sentence, and a cell that is
//! empty where tests say it all. A test belongs to a rule if its name ends with the id,
//! or if the last cell names it. [`Contract::faults`] says what is wrong with a row; a
//! unit test of this crate wants none.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    fs,
    io::{Write as _, stdout},
    path::Path,
};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{
    build::workspace,
    sources::{self, Tests, ids, quoted},
};

/// Where the rules are written.
pub(crate) const DOCUMENT: &str = "docs/contract.md";

/// Widest column of sentences.
const WIDTH: usize = 64;

/// Prints all rules, for people or as JSON.
pub(crate) fn show(json: bool) -> Result<()> {
    let contract = Contract::of_the_workspace()?;
    let text = if json {
        format!("{:#}\n", contract.json())
    } else {
        contract.table()
    };
    stdout().write_all(text.as_bytes())?;
    let faults = contract.faults();
    ensure!(faults.is_empty(), "{DOCUMENT}: {}", faults.join("\n"));
    Ok(())
}

/// How it stands with a rule.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum State {
    /// A test fails if the rule does not hold.
    Tested,
    /// The source shows that it holds.
    Reading,
    /// Part of it does not hold, or is not proven.
    Part,
    NotMet,
    /// It comes with what is built later.
    Networks,
    Pods,
    CommandLine,
    /// It asks nothing of us.
    Nothing,
    /// Nobody has said.
    Unknown,
}

impl State {
    const ALL: [Self; 9] = [
        Self::Tested,
        Self::Reading,
        Self::Part,
        Self::NotMet,
        Self::Networks,
        Self::Pods,
        Self::CommandLine,
        Self::Nothing,
        Self::Unknown,
    ];

    fn word(self) -> &'static str {
        match self {
            Self::Tested => "tested",
            Self::Reading => "by reading",
            Self::Part => "in part",
            Self::NotMet => "not met",
            Self::Networks => "with networks",
            Self::Pods => "with Kubernetes pods",
            Self::CommandLine => "with the command line",
            Self::Nothing => "nothing to do",
            Self::Unknown => "unknown",
        }
    }

    /// What the last cell of a row begins with; nothing if in no known way.
    fn said(cell: &str) -> Option<Self> {
        let begins = |state: &Self| match state {
            Self::Tested => cell.starts_with("tested by "),
            Self::Unknown => false,
            _ => cell
                .strip_prefix(state.word())
                .is_some_and(|rest| rest.is_empty() || rest.starts_with(": ")),
        };
        Self::ALL.into_iter().find(begins)
    }
}

/// One row.
#[derive(Debug)]
struct Rule {
    id: String,
    what: String,
    /// The last cell.
    note: String,
    /// Tests whose names end with the id.
    own: BTreeSet<String>,
    /// Tests that the last cell names.
    named: BTreeSet<String>,
}

impl Rule {
    fn state(&self) -> State {
        match State::said(&self.note) {
            Some(State::Tested | State::Reading) if !self.own.is_empty() => State::Tested,
            Some(state) => state,
            None if self.note.is_empty() && !self.own.is_empty() => State::Tested,
            None => State::Unknown,
        }
    }

    /// What its row says that is not so.
    fn faults(&self, tests: &Tests) -> Vec<String> {
        let mut faults = Vec::new();
        let mut places = String::new();
        for place in quoted(&self.note).filter(|name| is_place(name)) {
            match fs::read_to_string(workspace().join(place)) {
                Ok(text) => places.push_str(&text),
                Err(_) => faults.push(format!("there is no file {place}")),
            }
        }
        let names: Vec<&str> = quoted(&self.note).filter(|name| !is_place(name)).collect();
        let no_test = |name: &&&str| !tests.contains_key(**name);
        match State::said(&self.note) {
            None if self.note.is_empty() && self.own.is_empty() => {
                faults.push("neither a test nor a line that says why not".to_owned());
            }
            None if !self.note.is_empty() => {
                faults.push(format!("a line that begins in no known way: {}", self.note));
            }
            None => {}
            Some(State::Tested) => {
                let gone = names.iter().filter(no_test);
                faults.extend(gone.map(|name| format!("there is no test {name}")));
                if names.is_empty() {
                    faults.push("tested, but by no test that is named".to_owned());
                }
            }
            Some(State::Reading) => {
                let unseen = names.iter().filter(no_test);
                let unseen = unseen.filter(|name| !places.contains(**name));
                faults.extend(unseen.map(|name| format!("{name} is not where it is said to be")));
                if !quoted(&self.note).any(is_place) {
                    faults.push("read, but in no file that is named".to_owned());
                }
            }
            Some(state) => {
                let gone = names.iter().filter(no_test);
                let gone = gone.filter(|name| looks_like_a_test(name));
                faults.extend(gone.map(|name| format!("there is no test {name}")));
                let word = state.word();
                if matches!(state, State::NotMet | State::Nothing) && !self.own.is_empty() {
                    faults.push(format!("{word}, and yet the id of {:?}", self.own));
                }
                if matches!(state, State::Part | State::NotMet) && self.note == word {
                    faults.push(format!("{word}, without a word why"));
                }
            }
        }
        let tell = |fault| format!("{}: {fault}", self.id);
        faults.into_iter().map(tell).collect()
    }

    /// Its tests, and what else is said.
    fn reasons(&self) -> Vec<String> {
        let said = match State::said(&self.note) {
            // The names are there already.
            Some(State::Tested) => self.note.rsplit('`').next().unwrap_or_default(),
            Some(state) if state == self.state() => &self.note[state.word().len()..],
            _ => &self.note,
        };
        let mut lines: Vec<String> = self.own.union(&self.named).cloned().collect();
        lines.extend(wrapped(said.trim_start_matches([':', ',', ' '])));
        lines
    }
}

/// A file of the workspace, not a directory or a place on a host.
fn is_place(name: &str) -> bool {
    name.contains('/') && !name.starts_with('/') && Path::new(name).extension().is_some()
}

/// A sentence rather than an item of the source.
fn looks_like_a_test(name: &str) -> bool {
    let letters = |byte: u8| byte == b'_' || byte.is_ascii_lowercase() || byte.is_ascii_digit();
    name.matches('_').count() > 2 && name.bytes().all(letters)
}

/// All rules, and all tests.
#[derive(Debug)]
pub(crate) struct Contract {
    rules: Vec<Rule>,
    tests: Tests,
}

impl Contract {
    /// As it is written in the workspace.
    pub(crate) fn of_the_workspace() -> Result<Self> {
        let text = fs::read_to_string(workspace().join(DOCUMENT))
            .with_context(|| format!("Cannot read {DOCUMENT}"))?;
        Ok(Self::read(&text, sources::tests()?))
    }

    fn read(text: &str, tests: Tests) -> Self {
        let mut own: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        for name in tests.keys() {
            for id in ids(name) {
                own.entry(id).or_default().insert(name.clone());
            }
        }
        let rule = |cells: Vec<&str>| {
            let cell = |number: usize| cells.get(number).copied().unwrap_or_default();
            let named = quoted(cell(2)).filter(|name| tests.contains_key(*name));
            Rule {
                id: cell(0).to_owned(),
                what: cell(1).to_owned(),
                note: cell(2).to_owned(),
                own: own.get(cell(0)).cloned().unwrap_or_default(),
                named: named.map(str::to_owned).collect(),
            }
        };
        let rules = sources::rows(text).into_iter().map(rule).collect();
        Self { rules, tests }
    }

    /// What is wrong with its rows.
    pub(crate) fn faults(&self) -> Vec<String> {
        let mut seen = BTreeSet::new();
        let twice = self.rules.iter().filter(|rule| !seen.insert(&rule.id));
        let twice: Vec<String> = twice
            .map(|rule| format!("{}: it is there twice", rule.id))
            .collect();
        let faults = self.rules.iter().flat_map(|rule| rule.faults(&self.tests));
        twice.into_iter().chain(faults).collect()
    }

    /// The ids, in the order of the document.
    #[cfg(test)]
    pub(crate) fn ids(&self) -> impl Iterator<Item = &str> {
        self.rules.iter().map(|rule| &*rule.id)
    }

    /// How many rules are in each state in which there is any.
    fn counts(&self) -> Vec<(State, usize)> {
        let count = |state| {
            self.rules
                .iter()
                .filter(|rule| rule.state() == state)
                .count()
        };
        let counts = State::ALL.into_iter().map(|state| (state, count(state)));
        counts.filter(|(_, count)| *count > 0).collect()
    }

    fn table(&self) -> String {
        let mut rows = vec![[
            vec!["id".to_owned()],
            vec!["state".to_owned()],
            vec!["what".to_owned()],
            vec!["tests, or why not".to_owned()],
        ]];
        rows.extend(self.rules.iter().map(|rule| {
            [
                vec![rule.id.clone()],
                vec![rule.state().word().to_owned()],
                wrapped(&rule.what),
                rule.reasons(),
            ]
        }));
        let width = |column: usize| {
            let cells = rows.iter().flat_map(|row| &row[column]);
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths = [width(0), width(1), width(2)];
        let mut text = String::new();
        for row in &rows {
            let height = row.iter().map(Vec::len).max().unwrap_or(0);
            for line in 0..height {
                let cell = |column: usize| row[column].get(line).map_or("", |cell| &**cell);
                let line = format!(
                    "{:<3$}  {:<4$}  {:<5$}",
                    cell(0),
                    cell(1),
                    cell(2),
                    widths[0],
                    widths[1],
                    widths[2],
                );
                // Writing to a text cannot fail.
                let _ = writeln!(text, "{}", format!("{line}  {}", cell(3)).trim_end());
            }
        }
        text.push('\n');
        for (state, count) in self.counts() {
            let _ = writeln!(text, "{:<21}  {count:>3}", state.word());
        }
        let _ = writeln!(text, "{:<21}  {:>3}", "together", self.rules.len());
        text
    }

    fn json(&self) -> Value {
        let test = |name: &String| json!({"name": name, "files": self.tests.get(name)});
        let rule = |rule: &Rule| {
            let tests: Vec<Value> = rule.own.union(&rule.named).map(test).collect();
            json!({
                "id": rule.id,
                "state": rule.state().word(),
                "what": rule.what,
                "note": rule.note,
                "tests": tests,
            })
        };
        let counts = self.counts().into_iter();
        let counts: BTreeMap<_, _> = counts.map(|(state, count)| (state.word(), count)).collect();
        json!({"rules": self.rules.iter().map(rule).collect::<Vec<_>>(), "counts": counts})
    }
}

/// A sentence in lines that are not too wide.
fn wrapped(text: &str) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= WIDTH => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    fn contract(rows: &str) -> Contract {
        let names = ["a_thing_works_ta_01", "another_thing_works_too"];
        let tests = names.map(|name| (name.to_owned(), BTreeSet::from(["a.rs".into()])));
        Contract::read(&format!("\n## T\n{rows}\n"), Tests::from(tests))
    }

    #[test]
    fn a_rule_has_a_test_or_a_line_that_is_true() {
        let check = |row: &str, expected: &str| {
            assert_eq!(contract(row).faults().join("; "), expected, "{row}");
        };
        check("| TA-01 | it works | |", "");
        check(
            "| TA-02 | it works | tested by `another_thing_works_too` |",
            "",
        );
        check(
            "| TA-02 | it works | by reading: `xtask/src/rules.rs` `wrapped` |",
            "",
        );
        check("| TA-01 | it works | in part: not on Sundays |", "");
        check("| TA-02 | it works | with networks |", "");
        check(
            "| TA-02 | it works | |",
            "TA-02: neither a test nor a line that says why not",
        );
        check(
            "| TA-02 | it works | soon |",
            "TA-02: a line that begins in no known way: soon",
        );
        check(
            "| TA-02 | it works | tested by `what_never_was_written` |",
            "TA-02: there is no test what_never_was_written",
        );
        check(
            "| TA-02 | it works | in part: `what_never_was_written` |",
            "TA-02: there is no test what_never_was_written",
        );
        check(
            "| TA-01 | it works | not met: nobody has done it |",
            "TA-01: not met, and yet the id of {\"a_thing_works_ta_01\"}",
        );
        check(
            "| TA-02 | it works | not met |",
            "TA-02: not met, without a word why",
        );
        check(
            "| TA-02 | it works | by reading: `xtask/src/nobody.rs` |",
            "TA-02: there is no file xtask/src/nobody.rs",
        );
        check(
            "| TA-02 | it works | by reading: `wrapped` |",
            "TA-02: wrapped is not where it is said to be; TA-02: read, but in no file that is named",
        );
        check(
            "| TA-02 | it works | by reading: `xtask/src/main.rs` `nobody_at_all` |",
            "TA-02: nobody_at_all is not where it is said to be",
        );
        check(
            "| TA-01 | it works | |\n| TA-01 | it works | |",
            "TA-01: it is there twice",
        );
    }

    #[test]
    fn the_table_has_a_line_for_each_test_and_counts_at_its_end() {
        let contract = contract(
            "| TA-01 | it works | tested by `another_thing_works_too` |\n| TA-02 | it flies | not met: no wings |",
        );
        let expected = "\
id     state    what      tests, or why not
TA-01  tested   it works  a_thing_works_ta_01
                          another_thing_works_too
TA-02  not met  it flies  no wings

tested                   1
not met                  1
together                 2
";
        assert_eq!(contract.table(), expected);
        let json = contract.json();
        assert_eq!(
            json["rules"][0]["tests"][1]["name"],
            "another_thing_works_too"
        );
        assert_eq!(json["rules"][1]["state"], "not met");
        assert_eq!(json["counts"]["tested"], 1);
    }

    #[test]
    fn sentences_are_broken_between_words() {
        let lines = wrapped(&"word ".repeat(30));
        assert!(lines.iter().all(|line| line.len() <= WIDTH));
        assert_eq!(lines.join(" "), "word ".repeat(30).trim_end());
    }
}
