//! What a container may use and has used, and its standing still.
//!
//! A call of the kernel that may take its time, as one that has to make room or to
//! write files back, gets a thread of its own: whoever kills must not wait for it.

use std::{fs::File, io, path::PathBuf, sync::atomic::Ordering, time::Duration};

use bulkhead_agent_api::agent::{NetworkRequest, StatsResponse};
use tokio::time::timeout;

use super::{Containers, lock, state::Op};
use crate::{
    baseline::Memory,
    error::{Doing, Error},
    reaper::ended,
    size::Size,
    spec::{self, capacity::Capacity},
};

/// How long it may take until the host has what a container wrote.
const SYNC_MAX: Duration = Duration::from_secs(15);

impl Containers {
    /// What a container has used.
    pub fn stats(&self, id: &str) -> Result<StatsResponse, Error> {
        Ok(self.container(id)?.cgroup()?.stats())
    }

    /// Waits until the OOM killer has struck in a container more often than `seen`
    /// times; an error if its first process ends before.
    pub async fn wait_oom(&self, id: &str, seen: u64) -> Result<u64, Error> {
        let container = self.container(id)?;
        // Deleting the container must not wait for who waits here.
        let watch = container.cgroup()?.watch_oom();
        let watch = watch.doing("watch the OOM killer")?;
        let init = &container.init;
        tokio::select! {
            kills = watch.beyond(seen) => kills.doing("watch the OOM killer"),
            _ = ended(init.exit.clone()) => Err(Error::Ended { pid: init.pid }),
        }
    }

    /// Changes limits of a container; `resources` is the OCI object. Answers what was
    /// left out.
    pub async fn update(&self, id: &str, resources: &[u8]) -> Result<Vec<String>, Error> {
        let container = self.container(id)?;
        container.check(Op::Update)?;
        let cgroup = container.cgroup()?;
        let resources = spec::json::from_slice("linux.resources", resources)?;
        let checked = spec::update(resources, cgroup.in_force())?;
        let plan = checked.plan;
        capacity()
            .can_give(plan.more_memory, plan.more_processors)
            .map_err(Error::Beyond)?;
        if let Some(limit) = plan.not_in_use {
            let used = cgroup.memory_in_use();
            if used > limit {
                return Err(Error::InUse { limit, used });
            }
        }
        blocking(move || cgroup.change(&plan.settings)).await??;
        let remarks = checked.notes.iter().filter(|note| note.is_remark());
        Ok(remarks.map(ToString::to_string).collect())
    }

    /// Makes the machine so large, as far as its kernel does; answers how large it is.
    pub(crate) async fn resize_machine(
        &self,
        to: Size,
        device: Option<u32>,
    ) -> Result<Size, Error> {
        let machine = self.config.machine.clone().ok_or(Error::NotTheMachine)?;
        blocking(move || machine.resize(to, device)).await?
    }

    /// Has the guest's network be this.
    pub(crate) async fn set_up_network(&self, wanted: &NetworkRequest) -> Result<(), Error> {
        let machine = self.config.machine.as_ref().ok_or(Error::NotTheMachine)?;
        machine.network.lock().await.become_this(wanted).await
    }

    /// Stops every process of a container where it is, and has the host get what they
    /// wrote.
    pub async fn freeze(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let _one_at_a_time = container.freezer.lock().await;
        container.check(Op::Freeze)?;
        let cgroup = container.cgroup()?;
        let frozen = cgroup.freeze().await?;
        let mut places = self.config.shares.clone();
        places.extend(lock(&container.disks).places());
        match timeout(SYNC_MAX, blocking(move || sync(&places))).await {
            Ok(synced) => synced?.doing("write the container's files back")?,
            Err(_) => return Err(Error::Unwritten(SYNC_MAX)),
        }
        container.paused.store(true, Ordering::SeqCst);
        frozen.keep();
        Ok(())
    }

    /// Lets the processes of a container go on.
    pub async fn thaw(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let _one_at_a_time = container.freezer.lock().await;
        container.check(Op::Thaw)?;
        container.cgroup()?.thaw().doing("thaw the container")?;
        container.paused.store(false, Ordering::SeqCst);
        Ok(())
    }
}

/// Runs what may block on a thread for such work.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let worked = tokio::task::spawn_blocking(work).await;
    worked.map_err(io::Error::other).doing("use a thread")
}

/// Has the host get what was written into these file systems, also through memory, and to
/// these disks.
fn sync(places: &[PathBuf]) -> io::Result<()> {
    for place in places {
        let place = File::open(place)?;
        match place.metadata()?.is_dir() {
            true => rustix::fs::syncfs(place)?,
            false => place.sync_all()?,
        }
    }
    Ok(())
}

/// What all containers share.
fn capacity() -> Capacity {
    let processors = std::thread::available_parallelism();
    Capacity {
        memory: Memory::of_this_machine().total,
        processors: processors.map_or(1, |count| u64::try_from(count.get()).unwrap_or(1)),
    }
}
