//! What is done in the lab host: the demo, a shell, commands, benchmarks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, bail};
use bulkhead_guest_kernel::Progress;
use bulkhead_tests::DEBIAN;
use bulkhead_tests::lab::cache::Cache;
use bulkhead_tests::lab::{Clock, Contents, Exit, Image, Job, Session, images};

use crate::progress::Bar;
use crate::{build, packages};

/// Everything that a session needs.
pub(crate) struct Ready {
    cache: Cache,
    images: Vec<Image>,
    contents: Contents,
}

impl Ready {
    /// Finds or makes images, and builds what the lab host needs. With `prefix`
    /// the product, laid out as below `/usr`, is installed in each session.
    pub(crate) fn new(prefix: Option<&Path>, progress: &dyn Progress) -> Result<Ready> {
        let cache = Cache::of_this_user()?;
        progress.step("Building the lab's own program");
        // Not optimised: its libraries are there, for cargo xtask needs them.
        build::cargo(
            &[
                "build",
                "--package",
                "bulkhead-tests",
                "--bin",
                "bulkhead-labd",
            ],
            &[],
        )?;
        let images = images(&cache, progress)?;
        let mut contents =
            Contents::default().with("labd", build::target_dir().join("debug/bulkhead-labd"));
        if let Some(prefix) = prefix {
            contents = contents.with("root/usr", prefix);
        }
        Ok(Ready {
            cache,
            images,
            contents,
        })
    }

    /// Adds the file or directory `from` as `/lab/<name>`.
    pub(crate) fn with(mut self, name: &str, from: impl Into<PathBuf>) -> Ready {
        self.contents = self.contents.with(name, from);
        self
    }

    /// Starts a lab host.
    pub(crate) fn session(&self, clock: Clock, progress: &dyn Progress) -> Result<Session> {
        Session::start(&self.cache, &self.images, &self.contents, clock, progress)
    }
}

/// Builds everything and lays it out as it is installed, below the target directory.
pub(crate) fn prefix(progress: &dyn Progress) -> Result<PathBuf> {
    let product = build::product(progress)?;
    let prefix = build::target_dir().join("install");
    build::copy_into(&product, &prefix)?;
    Ok(prefix)
}

/// `cargo xtask run`: the command in a container of the demo image.
pub(crate) fn demo(tty: bool, command: &[String]) -> Result<ExitCode> {
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    let prefix = prefix(&bar)?;
    let program = prefix.join("bin/bulkhead");
    let mut arguments = vec!["run", "--rm", "--interactive"];
    if tty {
        arguments.push("--tty");
    }
    let check = Command::new(&program)
        .arg("check")
        .output()
        .context("Cannot start bulkhead")?;
    if check.status.success() {
        let images = images(&Cache::of_this_user()?, &bar)?;
        let image = images.iter().find(|image| image.name == "debian");
        let layout = image.context("There is no demo image")?.layout();
        drop(bar);
        let status = Command::new(&program)
            .args(arguments)
            .arg(layout)
            .arg("--")
            .args(command)
            .status()?;
        return Ok(exit_code(status.code().unwrap_or(255)));
    }
    eprintln!(
        "This machine cannot run virtual machines (see `bulkhead check`): running in the lab host."
    );
    let mut session = Ready::new(Some(&prefix), &bar)?.session(Clock::Wall, &bar)?;
    drop(bar);
    let argv = ["bulkhead"].into_iter().chain(arguments);
    let argv = argv.chain([DEBIAN, "--"]).map(str::to_owned);
    let job = Job::new(argv.chain(command.iter().cloned()));
    Ok(ended(session.run(job, tty)?))
}

/// What a person wants of the lab host.
#[derive(Debug, clap::Args)]
pub(crate) struct Lab {
    /// Boot afresh, with a clock that counts instructions
    #[arg(long)]
    icount: bool,
    /// Without building and installing the product
    #[arg(long)]
    bare: bool,
    /// Show this directory in the lab host, read-only, as /lab/with
    #[arg(long, value_name = "DIR")]
    with: Option<PathBuf>,
    /// Copy this directory over the root of the lab host
    #[arg(long, value_name = "DIR", requires = "bare")]
    root: Option<PathBuf>,
    /// The command and its arguments; none for a shell
    #[arg(last = true)]
    command: Vec<String>,
}

/// `cargo xtask lab`.
pub(crate) fn lab(wanted: Lab) -> Result<ExitCode> {
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    let prefix = if wanted.bare {
        None
    } else {
        Some(prefix(&bar)?)
    };
    let mut ready = Ready::new(prefix.as_deref(), &bar)?;
    if let Some(with) = wanted.with {
        ready = ready.with("with", with);
    }
    if let Some(root) = wanted.root {
        ready = ready.with("root", root);
    }
    let clock = if wanted.icount {
        Clock::Instructions
    } else {
        Clock::Wall
    };
    let mut session = ready.session(clock, &bar)?;
    drop(bar);
    let job = if wanted.command.is_empty() {
        Job::new(["bash", "-l"])
    } else {
        Job::new(wanted.command)
    };
    Ok(ended(session.run(job, true)?))
}

/// `cargo xtask bench`.
pub(crate) fn bench(name: &str, rounds: u32) -> Result<ExitCode> {
    if name != "boot" {
        bail!("There is no benchmark {name:?}: the only one is \"boot\"");
    }
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    let prefix = prefix(&bar)?;
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
    let ready = Ready::new(Some(&prefix), &bar)?
        .with("bench", build::target_dir().join("release/bench-boot"));
    let mut session = ready.session(Clock::Instructions, &bar)?;
    drop(bar);
    let job = Job::new(["/lab/bench".to_owned(), rounds.to_string()]);
    Ok(ended(session.run(job, false)?))
}

/// Our exit code for a job that ended so.
fn ended(exit: Exit) -> ExitCode {
    match exit {
        Exit::Code(code) => ExitCode::from(code),
        Exit::Deadline => ExitCode::FAILURE,
    }
}

fn exit_code(code: i32) -> ExitCode {
    ExitCode::from(u8::try_from(code).unwrap_or(255))
}

/// Directory for what failed tests leave, emptied.
pub(crate) fn evidence_dir() -> Result<PathBuf> {
    let dir = build::target_dir().join("lab-evidence");
    if dir.exists() {
        fs::remove_dir_all(&dir).with_context(|| format!("Cannot empty {}", dir.display()))?;
    }
    Ok(dir)
}
