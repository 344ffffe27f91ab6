//! Maps of ids for mounts: a user namespace that exists for the sake of its maps.
//!
//! The kernel takes the maps of a mount from a user namespace. One comes to be with a
//! process in it, which may go as soon as somebody else holds the namespace.

use std::{fmt::Write as _, fs, io, os::fd::OwnedFd};

use bulkhead_agent_api::spec::plan::IdMap;
use nix::{
    sched::{CloneFlags, clone},
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
    unistd::Pid,
};
use rustix::process::set_parent_process_death_signal;

/// A user namespace in which the ids of files on disk are those of its inside, and the
/// ids in a mount those of its outside.
pub(crate) fn namespace(uids: &[IdMap], gids: &[IdMap]) -> io::Result<OwnedFd> {
    let inside = Inside::start()?;
    let file = |name: &str| format!("/proc/{}/{name}", inside.0);
    fs::write(file("uid_map"), lines(uids))?;
    fs::write(file("gid_map"), lines(gids))?;
    Ok(fs::File::open(file("ns/user"))?.into())
}

fn lines(maps: &[IdMap]) -> String {
    let mut lines = String::new();
    for map in maps {
        let _ = writeln!(lines, "{} {} {}", map.container_id, map.guest_id, map.size);
    }
    lines
}

/// A process that waits in a user namespace of its own. Dropping it ends it.
#[derive(Debug)]
struct Inside(Pid);

impl Inside {
    fn start() -> io::Result<Self> {
        const STACK: usize = 64 << 10;
        let mut stack = vec![0; STACK];
        let wait = || {
            let killed = Some(rustix::process::Signal::KILL);
            if set_parent_process_death_signal(killed).is_ok() {
                loop {
                    nix::unistd::pause();
                }
            }
            1
        };
        let flags = CloneFlags::CLONE_NEWUSER;
        // SAFETY: without CLONE_VM the child has a copy of all memory, the stack
        // included; it makes system calls only until it is killed.
        let pid = unsafe { clone(Box::new(wait), &mut stack, flags, Some(libc::SIGCHLD)) }?;
        Ok(Inside(pid))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = kill(self.0, Signal::SIGKILL);
        let _ = waitpid(self.0, None);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_is_one_line_a_range() {
        let map = |container_id, guest_id, size| IdMap {
            container_id,
            guest_id,
            size,
        };
        assert_eq!(
            lines(&[map(0, 100_000, 10), map(10, 5, 1)]),
            "0 100000 10\n10 5 1\n"
        );
        assert_eq!(lines(&[]), "");
    }
}
