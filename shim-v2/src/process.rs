//! One process of a container as the host knows it: its state, its end, its
//! streams, and what containerd is told of it.
//!
//! The state is one value, [`Phase`], changed under one lock. The event that
//! belongs to a change is published under that lock too, so that no change goes
//! without its event, no event is told twice, and the start comes before the end
//! however early the end is. The end of an exec of which no start was told, has no
//! event: for containerd it never ran.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{TaskExecStarted, TaskExit, TaskPaused, TaskResumed, TaskStart},
    protobuf::{MessageField, well_known_types::timestamp::Timestamp},
};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;
use tracing::info;

use crate::{
    agent::ProcessName,
    carry::Bag,
    error::Result,
    events::{Event, Publisher},
    fate::Ending,
    io::{self, Patience, Stdio, Streams},
    lock::lock,
    names::{ContainerId, ExecId},
    state::{self, Op, Refusal, State},
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

/// Where a process is in its life, with what belongs to that place.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// It waits for start.
    Registered,
    /// It is being started; an end that came meanwhile is told after the start.
    Starting {
        /// That end.
        ended: Option<Exit>,
    },
    /// Its program runs, and its start was told.
    Live,
    /// It is about to stand still.
    Pausing,
    /// It stands still, and that was told.
    Paused,
    /// It has ended.
    Ended(Exit),
}

impl Phase {
    /// The state, for the table of what is legal.
    #[must_use]
    pub fn state(&self) -> State {
        match self {
            Phase::Registered => State::Registered,
            Phase::Starting { .. } => State::Starting,
            Phase::Live => State::Live,
            Phase::Pausing => State::Pausing,
            Phase::Paused => State::Paused,
            Phase::Ended(_) => State::Ended,
        }
    }

    /// The end, if it has come.
    #[must_use]
    pub fn exit(&self) -> Option<&Exit> {
        match self {
            Phase::Ended(exit) => Some(exit),
            Phase::Registered
            | Phase::Starting { .. }
            | Phase::Live
            | Phase::Pausing
            | Phase::Paused => None,
        }
    }
}

/// Tells containerd what happens to a process.
#[derive(Clone, Debug)]
pub struct Herald {
    /// Takes the events.
    pub events: Arc<Publisher>,
}

impl Herald {
    fn started(&self, name: &ProcessName, pid: u32) {
        let container_id = name.container.to_string();
        self.events.publish(match &name.exec {
            None => Event::Start(TaskStart {
                container_id,
                pid,
                ..TaskStart::default()
            }),
            Some(exec) => Event::ExecStarted(TaskExecStarted {
                container_id,
                exec_id: exec.to_string(),
                pid,
                ..TaskExecStarted::default()
            }),
        });
    }

    fn paused(&self, name: &ProcessName) {
        self.events.publish(Event::Paused(TaskPaused {
            container_id: name.container.to_string(),
            ..TaskPaused::default()
        }));
    }

    fn resumed(&self, name: &ProcessName) {
        self.events.publish(Event::Resumed(TaskResumed {
            container_id: name.container.to_string(),
            ..TaskResumed::default()
        }));
    }

    fn ended(&self, name: &ProcessName, pid: u32, exit: &Exit) {
        let container_id = name.container.to_string();
        let exec = name.exec.as_ref().map(ToString::to_string);
        self.events.publish(Event::Exit(TaskExit {
            id: exec.unwrap_or_else(|| container_id.clone()),
            container_id,
            pid,
            exit_status: u32::from(exit.status),
            exited_at: MessageField::some(exit.at.clone()),
            ..TaskExit::default()
        }));
    }
}

/// A process.
#[derive(Debug)]
pub struct Process {
    /// Its name.
    pub name: ProcessName,
    /// Its streams as the caller named them.
    pub stdio: Stdio,
    herald: Herald,
    pid: AtomicU32,
    phase: watch::Sender<Phase>,
    streams: Mutex<Option<Arc<Streams>>>,
    stdin_closed: AtomicBool,
    /// Size of the terminal, until there is one.
    size: Mutex<(u32, u32)>,
    /// The OCI process object of an exec, until it is started.
    pending: Mutex<Option<Value>>,
}

/// What goes along of a process when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    container: String,
    exec: Option<String>,
    stdio: Stdio,
    pid: u32,
    phase: CarriedPhase,
    stdin_closed: bool,
    size: (u32, u32),
    pending: Option<Value>,
    streams: Option<io::Carried>,
}

/// Those of the places in its life in which nobody is at work on it.
#[derive(Debug, Serialize, Deserialize)]
enum CarriedPhase {
    Registered,
    Live,
    Paused,
    Ended(Ending),
}

/// A start under way. Dropping it is a failed start.
#[derive(Debug)]
pub struct Start<'a> {
    process: &'a Process,
    /// What an exec ends with if it does not come about.
    failed: u8,
}

