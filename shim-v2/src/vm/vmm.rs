//! The process `bulkhead-vmm`: started, watched, killed.
//!
//! It begins in namespaces of its own, but for that of mounts, which it makes itself
//! when it confines itself to the share. It inherits exactly the descriptors that its
//! configuration names. A thread makes these namespaces and ends as soon as the process
//! is started; another one waits for the end, and then removes the cgroup. The VMM lives
//! as long as the control socket.

use std::{
    fs::File,
    io::{self, PipeReader, PipeWriter, Read, Seek, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd, RawFd},
        unix::process::ExitStatusExt,
    },
    path::{Path, PathBuf},
    process::ExitStatus,
    sync::{Arc, Weak},
    thread,
};

use bulkhead_agent_api::{AGENT_PORT, GUEST_CID};
use bulkhead_vmm::{
    config::{Config, Console, Fd, Jail, Share, Vsock},
    exit::Report,
};
use nix::sched::{CloneFlags, unshare};
use rustix::{
    event::{PollFd, PollFlags, poll},
    process::Signal,
};
use serde::{Deserialize, Serialize};
use tokio::sync::{oneshot, watch};
use tracing::{error, info, warn};

use super::{
    Shape,
    control::{self, Control},
    cores,
    holder::{self, Quarters},
};
use crate::{
    agent::escape,
    carry::{Bag, CarriedFd},
    cgroup::{self, Cgroup, Entrance},
    child::{Child, Failure, Program},
    error::{Error, Result, host},
    statedir::{HostProcess, signal},
};

/// Name of the binary.
const BINARY: &str = "bulkhead-vmm";
/// Largest report, in bytes.
const MAX_REPORT: u64 = 64 << 10;
/// Most bytes of the VMM's messages that are logged.
const MAX_MESSAGES: u64 = 64 << 10;

/// First of the user ids of pods, which are as many as there are process ids. In
/// none of the ranges that systemd or a distribution gives to anybody.
const POD_USERS: u32 = 0x7000_0000;

/// Exit status of processes whose VM was killed.
const KILLED: u8 = 137;
/// Exit status of processes whose VM failed.
const FAILED: u8 = 255;

/// Everything that a VMM is started with.
#[derive(Debug)]
pub struct Launch {
    /// The program.
    pub binary: PathBuf,
    /// `/dev/kvm`.
    pub kvm: OwnedFd,
    /// The guest's kernel.
    pub kernel: OwnedFd,
    /// The guest's root image.
    pub root: OwnedFd,
    /// Listens for connections to the guest.
    pub listener: OwnedFd,
    /// Takes connections from the guest.
    pub acceptor: OwnedFd,
    /// Give the guest a console.
    pub console: bool,
    /// The guest kernel's command line.
    pub cmdline: String,
    /// How large it is, and can become.
    pub shape: Shape,
    /// The directory of the pod's share, which becomes the VMM's root.
    pub share: PathBuf,
    /// How it is offered to the guest.
    pub shares: Vec<Share>,
    /// `oom_score_adj` of the process.
    pub oom_score_adj: i32,
    /// Where it lives.
    pub cgroup: Option<Cgroup>,
}

/// How a VMM ended, and what that means for the processes in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct End {
    /// Exit status of every process that ran: 137 if the VM was killed, 255 if it
    /// failed.
    pub status: u8,
    /// One line.
    pub reason: String,
    /// Last lines of the guest's console, if it had one.
    pub console: Vec<String>,
}

impl End {
    /// Judges by the process's end first, by its report second.
    #[must_use]
    pub fn of(status: ExitStatus, report: Option<Report>) -> Self {
        let console = report.as_ref().map_or_else(Vec::new, |report| {
            report
                .console
                .iter()
                .rev()
                .take(50)
                .rev()
                .map(|line| escape(line))
                .collect()
        });
        let (status, reason) = match (status.signal(), report) {
            (Some(libc::SIGKILL), _) => (KILLED, "the VM was killed".to_owned()),
            (Some(libc::SIGSYS), _) => (
                FAILED,
                "the VMM made a system call that is blocked".to_owned(),
            ),
            (Some(number), _) => (FAILED, format!("the VMM crashed with signal {number}")),
            (None, Some(report)) => (FAILED, escape(&report.reason)),
            (None, None) => {
                let code = status.code().unwrap_or(-1);
                (
                    FAILED,
                    format!("the VMM ended with status {code} and no report"),
                )
            }
        };
        End {
            status,
            reason,
            console,
        }
    }
}

