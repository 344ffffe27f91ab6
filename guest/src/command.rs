//! Programs of the building machine: the same surroundings for each, a deadline where
//! one may hang, errors that show what it said.

use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

/// Lines of a program's output that an error shows.
const LINES: usize = 12;

/// A command that knows of its surroundings only what it needs: where programs
/// are, how to reach the network, where to put temporary files.
///
/// Language and time zone are fixed, and no variable that make, the compiler,
/// Kconfig or Go would heed gets through.
#[must_use]
pub fn clean(program: &str) -> Command {
    const KEPT: [&str; 12] = [
        "HOME",
        "TMPDIR",
        "http_proxy",
        "https_proxy",
        "no_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "NO_PROXY",
        "SSL_CERT_FILE",
        "SSL_CERT_DIR",
        // Where Go modules are fetched from is the machine's matter.
        "GOPROXY",
        "GOSUMDB",
    ];
    let mut command = Command::new(program);
    command
        .env_clear()
        .env("LC_ALL", "C.UTF-8")
        .env("TZ", "UTC")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .stdin(Stdio::null());
    for name in KEPT {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    // A user's own PATH may lack the places of mke2fs and depmod.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("{path}:/usr/sbin:/sbin"));
    command
}

/// [`clean`], ended when it takes longer than `deadline`, and when whoever starts it
/// ends: what it has started itself goes with it.
#[must_use]
pub fn limited(program: &str, deadline: Duration) -> Command {
    let mut command = clean("setpriv");
    command
        .args(["--pdeathsig", "TERM", "timeout", "--kill-after=30"])
        .args([&deadline.as_secs().to_string(), program]);
    command
}

/// Runs it to its end: its standard output, or an error with what it said.
///
/// # Errors
///
/// It cannot be run, or it fails.
pub fn output(command: &mut Command) -> Result<String> {
    output_bytes(command).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// [`output`], of any bytes.
///
/// # Errors
///
/// It cannot be run, or it fails.
pub fn output_bytes(command: &mut Command) -> Result<Vec<u8>> {
    let name = name_of(command);
    let output = command
        .output()
        .with_context(|| format!("Cannot run {name}"))?;
    if !output.status.success() {
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said);
        let why = why(output.status);
        anyhow::bail!("{name} {why}:\n{}", last_lines(&said, LINES));
    }
    Ok(output.stdout)
}

/// Runs it with its output in the file `log`, which the error names.
///
/// # Errors
///
/// It cannot be run, or it fails; or the file cannot be written.
pub fn logged(command: &mut Command, log: &Path) -> Result<()> {
    let name = name_of(command);
    let file =
        std::fs::File::create(log).with_context(|| format!("Cannot make {}", log.display()))?;
    let status = command
        .stdout(file.try_clone()?)
        .stderr(file)
        .status()
        .with_context(|| format!("Cannot run {name}"))?;
    let said = std::fs::read_to_string(log).unwrap_or_default();
    ensure!(
        status.success(),
        "{name} {}; its output is in {} and ends with:\n{}",
        why(status),
        log.display(),
        last_lines(&said, LINES)
    );
    Ok(())
}

/// The program that a command is about: what [`limited`] puts before it is of no
/// interest.
fn name_of(command: &Command) -> String {
    let mut words = std::iter::once(command.get_program()).chain(command.get_args());
    let program = if command.get_args().any(|word| word == "timeout") {
        words.nth(6)
    } else {
        words.next()
    };
    program.unwrap_or_default().to_string_lossy().into_owned()
}

/// How it failed.
fn why(status: ExitStatus) -> String {
    match status.code() {
        // timeout(1) says so, and kills what does not end then.
        Some(124 | 137) => "took too long".to_owned(),
        _ => format!("failed with {status}"),
    }
}

/// The last `count` lines of `text`.
#[must_use]
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_takes_too_long_is_ended_and_named() {
        let mut command = limited("sleep", Duration::from_secs(1));
        let error = output(command.arg("60")).unwrap_err();
        assert!(
            error.to_string().starts_with("sleep took too long"),
            "{error}"
        );
    }

    #[test]
    fn a_failure_shows_the_last_words() {
        let error = output(clean("sh").args(["-c", "seq 100; echo no >&2; exit 3"])).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with("sh failed with exit status: 3"),
            "{error}"
        );
        assert!(error.ends_with("99\n100\nno"), "{error}");
    }
}