impl Start<'_> {
    /// The program runs: tells the start, and after it an end that came meanwhile.
    /// False if it was given up meanwhile.
    #[must_use]
    pub fn confirm(self) -> bool {
        let process = self.process;
        process.phase.send_if_modified(|phase| {
            let Phase::Starting { ended } = phase else {
                return false;
            };
            process.herald.started(&process.name, process.pid());
            *phase = match ended.take() {
                None => Phase::Live,
                Some(exit) => process.told(exit),
            };
            true
        })
    }

    /// The program does not run; an exec ends with `status`.
    pub fn fail(mut self, status: u8) {
        self.failed = status;
    }
}

impl Drop for Start<'_> {
    fn drop(&mut self) {
        let process = self.process;
        process.phase.send_if_modified(|phase| {
            let Phase::Starting { ended } = phase else {
                return false;
            };
            *phase = match (ended.take(), &process.name.exec) {
                (Some(exit), _) => process.told(exit),
                (None, None) => Phase::Registered,
                // Waiters and Delete must not hang on an exec that never ran.
                (None, Some(_)) => Phase::Ended(Exit::now(self.failed)),
            };
            true
        });
    }
}

/// A pause under way. Dropping it is a pause that did not come about.
#[derive(Debug)]
pub struct Pausing<'a> {
    process: &'a Process,
}

impl Pausing<'_> {
    /// The container stands still, and that is told. False if it ended meanwhile.
    #[must_use]
    pub fn confirm(self) -> bool {
        let process = self.process;
        process.phase.send_if_modified(|phase| {
            let pausing = *phase == Phase::Pausing;
            if pausing {
                process.herald.paused(&process.name);
                *phase = Phase::Paused;
            }
            pausing
        })
    }
}

impl Drop for Pausing<'_> {
    fn drop(&mut self) {
        self.process.phase.send_if_modified(|phase| {
            let pausing = *phase == Phase::Pausing;
            if pausing {
                *phase = Phase::Live;
            }
            pausing
        });
    }
}

impl Process {
    /// A process that waits for start. `pending` is the OCI process object of an
    /// exec.
    #[must_use]
    pub fn new(
        name: ProcessName,
        stdio: Stdio,
        size: (u32, u32),
        pending: Option<Value>,
        herald: Herald,
    ) -> Self {
        Process {
            name,
            stdio,
            herald,
            pid: AtomicU32::new(0),
            phase: watch::Sender::new(Phase::Registered),
            streams: Mutex::new(None),
            stdin_closed: AtomicBool::new(false),
            size: Mutex::new(size),
            pending: Mutex::new(pending),
        }
    }

    /// Goes on with one of the program before this one.
    pub(crate) fn unpack(carried: Carried, herald: Herald) -> Result<Self> {
        let name = ProcessName {
            container: ContainerId::new(&carried.container)?,
            exec: carried.exec.as_deref().map(ExecId::new).transpose()?,
        };
        let (stdio, size, pending) = (carried.stdio, carried.size, carried.pending);
        let process = Process::new(name, stdio, size, pending, herald);
        process.stands(carried.pid);
        process
            .stdin_closed
            .store(carried.stdin_closed, Ordering::SeqCst);
        process.phase.send_replace(match carried.phase {
            CarriedPhase::Registered => Phase::Registered,
            CarriedPhase::Live => Phase::Live,
            CarriedPhase::Paused => Phase::Paused,
            CarriedPhase::Ended(end) => Phase::Ended(Exit {
                status: end.status,
                at: end.at(),
            }),
        });
        let streams = carried.streams.map(Streams::unpack).transpose()?;
        *lock(&process.streams) = streams.map(Arc::new);
        Ok(process)
    }

    /// Why it cannot be carried just now.
    pub(crate) fn busy(&self) -> Option<String> {
        match self.state() {
            state @ (State::Starting | State::Pausing) => Some(format!("{} is {state}", self.name)),
            State::Registered | State::Live | State::Paused | State::Ended => {
                let why = self.streams()?.busy()?;
                Some(format!("{} has {why}", self.name))
            }
        }
    }

    /// What goes along when the program changes. It must not be [busy](Process::busy).
    pub(crate) fn carry(&self, bag: &mut Bag) -> std::io::Result<Carried> {
        let phase = match self.phase() {
            Phase::Registered => CarriedPhase::Registered,
            Phase::Live => CarriedPhase::Live,
            Phase::Paused => CarriedPhase::Paused,
            Phase::Ended(exit) => CarriedPhase::Ended(Ending::from(&exit)),
            Phase::Starting { .. } | Phase::Pausing => {
                return Err(std::io::ErrorKind::ResourceBusy.into());
            }
        };
        let streams = self.streams().map(|streams| streams.carry(bag));
        Ok(Carried {
            container: self.name.container.to_string(),
            exec: self.name.exec.as_ref().map(ToString::to_string),
            stdio: self.stdio.clone(),
            pid: self.pid(),
            phase,
            stdin_closed: self.stdin_closed.load(Ordering::SeqCst),
            size: self.size(),
            pending: lock(&self.pending).clone(),
            streams: streams.transpose()?,
        })
    }

