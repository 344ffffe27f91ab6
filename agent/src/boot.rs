//! The guest from the kernel's hands to the agent's service.
//!
//! One step a line; each must succeed. Whatever ends here, well or badly, ends
//! with the power off: a guest without its agent is of no use, and the host
//! takes the end of the machine as the end of the pod. The kernel's log gets
//! the reason.
//!
//! The initial root file system cannot be pivoted away from, so the agent moves
//! onto a tmpfs first; its own executable stays where it was, out of reach.

use std::{
    fs, io,
    os::fd::{AsRawFd, IntoRawFd},
    panic,
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_api::{
    AGENT_PORT, PRIVATE_DIR, PRIVATE_TAG, SHARE_DIR, SHARE_TAG, SOCKETS_DIR, STREAM_PORT,
};
use futures::{Stream, stream};
use rustix::{
    fs::{Mode, OFlags},
    mount::{MountFlags, mount, mount_move},
    process::{chdir, chroot, getpid},
    system::{RebootCommand, reboot},
};
use tokio_vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockAddr, VsockListener, VsockStream};

use crate::{
    baseline::{self, Memory},
    container::Config,
    rpc::{self, End},
    size::Machine,
    sys,
};

/// The agent's own cgroup, and the parent of those of containers.
const AGENT_CGROUP: &str = "/sys/fs/cgroup/agent";
const CONTAINER_CGROUPS: &str = "/sys/fs/cgroup/containers";

/// A process's own executable, wherever it is.
const SELF: &str = "/proc/self/exe";

/// Why the guest did not come up.
#[derive(Debug, thiserror::Error)]
enum Error {
    #[error("Cannot {doing}: {source}")]
    Step { doing: String, source: io::Error },
    #[error("The agent's service failed: {0}")]
    Service(#[from] crate::error::Error),
}

type Result<T> = std::result::Result<T, Error>;

trait Doing<T> {
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|e| Error::Step {
            doing: what.into(),
            source: e.into(),
        })
    }
}

/// Boots the guest and serves the host; returns, with an exit code, only if this
/// is not a guest.
pub fn main() -> i32 {
    if !getpid().is_init() {
        eprintln!("bulkhead-agent is the first process of a guest: it cannot run otherwise");
        return 1;
    }
    // A panic ends PID 1 and so makes the kernel panic: the log has the reason.
    panic::set_hook(Box::new(|reason| log(Level::Error, &reason.to_string())));
    match run() {
        Ok(End::Shutdown) => log(Level::Info, "Shut down by the host"),
        Ok(End::HostGone) => log(Level::Info, "The host's connection has ended"),
        Err(error) => log(Level::Error, &error.to_string()),
    }
    rustix::fs::sync();
    // If even this fails, the end of PID 1 makes the kernel panic.
    let _ = reboot(RebootCommand::PowerOff);
    1
}

fn run() -> Result<End> {
    move_to_tmpfs()?;
    mount_kernel_trees()?;
    open_standard_streams()?;
    protect_from_oom_killer()?;
    let memory = Memory::of_this_machine();
    set_baseline(memory)?;
    raise_limits()?;
    set_up_cgroups()?;
    let machine = Machine::new(memory, Path::new(CONTAINER_CGROUPS));
    machine.limit_containers(memory)?;
    bring_up_loopback()?;
    mount_share()?;
    close_root()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .doing("start the runtime")?;
    runtime.block_on(serve(machine))
}

fn move_to_tmpfs() -> Result<()> {
    const ROOT: &str = "/bulkhead";
    const DOING: &str = "move to a tmpfs root";
    rustix::process::umask(Mode::empty());
    make_dir(ROOT)?;
    mount(
        "tmpfs",
        ROOT,
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=755",
    )
    .doing(DOING)?;
    chdir(ROOT).doing(DOING)?;
    mount_move(".", "/").doing(DOING)?;
    chroot(".").doing(DOING)?;
    chdir("/").doing(DOING)
}

