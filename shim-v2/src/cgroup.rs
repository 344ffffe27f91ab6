//! The cgroup of a pod's VMM on the host.
//!
//! [`Place`] says where: below the cgroup that the caller made for the pod, whose
//! limits and accounts hold for the virtual machine that way. A [`Cgroup`] is made
//! before the VMM, which begins its life in it, and goes when it is dropped. What
//! was made is written into the state directory first, for `delete`
//! ([`remove_recorded`]).
//!
//! cgroup v2 has one hierarchy, v1 one for each controller; where both are mounted
//! (hybrid) the VMM is in all. Directories on the way that are missing are made and
//! marked as ours by an extended attribute: whichever pod is the last to leave one
//! removes it. There is one limit, that of tasks; what memory and processors a pod
//! may have is its caller's affair, in the cgroups above.
//!
//! A host without cgroups has nothing to be placed in: that is told in the log and
//! no error. Where there are cgroups, one that cannot be made is an error: whoever
//! set limits for the pod must not be left with a VM that has none.

mod place;

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use rustix::{
    fs::{XattrFlags, getxattr, setxattr, statfs},
    io::Errno,
};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

pub use self::place::Place;
use crate::{
    carry::{Bag, CarriedFd},
    error::{Error, Result},
    mount,
};

/// Where hierarchies are mounted.
const ROOT: &str = "/sys/fs/cgroup";
/// Below [`ROOT`] on a host with v1: what of it a VMM is accounted and limited by.
const LEGACY: [&str; 6] = ["pids", "memory", "cpu", "cpuacct", "cpuset", "freezer"];
/// Below [`ROOT`] on a host with both.
const HYBRID: &str = "unified";
/// Of v2: the limit that we set, and accounts that tell what the VM costs.
const CONTROLLERS: [&str; 3] = ["pids", "memory", "cpu"];
/// The limit of tasks.
const PIDS_MAX: &str = "pids.max";
/// What a directory is marked with that a shim has made on the way to its own.
const MARK: &str = "trusted.bulkhead.made";
/// Name of the list in the state directory.
pub(crate) const RECORD: &str = "cgroups.json";

/// How often others may remove a directory on the way while ours is made.
const TRIES: u32 = 100;
/// Time for what is in an abandoned cgroup to leave it.
const ABANDONED: Duration = Duration::from_secs(1);
/// Time for the last tasks to leave before a cgroup is removed.
const LEAVE: Duration = Duration::from_secs(2);
/// The same for `delete`, which has less.
pub const LEAVE_DELETE: Duration = Duration::from_millis(500);

/// A cgroup of our own in every hierarchy. Dropping it ends what is in it and
/// removes it.
#[derive(Debug)]
pub struct Cgroup {
    dirs: Vec<PathBuf>,
    entrance: Entrance,
    /// The list in the state directory.
    record: PathBuf,
}

/// What goes along of a [`Cgroup`] when the program changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    dirs: Vec<PathBuf>,
    record: PathBuf,
}

/// What goes along of an [`Entrance`].
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct CarriedEntrance {
    unified: Option<CarriedFd>,
    procs: Vec<CarriedFd>,
}

/// The way into a [`Cgroup`]; it leads nowhere once that is removed.
#[derive(Debug, Default)]
pub struct Entrance {
    /// The directory of v2, into which a process can be born.
    unified: Option<OwnedFd>,
    /// `cgroup.procs` of v1, into which a process writes itself.
    procs: Vec<File>,
}

impl Entrance {
    /// The directory in which a new process can be born.
    pub(crate) fn unified(&self) -> Option<BorrowedFd<'_>> {
        self.unified.as_ref().map(AsFd::as_fd)
    }

    /// Lets the calling process, which is alone, enter what it was not born in. Makes
    /// system calls only.
    pub(crate) fn enter(&self) -> io::Result<()> {
        for mut procs in &self.procs {
            // Whoever writes it.
            procs.write_all(b"0")?;
        }
        Ok(())
    }

    /// That of the program before this one.
    pub(crate) fn unpack(carried: CarriedEntrance) -> io::Result<Self> {
        let procs = carried
            .procs
            .into_iter()
            .map(|fd| fd.take().map(File::from));
        let procs: io::Result<_> = procs.collect();
        Ok(Entrance {
            unified: carried.unified.map(CarriedFd::take).transpose()?,
            procs: procs?,
        })
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<CarriedEntrance> {
        let unified = self.unified.as_ref().map(|dir| bag.put(dir)).transpose()?;
        let procs: io::Result<_> = self.procs.iter().map(|procs| bag.put(procs)).collect();
        Ok(CarriedEntrance {
            unified,
            procs: procs?,
        })
    }

    /// One more.
    pub(crate) fn try_clone(&self) -> io::Result<Entrance> {
        let procs: io::Result<_> = self.procs.iter().map(File::try_clone).collect();
        Ok(Entrance {
            unified: self.unified.as_ref().map(OwnedFd::try_clone).transpose()?,
            procs: procs?,
        })
    }
}

