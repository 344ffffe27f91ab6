//! From sources to the files that are installed.

use std::{
    env,
    ffi::{OsStr, OsString},
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use bulkhead_guest::Progress;

use bulkhead_guest::cache::Cache;

use crate::{packages, progress::Bar};

/// The programs for the host.
const PROGRAMS: [&str; 3] = ["bulkhead", "bulkhead-vmm", "containerd-shim-bulkhead-v2"];

const AGENT: &str = "bulkhead-agent";

const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Everything that is installed, as files of the building machine.
#[derive(Debug)]
pub(crate) struct Product {
    /// The programs for the host.
    pub(crate) programs: Vec<PathBuf>,
    /// Directory with kernel, guest root image and manifest.
    pub(crate) assets: PathBuf,
}

/// Builds all of it.
pub(crate) fn product(progress: &dyn Progress) -> Result<Product> {
    let kernel = bulkhead_guest::ensure(&Cache::of_this_user()?, progress)?;
    for note in &kernel.notes {
        eprintln!("Note: {note}");
    }
    progress.step("Building the agent");
    let agent = agent(workspace(), &target_dir().join("agent"))?;
    progress.step("Building bulkhead, shim and virtual machine monitor");
    cargo(
        &[
            "build",
            "--release",
            "--package",
            "bulkhead-cli",
            "--package",
            "bulkhead-shim",
            "--package",
            "bulkhead-vmm",
        ],
        &[],
    )?;
    let assets = target_dir().join("guest");
    fs::create_dir_all(&assets)?;
    let image = bulkhead_guest::root::build(&agent, &target_dir().join("guest-root.cpio"))?;
    bulkhead_guest::root::write_manifest(&assets, &kernel, &image, &rustc()?)?;
    Ok(Product {
        programs: PROGRAMS
            .iter()
            .map(|name| target_dir().join("release").join(name))
            .collect(),
        assets,
    })
}

/// Builds the agent of the checkout `workspace` in `target`; its path. The bytes are the
/// same wherever both lie.
pub(crate) fn agent(workspace: &Path, target: &Path) -> Result<PathBuf> {
    // A target directory of its own: other flags would rebuild everything else.
    cargo_in(
        workspace,
        &[
            "build",
            "--profile",
            "agent",
            "--package",
            AGENT,
            "--target",
            TARGET,
        ],
        &[
            ("CARGO_TARGET_DIR", target.as_os_str()),
            (
                "CARGO_ENCODED_RUSTFLAGS",
                agent_flags(workspace, target).as_ref(),
            ),
        ],
    )?;
    let agent = target.join(TARGET).join("agent").join(AGENT);
    let bytes = fs::read(&agent).with_context(|| format!("Cannot read {}", agent.display()))?;
    for (place, _) in places(workspace, target) {
        let place = place.as_os_str().as_encoded_bytes();
        ensure!(
            !bytes.windows(place.len()).any(|window| window == place),
            "The agent contains the path {:?}: elsewhere it would have other bytes",
            String::from_utf8_lossy(place)
        );
    }
    Ok(agent)
}

/// Builds a program that needs no library of its host; its path.
pub(crate) fn static_program(package: &str, name: &str) -> Result<PathBuf> {
    let target = target_dir().join("static");
    cargo(
        &[
            "build",
            "--release",
            "--package",
            package,
            "--bin",
            name,
            "--target",
            TARGET,
        ],
        &[
            ("CARGO_TARGET_DIR", target.as_os_str()),
            ("RUSTFLAGS", "-Ctarget-feature=+crt-static".as_ref()),
        ],
    )?;
    Ok(target.join(TARGET).join("release").join(name))
}

/// What the compiler says of its version.
pub(crate) fn rustc() -> Result<String> {
    let program = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let output = Command::new(program)
        .arg("--version")
        .current_dir(workspace())
        .output()
        .context("Cannot start rustc")?;
    ensure!(output.status.success(), "rustc does not tell its version");
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// Builds and copies below `prefix`.
pub(crate) fn install(prefix: &Path) -> Result<()> {
    let bar = Bar::new();
    packages::ensure_installed(&bar)?;
    copy_into(&product(&bar)?, prefix)
}

/// Copies the product to the places below `prefix` where it is looked for.
pub(crate) fn copy_into(product: &Product, prefix: &Path) -> Result<()> {
    let bin = prefix.join("bin");
    let share = prefix.join("share/bulkhead");
    for dir in [&bin, &share] {
        fs::create_dir_all(dir).with_context(|| format!("Cannot make {}", dir.display()))?;
    }
    let assets = fs::read_dir(&product.assets)?.filter_map(|entry| Some(entry.ok()?.path()));
    for (file, dir) in product
        .programs
        .iter()
        .map(|file| (file.clone(), &bin))
        .chain(assets.map(|file| (file, &share)))
    {
        let target = dir.join(file.file_name().unwrap_or_default());
        // A running program cannot be written to, but it can be replaced.
        let fresh = target.with_extension("new");
        fs::copy(&file, &fresh)
            .and_then(|_| fs::rename(&fresh, &target))
            .with_context(|| format!("Cannot write {}", target.display()))?;
    }
    Ok(())
}

/// Where this machine keeps sources that panics name, and what they are called in the
/// agent, whose bytes are the same wherever it is built. The last that fits counts.
fn places(workspace: &Path, agent_target: &Path) -> [(PathBuf, &'static str); 3] {
    let home = || env::home_dir().unwrap_or_default().join(".cargo");
    let cargo_home = env::var_os("CARGO_HOME").map_or_else(home, PathBuf::from);
    [
        (cargo_home, "cargo"),
        (workspace.to_owned(), "bulkhead"),
        (agent_target.to_owned(), "target"),
    ]
}

/// Flags of rustc for the agent, in cargo's encoding, which allows spaces in paths.
fn agent_flags(workspace: &Path, agent_target: &Path) -> OsString {
    let mut flags = OsString::from("-Ctarget-feature=+crt-static");
    for (place, name) in places(workspace, agent_target) {
        flags.push("\x1f--remap-path-prefix=");
        flags.push(place);
        flags.push("=");
        flags.push(name);
    }
    flags
}

/// Runs cargo, its output to our standard error.
pub(crate) fn cargo(arguments: &[&str], variables: &[(&str, &OsStr)]) -> Result<()> {
    cargo_in(workspace(), arguments, variables)
}

fn cargo_in(workspace: &Path, arguments: &[&str], variables: &[(&str, &OsStr)]) -> Result<()> {
    let status = Command::new(cargo_program())
        .arg("--quiet")
        .args(arguments)
        .current_dir(workspace)
        .envs(variables.iter().copied())
        .status()
        .context("Cannot start cargo")?;
    ensure!(status.success(), "cargo {} failed", arguments.join(" "));
    Ok(())
}

pub(crate) fn cargo_program() -> OsString {
    env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

pub(crate) fn workspace() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

pub(crate) fn target_dir() -> PathBuf {
    env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace().join("target"), PathBuf::from)
}
