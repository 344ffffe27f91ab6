//! `containerd-shim-bulkhead-v2`: the command line that containerd calls.
//!
//! Standard output is protocol: it carries the answer and nothing else. A failure
//! is one line on standard error and a status that is not 0.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use anyhow::{Context, Result};
use bulkhead_shim::{
    daemon, delete,
    flags::{Action, Flags},
    info, start,
};

fn main() -> ExitCode {
    let flags = match Flags::parse(std::env::args().skip(1)) {
        Ok(flags) => flags,
        Err(error) => return failure(&error.into()),
    };
    if flags.action == Action::Serve {
        return match daemon::run(&flags) {
            Ok(()) => ExitCode::SUCCESS,
            // Whoever started the daemon reads the reason on standard output.
            Err(error) => {
                let _ = io::stdout().write_all(error.text().as_bytes());
                ExitCode::FAILURE
            }
        };
    }
    match answer(&flags).and_then(|answer| print(&answer)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure(&error),
    }
}

fn answer(flags: &Flags) -> Result<Vec<u8>> {
    Ok(match flags.action {
        Action::Start => start::run(flags)?,
        Action::Delete => delete::run(flags)?,
        Action::Info => info::run()?,
        Action::Carries => daemon::carries(io::stdin())?.into_bytes(),
        Action::Version | Action::Serve => format!(
            "containerd-shim-bulkhead-v2 {}\n",
            env!("CARGO_PKG_VERSION")
        )
        .into_bytes(),
    })
}

fn print(answer: &[u8]) -> Result<()> {
    let mut stdout = io::stdout();
    stdout
        .write_all(answer)
        .and_then(|()| stdout.flush())
        .context("Cannot write the answer")
}

fn failure(error: &anyhow::Error) -> ExitCode {
    let _ = writeln!(io::stderr(), "{error:#}");
    ExitCode::FAILURE
}
