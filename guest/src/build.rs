//! From the unpacked source to a `vmlinux`.
//!
//! Built in the tree itself, so that every path the compiler sees is relative;
//! user, host, date and build number are fixed. Two builds of the same inputs
//! are byte-identical, wherever they run.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::command::{clean, output};
use crate::fragments::Lack;
use crate::source::Tree;
use crate::{PACKAGES, Progress, elf, fragments};

/// Number of the steps below: to be raised when a change here changes the bytes
/// that come out, so that older kernels in caches are not taken for new ones.
pub(crate) const RECIPE: &str = "2";

/// File names of what is kept of a build.
pub(crate) const VMLINUX: &str = "vmlinux";
pub(crate) const SYSTEM_MAP: &str = "System.map";
pub(crate) const CONFIG: &str = "config";

/// Name and content of each file of our drivers.
pub(crate) const DRIVER: &[(&str, &str)] = &[
    ("Kconfig", include_str!("../driver/Kconfig")),
    ("Makefile", include_str!("../driver/Makefile")),
    (
        "bulkhead_power.c",
        include_str!("../driver/bulkhead_power.c"),
    ),
    (
        "bulkhead_notify.c",
        include_str!("../driver/bulkhead_notify.c"),
    ),
];

/// Name and content of each patch: what no option can do. The first line says what for.
/// A guest works without any of them.
pub(crate) const PATCHES: &[(&str, &str)] = &[
    (
        "fuse-fewer-requests.patch",
        include_str!("../patches/fuse-fewer-requests.patch"),
    ),
    (
        "fuse-no-attributes.patch",
        include_str!("../patches/fuse-no-attributes.patch"),
    ),
    (
        "params-without-uevents.patch",
        include_str!("../patches/params-without-uevents.patch"),
    ),
    (
        "slab-without-sysfs.patch",
        include_str!("../patches/slab-without-sysfs.patch"),
    ),
    (
        "virtiofs-interrupt.patch",
        include_str!("../patches/virtiofs-interrupt.patch"),
    ),
];

/// Files that a build compiles, about: the full length of the progress bar.
const OBJECTS: u64 = 1_380;

/// Lines of the build's output that an error shows.
const LINES_OF_LOG: usize = 30;

/// What a build left in its tree.
#[derive(Debug)]
pub(crate) struct Built {
    pub(crate) vmlinux: PathBuf,
    pub(crate) system_map: PathBuf,
    pub(crate) config: PathBuf,
    /// As `uname -r` shows it.
    pub(crate) version: String,
}

/// The programs that decide about the bytes, and what each says of its version.
pub(crate) fn toolchain() -> Result<BTreeMap<String, String>> {
    let version = |program: &str| {
        let text = output(clean(program).arg("--version")).with_context(|| {
            format!(
                "A kernel build needs the Debian packages {}",
                PACKAGES.join(", ")
            )
        })?;
        let line = text.lines().next().unwrap_or_default();
        Ok((program.to_owned(), line.to_owned()))
    };
    ["gcc", "ld"].into_iter().map(version).collect()
}

/// Applies the patches to `tree`, one by one and to the letter; the names of those that do
/// not fit this version of the source.
pub(crate) fn patch(tree: &Tree) -> Result<Vec<&'static str>> {
    let mut unfit = Vec::new();
    for (name, text) in PATCHES {
        let file = tree.path.join("bulkhead.patch");
        write(&file, text)?;
        let apply = |arguments: &[&str]| {
            let mut patch = clean("patch");
            patch
                .current_dir(&tree.path)
                .args(["--strip=1", "--batch", "--forward", "--fuzz=0", "--silent"])
                .args(arguments)
                .args(["--input", "bulkhead.patch"]);
            output(&mut patch)
        };
        // A trial first: one that fails half-way would leave half of it.
        match apply(&["--dry-run"]) {
            Ok(_) => drop(apply(&[])?),
            Err(_) => unfit.push(*name),
        }
    }
    Ok(unfit)
}

