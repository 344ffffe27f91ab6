//! One pod: its VM, its containers, and the order in which they come and go.
//!
//! All changes go through [`Pod`]; nothing else in the shim holds a container.
//! What is legal when is in `state.rs`, how a process moves in `process.rs`, how it
//! ends in `pod/watch.rs`. Locks guard maps for the length of a look-up and are never
//! held across an await, but for `Container::deleting`. Kill of a first process
//! waits for nobody; Kill of an exec, and Delete, wait for a start that is under way,
//! which has limits of its own.
//!
//! The first Create boots the VM, which then lives until [`Pod::stop`]. If the VM
//! ends by itself, every process of the pod ends with it.

mod carry;
mod copy;
mod create;
mod exec;
mod hold;
mod last;
mod making;
mod network;
mod resources;
mod size;
mod watch;

use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    cgroups_v2::metrics::Metrics, events::task::TaskDelete, protobuf::MessageField,
};
use futures::future::join_all;
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, OnceCell, Semaphore},
    time::timeout,
};
use tracing::{info, warn};
use ttrpc::Code;

pub use self::{carry::Carried, create::Create, hold::HostPid};
use self::{carry::Work, create::Creation, network::Connected};
use crate::{
    agent::ProcessName,
    cgroup::Place,
    error::{Error, Result},
    events::{Event, Publisher},
    guest::{Attached, Boots, Guest},
    hooks::{Hooks, Host, Moment},
    io::{Patience, StreamHost, streaming::Hub},
    lock::lock,
    names::{ContainerId, ExecId, Namespace},
    process::{Exit, Process},
    settings::Settings,
    share::{ContainerShare, Share},
    sockets::{Places, Service},
    spec::Limits,
    state::{self, Op, Refusal, State},
    statedir::{Held, kept::Kept},
    vm::{Shape, vmm::End},
};

/// Time that output gets to be delivered after its process ended.
const DRAIN: Duration = Duration::from_secs(2);
/// The same for the output of a first process when its container is deleted: who is
/// slow to read gets the rest.
const LAST_DRAIN: Duration = Duration::from_secs(10);
/// Time for a killed process to end.
const DIE: Duration = Duration::from_secs(3);
/// Time in which a VM that is ending is seen to have ended.
const ENDING: Duration = Duration::from_millis(500);
/// Time for containerd to take the last events.
const FLUSH: Duration = Duration::from_secs(2);

/// Execs that the guest makes at once: of a hundred that come together each has its
/// limit for itself.
const TURNS: usize = 8;
/// Copies of files under way at once: one that nobody reads must not cost more than its
/// part.
const COPIES: usize = 64;

/// SIGKILL as the protocols number it.
const SIGKILL: u32 = libc::SIGKILL.unsigned_abs();
/// Exit status of what SIGKILL ended.
const KILLED: u8 = 137;

/// What a pod is made with.
#[derive(Debug)]
pub struct Parts {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The pod's settings.
    pub settings: Arc<Settings>,
    /// The pod's state directory.
    pub dir: Arc<Held>,
    /// The pod's share.
    pub share: Share,
    /// Takes events.
    pub events: Publisher,
    /// Boots the guest.
    pub hypervisor: Arc<dyn Boots>,
    /// What hooks see.
    pub host: Arc<Host>,
    /// Where streams lead to.
    pub streams: StreamHost,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    namespace: Namespace,
    host: Arc<Host>,
    settings: Arc<Settings>,
    dir: Arc<Held>,
    share: Arc<Share>,
    events: Arc<Publisher>,
    hypervisor: Arc<dyn Boots>,
    streams: StreamHost,
    guest: OnceCell<Arc<dyn Guest>>,
    /// Why the shim itself ended the guest, if it had to.
    failure: OnceLock<End>,
    /// The agent has let somebody wait in vain: look at once whether it lives.
    doubt: Notify,
    /// Of execs that are being made in the guest.
    turns: Semaphore,
    /// Of connections to sockets of the host.
    places: Places,
    /// Of copies of files.
    copies: Semaphore,
    /// One for each task that is at work beside the requests.
    work: Work,
    slots: Mutex<BTreeMap<ContainerId, Slot>>,
    /// What the guest is joined with.
    network: AsyncMutex<Option<Connected>>,
    /// Held while the machine gets another size.
    sizing: AsyncMutex<()>,
    stopping: AtomicBool,
    stopped: OnceCell<()>,
}

/// A place in the table of containers.
#[derive(Debug)]
enum Slot {
    Creating(Arc<Creation>),
    Ready(Arc<Container>),
}

