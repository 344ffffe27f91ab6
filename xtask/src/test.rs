//! `cargo xtask test`: style, unit tests here, suites in the lab host, one sum.

use std::{
    fs,
    io::{self, Write, stdout},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use bulkhead_guest_kernel::Progress;
use bulkhead_tests::lab::{Clock, Exit, Job, MEMORY_MIB, Output, Session};

use crate::{
    build, lab,
    progress::{Bar, Quiet},
    tools,
};

/// A hang is a failure. The machine is emulated, and may be busy.
const TEST_DEADLINE: Duration = Duration::from_secs(1200);

/// How long collecting evidence may take.
const EVIDENCE_DEADLINE: Duration = Duration::from_secs(60);

/// How often a test may be tried, each time in a fresh lab host, and each time told:
/// the machine is emulated, and now and then one does not come back.
const TRIES: u8 = 2;

/// How the names of the tests begin that take longest, and are begun first.
const LONGEST: &str = "fsx_finds_no_fault";

/// Runs in the lab host: an archive of what tells why a test failed.
const EVIDENCE: &str = include_str!("evidence.sh");

/// What has been counted so far.
#[derive(Clone, Copy, Debug, Default)]
struct Counts {
    passed: u64,
    failed: u64,
    skipped: u64,
    /// Of those that passed: at the second try.
    again: u64,
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
    if sum.again > 0 {
        writeln!(out, "{} of those passed at the second try only", sum.again)?;
    }
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

/// A test that waits for a lab host.
#[derive(Debug)]
struct Planned {
    suite: String,
    test: String,
    /// How often it may be tried.
    tries: u8,
}

/// The suites, in as many lab hosts side by side as this machine has processors.
/// Each test has a process of its own: one that hangs is killed, with evidence, and
/// the others still run.
fn in_the_lab(
    ready: &lab::Ready,
    suites: &[(String, PathBuf)],
    filter: Option<&str>,
    sum: &Arc<Mutex<Counts>>,
    bar: Bar,
) -> Result<bool> {
    let mut planned = Vec::new();
    for (suite, path) in suites {
        for test in list(path)? {
            if filter.is_none_or(|text| test.contains(text)) {
                planned.push(Planned {
                    suite: suite.clone(),
                    test,
                    tries: TRIES,
                });
            }
        }
    }
    // Taken from the end.
    planned.reverse();
    planned.sort_by_key(|planned| planned.test.starts_with(LONGEST));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let hosts = processors.min(memory_for()).min(planned.len());
    let (planned, evidence) = (Mutex::new(planned), lab::evidence_dir()?);
    // What must be made first is made once, and shown.
    let mut first = (hosts > 0)
        .then(|| ready.session(Clock::Wall, &bar))
        .transpose()?;
    drop(bar);
    let mut good = true;
    std::thread::scope(|scope| {
        let hosts: Vec<_> = (0..hosts)
            .map(|_| {
                let session = first.take();
                scope.spawn(|| one_lab_host(ready, session, &planned, sum, &evidence))
            })
            .collect();
        for host in hosts {
            good &= host
                .join()
                .map_err(|_| anyhow!("A lab host's thread panicked"))??;
        }
        Ok(good)
    })
}

/// For how many lab hosts half of this machine's memory is enough; at least one.
fn memory_for() -> usize {
    let system = rustix::system::sysinfo();
    let bytes = system.totalram.saturating_mul(u64::from(system.mem_unit));
    let hosts = bytes / 2 / (u64::from(MEMORY_MIB) << 20);
    usize::try_from(hosts).unwrap_or(usize::MAX).max(1)
}

/// Runs tests until none is left, from `session` on.
fn one_lab_host(
    ready: &lab::Ready,
    session: Option<Session>,
    planned: &Mutex<Vec<Planned>>,
    sum: &Arc<Mutex<Counts>>,
    evidence: &Path,
) -> Result<bool> {
    let mut good = true;
    let mut session = session;
    let next = || planned.lock().unwrap_or_else(PoisonError::into_inner).pop();
    while let Some(mut planned) = next() {
        let mut host = match session.take() {
            Some(session) => session,
            None => ready.session(Clock::Wall, &Quiet)?,
        };
        while planned.tries > 0 {
            planned.tries -= 1;
            if attempt(&mut host, &planned, sum, evidence)? {
                break;
            }
            good &= planned.tries > 0;
            // Whatever it left must not make the next one fail.
            host = ready.session(Clock::Wall, &Quiet)?;
        }
        session = Some(host);
    }
    Ok(good)
}

/// Runs a test once; tells what came of it, in one piece.
fn attempt(
    session: &mut Session,
    planned: &Planned,
    sum: &Arc<Mutex<Counts>>,
    evidence: &Path,
) -> Result<bool> {
    let Planned { suite, test, tries } = planned;
    let began = Instant::now();
    let program = format!("/lab/suites/{suite}");
    let job = Job::new([&program, "--exact", test, "--test-threads=1"]).deadline(TEST_DEADLINE);
    // A lab host that is lost fails the test, and no other.
    let output = session.output(&job);
    let seconds = began.elapsed().as_secs();
    let add = |change: fn(&mut Counts)| {
        change(&mut sum.lock().unwrap_or_else(PoisonError::into_inner));
    };
    if let Ok(output) = &output
        && output.exit == Exit::Code(0)
    {
        let skipped = String::from_utf8_lossy(&output.stdout).contains("1 ignored");
        add(if skipped {
            |sum| sum.skipped += 1
        } else {
            |sum| sum.passed += 1
        });
        if *tries + 1 < TRIES {
            add(|sum| sum.again += 1);
        }
        let word = if skipped { "skipped" } else { "ok" };
        writeln!(stdout(), "{suite}: {test} … {word}, {seconds} s")?;
        return Ok(true);
    }
    if *tries == 0 {
        add(|sum| sum.failed += 1);
    }
    let place = evidence.join(suite).join(test.replace("::", "-"));
    let mut text = Vec::new();
    let why = match output {
        Ok(output) => {
            text.extend_from_slice(&output.stdout);
            text.extend_from_slice(&output.stderr);
            let why = match output.exit {
                Exit::Code(code) => format!("exit code {code}"),
                Exit::Deadline => format!("killed after {} s", TEST_DEADLINE.as_secs()),
            };
            match keep_evidence(session, &output, &place) {
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
        text,
        "{suite}: {test} … FAILED{}, {seconds} s, {why}; evidence: {}",
        if *tries > 0 { " at the first try" } else { "" },
        place.display()
    )?;
    stdout().write_all(&text)?;
    Ok(false)
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
