//! Programs of others that are built from their packages.

use std::{fs::File, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use bulkhead_guest_kernel::Progress;

use crate::{build, cache};

/// Test programs that run in containers, with the versions that are known to work.
const TESTERS: [(&str, &str); 2] = [("fsx", "0.3.2"), ("pjdfstest", "0.2.2")];

/// Builds the test programs once, static, so that any image runs them. Returns
/// the directory that holds them.
pub(crate) fn testers(progress: &dyn Progress) -> Result<PathBuf> {
    let root = cache::dir()?.join("testers");
    std::fs::create_dir_all(&root)?;
    let lock = File::create(root.join("lock"))?;
    lock.lock()?;
    for (name, version) in TESTERS {
        let place = root.join(format!("{name}-{version}"));
        if place.join("bin").join(name).exists() {
            continue;
        }
        progress.step(&format!("Building {name} {version}"));
        let target = tempfile::tempdir()?;
        build::cargo(
            &[
                "install",
                "--locked",
                "--target",
                "x86_64-unknown-linux-gnu",
                "--version",
                version,
                "--root",
                &place.to_string_lossy(),
                name,
            ],
            &[
                ("CARGO_TARGET_DIR", target.path().as_os_str()),
                ("RUSTFLAGS", "-C target-feature=+crt-static".as_ref()),
            ],
        )?;
    }
    let bin = root.join("bin");
    std::fs::create_dir_all(&bin)?;
    for (name, version) in TESTERS {
        std::fs::copy(
            root.join(format!("{name}-{version}/bin/{name}")),
            bin.join(name),
        )?;
    }
    Ok(bin)
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
pub(crate) fn deny(advisories: Advisories) -> Result<()> {
    let (name, version) = DENY;
    let root = cache::dir()?.join("cargo-deny");
    std::fs::create_dir_all(&root)?;
    let lock = File::create(root.join("lock"))?;
    lock.lock()?;
    let place = root.join(version);
    let program = place.join("bin").join(name);
    if !program.exists() {
        let target = tempfile::tempdir()?;
        let place = place.to_string_lossy();
        let arguments = [
            "install",
            "--locked",
            "--version",
            version,
            "--root",
            &place,
            name,
        ];
        build::cargo(
            &arguments,
            &[("CARGO_TARGET_DIR", target.path().as_os_str())],
        )?;
    }
    let mut checks = vec!["licenses", "bans", "sources"];
    let mut command = Command::new(program);
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
