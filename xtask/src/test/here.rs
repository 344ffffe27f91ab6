//! Tests that need no virtual machine, on this machine.

use std::{
    io::{Write, stdout},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result};

use super::{
    Program,
    lab_host::Planned,
    libtest::{self, Verdict},
    report::Report,
};
use crate::build;

/// Runs the programs that are not written for the lab host: the tests that this machine
/// cannot run and the lab host may.
pub(super) fn run(
    programs: &[Program],
    filter: Option<&str>,
    report: &Report,
) -> Result<Vec<Planned>> {
    let mut elsewhere = Vec::new();
    for program in programs.iter().filter(|program| !program.is_suite()) {
        let began = Instant::now();
        let output = Command::new(&program.path)
            .arg("--show-output")
            .args(filter.filter(|text| program.name != *text))
            .current_dir(&program.directory)
            .stderr(Stdio::inherit())
            .output()
            .with_context(|| format!("Cannot start {}", program.path.display()))?;
        let text = String::from_utf8_lossy(&output.stdout);
        let told = libtest::read(&text);
        let mut failed = 0;
        for test in told {
            failed += usize::from(matches!(test.verdict, Verdict::Failed(_)));
            if let Verdict::Skipped(_) = test.verdict
                && program.runs_in_the_lab()
            {
                elsewhere.push(Planned::new(&program.name, &test.name));
            } else {
                report.add(&program.name, &test.name, test.verdict, None);
            }
        }
        if !output.status.success() {
            stdout().write_all(&output.stdout)?;
            if failed == 0 {
                let why = format!("{}: {}\n{text}", program.path.display(), output.status);
                report.add(&program.name, "all of them", Verdict::Failed(why), None);
            }
        }
        report.took(&program.name, began.elapsed());
        let closing = text.lines().find(|line| line.starts_with("test result: "));
        writeln!(
            stdout(),
            "{}: {}",
            program.name,
            closing.unwrap_or("it did not come to its end")
        )?;
    }
    Ok(elsewhere)
}

/// Runs the examples in the documentation.
pub(super) fn documentation(report: &Report) -> Result<()> {
    let suite = "documentation";
    let began = Instant::now();
    let output = Command::new(build::cargo_program())
        .args([
            "test",
            "--workspace",
            "--doc",
            "--no-fail-fast",
            "--",
            "--show-output",
        ])
        .current_dir(build::workspace())
        .output()
        .context("Cannot start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    for test in libtest::read(&text) {
        report.add(suite, &test.name, test.verdict, None);
    }
    if !output.status.success() {
        let why = format!("{text}\n{}", String::from_utf8_lossy(&output.stderr));
        writeln!(stdout(), "{why}")?;
        report.add(suite, "all of it", Verdict::Failed(why), None);
    }
    report.took(suite, began.elapsed());
    Ok(())
}
