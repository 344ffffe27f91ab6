//! `cargo xtask test`: style, tests on this machine, suites in the lab host, one sum.
//!
//! - A test counts as passed, failed or skipped, and a skipped one has a reason.
//! - Whatever can run here does; what this machine lacks something for, and the lab host
//!   does not, runs there.
//! - A test is tried again only if its lab host was lost. If it passes then, both tries
//!   are told and the run has failed all the same. Only where this machine itself stood
//!   still meanwhile does its first try not count.
//! - Around each test in the lab host the host is looked at for what was left behind.

mod here;
mod lab_host;
mod libtest;
mod report;
mod stall;

use std::{
    io::{Write, stdout},
    path::{Path, PathBuf},
    process::{Command, ExitCode, Stdio},
};

use anyhow::{Context, Result, ensure};
use bulkhead_guest::Progress;
use bulkhead_tests::lab::programs::{CONTAINERD, containerds};

use self::report::Report;
use crate::{build, lab, progress::Bar, tools};

/// Below the target directory: the results for machines.
const JUNIT: &str = "test-results/junit.xml";

/// The suites that containerd's version could make a difference for.
const OF_CONTAINERD: [&str; 2] = ["containerd", "matrix"];

/// How much is run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Extent {
    /// Those tests of the lab host's suites too that are ignored, for they take long.
    pub(crate) full: bool,
    /// Suites of containerd with each of those that are pinned, not only with the newest.
    pub(crate) matrix: bool,
}

/// Runs everything; with a filter, only the suite of that name, or the tests whose names
/// contain it.
pub(crate) fn all(filter: Option<&str>, extent: Extent) -> Result<ExitCode> {
    let bar = Bar::new();
    crate::packages::ensure_installed(&bar)?;
    if filter.is_none() {
        bar.step("Checking the style");
        build::cargo(&["fmt", "--all", "--check"], &[])?;
        let clippy = ["clippy", "--workspace", "--all-targets", "--"];
        build::cargo(&[&clippy[..], &["-D", "warnings"]].concat(), &[])?;
        bar.step("Checking licences and sources of the dependencies");
        tools::deny(tools::Advisories::Skipped, &bar)?;
    }
    bar.step("Building the tests");
    let programs = programs()?;
    let suites = programs.iter().filter(|program| program.is_suite());
    ensure!(
        suites.clone().count() > 0,
        "The crate bulkhead-tests has no suites"
    );
    let prefix = lab::prefix(&bar)?;
    let testers = tools::testers(&bar)?;
    let ready = |containerd: &str, bar: &Bar| -> Result<lab::Ready> {
        let mut ready = lab::Ready::with_containerd(containerd, Some(&prefix), bar)?
            .with("tools", testers.file("bin"));
        for program in programs.iter().filter(|program| program.runs_in_the_lab()) {
            ready = ready.with(&format!("suites/{}", program.name), &program.path);
        }
        // What the agent's own tests start as a container's helper.
        let agent = build::target_dir().join("debug/bulkhead-agent");
        Ok(ready.with("suites/bulkhead-agent", agent))
    };
    let newest = ready(CONTAINERD, &bar)?;
    drop(bar);

    let report = Report::default();
    let elsewhere = here::run(&programs, filter, &report)?;
    if filter.is_none() {
        here::documentation(&report)?;
    }
    let mut planned = elsewhere;
    for program in suites.clone() {
        planned.extend(lab_host::plan(program, filter)?);
    }
    lab_host::run(&newest, planned, extent.full, &report, Bar::new())?;
    let others = containerds()?.into_iter().filter(|it| it != CONTAINERD);
    for containerd in others.filter(|_| extent.matrix) {
        let mut planned = Vec::new();
        for program in suites.clone() {
            if OF_CONTAINERD.contains(&&*program.name) {
                let tests = lab_host::plan(program, filter)?.into_iter();
                planned.extend(tests.map(|test| test.with(&containerd)));
            }
        }
        let bar = Bar::new();
        let ready = ready(&containerd, &bar)?;
        lab_host::run(&ready, planned, extent.full, &report, bar)?;
    }
    report.print()?;
    let junit = build::target_dir().join(JUNIT);
    report.write_junit(&junit)?;
    writeln!(stdout().lock(), "JUnit XML: {}", junit.display())?;
    let counts = report.counts();
    let good = counts.failed == 0 && counts.again == 0 && counts.passed > 0;
    Ok(if good {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// An executable of tests.
#[derive(Clone, Debug)]
pub(super) struct Program {
    /// What its results are called.
    name: String,
    path: PathBuf,
    /// Where its source begins.
    source: PathBuf,
    /// The package's directory, in which its tests expect to run.
    directory: PathBuf,
}

impl Program {
    /// Is it written for the lab host?
    fn is_suite(&self) -> bool {
        self.source
            .components()
            .any(|part| part.as_os_str() == "suites")
    }

    /// Can it run there? Integration tests are; a unit test that this machine cannot
    /// run stays skipped.
    fn runs_in_the_lab(&self) -> bool {
        self.source
            .components()
            .any(|part| part.as_os_str() == "tests")
    }
}

/// Builds all tests: their executables.
fn programs() -> Result<Vec<Program>> {
    let output = Command::new(build::cargo_program())
        .args([
            "test",
            "--no-run",
            "--workspace",
            "--message-format=json-render-diagnostics",
        ])
        .arg("--quiet")
        .current_dir(build::workspace())
        .stderr(Stdio::inherit())
        .output()
        .context("Cannot start cargo")?;
    ensure!(output.status.success(), "The tests do not compile");
    let mut programs = Vec::new();
    for line in output.stdout.split(|byte| *byte == b'\n') {
        let Ok(message) = serde_json::from_slice::<serde_json::Value>(line) else {
            continue;
        };
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned);
        let (Some(path), Some(name), Some(source), Some(manifest)) = (
            text(&message["executable"]),
            text(&message["target"]["name"]),
            text(&message["target"]["src_path"]),
            text(&message["manifest_path"]),
        ) else {
            continue;
        };
        if message["profile"]["test"].as_bool() != Some(true) {
            continue;
        }
        let directory = Path::new(&manifest)
            .parent()
            .map_or_else(|| build::workspace().to_owned(), Path::to_owned);
        let kind = text(&message["target"]["kind"][0]).unwrap_or_default();
        let source = PathBuf::from(source);
        let package = directory.file_name().unwrap_or_default().to_string_lossy();
        programs.push(Program {
            // A library and a program of one package may share a name, and so may the
            // tests of two packages.
            name: match kind.as_str() {
                "bin" => format!("{name}-bin"),
                "test" if package != "tests" => format!("{package}-{name}"),
                _ => name.replace('_', "-"),
            },
            path: path.into(),
            source: source
                .strip_prefix(build::workspace())
                .map_or_else(|_| source.clone(), Path::to_owned),
            directory,
        });
    }
    programs.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(programs)
}
