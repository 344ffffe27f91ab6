//! The emulator that the lab host runs in: QEMU 10 or newer.
//!
//! Under the SVM that QEMU 7.2 emulates every fiftieth virtual machine or so took
//! the lab host with it: a panic of its kernel, or a processor that never came
//! back. Debian 12 has QEMU 10 among its backports; there its packages are
//! unpacked in the cache, and the system's own stay as they are.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use bulkhead_guest::Progress;
use bulkhead_guest::debian::{Apt, Mirror};

use bulkhead_guest::cache::{self, Cache, Entry};
use bulkhead_guest::command::{clean, output};

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

/// A QEMU that can be started.
#[derive(Debug)]
pub(crate) struct Emulator {
    /// The unpacked packages; none if the system's own QEMU serves.
    unpacked: Option<Entry>,
    /// What `--version` says: a saved state is for one version.
    pub(crate) version: String,
}

/// Finds the system's emulator, or fetches a newer one.
pub(crate) fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Emulator> {
    let version = output(clean(QEMU).arg("--version"))?;
    if major(&version)? >= OLDEST {
        return Ok(Emulator {
            unpacked: None,
            version,
        });
    }
    let key = cache::key([SUITE, &version].into_iter().chain(PACKAGES));
    let unpacked = cache.entry("lab-emulator", &key, progress, |entry, work| {
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
    })?;
    let mut emulator = Emulator {
        unpacked: Some(unpacked),
        version: String::new(),
    };
    emulator.version = output(emulator.command(Path::new("/")).arg("--version"))?;
    let found = major(&emulator.version)?;
    ensure!(found >= OLDEST, "{SUITE} has only version {found} of QEMU");
    Ok(emulator)
}

impl Emulator {
    /// The program, to be started in `directory`, killed when whoever starts it
    /// ends, however that happens.
    pub(crate) fn command(&self, directory: &Path) -> Command {
        let mut command = clean("setpriv");
        command.current_dir(directory).args(["--pdeathsig", "KILL"]);
        let Some(unpacked) = &self.unpacked else {
            command.arg(QEMU);
            return command;
        };
        command.arg(unpacked.file("usr/bin").join(QEMU));
        let data = DATA.map(|path| unpacked.file(path));
        for path in data.into_iter().chain([PathBuf::from(NETWORK_BOOT)]) {
            command.arg("-L").arg(path);
        }
        // Modules of the system's QEMU do not fit.
        let modules = unpacked.file("usr/lib/x86_64-linux-gnu/qemu");
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