/// A running VMM. Dropping it kills the process.
#[derive(Debug)]
pub struct Vmm {
    process: HostProcess,
    pidfd: Arc<OwnedFd>,
    control: Control,
    quarters: Quarters,
    /// Where its cgroup is, and who removes it.
    cgroup: Option<cgroup::Carried>,
    /// As long as their threads read them.
    pipes: Pipes,
    ended: watch::Receiver<Option<End>>,
}

/// What a VMM says.
#[derive(Debug)]
struct Pipes {
    messages: Weak<PipeReader>,
    report: Weak<PipeReader>,
}

/// What goes along of a VMM when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    process: HostProcess,
    control: control::Carried,
    quarters: holder::Carried,
    cgroup: Option<cgroup::Carried>,
    messages: Option<CarriedFd>,
    report: Option<CarriedFd>,
}

impl Vmm {
    /// Starts the process.
    pub async fn launch(launch: Launch) -> Result<Self> {
        let (control, control_end) = Control::pair()?;
        let (messages, stderr) = io::pipe().map_err(host("make a pipe"))?;
        let (started, result) = oneshot::channel();
        thread::Builder::new()
            .name("vmm-start".to_owned())
            .spawn(move || {
                // Nobody waits any more: dropping it ends it.
                let _ = started.send(start(launch, control_end, stderr));
            })
            .map_err(host("start the thread of the VMM"))?;
        let started = result
            .await
            .map_err(|_| host("start the VMM")(io::Error::other("its thread ended")))??;
        let process = HostProcess::of(started.child.pid());
        let process = process.map_err(host("open the process of the VMM"))?;
        let entrance = started
            .cgroup
            .as_ref()
            .map(|cgroup| cgroup.entrance().try_clone());
        let entrance = entrance
            .transpose()
            .map_err(host("keep the way into the VMM's cgroup"))?;
        let quarters = Quarters::new(entrance, started.network);
        Vmm::watch(Watched {
            process,
            child: started.child,
            control,
            quarters,
            cgroup: started.cgroup,
            messages: Some(messages),
            report: Some(started.report),
        })
    }

    /// Has threads listen to it.
    fn watch(watched: Watched) -> Result<Self> {
        let Watched {
            process,
            mut child,
            control,
            quarters,
            cgroup,
            messages,
            report,
        } = watched;
        let pidfd = child.pidfd().map_err(host("open the process of the VMM"))?;
        let pidfd = Arc::new(pidfd);
        let (messages, report) = (messages.map(Arc::new), report.map(Arc::new));
        let weak =
            |pipe: &Option<Arc<PipeReader>>| pipe.as_ref().map_or_else(Weak::new, Arc::downgrade);
        let pipes = Pipes {
            messages: weak(&messages),
            report: weak(&report),
        };
        thread::Builder::new()
            .name("vmm-messages".to_owned())
            .spawn(move || messages.map(|messages| log_messages(&messages)))
            .map_err(host("read what the VMM says"))?;
        let carried = cgroup.as_ref().map(Cgroup::carry);
        let (end, ended) = watch::channel(None);
        let died = Arc::clone(&pidfd);
        thread::Builder::new()
            .name("vmm-parent".to_owned())
            .spawn(move || {
                let report = report.and_then(|report| read_report(report, &died));
                end.send_replace(Some(end_of(&mut child, report)));
                // Nobody waits for this but who waits for `gone`.
                drop(cgroup);
            })
            .map_err(host("start the thread of the VMM"))?;
        Ok(Vmm {
            process,
            pidfd,
            control,
            quarters,
            cgroup: carried,
            pipes,
            ended,
        })
    }

    /// Goes on with that of the program before this one.
    pub(crate) fn unpack(carried: Carried) -> Result<Self> {
        let failed = host("take over the VMM");
        let parts = || -> io::Result<_> {
            let child = Child::adopt(carried.process.pid)?;
            let control = Control::unpack(carried.control)?;
            let quarters = Quarters::unpack(carried.quarters)?;
            let entrance = quarters.entrance().map(Entrance::try_clone).transpose()?;
            let cgroup = carried
                .cgroup
                .map(|cgroup| Cgroup::unpack(cgroup, entrance.unwrap_or_default()));
            let pipe = |fd: CarriedFd| fd.take().map(PipeReader::from);
            Ok(Watched {
                process: carried.process,
                child,
                control,
                quarters,
                cgroup,
                messages: carried.messages.map(pipe).transpose()?,
                report: carried.report.map(pipe).transpose()?,
            })
        };
        Vmm::watch(parts().map_err(failed)?)
    }