fn mount_kernel_trees() -> Result<()> {
    let quiet = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount_at("proc", "/proc", "proc", quiet, c"")?;
    mount_at("sysfs", "/sys", "sysfs", quiet, c"")?;
    mount_at(
        "devtmpfs",
        "/dev",
        "devtmpfs",
        MountFlags::NOSUID,
        c"mode=755",
    )?;
    // A container never changes the limits of its own cgroup, nor moves a process
    // out of it, whatever its rights.
    mount_at(
        "cgroup2",
        "/sys/fs/cgroup",
        "cgroup2",
        quiet,
        c"nsdelegate,memory_recursiveprot",
    )?;
    mount_at(
        "tmpfs",
        "/run",
        "tmpfs",
        MountFlags::NOSUID | MountFlags::NODEV,
        c"mode=755",
    )
}

/// The kernel gives no streams to PID 1 without a console; until here nothing
/// has opened a file, so these are descriptors 0, 1 and 2 unless it has.
fn open_standard_streams() -> Result<()> {
    const DOING: &str = "open the standard streams";
    loop {
        let null = rustix::fs::open("/dev/null", OFlags::RDWR, Mode::empty()).doing(DOING)?;
        if null.as_raw_fd() > 2 {
            return Ok(());
        }
        // It stays open for as long as the agent lives.
        let _ = null.into_raw_fd();
    }
}

/// The share of the pod, under both policies; a guest that was started without
/// one has none.
fn mount_share() -> Result<()> {
    make_dir("/run/bulkhead")?;
    if mount_one_share(SHARE_TAG, SHARE_DIR)? {
        mount_one_share(PRIVATE_TAG, PRIVATE_DIR)?;
        let written_back = write_back_freely(PRIVATE_DIR);
        if let Err(error) = written_back {
            log(Level::Info, &error.to_string());
        }
    }
    Ok(())
}

/// Whether there is a share of this name. What a device node on it leads to is the
/// guest's, and each container's list of devices says whether it may be used.
fn mount_one_share(tag: &str, dir: &str) -> Result<bool> {
    make_dir(dir)?;
    match mount(tag, dir, "virtiofs", MountFlags::empty(), c"") {
        Err(rustix::io::Errno::INVAL | rustix::io::Errno::NODEV) => {
            log(Level::Info, &format!("There is no share {tag:?}"));
            Ok(false)
        }
        result => result
            .map(|()| true)
            .doing(format!("mount the share {tag:?}")),
    }
}

/// Lets programs dirty as much memory that maps files of a share as with any other
/// file system. Linux trusts no file server and gives each a hundredth.
fn write_back_freely(dir: &str) -> Result<()> {
    let device = rustix::fs::stat(dir)
        .doing(format!("look at {dir}"))?
        .st_dev;
    let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
    let settings = format!("/sys/class/bdi/{major}:{minor}");
    write(&format!("{settings}/strict_limit"), "0")?;
    write(&format!("{settings}/max_ratio"), "100")
}

fn mount_at(
    source: &str,
    at: &str,
    fs: &str,
    flags: MountFlags,
    data: &std::ffi::CStr,
) -> Result<()> {
    // /sys/fs/cgroup is there, the others are not.
    if !Path::new(at).exists() {
        make_dir(at)?;
    }
    mount(source, at, fs, flags, data).doing(format!("mount {at}"))
}

fn make_dir(path: &str) -> Result<()> {
    rustix::fs::mkdir(path, Mode::from_raw_mode(0o755)).doing(format!("make the directory {path}"))
}

fn protect_from_oom_killer() -> Result<()> {
    write("/proc/self/oom_score_adj", "-1000")
}

fn set_baseline(memory: Memory) -> Result<()> {
    baseline::apply(memory).map_err(|(doing, source)| Error::Step { doing, source })
}