/// Puts driver and configuration into `tree`; make's output goes to `log`. What
/// this version of the source does not yield is told.
pub(crate) fn configure(tree: &Tree, log: &Path) -> Result<Vec<Lack>> {
    File::create(log).with_context(|| format!("Cannot write {}", log.display()))?;
    add_driver(&tree.path)?;
    let requests = fragments::requests()?;
    let allconfig = tree.path.join("bulkhead.config");
    write(&allconfig, &fragments::allconfig(&requests))?;
    let mut configure = make(tree);
    configure
        .arg("KCONFIG_ALLCONFIG=bulkhead.config")
        .arg("allnoconfig");
    run(configure, log, |_| {})?;
    let config = tree.path.join(".config");
    let text =
        fs::read_to_string(&config).with_context(|| format!("Cannot read {}", config.display()))?;
    Ok(fragments::lacks(&requests, &text))
}

/// Compiles the kernel in `tree`, which is configured; make's output goes to `log`.
pub(crate) fn vmlinux(tree: &Tree, log: &Path, progress: &dyn Progress) -> Result<Built> {
    progress.step("Compiling the guest kernel");
    let jobs = std::thread::available_parallelism().map_or(1, usize::from);
    let mut compile = make(tree);
    compile.arg(format!("-j{jobs}")).arg("vmlinux");
    let mut objects = 0;
    run(compile, log, |line| {
        if line.starts_with("  CC ") || line.starts_with("  AS ") {
            objects += 1;
            progress.advance(objects.min(OBJECTS), OBJECTS);
        }
    })?;

    let mut release = make(tree);
    release.args(["-s", "kernelrelease"]);
    let version = output(&mut release)?.trim().to_owned();

    // What nobody loads is dropped; symbols are in System.map.
    let vmlinux = tree.path.join(VMLINUX);
    let linked =
        fs::read(&vmlinux).with_context(|| format!("Cannot read {}", vmlinux.display()))?;
    let packed = elf::pack(&linked).context("Cannot pack the linked kernel")?;
    fs::write(&vmlinux, packed).with_context(|| format!("Cannot write {}", vmlinux.display()))?;
    Ok(Built {
        vmlinux,
        system_map: tree.path.join(SYSTEM_MAP),
        config: tree.path.join(".config"),
        version,
    })
}

/// Puts our drivers into the tree.
fn add_driver(tree: &Path) -> Result<()> {
    let virt = tree.join("drivers/virt");
    let ours = virt.join("bulkhead");
    fs::create_dir(&ours).with_context(|| format!("Cannot make {}", ours.display()))?;
    for (name, text) in DRIVER {
        write(&ours.join(name), text)?;
    }
    append(
        &virt.join("Kconfig"),
        "source \"drivers/virt/bulkhead/Kconfig\"\n",
    )?;
    append(&virt.join("Makefile"), "obj-y += bulkhead/\n")
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("Cannot write {}", path.display()))
}

fn append(path: &Path, text: &str) -> Result<()> {
    OpenOptions::new()
        .append(true)
        .open(path)
        .and_then(|mut file| file.write_all(text.as_bytes()))
        .with_context(|| format!("Cannot write {}", path.display()))
}

/// make in the tree, with everything fixed that could differ between builds.
fn make(tree: &Tree) -> Command {
    let mut make = clean("make");
    make.current_dir(&tree.path)
        .env("KBUILD_BUILD_TIMESTAMP", &tree.date_text)
        .env("KBUILD_BUILD_USER", "bulkhead")
        .env("KBUILD_BUILD_HOST", "bulkhead")
        .env("KBUILD_BUILD_VERSION", "1")
        .env("SOURCE_DATE_EPOCH", tree.date.to_string())
        .arg("ARCH=x86_64");
    make
}

