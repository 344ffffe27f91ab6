//! Debian's archive: packages of any suite, without touching the system.
//!
//! Everything goes through apt-get with a sources file and state of our own, so
//! that signatures are checked against Debian's archive keys and nothing of the
//! system changes. The mirror is the one that the machine itself uses.

use std::cmp::Ordering;
use std::collections::BTreeMap;
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

/// Debian's order of two versions of a package.
///
/// # Errors
///
/// dpkg cannot be run.
pub fn compare(one: &str, other: &str) -> Result<Ordering> {
    for (relation, order) in [("lt", Ordering::Less), ("eq", Ordering::Equal)] {
        let status = clean("dpkg")
            .args(["--compare-versions", one, relation, other])
            .status()
            .context("Cannot run dpkg")?;
        if status.success() {
            return Ok(order);
        }
    }
    Ok(Ordering::Greater)
}

/// How the names of apt's settings begin that decide how a mirror is reached and by
/// which clock it is judged; no other ones may reach into a system that is made.
const ACCESS: [&str; 7] = [
    "Acquire::http::",
    "Acquire::https::",
    "Acquire::Check-Date ",
    "Acquire::Check-Valid-Until ",
    "Acquire::ForceIPv4 ",
    "Acquire::ForceIPv6 ",
    "Acquire::Retries ",
];

/// This machine's settings of how apt reaches a mirror, for an apt that does not read
/// them: proxies, certificates.
///
/// # Errors
///
/// apt cannot be asked.
pub fn access() -> Result<Vec<String>> {
    let settings = output(clean("apt-config").arg("dump"))?;
    Ok(about_access(&settings))
}

/// The settings of that kind among lines of `NAME "VALUE";`.
fn about_access(settings: &str) -> Vec<String> {
    settings
        .lines()
        .filter(|line| ACCESS.iter().any(|name| line.starts_with(name)))
        .map(str::to_owned)
        .collect()
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

    /// The archive that has `suite`: security updates lie in one of their own,
    /// beside the archive on every mirror that carries them.
    fn uri_of(&self, suite: &str) -> String {
        match self.uri.trim_end_matches('/').strip_suffix("/debian") {
            Some(host) if suite.ends_with("-security") => format!("{host}/debian-security/"),
            _ => self.uri.clone(),
        }
    }

    /// The mirror with this address.
    #[cfg(test)]
    pub(crate) fn at(uri: &str) -> Mirror {
        Mirror {
            uri: uri.to_owned(),
        }
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
            mirror.uri_of(suite)
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

    /// Every version of `package` that the archive has now. Must come before
    /// [`Apt::download`].
    ///
    /// # Errors
    ///
    /// The archive cannot be reached, is not signed by Debian or lacks the package.
    pub(crate) fn versions(&self, package: &str) -> Result<Vec<String>> {
        self.candidate(package)?;
        let lines = output(self.command("apt-cache").args(["madison", package]))?;
        Ok(versions(&lines))
    }

    /// The newest version of every package that the archive has now.
    ///
    /// # Errors
    ///
    /// The archive cannot be reached or is not signed by Debian.
    pub fn candidates(&self) -> Result<BTreeMap<String, String>> {
        output(self.command("apt-get").args(["update", "--error-on=any"]))?;
        let stanzas = output(self.command("apt-cache").arg("dumpavail"))?;
        newest_of_each(&stanzas)
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

    /// Fetches `package`, of one version if it is written as `NAME=VERSION`; apt checks
    /// it against the signed index.
    ///
    /// # Errors
    ///
    /// The package cannot be had.
    pub fn download(&self, package: &str) -> Result<PathBuf> {
        output(self.command("apt-get").args(["download", package]))?;
        let package = package.split_once('=').map_or(package, |(name, _)| name);
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

/// The versions in what apt-cache madison says: `package | version | index`.
fn versions(lines: &str) -> Vec<String> {
    lines
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(|version| version.trim().to_owned())
        .collect()
}

/// Name and newest version of each package in stanzas of `Field: value`.
fn newest_of_each(stanzas: &str) -> Result<BTreeMap<String, String>> {
    let mut newest: BTreeMap<String, String> = BTreeMap::new();
    let mut package = "";
    for line in stanzas.lines() {
        if let Some(name) = line.strip_prefix("Package: ") {
            package = name;
        } else if let Some(version) = line.strip_prefix("Version: ") {
            let is_newer = match newest.get(package) {
                Some(known) => compare(known, version)? == Ordering::Less,
                None => true,
            };
            if is_newer {
                newest.insert(package.to_owned(), version.to_owned());
            }
        }
    }
    Ok(newest)
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
        let mirror = Mirror::at("http://two.example/pub/debian/");
        assert_eq!(Mirror::among(targets), Some(mirror));
        assert_eq!(Mirror::among("main http://mirror.example/ubuntu/\n"), None);
    }

    #[test]
    fn a_system_is_fetched_as_this_machine_fetches_and_no_less_checked() {
        let settings = "Acquire \"\";\nAcquire::AllowInsecureRepositories \"1\";\n\
                        Acquire::http::Proxy \"http://one.example:3128\";\n\
                        Acquire::Check-Valid-Until \"false\";\nAcquire::Languages:: \"de\";\n\
                        Acquire::https::CAInfo \"/etc/ssl/own.pem\";\nDPkg::Post-Invoke:: \"x\";\n";
        assert_eq!(
            about_access(settings),
            [
                "Acquire::http::Proxy \"http://one.example:3128\";",
                "Acquire::Check-Valid-Until \"false\";",
                "Acquire::https::CAInfo \"/etc/ssl/own.pem\";"
            ]
        );
    }

    #[test]
    fn each_version_in_a_suite_is_found() {
        let said = "linux-source-6.12 | 6.12.117-1 | http://one.example/debian trixie/main amd64 Packages\n\
                    linux-source-6.12 | 6.12.107-1 | http://one.example/debian trixie/main amd64 Packages\n";
        assert_eq!(versions(said), ["6.12.117-1", "6.12.107-1"]);
    }

    #[test]
    fn of_two_versions_in_a_list_the_newer_one_counts() {
        let stanzas = "Package: a\nVersion: 6.12.117-1\nSection: x\n\n\
                       Package: a\nVersion: 6.12.107-1\n\nPackage: b\nVersion: 1\n";
        let newest = newest_of_each(stanzas).unwrap();
        assert_eq!(newest["a"], "6.12.117-1");
        assert_eq!(newest["b"], "1");
    }

    #[test]
    fn security_updates_come_from_the_archive_beside() {
        let mirror = Mirror::at("http://one.example/debian/");
        assert_eq!(
            mirror.uri_of("trixie-updates"),
            "http://one.example/debian/"
        );
        assert_eq!(
            mirror.uri_of("trixie-security"),
            "http://one.example/debian-security/"
        );
    }

    #[test]
    fn versions_are_compared_as_dpkg_does() {
        assert_eq!(compare("6.12.107-1", "6.12.117-1").unwrap(), Ordering::Less);
        assert_eq!(
            compare("6.12.117-1", "6.12.117-1~bpo12+1").unwrap(),
            Ordering::Greater
        );
        assert_eq!(compare("1-1", "1-1").unwrap(), Ordering::Equal);
    }
}
