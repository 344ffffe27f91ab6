//! `cargo xtask reproduce`: are the guest's files the same bytes wherever they are built?
//!
//! Builds for real, in a folder and with a target directory that no build has seen, and
//! compares with what the ordinary way gives: agent and guest root, and the kernel with
//! its configuration if that is wanted, which takes as long as the first time.

use std::{
    fs,
    io::{Write, stdout},
    path::Path,
    process::Command,
};

use anyhow::{Context, Result, ensure};
use bulkhead_guest::{Progress, cache::Cache};

use crate::build;

/// Builds everything again elsewhere and compares.
pub(crate) fn run(with_kernel: bool, progress: &dyn Progress) -> Result<()> {
    let mut same = Vec::new();
    progress.step("Building the agent here");
    let here = build::agent(build::workspace(), &build::target_dir().join("agent"))?;
    let elsewhere = tempfile::Builder::new()
        .prefix("another place ")
        .tempdir()?;
    let copy = elsewhere.path().join("checkout");
    copy_of_the_source(&copy)?;
    progress.step("Building the agent elsewhere");
    let there = build::agent(&copy, &elsewhere.path().join("target"))?;
    same.push(("agent", fs::read(&here)? == fs::read(&there)?));

    let roots = [(here, "one"), (there, "two")].map(|(agent, name)| {
        let out = elsewhere.path().join(name);
        bulkhead_guest::root::build(&agent, &out).map(|image| image.sha256)
    });
    let [one, two] = roots;
    same.push(("guest root", one? == two?));

    if with_kernel {
        let known = bulkhead_guest::ensure(&Cache::of_this_user()?, progress)?;
        let fresh = bulkhead_guest::ensure(&Cache::at(&elsewhere.path().join("cache"))?, progress)?;
        same.push((
            "kernel configuration",
            known.config_sha256 == fresh.config_sha256,
        ));
        same.push(("kernel", known.sha256 == fresh.sha256));
    }
    let mut out = stdout();
    for (what, same) in &same {
        let word = if *same { "the same bytes" } else { "DIFFERS" };
        writeln!(out, "{what}: {word}")?;
    }
    let different: Vec<&str> = same
        .iter()
        .filter(|(_, same)| !same)
        .map(|(what, _)| *what)
        .collect();
    ensure!(
        different.is_empty(),
        "Built elsewhere, these have other bytes: {}",
        different.join(", ")
    );
    Ok(())
}

/// Copies the files that git knows, as they are now, into the new directory `to`.
fn copy_of_the_source(to: &Path) -> Result<()> {
    let output = Command::new("git")
        .args(["ls-files", "-z"])
        .current_dir(build::workspace())
        .output()
        .context("Cannot start git")?;
    ensure!(
        output.status.success(),
        "git ls-files failed: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    for name in String::from_utf8(output.stdout)?.split_terminator('\0') {
        let (from, to) = (build::workspace().join(name), to.join(name));
        // What was removed and not yet committed.
        if !from.exists() {
            continue;
        }
        if let Some(folder) = to.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::copy(&from, &to).with_context(|| format!("Cannot copy {}", from.display()))?;
    }
    Ok(())
}
