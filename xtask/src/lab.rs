//! What is done in the lab host: the demo, a shell, commands, benchmarks.

use std::{
    fs,
    io::{IsTerminal, stderr, stdin, stdout},
    path::PathBuf,
    process::{Command, ExitCode},
};

use anyhow::{Context, Result, bail};
use bulkhead_guest_kernel::Progress;
use bulkhead_tests::{
    DEBIAN,
    lab::{Call, Clock, Images, Lab},
};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

use crate::{build, cache, packages, progress::Bar};

/// Puts the product where its packages would.
const INSTALL: &str = "cp -a /mnt/in/product/. /usr/\n";

/// Everything that a call needs.
pub(crate) struct Ready {
    pub(crate) lab: Lab,
    pub(crate) prefix: PathBuf,
}

impl Ready {
    /// Builds the product, finds or makes the lab host.
    pub(crate) fn new(progress: &dyn Progress) -> Result<Ready> {
        let prefix = prefix(progress)?;
        let cache = cache::dir()?;
        let images = Images::ensure(&cache, progress)?;
        Ok(Ready {
            lab: Lab::ensure(&cache, &images, progress)?,
            prefix,
        })
    }

    /// A call that begins with the product installed.
    pub(crate) fn call(&self, script: &str) -> Call<'_> {
        self.lab
            .call()
            .file(&self.prefix, "product")
            .script(format!("{INSTALL}{script}"))
    }
}

/// Builds everything and lays it out as it is installed, below the target directory.
fn prefix(progress: &dyn Progress) -> Result<PathBuf> {
    packages::ensure_installed(progress)?;
    let product = build::product(progress)?;
    let prefix = build::target_dir().join("install");
    build::copy_into(&product, &prefix)?;
    Ok(prefix)
}

/// `cargo xtask run`: the command in a container of the demo image.
pub(crate) fn demo(tty: bool, command: &[String]) -> Result<ExitCode> {
    let bar = Bar::new();
    let prefix = prefix(&bar)?;
    let images = Images::ensure(&cache::dir()?, &bar)?;
    let program = prefix.join("bin/bulkhead");
    let flags = if tty {
        "--tty --interactive"
    } else {
        "--interactive"
    };
    let check = Command::new(&program)
        .arg("check")
        .output()
        .context("Cannot start bulkhead")?;
    if check.status.success() {
        drop(bar);
        let image = images.layouts.iter().find(|(name, _)| *name == "debian");
        let (_, image) = image.context("There is no demo image")?;
        let status = Command::new(&program)
            .args(["run", "--rm"])
            .args(flags.split(' '))
            .arg(image)
            .arg("--")
            .args(command)
            .status()?;
        return Ok(exit_code(status.code().unwrap_or(255)));
    }
    let lab = Lab::ensure(&cache::dir()?, &images, &bar)?;
    drop(bar);
    eprintln!(
        "This machine cannot run virtual machines (see `bulkhead check`): running in the lab host."
    );
    let script = format!(
        "{INSTALL}exec bulkhead run --rm {flags} {DEBIAN} -- {}",
        quote(command)
    );
    let call = lab.call().file(&prefix, "product").script(script);
    through(if tty {
        terminal(call)?
    } else {
        call.with_input()
    })
}

/// `cargo xtask lab`.
pub(crate) fn shell(icount: bool, command: &[String]) -> Result<ExitCode> {
    let bar = Bar::new();
    let ready = Ready::new(&bar)?;
    drop(bar);
    let call = if command.is_empty() {
        if !stdin().is_terminal() {
            bail!("A shell needs a terminal; give a command: cargo xtask lab -- CMD…");
        }
        terminal(ready.call("exec bash --login"))?
    } else {
        ready.call(&format!("exec {}", quote(command))).with_input()
    };
    through(call.clock(if icount {
        Clock::Instructions
    } else {
        Clock::Wall
    }))
}

/// `cargo xtask bench`.
pub(crate) fn bench(name: &str, rounds: u32) -> Result<ExitCode> {
    if name != "boot" {
        bail!("There is no benchmark {name:?}: the only one is \"boot\"");
    }
    let bar = Bar::new();
    let ready = Ready::new(&bar)?;
    bar.step("Building the benchmark");
    build::cargo(
        &[
            "build",
            "--release",
            "--package",
            "bulkhead-tests",
            "--bin",
            "bench-boot",
        ],
        &[],
    )?;
    bar.step("Booting the lab host under the deterministic clock");
    let call = ready
        .call(&format!("exec /mnt/in/bench {rounds}"))
        .file(build::target_dir().join("release/bench-boot"), "bench")
        .clock(Clock::Instructions);
    let ended = call.run(stdout(), stderr());
    drop(bar);
    Ok(ExitCode::from(ended?.code))
}

/// Runs a call with our own streams, our terminal raw while it has one.
fn through(call: Call<'_>) -> Result<ExitCode> {
    let _raw = if call.has_terminal() {
        Some(Raw::enter()?)
    } else {
        None
    };
    let ended = call.run(stdout(), stderr())?;
    Ok(ExitCode::from(ended.code))
}

fn terminal(call: Call<'_>) -> Result<Call<'_>> {
    let size = tcgetwinsize(stdin()).context("Standard input is not a terminal")?;
    Ok(call.terminal(size.ws_row, size.ws_col))
}

/// Our terminal in raw mode; as it was when dropped.
struct Raw(Termios);

impl Raw {
    fn enter() -> Result<Raw> {
        let before = tcgetattr(stdin())?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Raw(before))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        // Fails only if the terminal is gone.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &self.0);
    }
}

/// Words as a shell reads them back.
fn quote(words: &[String]) -> String {
    let quoted: Vec<String> = words
        .iter()
        .map(|word| format!("'{}'", word.replace('\'', r"'\''")))
        .collect();
    quoted.join(" ")
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// Directory for what failed tests leave, emptied.
pub(crate) fn evidence_dir() -> Result<PathBuf> {
    let dir = build::target_dir().join("lab-evidence");
    if dir.exists() {
        fs::remove_dir_all(&dir)?;
    }
    Ok(dir)
}
