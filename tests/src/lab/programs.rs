//! Programs of the lab host that have to be newer than Debian's: Go modules.
//!
//! ```text
//! tests/go/<name>-<version>/go.mod, go.sum
//! ```
//!
//! `go.mod` pins the module and names the programs in it as its tools; `go.sum` has
//! the hash of everything that they are compiled from. What comes of it depends on
//! nothing else: the Go that compiles is pinned, too, and checked by Go's own
//! database of hashes.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use bulkhead_guest::Progress;
use bulkhead_guest::debian::{Apt, Mirror};

use super::packages::{GO, GO_ROOT, STABLE};
use bulkhead_guest::cache::{self, Cache, Entry};
use bulkhead_guest::command::{clean, limited, output};

/// Changes whenever a step below does.
const RECIPE: &str = "2";

/// The Go that compiles: what the newest of the modules asks for, or newer.
pub(crate) const TOOLCHAIN: &str = "go1.26.8";

/// The containerd of the lab host, if no other one is asked for.
pub const CONTAINERD: &str = "2.4.2";

/// The runc of the lab host.
const RUNC: &str = "1.5.2";

/// How long fetching and compiling a module may take.
const BUILD_DEADLINE: Duration = Duration::from_secs(2400);

/// containerd and runc, compiled.
#[derive(Debug)]
pub struct Programs {
    /// Version of containerd.
    containerd: String,
    entries: Vec<Entry>,
}

impl Programs {
    /// The programs with this version of containerd: out of the cache, or
    /// compiled now.
    ///
    /// # Errors
    ///
    /// There is no such version, it cannot be fetched, or it does not compile.
    pub fn ensure(cache: &Cache, containerd: &str, progress: &dyn Progress) -> Result<Programs> {
        let known = containerds()?;
        if !known.iter().any(|version| version == containerd) {
            bail!(
                "There is no containerd {containerd} for the lab host; there are {}",
                known.join(", ")
            );
        }
        let entries = [("containerd", containerd), ("runc", RUNC)]
            .into_iter()
            .map(|(name, version)| module(cache, name, version, progress))
            .collect::<Result<_>>()?;
        Ok(Programs {
            containerd: containerd.to_owned(),
            entries,
        })
    }

    /// The version of containerd.
    #[must_use]
    pub fn containerd(&self) -> &str {
        &self.containerd
    }

    /// Hashes of all files, an entry each.
    pub(crate) fn contents(&self) -> impl Iterator<Item = &str> {
        self.entries.iter().map(Entry::content)
    }

    /// The directories with the programs.
    pub(crate) fn directories(&self) -> impl Iterator<Item = PathBuf> {
        self.entries.iter().map(|entry| entry.file("bin"))
    }

    /// The configuration for this containerd.
    pub(crate) fn configuration(&self) -> &'static str {
        if self.containerd.starts_with("1.") {
            include_str!("guest/containerd-1.toml")
        } else {
            include_str!("guest/containerd-2.toml")
        }
    }
}

/// Where the modules are pinned.
fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("go")
}

/// The versions of containerd that are pinned, the newest first.
///
/// # Errors
///
/// The folder cannot be read.
pub fn containerds() -> Result<Vec<String>> {
    let folder = folder();
    let names = fs::read_dir(&folder)
        .with_context(|| format!("Cannot read {}", folder.display()))?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>>>()?;
    Ok(newest_first(
        names
            .iter()
            .filter_map(|name| name.strip_prefix("containerd-")),
    ))
}

/// Sorts versions by their numbers.
fn newest_first<'a>(versions: impl Iterator<Item = &'a str>) -> Vec<String> {
    let numbers = |version: &str| -> Vec<u32> {
        let parts = version.split('.');
        parts.map(|part| part.parse().unwrap_or(0)).collect()
    };
    let mut versions: Vec<String> = versions.map(str::to_owned).collect();
    versions.sort_by_key(|version| std::cmp::Reverse(numbers(version)));
    versions
}

/// Every module that is pinned: name, version, and its entry if it has been compiled.
pub(crate) fn find(cache: &Cache) -> Result<Vec<(&'static str, String, Option<Entry>)>> {
    let versions = containerds()?
        .into_iter()
        .map(|version| ("containerd", version));
    versions
        .chain([("runc", RUNC.to_owned())])
        .map(|(name, version)| {
            let pinned = Pinned::read(name, &version)?;
            let entry = cache.find(&pinned.kind, &pinned.key)?;
            Ok((name, version, entry))
        })
        .collect()
}

/// A module as it is pinned.
struct Pinned {
    go_mod: String,
    go_sum: String,
    /// Kind and name of its entry.
    kind: String,
    key: String,
}

impl Pinned {
    fn read(name: &str, version: &str) -> Result<Pinned> {
        let folder = folder().join(format!("{name}-{version}"));
        let [go_mod, go_sum] = ["go.mod", "go.sum"].map(|file| {
            let path = folder.join(file);
            fs::read_to_string(&path).with_context(|| format!("Cannot read {}", path.display()))
        });
        let (go_mod, go_sum) = (go_mod?, go_sum?);
        let key = cache::key([RECIPE, TOOLCHAIN, name, version, &go_mod, &go_sum]);
        let kind = format!("lab-{name}");
        Ok(Pinned {
            go_mod,
            go_sum,
            kind,
            key,
        })
    }
}

