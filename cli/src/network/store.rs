//! What is remembered of the network: one file in a directory of the state directory, which
//! is locked by whoever changes anything of the network.
//!
//! It lies where a reboot clears it, as it does the bridge. A lease belongs to a container:
//! it holds while the process lives that made it, or its interface is on the bridge. That
//! one goes with the network namespace of the container, so with its shim; nothing has to
//! be asked that may not answer.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bulkhead_client::{ContainerId, record};
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::{addresses::Subnets, forwarding::Switched};
use crate::{
    args::network::{AddHost, Publish},
    error::{Error, Result, at, refused},
};

const FILE: &str = "state.json";

/// How long others may take with what they change.
const PATIENCE: Duration = Duration::from_secs(60);

/// How often the lock is tried meanwhile.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// The network, and who is in it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct State {
    /// Its addresses.
    pub(super) subnets: Subnets,
    /// What the kernel was told for it.
    pub(super) switched: Vec<Switched>,
    /// Who is in it.
    pub(super) leases: Vec<Lease>,
}

/// The part of a container in the network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Lease {
    /// The container.
    pub(super) id: String,
    /// Its number.
    pub(super) number: u8,
    /// What it calls itself.
    pub(super) hostname: String,
    /// Names that its caller gave.
    pub(super) hosts: Vec<AddHost>,
    /// Ports of the host that it has.
    pub(super) ports: Vec<Publish>,
}

impl Lease {
    /// The interface of the host that leads to it.
    pub(super) fn interface(&self) -> String {
        format!("{}-{}", super::BRIDGE, self.number)
    }

    /// Whether somebody still needs it.
    fn holds(&self, containers: &Path, interfaces: &[String]) -> bool {
        interfaces.contains(&self.interface())
            || self
                .id
                .parse::<ContainerId>()
                .is_ok_and(|id| record::find(containers, &id).is_some_and(|found| found.alive))
    }
}

impl State {
    /// Nobody's yet.
    pub(super) fn new(subnets: Subnets) -> State {
        State {
            subnets,
            switched: Vec::new(),
            leases: Vec::new(),
        }
    }

    /// Forgets the leases that nobody needs; whether there were any.
    pub(super) fn forget_dead(&mut self, containers: &Path, interfaces: &[String]) -> bool {
        let before = self.leases.len();
        self.leases
            .retain(|lease| lease.holds(containers, interfaces));
        self.leases.len() != before
    }

    /// Gives a container its part, if nobody has what it wants.
    pub(super) fn lease(
        &mut self,
        id: &ContainerId,
        hostname: &str,
        wanted: &crate::args::network::Options,
    ) -> Result<Lease> {
        let owner = |number| self.leases.iter().find(|lease| lease.number == number);
        let number = match wanted.ip {
            Some(ip) => {
                let refused = |reason: &str| refused("--ip", &ip.to_string(), reason);
                let number = self.subnets.number(ip).map_err(|reason| refused(&reason))?;
                if let Some(owner) = owner(number) {
                    return Err(refused(&format!("container {:?} has it", owner.id)));
                }
                number
            }
            None => {
                let number = self.subnets.free(|number| owner(number).is_some());
                number.map_err(|reason| refused("--network", "bridge", &reason))?
            }
        };
        for port in &wanted.publish {
            let meets = |lease: &&Lease| lease.ports.iter().any(|other| other.meets(port));
            if let Some(owner) = self.leases.iter().find(meets) {
                let reason = format!(
                    "container {:?} has this port of the host; give another one",
                    owner.id
                );
                return Err(refused("--publish", &port.to_string(), &reason));
            }
        }
        let lease = Lease {
            id: id.to_string(),
            number,
            hostname: hostname.to_owned(),
            hosts: wanted.add_host.clone(),
            ports: wanted.publish.clone(),
        };
        self.leases.push(lease.clone());
        Ok(lease)
    }
}

/// The directory, locked.
#[derive(Debug)]
pub(super) struct Store {
    dir: PathBuf,
    _lock: File,
}

impl Store {
    /// Waits until nobody else changes anything; makes the directory.
    pub(super) fn lock(dir: &Path) -> Result<Store> {
        let end = Instant::now() + PATIENCE;
        loop {
            fs::create_dir_all(dir).map_err(at("make", dir))?;
            let lock = match File::open(dir) {
                // Its last user took it away just now.
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                opened => opened.map_err(at("open", dir))?,
            };
            while let Err(error) = flock(&lock, FlockOperation::NonBlockingLockExclusive) {
                if error != rustix::io::Errno::WOULDBLOCK || Instant::now() > end {
                    let reason = io::Error::other(format!("{error}; another bulkhead holds it"));
                    return Err(at("lock", dir)(reason).into());
                }
                thread::sleep(LOOK_AGAIN);
            }
            let inode = |meta: fs::Metadata| (meta.dev(), meta.ino());
            let locked = lock.metadata().map_err(at("look at", dir))?;
            if fs::metadata(dir).is_ok_and(|there| inode(there) == inode(locked)) {
                return Ok(Store {
                    dir: dir.to_owned(),
                    _lock: lock,
                });
            }
        }
    }

    /// The same, if there is anything.
    pub(super) fn lock_if_there(dir: &Path) -> Result<Option<Store>> {
        if dir.is_dir() {
            Store::lock(dir).map(Some)
        } else {
            Ok(None)
        }
    }

    /// What is remembered.
    pub(super) fn load(&self) -> Result<Option<State>> {
        let path = self.dir.join(FILE);
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(at("read", path)(error).into()),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| {
            let next = "`bulkhead network prune` makes a new one once no container runs";
            let reason = io::Error::other(format!("{error}; {next}"));
            Error::from(at("understand", path)(reason))
        })
    }

    /// Remembers it, whole or not at all.
    pub(super) fn save(&self, state: &State) -> Result<()> {
        let (path, new) = (self.dir.join(FILE), self.dir.join("state.json.new"));
        let write = || -> io::Result<()> {
            let mut file = File::create(&new)?;
            file.write_all(&serde_json::to_vec(state)?)?;
            fs::rename(&new, &path)
        };
        Ok(write().map_err(at("write", &path))?)
    }

    /// Forgets all.
    pub(super) fn remove(self) -> Result<()> {
        Ok(bulkhead_image::remove_tree(&self.dir).map_err(at("remove", &self.dir))?)
    }
}
