//! A further process in a running container.

use std::{convert::Infallible, os::fd::OwnedFd};

use super::{
    Doing, Helper, Result, clone_and_run,
    paths::Root,
    process::{self, GuestProc},
    terminal,
};
use crate::{
    channel::{Channel, Fds},
    spec::plan::ProcessPlan,
    sys,
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
    own_user: bool,
    fds: &Fds,
) -> Result<Helper> {
    let proc = GuestProc::open()?;
    let Some(container) = &fds.container else {
        return Err(std::io::Error::from(std::io::ErrorKind::InvalidInput))
            .doing("find the container's first process");
    };
    sys::join_namespaces(container, libc::CLONE_NEWPID)
        .doing("join the container's pid namespace")?;
    clone_and_run(
        channel,
        fds,
        0,
        |_| Ok(()),
        || steps(channel, plan, own_user, fds, container, &proc),
    )
}

/// Every step of the process, in order.
fn steps(
    channel: &Channel,
    plan: &ProcessPlan,
    own_user: bool,
    fds: &Fds,
    container: &OwnedFd,
    proc: &GuestProc,
) -> Result<Infallible> {
    proc.set_oom_score_adj(plan.oom_score_adj)?;
    join(container, own_user)?;
    if own_user {
        process::become_root()?;
    }
    process::start_session()?;
    let root = Root::of_this_process().doing("open the container's root")?;
    let terminal = terminal::open(&root, plan)?;
    process::become_program(channel, plan, &fds.stdio, terminal, &root)
}

fn join(container: &OwnedFd, own_user: bool) -> Result<()> {
    // The kernel refuses to enter the user namespace that one is in.
    let user = if own_user { libc::CLONE_NEWUSER } else { 0 };
    sys::join_namespaces(container, NAMESPACES | user).doing("join the container's namespaces")
}
