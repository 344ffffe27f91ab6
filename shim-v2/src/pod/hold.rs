//! The pids of a pod: processes of the host that stand for those of the guest.
//!
//! Each process that exists in the guest has a holder of its own, from before it is
//! made until its end was told, or the virtual machine has ended. Whoever kills a holder
//! means the process.

use std::{
    fs::File,
    os::fd::{AsFd, AsRawFd, OwnedFd},
    path::Path,
    sync::Arc,
};

use rustix::fs::{Mode, OFlags, fstatfs, open};
use tokio::time::timeout;
use tracing::{info, warn};

use super::{ENDING, Pod, SIGKILL};
use crate::{
    agent::ProcessName,
    error::{Error, Result},
    fate::Fate,
    guest::Guest,
    lock::lock,
    names::{ContainerId, ExecId},
    network::is_the_hosts,
    process::Process,
    state::State,
    vm::holder::Holder,
};

/// A pid of a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostPid {
    /// The number.
    pub pid: u32,
    /// The exec that it stands for; `None` for the first process.
    pub exec: Option<ExecId>,
}

impl Pod {
    /// The pids of a container. That of its first process is among them until it is
    /// deleted; those of execs while they run.
    pub fn pids(&self, id: &ContainerId) -> Result<Vec<HostPid>> {
        let first = ProcessName {
            container: id.clone(),
            exec: None,
        };
        let (container, init) = self.find(&first)?;
        let mut pids = vec![HostPid {
            pid: init.pid(),
            exec: None,
        }];
        for (exec, process) in &lock(&container.execs).all {
            let lives = !matches!(process.state(), State::Registered | State::Ended);
            if lives && process.pid() != 0 {
                pids.push(HostPid {
                    pid: process.pid(),
                    exec: Some(exec.clone()),
                });
            }
        }
        Ok(pids)
    }

    /// Makes a holder for a process that is about to be made.
    pub(super) fn hold(
        &self,
        guest: &Arc<dyn Guest>,
        name: &ProcessName,
        network: Option<&OwnedFd>,
    ) -> Result<Holder> {
        let exec = name.exec.iter().map(|exec| format!("/{exec}"));
        let exec: String = exec.collect();
        let label = format!("{}/{}{exec}", self.namespace, name.container);
        let held = guest.hold(&label, network.map(AsFd::as_fd));
        // The cgroup goes with the VMM.
        held.map_err(|error| match guest.has_ended() {
            Some(end) => Error::VmGone(self.verdict(end).reason),
            None => error,
        })
    }

    /// Lets a holder stand for a process as long as that lives.
    pub(super) fn keep(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        process: &Arc<Process>,
        holder: Holder,
    ) {
        process.stands(holder.pid());
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        let process = Arc::clone(process);
        tokio::spawn(async move {
            tokio::select! {
                biased;
                _ = process.exit() => return,
                _ = guest.ended() => return,
                () = holder.ended() => drop(holder),
            }
            info!(process = %process.name, "its process on the host was killed: it is, too");
            if let Err(error) = pod.kill(&process.name, SIGKILL, false).await {
                warn!(process = %process.name, error = error.text(), "cannot kill it");
            }
        });
    }
}

impl Pod {
    /// Keeps what became of a container for a `delete` that finds no shim; `None` once
    /// it was deleted. That it cannot be kept is no reason to hold anything up.
    pub(super) async fn keep_fate(&self, id: &ContainerId, fate: Option<Fate>) {
        let (dir, name) = (Arc::clone(&self.dir), id.clone());
        // In a task of its own: without a thread to be had this panics.
        let keep =
            async move { tokio::task::spawn_blocking(move || dir.record_fate(&name, fate)).await };
        match timeout(ENDING, tokio::spawn(keep)).await {
            Ok(Ok(Ok(Ok(())))) => {}
            Ok(Ok(Ok(Err(error)))) => warn!(container = %id, %error, "cannot record its state"),
            Ok(Ok(Err(error)) | Err(error)) => {
                warn!(container = %id, %error, "cannot record its state");
            }
            Err(_) => warn!(container = %id, "its state is not recorded yet"),
        }
    }
}

/// The network namespace that a specification names.
pub(super) fn network(path: &Path) -> Result<OwnedFd> {
    /// Magic number of the file system of namespaces.
    const NSFS: i64 = 0x6e73_6673;
    let failed = |source| Error::Path {
        action: "open the network namespace of the container",
        path: path.to_owned(),
        source,
    };
    // Looked at before it is opened: to open a FIFO would wait.
    let place = open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())
        .map_err(|error| failed(error.into()))?;
    let refused = |reason: &str| Error::Argument {
        what: "linux.namespaces: network path",
        value: path.display().to_string(),
        reason: reason.to_owned(),
    };
    if fstatfs(&place)
        .map_err(|error| failed(error.into()))?
        .f_type
        != NSFS
    {
        return Err(refused("it is not a namespace"));
    }
    let file = File::open(format!("/proc/self/fd/{}", place.as_raw_fd())).map_err(failed)?;
    if is_the_hosts(&file).map_err(failed)? {
        return Err(refused(
            "it is the host's own, which a virtual machine cannot be in: choose another \
             network than that of the host, or none",
        ));
    }
    Ok(file.into())
}