/// Open files are enough for the streams of all processes; those get their own
/// limit. Processes are counted by cgroups: that many of one user, which the kernel
/// derives from the memory, would be a limit that nobody asked for.
fn raise_limits() -> Result<()> {
    const OPEN_FILES: u64 = 65_536;
    const HARD: u64 = 1_048_576;
    sys::set_rlimit(libc::RLIMIT_NOFILE, OPEN_FILES, HARD)
        .doing("raise the limit of open files")?;
    sys::set_rlimit(libc::RLIMIT_NPROC, libc::RLIM_INFINITY, libc::RLIM_INFINITY)
        .doing("raise the limit of processes")
}

/// The agent leaves the root cgroup; containers get every controller there is.
fn set_up_cgroups() -> Result<()> {
    make_dir(AGENT_CGROUP)?;
    make_dir(CONTAINER_CGROUPS)?;
    write(&format!("{AGENT_CGROUP}/cgroup.procs"), "0")?;
    for cgroup in ["/sys/fs/cgroup", CONTAINER_CGROUPS] {
        let available = format!("{cgroup}/cgroup.controllers");
        let available = fs::read_to_string(&available).doing(format!("read {available}"))?;
        let enable: Vec<_> = available
            .split_whitespace()
            .map(|name| format!("+{name}"))
            .collect();
        write(
            &format!("{cgroup}/cgroup.subtree_control"),
            &enable.join(" "),
        )?;
    }
    Ok(())
}

/// Nothing of the guest's root is ever written again.
fn close_root() -> Result<()> {
    rustix::mount::mount_remount(
        "/",
        MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV,
        "",
    )
    .doing("make the root read-only")
}

fn bring_up_loopback() -> Result<()> {
    sys::bring_up_interface(c"lo").doing("bring up the loopback interface")
}

async fn serve(machine: Machine) -> Result<End> {
    // The host may connect a stream as soon as it has been greeted.
    let streams = VsockListener::bind(VsockAddr::new(VMADDR_CID_ANY, STREAM_PORT))
        .doing(format!("listen on vsock port {STREAM_PORT}"))?;
    let host = VsockStream::connect(VsockAddr::new(VMADDR_CID_HOST, AGENT_PORT))
        .await
        .doing(format!("connect to the host's vsock port {AGENT_PORT}"))?;
    let config = Config {
        helper: SELF.into(),
        cgroups: CONTAINER_CGROUPS.into(),
        shares: shares(),
        sockets: SOCKETS_DIR.into(),
        machine: Some(Arc::new(machine)),
    };
    Ok(rpc::serve(config, host, from_host(streams)).await?)
}

/// What containers write to is with the host once these are synchronised; a guest that
/// was started without a share has none.
fn shares() -> Vec<PathBuf> {
    let shares = [SHARE_DIR, PRIVATE_DIR].map(PathBuf::from);
    shares.into_iter().filter(|share| share.exists()).collect()
}

/// Only the host brings streams. Our kernel has no vsock within the guest; by that
/// of another one a container could connect.
fn from_host(listener: VsockListener) -> impl Stream<Item = io::Result<VsockStream>> {
    stream::unfold(listener, |listener| async {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) if peer.cid() == VMADDR_CID_HOST => {
                    return Some((Ok(stream), listener));
                }
                Ok(_) => {}
                Err(e) => return Some((Err(e), listener)),
            }
        }
    })
}

fn write(path: &str, text: &str) -> Result<()> {
    fs::write(path, text).doing(format!("write {text:?} to {path}"))
}

#[derive(Clone, Copy)]
enum Level {
    Error = 3,
    Info = 6,
}

/// A line in the kernel's log, or where there is none, nowhere.
fn log(level: Level, text: &str) {
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    if let Ok(kmsg) = rustix::fs::open("/dev/kmsg", flags, Mode::empty()) {
        let line = format!("<{}>bulkhead-agent: {text}\n", level as u8);
        let _ = rustix::io::write(kmsg, line.as_bytes());
    }
}
