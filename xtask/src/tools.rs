//! Programs of others that are built from their packages.

use std::{ffi::OsStr, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use bulkhead_guest::{
    Progress,
    cache::{self, Cache, Entry},
};

use crate::build;

/// Test programs that run in containers, with the versions that are known to work.
const TESTERS: [(&str, &str); 2] = [("fsx", "0.3.2"), ("pjdfstest", "0.2.2")];

/// Builds the test programs once, static, so that any image runs them. The directory
/// `bin` of the entry holds them.
pub(crate) fn testers(progress: &dyn Progress) -> Result<Entry> {
    let parts = TESTERS.iter().flat_map(|(name, version)| [*name, version]);
    let key = cache::key(parts.chain([build::rustc()?.as_str()]));
    Cache::of_this_user()?.entry("testers", &key, progress, |entry, work| {
        for (name, version) in TESTERS {
            progress.step(&format!("Building {name} {version}"));
            let arguments = ["--target", "x86_64-unknown-linux-gnu"];
            let flags = ("RUSTFLAGS", "-C target-feature=+crt-static".as_ref());
            install(name, version, &arguments, &[flags], entry, work)?;
        }
        Ok(())
    })
}

/// Builds a program of the registry; it then lies in `bin` below `root`.
fn install(
    name: &str,
    version: &str,
    arguments: &[&str],
    variables: &[(&str, &OsStr)],
    root: &Path,
    work: &Path,
) -> Result<()> {
    let place = root.to_string_lossy();
    let fixed = [
        "install",
        "--locked",
        "--no-track",
        "--version",
        version,
        "--root",
        &place,
        name,
    ];
    let target = work.join("target");
    let target = ("CARGO_TARGET_DIR", target.as_os_str());
    build::cargo(
        &[&fixed, arguments].concat(),
        &[&[target], variables].concat(),
    )
}

/// The cargo-deny that checks the dependencies.
const DENY: (&str, &str) = ("cargo-deny", "0.20.2");

/// Whether known faults of dependencies are looked for, which needs the network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Advisories {
    /// The database is fetched and compared.
    Checked,
    /// Licences, bans and sources only: the same answer on any day.
    Skipped,
}

/// Runs cargo-deny, which is built once.
pub(crate) fn deny(advisories: Advisories, progress: &dyn Progress) -> Result<()> {
    let (name, version) = DENY;
    let key = cache::key([name, version, &build::rustc()?]);
    let entry = Cache::of_this_user()?.entry(name, &key, progress, |entry, work| {
        progress.step(&format!("Building {name} {version}"));
        install(name, version, &[], &[], entry, work)
    })?;
    let mut checks = vec!["licenses", "bans", "sources"];
    let mut command = Command::new(entry.file("bin").join(name));
    match advisories {
        Advisories::Checked => checks.push("advisories"),
        Advisories::Skipped => drop(command.arg("--offline")),
    }
    let output = command
        .args(["--log-level", "warn", "check", "--hide-inclusion-graph"])
        .args(checks)
        .current_dir(build::workspace())
        .output()
        .context("Cannot start cargo-deny")?;
    ensure!(
        output.status.success(),
        "cargo-deny found something:\n{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
