//! `bulkhead`: containers in virtual machines from the command line.
//!
//! A client: it prepares a bundle and a root file system, starts the pod's
//! supervisor (the shim) as containerd would, and speaks to it by the same calls.
//! It never talks to a VM or a guest itself.
//!
//! Read order: `args.rs`, `run.rs`, `exec.rs`; what it stands on are the crates
//! `client` and `image`.

mod args;
mod check;
mod clearing;
mod error;
mod exec;
mod explain;
mod install;
mod network;
mod output;
mod progress;
mod resources;
mod run;
mod seccomp;
mod signal;
mod spec;
mod upgrade;

use std::{io::Write, process::ExitCode};

use clap::{CommandFactory, Parser};

use crate::{
    args::{Cli, Command},
    error::{Result, at, host},
};

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version are no failure.
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() {
                error::OWN_FAILURE
            } else {
                0
            });
        }
    };
    let result = match &cli.command {
        Command::Run(args) => run::run(args),
        Command::Exec(args) => exec::exec(args),
        Command::Kill(args) => exec::kill(args),
        Command::Rm(args) => exec::rm(args),
        Command::List(args) => exec::list(args),
        Command::Pause(args) => resources::pause(args),
        Command::Resume(args) => resources::resume(args),
        Command::Update(args) => resources::update(args),
        Command::Stats(args) => resources::stats(args),
        Command::Network(verb) => network::run(verb),
        Command::Check(args) => check::check(args),
        Command::Explain(args) => explain::explain(args),
        Command::Install(args) => install::install(args),
        Command::Upgrade(args) => upgrade::upgrade(args),
        Command::Completions { shell } => completions(*shell),
        Command::Man { dir } => man(dir),
    };
    match result {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            // The last words; if nobody reads them there is nobody to tell.
            let _ = writeln!(std::io::stderr(), "bulkhead: {}", error.text());
            ExitCode::from(error.exit_code())
        }
    }
}

fn completions(shell: clap_complete::Shell) -> Result<u8> {
    let mut text = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "bulkhead", &mut text);
    std::io::stdout()
        .write_all(&text)
        .map_err(host("write the completions"))?;
    Ok(0)
}

fn man(dir: &std::path::Path) -> Result<u8> {
    clap_mangen::generate_to(Cli::command(), dir).map_err(at("write manual pages into", dir))?;
    Ok(0)
}
