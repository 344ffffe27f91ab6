//! What is kept of a container: its directory below `/var/lib/bulkhead/containers`,
//! with `record.json`, and for images the writable layer.
//!
//! Making the directory is the lock on the id. While the run that made it can still
//! fail it is a guard; [`Container::keep`] makes it stay until `bulkhead rm`.

use std::{
    fs::{self, DirBuilder},
    io::{self, Write},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};

use crate::{
    args::ContainerId,
    error::{Error, Result, at},
    paths,
};

const FILE: &str = "record.json";

/// Everything that `list`, `exec` and `rm` must know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The id.
    pub(crate) id: String,
    /// Image, root or bundle as it was named.
    pub(crate) source: String,
    /// Program and arguments.
    pub(crate) command: Vec<String>,
    /// Seconds since 1970.
    pub(crate) created: u64,
    /// Where config.json and the shim's `address` are.
    pub(crate) bundle: PathBuf,
    /// Environment of the first process, the base of that of an exec.
    #[serde(default)]
    pub(crate) env: Vec<String>,
    /// Directory of the first process.
    #[serde(default)]
    pub(crate) cwd: String,
    /// Exit code, once it has ended under our eyes.
    #[serde(default)]
    pub(crate) exit_code: Option<u32>,
}

impl Record {
    /// Reads the record of `id`.
    pub(crate) fn load(id: &ContainerId) -> Result<Self> {
        let path = paths::container(id).join(FILE);
        match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text)
                .map_err(|error| at::<io::Error>("read the record", &path)(error.into())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                Err(Error::NoContainer(id.to_string()))
            }
            Err(source) => Err(Error::Path {
                action: "read",
                path,
                source,
            }),
        }
    }

    /// All containers, by the time of their making.
    pub(crate) fn all() -> Result<Vec<Self>> {
        let entries = match fs::read_dir(paths::CONTAINERS) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(at("read", paths::CONTAINERS)(error)),
        };
        let mut records = Vec::new();
        for entry in entries {
            let entry = entry.map_err(at("read", paths::CONTAINERS))?;
            let id = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse::<ContainerId>().ok());
            // A container that is being made or removed has no record.
            if let Some(Ok(record)) = id.map(|id| Record::load(&id)) {
                records.push(record);
            }
        }
        records.sort_by(|a, b| (a.created, &a.id).cmp(&(b.created, &b.id)));
        Ok(records)
    }
}

/// Now, in seconds since 1970.
pub(crate) fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |time| time.as_secs())
}

/// A directory made exclusively, removed with all in it when this is dropped.
#[derive(Debug)]
pub(crate) struct Scratch {
    path: PathBuf,
    armed: bool,
}

impl Scratch {
    /// Makes `path`, mode 0700, which must not exist; parents are made too.
    pub(crate) fn make(path: PathBuf) -> io::Result<Self> {
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
    pub(crate) fn adopt(path: PathBuf) -> Self {
        Scratch { path, armed: true }
    }

    /// Where it is.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes it now, and says what went wrong.
    pub(crate) fn remove(mut self) -> Result<()> {
        self.armed = false;
        match fs::remove_dir_all(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(at("remove", &self.path)(error))
            }
            _ => Ok(()),
        }
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if self.armed {
            let _ = fs::remove_dir_all(&self.path);
        }
    }
}

/// The directory of a container.
#[derive(Debug)]
pub(crate) struct Container {
    scratch: Scratch,
}

impl Container {
    /// Takes the id.
    pub(crate) fn make(id: &ContainerId) -> Result<Self> {
        let path = paths::container(id);
        match Scratch::make(path.clone()) {
            Ok(scratch) => Ok(Container { scratch }),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                Err(Error::Exists(id.to_string()))
            }
            Err(error) => Err(at("make", path)(error)),
        }
    }

    /// Makes a directory in it.
    pub(crate) fn dir(&self, name: &str) -> Result<PathBuf> {
        let path = self.scratch.path().join(name);
        // The upper directory's mode is that of the container's root.
        DirBuilder::new()
            .mode(0o755)
            .create(&path)
            .map_err(at("make", &path))?;
        Ok(path)
    }

    /// Writes the record, whole or not at all.
    pub(crate) fn save(&self, record: &Record) -> Result<()> {
        let path = self.scratch.path().join(FILE);
        let new = self.scratch.path().join("record.json.new");
        let write = || -> io::Result<()> {
            let mut file = fs::File::create(&new)?;
            file.write_all(&serde_json::to_vec(record)?)?;
            fs::rename(&new, &path)
        };
        write().map_err(at("write", &path))
    }

    /// Lets it stay after this run.
    pub(crate) fn keep(mut self) {
        self.scratch.armed = false;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
