//! A pod on its way from one program to the next.
//!
//! Nothing of it is at work while it is packed, which takes no time in which anything
//! else could run: [`Pod::busy`] says why it cannot be done just now. What waited for the
//! guest waits again on the other side; the guest and its agent notice nothing.

use std::{
    collections::BTreeMap,
    io,
    os::fd::AsFd,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use bulkhead_agent_api::spec::plan;
use containerd_shim_protos::{cgroups_v2::metrics::Metrics, protobuf::Message};
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex as AsyncMutex;
use tracing::warn;

use super::{
    COPIES, Container, Execs, Parts, Pod, Slot, TURNS,
    network::{self, Connected},
};
use crate::{
    carry::{Bag, Bytes, CarriedFd},
    error::{Result, host},
    events,
    guest::{Attached, Guest},
    hooks::Hooks,
    lock::lock,
    names::ExecId,
    process::{self, Process},
    share::{self, ContainerShare},
    sockets::{self, Service},
    spec::Limits,
    state::State,
    statedir::kept::Kept,
    vm::{self, holder::Holder},
};

/// What goes along of a pod.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    pub(crate) events: Vec<events::Carried>,
    guest: Option<vm::Carried>,
    network: Option<network::Carried>,
    containers: Vec<CarriedContainer>,
}

#[derive(Debug, Serialize, Deserialize)]
struct CarriedContainer {
    bundle: PathBuf,
    init: process::Carried,
    network: Option<CarriedFd>,
    #[serde(default)]
    sends_as_others: bool,
    execs: Vec<process::Carried>,
    closed: bool,
    sockets: sockets::Carried,
    files: Option<share::Carried>,
    told: Option<PathBuf>,
    annotations: BTreeMap<String, String>,
    hooks: plan::Hooks,
    disks: Vec<u8>,
    ooms: u64,
    used: Option<Bytes>,
    limits: Limits,
}

impl Pod {
    /// To be held by a task that must not be cut short.
    pub(crate) fn work(&self) -> Work {
        self.work.clone()
    }

    /// Why it cannot be packed just now.
    pub(crate) fn busy(&self) -> Option<String> {
        let ended = || {
            self.guest
                .get()
                .is_some_and(|guest| guest.has_ended().is_some())
        };
        if self.stopping.load(Ordering::SeqCst) || ended() {
            return Some("the pod ends".to_owned());
        }
        if let Some(busy) = lock(&self.slots).values().find_map(Slot::busy) {
            return Some(busy);
        }
        if self.copies.available_permits() < COPIES {
            return Some("files are being copied".to_owned());
        }
        if self.events.is_busy() {
            return Some("containerd is being told of an event".to_owned());
        }
        if self.work.is_under_way() || self.turns.available_permits() < TURNS {
            return Some("a request is under way whose caller has gone".to_owned());
        }
        None
    }

    /// How often the guest has said something.
    pub(crate) fn heard(&self) -> u64 {
        self.guest.get().map_or(0, |guest| guest.agent().heard())
    }

    /// What goes along; `None` while the guest is asked something.
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>> {
        let guest = match self.guest.get() {
            None => None,
            Some(guest) => match guest.carry(bag)? {
                None => return Ok(None),
                carried => carried,
            },
        };
        let containers = self.containers();
        let containers = containers.iter().map(|container| container.carry(bag));
        let containers: io::Result<_> = containers.collect();
        let Ok(network) = self.network.try_lock() else {
            return Ok(None);
        };
        let network = network.as_ref().map(|network| network.carry(bag));
        Ok(Some(Carried {
            events: self.events.carry(),
            guest,
            network: network.transpose()?,
            containers: containers?,
        }))
    }

    /// Goes on with the pod of the program before this one.
    pub(crate) fn unpack(parts: Parts, carried: Carried) -> Result<Arc<Self>> {
        let pod = Pod::new(parts);
        let Some(guest) = carried.guest else {
            return Ok(pod);
        };
        let guest = pod.hypervisor.unpack(guest)?;
        // Nobody else was here before.
        let _ = pod.guest.set(Arc::clone(&guest));
        // Nobody else was here before.
        if let (Some(carried), Ok(mut network)) = (carried.network, pod.network.try_lock()) {
            *network = Some(Connected::unpack(carried, &guest)?);
        }
        for carried in carried.containers {
            let container = pod.unpack_container(&guest, carried)?;
            let slot = Slot::Ready(Arc::clone(&container));
            lock(&pod.slots).insert(container.id.clone(), slot);
        }
        pod.watch_all(&guest);
        pod.follow_again(&guest);
        for container in pod.containers() {
            let execs: Vec<_> = lock(&container.execs).all.values().cloned().collect();
            for exec in execs {
                if matches!(exec.state(), State::Live | State::Paused) {
                    pod.watch_again(&guest, &container, &exec);
                }
            }
            if container.init.state() != State::Ended {
                pod.watch_again(&guest, &container, &container.init);
                pod.watch_oom(&guest, &container);
            }
        }
        Ok(pod)
    }

