//! What is kept of a container: its directory below `/var/lib/bulkhead/containers`,
//! with `record.json`, and for images the writable layer.
//!
//! Making the directory takes the id, and whoever made it holds the lock in it as long
//! as it lives: so that others can tell a container that is being started or runs from
//! one whose caller was killed. Until the program has run the directory is a guard;
//! [`Container::keep`] makes it stay until `bulkhead rm`.

use std::{
    fs::{self, DirBuilder, File},
    io::{self, Read, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use bulkhead_image::remove_tree;
use rustix::{
    fs::{CWD, FlockOperation, RenameFlags, flock, renameat_with},
    io::Errno,
};
use serde::{Deserialize, Serialize};

use crate::{
    error::{Error, Result, at},
    id::ContainerId,
};

const FILE: &str = "record.json";

/// Held by the process that runs the container; it names that process.
const LOCK: &str = "lock";

/// Prefix of a directory that has no lock yet; no id begins so.
const NEW: &str = ".new-";

/// Everything that `list`, `exec` and `rm` must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The id.
    pub id: String,
    /// Image, root or bundle as it was named.
    pub source: String,
    /// Program and arguments.
    pub command: Vec<String>,
    /// Seconds since 1970.
    pub created: u64,
    /// Where config.json and the shim's `address` are.
    pub bundle: PathBuf,
    /// Environment of the first process, the base of that of an exec.
    #[serde(default)]
    pub env: Vec<String>,
    /// Where the user of the first process is at home; empty if nobody knows.
    #[serde(default)]
    pub home: String,
    /// Directory of the first process.
    #[serde(default)]
    pub cwd: String,
    /// Directories that the root file system consists of, lowest first.
    #[serde(default)]
    pub roots: Vec<PathBuf>,
    /// Exit code, once it has ended under our eyes.
    #[serde(default)]
    pub exit_code: Option<u32>,
}

/// A container as it is found on disk.
#[derive(Debug)]
pub struct Found {
    /// The id.
    pub id: ContainerId,
    /// What is remembered; `None` if nothing was written yet.
    pub record: Result<Option<Record>>,
    /// Does the process live that made it?
    pub alive: bool,
}

impl Record {
    /// Reads the record of `id` below the directory `containers`.
    pub fn load(containers: &Path, id: &ContainerId) -> Result<Self> {
        match find(containers, id) {
            Some(found) => match found.record? {
                Some(record) => Ok(record),
                None if found.alive => Err(Error::Starting(id.to_string())),
                None => Err(Error::NotRunning(id.to_string())),
            },
            None => Err(Error::NoContainer(id.to_string())),
        }
    }
}

/// Looks at one container.
pub fn find(containers: &Path, id: &ContainerId) -> Option<Found> {
    let dir = containers.join(id.as_str());
    let meta = fs::symlink_metadata(&dir).ok()?;
    // The lock first: what a living one writes afterwards does no harm.
    let alive = meta.is_dir() && is_locked(&dir);
    let record = match fs::read(dir.join(FILE)) {
        Ok(text) => match serde_json::from_slice(&text) {
            Ok(record) => Ok(Some(record)),
            Err(error) => Err(damaged(id, &error.to_string())),
        },
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(damaged(id, &error.to_string())),
    };
    Some(Found {
        id: id.clone(),
        record,
        alive,
    })
}

fn damaged(id: &ContainerId, reason: &str) -> Error {
    Error::Damaged {
        id: id.to_string(),
        reason: reason.to_owned(),
    }
}

/// All containers, by the time of their making; first those without a record.
pub fn all(containers: &Path) -> Result<Vec<Found>> {
    let entries = match fs::read_dir(containers) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(at("read", containers)(error)),
    };
    let mut all = Vec::new();
    for entry in entries {
        let entry = entry.map_err(at("read", containers))?;
        let name = entry.file_name();
        let id = name.to_str().and_then(|name| name.parse().ok());
        all.extend(id.and_then(|id| find(containers, &id)));
    }
    all.sort_by_key(|found| {
        let record = found.record.as_ref().ok().and_then(Option::as_ref);
        (record.map(|record| record.created), found.id.to_string())
    });
    Ok(all)
}

fn is_locked(dir: &Path) -> bool {
    let Ok(file) = File::open(dir.join(LOCK)) else {
        return false;
    };
    flock(&file, FlockOperation::NonBlockingLockShared) == Err(Errno::WOULDBLOCK)
}

/// The process that holds the lock of a container, by what it wrote.
pub fn owner(containers: &Path, id: &ContainerId) -> Option<rustix::process::Pid> {
    let mut text = String::new();
    let file = File::open(containers.join(id.as_str()).join(LOCK)).ok()?;
    file.take(20).read_to_string(&mut text).ok()?;
    rustix::process::Pid::from_raw(text.trim().parse().ok()?)
}

/// Now, in seconds since 1970.
pub fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// A directory made exclusively, removed with all in it when this is dropped.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
    armed: bool,
}

impl Scratch {
    /// Makes `path`, mode 0700, which must not exist; parents are made too.
    pub fn make(path: PathBuf) -> io::Result<Self> {
        if let Some(parent) = path.parent() {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(parent)?;
        }
        DirBuilder::new().mode(0o700).create(&path)?;
        Ok(Scratch { path, armed: true })
    }