/// A container.
#[derive(Debug)]
struct Container {
    id: ContainerId,
    bundle: PathBuf,
    init: Arc<Process>,
    /// The network namespace that its specification names.
    network: Option<OwnedFd>,
    /// It may change who it is there.
    sends_as_others: bool,
    execs: Mutex<Execs>,
    files: Mutex<Option<ContainerShare>>,
    sockets: Service,
    /// What is told of its specification.
    told: Mutex<Option<Kept>>,
    hooks: Hooks,
    /// Its root file system, if that is a disk, and block devices of the host.
    disks: Mutex<Vec<Attached>>,
    /// Held while it is deleted.
    deleting: AsyncMutex<()>,
    /// A SIGKILL was not answered; the next one ends the VM.
    kill_unanswered: AtomicBool,
    /// How often the OOM killer struck, as far as containerd was told.
    ooms: AtomicU64,
    /// What it has used, as far as the guest has told.
    used: Mutex<Option<Metrics>>,
    /// Those that decide how large the machine must be.
    limits: Mutex<Limits>,
}

/// The further processes of a container.
#[derive(Debug, Default)]
struct Execs {
    all: BTreeMap<ExecId, Arc<Process>>,
    /// The first process has ended: no further one may start.
    closed: bool,
}

/// What State answers.
#[derive(Clone, Debug)]
pub struct Description {
    /// The bundle of the container.
    pub bundle: PathBuf,
    /// The process.
    pub process: Arc<Process>,
    /// The state of the container's first process.
    pub container: State,
}

