//! Debian's kernel source: which version there is, and how it is had.
//!
//! Everything goes through apt-get with a sources file and state of our own, so
//! that signatures are checked against Debian's archive keys and nothing of the
//! system changes. The mirror is the one that the machine itself uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{clean, output};

/// The source package: the long-term series that the configuration is for.
pub(crate) const PACKAGE: &str = "linux-source-6.12";

/// The version with which the configuration was last gone through. Debian keeps
/// only the newest patch release; a newer one is taken, with a note.
const KNOWN: &str = "6.12.107-1";

/// Debian suites that carry the package, the best first.
const SUITES: [&str; 2] = ["trixie", "bookworm-backports"];

/// The keys that sign Debian's archive, as older and newer releases name them.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// Parts of the tree that no file of this kernel is compiled from: half of its
/// size. What Kconfig reads there stays.
const NOT_UNPACKED: [&str; 3] = [
    "*/drivers/gpu/*.[ch]",
    "*/sound/*.[ch]",
    "*/Documentation/*.rst",
];

/// A Debian mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mirror {
    /// Address that ends in `/debian/`.
    uri: String,
}

/// One version of the package in a mirror.
#[derive(Debug)]
pub(crate) struct Package {
    pub(crate) version: String,
    apt: Apt,
}

/// The unpacked tree.
#[derive(Debug)]
pub(crate) struct Tree {
    pub(crate) path: PathBuf,
    /// When Debian made the package, in seconds since 1970: the kernel's date.
    pub(crate) date: u64,
}

impl Mirror {
    /// The mirror in this machine's own apt sources.
    pub(crate) fn of_this_machine() -> Result<Mirror> {
        let targets = output(clean("apt-get").args([
            "indextargets",
            "--no-release-info",
            "--format",
            "$(COMPONENT) $(REPO_URI)",
            "Created-By: Packages",
        ]))
        .context("Cannot ask apt for its sources")?;
        Mirror::among(&targets).context(
            "No Debian mirror is among the apt sources of this machine: \
             the guest kernel is built from Debian's source package",
        )
    }

    /// The first Debian archive among lines of `component address`. Archives of
    /// security updates and of other distributions have other last names; the
    /// signature decides in the end.
    fn among(targets: &str) -> Option<Mirror> {
        targets
            .lines()
            .filter_map(|line| line.split_once(' '))
            .find(|(component, uri)| {
                *component == "main" && uri.trim_end_matches('/').ends_with("/debian")
            })
            .map(|(_, uri)| Mirror {
                uri: uri.to_owned(),
            })
    }
}

/// The newest version of the package that `mirror` has. `state` becomes the
/// directory of apt's files.
pub(crate) fn newest(mirror: &Mirror, state: &Path) -> Result<Package> {
    let mut errors = Vec::new();
    for suite in SUITES {
        let apt = Apt::new(&state.join(suite), mirror, suite)?;
        match apt.candidate() {
            Ok(version) => return Ok(Package { version, apt }),
            Err(error) => errors.push(format!("{suite}: {error:#}")),
        }
    }
    bail!(
        "Cannot find {PACKAGE} in the Debian archive: {}",
        errors.join("; ")
    )
}

impl Package {
    /// What a person should know about this version.
    pub(crate) fn note(&self) -> Option<String> {
        (self.version != KNOWN).then(|| {
            format!(
                "The Debian archive has {PACKAGE} {}; the configuration was checked with {KNOWN}",
                self.version
            )
        })
    }

