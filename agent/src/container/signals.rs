//! Signals to containers and their processes: needs no lock that another request holds
//! while it waits.

use super::{Containers, arguments::check_signal};
use crate::{
    error::{Doing, Error},
    sys,
};

impl Containers {
    /// Sends a signal to one process.
    pub fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Result<(), Error> {
        let signal = check_signal(signal)?;
        let process = self.container(id)?.process(exec_id)?;
        process.check_alive()?;
        match sys::send_signal(&process.pidfd, signal) {
            Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::Ended { pid: process.pid })
            }
            result => result.doing("send the signal"),
        }
    }

    /// Sends a signal to every process of a container.
    pub fn kill_all(&self, id: &str, signal: u32) -> Result<(), Error> {
        let signal = check_signal(signal)?;
        let container = self.container(id)?;
        let cgroup = container.cgroup()?;
        if !cgroup.is_populated().doing("look for processes")? {
            return Err(Error::Ended {
                pid: container.init.pid,
            });
        }
        // At once, whatever the container does meanwhile and however long a
        // list of its processes would be.
        if signal == libc::SIGKILL {
            return cgroup.kill().doing("kill the container");
        }
        for pid in cgroup.pids().doing("list the processes")? {
            let pid = i32::try_from(pid).map_or(i32::MAX, |pid| pid);
            match sys::kill(pid, signal) {
                Err(e) if e.raw_os_error() != Some(libc::ESRCH) => {
                    return Err(e).doing("send the signal");
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Kills every process of every container.
    pub fn kill_everything(&self) -> Result<(), Error> {
        std::fs::write(self.config.cgroups.join("cgroup.kill"), "1").doing("kill the containers")
    }
}
