//! `cargo xtask test`: style, unit tests here, suites in the lab host, one sum.

use std::{
    fs,
    io::{self, Write, stderr, stdout},
    path::PathBuf,
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context, Result, ensure};
use bulkhead_guest_kernel::Progress;

use crate::{build, lab, progress::Bar, tools};

/// What has been counted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
}

/// Runs everything; with a filter, only the tests whose names contain it.
pub(crate) fn all(filter: Option<&str>) -> Result<ExitCode> {
    let bar = Bar::new();
    crate::packages::ensure_installed(&bar)?;
    if filter.is_none() {
        bar.step("Checking the style");
        build::cargo(&["fmt", "--all", "--check"], &[])?;
        build::cargo(
            &[
                "clippy",
                "--workspace",
                "--all-targets",
                "--",
                "-D",
                "warnings",
            ],
            &[],
        )?;
    }
    bar.step("Building the tests");
    build::cargo(&["test", "--workspace", "--no-run"], &[])?;
    let suites = suites()?;
    ensure!(!suites.is_empty(), "The crate bulkhead-tests has no suites");
    let ready = lab::Ready::new(&bar)?;
    let testers = tools::testers(&bar)?;
    drop(bar);

    let sum = Arc::new(Mutex::new(Counts::default()));
    let here = on_this_machine(filter, &sum)?;
    let there = in_the_lab(&ready, suites, testers, filter, &sum)?;
    let sum = *sum.lock().unwrap_or_else(PoisonError::into_inner);
    let mut out = stdout();
    writeln!(
        out,
        "{} passed, {} failed, {} skipped",
        sum.passed, sum.failed, sum.skipped
    )?;
    let good = here && there && sum.failed == 0 && sum.passed > 0;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Unit tests of all crates.
fn on_this_machine(filter: Option<&str>, sum: &Arc<Mutex<Counts>>) -> Result<bool> {
    let mut child = Command::new(build::cargo_program())
        .args([
            "test",
            "--quiet",
            "--workspace",
            "--no-fail-fast",
            "--lib",
            "--bins",
        ])
        .args(filter)
        .current_dir(build::workspace())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start cargo")?;
    let mut output = child.stdout.take().context("cargo has no output")?;
    io::copy(&mut output, &mut Counting::new(stdout(), sum))?;
    Ok(child.wait()?.success())
}

/// The suites, one after the other in one call.
fn in_the_lab(
    ready: &lab::Ready,
    suites: Vec<(String, PathBuf)>,
    testers: PathBuf,
    filter: Option<&str>,
    sum: &Arc<Mutex<Counts>>,
) -> Result<bool> {
    let filter = filter.map_or_else(String::new, |text| format!("'{}'", text.replace('\'', "")));
    let script = format!(
        "code=0\nfor suite in /mnt/in/suites/*; do\n  echo; echo \"Suite $(basename \"$suite\")\"\n  \
         \"$suite\" --test-threads 1 {filter} || code=1\ndone\nexit $code\n"
    );
    let mut call = ready.call(&script).file(testers, "tools");
    for (name, path) in suites {
        call = call.file(path, format!("suites/{name}"));
    }
    let ended = call.run(Counting::new(stdout(), sum), stderr())?;
    if let Some(evidence) = ended.evidence {
        let dir = lab::evidence_dir()?;
        let copied = Command::new("cp")
            .arg("-a")
            .arg(&evidence)
            .arg(&dir)
            .status()?;
        ensure!(
            copied.success(),
            "Cannot copy the evidence from {}",
            evidence.display()
        );
        fs::remove_dir_all(&evidence)?;
        eprintln!("Evidence of failed tests is in {}", dir.display());
    }
    Ok(ended.code == 0)
}

/// Names and executables of the suites in `tests/suites`, already built.
fn suites() -> Result<Vec<(String, PathBuf)>> {
    let output = Command::new(build::cargo_program())
        .args([
            "test",
            "--no-run",
            "--workspace",
            "--message-format=json",
            "--quiet",
        ])
        .current_dir(build::workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    ensure!(output.status.success(), "The tests do not compile");
    let mut suites = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        let source = message["target"]["src_path"].as_str().unwrap_or_default();
        if source.contains("/tests/suites/")
            && let (Some(name), Some(path)) = (
                message["target"]["name"].as_str(),
                message["executable"].as_str(),
            )
        {
            suites.push((name.to_owned(), PathBuf::from(path)));
        }
    }
    suites.sort();
    Ok(suites)
}

/// Passes bytes on and adds up the closing lines of the test runners among them.
struct Counting<W> {
    to: W,
    line: Vec<u8>,
    sum: Arc<Mutex<Counts>>,
}

impl<W: Write> Counting<W> {
    fn new(to: W, sum: &Arc<Mutex<Counts>>) -> Self {
        Counting {
            to,
            line: Vec::new(),
            sum: Arc::clone(sum),
        }
    }

    fn count(&mut self) {
        let line = String::from_utf8_lossy(&self.line);
        // "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; …"
        if let Some((_, counts)) = line
            .strip_prefix("test result: ")
            .and_then(|rest| rest.split_once(". "))
        {
            let mut sum = self.sum.lock().unwrap_or_else(PoisonError::into_inner);
            for part in counts.split("; ") {
                let Some((number, word)) = part.split_once(' ') else {
                    continue;
                };
                let Ok(number) = number.parse::<u64>() else {
                    continue;
                };
                match word {
                    "passed" => sum.passed += number,
                    "failed" => sum.failed += number,
                    "ignored" => sum.skipped += number,
                    _ => {}
                }
            }
        }
        self.line.clear();
    }
}

impl<W: Write> Write for Counting<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.to.write_all(bytes)?;
        for byte in bytes {
            if *byte == b'\n' {
                self.count();
            } else {
                self.line.push(*byte);
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_lines_of_test_runners_are_added_up() {
        let sum = Arc::default();
        let mut counting = Counting::new(Vec::new(), &sum);
        let text = b"running 2 tests\ntest result: ok. 2 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
                     test result: FAILED. 3 passed; 4 failed; 0 ignored; 0 measured; 5 filtered out\n";
        for piece in text.chunks(7) {
            counting.write_all(piece).unwrap();
        }
        let sum = *sum.lock().unwrap();
        assert_eq!((sum.passed, sum.failed, sum.skipped), (5, 4, 1));
        assert_eq!(counting.to, text);
    }
}
