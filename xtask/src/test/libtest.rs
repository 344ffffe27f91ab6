//! What an executable of tests says about each of them.
//!
//! Reads the plain output of Rust's test harness under `--show-output`. A test that
//! cannot run where it is says so in a line `skipped: REASON` and returns: it counts as
//! skipped, with its reason. A test marked `#[ignore = "the inner half of …"]` is run by
//! its outer half in a process of its own, and is no test by itself.

/// The line by which a test says that it cannot run here.
const SKIPPED: &str = "skipped: ";

/// How the reason of an ignored test begins that another one starts.
const INNER_HALF: &str = "the inner half of";

/// How one test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    /// With the reason.
    Skipped(String),
    /// With what it wrote.
    Failed(String),
}

/// One test of an executable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Told {
    pub(super) name: String,
    pub(super) verdict: Verdict,
}

/// All that `output` tells, in the order in which the tests ended.
pub(super) fn read(output: &str) -> Vec<Told> {
    let mut told: Vec<Told> = Vec::new();
    for line in output.lines() {
        let Some(rest) = line.strip_prefix("test ") else {
            continue;
        };
        let Some((name, word)) = rest.rsplit_once(" ... ") else {
            continue;
        };
        // "a_panic - should panic" is how a test of a panic is told.
        let name = name.trim_end_matches(" - should panic");
        let verdict = match word.split_once(", ") {
            Some(("ignored", reason)) if reason.starts_with(INNER_HALF) => continue,
            Some(("ignored", reason)) => Verdict::Skipped(reason.to_owned()),
            _ => match word {
                "ok" => Verdict::Passed,
                "FAILED" => Verdict::Failed(String::new()),
                "ignored" => Verdict::Skipped("it does not say why".to_owned()),
                _ => continue,
            },
        };
        told.push(Told {
            name: name.to_owned(),
            verdict,
        });
    }
    for (name, written) in sections(output) {
        let Some(test) = told.iter_mut().find(|told| told.name == name) else {
            continue;
        };
        match &mut test.verdict {
            Verdict::Failed(text) => *text = written.to_owned(),
            Verdict::Passed => {
                let mut lines = written.lines();
                if let Some(reason) = lines.find_map(|line| line.strip_prefix(SKIPPED)) {
                    test.verdict = Verdict::Skipped(reason.to_owned());
                }
            }
            Verdict::Skipped(_) => {}
        }
    }
    told
}

/// What each test wrote: `---- NAME stdout ----`, and all up to the next such line.
fn sections(output: &str) -> impl Iterator<Item = (&str, &str)> {
    output.split("\n---- ").skip(1).filter_map(|section| {
        let (head, rest) = section.split_once('\n')?;
        let name = head.strip_suffix(" stdout ----")?;
        let end = ["\n\nfailures:\n", "\n\nsuccesses:\n", "\n\ntest result: "]
            .iter()
            .filter_map(|mark| rest.find(mark))
            .min();
        Some((name, &rest[..end.unwrap_or(rest.len())]))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OUTPUT: &str = "\nrunning 6 tests\ntest a::one ... ok\ntest a::two ... FAILED\n\
        test inner ... ignored, the inner half of the test above\n\
        test later ... ignored, needs a scanner\ntest lame ... ok\n\
        test loud - should panic ... ok\n\n\
        successes:\n\n---- a::one stdout ----\nnothing was skipped: all is well\n\n\
        ---- lame stdout ----\nfirst\nskipped: there is no cgroup v2\n\n\n\
        successes:\n    a::one\n    lame\n    loud\n\n\
        failures:\n\n---- a::two stdout ----\nthread panicked\nleft: 1\n\n\n\
        failures:\n    a::two\n\n\
        test result: FAILED. 3 passed; 1 failed; 2 ignored; 0 measured; 0 filtered out\n";

    #[test]
    fn each_test_is_told_once_with_its_reason() {
        let told = read(OUTPUT);
        let skipped = |reason: &str| Verdict::Skipped(reason.to_owned());
        let found: Vec<(&str, &Verdict)> = told
            .iter()
            .map(|told| (&*told.name, &told.verdict))
            .collect();
        assert_eq!(
            found,
            [
                ("a::one", &Verdict::Passed),
                (
                    "a::two",
                    &Verdict::Failed("thread panicked\nleft: 1\n".to_owned())
                ),
                ("later", &skipped("needs a scanner")),
                ("lame", &skipped("there is no cgroup v2")),
                ("loud", &Verdict::Passed),
            ]
        );
    }

    #[test]
    fn an_executable_that_dies_tells_what_it_told() {
        assert_eq!(read("running 2 tests\ntest a ... ok\n").len(), 1);
        assert_eq!(read(""), []);
    }
}
