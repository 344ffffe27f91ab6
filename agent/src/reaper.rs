//! The one place that collects the exits of processes.
//!
//! As PID 1 the agent gets every orphan of the guest. [`Reaper`] waits for all
//! children, tells those who watch a process what became of it, and drops the
//! rest. Nothing else in the agent may wait for a process: it would take an
//! exit away from here.

use std::{
    collections::HashMap,
    io,
    sync::{Arc, Mutex, MutexGuard},
};

use rustix::process::{WaitOptions, wait};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

use crate::clock;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exit {
    /// 0…255: the exit code; 128 + n if signal n ended it.
    pub status: u32,
    /// Wall clock, nanoseconds since the epoch.
    pub at_ns: u64,
}

/// What a watcher holds: `None` until the process has ended.
pub type ExitWatch = watch::Receiver<Option<Exit>>;

/// Waits until the process has ended; `None` if it is no longer watched.
pub async fn ended(mut exit: ExitWatch) -> Option<Exit> {
    exit.wait_for(Option::is_some)
        .await
        .ok()
        .and_then(|exit| *exit)
}

/// Collects exits.
#[derive(Debug, Default)]
pub struct Reaper {
    watched: Mutex<HashMap<u32, watch::Sender<Option<Exit>>>>,
}

impl Reaper {
    /// Starts to collect, for as long as the runtime lives.
    pub fn start() -> io::Result<Arc<Self>> {
        let reaper = Arc::new(Self::default());
        // The handler is in place before the first look: no exit is missed.
        let mut exits = signal(SignalKind::child())?;
        let collector = Arc::clone(&reaper);
        tokio::spawn(async move {
            loop {
                collector.collect();
                if exits.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Watches a child that has not been collected yet: one that still waits
    /// for a word of ours before it can end well.
    pub fn watch(&self, pid: u32) -> ExitWatch {
        let (sender, receiver) = watch::channel(None);
        self.lock().insert(pid, sender);
        receiver
    }

    /// Stops watching.
    pub fn forget(&self, pid: u32) {
        self.lock().remove(&pid);
    }

    fn collect(&self) {
        while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
            let signal = status.terminating_signal().map(|signal| 128 + signal);
            let status = status
                .exit_status()
                .or(signal)
                .and_then(|n| u32::try_from(n).ok());
            let exit = Exit {
                status: status.unwrap_or(255),
                at_ns: clock::now_ns(),
            };
            let pid = pid.as_raw_nonzero().get().unsigned_abs();
            if let Some(watcher) = self.lock().remove(&pid) {
                watcher.send_replace(Some(exit));
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u32, watch::Sender<Option<Exit>>>> {
        self.watched.lock().expect("no holder of the lock panics")
    }
}
