//! What every process of a container goes through last, whether it is the
//! first or a further one.

use std::{
    collections::HashSet,
    convert::Infallible,
    ffi::CString,
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::{CWD, Mode, OFlags, Uid},
    process::{Resource, getrlimit},
};

use super::{Doing, Error, Result, lookup, paths::Root, privileges, terminal::Terminal};
use crate::{
    channel::{Channel, Report},
    spec::plan::{ProcessPlan, Rlimit, Scheduler},
    sys,
};

/// The guest's `/proc`, which shows a process by its id in the guest and stays
/// reachable after the process has entered a container.
#[derive(Debug)]
pub(super) struct GuestProc(OwnedFd);

impl GuestProc {
    pub(super) fn open() -> Result<Self> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = rustix::fs::openat(CWD, "/proc", flags, Mode::empty());
        Ok(Self(directory.doing("open /proc of the guest")?))
    }

    /// Writes a file in one go, as the kernel wants it for its own files.
    pub(super) fn write(&self, path: &str, text: &str) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.0, path, flags, Mode::empty())?;
        let written = rustix::io::write(&file, text.as_bytes())?;
        if written == text.len() {
            Ok(())
        } else {
            Err(io::ErrorKind::WriteZero.into())
        }
    }

    /// Reads a file.
    pub(super) fn read(&self, path: &str) -> io::Result<String> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.0, path, flags, Mode::empty())?;
        io::read_to_string(File::from(file))
    }

    /// The agent is the last to be killed for want of memory; its children
    /// must not be, nor be able to make themselves so again: that takes the
    /// rights of the guest.
    pub(super) fn set_oom_score_adj(&self, pid: u32, value: i32) -> Result<()> {
        self.write(&format!("{pid}/oom_score_adj"), &value.to_string())
            .doing("set oom_score_adj")
    }
}

/// Becomes root of the user namespace that was just entered.
pub(super) fn become_root() -> Result<()> {
    privileges::set_ids(0, 0, &[]).doing("become root of the user namespace")
}

/// A session that is shared with nobody, and the keyring of the container.
pub(super) fn start_session(keyring: &str) -> Result<()> {
    const DOING: &str = "join the container's session keyring";
    rustix::process::setsid().doing("start a session")?;
    let keyring = CString::new(keyring).doing(DOING)?;
    sys::join_session_keyring(&keyring).doing(DOING)
}

/// In the helper: its copy may lower limits, but not raise them, once it is in a
/// user namespace of its own.
pub(super) fn raise_hard_limits(plan: &ProcessPlan) -> Result<()> {
    for limit in &plan.rlimits {
        sys::raise_hard_limit(limit.resource, limit.hard)
            .doing(format!("set resource limit {}", limit.resource))?;
    }
    Ok(())
}

/// From a process in its namespaces to the program, with a stop before it.
pub(super) fn become_program(
    channel: &Channel,
    plan: &ProcessPlan,
    stdio: &[OwnedFd; 3],
    terminal: Option<Terminal>,
    root: &Root,
) -> Result<Infallible> {
    sys::end_on_signals();
    let master = take_stdio(plan, stdio, terminal)?;
    set_attributes(plan)?;
    enter_cwd(root, &plan.cwd)?;
    let env = match plan.hook {
        Some(_) => plan.env.clone(),
        None => environment(&plan.env, || lookup::home(root, plan.uid)),
    };
    if !plan.no_new_privileges {
        // Loading a filter takes a capability that may be dropped next.
        load_seccomp(plan)?;
    }
    privileges::apply(plan)?;
    let name = match &plan.hook {
        Some(path) => path.to_string_lossy(),
        None => plan.args[0].as_str().into(),
    };
    let program = lookup::executable(&name, &env)?;
    let args = c_strings(&plan.args)?;
    let env = c_strings(&env)?;
    sys::close_on_exec_from(3).doing("mark descriptors")?;

    channel
        .report(&Report::Ready, master.as_ref().map(AsFd::as_fd))
        .map_err(|_| Error::Gone)?;
    drop(master);
    if !channel.wait_for_start() {
        return Err(Error::Gone);
    }

    sys::reset_signals().doing("reset signals")?;
    if plan.no_new_privileges {
        load_seccomp(plan)?;
    }
    let Err(errno) = nix::unistd::execve(&program, &args, &env);
    Err(lookup::error(&name, &io::Error::from(errno)))
}