    /// What goes along when the program changes; `None` while it is asked something.
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>> {
        let Some(control) = self.control.carry(bag)? else {
            return Ok(None);
        };
        let mut pipe = |pipe: &Weak<PipeReader>| pipe.upgrade().map(|pipe| bag.put(&pipe));
        Ok(Some(Carried {
            messages: pipe(&self.pipes.messages).transpose()?,
            report: pipe(&self.pipes.report).transpose()?,
            process: self.process,
            control,
            quarters: self.quarters.carry(bag)?,
            cgroup: self.cgroup.clone(),
        }))
    }

    /// The process, as the host numbers it.
    #[must_use]
    pub fn process(&self) -> HostProcess {
        self.process
    }

    /// Kills the VM. Always possible, needs no answer.
    pub fn kill(&self) {
        if let Err(error) = signal(&self.pidfd, Signal::KILL) {
            error!(%error, "cannot kill the VMM");
        }
    }

    /// Asks something of it.
    #[must_use]
    pub fn control(&self) -> &Control {
        &self.control
    }

    /// Where those live that stand for the guest's processes.
    #[must_use]
    pub fn quarters(&self) -> &Quarters {
        &self.quarters
    }

    /// How it ended, if it did.
    #[must_use]
    pub fn has_ended(&self) -> Option<End> {
        self.ended.borrow().clone()
    }

    /// Waits for the end.
    pub async fn ended(&self) -> End {
        let mut ended = self.ended.clone();
        let end = ended
            .wait_for(Option::is_some)
            .await
            .ok()
            .and_then(|end| end.clone());
        end.unwrap_or_else(|| End {
            status: FAILED,
            reason: "nobody watches the VMM".to_owned(),
            console: Vec::new(),
        })
    }

