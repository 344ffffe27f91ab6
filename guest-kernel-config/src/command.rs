//! Running other programs, with errors that show what they said.

use std::process::Command;

use anyhow::{Context, Result, bail};

/// A command that knows of its surroundings only what it needs: where programs
/// are, how to reach the network, where to put temporary files.
///
/// Language and time zone are fixed, and no variable that make, the compiler or
/// Kconfig would heed gets through.
pub(crate) fn clean(program: &str) -> Command {
    const KEPT: [&str; 9] = [
        "PATH",
        "HOME",
        "TMPDIR",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
    ];
    let mut command = Command::new(program);
    command.env_clear().env("LC_ALL", "C").env("TZ", "UTC");
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Runs `command` to its end and returns what it wrote to standard output.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let program = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("Cannot run {program}"))?;
    if !output.status.success() {
        bail!(
            "{program}: {}: {}",
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    String::from_utf8(output.stdout).with_context(|| format!("{program} wrote no text"))
}
