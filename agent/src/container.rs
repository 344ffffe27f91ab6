//! Containers and their processes.
//!
//! Owns the life of a container: created, running, stopped, deleted, and that
//! of its further processes. All changes go through [`Containers`]. Promises
//! that a creation that fails at any point leaves no process, no mount and no
//! cgroup, and that killing needs no lock that another request holds while it
//! waits.

mod arguments;
mod copy;
mod hooks;
mod resources;
mod signals;
pub mod state;

use std::{
    collections::HashMap,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::agent::{CreateRequest, StatsResponse, Stdio};
use rustix::{
    fs::{FileType, Uid},
    termios::{Winsize, tcsetwinsize},
};
use tokio::{sync::Mutex as AsyncMutex, time::timeout};

use self::{
    arguments::{check_id, size, terminal_size},
    copy::Copies,
    hooks::Hooks,
    state::{Op, State},
};
use crate::{
    cgroup::Cgroup,
    channel::{Fds, Job},
    disk::Disks,
    error::{Doing, Error},
    launch::{Launched, Waiting, launch},
    reaper::{Exit, ExitWatch, Reaper, ended},
    size::Machine,
    sockets::Sockets,
    spec::{
        self, Inherited,
        plan::{ContainerPlan, Filesystem, IdMap, MountKind, guest_id},
    },
    stdio::{Connected, Pumps, prepare},
    streams::Streams,
};

/// How long output may take after the exit of its process: a child that lives
/// on can hold the pipe for ever.
const DRAIN_MAX: Duration = Duration::from_secs(2);

/// Where the agent finds what it needs.
#[derive(Debug)]
pub struct Config {
    /// The agent's executable, which is spawned as the helper.
    pub helper: PathBuf,
    /// Directory of the cgroup that holds the cgroups of containers.
    pub cgroups: PathBuf,
    /// File systems of the host that containers write to.
    pub shares: Vec<PathBuf>,
    /// Directory for the sockets that containers reach, a directory for each.
    pub sockets: PathBuf,
    /// The machine, if its size is the agent's to change.
    pub machine: Option<Arc<Machine>>,
}

/// What ended, and how.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Status and time.
    pub exit: Exit,
    /// How often the OOM killer has struck in the container.
    pub oom_kills: u64,
    /// Whether somebody else still holds its output.
    pub output_open: bool,
    /// If it was the first process: what the container has used.
    pub stats: Option<StatsResponse>,
}

/// All containers of the pod.
#[derive(Debug)]
pub struct Containers {
    config: Config,
    reaper: Arc<Reaper>,
    streams: Arc<Streams>,
    all: Mutex<HashMap<String, Entry<Arc<Container>>>>,
    copies: Copies,
}

/// A taken id: what has it may still be in the making.
#[derive(Debug)]
enum Entry<T> {
    Making,
    There(T),
}

#[derive(Debug)]
struct Container {
    id: String,
    cgroup: Mutex<Option<Arc<Cgroup>>>,
    init: Arc<Process>,
    execs: Mutex<HashMap<String, Entry<Arc<Process>>>>,
    waiting: Mutex<Option<Waiting>>,
    inherited: Inherited,
    hooks: Option<Hooks>,
    /// Empty without a user namespace of its own.
    uid_maps: Vec<IdMap>,
    /// Name of the session keyring of its processes.
    keyring: String,
    /// Held while it is frozen or thawed.
    freezer: AsyncMutex<()>,
    /// It stands still.
    paused: AtomicBool,
    /// Its root file system, if that is a disk, and disks that are its devices.
    disks: Mutex<Disks>,
    /// Those of the host that its processes reach.
    sockets: Option<Sockets>,
}

#[derive(Debug)]
struct Process {
    pid: u32,
    pidfd: Arc<OwnedFd>,
    exit: ExitWatch,
    pumps: Pumps,
    terminal: Option<OwnedFd>,
}

impl Containers {
    /// None yet.
    pub fn new(config: Config, reaper: Arc<Reaper>, streams: Arc<Streams>) -> Self {
        Self {
            config,
            reaper,
            streams,
            all: Mutex::default(),
            copies: Copies::default(),
        }
    }