    /// Waits until nothing of it is left on the host.
    pub async fn gone(&self) {
        let mut ended = self.ended.clone();
        // The other end goes last.
        while ended.changed().await.is_ok() {}
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Finds the program for the shim's program: beside it, else where packages put
/// it. `PATH` is not searched.
pub fn find(shim: &Path) -> Result<PathBuf> {
    let beside = shim.parent().unwrap_or_else(|| Path::new("/usr/bin"));
    let places = [
        beside,
        Path::new("/usr/libexec/bulkhead"),
        Path::new("/usr/bin"),
    ];
    let found = places
        .iter()
        .map(|dir| dir.join(BINARY))
        .find(|path| path.is_file());
    found.ok_or_else(|| Error::Path {
        action: "find",
        path: beside.join(BINARY),
        source: io::ErrorKind::NotFound.into(),
    })
}

/// A process, and all by which it is watched.
struct Watched {
    process: HostProcess,
    child: Child,
    control: Control,
    quarters: Quarters,
    cgroup: Option<Cgroup>,
    messages: Option<PipeReader>,
    report: Option<PipeReader>,
}

/// Waits for the end of the process.
fn end_of(child: &mut Child, report: Option<Report>) -> End {
    match child.wait() {
        Ok(status) => End::of(status, report),
        Err(error) => End {
            status: FAILED,
            reason: format!("the end of the VMM cannot be seen: {error}"),
            console: Vec::new(),
        },
    }
}

/// A process that was started, and where it will report.
#[derive(Debug)]
struct Started {
    child: Child,
    report: PipeReader,
    /// Its network namespace, the pod's own.
    network: OwnedFd,
    cgroup: Option<Cgroup>,
}

/// Starts the process; the calling thread does nothing else in its life.
fn start(launch: Launch, control: OwnedFd, stderr: PipeWriter) -> Result<Started> {
    cores::take_cookie()?;
    // The new pid namespace is the child's; the others are this thread's as well.
    unshare(
        CloneFlags::CLONE_NEWPID
            | CloneFlags::CLONE_NEWIPC
            | CloneFlags::CLONE_NEWUTS
            | CloneFlags::CLONE_NEWNET,
    )
    .map_err(host("make the namespaces of the VMM"))?;
    let network = File::open("/proc/thread-self/ns/net")
        .map_err(host("open the network namespace of the VMM"))?;
    let (report, report_end) = io::pipe().map_err(host("make a pipe"))?;
    let fd = |fd: &dyn AsFd| Fd(fd.as_fd().as_raw_fd());
    let config = Config {
        kvm: fd(&launch.kvm),
        kernel: fd(&launch.kernel),
        initramfs: Some(fd(&launch.root)),
        cmdline: launch.cmdline,
        vcpus: launch.shape.first.vcpus,
        more_vcpus: launch.shape.more_vcpus(),
        memory_mib: launch.shape.first.memory_mib,
        more_memory_mib: launch.shape.more_memory_mib(),
        jail: Some(Jail {
            root: launch.share,
            // No two shims that live have the same pid.
            user: POD_USERS + std::process::id(),
        }),
        shares: launch.shares,
        vsock: Some(Vsock {
            guest_cid: GUEST_CID,
            listener: Some(fd(&launch.listener)),
            acceptor: Some(fd(&launch.acceptor)),
            ports: vec![AGENT_PORT],
        }),
        disks: Vec::new(),
        places: launch.shape.places,
        interfaces: launch.shape.interfaces,
        console: launch.console.then_some(Console {
            output: None,
            input: None,
        }),
        rng: true,
        notices: true,
        control: Some(fd(&control)),
        report: Some(fd(&report_end)),
    };
    let config_file = config_file(&config).map_err(host("write the VMM's configuration"))?;
    let kept: Vec<RawFd> = [
        config.kvm,
        config.kernel,
        fd(&launch.root),
        fd(&launch.listener),
        fd(&launch.acceptor),
        fd(&control),
        fd(&report_end),
        fd(&config_file),
    ]
    .map(|fd| fd.0)
    .to_vec();
    let arguments = [
        "--config-fd".to_owned(),
        config_file.as_raw_fd().to_string(),
    ];
    let program = Program {
        arguments: &arguments,
        kept: &kept,
        cgroup: launch.cgroup.as_ref().map(Cgroup::entrance),
        ..Program::new(&launch.binary, stderr.as_fd())
    };
    let child = Child::start(&program).map_err(|failure| match failure {
        Failure::Program(source) => Error::Path {
            action: "start",
            path: launch.binary.clone(),
            source,
        },
        Failure::Birth(source) => match &launch.cgroup {
            Some(cgroup) => Error::Path {
                action: "start the VMM in the cgroup",
                path: cgroup.path().to_owned(),
                source,
            },
            None => host("start the VMM")(source),
        },
    })?;
    // Each of these must have one holder, so that its close is seen.
    drop((
        launch.acceptor,
        launch.listener,
        control,
        report_end,
        stderr,
    ));
    set_oom_score(child.pid(), launch.oom_score_adj);
    Ok(Started {
        child,
        report,
        network: network.into(),
        cgroup: launch.cgroup,
    })
}

fn config_file(config: &Config) -> io::Result<File> {
    let memory = rustix::fs::memfd_create("vmm-config", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = File::from(memory);
    file.write_all(&serde_json::to_vec(config)?)?;
    file.rewind()?;
    Ok(file)
}

/// The VMM must not be as hard to kill as the shim.
fn set_oom_score(pid: i32, score: i32) {
    if let Err(error) = std::fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string()) {
        warn!(%error, score, "cannot set the VMM's oom_score_adj");
    }
}

/// Reads the report as it is written, until the process closes it, has said enough,
/// or has died, whoever holds the pipe open then.
fn read_report(pipe: Arc<PipeReader>, died: &OwnedFd) -> Option<Report> {
    rustix::io::ioctl_fionbio(&*pipe, true).ok()?;
    let mut text = Vec::new();
    loop {
        let mut fds = [
            PollFd::new(&*pipe, PollFlags::IN),
            PollFd::new(died, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(_) => return None,
        }
        let [_, died] = &fds;
        let is_last = !died.revents().is_empty();
        let room = MAX_REPORT.saturating_sub(text.len() as u64);
        match (&*pipe).take(room).read_to_end(&mut text) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && !is_last => {}
            // The end; as much as is read of a report; or all there will be.
            _ => break,
        }
    }
    // Whoever writes more learns that nobody reads it.
    drop(pipe);
    serde_json::from_slice(&text).ok()
}

/// Logs what the VMM writes on its standard error, and never stops reading it.
fn log_messages(mut pipe: &PipeReader) {
    let mut logged = 0;
    let mut buffer = [0; 4096];
    while let Ok(count @ 1..) = pipe.read(&mut buffer) {
        if logged > MAX_MESSAGES {
            continue;
        }
        logged += count as u64;
        let text = String::from_utf8_lossy(buffer.get(..count).unwrap_or_default()).into_owned();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            info!(message_of = "vmm", "{}", escape(line));
        }
    }
}

#[cfg(test)]
mod tests;