    /// Takes over a directory that exists.
    pub fn adopt(path: PathBuf) -> Self {
        Scratch { path, armed: true }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it now, and says what went wrong.
    pub fn remove(mut self) -> Result<()> {
        self.armed = false;
        remove_tree(&self.path).map_err(at("remove", &self.path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.armed {
            let _ = remove_tree(&self.path);
        }
    }
}

/// The directory of a container.
#[derive(Debug)]
pub struct Container {
    scratch: Scratch,
    /// Given up with the end of the process.
    _lock: File,
}

impl Container {
    /// Takes the id: makes its directory below `containers`.
    pub fn make(containers: &Path, id: &ContainerId) -> Result<Self> {
        let path = containers.join(id.as_str());
        if path.symlink_metadata().is_ok() {
            return Err(Error::Exists(id.to_string()));
        }
        let failed = || at("make", &path);
        // Whoever sees the directory under its name sees it locked.
        let new = format!("{NEW}{id}-{}", std::process::id());
        let mut scratch = Scratch::make(containers.join(new)).map_err(failed())?;
        let mut lock = File::create(scratch.path().join(LOCK)).map_err(failed())?;
        writeln!(lock, "{}", std::process::id()).map_err(failed())?;
        flock(&lock, FlockOperation::NonBlockingLockExclusive).map_err(at("lock", &path))?;
        let flags = RenameFlags::NOREPLACE;
        match renameat_with(CWD, scratch.path(), CWD, &path, flags) {
            Ok(()) => scratch.path = path,
            Err(Errno::EXIST) => return Err(Error::Exists(id.to_string())),
            Err(error) => return Err(failed()(error.into())),
        }
        Ok(Container {
            scratch,
            _lock: lock,
        })
    }

    /// Makes a directory in it.
    pub fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.path().join(name);
        // The upper directory's mode is that of the container's root.
        DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .map_err(at("make", &path))?;
        Ok(path)
    }

    /// Writes the record, whole or not at all.
    pub fn save(&self, record: &Record) -> Result<()> {
        let path = self.scratch.path().join(FILE);
        let new = self.scratch.path().join("record.json.new");
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            // Else a power cut can leave an empty file under the name.
            file.sync_all()?;
            fs::rename(&new, &path)
        };
        write().map_err(at("write", &path))
    }

    /// Lets it stay after this run, whatever comes: the program has run, and its files
    /// may be all that is left of its work.
    pub fn keep(&mut self) {
        self.scratch.armed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(text: &str) -> ContainerId {
        text.parse().unwrap()
    }

    fn record(id: &str) -> Record {
        Record {
            id: id.to_owned(),
            source: "image".to_owned(),
            command: vec!["sh".to_owned()],
            created: 7,
            bundle: PathBuf::from("/b"),
            env: vec![],
            home: String::new(),
            cwd: "/".to_owned(),
            roots: vec![],
            exit_code: None,
        }
    }

    #[test]
    fn a_scratch_directory_is_exclusive_and_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        let scratch = Scratch::make(path.clone()).unwrap();
        assert_eq!(
            Scratch::make(path.clone()).unwrap_err().kind(),
            io::ErrorKind::AlreadyExists
        );
        fs::write(path.join("file"), "x").unwrap();
        drop(scratch);
        assert!(!path.exists());
    }

    #[test]
    fn a_container_is_alive_from_its_first_moment_to_the_end_of_who_made_it() {
        let dir = tempfile::tempdir().unwrap();
        let container = Container::make(dir.path(), &id("a")).unwrap();
        let found = find(dir.path(), &id("a")).unwrap();
        assert!(found.alive && matches!(found.record, Ok(None)));
        assert!(matches!(
            Record::load(dir.path(), &id("a")),
            Err(Error::Starting(_))
        ));
        assert_eq!(owner(dir.path(), &id("a")), Some(rustix::process::getpid()));
        assert!(matches!(
            Container::make(dir.path(), &id("a")),
            Err(Error::Exists(_))
        ));
        container.save(&record("a")).unwrap();
        let found = find(dir.path(), &id("a")).unwrap();
        assert!(found.alive && found.record.unwrap().is_some());
        drop(container);
        assert!(find(dir.path(), &id("a")).is_none());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn what_a_program_wrote_stays_after_any_failure_that_follows() {
        let dir = tempfile::tempdir().unwrap();
        let mut container = Container::make(dir.path(), &id("a")).unwrap();
        let upper = container.dir("upper").unwrap();
        container.save(&record("a")).unwrap();
        container.keep();
        fs::write(upper.join("work"), "all of it").unwrap();
        drop(container);
        assert_eq!(fs::read_to_string(upper.join("work")).unwrap(), "all of it");
        let found = find(dir.path(), &id("a")).unwrap();
        assert!(!found.alive && found.record.unwrap().is_some());
    }

    #[test]
    fn a_damaged_record_hides_no_container() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["a", "b", "c"] {
            let mut container = Container::make(dir.path(), &id(name)).unwrap();
            container.save(&record(name)).unwrap();
            container.keep();
        }
        fs::write(dir.path().join("b").join(FILE), "{").unwrap();
        fs::remove_file(dir.path().join("c").join(FILE)).unwrap();
        // Names of something else.
        fs::create_dir(dir.path().join(".new-x-1")).unwrap();
        let found = all(dir.path()).unwrap();
        let names: Vec<_> = found.iter().map(|found| found.id.to_string()).collect();
        assert_eq!(names, ["b", "c", "a"]);
        assert!(matches!(found[0].record, Err(Error::Damaged { .. })));
        assert!(matches!(found[1].record, Ok(None)));
        let error = Record::load(dir.path(), &id("b")).unwrap_err().to_string();
        assert!(error.contains("bulkhead rm b"), "{error}");
    }
}
