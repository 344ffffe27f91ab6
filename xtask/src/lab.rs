//! What is done in the lab host: the demo, a shell, commands, benchmarks.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bulkhead_guest::Progress;
use bulkhead_tests::DEBIAN;
use bulkhead_tests::lab::cache::{self, Cache};
use bulkhead_tests::lab::{
    Accelerator, Clock, Contents, Exit, Image, Job, Lab as LabHost, Programs, Session, Store,
    begin, images, programs,
};

use crate::progress::{Bar, Quiet};
use crate::{build, packages};

/// How many lab hosts a benchmark may lose.
const BENCH_TRIES: u32 = 3;

/// How long unpacking the demo image may take, and running it once.
const UNPACK_DEADLINE: Duration = Duration::from_secs(600);

/// Everything that a session needs.
pub(crate) struct Ready {
    lab: LabHost,
    contents: Contents,
    /// Images that the product has unpacked.
    store: Option<Store>,
}

impl Ready {
    /// What a session with the lab's usual containerd needs: see [`Ready::with_containerd`].
    pub(crate) fn new(prefix: Option<&Path>, progress: &dyn Progress) -> Result<Ready> {
        Ready::with_containerd(programs::CONTAINERD, prefix, progress)
    }

    /// What a session without containerd needs: see [`Ready::with_containerd`].
    fn without_containerd(prefix: &Path, progress: &dyn Progress) -> Result<Ready> {
        Ready::make(None, Some(prefix), progress)
    }

    /// Finds or makes programs and images, and builds what the lab host needs. With
    /// `prefix` the product, laid out as below `/usr`, is installed in each session.
    pub(crate) fn with_containerd(
        containerd: &str,
        prefix: Option<&Path>,
        progress: &dyn Progress,
    ) -> Result<Ready> {
        Ready::make(Some(containerd), prefix, progress)
    }

    fn make(
        containerd: Option<&str>,
        prefix: Option<&Path>,
        progress: &dyn Progress,
    ) -> Result<Ready> {
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
        let lab = LabHost {
            programs: containerd
                .map(|version| Programs::ensure(&cache, version, progress))
                .transpose()?,
            images: images(&cache, progress)?,
            accelerator: accelerator(&install_dir().join("bin/bulkhead"))?,
            cache,
        };
        let mut contents =
            Contents::default().with("labd", build::target_dir().join("debug/bulkhead-labd"));
        let mut store = None;
        if let Some(prefix) = prefix {
            contents = contents.with("root/usr", prefix);
            let program = prefix.join("bin/bulkhead");
            store = Some(unpacked(&lab, &contents, &program, progress)?);
        }
        Ok(Ready {
            lab,
            contents,
            store,
        })
    }

    /// Adds the file or directory `from` as `/lab/<name>`.
    pub(crate) fn with(mut self, name: &str, from: impl Into<PathBuf>) -> Ready {
        self.contents = self.contents.with(name, from);
        self
    }

    /// Starts a lab host.
    pub(crate) fn session(&self, clock: Clock, progress: &dyn Progress) -> Result<Session> {
        Session::start(
            &self.lab,
            &self.contents,
            self.store.as_ref(),
            clock,
            progress,
        )
    }
}

/// The demo image as `program`, the product's command line, unpacks it, which takes
/// the emulated machine half a minute: out of the cache, or made by a first run.
fn unpacked(
    lab: &LabHost,
    contents: &Contents,
    program: &Path,
    progress: &dyn Progress,
) -> Result<Store> {
    let program = cache::sha256_of(program)?;
    let images_are = lab.images.iter().map(Image::content);
    let key = cache::key(images_are.chain([program.as_str()]));
    let entry = lab.cache.entry("lab-store", &key, progress, |entry, _| {
        let mut session = Session::start(lab, contents, None, Clock::Wall, progress)?;
        progress.step("Unpacking the demo image");
        let job = Job::new(["bulkhead", "run", "--rm", DEBIAN, "--", "true"]);
        let job = job.deadline(UNPACK_DEADLINE);
        let output = session.output(&job)?;
        ensure!(
            output.exit == Exit::Code(0),
            "The demo image cannot be run ({:?}): {}",
            output.exit,
            String::from_utf8_lossy(&output.stderr)
        );
        session.keep_store(entry)
    })?;
    Ok(Store::of(entry))
}

