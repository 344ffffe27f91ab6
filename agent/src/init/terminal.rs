//! The pseudo-terminal of a process, made in the container's own devpts.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use rustix::{
    fs::OFlags,
    pty::{OpenptFlags, ioctl_tiocgptpeer, unlockpt},
    termios::{Winsize, tcsetwinsize},
};

use super::{
    Doing, Error, Result,
    paths::Root,
    rootfs::{clone_tree, move_to},
};
use crate::spec::plan::ProcessPlan;

/// `DEVPTS_SUPER_MAGIC` of `linux/magic.h`.
const DEVPTS_SUPER_MAGIC: i64 = 0x1cd1;

/// Both ends of a terminal.
#[derive(Debug)]
pub(super) struct Terminal {
    /// For the agent.
    pub(super) master: OwnedFd,
    /// For the process.
    pub(super) slave: OwnedFd,
}

/// Makes the terminal that the process asks for; `None` if it asks for none.
pub(super) fn open(root: &Root, plan: &ProcessPlan) -> Result<Option<Terminal>> {
    let Some((columns, rows)) = plan.terminal else {
        return Ok(None);
    };
    const DOING: &str = "make a terminal in /dev/pts of the container";
    let flags = OFlags::RDWR | OFlags::NOCTTY;
    let master = root.open(Path::new("/dev/pts/ptmx"), flags).doing(DOING)?;
    if rustix::fs::fstatfs(&master).doing(DOING)?.f_type != DEVPTS_SUPER_MAGIC {
        return Err(Error::Refused {
            what: "/dev/pts of the container".into(),
            reason: "a process with a terminal needs a devpts there",
        });
    }
    unlockpt(&master).doing(DOING)?;
    // By ioctl, not by a path that means something else in another namespace.
    let flags = OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC;
    let slave = ioctl_tiocgptpeer(&master, flags).doing(DOING)?;
    if columns != 0 || rows != 0 {
        let size = Winsize {
            ws_col: columns,
            ws_row: rows,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).doing("set the terminal's size")?;
    }
    Ok(Some(Terminal { master, slave }))
}

/// The same for a container's first process, whose terminal is the console.
pub(super) fn open_for_container(root: &Root, plan: &ProcessPlan) -> Result<Option<Terminal>> {
    const DOING: &str = "mount the terminal on /dev/console";
    let terminal = open(root, plan)?;
    if let Some(terminal) = &terminal {
        let console = root.make_file(Path::new("/dev/console")).doing(DOING)?;
        let tree = clone_tree(terminal.slave.as_fd(), false).doing(DOING)?;
        move_to(&tree, &console).doing(DOING)?;
    }
    Ok(terminal)
}
