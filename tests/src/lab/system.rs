//! Debian systems as archives, made by mmdebstrap: by root, or by a user in a namespace
//! of users. Whoever makes one gets the same bytes.
//!
//! Owners and devices are right in the archive, whoever owns its file. What unpacks it
//! to make something of it runs [`as_root`].

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_guest::command::{clean, limited, logged, output};
use bulkhead_guest::debian::{Mirror, access, keyring};

/// How long installing a system may take.
const DEADLINE: Duration = Duration::from_secs(2400);

/// In an entry made from Debian packages: their names and versions.
pub(crate) const PACKAGES: &str = "packages";

/// No file is younger: the day of the stable release.
const NEWEST: &str = "1754697600";

/// Files that nobody needs here, and that are half of the size: what is read by people;
/// the compiler that PostgreSQL does without where it is missing; gcc's second half.
const LEFT_OUT: [&str; 10] = [
    "/usr/share/doc/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/libz3*",
    "/usr/lib/postgresql/*/lib/bitcode/*",
    "/usr/lib/postgresql/*/lib/llvmjit*",
    "/usr/libexec/gcc/*/lto1",
    "/usr/bin/*lto-dump*",
];

/// Takes out what is of the building machine or of the installation alone. A backup of
/// the passwords, for one, nobody may read, not even its owner.
const CLEAN: &str = r#"rm -rf "$1"/var/lib/postgresql/*/main "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/*- \
    "$1"/etc/apt/apt.conf.d/99mmdebstrap "$1"/etc/dpkg/dpkg.cfg.d/99mmdebstrap"#;

/// Where the packages of a system are listed in it.
const STATUS: &str = "./var/lib/dpkg/status";

/// Whether this user can install Debian systems.
///
/// # Errors
///
/// It cannot, for the reason that is told.
pub(crate) fn can_be_made() -> Result<()> {
    if is_root() {
        return Ok(());
    }
    // mmdebstrap takes another user for root, but needs the same of the system.
    output(clean("unshare").args(["--user", "--map-auto", "--map-root-user", "true"]))
        .map(drop)
        .context(
            "This user cannot install a Debian system without being root. It needs user and \
             group ids of its own in /etc/subuid and /etc/subgid, which root gives by \
             `usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER`, and \
             user namespaces, which root allows by `sysctl kernel.unprivileged_userns_clone=1`",
        )
}

/// Writes the minimal system of `suite` with `packages` to the file `archive`; the
/// signatures of the mirror are checked. What is said meanwhile goes to `log`.
pub(crate) fn install(
    mirror: &Mirror,
    suite: &str,
    packages: &[&str],
    archive: &Path,
    log: &Path,
) -> Result<()> {
    can_be_made()?;
    let mut command = limited("mmdebstrap", DEADLINE);
    command
        .env("SOURCE_DATE_EPOCH", NEWEST)
        // The system is made here; whoever is root in a namespace of ours has no way
        // into our own directories, and /tmp may be in memory.
        .env("TMPDIR", "/var/tmp")
        // Neither has it to what this user has set for dpkg.
        .env("HOME", "/nonexistent")
        .arg(if is_root() {
            "--mode=root"
        } else {
            "--mode=unshare"
        })
        .args(["--variant=minbase", "--format=tar"])
        .arg(format!("--keyring={}", keyring()?))
        // The keys are those above, whatever others apt trusts.
        .arg("--skip=check/signed-by")
        .arg(format!("--include={}", packages.join(",")))
        .arg(format!("--customize-hook={CLEAN}"));
    for setting in access()? {
        command.arg(format!("--aptopt={setting}"));
    }
    // A system that is cut off is thrown away: nothing has to be on disk before the end.
    command.arg("--dpkgopt=force-unsafe-io");
    for files in LEFT_OUT {
        command.arg(format!("--dpkgopt=path-exclude={files}"));
    }
    logged(
        command
            .arg(suite)
            .arg(archive)
            .arg(format!("deb {} {suite} main", mirror.uri())),
        log,
    )
}

/// Lists the packages of the system in `archive`, and `more`, in the file `out`: a name
/// and a version a line.
pub(crate) fn list_packages(archive: &Path, more: &str, work: &Path, out: &Path) -> Result<()> {
    let database = work.join("dpkg");
    fs::create_dir_all(&database)?;
    unpack(archive, STATUS, &database.join("status"))?;
    let mut list = output(
        clean("dpkg-query")
            .arg(format!("--admindir={}", database.display()))
            .args(["--show", "--showformat", "${Package} ${Version}\n"]),
    )?;
    list.push_str(more);
    fs::write(out, list).with_context(|| format!("Cannot write {}", out.display()))
}

/// Writes what the file `name` of `archive` contains to `out`.
pub(crate) fn unpack(archive: &Path, name: &str, out: &Path) -> Result<()> {
    let file = fs::File::create(out).with_context(|| format!("Cannot make {}", out.display()))?;
    let status = clean("tar")
        .args(["--occurrence=1", "-Oxf"])
        .arg(archive)
        .arg(name)
        .stdout(file)
        .stderr(Stdio::null())
        .status()
        .context("Cannot run tar")?;
    ensure!(status.success(), "The system has no {name}");
    Ok(())
}

/// `program`, which sees root as the owner of whatever this user owns, and may give
/// files to other owners and make devices, as far as it sees.
pub(crate) fn as_root(program: &str) -> Command {
    if is_root() {
        return clean(program);
    }
    // It closes as many descriptors as there may be, which are a billion in some places.
    let mut command = clean("prlimit");
    command.args(["--nofile=1024:", "fakeroot", "--", program]);
    command
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_of_a_system_is_read_out_of_its_archive() {
        let work = tempfile::tempdir().unwrap();
        let archive = work.path().join("tar");
        fs::write(work.path().join("a"), "text\n").unwrap();
        output(
            clean("tar")
                .arg("-C")
                .arg(work.path())
                .arg("-cf")
                .arg(&archive)
                .arg("./a"),
        )
        .unwrap();
        let out = work.path().join("out");
        unpack(&archive, "./a", &out).unwrap();
        assert_eq!(fs::read_to_string(&out).unwrap(), "text\n");
        assert!(unpack(&archive, "./b", &out).is_err());
    }
}
