//! The sum of all suites: lines for people as they come, one table at the end, and
//! the same for machines as JUnit XML.

use std::{
    fmt::{self, Display, Formatter},
    fs,
    io::{Write, stdout},
    path::Path,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use quick_junit::{NonSuccessKind, TestCase, TestCaseStatus, TestSuite};

use super::libtest::Verdict;

/// Reasons are listed up to this many tests each.
const NAMED: usize = 4;

/// What became of the tests so far; shared by the threads that run them.
#[derive(Debug, Default)]
pub(super) struct Report(Mutex<Vec<Suite>>);

#[derive(Debug)]
struct Suite {
    name: String,
    cases: Vec<Case>,
    /// From the start of its first test to the end of its last, as far as it ran alone.
    time: Duration,
}

#[derive(Debug)]
struct Case {
    name: String,
    verdict: Verdict,
    /// What it took; unknown where an executable runs many at once.
    time: Option<Duration>,
    /// The tries before this one.
    lost: Vec<Lost>,
}

/// A try that told nothing of the test, which was begun anew.
#[derive(Debug)]
pub(super) struct Lost {
    /// What was seen.
    pub(super) why: String,
    /// This machine stood still for so long meanwhile, which is nobody's fault. With
    /// none the lab host was lost, which is one.
    pub(super) stood_still: Option<Duration>,
}

impl Lost {
    fn is_fault(&self) -> bool {
        self.stood_still.is_none()
    }
}

impl Display for Lost {
    fn fmt(&self, out: &mut Formatter<'_>) -> fmt::Result {
        let Lost { why, stood_still } = self;
        match stood_still {
            Some(time) => write!(
                out,
                "begun anew, for this machine stood still for {} s; seen then: {why}",
                time.as_secs()
            ),
            None => write!(
                out,
                "passed at the second try only, which is a fault; the first: {why}"
            ),
        }
    }
}

/// The closing counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) passed: usize,
    pub(super) failed: usize,
    pub(super) skipped: usize,
    /// Of those that passed: at the second try, by nobody's fault but ours.
    pub(super) again: usize,
}

impl Report {
    /// Adds a test of `suite`.
    pub(super) fn add(&self, suite: &str, name: &str, verdict: Verdict, time: Option<Duration>) {
        let name = name.to_owned();
        let lost = Vec::new();
        self.case(
            suite,
            Case {
                name,
                verdict,
                time,
                lost,
            },
        );
    }

    /// Adds a test whose tries before were `lost`.
    pub(super) fn add_after(
        &self,
        suite: &str,
        name: &str,
        lost: Vec<Lost>,
        verdict: Verdict,
        time: Duration,
    ) {
        self.case(
            suite,
            Case {
                name: name.to_owned(),
                verdict,
                time: Some(time),
                lost,
            },
        );
    }

    fn case(&self, suite: &str, case: Case) {
        let time = case.time.unwrap_or_default();
        self.with(suite, |suite| {
            suite.time += time;
            suite.cases.push(case);
        });
    }

    /// Adds to the wall time of `suite`.
    pub(super) fn took(&self, suite: &str, time: Duration) {
        self.with(suite, |suite| suite.time += time);
    }

    fn with(&self, name: &str, change: impl FnOnce(&mut Suite)) {
        let mut suites = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(suite) = suites.iter_mut().find(|suite| suite.name == name) {
            return change(suite);
        }
        let mut suite = Suite {
            name: name.to_owned(),
            cases: Vec::new(),
            time: Duration::ZERO,
        };
        change(&mut suite);
        suites.push(suite);
    }

    /// The sum.
    pub(super) fn counts(&self) -> Counts {
        let suites = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut counts = Counts::default();
        for case in suites.iter().flat_map(|suite| &suite.cases) {
            match case.verdict {
                Verdict::Passed => counts.passed += 1,
                Verdict::Failed(_) => counts.failed += 1,
                Verdict::Skipped(_) => counts.skipped += 1,
            }
            counts.again += usize::from(case.at_second_try_by_fault());
        }
        counts
    }