impl Cgroup {
    /// Makes it for at most `tasks` processes and threads, or says what is in the
    /// way. `state` is the pod's state directory, which the caller owns.
    pub fn make(place: &Place, tasks: u64, state: &Path) -> Result<Option<Self>> {
        let hierarchies = Hierarchy::mounted(Path::new(ROOT));
        if hierarchies.is_empty() {
            warn!("this host has no cgroups: the VMM has none of its own");
            return Ok(None);
        }
        Self::make_in(&hierarchies, place, tasks, state).map(Some)
    }

    fn make_in(hierarchies: &[Hierarchy], place: &Place, tasks: u64, state: &Path) -> Result<Self> {
        let dirs: Vec<PathBuf> = hierarchies.iter().map(|of| of.dir(place)).collect();
        for dir in &dirs {
            wait_until_left(dir)?;
        }
        let mut cgroup = Cgroup {
            dirs: Vec::new(),
            entrance: Entrance::default(),
            record: state.join(RECORD),
        };
        let failed = |path: &Path, source| Error::Path {
            action: "write",
            path: path.to_owned(),
            source,
        };
        let record = serde_json::to_vec(&dirs).map_err(io::Error::from);
        record
            .and_then(|text| fs::write(&cgroup.record, text))
            .map_err(|error| failed(&cgroup.record, error))?;
        let mut limited = false;
        for (hierarchy, dir) in hierarchies.iter().zip(dirs) {
            // First, for what was made before it failed goes with it.
            cgroup.dirs.push(dir.clone());
            hierarchy.make(&dir)?;
            limited |= hierarchy.limit(&dir, tasks)?;
            match hierarchy.version {
                Version::Two => {
                    let opened = mount::open_dir(&dir).map_err(|error| failed(&dir, error))?;
                    cgroup.entrance.unified = Some(opened);
                }
                Version::One => {
                    let path = dir.join("cgroup.procs");
                    let procs = File::options().write(true).open(&path);
                    cgroup
                        .entrance
                        .procs
                        .push(procs.map_err(|error| failed(&path, error))?);
                }
            }
        }
        if !limited {
            info!("this host cannot limit the tasks of a cgroup");
        }
        Ok(cgroup)
    }

    /// That of the program before this one, and the way into it.
    pub(crate) fn unpack(carried: Carried, entrance: Entrance) -> Self {
        Cgroup {
            dirs: carried.dirs,
            entrance,
            record: carried.record,
        }
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self) -> Carried {
        Carried {
            dirs: self.dirs.clone(),
            record: self.record.clone(),
        }
    }

    /// The way in.
    pub(crate) fn entrance(&self) -> &Entrance {
        &self.entrance
    }

    /// Where it is, for messages: in one of the hierarchies.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.dirs
            .first()
            .map_or_else(|| Path::new(ROOT), PathBuf::as_path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        match remove(&self.dirs, LEAVE) {
            // Somebody else may have the place from now on.
            Ok(()) => drop(fs::remove_file(&self.record)),
            Err(error) => error!(error = error.text(), "something is left of the VMM"),
        }
    }
}

/// Removes what a shim that is gone has recorded in its state directory.
pub fn remove_recorded(state: &Path, limit: Duration) -> Result<()> {
    let text = fs::read(state.join(RECORD)).unwrap_or_default();
    let dirs: Vec<PathBuf> = serde_json::from_slice(&text).unwrap_or_default();
    let dirs: Vec<PathBuf> = dirs
        .into_iter()
        .filter(|dir| dir.starts_with(ROOT))
        .collect();
    remove(&dirs, limit)
}

