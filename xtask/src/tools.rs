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

/// Runs cargo-deny, installing it first if need be.
pub(crate) fn deny() -> Result<()> {
    let installed = Command::new("cargo-deny").arg("--version").output().is_ok();
    if !installed {
        build::cargo(&["install", "--locked", "cargo-deny"], &[])?;
    }
    let status = Command::new(build::cargo_program())
        .args(["deny", "check", "licenses", "bans", "sources", "advisories"])
        .current_dir(build::workspace())
        .status()
        .context("Cannot start cargo-deny")?;
    ensure!(status.success(), "cargo-deny found something");
    Ok(())
}