    /// Creates a container; its first process waits for [`Containers::start`].
    /// Returns that process's id in the guest.
    pub async fn create(&self, request: &CreateRequest) -> Result<u32, Error> {
        let (id, stdio) = (request.container_id.as_str(), &*request.stdio);
        check_id(id)?;
        let making =
            Making::new(&self.all, id).ok_or_else(|| Error::ContainerExists(id.to_owned()))?;
        let seccomp = spec::seccomp(&request.seccomp_filter, request.seccomp_flags)?;
        let spec = spec::json::from_slice("", &request.spec)?;
        let mut plan = spec::container(spec, seccomp)?.plan;
        plan.process.terminal = terminal_size(stdio)?;
        let sockets = Sockets::listen(&self.config.sockets, id, &request.sockets)?;
        let disks = Disks::take(request, &mut plan).await?;
        let cgroup = Cgroup::create(&self.config.cgroups, id, &plan.resources)?;
        // Where a container can write to its cgroup, its user must be allowed to.
        let owner = guest_id(&plan.uid_maps, plan.process.uid);
        if let Some(owner) = owner.filter(|_| has_writable_cgroups(&plan)) {
            cgroup.give_to(owner)?;
        }
        match self.create_in(id, plan, stdio, &cgroup).await {
            Ok(mut container) => {
                let pid = container.init.pid;
                container.cgroup = Mutex::new(Some(Arc::new(cgroup)));
                container.disks = Mutex::new(disks);
                container.sockets = Some(sockets);
                making.done(Arc::new(container));
                Ok(pid)
            }
            Err(error) => {
                // The caller's news is why it failed, not what followed.
                let _ = cgroup.remove().await;
                let _ = disks.let_go().await;
                Err(error)
            }
        }
    }

    async fn create_in(
        &self,
        id: &str,
        plan: ContainerPlan,
        stdio: &Stdio,
        cgroup: &Cgroup,
    ) -> Result<Container, Error> {
        let (stdio, prepared) = prepare(stdio, &self.streams)?;
        let fds = Fds {
            stdio,
            cgroup: cgroup_fd(cgroup)?,
            container: None,
        };
        give_to_user(&fds.stdio, guest_id(&plan.uid_maps, plan.process.uid))?;
        let uid_maps = plan.uid_maps.clone();
        let inherited = Inherited {
            seccomp: plan.process.seccomp.clone(),
            personality: plan.process.personality,
        };
        let hooks = Hooks::of(&plan);
        let keyring = new_keyring_name()?;
        let job = Job::Create {
            plan: Box::new(plan),
            keyring: keyring.clone(),
        };
        let connected = prepared.connect().await?;
        let launched = launch(&self.config.helper, &self.reaper, &job, fds).await?;
        let (init, waiting) = Process::new(launched, connected)?;
        Ok(Container {
            id: id.to_owned(),
            cgroup: Mutex::default(),
            init: Arc::new(init),
            execs: Mutex::default(),
            waiting: Mutex::new(Some(waiting)),
            inherited,
            hooks,
            uid_maps,
            keyring,
            freezer: AsyncMutex::default(),
            paused: AtomicBool::new(false),
            disks: Mutex::default(),
            sockets: None,
        })
    }

