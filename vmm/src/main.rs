//! `bulkhead-vmm`: boots one virtual machine and says how it ended.

mod cli;
mod terminal;

use std::{
    fs::File,
    io::{BufReader, Write},
    os::fd::{AsFd, FromRawFd, IntoRawFd},
    panic,
    process::ExitCode,
    sync::OnceLock,
    thread,
};

use anyhow::{Context, bail};
use bulkhead_vmm::{
    config::{Config, Fd},
    exit::{End, Report},
    vm::{self, Extras},
};
use clap::Parser;

use crate::cli::Cli;

/// Where the parent reads the report, if it wants one.
static REPORT: OnceLock<File> = OnceLock::new();

fn main() -> ExitCode {
    let main_us = vm::now_us();
    panic::set_hook(Box::new(|panic| {
        let name = thread::current().name().unwrap_or("unnamed").to_owned();
        leave(&failure(
            End::Device,
            &format!("The thread {name} failed: {panic}"),
        ));
    }));
    let cli = Cli::parse();
    let report =
        run(&cli, main_us).unwrap_or_else(|error| failure(End::Refused, &format!("{error:#}")));
    tell(&report);
    if let (true, Some(stats)) = (cli.stats, report.stats) {
        let stats = serde_json::to_string(&stats).unwrap_or_default();
        say(&stats);
    }
    ExitCode::from(report.end.status())
}

fn run(cli: &Cli, main_us: u64) -> anyhow::Result<Report> {
    let mut terminal = None;
    let config = match cli.config_fd {
        Some(fd) => read_config(fd)?,
        None => cli.config(|| {
            let (input, raw) = terminal::input(quit)?;
            terminal = raw;
            Ok(Fd(input.into_raw_fd()))
        })?,
    };
    config.check()?;
    if let Some(Fd(fd)) = config.report {
        // SAFETY: the parent passed the descriptor for this; the machine does not
        // take it.
        let _ = REPORT.set(unsafe { File::from_raw_fd(fd) });
    }
    let mut extras = Extras::default();
    if cli.serial {
        extras.serial = Some(std::io::stdout().as_fd().try_clone_to_owned()?.into());
    }
    // SAFETY: the descriptors were inherited for this or opened for it just now;
    // nothing else takes them, and this is the only call.
    let report = unsafe { vm::run(&config, extras, main_us) };
    drop(terminal);
    Ok(report?)
}

fn read_config(fd: i32) -> anyhow::Result<Config> {
    // SAFETY: the command line takes no number below 3; the parent passed the
    // descriptor for this, and below it is seen that nothing else takes it.
    let file = unsafe { File::from_raw_fd(fd) };
    let config: Config = serde_json::from_reader(BufReader::new(file))
        .with_context(|| format!("Cannot read the configuration from descriptor {fd}"))?;
    if config.descriptors().any(|named| named == fd) {
        bail!("Descriptor {fd} is named by the configuration that came from it");
    }
    Ok(config)
}

fn quit() {
    leave(&failure(End::PowerOff, "Quit at the terminal"));
}

fn failure(end: End, reason: &str) -> Report {
    Report {
        end,
        reason: reason.replace('\n', " "),
        console: Vec::new(),
        stats: None,
    }
}

/// Writes a line to standard error, whose reader may be gone.
fn say(line: &str) {
    let _ = writeln!(std::io::stderr(), "{line}");
}

/// Says how the machine ended: to people, and to the parent.
fn tell(report: &Report) {
    say(&format!("bulkhead-vmm: {}", report.reason));
    if let (Some(mut file), Ok(mut line)) = (REPORT.get(), serde_json::to_vec(report)) {
        line.push(b'\n');
        // A parent that is gone does not read it.
        let _ = file.write_all(&line);
    }
}

/// Ends the process from any thread.
#[expect(
    clippy::exit,
    reason = "the other threads do not return, and the kernel frees what they hold"
)]
fn leave(report: &Report) {
    terminal::restore();
    tell(report);
    std::process::exit(report.end.status().into());
}
