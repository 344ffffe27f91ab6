//! `cargo xtask test`: style, unit tests here, suites in the lab host, one sum.

use std::{
    fs,
    io::{self, Write, stdout},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use bulkhead_guest_kernel::Progress;
use bulkhead_tests::lab::{Clock, Exit, Job, Output, Session};

use crate::{build, lab, progress::Bar, tools};

/// A hang is a failure. The machine is emulated, and may be busy.
const TEST_DEADLINE: Duration = Duration::from_secs(1200);

/// How long collecting evidence may take.
const EVIDENCE_DEADLINE: Duration = Duration::from_secs(60);

/// Runs in the lab host: an archive of what tells why a test failed.
const EVIDENCE: &str = include_str!("evidence.sh");

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
    let prefix = lab::prefix(&bar)?;
    let mut ready = lab::Ready::new(Some(&prefix), &bar)?.with("tools", tools::testers(&bar)?);
    for (name, path) in &suites {
        ready = ready.with(&format!("suites/{name}"), path);
    }
    drop(bar);

    let sum = Arc::new(Mutex::new(Counts::default()));
    let here = on_this_machine(filter, &sum)?;
    let there = in_the_lab(&ready, &suites, filter, &sum, Bar::new())?;
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

/// What is tested here. `--bins` would also start the agent's program, which is
/// the first process of a guest and nothing else.
const HERE: [&[&str]; 4] = [
    &[
        "--workspace",
        "--exclude",
        "bulkhead-agent",
        "--lib",
        "--bins",
    ],
    &["--package", "bulkhead-agent", "--lib"],
    // Real containers by the agent's own code, and the shim as containerd calls
    // it; both in namespaces of their own.
    &["--package", "bulkhead-agent", "--test", "containers"],
    &["--package", "bulkhead-shim", "--test", "host"],
];

/// How many of them need root.
const AS_ROOT: usize = 2;

/// Tests that need no virtual machine.
fn on_this_machine(filter: Option<&str>, sum: &Arc<Mutex<Counts>>) -> Result<bool> {
    let mut good = true;
    let root = rustix::process::geteuid().is_root();
    if !root {
        eprintln!("Skipped, because they need root: the tests of agent and shim on this machine");
    }
    for tested in &HERE[..HERE.len() - if root { 0 } else { AS_ROOT }] {
        let mut child = Command::new(build::cargo_program())
            .args(["test", "--quiet", "--no-fail-fast"])
            .args(*tested)
            .args(filter)
            .current_dir(build::workspace())
            .stdout(Stdio::piped())
            .spawn()
            .context("Cannot start cargo")?;
        let mut output = child.stdout.take().context("cargo has no output")?;
        io::copy(&mut output, &mut Counting::new(stdout(), sum))?;
        good &= child.wait()?.success();
    }
    Ok(good)
}

/// The suites, each in a lab host of its own, each test in a process of its own:
/// a test that hangs is killed, with evidence, and the others still run.
fn in_the_lab(
    ready: &lab::Ready,
    suites: &[(String, PathBuf)],
    filter: Option<&str>,
    sum: &Arc<Mutex<Counts>>,
    bar: Bar,
) -> Result<bool> {
    let evidence = lab::evidence_dir()?;
    let mut out = Counting::new(stdout(), sum);
    let mut bar = Some(bar);
    let mut good = true;
    for (suite, path) in suites {
        let mut tests = list(path)?;
        tests.retain(|test| filter.is_none_or(|text| test.contains(text)));
        if tests.is_empty() {
            continue;
        }
        let start = |bar: Option<Bar>| ready.session(Clock::Wall, &bar.unwrap_or_else(Bar::new));
        let mut session = start(bar.take())?;
        let program = format!("/lab/suites/{suite}");
        writeln!(out, "\nSuite {suite}")?;
        // A test that fails gets a second try in a fresh lab host, and both are
        // told: the machine is emulated, and now and then one does not come back.
        let mut left: Vec<(&String, u8)> = tests.iter().rev().map(|test| (test, 2)).collect();
        while let Some((test, tries)) = left.pop() {
            let began = Instant::now();
            let job =
                Job::new([&program, "--exact", test, "--test-threads=1"]).deadline(TEST_DEADLINE);
            // A lab host that is lost fails the test, and no other.
            let output = session.output(&job);
            let seconds = began.elapsed().as_secs();
            if let Ok(output) = &output
                && output.exit == Exit::Code(0)
            {
                let skipped = String::from_utf8_lossy(&output.stdout).contains("1 ignored");
                let word = if skipped { "skipped" } else { "ok" };
                writeln!(out, "{test} … {word}, {seconds} s")?;
                add(sum, |sum| {
                    if skipped {
                        sum.skipped += 1;
                    } else {
                        sum.passed += 1;
                    }
                });
                continue;
            }
            if tries > 1 {
                left.push((test, tries - 1));
            } else {
                good = false;
                add(sum, |sum| sum.failed += 1);
            }
            let place = evidence.join(suite).join(test.replace("::", "-"));
            let why = match output {
                Ok(output) => {
                    // What it wrote is not counted a second time.
                    let mut plain = stdout();
                    plain.write_all(&output.stdout)?;
                    plain.write_all(&output.stderr)?;
                    let kept = keep_evidence(&mut session, &output, &place);
                    let why = match output.exit {
                        Exit::Code(code) => format!("exit code {code}"),
                        Exit::Deadline => format!("killed after {} s", TEST_DEADLINE.as_secs()),
                    };
                    match kept {
                        Ok(()) => why,
                        Err(error) => format!("{why}, evidence incomplete: {error:#}"),
                    }
                }
                Err(error) => {
                    fs::create_dir_all(&place)?;
                    fs::copy(session.console(), place.join("console"))?;
                    format!("{error:#}")
                }
            };
            writeln!(
                stdout(),
                "{test} … FAILED{}, {seconds} s, {why}; evidence: {}",
                if tries > 1 { " at the first try" } else { "" },
                place.display()
            )?;
            // Whatever it left must not make the next one fail.
            session = start(None)?;
        }
    }
    Ok(good)
}

/// Names of the tests in a suite; its executable lists them on any machine.
fn list(program: &Path) -> Result<Vec<String>> {
    let output = Command::new(program)
        .args(["--list", "--format=terse"])
        .output()
        .with_context(|| format!("Cannot start {}", program.display()))?;
    ensure!(
        output.status.success(),
        "{} does not list its tests",
        program.display()
    );
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .map(str::to_owned)
        .collect())
}

/// Saves what tells why a test failed: its output, the lab host's console, and
/// what the script finds there.
fn keep_evidence(session: &mut Session, output: &Output, place: &Path) -> Result<()> {
    fs::create_dir_all(place).with_context(|| format!("Cannot make {}", place.display()))?;
    fs::write(place.join("stdout"), &output.stdout)?;
    fs::write(place.join("stderr"), &output.stderr)?;
    fs::copy(session.console(), place.join("console"))?;
    let job = Job::new(["bash", "-c", EVIDENCE]).deadline(EVIDENCE_DEADLINE);
    let archive = place.join("evidence.tar");
    fs::write(&archive, session.output(&job)?.stdout)?;
    let status = Command::new("tar")
        .arg("-C")
        .arg(place)
        .arg("-xf")
        .arg(&archive)
        .status()
        .context("Cannot start tar")?;
    // An archive that is cut off stays for whoever can read it.
    if status.success() {
        fs::remove_file(&archive)?;
    }
    Ok(())
}

fn add(sum: &Arc<Mutex<Counts>>, change: impl FnOnce(&mut Counts)) {
    change(&mut sum.lock().unwrap_or_else(PoisonError::into_inner));
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
