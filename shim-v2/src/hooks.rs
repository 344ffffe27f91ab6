//! Hooks on the host: programs that the operator wants run at points of a container's
//! life.
//!
//! A hook is a child in a session of its own that has nothing of the shim's: neither
//! descriptors nor variables nor its mount namespace, which shows less and more than
//! the host's. Its standard input is the state of the container, what it says goes into
//! the error if it fails. It is killed at its limit, when nobody waits for it any more,
//! and with the shim.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::{self, PipeReader, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::{ffi::OsStrExt, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_agent_api::spec::plan;
use nix::sched::{CloneFlags, setns};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{MemfdFlags, memfd_create},
    process::{
        Pid, PidfdFlags, Signal, kill_process_group, pidfd_open, set_parent_process_death_signal,
    },
};
use serde::Serialize;
use tracing::info;

use crate::{
    agent::escape,
    error::{Error, Result, host},
    explain::Explanation,
    inherit,
    names::ContainerId,
    statedir::ended,
};

/// The version of the specification whose state the hooks are told.
const OCI_VERSION: &str = "1.3.0";
/// Last bytes of a hook's output that go into an error.
const OUTPUT_MAX: usize = 512;
/// Time for a killed hook to be gone.
const KILLED_MS: u32 = 1000;

/// What hooks see of the host, though the shim has left it.
#[derive(Debug)]
pub struct Host {
    mounts: Arc<OwnedFd>,
}

impl Host {
    /// The mount namespace of the calling thread, before it makes one of its own.
    pub fn here() -> Result<Self> {
        let mounts = File::open("/proc/thread-self/ns/mnt");
        let mounts = mounts.map_err(host("open the host's mount namespace"))?;
        Ok(Host {
            mounts: Arc::new(mounts.into()),
        })
    }

    /// That of the program before this one.
    pub(crate) fn unpack(mounts: OwnedFd) -> Self {
        Host {
            mounts: Arc::new(mounts),
        }
    }

    /// The mount namespace.
    #[must_use]
    pub fn mounts(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.mounts)
    }
}

/// A point of a container's life on the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// The virtual machine is there.
    Prestart,
    /// The same, after all of the former.
    CreateRuntime,
    /// The same again, in the network namespace of the pod.
    CreateContainer,
    /// The program runs.
    Poststart,
    /// The container is gone.
    Poststop,
}

impl Moment {
    fn name(self) -> &'static str {
        match self {
            Moment::Prestart => "prestart",
            Moment::CreateRuntime => "createRuntime",
            Moment::CreateContainer => "createContainer",
            Moment::Poststart => "poststart",
            Moment::Poststop => "poststop",
        }
    }

    /// The state of the container then.
    fn status(self) -> &'static str {
        match self {
            Moment::Prestart | Moment::CreateRuntime | Moment::CreateContainer => "creating",
            Moment::Poststart => "running",
            Moment::Poststop => "stopped",
        }
    }
}

/// The hooks of a container.
#[derive(Debug)]
pub struct Hooks {
    /// What they see.
    pub host: Arc<Host>,
    /// The container.
    pub id: ContainerId,
    /// Its bundle, where they run.
    pub bundle: PathBuf,
    /// What its caller remembers of it.
    pub annotations: BTreeMap<String, String>,
    /// The programs.
    pub lists: plan::Hooks,
}

/// The state of a container, as the specification has it (runtime.md, "State").
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct State<'a> {
    oci_version: &'static str,
    id: &'a str,
    status: &'static str,
    pid: u32,
    bundle: &'a Path,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    annotations: &'a BTreeMap<String, String>,
}

impl Hooks {
    /// Runs the hooks of one moment, one after the other, until one fails. `pid` is the
    /// process of the host that stands for the container.
    pub async fn run(&self, moment: Moment, pid: u32) -> Result<()> {
        let list = self.list(moment);
        if list.is_empty() {
            return Ok(());
        }
        let state = self.state(moment, pid)?;
        // Of the host it is in the namespace that the specification names, or the pod's.
        let network = (moment == Moment::CreateContainer)
            .then(|| PathBuf::from(format!("/proc/{pid}/ns/net")));
        for (number, hook) in list.iter().enumerate() {
            let name = format!("{}[{number}] {}", moment.name(), hook.path.display());
            info!(container = %self.id, hook = name, "hook");
            // Closed when this is dropped: then the hook is killed.
            let (cancelled, _wanted) = io::pipe().map_err(host("make a pipe"))?;
            let work = Work {
                host: Arc::clone(&self.host),
                hook: hook.clone(),
                state: state.clone(),
                bundle: self.bundle.clone(),
                network: network.clone(),
                cancelled,
            };
            let ran = tokio::task::spawn_blocking(move || work.run()).await;
            let ran = ran.unwrap_or_else(|error| Err(error.to_string()));
            ran.map_err(|reason| Error::Hook { hook: name, reason })?;
        }
        Ok(())
    }

