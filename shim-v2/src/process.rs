//! One process of a container as the host knows it: its state, its end, its
//! streams.
//!
//! The state moves under [`Process::moving`]; whoever only looks needs no lock.
//! An end is recorded once and kept.

use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::protobuf::well_known_types::timestamp::Timestamp;
use serde_json::Value;
use tokio::sync::{Mutex as AsyncMutex, watch};

use crate::{
    agent::ProcessName,
    io::{Stdio, Streams},
    state::State,
};

/// How a process ended.
#[derive(Clone, Debug, PartialEq)]
pub struct Exit {
    /// The exit code, or 128 and the signal; 255 if nobody knows.
    pub status: u8,
    /// When the host learned of it.
    pub at: Timestamp,
}

impl Exit {
    /// An end now.
    #[must_use]
    pub fn now(status: u8) -> Self {
        Exit {
            status,
            at: Timestamp::now(),
        }
    }
}

/// State and end, changed together.
#[derive(Clone, Debug, PartialEq)]
pub struct Status {
    /// The state.
    pub state: State,
    /// The end, once there is one.
    pub exit: Option<Exit>,
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its name.
    pub name: ProcessName,
    /// Its streams as the caller named them.
    pub stdio: Stdio,
    /// Held while the process is started: an end that comes meanwhile is recorded
    /// after the start.
    pub moving: AsyncMutex<()>,
    status: watch::Sender<Status>,
    streams: Mutex<Option<Arc<Streams>>>,
    stdin_closed: AtomicBool,
    /// Size of the terminal, until there is one.
    size: Mutex<(u32, u32)>,
    /// The OCI process object of an exec, until it is started.
    pending: Mutex<Option<Value>>,
}

impl Process {
    /// A process that waits for start.
    #[must_use]
    pub fn new(name: ProcessName, stdio: Stdio, size: (u32, u32), pending: Option<Value>) -> Self {
        Process {
            name,
            stdio,
            moving: AsyncMutex::new(()),
            status: watch::Sender::new(Status {
                state: State::Created,
                exit: None,
            }),
            streams: Mutex::new(None),
            stdin_closed: AtomicBool::new(false),
            size: Mutex::new(size),
            pending: Mutex::new(pending),
        }
    }

    /// State and end.
    #[must_use]
    pub fn status(&self) -> Status {
        self.status.borrow().clone()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> State {
        self.status.borrow().state
    }

    /// The program runs now; an end is not undone.
    pub fn running(&self) {
        self.status.send_modify(|status| {
            if status.exit.is_none() {
                status.state = State::Running;
            }
        });
    }

    /// Records the end; false if there was one already.
    pub fn exited(&self, exit: Exit) -> bool {
        let first = self.status.send_if_modified(|status| {
            let first = status.exit.is_none();
            if first {
                *status = Status {
                    state: State::Stopped,
                    exit: Some(exit),
                };
            }
            first
        });
        if let Some(streams) = self.streams() {
            streams.stop_stdin();
        }
        first
    }

    /// Waits for the end.
    pub async fn exit(&self) -> Exit {
        let mut status = self.status.subscribe();
        let ended = status.wait_for(|status| status.exit.is_some()).await;
        ended
            .ok()
            .and_then(|status| status.exit.clone())
            .unwrap_or_else(|| Exit::now(255))
    }

    /// Takes the open streams.
    pub fn attach(&self, streams: Streams) {
        if self.stdin_closed.load(Ordering::SeqCst) {
            streams.close_stdin();
        }
        *self.streams.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(streams));
    }

    fn streams(&self) -> Option<Arc<Streams>> {
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Lets stdin end, now or as soon as it is open.
    pub fn close_stdin(&self) {
        self.stdin_closed.store(true, Ordering::SeqCst);
        if let Some(streams) = self.streams() {
            streams.close_stdin();
        }
    }

    /// Waits until the output is delivered, at most `limit`.
    pub async fn drained(&self, limit: Duration) {
        if let Some(streams) = self.streams() {
            streams.drained(limit).await;
        }
    }

    /// Closes the streams by force.
    pub fn close_streams(&self) {
        self.streams
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// First size of the terminal.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers the size for a terminal that does not exist yet.
    pub fn set_size(&self, columns: u32, rows: u32) {
        *self.size.lock().unwrap_or_else(PoisonError::into_inner) = (columns, rows);
    }

    /// Takes the OCI process object of an exec.
    #[must_use]
    pub fn take_pending(&self) -> Option<Value> {
        self.pending
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::ContainerId;

    fn process() -> Process {
        let name = ProcessName {
            container: ContainerId::new("c").unwrap(),
            exec: None,
        };
        Process::new(name, Stdio::default(), (0, 0), None)
    }

    #[tokio::test]
    async fn an_end_is_recorded_once_and_told_to_every_waiter() {
        let process = Arc::new(process());
        let waiters: Vec<_> = (0..1000)
            .map(|_| {
                let process = Arc::clone(&process);
                tokio::spawn(async move { process.exit().await.status })
            })
            .collect();
        assert!(process.exited(Exit::now(7)));
        assert!(!process.exited(Exit::now(8)));
        for waiter in waiters {
            assert_eq!(waiter.await.unwrap(), 7);
        }
        assert_eq!(process.exit().await.status, 7);
    }

    #[test]
    fn a_process_that_ended_cannot_run_again() {
        let process = process();
        process.exited(Exit::now(1));
        process.running();
        assert_eq!(process.state(), State::Stopped);
    }
}
