//! Programs of the building machine that the lab is made with.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// `program` with an environment that says the same on every machine.
pub(crate) fn clean(program: &str) -> Command {
    let mut command = Command::new(program);
    command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    // A user's own PATH may lack the places of mke2fs and debootstrap.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// Runs it to its end: its standard output, or an error with what it said.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let output = command
        .output()
        .with_context(|| format!("Cannot run {name}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let said = format!("{text}{}", String::from_utf8_lossy(&output.stderr));
        let last: Vec<&str> = said.lines().rev().take(12).collect();
        let last: Vec<&str> = last.into_iter().rev().collect();
        anyhow::bail!("{name} failed with {}:\n{}", output.status, last.join("\n"));
    }
    Ok(text)
}

/// Runs it with its output in the file `log`, which the error names.
pub(crate) fn logged(command: &mut Command, log: &Path) -> Result<()> {
    let name = command.get_program().to_string_lossy().into_owned();
    let file =
        std::fs::File::create(log).with_context(|| format!("Cannot make {}", log.display()))?;
    let status = command
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("Cannot run {name}"))?;
    ensure!(
        status.success(),
        "{name} failed with {status}; its output is in {}",
        log.display()
    );
    Ok(())
}