impl Pod {
    /// A pod without a VM.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        info!(namespace = %parts.namespace, "pod");
        Arc::new(Pod {
            namespace: parts.namespace,
            host: parts.host,
            settings: parts.settings,
            dir: parts.dir,
            share: Arc::new(parts.share),
            events: Arc::new(parts.events),
            hypervisor: parts.hypervisor,
            streams: parts.streams,
            guest: OnceCell::new(),
            failure: OnceLock::new(),
            doubt: Notify::new(),
            turns: Semaphore::new(TURNS),
            places: Places::default(),
            copies: Semaphore::new(COPIES),
            work: Work::default(),
            slots: Mutex::default(),
            network: AsyncMutex::default(),
            sizing: AsyncMutex::default(),
            stopping: AtomicBool::new(false),
            stopped: OnceCell::new(),
        })
    }

    /// Lets the first process of a container run, or starts an exec. Answers the
    /// pid.
    pub async fn start(self: &Arc<Self>, name: &ProcessName) -> Result<u32> {
        let (container, process) = self.find(name)?;
        let started = match name.exec {
            Some(_) => self.start_exec(&container, &process).await.map(drop),
            None => self.start_init(&container).await,
        };
        match started {
            Ok(()) => Ok(process.pid()),
            Err(error) => Err(self.explained(error).await),
        }
    }

    /// That a connection broke says little: how the VM ended says why.
    async fn explained(&self, error: Error) -> Error {
        match (error, self.guest.get()) {
            (Error::VmGone(_), Some(guest)) => Error::VmGone(self.lost(&**guest).await.reason),
            // Or the guest is well and takes no more of them.
            (error @ Error::Stream(_), Some(guest)) => match timeout(ENDING, guest.ended()).await {
                Ok(end) => Error::VmGone(self.verdict(end).reason),
                Err(_) => error,
            },
            (error, _) => error,
        }
    }

    async fn start_init(self: &Arc<Self>, container: &Container) -> Result<()> {
        let init = &container.init;
        let start = init
            .begin(|state| state::init(state, Op::Start))
            .map_err(|refusal| refused(init, Op::Start, refusal))?;
        let guest = self.living()?;
        let run = async {
            self.connect(guest, container).await?;
            let before = container.hooks.limit_in_guest();
            guest.agent().start(&container.id, before).await?;
            container.hooks.run(Moment::Poststart, init.pid()).await
        };
        if let Err(error) = run.await {
            if matches!(error, Error::Deadline { .. }) {
                self.doubt.notify_one();
            }
            if matches!(error, Error::Deadline { .. } | Error::Hook { .. }) {
                // It runs, or may come to run, and its caller was told otherwise.
                let (guest, name) = (Arc::clone(guest), init.name.clone());
                let work = self.work();
                tokio::spawn(async move {
                    let _ = guest.agent().kill(&name, SIGKILL, false).await;
                    drop(work);
                });
            }
            return Err(error);
        }
        // Only an exec can be given up meanwhile.
        let _ = start.confirm();
        Ok(())
    }

    /// Sends a signal to a process, or to all of the container.
    pub async fn kill(&self, name: &ProcessName, signal: u32, all: bool) -> Result<()> {
        let (container, process) = self.find(name)?;
        if signal > 64 {
            return Err(Error::Argument {
                what: "Signal",
                value: signal.to_string(),
                reason: "it must lie between 0 and 64".to_owned(),
            });
        }
        if name.exec.is_some() {
            process.settled().await;
        }
        check(&container, &process, Op::Kill)?;
        // Signal 0 only asks whether the process lives.
        if signal == 0 {
            return Ok(());
        }
        let finished = || Error::Finished(name.to_string());
        // With its VM every process is gone, though its end may not be recorded yet.
        let guest = self.living().map_err(|_| finished())?;
        match guest.agent().kill(name, signal, all).await {
            Err(Error::Agent {
                code: Code::NOT_FOUND,
                ..
            }) => Err(finished()),
            // Without its agent a VM is of no use.
            Err(Error::VmGone(_)) if signal == SIGKILL => {
                guest.kill();
                Ok(())
            }
            Err(Error::VmGone(_)) => {
                self.lost(&**guest).await;
                Err(finished())
            }
            Err(error @ Error::Deadline { .. }) => {
                self.doubt.notify_one();
                if signal != SIGKILL || name.exec.is_some() {
                    return Err(error);
                }
                // The guest cannot be asked. For the only container its VM is as
                // good; in a pod siblings would die, so only if asked again.
                let again = container.kill_unanswered.swap(true, Ordering::SeqCst);
                if self.is_alone(&container) || again {
                    warn!(container = %container.id, %error, "killing the VM instead");
                    guest.kill();
                    return Ok(());
                }
                Err(error)
            }
            result => result,
        }
    }

    /// Forgets an ended process; of the first one: removes the container. Answers
    /// pid and end.
    pub async fn delete(self: &Arc<Self>, name: &ProcessName) -> Result<(u32, Exit)> {
        if name.exec.is_none() {
            self.cancel_create(&name.container).await;
        }
        let (container, process) = self.find(name)?;
        process.settled().await;
        if let Some(exec) = &name.exec {
            return self.delete_exec(&container, exec, &process).await;
        }
        check(&container, &process, Op::Delete)?;
        let _deleting = container.deleting.lock().await;
        // The id may be gone while this waited.
        self.find(name)?;
        if process.state() == State::Registered {
            self.kill_created(&container).await;
        }
        let exit = process.exit().await;
        process.drained(LAST_DRAIN).await;
        process.close_streams(Patience::ORDERLY).await;
        self.forget_in_guest(name).await;
        let execs = std::mem::take(&mut lock(&container.execs).all);
        let closing = execs
            .values()
            .map(|exec| exec.close_streams(Patience::SHORT));
        join_all(closing).await;
        let disks = std::mem::take(&mut *lock(&container.disks));
        for disk in disks {
            disk.detach().await;
        }
        tokio::join!(
            container.remove_from_host(),
            self.keep_fate(&container.id, None)
        );
        lock(&self.slots).remove(&container.id);
        self.shrink();
        let pid = process.pid();
        self.events.publish(Event::Delete(TaskDelete {
            container_id: container.id.to_string(),
            pid,
            exit_status: u32::from(exit.status),
            exited_at: MessageField::some(exit.at.clone()),
            ..TaskDelete::default()
        }));
        Ok((pid, exit))
    }

    /// What the host forgets, the guest shall forget too, if it can.
    async fn forget_in_guest(&self, name: &ProcessName) {
        let Ok(guest) = self.living() else { return };
        match guest.agent().delete(name).await {
            Ok(()) => {}
            Err(error) if error.code() == Code::NOT_FOUND => {}
            Err(error) => {
                if matches!(error, Error::Deadline { .. }) {
                    self.doubt.notify_one();
                }
                warn!(process = %name, error = error.text(), "the guest does not forget it");
            }
        }
    }

    /// Looks up a process.
    pub fn describe(&self, name: &ProcessName) -> Result<Description> {
        let (container, process) = self.find(name)?;
        Ok(Description {
            bundle: container.bundle.clone(),
            process,
            container: container.init.state(),
        })
    }

    /// Waits for the end of a process.
    pub async fn wait(&self, name: &ProcessName) -> Result<Exit> {
        let (_, process) = self.find(name)?;
        Ok(process.exit().await)
    }

    /// Sets the size of a terminal.
    pub async fn resize(&self, name: &ProcessName, columns: u32, rows: u32) -> Result<()> {
        let (_, process) = self.find(name)?;
        if !process.stdio.terminal || columns == 0 || rows == 0 {
            return Ok(());
        }
        if name.exec.is_some() {
            process.settled().await;
        }
        match (name.exec.is_some(), process.state()) {
            (_, State::Ended) => Ok(()),
            (true, State::Registered) => {
                process.set_size(columns, rows);
                Ok(())
            }
            _ => match self.living() {
                Ok(guest) => guest.agent().resize(name, columns, rows).await,
                Err(_) => Ok(()),
            },
        }
    }

    /// Lets the standard input of a process end.
    pub fn close_stdin(&self, name: &ProcessName) -> Result<()> {
        let (_, process) = self.find(name)?;
        process.close_stdin();
        Ok(())
    }

    /// Streams that others come for.
    #[must_use]
    pub fn hub(&self) -> &Arc<Hub> {
        &self.streams.hub
    }

    /// Has it a container, ready or in the making?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// Was there never a VM?
    #[must_use]
    pub fn is_new(&self) -> bool {
        self.guest.get().is_none()
    }

    /// Writes into the log what there is and in which state.
    pub fn log_state(&self) {
        let vmm = self.guest.get().map(|guest| guest.process().pid);
        let end = self.guest.get().map(|guest| guest.has_ended());
        info!(?vmm, ?end, "state of the pod");
        for (id, slot) in &*lock(&self.slots) {
            let Slot::Ready(container) = slot else {
                info!(container = %id, "is being created");
                continue;
            };
            info!(container = %id, state = ?container.init.phase(), "state");
            for (exec, process) in &lock(&container.execs).all {
                info!(container = %id, %exec, state = ?process.phase(), "state");
            }
        }
    }

    fn containers(&self) -> Vec<Arc<Container>> {
        let ready = |slot: &Slot| match slot {
            Slot::Ready(container) => Some(Arc::clone(container)),
            Slot::Creating(_) => None,
        };
        lock(&self.slots).values().filter_map(ready).collect()
    }

    fn is_alone(&self, container: &Container) -> bool {
        lock(&self.slots).keys().all(|id| *id == container.id)
    }

    fn find(&self, name: &ProcessName) -> Result<(Arc<Container>, Arc<Process>)> {
        let container = match lock(&self.slots).get(&name.container) {
            Some(Slot::Ready(container)) => Arc::clone(container),
            Some(Slot::Creating(_)) | None => {
                return Err(Error::NoContainer(name.container.clone()));
            }
        };
        let process = match &name.exec {
            None => Arc::clone(&container.init),
            Some(exec) => lock(&container.execs)
                .all
                .get(exec)
                .cloned()
                .ok_or_else(|| Error::NoExec {
                    container: name.container.clone(),
                    exec: exec.clone(),
                })?,
        };
        Ok((container, process))
    }

    fn living(&self) -> Result<&Arc<dyn Guest>> {
        let guest = self
            .guest
            .get()
            .ok_or_else(|| Error::VmGone("it was never started".to_owned()))?;
        match guest.has_ended() {
            None => Ok(guest),
            Some(end) => Err(Error::VmGone(self.verdict(end).reason)),
        }
    }

    /// The guest, booted by whoever comes first.
    async fn boot(
        self: &Arc<Self>,
        shape: Shape,
        oom_score_adj: i32,
        cgroup: Option<Place>,
    ) -> Result<Arc<dyn Guest>> {
        let boot = || async {
            let guest = self.hypervisor.boot(shape, oom_score_adj, cgroup).await?;
            let (dir, process) = (Arc::clone(&self.dir), guest.process());
            let recorded = tokio::task::spawn_blocking(move || dir.record_vmm(process)).await;
            recorded
                .unwrap_or_else(|error| Err(std::io::Error::other(error)))
                .map_err(|source| Error::Path {
                    action: "record the VMM in",
                    path: self.dir.dir().path().to_owned(),
                    source,
                })?;
            self.watch_all(&guest);
            Ok::<_, Error>(guest)
        };
        self.guest.get_or_try_init(boot).await?;
        self.living().map(Arc::clone)
    }

    async fn kill_created(&self, container: &Container) {
        let init = &container.init;
        let killed = self.kill(&init.name, SIGKILL, false).await;
        if timeout(DIE, init.exit()).await.is_ok() {
            return;
        }
        warn!(container = %container.id, ?killed, "the guest does not end it");
        if self.is_alone(container)
            && let Some(guest) = self.guest.get()
        {
            guest.kill();
        }
        self.conclude(container, Exit::now(KILLED), Duration::ZERO)
            .await;
    }
}

fn check(container: &Container, process: &Process, op: Op) -> Result<()> {
    let state = process.state();
    let verdict = match process.name.exec {
        None => state::init(state, op),
        Some(_) => state::exec(container.init.state(), state, op),
    };
    verdict.map_err(|refusal| refused(process, op, refusal))
}

fn refused(process: &Process, op: Op, refusal: Refusal) -> Error {
    match refusal {
        Refusal::WrongState => Error::WrongState {
            process: process.name.to_string(),
            state: process.state(),
            op,
        },
        Refusal::Finished => Error::Finished(process.name.to_string()),
        Refusal::InitNotRunning => Error::InitNotRunning(process.name.container.clone()),
        Refusal::Paused => Error::Paused(process.name.container.clone()),
    }
}

#[cfg(test)]
pub(crate) mod tests;
