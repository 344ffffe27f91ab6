//! Debian packages of this machine that the project needs.

use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_guest::Progress;

/// What compiling our own programs needs beside Rust; and `ip`, `tc` and `nft`, with which
/// their tests make networks.
const OURS: &[&str] = &[
    "gcc",
    "iproute2",
    "libc6-dev",
    "libseccomp-dev",
    "nftables",
    "pkg-config",
];

/// Installs what is missing; as another user than root, says what is.
pub(crate) fn ensure_installed(progress: &dyn Progress) -> Result<()> {
    let mut missing = missing()?;
    missing.sort_unstable();
    missing.dedup();
    if missing.is_empty() {
        return Ok(());
    }
    let list = missing.join(" ");
    if !rustix::process::geteuid().is_root() {
        bail!(
            "Some Debian packages are missing; install them:\n  apt-get install --no-install-recommends {list}"
        );
    }
    progress.step(&format!("Installing Debian packages: {list}"));
    apt(&["update"])?;
    let mut arguments = vec!["install", "--yes", "--no-install-recommends"];
    arguments.extend(&missing);
    apt(&arguments)
}

fn missing() -> Result<Vec<&'static str>> {
    let wanted = || {
        OURS.iter()
            .chain(bulkhead_guest::PACKAGES)
            .chain(bulkhead_tests::lab::packages::MACHINE)
    };
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat", "${db:Status-Status} ${Package}\n"])
        .args(wanted())
        .output()
        .context("Cannot start dpkg-query: the project builds on Debian")?;
    let known = String::from_utf8_lossy(&output.stdout);
    Ok(wanted()
        .copied()
        .filter(|name| {
            !known
                .lines()
                .any(|line| line == format!("installed {name}"))
        })
        .collect())
}

fn apt(arguments: &[&str]) -> Result<()> {
    let output = Command::new("apt-get")
        .args(["-q", "-o", "Dpkg::Use-Pty=0"])
        .args(arguments)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .context("Cannot start apt-get")?;
    ensure!(
        output.status.success(),
        "apt-get {} failed: {}",
        arguments.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}
