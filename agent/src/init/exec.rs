//! A further process in a running container.

use std::{
    cell::Cell,
    convert::Infallible,
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat, openat2};

use super::{
    Doing, Helper, Result, clone_and_run, clone_helper,
    paths::Root,
    process::{self, GuestProc},
    terminal,
};
use crate::{
    channel::{Channel, Fds, Place},
    spec::plan::ProcessPlan,
    sys::{self, Cloned},
};

/// Namespaces that every container shares with none or that do no harm to
/// enter again: all but pid (joined before) and user.
const NAMESPACES: i32 = libc::CLONE_NEWNS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWNET
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWTIME;

/// In the helper: clones the process into the container's cgroup and pid
/// namespace.
pub(super) fn run(
    channel: &Channel,
    plan: &ProcessPlan,
    place: &Place,
    fds: &Fds,
) -> Result<Helper> {
    let proc = GuestProc::open()?;
    let container = first_process(fds)?;
    sys::join_namespaces(container, libc::CLONE_NEWPID)
        .doing("join the container's pid namespace")?;
    process::raise_hard_limits(plan)?;
    let cgroup = Cell::new(None);
    clone_and_run(
        channel,
        || clone_into_container(&proc, place, fds, &cgroup),
        |pid| prepare(&proc, pid, plan.oom_score_adj, cgroup.take()),
        || steps(channel, plan, place, fds, container).map(Helper::from),
    )
}

/// The container's first process.
pub(super) fn first_process(fds: &Fds) -> Result<&OwnedFd> {
    let found = fds.container.as_ref().ok_or(io::ErrorKind::InvalidInput);
    found.doing("find the container's first process")
}

/// Clones the helper into the container's cgroup. Where that is not possible, it
/// leaves in `later` the cgroup into which the process is to be moved.
pub(super) fn clone_into_container(
    proc: &GuestProc,
    place: &Place,
    fds: &Fds,
    later: &Cell<Option<OwnedFd>>,
) -> io::Result<Cloned> {
    let mut cgroup = fds.cgroup.try_clone()?;
    let mut cloned = clone_helper(0, Some(&cgroup));
    if cloned.as_ref().is_err_and(holds_no_processes) {
        cgroup = cgroup_of_init(proc, place, &cgroup)?;
        cloned = clone_helper(0, Some(&cgroup));
    }
    match cloned {
        // The container is at its limit of processes, which holds for what it
        // makes itself. Whoever wants to look after it must get in.
        Err(e) if e.raw_os_error() == Some(libc::EAGAIN) => {
            later.set(Some(cgroup));
            clone_helper(0, None)
        }
        cloned => cloned,
    }
}

/// Whether a cgroup has controllers for its children, or is threaded: systemd and
/// container engines in a container do that and move all processes below it.
fn holds_no_processes(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EOPNOTSUPP))
}

/// The cgroup, below the container's, that its first process has moved to.
fn cgroup_of_init(proc: &GuestProc, place: &Place, container: &OwnedFd) -> io::Result<OwnedFd> {
    let text = proc.read(&format!("{}/cgroup", place.init))?;
    // It may have moved to the container's own cgroup by now: that is "".
    let below = below_container(&text, &place.cgroup)
        .map(|below| Path::new(".").join(below))
        .ok_or_else(|| io::Error::other("its first process is in no cgroup of the container"))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let how = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    Ok(openat2(container, below, flags, Mode::empty(), how)?)
}

/// What follows the container's cgroup in a line `0::PATH` of `/proc/PID/cgroup`.
fn below_container<'a>(text: &'a str, container: &Path) -> Option<&'a Path> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::"))?;
    let path = Path::new(path);
    let container: Vec<_> = container.iter().collect();
    // The first place counts: the container names what is below its own.
    let mut rest = path.iter();
    loop {
        let here = rest.as_path();
        if here
            .iter()
            .take(container.len())
            .eq(container.iter().copied())
        {
            return here
                .strip_prefix(container.iter().collect::<PathBuf>())
                .ok();
        }
        rest.next()?;
    }
}

/// In the helper: what needs the rights of the guest.
pub(super) fn prepare(
    proc: &GuestProc,
    pid: u32,
    oom_score_adj: i32,
    cgroup: Option<OwnedFd>,
) -> Result<()> {
    proc.set_oom_score_adj(pid, oom_score_adj)?;
    let Some(cgroup) = cgroup else {
        return Ok(());
    };
    const DOING: &str = "move the process into the container's cgroup";
    let flags = OFlags::WRONLY | OFlags::CLOEXEC;
    let procs = openat(cgroup, "cgroup.procs", flags, Mode::empty()).doing(DOING)?;
    rustix::io::write(procs, pid.to_string().as_bytes())
        .map(drop)
        .doing(DOING)
}

/// Every step of the process, in order.
fn steps(
    channel: &Channel,
    plan: &ProcessPlan,
    place: &Place,
    fds: &Fds,
    container: &OwnedFd,
) -> Result<Infallible> {
    join(container, place.own_user)?;
    if place.own_user {
        process::become_root()?;
    }
    process::start_session(&place.keyring)?;
    let root = Root::of_this_process().doing("open the container's root")?;
    let terminal = terminal::open(&root, plan)?;
    process::become_program(channel, plan, &fds.stdio, terminal, &root)
}

fn join(container: &OwnedFd, own_user: bool) -> Result<()> {
    // The kernel refuses to enter the user namespace that one is in.
    let user = if own_user { libc::CLONE_NEWUSER } else { 0 };
    sys::join_namespaces(container, NAMESPACES | user).doing("join the container's namespaces")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup_of_a_first_process_is_one_below_the_containers() {
        let check = |text: &str, expected: Option<&str>| {
            let found = below_container(text, Path::new("containers/c1"));
            assert_eq!(found, expected.map(Path::new), "{text}");
        };
        check("0::/containers/c1/init.scope\n", Some("init.scope"));
        check("12:pids:/x\n0::/containers/c1/a/b\n", Some("a/b"));
        check("0::/outer/containers/c1/a\n", Some("a"));
        // A container that imitates the names of its own place.
        check(
            "0::/containers/c1/containers/c1/a\n",
            Some("containers/c1/a"),
        );
        check("0::/containers/c1\n", Some(""));
        check("0::/containers/c11/a\n", None);
        check("0::/agent\n", None);
        check("1:name=systemd:/containers/c1/a\n", None);
        check("", None);
    }
}