/// Runs make to its end, shows each line of its output to `seen`, and appends
/// all to `log`; an error carries the last lines.
fn run(mut make: Command, log: &Path, mut seen: impl FnMut(&str)) -> Result<()> {
    let open = || OpenOptions::new().append(true).open(log);
    let mut copy = open().with_context(|| format!("Cannot write {}", log.display()))?;
    let errors = open().with_context(|| format!("Cannot write {}", log.display()))?;
    let mut child = make
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context("Cannot run make")?;
    let lines = child
        .stdout
        .take()
        .map(BufReader::new)
        .into_iter()
        .flat_map(BufRead::lines);
    for line in lines {
        let line = line.context("Cannot read what make writes")?;
        writeln!(copy, "{line}").with_context(|| format!("Cannot write {}", log.display()))?;
        seen(&line);
    }
    let status = child.wait().context("Cannot wait for make")?;
    if !status.success() {
        let text = fs::read_to_string(log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(LINES_OF_LOG)..].join("\n");
        bail!(
            "make: {status}; the last lines of {}:\n{tail}",
            log.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_driver_is_hooked_into_the_tree() {
        let tree = tempfile::tempdir().unwrap();
        let virt = tree.path().join("drivers/virt");
        fs::create_dir_all(&virt).unwrap();
        write(&virt.join("Kconfig"), "endif\n").unwrap();
        write(&virt.join("Makefile"), "obj-y += coco/\n").unwrap();
        add_driver(tree.path()).unwrap();
        assert!(virt.join("bulkhead/bulkhead_power.c").exists());
        assert!(virt.join("bulkhead/bulkhead_notify.c").exists());
        assert_eq!(
            fs::read_to_string(virt.join("Kconfig")).unwrap(),
            "endif\nsource \"drivers/virt/bulkhead/Kconfig\"\n"
        );
        assert_eq!(
            fs::read_to_string(virt.join("Makefile")).unwrap(),
            "obj-y += coco/\nobj-y += bulkhead/\n"
        );
    }

    /// A tree with the lines that the patches look for, and some before them.
    fn tree(path: &Path) -> Tree {
        for (_, text) in PATCHES {
            for part in text.split("\n+++ b/").skip(1) {
                let (file, hunks) = part.split_once('\n').unwrap();
                let hunks = hunks.split("\n--- a/").next().unwrap();
                let old = hunks
                    .lines()
                    .filter_map(|line| line.strip_prefix([' ', '-']));
                let file = path.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                // Another patch may have changed it, too.
                let before = fs::read_to_string(&file).unwrap_or_default();
                let old: Vec<&str> = ["/* first */"; 9].into_iter().chain(old).collect();
                write(&file, &(before + &old.join("\n") + "\n")).unwrap();
            }
        }
        Tree {
            path: path.to_owned(),
            date: 0,
            date_text: String::new(),
        }
    }

    #[test]
    fn a_patch_is_applied_where_its_lines_are() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        assert_eq!(patch(&tree).unwrap(), [""; 0]);
        let slab = fs::read_to_string(dir.path().join("mm/slab.h")).unwrap();
        assert!(slab.contains("defined(CONFIG_SYSFS) && defined(CONFIG_SLUB_DEBUG)"));
        assert!(!slab.contains("CONFIG_SLUB_TINY"));
    }

    #[test]
    fn a_patch_that_does_not_fit_is_named_and_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let tree = tree(dir.path());
        let slab = dir.path().join("mm/slab.h");
        let other = fs::read_to_string(&slab).unwrap().replace("TINY", "SMALL");
        write(&slab, &other).unwrap();
        assert_eq!(patch(&tree).unwrap(), ["slab-without-sysfs.patch"]);
        assert_eq!(fs::read_to_string(&slab).unwrap(), other);
    }

    #[test]
    fn a_failed_make_shows_its_last_words() {
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("log");
        write(&log, "").unwrap();
        let mut shell = Command::new("sh");
        shell.args(["-c", "echo '  CC      a.o'; echo broken >&2; exit 2"]);
        let mut seen = Vec::new();
        let error = run(shell, &log, |line| seen.push(line.to_owned())).unwrap_err();
        assert_eq!(seen, ["  CC      a.o"]);
        assert!(error.to_string().contains("broken"), "{error}");
    }
}
