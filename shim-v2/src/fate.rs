//! What became of a container, as `delete` must tell it when there is no shim to ask.
//!
//! The shim keeps it in its state directory: the pid when there is one, the end before
//! anybody else learns of it. Pids of the host and a status that was told already:
//! nothing in it is trusted to find or kill a process.

use std::{collections::BTreeMap, fs, io, path::Path};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{names::ContainerId, process::Exit, statedir::replace};

/// Name of the file in the state directory.
pub(crate) const FILE: &str = "tasks.json";

/// What is known of a container.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fate {
    /// The pid of its first process.
    pub pid: u32,
    /// How that ended; `None` if it is not known to have ended.
    pub end: Option<Ending>,
}

/// An end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ending {
    /// The exit status.
    pub status: u8,
    /// Seconds since 1970.
    pub seconds: i64,
    /// And nanoseconds.
    pub nanos: i32,
}

impl From<&Exit> for Ending {
    fn from(exit: &Exit) -> Self {
        Ending {
            status: exit.status,
            seconds: exit.at.seconds,
            nanos: exit.at.nanos,
        }
    }
}

impl Ending {
    /// When it was.
    #[must_use]
    pub fn at(&self) -> Timestamp {
        Timestamp {
            seconds: self.seconds,
            nanos: self.nanos,
            ..Timestamp::default()
        }
    }
}

/// All that is recorded in a state directory.
fn all(dir: &Path) -> BTreeMap<String, Fate> {
    let text = fs::read(dir.join(FILE)).unwrap_or_default();
    serde_json::from_slice(&text).unwrap_or_default()
}

/// What is recorded of a container.
#[must_use]
pub fn of(dir: &Path, id: &ContainerId) -> Option<Fate> {
    all(dir).get(id.as_str()).copied()
}

/// Records what became of a container; `None` if it was deleted. For the holder of the
/// directory's lock.
pub(crate) fn record(dir: &Path, id: &ContainerId, fate: Option<Fate>) -> io::Result<()> {
    let mut all = all(dir);
    match fate {
        Some(fate) => all.insert(id.to_string(), fate),
        None => all.remove(id.as_str()),
    };
    replace(&dir.join(FILE), &serde_json::to_vec(&all)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_container_has_its_own_fate_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let id = |text: &str| ContainerId::new(text).unwrap();
        let fate = |pid, end: Option<&Exit>| Fate {
            pid,
            end: end.map(Ending::from),
        };
        let exit = Exit::now(7);
        for (name, fate) in [
            ("a", fate(1, None)),
            ("b", fate(2, None)),
            ("a", fate(1, Some(&exit))),
        ] {
            record(dir.path(), &id(name), Some(fate)).unwrap();
        }
        let found = of(dir.path(), &id("a")).unwrap();
        assert_eq!(found, fate(1, Some(&exit)));
        assert_eq!(found.end.unwrap().at(), exit.at);
        assert_eq!(of(dir.path(), &id("b")), Some(fate(2, None)));
        record(dir.path(), &id("a"), None).unwrap();
        assert_eq!(of(dir.path(), &id("a")), None);
        fs::write(dir.path().join(FILE), "hal").unwrap();
        assert_eq!(of(dir.path(), &id("b")), None);
    }
}
