//! The project's own commands: build, run, test, lab, bench.
//!
//! Owns the order in which things are made and where they go. What is made, and
//! how, is the business of the crates that it calls.

mod build;
mod cache;
mod inputs;
mod lab;
mod packages;
mod progress;
mod reproduce;
mod rules;
mod sources;
mod test;
#[cfg(test)]
mod tidy;
mod tools;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, runs and tests Bulkhead.
#[derive(Debug, Parser)]
#[command(bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Run a command in a container of the demo image, in a virtual machine
    #[command(after_help = "Example:\n  cargo xtask run -- /bin/sh -c 'uname -a; id'")]
    Run {
        /// Give the command a terminal
        #[arg(short, long)]
        tty: bool,
        /// The command and its arguments
        #[arg(last = true, required = true)]
        command: Vec<String>,
    },
    /// Run all tests: here, and in the lab host
    Test {
        /// Run only the suite of this name, or the tests whose names contain this text
        filter: Option<String>,
        /// Also what takes long: the tests that say so, and, without a filter, whether
        /// builds elsewhere, kernel and all, are byte-identical
        #[arg(long)]
        full: bool,
        /// Also the suites of containerd with each version of it that is pinned
        #[arg(long)]
        matrix: bool,
    },
    /// Build the guest's files again in another folder and compare the bytes
    Reproduce {
        /// The kernel too, which takes as long as the first time
        #[arg(long)]
        kernel: bool,
    },
    /// Open a shell in the lab host, or run a command there
    Lab(lab::Lab),
    /// Run a benchmark in the lab host, under the deterministic clock
    Bench {
        /// Which one: boot, exec, files, task, or the system calls that filters allow and threads make: syscalls
        name: String,
        /// How many rounds
        #[arg(default_value_t = 5)]
        rounds: u32,
    },
    /// Build everything in release mode and copy it below a prefix
    Install {
        /// Where bin/ and share/bulkhead/ go
        #[arg(long, default_value = "/usr")]
        prefix: PathBuf,
    },
    /// Show what kernel, lab host and images were made from, and what Debian has now
    Inputs,
    /// Show what is in the cache, or make it smaller
    Cache {
        /// Keep of each kind only the entries that were used last, and those in use
        #[arg(long, value_name = "NUMBER", conflicts_with = "clear")]
        keep: Option<usize>,
        /// Remove everything that is not in use
        #[arg(long)]
        clear: bool,
    },
    /// Show what callers expect of the runtime, rule by rule: is it met, and by which tests
    Rules {
        /// As JSON, for programs
        #[arg(long)]
        json: bool,
    },
    /// Check licences and advisories of the dependencies with cargo-deny
    Deny,
}

fn main() -> ExitCode {
    // Images and disks have the modes of the files that they are made of.
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            // Causes, and no back trace: what fails here is a user's to mend.
            eprintln!("Error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<ExitCode> {
    match task {
        Task::Run { tty, command } => lab::demo(tty, &command),
        Task::Test {
            filter,
            full,
            matrix,
        } => {
            let code = test::all(filter.as_deref(), test::Extent { full, matrix })?;
            if full && filter.is_none() {
                reproduce::run(true, &progress::Bar::new())?;
            }
            Ok(code)
        }
        Task::Reproduce { kernel } => {
            let bar = progress::Bar::new();
            packages::ensure_installed(&bar)?;
            reproduce::run(kernel, &bar).map(|()| ExitCode::SUCCESS)
        }
        Task::Lab(wanted) => lab::lab(wanted),
        Task::Bench { name, rounds } => lab::bench(&name, rounds),
        Task::Install { prefix } => build::install(&prefix).map(|()| ExitCode::SUCCESS),
        Task::Inputs => inputs::show().map(|()| ExitCode::SUCCESS),
        Task::Cache { keep, clear } => {
            cache::show(if clear { Some(0) } else { keep }).map(|()| ExitCode::SUCCESS)
        }
        Task::Rules { json } => rules::show(json).map(|()| ExitCode::SUCCESS),
        Task::Deny => tools::deny(tools::Advisories::Checked, &progress::Bar::new())
            .map(|()| ExitCode::SUCCESS),
    }
}