    /// Waits for a connection to one of the sockets of a container, which it relays by
    /// this stream. Returns the number of the socket.
    pub async fn accept(&self, id: &str, stream: u64) -> Result<u32, Error> {
        let container = self.container(id)?;
        match &container.sockets {
            Some(sockets) => sockets.accept(&self.streams, stream).await,
            None => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Lets the first process of a container become its program.
    pub async fn start(&self, id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        let waiting = container.take_waiting()?;
        self.run_hooks(&container).await?;
        waiting.start().await
    }

    /// Runs a further process; `process` is the OCI object. Returns its id in
    /// the guest.
    pub async fn exec(
        &self,
        id: &str,
        exec_id: &str,
        process: &[u8],
        stdio: &Stdio,
    ) -> Result<u32, Error> {
        check_id(exec_id)?;
        let container = self.container(id)?;
        container.check(Op::Exec)?;
        let making =
            Making::new(&container.execs, exec_id).ok_or_else(|| Error::ProcessExists {
                container_id: id.to_owned(),
                exec_id: exec_id.to_owned(),
            })?;
        let process = spec::json::from_slice("process", process)?;
        let mut plan = spec::process(process, &container.inherited)?.plan;
        plan.terminal = terminal_size(stdio)?;
        let (stdio, prepared) = prepare(stdio, &self.streams)?;
        let init = container
            .init
            .pidfd
            .try_clone()
            .doing("refer to the container")?;
        let cgroup = cgroup_fd(&*container.cgroup()?)?;
        let fds = Fds {
            stdio,
            cgroup,
            container: Some(init),
        };
        give_to_user(&fds.stdio, guest_id(&container.uid_maps, plan.uid))?;
        let job = Job::Exec {
            process: Box::new(plan),
            container: self.place(&container),
        };
        let connected = prepared.connect().await?;
        let launched = launch(&self.config.helper, &self.reaper, &job, fds).await?;
        let (process, waiting) = Process::new(launched, connected)?;
        waiting.start().await?;
        let pid = process.pid;
        making.done(Arc::new(process));
        Ok(pid)
    }

    /// Waits for the end of a process and of its output.
    pub async fn wait(&self, id: &str, exec_id: &str) -> Result<Ended, Error> {
        let container = self.container(id)?;
        let process = container.process(exec_id)?;
        let exit = ended(process.exit.clone()).await.ok_or(Error::InitKilled)?;
        // Not an error: what is not out by now may still come.
        let drained = timeout(DRAIN_MAX, process.pumps.drained()).await;
        let cgroup = container.cgroup().ok();
        let first = cgroup.as_ref().filter(|_| exec_id.is_empty());
        Ok(Ended {
            exit,
            oom_kills: cgroup.as_ref().map_or(0, |cgroup| cgroup.oom_kills()),
            output_open: drained.is_err(),
            stats: first.map(|cgroup| cgroup.stats()),
        })
    }

    /// Forgets an ended process; with an empty `exec_id` the whole container.
    pub async fn delete(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        let container = self.container(id)?;
        if !exec_id.is_empty() {
            let process = container.process(exec_id)?;
            if process.exit.borrow().is_none() {
                return Err(Error::Running { pid: process.pid });
            }
            lock(&container.execs).remove(exec_id);
            return Ok(());
        }
        container.check(Op::Delete)?;
        // Whoever comes second finds nothing.
        let cgroup = lock(&container.cgroup).take();
        let cgroup = cgroup.ok_or_else(|| Error::NoContainer(id.to_owned()))?;
        let removed = match Arc::try_unwrap(cgroup) {
            Ok(cgroup) => cgroup.remove().await,
            // An exec in the making still holds it and removes it at its end.
            Err(shared) => shared.kill(),
        };
        if let Some(sockets) = &container.sockets {
            sockets.close().await;
        }
        let disks = std::mem::take(&mut *lock(&container.disks));
        let let_go = disks.let_go().await;
        lock(&self.all).remove(id);
        removed.doing("remove the container's cgroup")?;
        let_go
    }

    /// The processes of a container, by their ids in the guest.
    pub fn pids(&self, id: &str) -> Result<Vec<u32>, Error> {
        self.container(id)?
            .cgroup()?
            .pids()
            .doing("list the processes")
    }

    /// Ends a process's standard input.
    pub fn close_stdin(&self, id: &str, exec_id: &str) -> Result<(), Error> {
        self.container(id)?.process(exec_id)?.pumps.close_stdin();
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub fn resize(&self, id: &str, exec_id: &str, columns: u32, rows: u32) -> Result<(), Error> {
        let process = self.container(id)?.process(exec_id)?;
        let terminal = process
            .terminal
            .as_ref()
            .ok_or(Error::NoTerminal { pid: process.pid })?;
        let (ws_col, ws_row) = size(columns, rows)?;
        let size = Winsize {
            ws_col,
            ws_row,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(terminal, size).doing("set the terminal's size")
    }

    fn last_names_of_cgroup(&self, id: &str) -> PathBuf {
        let parent = self.config.cgroups.file_name().unwrap_or_default();
        Path::new(parent).join(id)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match lock(&self.all).get(id) {
            Some(Entry::There(container)) => Ok(Arc::clone(container)),
            Some(Entry::Making) | None => Err(Error::NoContainer(id.to_owned())),
        }
    }
}

impl Container {
    fn state(&self) -> State {
        if self.init.exit.borrow().is_some() {
            State::Stopped
        } else if lock(&self.waiting).is_some() {
            State::Created
        } else if self.paused.load(Ordering::SeqCst) {
            State::Paused
        } else {
            State::Running
        }
    }

    fn check(&self, op: Op) -> Result<(), Error> {
        let state = self.state();
        if state.allows(op) {
            Ok(())
        } else {
            Err(Error::WrongState {
                id: self.id.clone(),
                state,
                op,
            })
        }
    }

    fn take_waiting(&self) -> Result<Waiting, Error> {
        self.check(Op::Start)?;
        lock(&self.waiting).take().ok_or_else(|| Error::WrongState {
            id: self.id.clone(),
            state: State::Running,
            op: Op::Start,
        })
    }

    fn cgroup(&self) -> Result<Arc<Cgroup>, Error> {
        lock(&self.cgroup)
            .clone()
            .ok_or_else(|| Error::NoContainer(self.id.clone()))
    }

    fn process(&self, exec_id: &str) -> Result<Arc<Process>, Error> {
        if exec_id.is_empty() {
            return Ok(Arc::clone(&self.init));
        }
        match lock(&self.execs).get(exec_id) {
            Some(Entry::There(process)) => Ok(Arc::clone(process)),
            Some(Entry::Making) | None => Err(Error::NoProcess {
                container_id: self.id.clone(),
                exec_id: exec_id.to_owned(),
            }),
        }
    }
}

impl Process {
    fn new(mut launched: Launched, stdio: Connected) -> Result<(Self, Waiting), Error> {
        let terminal = launched.terminal.take();
        let process = Self {
            pid: launched.pid,
            pidfd: Arc::clone(&launched.pidfd),
            exit: launched.exit.clone(),
            pumps: stdio.start(terminal.as_ref(), &launched.exit)?,
            terminal,
        };
        Ok((process, launched.into_waiting()))
    }

    fn check_alive(&self) -> Result<(), Error> {
        match *self.exit.borrow() {
            None => Ok(()),
            Some(_) => Err(Error::Ended { pid: self.pid }),
        }
    }
}

/// Holds an id while what will have it is made; gives it back if that fails.
struct Making<'a, T> {
    map: &'a Mutex<HashMap<String, Entry<T>>>,
    id: Option<String>,
}

impl<'a, T> Making<'a, T> {
    /// `None` if the id is taken.
    fn new(map: &'a Mutex<HashMap<String, Entry<T>>>, id: &str) -> Option<Self> {
        let mut entries = lock(map);
        if entries.contains_key(id) {
            return None;
        }
        entries.insert(id.to_owned(), Entry::Making);
        Some(Self {
            map,
            id: Some(id.to_owned()),
        })
    }

    fn done(mut self, made: T) {
        if let Some(id) = self.id.take() {
            lock(self.map).insert(id, Entry::There(made));
        }
    }
}

impl<T> Drop for Making<'_, T> {
    fn drop(&mut self) {
        if let Some(id) = &self.id {
            lock(self.map).remove(id);
        }
    }
}

/// Locks what no holder leaves half changed.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no holder of the lock panics")
}

fn cgroup_fd(cgroup: &Cgroup) -> Result<OwnedFd, Error> {
    cgroup
        .directory()
        .and_then(|directory| directory.as_fd().try_clone_to_owned())
        .doing("refer to the container's cgroup")
}

/// Whether a container mounts its part of cgroup v2 such that it can write there.
fn has_writable_cgroups(plan: &ContainerPlan) -> bool {
    plan.mounts.iter().any(|mount| {
        let readonly = mount.attributes.set & libc::MOUNT_ATTR_RDONLY != 0;
        let cgroup = matches!(
            mount.kind,
            MountKind::Filesystem {
                fs: Filesystem::Cgroup,
                ..
            }
        );
        cgroup && !readonly
    })
}

/// A name that no other container can guess: whoever knows it can join.
fn new_keyring_name() -> Result<String, Error> {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid");
    Ok(format!("_ses.{}", uuid.doing("name a keyring")?.trim_end()))
}

/// A program may open `/dev/stdout`, which asks for permission anew. A user
/// that the container does not map is refused by its init.
fn give_to_user(pipes: &[OwnedFd; 3], uid: Option<u32>) -> Result<(), Error> {
    for pipe in pipes {
        let mode = rustix::fs::fstat(pipe).doing("look at a stream")?.st_mode;
        if FileType::from_raw_mode(mode) == FileType::Fifo {
            rustix::fs::fchown(pipe, uid.map(Uid::from_raw), None).doing("hand over a stream")?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_making_gives_the_id_back() {
        let map = Mutex::new(HashMap::new());
        let making = Making::new(&map, "a").unwrap();
        assert!(Making::new(&map, "a").is_none());
        drop(making);
        Making::new(&map, "a").unwrap().done(1);
        assert!(Making::new(&map, "a").is_none());
    }
}