    /// Prints a line for each suite, why tests were skipped, which failed, and the
    /// closing line.
    pub(super) fn print(&self) -> Result<()> {
        let counts = self.counts();
        let suites = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut out = stdout();
        writeln!(out)?;
        for suite in &*suites {
            let count = |wanted: fn(&Verdict) -> bool| {
                let cases = suite.cases.iter();
                cases.filter(|case| wanted(&case.verdict)).count()
            };
            writeln!(
                out,
                "suite {:<24} {:>4} ok {:>3} failed {:>3} skipped {:>5} s",
                suite.name,
                count(|verdict| *verdict == Verdict::Passed),
                count(|verdict| matches!(verdict, Verdict::Failed(_))),
                count(|verdict| matches!(verdict, Verdict::Skipped(_))),
                suite.time.as_secs(),
            )?;
        }
        for (reason, names) in skipped(&suites) {
            let more = names.len().saturating_sub(NAMED);
            let listed = names[..names.len() - more].join(", ");
            let more = match more {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            writeln!(out, "skipped, {reason}: {listed}{more}")?;
        }
        for suite in &*suites {
            for case in &suite.cases {
                if matches!(case.verdict, Verdict::Failed(_)) {
                    writeln!(out, "FAILED: {}: {}", suite.name, case.name)?;
                }
                for lost in &case.lost {
                    writeln!(out, "{}: {}: {lost}", suite.name, case.name)?;
                }
            }
        }
        writeln!(
            out,
            "{} passed, {} failed, {} skipped",
            counts.passed, counts.failed, counts.skipped
        )?;
        Ok(())
    }

    /// Writes JUnit XML.
    pub(super) fn write_junit(&self, path: &Path) -> Result<()> {
        let suites = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut report = quick_junit::Report::new("bulkhead");
        for suite in &*suites {
            let mut written = TestSuite::new(&*suite.name);
            written.set_time(suite.time);
            for case in &suite.cases {
                written.add_test_case(case.junit(&suite.name));
            }
            report.add_test_suite(written);
        }
        let text = report.to_string().context("Cannot write JUnit XML")?;
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)
                .with_context(|| format!("Cannot make {}", folder.display()))?;
        }
        fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
    }
}

impl Case {
    fn at_second_try_by_fault(&self) -> bool {
        self.verdict == Verdict::Passed && self.lost.iter().any(Lost::is_fault)
    }

    fn junit(&self, suite: &str) -> TestCase {
        let mut status = match &self.verdict {
            Verdict::Passed => TestCaseStatus::success(),
            Verdict::Skipped(_) => TestCaseStatus::skipped(),
            Verdict::Failed(_) => TestCaseStatus::non_success(NonSuccessKind::Failure),
        };
        match &self.verdict {
            Verdict::Passed => {}
            Verdict::Skipped(text) | Verdict::Failed(text) => {
                status.set_message(text.lines().next().unwrap_or_default().to_owned());
                if text.lines().nth(1).is_some() {
                    status.set_description(text.as_str());
                }
            }
        }
        let mut case = TestCase::new(&*self.name, status);
        case.set_classname(suite);
        if let Some(time) = self.time {
            case.set_time(time);
        }
        if !self.lost.is_empty() {
            let tries: Vec<String> = self.lost.iter().map(Lost::to_string).collect();
            case.set_system_out(tries.join("\n"));
        }
        case
    }
}

/// Each reason with the tests that gave it, in the order of their appearance.
fn skipped(suites: &[Suite]) -> Vec<(&str, Vec<&str>)> {
    let mut reasons: Vec<(&str, Vec<&str>)> = Vec::new();
    for case in suites.iter().flat_map(|suite| &suite.cases) {
        let Verdict::Skipped(reason) = &case.verdict else {
            continue;
        };
        match reasons.iter_mut().find(|(known, _)| known == reason) {
            Some((_, names)) => names.push(&case.name),
            None => reasons.push((reason, vec![&case.name])),
        }
    }
    reasons
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> Report {
        let report = Report::default();
        let second = Some(Duration::from_secs(1));
        report.add("run", "a", Verdict::Passed, second);
        report.add("files", "b", Verdict::Skipped("no disk".to_owned()), second);
        report.add(
            "run",
            "c",
            Verdict::Failed("left: 1\nright: 2".to_owned()),
            second,
        );
        for (name, stood_still) in [("d", None), ("e", Some(Duration::from_secs(900)))] {
            let why = "the emulator died".to_owned();
            let lost = vec![Lost { why, stood_still }];
            report.add_after("run", name, lost, Verdict::Passed, Duration::from_secs(2));
        }
        report
    }

    #[test]
    fn every_verdict_counts_once_and_a_second_try_is_a_fault_unless_this_machine_stood_still() {
        assert_eq!(
            report().counts(),
            Counts {
                passed: 3,
                failed: 1,
                skipped: 1,
                again: 1
            }
        );
    }

    #[test]
    fn machines_read_the_same_as_people() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("results/junit.xml");
        report().write_junit(&path).unwrap();
        let text = fs::read_to_string(path).unwrap();
        for part in [
            r#"<testsuites name="bulkhead" tests="5""#,
            r#"<testsuite name="run" tests="4""#,
            r#"failures="1""#,
            r#"message="no disk""#,
            "passed at the second try only, which is a fault; the first: the emulator died",
            "begun anew, for this machine stood still for 900 s; seen then: the emulator died",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
