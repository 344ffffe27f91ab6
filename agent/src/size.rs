//! The size of the machine: processors and memory that come and go while it runs.
//!
//! The host makes room first; here the kernel is told to use it. Owns what containers
//! may take of it together, too: a part is never theirs, however large the machine is.
//! Everything here may wait for the kernel.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    thread::sleep,
    time::{Duration, Instant},
};

use tokio::sync::Mutex as AsyncMutex;

use crate::{
    baseline::{self, Memory},
    device::Bound,
    error::{Doing, Error},
    network::Network,
};

/// Where the kernel lists processors.
const PROCESSORS: &str = "/sys/devices/system/cpu";

/// How long nothing may change while the kernel takes what memory there is, and while it
/// gives some up: what it could not give up it tries again after minutes only.
const COMES: Duration = Duration::from_secs(5);
const STAYS: Duration = Duration::from_millis(500);
/// The longest that is waited, whatever changes: the next who asks waits too.
const LONGEST: Duration = Duration::from_secs(8);
/// How often that is looked at: nothing tells of it.
const LOOK: Duration = Duration::from_millis(5);

/// How large the machine is to be, or is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Processors that are online.
    pub(crate) processors: u32,
    /// Bytes of memory beyond what it began with.
    pub(crate) more_memory: u64,
}

/// The machine that this agent is the first process of.
#[derive(Debug)]
pub struct Machine {
    /// What it began with.
    first: Memory,
    /// The cgroup of all containers.
    containers: PathBuf,
    /// The device by which memory comes, once it is known.
    device: Mutex<Option<Bound>>,
    /// Its interfaces, as the host has them be.
    pub(crate) network: AsyncMutex<Network>,
}

impl Machine {
    /// That with this memory, whose containers are in this cgroup.
    pub(crate) fn new(first: Memory, containers: &Path) -> Self {
        Machine {
            first,
            containers: containers.to_owned(),
            device: Mutex::default(),
            network: AsyncMutex::default(),
        }
    }

    /// Makes it so large, as far as the kernel does; answers how large it is.
    pub(crate) fn resize(&self, to: Size, device: Option<u32>) -> Result<Size, Error> {
        let mut known = self.device.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(device) = device.filter(|_| known.is_none()) {
            *known = Some(Bound::take(device).doing("find the memory")?);
        }
        let processors = set_online(to.processors).doing("bring processors online")?;
        let size = Size {
            processors,
            more_memory: self.await_memory(to.more_memory),
        };
        let memory = self.first.and(size.more_memory);
        baseline::apply(memory)
            .map_err(|(_, error)| error)
            .doing("set what the kernel allows")?;
        self.limit_containers(memory)?;
        Ok(size)
    }

    /// Waits until there is so much memory beyond what it began with, or it is clear that
    /// there will not be; how much there is.
    fn await_memory(&self, wanted: u64) -> u64 {
        let mut now = self.more_memory();
        let limit = if wanted > now { COMES } else { STAYS };
        let begun = Instant::now();
        let mut changed = begun;
        while now != wanted && changed.elapsed() < limit && begun.elapsed() < LONGEST {
            sleep(LOOK);
            let before = std::mem::replace(&mut now, self.more_memory());
            if now != before {
                changed = Instant::now();
            }
        }
        now
    }

    /// Sets what all containers may use together.
    pub(crate) fn limit_containers(&self, memory: Memory) -> Result<(), Error> {
        let in_use = fs::read_to_string(self.containers.join("memory.current"));
        let in_use = in_use.ok().and_then(|text| text.trim_end().parse().ok());
        for (file, value) in [
            // Less than is in use would kill some of it.
            (
                "memory.max",
                memory.for_containers().max(in_use.unwrap_or(0)),
            ),
            ("pids.max", memory.threads_of_containers()),
        ] {
            let path = self.containers.join(file);
            // Absent without the controller.
            if path.exists() {
                fs::write(&path, value.to_string()).doing("limit all containers together")?;
            }
        }
        Ok(())
    }

    /// Memory beyond what it began with.
    fn more_memory(&self) -> u64 {
        let now = Memory::of_this_machine().total;
        now.saturating_sub(self.first.total)
    }
}

/// Brings the first `count` processors online and takes the others off; how many are.
fn set_online(count: u32) -> io::Result<u32> {
    // The first one always is.
    let mut online = 1;
    for number in 1.. {
        let path = Path::new(PROCESSORS).join(format!("cpu{number}/online"));
        let Ok(text) = fs::read_to_string(&path) else {
            break;
        };
        let (is, shall) = (text.trim_end() == "1", number < count);
        if is != shall {
            fs::write(&path, if shall { "1" } else { "0" })?;
        }
        online += u32::from(shall);
    }
    Ok(online)
}