    /// Those that are left of a container whose shim is gone.
    #[must_use]
    pub fn of_the_end(host: &Arc<Host>, told: Explanation) -> Option<Self> {
        Some(Hooks {
            host: Arc::clone(host),
            id: ContainerId::new(&told.id?).ok()?,
            bundle: told.bundle,
            annotations: told.annotations,
            lists: plan::Hooks {
                poststop: told.poststop,
                ..plan::Hooks::default()
            },
        })
    }

    /// The most time that those take which run in the guest.
    #[must_use]
    pub fn limit_in_guest(&self) -> Duration {
        self.lists
            .start_container
            .iter()
            .map(plan::Hook::limit)
            .sum()
    }

    fn list(&self, moment: Moment) -> &[plan::Hook] {
        match moment {
            Moment::Prestart => &self.lists.prestart,
            Moment::CreateRuntime => &self.lists.create_runtime,
            Moment::CreateContainer => &self.lists.create_container,
            Moment::Poststart => &self.lists.poststart,
            Moment::Poststop => &self.lists.poststop,
        }
    }

    fn state(&self, moment: Moment, pid: u32) -> Result<Vec<u8>> {
        let state = State {
            oci_version: OCI_VERSION,
            id: self.id.as_str(),
            status: moment.status(),
            pid: if moment == Moment::Poststop { 0 } else { pid },
            bundle: &self.bundle,
            annotations: &self.annotations,
        };
        serde_json::to_vec(&state).map_err(host("write the state"))
    }
}

/// One hook with all that it takes, for a thread that may wait.
#[derive(Debug)]
struct Work {
    host: Arc<Host>,
    hook: plan::Hook,
    state: Vec<u8>,
    bundle: PathBuf,
    network: Option<PathBuf>,
    cancelled: PipeReader,
}

impl Work {
    fn run(&self) -> Result<(), String> {
        let begun = self
            .start()
            .map_err(|error| format!("it cannot be started: {error}"));
        let (mut running, mut output) = begun?;
        let ended = running.wait(self.hook.limit(), &mut output, self.cancelled.as_fd());
        ended.map_err(|reason| match output.last_words() {
            Some(words) => format!("{reason}: {words}"),
            None => reason,
        })
    }

    fn start(&self) -> io::Result<(Running, Output)> {
        // All of the state is there before anybody reads, and then its end.
        let mut input = File::from(memfd_create("state", MemfdFlags::CLOEXEC)?);
        input.write_all(&self.state)?;
        input.rewind()?;
        let (output, said) = io::pipe()?;
        rustix::io::ioctl_fionbio(&output, true)?;
        let network = self.network.as_ref().map(File::open).transpose()?;
        let place = Place {
            mounts: self.host.mounts.as_raw_fd(),
            network: network.as_ref().map(AsRawFd::as_raw_fd),
            bundle: CString::new(self.bundle.as_os_str().as_bytes())?,
        };
        let mut arguments = self.hook.args.iter();
        let mut command = Command::new(&self.hook.path);
        command
            .arg0(arguments.next().map_or("", String::as_str))
            .args(arguments)
            .env_clear()
            .envs(
                self.hook
                    .env
                    .iter()
                    .filter_map(|entry| entry.split_once('=')),
            )
            .stdin(input)
            .stdout(Stdio::from(said.try_clone()?))
            .stderr(said);
        // SAFETY: `enter` makes system calls on memory that exists already; it neither
        // allocates nor locks. The descriptors in `place` are open until the start.
        unsafe { command.pre_exec(move || place.enter()) };
        let child = command.spawn()?;
        Ok((Running::new(child)?, Output::new(output)))
    }
}

