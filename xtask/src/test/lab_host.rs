//! Suites in lab hosts: as many side by side as this machine can bear.
//!
//! Each test has a process of its own: one that hangs is killed, with evidence, and the
//! others still run.

use std::{
    env, fs,
    io::{Write, stdout},
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    thread::ScopedJoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use bulkhead_tests::{
    LEFT_BEHIND,
    lab::{Clock, Exit, Job, MEMORY_MIB, Output, Session},
};

use super::{
    Program,
    libtest::{self, Verdict},
    report::{Lost, Report},
    stall::Watch,
};
use crate::{
    lab,
    progress::{Bar, Quiet},
};

/// A hang is a failure. The machine is emulated, and may be busy.
const TEST_DEADLINE: Duration = Duration::from_secs(1200);

/// How long collecting evidence may take.
const EVIDENCE_DEADLINE: Duration = Duration::from_secs(60);

/// How often a test is begun at most; a second time only if its lab host was lost, or
/// this machine stood still meanwhile.
const TRIES: u8 = 2;

/// How the names of the tests begin that take longest, and are begun first.
const LONGEST: &str = "fsx_finds_no_fault";

/// How many rounds tests of many rounds do, if that is said.
const ROUNDS: &str = "BULKHEAD_ROUNDS";

/// So many rounds have the usual deadline.
const USUAL_ROUNDS: u32 = 5;

/// Runs in the lab host: an archive of what tells why a test failed.
const EVIDENCE: &str = include_str!("../evidence.sh");

/// A test that waits for a lab host.
#[derive(Debug)]
pub(super) struct Planned {
    /// Its executable.
    program: String,
    /// What its suite is called.
    suite: String,
    test: String,
    /// The tries before, of which none told anything of the test.
    lost: Vec<Lost>,
}

impl Planned {
    pub(super) fn new(suite: &str, test: &str) -> Planned {
        Planned {
            program: suite.to_owned(),
            suite: suite.to_owned(),
            test: test.to_owned(),
            lost: Vec::new(),
        }
    }

    /// The same test, told apart, for a lab host with this containerd.
    pub(super) fn with(mut self, containerd: &str) -> Planned {
        self.suite = format!("{} with {containerd}", self.program);
        self
    }

    fn report(self, report: &Report, verdict: Verdict, time: Duration) {
        let Planned {
            suite, test, lost, ..
        } = self;
        report.add_after(&suite, &test, lost, verdict, time);
    }

    /// Where the evidence of this try lies.
    fn place(&self, evidence: &Path) -> PathBuf {
        let place = evidence
            .join(self.suite.replace(' ', "-"))
            .join(self.test.replace("::", "-"));
        place.join(format!("try-{}", self.lost.len() + 1))
    }
}

/// What came of one try.
enum Try {
    Ended(Verdict),
    /// The emulator died or no longer answers: nothing is known of the test.
    Lost(String),
}

/// The tests of a suite; its executable lists them on any machine.
pub(super) fn plan(program: &Program, filter: Option<&str>) -> Result<Vec<Planned>> {
    let output = Command::new(&program.path)
        .args(["--list", "--format=terse"])
        .output()
        .with_context(|| format!("Cannot start {}", program.path.display()))?;
    ensure!(
        output.status.success(),
        "{} does not list its tests",
        program.path.display()
    );
    Ok(String::from_utf8(output.stdout)?
        .lines()
        .filter_map(|line| line.strip_suffix(": test"))
        .filter(|test| filter.is_none_or(|text| program.name == text || test.contains(text)))
        .map(|test| Planned::new(&program.name, test))
        .collect())
}

/// Where tests in lab hosts stand.
struct Run<'a> {
    ready: &'a lab::Ready,
    planned: Mutex<Vec<Planned>>,
    report: &'a Report,
    evidence: PathBuf,
    /// The long ones too.
    full: bool,
    clock: Watch,
}

/// Runs them all; those that are marked as ignored only if the run is a full one.
pub(super) fn run(
    ready: &lab::Ready,
    mut planned: Vec<Planned>,
    full: bool,
    report: &Report,
    bar: Bar,
) -> Result<()> {
    // Taken from the end.
    planned.reverse();
    planned.sort_by_key(|planned| planned.test.starts_with(LONGEST));
    let processors = std::thread::available_parallelism().map_or(1, usize::from);
    let hosts = processors.min(memory_for()).min(planned.len());
    let run = Run {
        ready,
        planned: Mutex::new(planned),
        report,
        evidence: lab::evidence_dir()?,
        full,
        clock: Watch::new(),
    };
    // What must be made first is made once, and shown.
    let mut first = (hosts > 0)
        .then(|| ready.session(Clock::Wall, &bar))
        .transpose()?;
    drop(bar);
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| run.clock.keep(|| over.load(Relaxed)));
        let hosts: Vec<_> = (0..hosts)
            .map(|_| {
                let session = first.take();
                scope.spawn(|| run.one_lab_host(session))
            })
            .collect();
        let ended: Vec<_> = hosts.into_iter().map(ScopedJoinHandle::join).collect();
        over.store(true, Relaxed);
        for host in ended {
            host.map_err(|_| anyhow!("A lab host's thread panicked"))??;
        }
        Ok(())
    })
}