    /// The number of the process of the host that stands for it; of the last one, if it
    /// has ended, and 0 before there was one.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.pid.load(Ordering::SeqCst)
    }

    /// From now on a process of the host stands for it.
    pub fn stands(&self, pid: u32) {
        self.pid.store(pid, Ordering::SeqCst);
    }

    /// Where it is in its life.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    /// The state.
    #[must_use]
    pub fn state(&self) -> State {
        self.phase.borrow().state()
    }

    /// Begins the start, if `legal` allows it in the present state.
    pub fn begin(
        &self,
        legal: impl FnOnce(State) -> Result<(), Refusal>,
    ) -> Result<Start<'_>, Refusal> {
        let mut verdict = Ok(());
        self.phase.send_if_modified(|phase| {
            verdict = legal(phase.state());
            if verdict.is_ok() {
                *phase = Phase::Starting { ended: None };
            }
            verdict.is_ok()
        });
        if verdict.is_ok()
            && let Some(streams) = self.streams()
        {
            streams.begin_stdin();
        }
        verdict.map(|()| Start {
            process: self,
            failed: 255,
        })
    }

    /// Begins the pause of the container whose first process this is, if that is
    /// legal; `None` if it stands still already.
    pub fn pause(&self) -> Result<Option<Pausing<'_>>, Refusal> {
        let mut verdict = Ok(());
        let begun = self.phase.send_if_modified(|phase| {
            verdict = state::init(phase.state(), Op::Pause);
            let begins = verdict.is_ok() && *phase == Phase::Live;
            if begins {
                *phase = Phase::Pausing;
            }
            begins
        });
        verdict.map(|()| begun.then(|| Pausing { process: self }))
    }

    /// The container goes on: tells it, if it stood still.
    pub fn resumed(&self) {
        self.phase.send_if_modified(|phase| {
            let paused = *phase == Phase::Paused;
            if paused {
                self.herald.resumed(&self.name);
                *phase = Phase::Live;
            }
            paused
        });
    }

    /// Records the end and tells it: the only place that does. Later ends are
    /// not heard.
    pub fn end(&self, exit: Exit) {
        let exec = self.name.exec.is_some();
        self.phase.send_if_modified(|phase| {
            *phase = match phase {
                Phase::Ended(_) => return false,
                // Its first process exists before the start; that of an exec does not.
                Phase::Registered | Phase::Starting { .. } if exec => Phase::Ended(exit),
                Phase::Starting { ended } => {
                    ended.get_or_insert(exit);
                    return false;
                }
                Phase::Registered | Phase::Live | Phase::Pausing | Phase::Paused => self.told(exit),
            };
            true
        });
        if let Some(streams) = self.streams() {
            streams.stop_stdin();
        }
    }

    fn told(&self, exit: Exit) -> Phase {
        info!(process = %self.name, status = exit.status, "exit");
        self.herald.ended(&self.name, self.pid(), &exit);
        Phase::Ended(exit)
    }

    /// Ends a process that was never started with status 0, and answers the end
    /// of one that has ended; else its state.
    pub fn retire(&self) -> Result<Exit, State> {
        let mut answer = Err(State::Registered);
        self.phase.send_if_modified(|phase| {
            let registered = *phase == Phase::Registered;
            if registered {
                *phase = Phase::Ended(Exit::now(0));
            }
            answer = phase.exit().cloned().ok_or_else(|| phase.state());
            registered
        });
        answer
    }

    /// Waits until no start is under way.
    pub async fn settled(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase
            .wait_for(|phase| phase.state() != State::Starting)
            .await;
    }

    /// Waits for the end.
    pub async fn exit(&self) -> Exit {
        let mut phase = self.phase.subscribe();
        let ended = phase.wait_for(|phase| phase.exit().is_some()).await;
        ended
            .ok()
            .and_then(|phase| phase.exit().cloned())
            .unwrap_or_else(|| Exit::now(255))
    }

    /// Takes the open streams.
    pub fn attach(&self, streams: Streams) {
        if self.stdin_closed.load(Ordering::SeqCst) {
            streams.close_stdin();
        }
        if self.state() != State::Registered {
            streams.begin_stdin();
        }
        *lock(&self.streams) = Some(Arc::new(streams));
    }

    fn streams(&self) -> Option<Arc<Streams>> {
        lock(&self.streams).clone()
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

    /// Closes the streams by force, and ends the programs that log them.
    pub async fn close_streams(&self, patience: Patience) {
        let streams = lock(&self.streams).take();
        if let Some(streams) = streams {
            streams.close(patience).await;
        }
    }

    /// First size of the terminal.
    #[must_use]
    pub fn size(&self) -> (u32, u32) {
        *lock(&self.size)
    }

    /// Remembers the size for a terminal that does not exist yet.
    pub fn set_size(&self, columns: u32, rows: u32) {
        *lock(&self.size) = (columns, rows);
    }

    /// Takes the OCI process object of an exec.
    #[must_use]
    pub fn take_pending(&self) -> Option<Value> {
        lock(&self.pending).take()
    }
}

#[cfg(test)]
mod tests;