/// The programs of one module.
fn module(cache: &Cache, name: &str, version: &str, progress: &dyn Progress) -> Result<Entry> {
    let Pinned {
        go_mod,
        go_sum,
        kind,
        key,
    } = Pinned::read(name, version)?;
    cache.entry(&kind, &key, progress, |entry, work| {
        // In use until the module is compiled.
        let go = go(cache, progress)?;
        progress.step(&format!("Compiling {name} {version} for the lab host"));
        // Nothing may write to the source tree, go.sum least of all.
        fs::write(work.join("go.mod"), &go_mod)?;
        fs::write(work.join("go.sum"), &go_sum)?;
        let bin = entry.join("bin");
        fs::create_dir(&bin)?;
        let place = cache.path().join("go");
        fs::create_dir_all(&place)?;
        // Whoever clears the cache waits.
        let _in_use = cache::lock(&place.join(cache::LOCK))?;
        let mut build = go_command(&go, &place);
        build
            .current_dir(work)
            .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false"])
            .arg("-o")
            .arg(&bin);
        if name == "runc" {
            // Enters namespaces in C, before Go's threads begin.
            build
                .env("CGO_ENABLED", "1")
                .args(["-tags", "seccomp,netgo,osusergo"])
                .args(["-ldflags", "-s -w -extldflags=-static"]);
        } else {
            build
                .env("CGO_ENABLED", "0")
                .args(["-tags", "no_btrfs,no_devmapper,no_zfs"])
                .args(["-ldflags", "-s -w"]);
        }
        output(build.arg("tool")).map(drop)
    })
}

/// A Go that can fetch the pinned one: Debian's, unpacked in the cache. Debian's own
/// older releases have one that is too old for that.
fn go(cache: &Cache, progress: &dyn Progress) -> Result<Entry> {
    cache.entry(
        "lab-go",
        &cache::key([RECIPE, STABLE, GO]),
        progress,
        |entry, work| {
            progress.step("Fetching Go");
            let apt = Apt::new(work, &Mirror::of_this_machine()?, STABLE)?;
            apt.candidate(GO)?;
            let unpacked = work.join("package");
            output(
                clean("dpkg-deb")
                    .arg("-x")
                    .arg(apt.download(GO)?)
                    .arg(&unpacked),
            )?;
            fs::create_dir(entry.join("bin"))?;
            // go.env says where modules come from, and who vouches for them.
            for file in ["bin/go", "go.env"] {
                fs::copy(unpacked.join(GO_ROOT).join(file), entry.join(file))
                    .with_context(|| format!("The package {GO} has no {GO_ROOT}/{file}"))?;
            }
            Ok(())
        },
    )
}

/// `go`, with everything fixed that could differ between machines; what it fetches
/// and compiles stays in the directory `place`.
fn go_command(go: &Entry, place: &Path) -> Command {
    let mut command = limited(&go.file("bin/go").to_string_lossy(), BUILD_DEADLINE);
    command
        .env("GOENV", "off")
        .env("GOROOT", go.file(""))
        .env("GOTOOLCHAIN", TOOLCHAIN)
        .env("GOFLAGS", "-modcacherw")
        .env("GOPATH", place.join("path"))
        .env("GOCACHE", place.join("build"));
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_containerd_of_the_lab_is_among_those_that_are_pinned() {
        let known = containerds().unwrap();
        assert!(
            known.iter().any(|version| version == CONTAINERD),
            "{known:?}"
        );
        assert!(folder().join(format!("runc-{RUNC}/go.sum")).exists());
    }

    #[test]
    fn every_module_is_pinned_to_the_version_that_its_folder_says() {
        for entry in fs::read_dir(folder()).unwrap() {
            let entry = entry.unwrap();
            let name = entry.file_name().into_string().unwrap();
            let (_, version) = name.rsplit_once('-').unwrap();
            let text = fs::read_to_string(entry.path().join("go.mod")).unwrap();
            let tool = text
                .lines()
                .find_map(|line| {
                    line.trim()
                        .trim_start_matches("tool ")
                        .strip_prefix("github.com/")
                })
                .unwrap();
            let module: Vec<&str> = tool.splitn(3, '/').collect();
            let module = format!("github.com/{}/{}", module[0], module[1]);
            assert!(
                text.lines().any(|line| {
                    let line = line.trim().trim_start_matches("require ");
                    line.starts_with(&module) && line.contains(&format!(" v{version}"))
                }),
                "{name}"
            );
            let toolchain = TOOLCHAIN.trim_start_matches("go");
            assert!(text.contains(&format!("\ngo {toolchain}\n")), "{name}");
        }
    }

    #[test]
    fn versions_are_sorted_by_number() {
        assert_eq!(
            newest_first(["1.7.35", "2.4.2", "1.10.0", "2.0.14"].into_iter()),
            ["2.4.2", "2.0.14", "1.10.0", "1.7.35"]
        );
    }
}