/// For how many lab hosts half of this machine's memory is enough; at least one.
fn memory_for() -> usize {
    let system = rustix::system::sysinfo();
    let bytes = system.totalram.saturating_mul(u64::from(system.mem_unit));
    let hosts = bytes / 2 / (u64::from(MEMORY_MIB) << 20);
    usize::try_from(hosts).unwrap_or(usize::MAX).max(1)
}

impl Run<'_> {
    /// Runs tests until none is left, from `session` on.
    fn one_lab_host(&self, mut session: Option<Session>) -> Result<()> {
        let next = || {
            let mut planned = self.planned.lock().unwrap_or_else(PoisonError::into_inner);
            planned.pop()
        };
        while let Some(planned) = next() {
            self.one_test(&mut session, planned)?;
        }
        Ok(())
    }

    /// Runs a test until a try tells something of it. A lab host that is still good
    /// afterwards is in `session`.
    fn one_test(&self, session: &mut Option<Session>, mut planned: Planned) -> Result<()> {
        loop {
            let mut host = match session.take() {
                Some(session) => session,
                None => self.ready.session(Clock::Wall, &Quiet)?,
            };
            let began = Instant::now();
            let ended = self.attempt(&mut host, &planned)?;
            let time = began.elapsed();
            tell(&planned, &ended, time, &self.evidence)?;
            let (verdict, why, lost) = match ended {
                // Whatever a failed test left must not make the next one fail.
                Try::Ended(Verdict::Failed(why)) => (Verdict::Failed(why.clone()), why, false),
                Try::Ended(verdict) => {
                    *session = Some(host);
                    planned.report(self.report, verdict, time);
                    return Ok(());
                }
                Try::Lost(why) => {
                    let lost = format!("the lab host was lost: {why}");
                    (Verdict::Failed(lost), why, true)
                }
            };
            let stood_still = self.clock.since(began);
            let told_nothing = lost || stood_still.is_some();
            if !told_nothing || planned.lost.len() + 1 >= usize::from(TRIES) {
                planned.report(self.report, verdict, time);
                return Ok(());
            }
            planned.lost.push(Lost { why, stood_still });
        }
    }

    /// Runs a test once, with a look at the lab host before and after it.
    fn attempt(&self, session: &mut Session, planned: &Planned) -> Result<Try> {
        let program = format!("/lab/suites/{}", planned.program);
        let around = ["/lab/labd", "around", &program, "--exact", &planned.test];
        let rest = ["--show-output", "--test-threads=1"];
        let ignored = self.full.then_some("--include-ignored");
        let words = around.into_iter().chain(rest).chain(ignored);
        let mut job = Job::new(words).deadline(TEST_DEADLINE);
        if let Ok(rounds) = env::var(ROUNDS) {
            let number: u32 = rounds.parse().context("BULKHEAD_ROUNDS is no number")?;
            job = job
                .env(ROUNDS, &rounds)
                .deadline(TEST_DEADLINE * number.div_ceil(USUAL_ROUNDS).max(1));
        }
        let place = planned.place(&self.evidence);
        let output = match session.output(&job) {
            Ok(output) => output,
            Err(error) => {
                fs::create_dir_all(&place)?;
                fs::copy(session.console(), place.join("console"))?;
                return Ok(Try::Lost(format!("{error:#}")));
            }
        };
        let told = libtest::read(&String::from_utf8_lossy(&output.stdout));
        let why = match (output.exit, told.as_slice()) {
            (Exit::Code(0), [test]) if !matches!(test.verdict, Verdict::Failed(_)) => {
                return Ok(Try::Ended(test.verdict.clone()));
            }
            (Exit::Code(LEFT_BEHIND), _) => "it left something behind".to_owned(),
            (Exit::Code(code), _) => format!("exit code {code}"),
            (Exit::Deadline, _) => format!("killed after {} s", TEST_DEADLINE.as_secs()),
        };
        let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.push_str(&String::from_utf8_lossy(&output.stderr));
        text.push_str(&why);
        if let Err(error) = keep_evidence(session, &output, &place) {
            text.push_str(&format!("; the evidence is incomplete: {error:#}"));
        }
        Ok(Try::Ended(Verdict::Failed(text)))
    }
}

/// A line for each try, and for a failed one all that it wrote.
fn tell(planned: &Planned, ended: &Try, time: Duration, evidence: &Path) -> Result<()> {
    let Planned { suite, test, .. } = planned;
    let seconds = time.as_secs();
    let place = planned.place(evidence);
    let text = match ended {
        Try::Ended(Verdict::Passed) => format!("{suite}: {test} … ok, {seconds} s\n"),
        Try::Ended(Verdict::Skipped(why)) => {
            format!("{suite}: {test} … skipped, {seconds} s: {why}\n")
        }
        Try::Ended(Verdict::Failed(why)) => format!(
            "{why}\n{suite}: {test} … FAILED, {seconds} s; evidence: {}\n",
            place.display()
        ),
        Try::Lost(why) => format!(
            "{suite}: {test} … its lab host was lost after {seconds} s: {why}; evidence: {}\n",
            place.display()
        ),
    };
    // In one piece, for others write as well.
    stdout().write_all(text.as_bytes())?;
    Ok(())
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