/// Where a hook runs.
#[derive(Debug)]
struct Place {
    mounts: RawFd,
    network: Option<RawFd>,
    bundle: CString,
}

impl Place {
    /// In the child: goes there, and leaves the shim's things behind.
    fn enter(&self) -> io::Result<()> {
        let join = |fd: RawFd, kind: CloneFlags| {
            // SAFETY: the shim holds the descriptor until this process has its program,
            // and this is a copy of its table.
            let fd = unsafe { BorrowedFd::borrow_raw(fd) };
            setns(fd, kind).map_err(io::Error::from)
        };
        if let Some(network) = self.network {
            join(network, CloneFlags::CLONE_NEWNET)?;
        }
        join(self.mounts, CloneFlags::CLONE_NEWNS)?;
        // It may be gone by the time of the last ones.
        rustix::process::chdir(&self.bundle).or_else(|_| rustix::process::chdir(c"/"))?;
        set_parent_process_death_signal(Some(Signal::KILL))?;
        inherit::keep(&[])
    }
}

/// A hook that runs. Dropping it kills it, with what it started in its group.
#[derive(Debug)]
struct Running {
    child: Child,
    pidfd: OwnedFd,
    reaped: bool,
}

impl Running {
    fn new(mut child: Child) -> io::Result<Self> {
        match pidfd_open(Pid::from_child(&child), PidfdFlags::empty()) {
            Ok(pidfd) => Ok(Running {
                child,
                pidfd,
                reaped: false,
            }),
            Err(errno) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(errno.into())
            }
        }
    }

    /// Waits for its end, and whether that is a success.
    fn wait(
        &mut self,
        limit: Duration,
        output: &mut Output,
        cancelled: BorrowedFd<'_>,
    ) -> Result<(), String> {
        let failed = |error: io::Error| format!("it cannot be waited for: {error}");
        let deadline = Instant::now() + limit;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(format!("it was killed after {} s", limit.as_secs()));
            }
            let left = Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: left.subsec_nanos().into(),
            };
            let mut fds = vec![
                PollFd::new(&self.pidfd, PollFlags::IN),
                PollFd::from_borrowed_fd(cancelled, PollFlags::IN),
            ];
            fds.extend(
                output
                    .pipe
                    .as_ref()
                    .map(|pipe| PollFd::new(pipe, PollFlags::IN)),
            );
            match poll(&mut fds, Some(&left)) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(errno) => return Err(failed(errno.into())),
            }
            let [is_over, is_cancelled] =
                [0, 1].map(|n| fds.get(n).is_some_and(|fd| !fd.revents().is_empty()));
            output.take();
            if is_cancelled {
                return Err("nobody waits for it any more".to_owned());
            }
            if is_over {
                let status = self.child.wait().map_err(failed)?;
                self.reaped = true;
                return match status.success() {
                    true => Ok(()),
                    false => Err(format!("it ended with {status}")),
                };
            }
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.reaped {
            // Its group too: it leads one of its own, whose number is not free before
            // it is reaped.
            let _ = kill_process_group(Pid::from_child(&self.child), Signal::KILL);
            ended(&self.pidfd, KILLED_MS);
            let _ = self.child.try_wait();
        }
    }
}

/// What a hook says.
#[derive(Debug)]
struct Output {
    /// Until it is closed.
    pipe: Option<PipeReader>,
    last: Vec<u8>,
}

impl Output {
    fn new(pipe: PipeReader) -> Self {
        Output {
            pipe: Some(pipe),
            last: Vec::new(),
        }
    }

    /// Takes what has come; keeps the end of it.
    fn take(&mut self) {
        /// So much at once; who says more is heard again.
        const PIECES: usize = 16;
        let mut piece = [0; 4096];
        for _ in 0..PIECES {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut piece) {
                Ok(length @ 1..) => {
                    self.last.extend(piece.iter().take(length));
                    let excess = self.last.len().saturating_sub(OUTPUT_MAX);
                    self.last.drain(..excess);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return,
                Ok(0) | Err(_) => self.pipe = None,
            }
        }
    }

    fn last_words(&self) -> Option<String> {
        let text = String::from_utf8_lossy(&self.last);
        let text = text.trim();
        (!text.is_empty()).then(|| escape(text))
    }
}

#[cfg(test)]
mod tests;
