//! The first process of a container.

use std::{convert::Infallible, path::Path};

use rustix::fs::{Mode, OFlags};

use super::{
    Doing, Helper, Result, clone_and_run, clone_helper, devices, mounts,
    paths::Root,
    process::{self, GuestProc},
    rootfs, terminal,
};
use crate::{
    channel::{Channel, Fds},
    spec::plan::{ContainerPlan, IdMap, Namespace, TimeOffset},
    sys,
};

/// In the helper: clones the container's init.
pub(super) fn run(
    channel: &Channel,
    plan: &ContainerPlan,
    keyring: &str,
    fds: &Fds,
) -> Result<Helper> {
    let proc = GuestProc::open()?;
    let own = join_shared_namespaces(plan)?;
    if let Some(offsets) = &plan.namespaces.time {
        own_time_namespace(&proc, offsets)?;
    }
    process::raise_hard_limits(&plan.process)?;
    clone_and_run(
        channel,
        || clone_helper(own, Some(&fds.cgroup)),
        |pid| prepare(&proc, pid, plan),
        || container(channel, plan, keyring, fds, &proc).map(Helper::from),
    )
}

/// In the helper: what root of a user namespace of its own may not do.
fn prepare(proc: &GuestProc, pid: u32, plan: &ContainerPlan) -> Result<()> {
    proc.set_oom_score_adj(pid, plan.process.oom_score_adj)?;
    // The network is that of the guest.
    write_sysctls(proc, plan, |path| path.starts_with("net"))?;
    write_id_maps(proc, pid, plan)
}

/// Every step of the container's init, in order.
fn container(
    channel: &Channel,
    plan: &ContainerPlan,
    keyring: &str,
    fds: &Fds,
    proc: &GuestProc,
) -> Result<Infallible> {
    become_root(plan)?;
    process::start_session(keyring)?;
    own_cgroup_namespace()?;
    rustix::process::umask(Mode::empty());

    let root = rootfs::attach(&plan.rootfs)?;
    let readonly_later = mounts::mount_all(&root, &plan.mounts, plan.namespaces.own_user)?;
    devices::make_all(&root, &plan.devices)?;
    make_cwd(&root, &plan.process.cwd)?;
    let terminal = terminal::open_for_container(&root, &plan.process)?;
    mounts::make_readonly(readonly_later)?;
    set_names(plan)?;
    write_sysctls(proc, plan, |path| !path.starts_with("net"))?;

    rootfs::enter(&root)?;
    drop(root);
    let root = Root::of_this_process().doing("open the new root")?;
    rootfs::make_paths_readonly(&root, &plan.readonly_paths)?;
    rootfs::mask_paths(&root, &plan.masked_paths)?;
    if plan.readonly_rootfs {
        rootfs::make_readonly(&root)?;
    }
    process::become_program(channel, &plan.process, &fds.stdio, terminal, &root)
}

/// Returns `CLONE_NEW*` for what the container gets of its own. Namespaces of
/// other containers are joined here, since only a child enters a pid namespace.
fn join_shared_namespaces(plan: &ContainerPlan) -> Result<i32> {
    let mut own = libc::CLONE_NEWNS;
    if plan.namespaces.own_user {
        own |= libc::CLONE_NEWUSER;
    }
    let namespaces = [
        (&plan.namespaces.pid, libc::CLONE_NEWPID),
        (&plan.namespaces.ipc, libc::CLONE_NEWIPC),
        (&plan.namespaces.uts, libc::CLONE_NEWUTS),
    ];
    for (namespace, flag) in namespaces {
        match namespace {
            Namespace::Own => own |= flag,
            Namespace::Join(path) => join(path, flag)?,
        }
    }
    Ok(own)
}

fn join(path: &Path, flag: i32) -> Result<()> {
    let doing = format!("join the namespace {}", path.display());
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let namespace = rustix::fs::open(path, flags, Mode::empty()).doing(&doing)?;
    sys::join_namespaces(namespace, flag).doing(&doing)
}

/// Its offsets can be set until a process is in it: that is the helper's child.
fn own_time_namespace(proc: &GuestProc, offsets: &[TimeOffset]) -> Result<()> {
    sys::unshare_time_namespace().doing("make a time namespace")?;
    if offsets.is_empty() {
        return Ok(());
    }
    let line =
        |offset: &TimeOffset| format!("{} {} {}\n", offset.clock, offset.secs, offset.nanosecs);
    let text: String = offsets.iter().map(line).collect();
    proc.write("self/timens_offsets", &text)
        .doing("set the offsets of the clocks")
}

fn write_id_maps(proc: &GuestProc, pid: u32, plan: &ContainerPlan) -> Result<()> {
    for (file, maps) in [("uid_map", &plan.uid_maps), ("gid_map", &plan.gid_maps)] {
        if maps.is_empty() {
            continue;
        }
        let line = |map: &IdMap| format!("{} {} {}\n", map.container_id, map.guest_id, map.size);
        let text: String = maps.iter().map(line).collect();
        proc.write(&format!("{pid}/{file}"), &text)
            .doing(format!("write the {file}"))?;
    }
    Ok(())
}

/// In a user namespace of its own the process is nobody until it says who.
fn become_root(plan: &ContainerPlan) -> Result<()> {
    if plan.namespaces.own_user {
        process::become_root()
    } else {
        Ok(())
    }
}

fn own_cgroup_namespace() -> Result<()> {
    sys::unshare_cgroup_namespace().doing("make a cgroup namespace")
}

fn make_cwd(root: &Root, cwd: &Path) -> Result<()> {
    // One that exists but is no directory is found out when it is entered.
    match root.open(cwd, OFlags::PATH) {
        Ok(_) => Ok(()),
        Err(_) => root
            .make_dir(cwd)
            .map(drop)
            .doing(format!("make the working directory {}", cwd.display())),
    }
}

fn set_names(plan: &ContainerPlan) -> Result<()> {
    if let Some(name) = &plan.hostname {
        rustix::system::sethostname(name.as_bytes()).doing("set the host name")?;
    }
    if let Some(name) = &plan.domainname {
        rustix::system::setdomainname(name.as_bytes()).doing("set the domain name")?;
    }
    Ok(())
}

fn write_sysctls(
    proc: &GuestProc,
    plan: &ContainerPlan,
    which: impl Fn(&Path) -> bool,
) -> Result<()> {
    for (path, value) in plan.sysctls.iter().filter(|(path, _)| which(path)) {
        let path = path.display();
        proc.write(&format!("sys/{path}"), value)
            .doing(format!("set the sysctl {path}"))?;
    }
    Ok(())
}
