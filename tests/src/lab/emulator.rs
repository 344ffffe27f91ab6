//! The emulator that the lab host runs in: QEMU 10 or newer.
//!
//! Under the SVM that QEMU 7.2 emulates every fiftieth virtual machine or so took
//! the lab host with it: a panic of its kernel, or a processor that never came
//! back. Debian 12 has QEMU 10 among its backports; there its packages are
//! unpacked in the cache, and the system's own stay as they are. Either is mended first
//! ([`mend`]), in a copy.

mod mend;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_guest::Progress;
use bulkhead_guest::debian::{Apt, Mirror};

use bulkhead_guest::cache::{self, Cache, Entry};
use bulkhead_guest::command::{clean, output};

use self::mend::mend;

/// Changes whenever what is mended does.
const RECIPE: &str = "1";

/// The program.
const QEMU: &str = "qemu-system-x86_64";

/// The first major version that is good enough.
const OLDEST: u32 = 10;

/// The suite that has it where the system's own is older.
const SUITE: &str = "bookworm-backports";

/// The program, and the files that it loads into a machine. Its libraries are
/// those of the older packages.
const PACKAGES: [&str; 3] = ["qemu-system-x86", "qemu-system-data", "seabios"];

/// Where its files lie in packages, and the system's boot programs of network
/// cards, which QEMU asks for although nothing starts from them.
const DATA: [&str; 2] = ["usr/share/qemu", "usr/share/seabios"];
const NETWORK_BOOT: &str = "/usr/lib/ipxe/qemu";

/// The same of the system's.
const SYSTEM_DATA: [&str; 2] = ["/usr/share/qemu", "/usr/share/seabios"];

/// Where the modules of a package are.
const MODULES: &str = "usr/lib/x86_64-linux-gnu/qemu";

/// A QEMU that can be started.
#[derive(Debug)]
pub(crate) struct Emulator {
    /// The mended program.
    program: Entry,
    /// The unpacked packages; none if the system's own QEMU serves.
    unpacked: Option<Entry>,
    /// What `--version` says: a saved state is for one version.
    pub(crate) version: String,
}

/// Finds the system's emulator, or fetches a newer one, and mends a copy of it.
pub(crate) fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Emulator> {
    let version = output(clean(QEMU).arg("--version"))?;
    let unpacked = match major(&version)? {
        OLDEST.. => None,
        _ => Some(unpacked(cache, &version, progress)?),
    };
    let original = match &unpacked {
        Some(unpacked) => unpacked.file("usr/bin").join(QEMU),
        None => system_program()?,
    };
    let key = cache::key([RECIPE, &cache::sha256_of(&original)?]);
    let program = cache.entry("lab-qemu", &key, progress, |entry, _| {
        let mut program = fs::read(&original)?;
        if !mend(&mut program) {
            progress.step("This QEMU is not known: its guests may hang now and then");
        }
        let copy = entry.join(QEMU);
        fs::write(&copy, program)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(())
    })?;
    let mut emulator = Emulator {
        program,
        unpacked,
        version: String::new(),
    };
    emulator.version = output(emulator.command(Path::new("/"), None).arg("--version"))?;
    let found = major(&emulator.version)?;
    ensure!(found >= OLDEST, "{SUITE} has only version {found} of QEMU");
    Ok(emulator)
}

/// The packages of a newer QEMU than the system's of this version.
fn unpacked(cache: &Cache, version: &str, progress: &dyn Progress) -> Result<Entry> {
    let key = cache::key([SUITE, version].into_iter().chain(PACKAGES));
    cache.entry("lab-emulator", &key, progress, |entry, work| {
        progress.step("Fetching an emulator without the faults of the system's");
        let apt = Apt::new(work, &Mirror::of_this_machine()?, SUITE)?;
        for package in PACKAGES {
            apt.candidate(package)?;
            let archive = apt.download(package)?;
            output(clean("dpkg-deb").arg("-x").arg(archive).arg(entry))?;
        }
        // Has links to directories; an entry of the cache consists of files.
        fs::remove_dir_all(entry.join("usr/share/doc"))?;
        Ok(())
    })
}

/// The file of the system's emulator.
fn system_program() -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut found = std::env::split_paths(&path).map(|folder| folder.join(QEMU));
    found
        .find(|file| file.is_file())
        .with_context(|| format!("{QEMU} is not on the PATH"))
}

impl Emulator {
    /// The program, to be started in `directory`, on this processor if one is said,
    /// killed when whoever starts it ends, however that happens.
    pub(crate) fn command(&self, directory: &Path, core: Option<usize>) -> Command {
        let mut command = clean("setpriv");
        command.current_dir(directory).args(["--pdeathsig", "KILL"]);
        if let Some(core) = core {
            command.args(["taskset", "--cpu-list", &core.to_string()]);
        }
        command.arg(self.program.file(QEMU));
        // A copy does not find its files by itself; modules of another QEMU do not fit.
        let (data, modules) = match &self.unpacked {
            Some(unpacked) => (DATA.map(|path| unpacked.file(path)), unpacked.file(MODULES)),
            None => (SYSTEM_DATA.map(PathBuf::from), Path::new("/").join(MODULES)),
        };
        for path in data.into_iter().chain([PathBuf::from(NETWORK_BOOT)]) {
            command.arg("-L").arg(path);
        }
        command.env("QEMU_MODULE_DIR", modules);
        command
    }
}

/// The number in `QEMU emulator version 7.2.22 (…)`.
fn major(version: &str) -> Result<u32> {
    version
        .split_once("version ")
        .and_then(|(_, rest)| rest.split('.').next()?.parse().ok())
        .with_context(|| format!("{QEMU} --version says {version:?}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_read_from_what_qemu_says() {
        let said = "QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2)\nCopyright";
        assert_eq!(major(said).unwrap(), 10);
        assert!(major("qemu").is_err());
    }
}
