//! One pod: its VM, its containers, and the order in which they come and go.
//!
//! All changes go through [`Pod`]; nothing else in the shim holds a container.
//! What is legal when is in `state.rs`. Locks guard maps for the length of a
//! look-up and are never held across an await; the one exception is
//! `Process::moving`. Kill takes no lock that another request holds while it waits.
//!
//! The first Create boots the VM, which then lives until [`Pod::stop`]. If the VM
//! ends by itself, every process of the pod ends with it.

mod create;
mod exec;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{TaskDelete, TaskExit, TaskOOM, TaskStart},
    protobuf::MessageField,
};
use tokio::{
    sync::{Mutex as AsyncMutex, Notify, OnceCell},
    time::timeout,
};
use tracing::{info, warn};
use ttrpc::Code;

pub use self::create::Create;
use crate::{
    agent::ProcessName,
    clock,
    config::Config,
    error::{Error, Result},
    events::{Event, Publisher},
    names::{ContainerId, ExecId, Namespace},
    process::{Exit, Process},
    share::{ContainerShare, Share},
    state::{self, Op, Refusal, State},
    statedir::StateDir,
    vm::{Boot, Size, Vm, vmm::End},
};

/// Time that output gets to be delivered after its process ended.
const DRAIN: Duration = Duration::from_secs(2);
/// Time for a killed process to end.
const DIE: Duration = Duration::from_secs(3);
/// Time for containerd to take the last events.
const FLUSH: Duration = Duration::from_secs(2);

/// What a pod is made with.
#[derive(Debug)]
pub struct Parts {
    /// containerd's namespace.
    pub namespace: Namespace,
    /// The administrator's settings.
    pub config: Config,
    /// The pod's state directory, which exists.
    pub dir: StateDir,
    /// The pod's share.
    pub share: Share,
    /// Takes events.
    pub events: Publisher,
}

/// A pod.
#[derive(Debug)]
pub struct Pod {
    config: Config,
    dir: StateDir,
    share: Arc<Share>,
    events: Publisher,
    vm: OnceCell<Arc<Vm>>,
    slots: Mutex<BTreeMap<ContainerId, Slot>>,
    stopping: AtomicBool,
    stopped: OnceCell<()>,
}

/// A place in the table of containers.
#[derive(Debug)]
enum Slot {
    Creating(Arc<Creation>),
    Ready(Arc<Container>),
}

/// A creation under way.
#[derive(Debug, Default)]
struct Creation {
    /// Asks it to give up.
    cancel: Notify,
    /// It is over, one way or the other.
    over: Notify,
}

/// A container.
#[derive(Debug)]
struct Container {
    id: ContainerId,
    bundle: PathBuf,
    init: Arc<Process>,
    execs: Mutex<BTreeMap<ExecId, Arc<Process>>>,
    files: Mutex<Option<ContainerShare>>,
    /// Held while it is deleted.
    deleting: AsyncMutex<()>,
    /// A SIGKILL was not answered; the next one ends the VM.
    kill_unanswered: AtomicBool,
}

/// What State answers.
#[derive(Clone, Debug)]
pub struct Description {
    /// The bundle of the container.
    pub bundle: PathBuf,
    /// A process of the host that stands for it.
    pub pid: u32,
    /// The process.
    pub process: Arc<Process>,
}

impl Pod {
    /// A pod without a VM.
    #[must_use]
    pub fn new(parts: Parts) -> Arc<Self> {
        info!(namespace = %parts.namespace, "pod");
        Arc::new(Pod {
            config: parts.config,
            dir: parts.dir,
            share: Arc::new(parts.share),
            events: parts.events,
            vm: OnceCell::new(),
            slots: Mutex::default(),
            stopping: AtomicBool::new(false),
            stopped: OnceCell::new(),
        })
    }