    /// Fetches the package and unpacks the sources below `work`.
    pub(crate) fn unpack(&self, work: &Path) -> Result<Tree> {
        let deb = self.apt.download()?;
        let contents = work.join("package");
        output(clean("dpkg-deb").arg("-x").arg(&deb).arg(&contents))?;
        fs::remove_file(&deb).with_context(|| format!("Cannot remove {}", deb.display()))?;

        let archive = contents.join("usr/src").join(format!("{PACKAGE}.tar.xz"));
        let date = fs::metadata(&archive)
            .and_then(|metadata| metadata.modified())
            .with_context(|| format!("No {} in the package", archive.display()))?;
        let path = work.join("linux");
        fs::create_dir(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        let mut tar = clean("tar");
        tar.arg("-C")
            .arg(&path)
            .args(["--strip-components=1", "-xf"])
            .arg(&archive);
        tar.args(NOT_UNPACKED.map(|pattern| format!("--exclude={pattern}")));
        output(&mut tar)?;
        fs::remove_dir_all(&contents)
            .with_context(|| format!("Cannot remove {}", contents.display()))?;
        Ok(Tree {
            path,
            date: seconds(date)?,
        })
    }
}

fn seconds(time: SystemTime) -> Result<u64> {
    Ok(time
        .duration_since(UNIX_EPOCH)
        .context("The package is dated before 1970")?
        .as_secs())
}

/// apt-get with one source and a directory of its own for everything.
#[derive(Debug)]
struct Apt {
    directory: PathBuf,
}

impl Apt {
    fn new(directory: &Path, mirror: &Mirror, suite: &str) -> Result<Apt> {
        let keyring = KEYRINGS
            .into_iter()
            .find(|path| Path::new(path).exists())
            .with_context(|| format!("No {}: is debian-archive-keyring installed?", KEYRINGS[0]))?;
        for name in ["lists/partial", "cache/archives/partial"] {
            let path = directory.join(name);
            fs::create_dir_all(&path).with_context(|| format!("Cannot make {}", path.display()))?;
        }
        let sources = directory.join("debian.sources");
        let text = format!(
            "Types: deb\nURIs: {}\nSuites: {suite}\nComponents: main\nSigned-By: {keyring}\n",
            mirror.uri
        );
        fs::write(&sources, text).with_context(|| format!("Cannot write {}", sources.display()))?;
        Ok(Apt {
            directory: directory.to_owned(),
        })
    }

    /// `program` of apt's family, confined to the directory.
    fn command(&self, program: &str) -> Command {
        let set = |key: &str, name: &str| format!("{key}={}", self.directory.join(name).display());
        let mut command = clean(program);
        command.current_dir(&self.directory);
        for option in [
            set("Dir::Etc::sourcelist", "debian.sources"),
            "Dir::Etc::sourceparts=-".to_owned(),
            set("Dir::State::lists", "lists"),
            set("Dir::Cache", "cache"),
            // Only the list of packages is of use here.
            "Acquire::IndexTargets::deb::Contents-deb::DefaultEnabled=false".to_owned(),
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled=false".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=3".to_owned(),
            // The directory belongs to whoever calls us, not to apt's own user.
            "APT::Sandbox::User=root".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }

    /// The version that the archive has now.
    fn candidate(&self) -> Result<String> {
        output(self.command("apt-get").args(["update", "--error-on=any"]))?;
        let policy = output(self.command("apt-cache").args(["policy", PACKAGE]))?;
        let version = policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .unwrap_or("(none)");
        ensure!(version != "(none)", "The suite has no {PACKAGE}");
        Ok(version.to_owned())
    }

    /// Fetches the package; apt checks it against the signed index.
    fn download(&self) -> Result<PathBuf> {
        output(self.command("apt-get").args(["download", PACKAGE]))?;
        fs::read_dir(&self.directory)
            .with_context(|| format!("Cannot read {}", self.directory.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .with_context(|| format!("apt-get left no package in {}", self.directory.display()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_the_first_debian_archive_of_the_machine() {
        let targets = "main http://mirror.example/ubuntu/\n\
                       contrib http://one.example/debian/\n\
                       main http://one.example/debian-security/\n\
                       main http://two.example/pub/debian/\n\
                       main http://three.example/debian\n";
        assert_eq!(
            Mirror::among(targets),
            Some(Mirror {
                uri: "http://two.example/pub/debian/".to_owned()
            })
        );
        assert_eq!(Mirror::among("main http://mirror.example/ubuntu/\n"), None);
    }
}
