//! Starts the helper and hears how it gets on: the agent's side of
//! [`channel`](crate::channel).

use std::{
    io,
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::io::{Interest, unix::AsyncFd};

use crate::{
    channel::{self, Fds, Job, Report},
    error::{Doing, Error},
    reaper::{ExitWatch, Reaper},
    sys,
};

/// A process that is ready and waits for the start; dropping it kills it.
#[derive(Debug)]
pub(crate) struct Launched {
    /// Its id in the guest.
    pub pid: u32,
    /// Refers to it for ever.
    pub pidfd: Arc<OwnedFd>,
    /// Its exit.
    pub exit: ExitWatch,
    /// The other end of its terminal.
    pub terminal: Option<OwnedFd>,
    waiting: Waiting,
}

/// A process that waits for the agent's word; dropping it kills the process.
#[derive(Debug)]
pub(crate) struct Waiting {
    /// What to kill; none once it has started.
    pidfd: Option<Arc<OwnedFd>>,
    channel: Option<AsyncFd<OwnedFd>>,
}

/// Has the helper make a process; answers when it is ready to start.
pub(crate) async fn launch(
    helper: &Path,
    reaper: &Reaper,
    job: &Job,
    fds: Fds,
) -> Result<Launched, Error> {
    let (ours, theirs) = channel::pair().doing("make a channel")?;
    channel::send_job(&ours, job, &fds).doing("send the job to the helper")?;
    drop(fds);
    let channel = sys::watch(ours, Interest::READABLE).doing("watch the channel")?;
    // Spawned, not forked: see `init`. The reaper collects it like any orphan.
    Command::new(helper)
        .arg("init")
        .env_clear()
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .doing("start the helper")?;

    let (pid, _) = match next_report(&channel).await? {
        (Report::Cloned { pid }, fd) => (pid, fd),
        (report, _) => return Err(unexpected(report)),
    };
    let exit = reaper.watch(pid);
    let launched = wait_until_ready(pid, exit, channel).await;
    if launched.is_err() {
        reaper.forget(pid);
    }
    launched
}

async fn wait_until_ready(
    pid: u32,
    exit: ExitWatch,
    channel: AsyncFd<OwnedFd>,
) -> Result<Launched, Error> {
    let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let opened = raw
        .ok_or_else(|| io::Error::from(io::ErrorKind::InvalidData))
        .and_then(|pid| Ok(pidfd_open(pid, PidfdFlags::empty())?));
    let pidfd = match opened {
        // It has failed and its exit has been collected already: what it said
        // before that is the cause.
        Err(e) if e.raw_os_error() == Some(libc::ESRCH) => {
            return Err(unexpected(next_report(&channel).await?.0));
        }
        opened => Arc::new(opened.doing("refer to the new process")?),
    };
    let mut waiting = Waiting {
        pidfd: Some(Arc::clone(&pidfd)),
        channel: None,
    };
    let terminal = match next_report(&channel).await? {
        (Report::Ready, terminal) => terminal,
        (report, _) => return Err(unexpected(report)),
    };
    waiting.channel = Some(channel);
    Ok(Launched {
        pid,
        pidfd,
        exit,
        terminal,
        waiting,
    })
}

async fn next_report(channel: &AsyncFd<OwnedFd>) -> Result<(Report, Option<OwnedFd>), Error> {
    receive(channel)
        .await
        .doing("hear from the helper")?
        .ok_or(Error::InitKilled)
}

async fn receive(channel: &AsyncFd<OwnedFd>) -> io::Result<Option<(Report, Option<OwnedFd>)>> {
    channel
        .async_io(Interest::READABLE, |channel| {
            channel::receive_report(channel)
        })
        .await
}

fn unexpected(report: Report) -> Error {
    match report {
        Report::Failed(failure) => Error::Init(failure),
        Report::Cloned { .. } | Report::Ready => Error::System {
            doing: "understand the helper",
            source: io::ErrorKind::InvalidData.into(),
        },
    }
}

impl Launched {
    /// Takes the right to start the process.
    pub(crate) fn into_waiting(self) -> Waiting {
        self.waiting
    }
}

impl Waiting {
    /// Lets the process become its program; answers when it has.
    pub(crate) async fn start(mut self) -> Result<(), Error> {
        let Some(channel) = self.channel.take() else {
            return Err(Error::InitKilled);
        };
        // A process that was killed while it waited reports its exit.
        if channel::send_start(channel.get_ref()).is_ok()
            && let Some((report, _)) = receive(&channel).await.doing("hear from the process")?
        {
            return Err(unexpected(report));
        }
        self.pidfd = None;
        Ok(())
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            // One that has ended already is as good as killed.
            let _ = pidfd_send_signal(&**pidfd, Signal::KILL);
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{SendFlags, send};

    use super::*;

    #[tokio::test]
    async fn a_process_that_ended_before_it_was_looked_at_has_told_why() {
        let mut child = Command::new("true").spawn().unwrap();
        let pid = child.id();
        child.wait().unwrap();
        let (ours, theirs) = channel::pair().unwrap();
        let report = Report::Failed(channel::Failure {
            text: "what went wrong".into(),
            kind: channel::FailureKind::Step,
            errno: None,
        });
        send(
            &theirs,
            &serde_json::to_vec(&report).unwrap(),
            SendFlags::empty(),
        )
        .unwrap();
        drop(theirs);
        let channel = sys::watch(ours, Interest::READABLE).unwrap();
        let (_exit, watch) = tokio::sync::watch::channel(None);
        let error = wait_until_ready(pid, watch, channel).await.unwrap_err();
        assert_eq!(error.to_string(), "what went wrong");
    }
}
