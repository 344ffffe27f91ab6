//! Debian's archive: packages of any suite, without touching the system.
//!
//! Everything goes through apt-get with a sources file and state of our own, so
//! that signatures are checked against Debian's archive keys and nothing of the
//! system changes. The mirror is the one that the machine itself uses.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::command::{clean, output};

/// The keys that sign Debian's archive, as older and newer releases name them.
const KEYRINGS: [&str; 2] = [
    "/usr/share/keyrings/debian-archive-keyring.gpg",
    "/usr/share/keyrings/debian-archive-keyring.pgp",
];

/// The file with the keys that sign Debian's archive.
///
/// # Errors
///
/// It is not there.
pub fn keyring() -> Result<&'static str> {
    KEYRINGS
        .into_iter()
        .find(|path| Path::new(path).exists())
        .with_context(|| format!("No {}: is debian-archive-keyring installed?", KEYRINGS[0]))
}

/// A Debian mirror.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mirror {
    /// Address that ends in `/debian/`.
    uri: String,
}

impl Mirror {
    /// Address of the archive, ending in `/debian/`.
    #[must_use]
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The mirror in this machine's own apt sources.
    pub fn of_this_machine() -> Result<Mirror> {
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
             guest kernel and lab host are built from Debian packages",
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

/// apt-get with one source and a directory of its own for everything.
#[derive(Debug)]
pub struct Apt {
    directory: PathBuf,
}

impl Apt {
    /// A view of `suite` in `mirror`; `directory` becomes the place of apt's files.
    ///
    /// # Errors
    ///
    /// The archive keys are not installed or the directory cannot be written.
    pub fn new(directory: &Path, mirror: &Mirror, suite: &str) -> Result<Apt> {
        let keyring = keyring()?;
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
            // What this machine has installed must not choose the version.
            "Dir::State::status=/dev/null".to_owned(),
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

    /// The version of `package` that the archive has now. Must come before
    /// [`Apt::download`].
    ///
    /// # Errors
    ///
    /// The archive cannot be reached, is not signed by Debian or lacks the package.
    pub fn candidate(&self, package: &str) -> Result<String> {
        output(self.command("apt-get").args(["update", "--error-on=any"]))?;
        let policy = output(self.command("apt-cache").args(["policy", package]))?;
        let version = policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .unwrap_or("(none)");
        ensure!(version != "(none)", "The suite has no {package}");
        Ok(version.to_owned())
    }

    /// The first package that `package` depends on: what a metapackage stands
    /// for. Must come after [`Apt::candidate`].
    ///
    /// # Errors
    ///
    /// There is no such package, or it depends on none.
    pub fn stands_for(&self, package: &str) -> Result<String> {
        let depends = output(self.command("apt-cache").args(["depends", package]))?;
        depends
            .lines()
            .find_map(|line| line.trim().strip_prefix("Depends: "))
            .map(str::to_owned)
            .with_context(|| format!("The package {package} depends on nothing"))
    }

    /// Fetches `package`; apt checks it against the signed index.
    ///
    /// # Errors
    ///
    /// The package cannot be had.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        output(self.command("apt-get").args(["download", package]))?;
        fs::read_dir(&self.directory)
            .with_context(|| format!("Cannot read {}", self.directory.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| {
                let name = path.file_name().unwrap_or_default().to_string_lossy();
                name.starts_with(&format!("{package}_")) && name.ends_with(".deb")
            })
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