    /// Lets the first process of a container run, or starts an exec. Answers the
    /// pid.
    pub async fn start(self: &Arc<Self>, name: &ProcessName) -> Result<u32> {
        let (container, process) = self.find(name)?;
        let _moving = process.moving.lock().await;
        if name.exec.is_some() {
            return self.start_exec(&container, &process).await;
        }
        state::init(process.state(), Op::Start)
            .map_err(|refusal| refused(&process, Op::Start, refusal))?;
        let vm = self.living_vm()?;
        vm.agent().start(&container.id).await?;
        process.running();
        let pid = self.pid();
        self.events.publish(Event::Start(TaskStart {
            container_id: container.id.to_string(),
            pid,
            ..TaskStart::default()
        }));
        Ok(pid)
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
        check(&container, &process, Op::Kill)?;
        // Signal 0 only asks whether the process lives.
        if signal == 0 {
            return Ok(());
        }
        let vm = self.living_vm()?;
        match vm.agent().kill(name, signal, all).await {
            Err(Error::Agent {
                code: Code::NOT_FOUND,
                ..
            }) => Err(Error::Finished(name.to_string())),
            Err(error @ (Error::Deadline { .. } | Error::VmGone(_)))
                if signal == libc::SIGKILL.unsigned_abs() && name.exec.is_none() =>
            {
                // The guest cannot be asked. For the only container its VM is as
                // good; in a pod siblings would die, so only if asked again.
                let again = container.kill_unanswered.swap(true, Ordering::SeqCst);
                if self.is_alone(&container) || again {
                    warn!(container = %container.id, %error, "killing the VM instead");
                    vm.vmm().kill();
                    return Ok(());
                }
                Err(error)
            }
            result => result,
        }
    }

    /// Forgets an ended process; of the first one: removes the container. Answers
    /// pid and end.
    pub async fn delete(&self, name: &ProcessName) -> Result<(u32, Exit)> {
        if name.exec.is_none() {
            self.cancel_create(&name.container).await;
        }
        let (container, process) = self.find(name)?;
        check(&container, &process, Op::Delete)?;
        if let Some(exec) = &name.exec {
            return self.delete_exec(&container, exec, &process).await;
        }
        let _deleting = container.deleting.lock().await;
        // The id may be gone while this waited.
        self.find(name)?;
        if process.state() == State::Created {
            self.kill_created(&container, &process).await;
        }
        let exit = process.exit().await;
        process.drained(DRAIN).await;
        process.close_streams();
        if let Some(vm) = self.vm.get().filter(|vm| vm.vmm().has_ended().is_none())
            && let Err(error) = vm.agent().delete(name).await
        {
            warn!(container = %container.id, error = error.text(), "the guest does not delete it");
        }
        for exec in std::mem::take(&mut *lock(&container.execs)).into_values() {
            exec.exited(Exit::now(255));
            exec.close_streams();
        }
        let files = lock(&container.files).take();
        let _ = tokio::task::spawn_blocking(move || drop(files)).await;
        lock(&self.slots).remove(&container.id);
        let pid = self.pid();
        self.events.publish(Event::Delete(TaskDelete {
            container_id: container.id.to_string(),
            pid,
            exit_status: u32::from(exit.status),
            exited_at: MessageField::some(exit.at.clone()),
            ..TaskDelete::default()
        }));
        Ok((pid, exit))
    }

    /// Looks up a process.
    pub fn describe(&self, name: &ProcessName) -> Result<Description> {
        let (container, process) = self.find(name)?;
        Ok(Description {
            bundle: container.bundle.clone(),
            pid: self.pid(),
            process,
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
        match (name.exec.is_some(), process.state()) {
            (_, State::Stopped) => Ok(()),
            (true, State::Created) => {
                process.set_size(columns, rows);
                Ok(())
            }
            _ => self.living_vm()?.agent().resize(name, columns, rows).await,
        }
    }

    /// Lets the standard input of a process end.
    pub fn close_stdin(&self, name: &ProcessName) -> Result<()> {
        let (_, process) = self.find(name)?;
        process.close_stdin();
        Ok(())
    }

    /// Has it a container, ready or in the making?
    #[must_use]
    pub fn is_empty(&self) -> bool {
        lock(&self.slots).is_empty()
    }

    /// A process of the host that stands for all of the pod: the VMM. 0 without a
    /// VM.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.vm
            .get()
            .map_or(0, |vm| vm.vmm().process().pid.unsigned_abs())
    }

    /// Ends the pod: VM, containers, events, state directory. Whoever calls it
    /// again waits for the same end.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stopped.get_or_init(|| self.end()).await;
    }