/// Puts the streams into place; returns the agent's end of the terminal.
fn take_stdio(
    plan: &ProcessPlan,
    stdio: &[OwnedFd; 3],
    terminal: Option<Terminal>,
) -> Result<Option<OwnedFd>> {
    const DOING: &str = "set up the standard streams";
    let [stdin, stdout, stderr] = match &terminal {
        Some(Terminal { slave, .. }) => {
            rustix::process::ioctl_tiocsctty(slave)
                .doing("make the terminal the controlling one")?;
            rustix::fs::fchown(slave, Some(Uid::from_raw(plan.uid)), None).doing(DOING)?;
            [slave; 3]
        }
        None => [&stdio[0], &stdio[1], &stdio[2]],
    };
    rustix::stdio::dup2_stdin(stdin).doing(DOING)?;
    rustix::stdio::dup2_stdout(stdout).doing(DOING)?;
    rustix::stdio::dup2_stderr(stderr).doing(DOING)?;
    Ok(terminal.map(|terminal| terminal.master))
}

fn set_attributes(plan: &ProcessPlan) -> Result<()> {
    /// What a process gets that asks for no limit: soft, and at most, hard.
    const OPEN_FILES: (u64, u64) = (1_024, 524_288);
    if let Some(umask) = plan.umask {
        rustix::process::umask(Mode::from_raw_mode(umask));
    } else {
        rustix::process::umask(Mode::from_raw_mode(0o022));
    }
    if let Some(persona) = plan.personality {
        sys::set_personality(persona).doing("set the personality")?;
    }
    if let Some(priority) = plan.io_priority {
        sys::set_io_priority(priority).doing("set the I/O priority")?;
    }
    if let Some(scheduler) = &plan.scheduler {
        set_scheduler(scheduler)?;
    }
    let asked = |limit: &Rlimit| limit.resource == libc::RLIMIT_NOFILE;
    if !plan.rlimits.iter().any(asked) {
        let (soft, hard_max) = OPEN_FILES;
        let agents = getrlimit(Resource::Nofile).maximum;
        let hard = agents.map_or(hard_max, |agents| agents.min(hard_max));
        sys::set_rlimit(libc::RLIMIT_NOFILE, soft.min(hard), hard).doing("set RLIMIT_NOFILE")?;
    }
    for limit in &plan.rlimits {
        sys::set_rlimit(limit.resource, limit.soft, limit.hard)
            .doing(format!("set resource limit {}", limit.resource))?;
    }
    Ok(())
}

/// Deadlines are a promise that the processors may not be able to keep: without one
/// the program runs all the same.
fn set_scheduler(scheduler: &Scheduler) -> Result<()> {
    match sys::set_scheduler(scheduler) {
        Err(_) if scheduler.policy == Scheduler::DEADLINE => Ok(()),
        result => result.doing("set the scheduling policy"),
    }
}

fn enter_cwd(root: &Root, cwd: &Path) -> Result<()> {
    let doing = format!("chdir to cwd ({cwd:?}) set in config.json");
    let directory = root
        .open(cwd, OFlags::PATH | OFlags::DIRECTORY)
        .doing(&doing)?;
    rustix::process::fchdir(directory).doing(&doing)
}

fn load_seccomp(plan: &ProcessPlan) -> Result<()> {
    match &plan.seccomp {
        None => Ok(()),
        Some(seccomp) => sys::load_seccomp(seccomp).doing("load the system call filter"),
    }
}

/// The environment as asked for, with `HOME` if that is missing or empty. Of
/// several values of a name the last counts and is the only one: programs differ
/// in which one they take.
fn environment(env: &[String], home: impl FnOnce() -> String) -> Vec<String> {
    let name = |entry: &String| entry.split_once('=').map(|(name, _)| name.to_owned());
    let mut seen = HashSet::new();
    let mut env: Vec<_> = env
        .iter()
        .rev()
        .filter(|entry| name(entry).is_none_or(|name| seen.insert(name)))
        .cloned()
        .collect();
    env.reverse();
    env.retain(|entry| entry != "HOME=");
    if !env.iter().any(|entry| entry.starts_with("HOME=")) {
        env.push(format!("HOME={}", home()));
    }
    env
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>> {
    let convert = |text: &String| CString::new(text.as_bytes());
    texts
        .iter()
        .map(convert)
        .collect::<std::result::Result<_, _>>()
        .doing("pass the arguments")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_values_of_a_name_the_last_is_left() {
        let check = |env: &[&str], expected: &[&str]| {
            let env: Vec<_> = env.iter().map(ToString::to_string).collect();
            assert_eq!(environment(&env, || "/h".into()), expected, "{env:?}");
        };
        check(&[], &["HOME=/h"]);
        check(&["HOME=/x", "A=1"], &["HOME=/x", "A=1"]);
        check(&["HOME=/x", "HOME="], &["HOME=/h"]);
        check(
            &["PATH=/a", "A=1", "PATH=/b", "HOME=/x", "A="],
            &["PATH=/b", "HOME=/x", "A="],
        );
        check(
            &["B", "HOME=/x", "B", "B=1=2"],
            &["B", "HOME=/x", "B", "B=1=2"],
        );
    }
}