    fn unpack_container(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        carried: CarriedContainer,
    ) -> Result<Arc<Container>> {
        let init = Process::unpack(carried.init, self.herald())?;
        let id = init.name.container.clone();
        let mut execs = Execs {
            closed: carried.closed,
            ..Execs::default()
        };
        for exec in carried.execs {
            let exec = Process::unpack(exec, self.herald())?;
            let name = exec.name.exec_id();
            execs.all.insert(ExecId::new(&name)?, Arc::new(exec));
        }
        let sockets = Service::unpack(guest, &id, carried.sockets, &self.places)
            .map_err(host("take over connections to sockets"))?;
        let network = carried.network.map(CarriedFd::take).transpose();
        let used = carried.used.as_deref().map(Metrics::parse_from_bytes);
        let disks = carried.disks.into_iter();
        let disks = disks.map(|device| Attached::new(device, guest));
        Ok(Arc::new(Container {
            hooks: Hooks {
                host: Arc::clone(&self.host),
                id: id.clone(),
                bundle: carried.bundle.clone(),
                annotations: carried.annotations,
                lists: carried.hooks,
            },
            id,
            bundle: carried.bundle,
            init: Arc::new(init),
            network: network.map_err(host("take over a network namespace"))?,
            sends_as_others: carried.sends_as_others,
            execs: Mutex::new(execs),
            files: Mutex::new(carried.files.map(ContainerShare::unpack)),
            sockets,
            told: Mutex::new(carried.told.map(Kept::unpack)),
            disks: Mutex::new(disks.collect()),
            deleting: AsyncMutex::new(()),
            kill_unanswered: AtomicBool::new(false),
            ooms: AtomicU64::new(carried.ooms),
            used: Mutex::new(used.and_then(|used| used.ok())),
            limits: Mutex::new(carried.limits),
        }))
    }

    /// Waits for the end of a process, and of the one that stands for it.
    fn watch_again(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) {
        match Holder::unpack(process.pid()) {
            Ok(holder) => self.keep(guest, process, holder),
            // Whoever ended it meant the process, which is being killed.
            Err(error) => warn!(process = %process.name, %error, "nothing stands for it"),
        }
        self.watch(guest, container, process);
    }
}

/// Held by a task that must not be cut short by a change of the program.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work(Arc<()>);

impl Work {
    fn is_under_way(&self) -> bool {
        Arc::strong_count(&self.0) > 1
    }
}

impl Slot {
    fn busy(&self) -> Option<String> {
        let container = match self {
            Slot::Creating(_) => return Some("a container is being created".to_owned()),
            Slot::Ready(container) => container,
        };
        if container.deleting.try_lock().is_err() {
            return Some(format!("{} is being deleted", container.id));
        }
        if container.sockets.is_busy() {
            return Some(format!("{} connects to a socket of the host", container.id));
        }
        let execs = lock(&container.execs);
        let mut processes = [&container.init].into_iter().chain(execs.all.values());
        processes.find_map(|process| process.busy())
    }
}

impl Container {
    fn carry(&self, bag: &mut Bag) -> io::Result<CarriedContainer> {
        let execs = lock(&self.execs);
        let carried: io::Result<_> = execs.all.values().map(|exec| exec.carry(bag)).collect();
        let network = self
            .network
            .as_ref()
            .map(|network| bag.put(network.as_fd()));
        let used = lock(&self.used);
        let used = used.as_ref().map(Message::write_to_bytes).transpose();
        Ok(CarriedContainer {
            bundle: self.bundle.clone(),
            init: self.init.carry(bag)?,
            network: network.transpose()?,
            sends_as_others: self.sends_as_others,
            execs: carried?,
            closed: execs.closed,
            sockets: self.sockets.carry(bag)?,
            files: lock(&self.files).as_ref().map(ContainerShare::carry),
            told: lock(&self.told).as_ref().map(|told| told.path().to_owned()),
            annotations: self.hooks.annotations.clone(),
            hooks: self.hooks.lists.clone(),
            disks: lock(&self.disks).iter().map(Attached::device).collect(),
            ooms: self.ooms.load(Ordering::SeqCst),
            used: used?,
            limits: *lock(&self.limits),
        })
    }
}