    async fn end(&self) {
        let creating: Vec<ContainerId> = lock(&self.slots)
            .iter()
            .filter(|(_, slot)| matches!(slot, Slot::Creating(_)))
            .map(|(id, _)| id.clone())
            .collect();
        for id in creating {
            self.cancel_create(&id).await;
        }
        match self.vm.get() {
            // Every container was deleted, so the guest holds nothing of value.
            Some(vm) if self.is_empty() => vm.vmm().kill(),
            Some(vm) => vm.stop().await,
            None => {}
        }
        if let Some(vm) = self.vm.get() {
            vm.vmm().ended().await;
        }
        for container in self.containers() {
            // The end of the VM ends every process that was started in it.
            let _ = timeout(DIE, container.init.exit()).await;
            container.init.drained(DRAIN).await;
            container.init.close_streams();
        }
        self.events.flush(FLUSH).await;
        let slots = std::mem::take(&mut *lock(&self.slots));
        let (share, dir) = (Arc::clone(&self.share), self.dir.clone());
        let removed = tokio::task::spawn_blocking(move || {
            drop(slots);
            share.unmount();
            dir.remove()
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "cannot remove the state directory"),
            Err(error) => warn!(%error, "cannot remove the state directory"),
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
            Some(exec) => {
                lock(&container.execs)
                    .get(exec)
                    .cloned()
                    .ok_or_else(|| Error::NoExec {
                        container: name.container.clone(),
                        exec: exec.clone(),
                    })?
            }
        };
        Ok((container, process))
    }

    fn living_vm(&self) -> Result<&Arc<Vm>> {
        let vm = self
            .vm
            .get()
            .ok_or_else(|| Error::VmGone("it was never started".to_owned()))?;
        match vm.vmm().has_ended() {
            None => Ok(vm),
            Some(end) => Err(Error::VmGone(end.reason)),
        }
    }

    /// The VM, booted by whoever comes first.
    async fn boot(self: &Arc<Self>, size: Size, oom_score_adj: i32) -> Result<Arc<Vm>> {
        let boot = || async {
            let boot = Boot {
                config: &self.config,
                dir: &self.dir,
                size,
                oom_score_adj,
            };
            let vm = Arc::new(Vm::boot(boot).await?);
            let mut processes = self.dir.processes();
            processes.vmm = Some(vm.vmm().process());
            if let Err(error) = self.dir.record(&processes) {
                warn!(%error, "delete will not know of the VMM");
            }
            tokio::spawn(Arc::clone(self).watch_vm(Arc::clone(&vm)));
            tokio::spawn(clock::follow(Arc::clone(&vm)));
            Ok::<_, Error>(vm)
        };
        let vm = Arc::clone(self.vm.get_or_try_init(boot).await?);
        match vm.vmm().has_ended() {
            None => Ok(vm),
            Some(end) => Err(Error::VmGone(end.reason)),
        }
    }

    async fn watch_vm(self: Arc<Self>, vm: Arc<Vm>) {
        let end = vm.vmm().ended().await;
        if self.stopping.load(Ordering::SeqCst) {
            return;
        }
        warn!(status = end.status, reason = end.reason, "the VM ended");
        for line in &end.console {
            warn!(message_of = "guest", "{line}");
        }
        self.write_reason(&end);
    }