/// Moves a process into a cgroup that somebody has made for it, in every hierarchy.
pub fn join(path: &str, pid: u32) -> Result<()> {
    let refused = |reason: String| Error::Argument {
        what: "Runtime option shim_cgroup",
        value: path.to_owned(),
        reason,
    };
    let place = match Place::new(path) {
        Ok(Some(place)) => place,
        Ok(None) => return Ok(()),
        Err(error) => return Err(refused(error.to_string())),
    };
    for hierarchy in Hierarchy::mounted(Path::new(ROOT)) {
        let procs = hierarchy.dir(&place).join("cgroup.procs");
        let moved = File::options()
            .write(true)
            .open(&procs)
            .and_then(|mut file| file.write_all(pid.to_string().as_bytes()));
        moved.map_err(|error| refused(format!("cannot write {}: {error}", procs.display())))?;
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

/// A mounted hierarchy.
#[derive(Clone, Debug)]
struct Hierarchy {
    root: PathBuf,
    version: Version,
}

impl Hierarchy {
    /// Those that a VMM is to be in; that of v2 first.
    fn mounted(root: &Path) -> Vec<Hierarchy> {
        let version = |path: &Path| match statfs(path).ok()?.f_type {
            libc::CGROUP2_SUPER_MAGIC => Some(Version::Two),
            libc::CGROUP_SUPER_MAGIC => Some(Version::One),
            _ => None,
        };
        if version(root) == Some(Version::Two) {
            let (root, version) = (root.to_owned(), Version::Two);
            return vec![Hierarchy { root, version }];
        }
        let mut found: Vec<Hierarchy> = Vec::new();
        let mut seen = Vec::new();
        for name in [HYBRID].into_iter().chain(LEGACY) {
            let root = root.join(name);
            let Some(version) = version(&root) else {
                continue;
            };
            // Controllers that are mounted together have several names.
            let device = fs::metadata(&root).map_or(0, |meta| meta.dev());
            if !seen.contains(&device) {
                seen.push(device);
                found.push(Hierarchy { root, version });
            }
        }
        found
    }

    fn dir(&self, place: &Place) -> PathBuf {
        self.root.join(place.path())
    }

    /// Makes a directory and what is missing above it.
    fn make(&self, dir: &Path) -> Result<()> {
        let failed = |path: &Path, source| Error::Path {
            action: "make the cgroup",
            path: path.to_owned(),
            source,
        };
        let mut tries = 0;
        loop {
            tries += 1;
            match fs::create_dir(dir) {
                Ok(()) => return self.settle(dir),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => return Ok(()),
                // Another pod may remove its way in the same moment.
                Err(error) if is_gone(&error) && tries < TRIES => {}
                Err(error) => return Err(failed(dir, error)),
            }
            let mut above: Vec<&Path> = self.above(dir).collect();
            above.reverse();
            for dir in above {
                match fs::create_dir(dir) {
                    Ok(()) => {
                        // Where it cannot be marked it stays.
                        let _ = setxattr(dir, MARK, b"1", XattrFlags::empty());
                    }
                    Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                    Err(error) if is_gone(&error) => break,
                    Err(error) => return Err(failed(dir, error)),
                }
            }
        }
    }

    /// What lies between a directory and the root, the nearest first.
    fn above<'a>(&'a self, dir: &'a Path) -> impl Iterator<Item = &'a Path> {
        dir.ancestors()
            .skip(1)
            .take_while(move |above| *above != self.root)
    }

    /// Makes a new directory fit for processes: v1 gives it neither processors nor
    /// memory, nor what is new above it.
    fn settle(&self, dir: &Path) -> Result<()> {
        if self.version == Version::Two {
            return Ok(());
        }
        for name in ["cpuset.cpus", "cpuset.mems"] {
            let lacks = |dir: &&Path| {
                let own = fs::read_to_string(dir.join(name));
                own.is_ok_and(|own| own.trim().is_empty())
            };
            let mut empty: Vec<&Path> = dir.ancestors().take_while(lacks).collect();
            while let Some(dir) = empty.pop() {
                let path = dir.join(name);
                let above = dir.parent().unwrap_or(&self.root).join(name);
                fs::read(above)
                    .and_then(|inherited| fs::write(&path, inherited))
                    .map_err(|source| Error::Path {
                        action: "write",
                        path,
                        source,
                    })?;
            }
        }
        Ok(())
    }

    /// Sets the limit of tasks; false if that is not this hierarchy's, or not this
    /// host's.
    fn limit(&self, dir: &Path, tasks: u64) -> Result<bool> {
        let path = dir.join(PIDS_MAX);
        let write = || File::options().write(true).open(&path);
        let mut opened = write();
        if self.version == Version::Two && is_missing(&opened) {
            let root = fs::read_to_string(self.root.join("cgroup.controllers"));
            if !has_word(&root.unwrap_or_default(), "pids") {
                return Ok(false);
            }
            self.give_controllers(dir)?;
            opened = write();
        }
        if self.version == Version::One && is_missing(&opened) {
            return Ok(false);
        }
        opened
            .and_then(|mut file| file.write_all(tasks.to_string().as_bytes()))
            .map_err(|source| Error::Path {
                action: "write",
                path,
                source,
            })?;
        Ok(true)
    }

    /// Lets everything between the root and a directory of v2 pass controllers down.
    fn give_controllers(&self, dir: &Path) -> Result<()> {
        let mut above: Vec<&Path> = self.above(dir).collect();
        above.push(&self.root);
        for dir in above.into_iter().rev() {
            let path = dir.join("cgroup.subtree_control");
            let given = fs::read_to_string(&path).unwrap_or_default();
            for controller in CONTROLLERS {
                if has_word(&given, controller) {
                    continue;
                }
                match fs::write(&path, format!("+{controller}")) {
                    Err(source) if controller == "pids" => {
                        return Err(Error::Path {
                            action: "pass the controller pids down in",
                            path,
                            source,
                        });
                    }
                    // Only an account is missing then.
                    _ => {}
                }
            }
        }
        Ok(())
    }
}

/// Is there no such file?
fn is_missing<T>(result: &io::Result<T>) -> bool {
    matches!(result, Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Is the directory above not there, or about to go?
fn is_gone(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV))
}

fn has_word(text: &str, word: &str) -> bool {
    text.split_whitespace().any(|found| found == word)
}

/// Waits for a cgroup to be empty, if there is one already: a VMM that was killed may
/// still be on its way out.
fn wait_until_left(dir: &Path) -> Result<()> {
    let end = Instant::now() + ABANDONED;
    loop {
        let (text, used) = match fs::read_to_string(dir.join("cgroup.events")) {
            Ok(text) => (Ok(text), "populated 1"),
            Err(_) => (fs::read_to_string(dir.join("cgroup.procs")), "\n"),
        };
        match text {
            Ok(text) if text.contains(used) => {}
            // Whatever is wrong with it is seen when it is made.
            _ => return Ok(()),
        }
        if Instant::now() > end {
            return Err(Error::Path {
                action: "take the cgroup",
                path: dir.to_owned(),
                source: io::Error::new(
                    io::ErrorKind::ResourceBusy,
                    "other processes are in it already",
                ),
            });
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Removes directories and those above them that were made for them. What is gone
/// is no error; the first that stays is.
fn remove(dirs: &[PathBuf], limit: Duration) -> Result<()> {
    let end = Instant::now() + limit;
    let mut outcome = Ok(());
    for dir in dirs {
        match remove_one(dir, end) {
            Ok(()) => {
                for above in dir.ancestors().skip(1) {
                    // Whoever is still in it, or not ours, keeps it.
                    if !is_marked(above) || fs::remove_dir(above).is_err() {
                        break;
                    }
                }
            }
            Err(source) if outcome.is_ok() => {
                outcome = Err(Error::Path {
                    action: "remove the cgroup",
                    path: dir.clone(),
                    source,
                });
            }
            Err(_) => {}
        }
    }
    outcome
}

fn is_marked(dir: &Path) -> bool {
    let mut nothing = [0_u8; 1];
    getxattr(dir, MARK, &mut nothing[..]).is_ok()
}

fn remove_one(dir: &Path, end: Instant) -> io::Result<()> {
    let mut pause = Duration::from_millis(1);
    let mut killed = false;
    loop {
        match fs::remove_dir(dir) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error)
                if error.raw_os_error() == Some(Errno::BUSY.raw_os_error())
                    && Instant::now() < end => {}
            Err(error) => return Err(error),
        }
        if !killed {
            // Nobody but the VMM has any business here. v1 does not have it.
            let _ = File::options()
                .write(true)
                .open(dir.join("cgroup.kill"))
                .and_then(|mut file| file.write_all(b"1"));
            killed = true;
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(50));
    }
}

#[cfg(test)]
mod tests;