/// Where the product is laid out as it is installed.
fn install_dir() -> PathBuf {
    build::target_dir().join("install")
}

/// What the lab host's instructions run on here, by the judgement of `program`, the
/// product's command line. Without one they are emulated, which works anywhere.
fn accelerator(program: &Path) -> Result<Accelerator> {
    if !program.exists() {
        return Ok(Accelerator::Emulation);
    }
    let report = Command::new(program)
        .args(["check", "--json"])
        .output()
        .context("Cannot start bulkhead")?;
    Ok(Accelerator::of_this_machine(&report.stdout))
}

/// Builds everything and lays it out as it is installed, below the target directory. What
/// it will run in is begun meanwhile.
pub(crate) fn prefix(progress: &dyn Progress) -> Result<PathBuf> {
    begin(&Cache::of_this_user()?, Quiet)?;
    let product = build::product(progress)?;
    let prefix = install_dir();
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
    let mut session = Ready::without_containerd(&prefix, &bar)?.session(Clock::Wall, &bar)?;
    drop(bar);
    let argv = ["bulkhead"].into_iter().chain(arguments);
    let argv = argv.chain([DEBIAN, "--"]).map(str::to_owned);
    let job = Job::new(argv.chain(command.iter().cloned()));
    ended(session.run(job, tty)?)
}

/// What a person wants of the lab host.
#[derive(Debug, clap::Args)]
pub(crate) struct Lab {
    /// Boot afresh, with a clock that counts instructions
    #[arg(long)]
    icount: bool,
    /// The version of containerd, of those in tests/go
    #[arg(long, value_name = "VERSION", default_value = programs::CONTAINERD)]
    containerd: String,
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
    let mut ready = Ready::with_containerd(&wanted.containerd, prefix.as_deref(), &bar)?;
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
    ended(session.run(job, true)?)
}

/// What can be measured, and the time that a round of it may take on this machine.
const BENCHES: [(&str, Duration); 6] = [
    ("boot", Duration::from_secs(120)),
    ("exec", Duration::from_secs(600)),
    ("files", Duration::from_secs(1800)),
    ("net", Duration::from_secs(1200)),
    ("syscalls", Duration::from_secs(900)),
    ("task", Duration::from_secs(600)),
];

/// `cargo xtask bench`.
pub(crate) fn bench(name: &str, rounds: u32) -> Result<ExitCode> {
    let Some((_, round)) = BENCHES.iter().find(|(known, _)| *known == name) else {
        let known = BENCHES.map(|(name, _)| name).join(", ");
        bail!("There is no benchmark {name:?}; there are: {known}");
    };
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    let prefix = prefix(&bar)?;
    bar.step("Building the benchmark");
    let bench = ["build", "--release", "--package", "bulkhead-bench"];
    build::cargo(&[&bench[..], &["--bins"]].concat(), &[])?;
    let programs = build::target_dir().join("release");
    let mut ready =
        Ready::new(Some(&prefix), &bar)?.with("bench", programs.join(format!("bench-{name}")));
    if ["files", "net"].contains(&name) {
        let inside = build::static_program("bulkhead-guest", &format!("bench-{name}-inside"))?;
        ready = ready.with("inside", inside);
    }
    for attempt in 1..=BENCH_TRIES {
        let mut session = ready.session(Clock::Instructions, &bar)?;
        let job = Job::new(["/lab/bench".to_owned(), rounds.to_string()])
            .deadline(*round * (rounds + 2))
            .silence(*round);
        match session.run(job, false) {
            Ok(exit) => return ended(exit),
            // The emulator ended, or what it runs comes to no end.
            Err(error) => eprintln!("Lost the lab host in try {attempt}, begun anew: {error:#}"),
        }
    }
    bail!("{BENCH_TRIES} lab hosts were lost one after the other")
}

/// Our exit code for a job that ended so.
fn ended(exit: Exit) -> Result<ExitCode> {
    match exit {
        Exit::Code(code) => Ok(ExitCode::from(code)),
        Exit::Deadline => bail!("The command was killed: it took too long"),
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