    /// Leaves the reason of an end that nobody asked for where clients look for it.
    fn write_reason(&self, end: &End) {
        if self.stopping.load(Ordering::SeqCst) {
            return;
        }
        if let Err(error) = self.dir.write_reason(&end.reason) {
            warn!(%error, "cannot write the reason");
        }
    }

    /// Waits for the end of a process in the guest, or of the VM, and records it.
    fn watch(self: &Arc<Self>, vm: &Arc<Vm>, container: &Arc<Container>, process: &Arc<Process>) {
        let (pod, vm) = (Arc::clone(self), Arc::clone(vm));
        let (container, process) = (Arc::clone(container), Arc::clone(process));
        tokio::spawn(async move {
            let (status, oom) = match vm.agent().wait(&process.name).await {
                Ok(ended) => (ended.status, ended.oom_killed),
                Err(Error::VmGone(reason)) => {
                    // Without its agent a VM is of no use.
                    if timeout(DRAIN, vm.vmm().ended()).await.is_err() {
                        warn!(reason, "killing the VM");
                        vm.vmm().kill();
                    }
                    let end = vm.vmm().ended().await;
                    // Before anybody learns of the exit and asks why.
                    pod.write_reason(&end);
                    (end.status, false)
                }
                Err(error) => {
                    warn!(process = %process.name, error = error.text(), "its end is not known");
                    (255, false)
                }
            };
            process.drained(DRAIN).await;
            if process.name.exec.is_none() {
                pod.end_execs(&container).await;
            }
            // An end is told after the start.
            let _moving = process.moving.lock().await;
            pod.record_exit(&container, &process, status, oom);
        });
    }

    /// All execs of a container end before its first process is said to have.
    async fn end_execs(&self, container: &Container) {
        let execs: Vec<Arc<Process>> = lock(&container.execs).values().cloned().collect();
        for exec in execs {
            if exec.state() == State::Running {
                let _ = timeout(DIE, exec.exit()).await;
            } else {
                exec.exited(Exit::now(255));
            }
        }
    }

    fn record_exit(&self, container: &Container, process: &Process, status: u8, oom: bool) {
        let exit = Exit::now(status);
        info!(process = %process.name, status, oom, "exit");
        if oom {
            // CRI-O looks for this file.
            let _ = std::fs::File::create_new(container.bundle.join("oom"));
            self.events.publish(Event::Oom(TaskOOM {
                container_id: container.id.to_string(),
                ..TaskOOM::default()
            }));
        }
        if !process.exited(exit.clone()) {
            return;
        }
        let id = process
            .name
            .exec
            .as_ref()
            .map_or_else(|| container.id.to_string(), ToString::to_string);
        self.events.publish(Event::Exit(TaskExit {
            container_id: container.id.to_string(),
            id,
            pid: self.pid(),
            exit_status: u32::from(status),
            exited_at: MessageField::some(exit.at),
            ..TaskExit::default()
        }));
    }

    async fn kill_created(&self, container: &Container, process: &Process) {
        let killed = self
            .kill(&process.name, libc::SIGKILL.unsigned_abs(), false)
            .await;
        if timeout(DIE, process.exit()).await.is_ok() {
            return;
        }
        warn!(container = %container.id, ?killed, "the guest does not end it");
        if self.is_alone(container)
            && let Some(vm) = self.vm.get()
        {
            vm.vmm().kill();
        }
        process.exited(Exit::now(137));
    }

    /// Cancels a creation and waits until it has cleaned up.
    async fn cancel_create(&self, id: &ContainerId) {
        let creation = match lock(&self.slots).get(id) {
            Some(Slot::Creating(creation)) => Arc::clone(creation),
            Some(Slot::Ready(_)) | None => return,
        };
        let over = creation.over.notified();
        creation.cancel.notify_one();
        if timeout(DIE, over).await.is_err() {
            warn!(container = %id, "its creation does not end");
        }
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
    }
}

/// A lock that outlives a panic: what it guards is changed in single steps.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
