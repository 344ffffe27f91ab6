//! Standard streams: what the caller names on one side, vsock connections of the guest
//! on the other.
//!
//! Bytes are relayed by one task a stream, which holds one buffer: a reader that
//! stalls stalls its stream, nothing else, and nothing is lost. Each FIFO is held
//! open in both directions, so that a caller can go away and come back; it is
//! closed when the guest's end is reached.
//!
//! [`target`] says what a name means, [`output`] where output goes to: FIFOs, log
//! files, logging programs ([`logger`]) and containerd's streaming service
//! ([`streaming`]). [`dialer`] makes the connections to the guest.

mod dialer;
mod input;
mod logger;
mod open;
mod output;
pub mod streaming;
mod target;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::agent;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::{Notify, watch},
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::debug;

pub(crate) use self::dialer::read_line;
pub use self::{
    dialer::{Dialer, Room},
    logger::Patience,
};
use self::{
    input::Input,
    logger::Logger,
    output::{Opened, Output},
    streaming::Hub,
    target::{Target, refused},
};
use crate::{
    carry::{Bag, CarriedFd},
    error::{Error, Result, host},
    lock::lock,
    names::Namespace,
};

/// The streams as the caller named them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stdio {
    /// For the process to read from.
    pub stdin: String,
    /// What it writes.
    pub stdout: String,
    /// Its messages; not used with a terminal.
    pub stderr: String,
    /// A pseudo-terminal in the guest.
    pub terminal: bool,
}

impl Stdio {
    /// Refuses what cannot be opened, without opening anything.
    pub fn check(&self) -> Result<()> {
        self.targets().map(drop)
    }

    /// What stdin, stdout and stderr name.
    fn targets(&self) -> Result<[Option<Target>; 3]> {
        let stdin = Target::named(&self.stdin)?;
        if let Some(Target::File(_) | Target::Program(_)) = stdin {
            let reason = "a process can read from a FIFO or a stream only";
            return Err(refused(&self.stdin, reason));
        }
        let stdout = Target::named(&self.stdout)?;
        // Callers name it and do not mean it.
        let stderr = match self.terminal {
            true => None,
            false => Target::named(&self.stderr)?,
        };
        Ok([stdin, stdout, stderr])
    }
}

/// What streams need of the host around the pod.
#[derive(Debug)]
pub struct StreamHost {
    /// containerd's namespace, which logging programs are told.
    pub namespace: Namespace,
    /// The mount namespace in which they live; `None`: the shim's own.
    pub mounts: Option<Arc<OwnedFd>>,
    /// Streams that are served rather than opened.
    pub hub: Arc<Hub>,
}

/// The open streams of one process. Dropping closes them by force.
#[derive(Debug)]
pub struct Streams {
    /// The write end of stdin's FIFO that keeps it from ending.
    stdin_held: Mutex<Option<OwnedFd>>,
    /// True once stdin shall end.
    stdin_closing: watch::Sender<bool>,
    /// From when on stdin is read.
    stdin_begins: Arc<Begins>,
    stdin: Option<(AbortHandle, Arc<input::Slot>)>,
    outputs: Vec<Arc<output::Slot>>,
    outputs_open: watch::Receiver<usize>,
    /// Some of them are streams of containerd's.
    streamed: bool,
    tasks: Mutex<JoinSet<()>>,
    loggers: Mutex<Vec<Logger>>,
}

/// What goes along of the streams of one process when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    stdin: Option<input::Carried>,
    stdin_held: Option<CarriedFd>,
    stdin_closing: bool,
    stdin_begun: bool,
    outputs: Vec<output::Carried>,
    loggers: Vec<logger::Carried>,
}

impl Streams {
    /// Opens what the caller named, connects each to the guest and begins to relay.
    /// Stdin is not read before [`Streams::begin_stdin`]: callers learn of its end while
    /// they hand it over, and cannot tell us before they have our answer to Create.
    /// Answers what the agent must be told, and the room that the streams take up
    /// until it has answered. `id` is that of the container, or of the exec.
    pub async fn open(
        stdio: &Stdio,
        id: &str,
        host: &StreamHost,
        dialer: &Dialer,
    ) -> Result<(Self, agent::Stdio, Room)> {
        let [stdin, stdout, stderr] = stdio.targets()?;
        let (stdin_closing, closing) = watch::channel(false);
        // A process whose logger has died shall learn of it, as from any pipe.
        let logs = |target: &Option<Target>| matches!(target, Some(Target::Program(_)));
        let mut told = agent::Stdio {
            terminal: stdio.terminal,
            breaks: logs(&stdout) || logs(&stderr),
            ..agent::Stdio::default()
        };
        // Before there is a connection: it would wait for whatever is slow here.
        let (input, held) = match stdin {
            Some(target) => Input::open(target, host, closing).await?,
            None => (None, None),
        };
        let (outputs, loggers) = open_outputs(stdout, stderr, id, host).await?;
        let opened = usize::from(input.is_some()) + outputs.iter().flatten().count();
        let room = dialer.reserve(u32::try_from(opened).unwrap_or(0)).await;
        let mut stdin = None;
        if let Some(input) = input {
            let (id, stream) = dialer.stream().await?;
            told.stdin = id;
            stdin = Some(input::Flow::new(input, stream));
        }
        let mut flows = Vec::new();
        for (output, told) in outputs
            .into_iter()
            .zip([&mut told.stdout, &mut told.stderr])
        {
            let Some(output) = output else { continue };
            let (id, stream) = dialer.stream().await?;
            *told = id;
            flows.push(output::Flow::new(stream, output));
        }
        let streams = Streams::begin(stdin, flows, loggers, held, stdin_closing);
        Ok((streams, told, room))
    }

    /// Begins to relay.
    fn begin(
        stdin: Option<input::Flow>,
        outputs: Vec<output::Flow>,
        loggers: Vec<Logger>,
        stdin_held: Option<OwnedFd>,
        stdin_closing: watch::Sender<bool>,
    ) -> Self {
        let mut tasks = JoinSet::new();
        let streamed =
            stdin.iter().any(input::Flow::is_stream) || outputs.iter().any(output::Flow::is_stream);
        let stdin_begins = Arc::<Begins>::default();
        let stdin = stdin.map(|flow| {
            let slot = Arc::new(Mutex::new(Some(flow)));
            let relay = relay_in(Arc::clone(&stdin_begins), Arc::clone(&slot));
            (tasks.spawn(relay), slot)
        });
        let (count, outputs_open) = watch::channel(outputs.len());
        let count = Arc::new(count);
        let slots = outputs.into_iter().map(|flow| {
            let slot = Arc::new(Mutex::new(Some(flow)));
            tasks.spawn(relay_out(Arc::clone(&slot), Arc::clone(&count)));
            slot
        });
        Streams {
            outputs: slots.collect(),
            stdin_held: stdin_held.into(),
            stdin_closing,
            stdin_begins,
            stdin,
            outputs_open,
            streamed,
            tasks: tasks.into(),
            loggers: loggers.into(),
        }
    }

    /// Goes on with those of the program before this one.
    pub(crate) fn unpack(carried: Carried) -> Result<Self> {
        let failed = host("take over a stream");
        let parts = || -> io::Result<_> {
            let stdin = carried.stdin.map(input::Flow::unpack).transpose()?;
            let outputs = carried.outputs.into_iter().map(output::Flow::unpack);
            let outputs: io::Result<Vec<_>> = outputs.collect();
            let loggers = carried.loggers.into_iter().map(Logger::unpack);
            let loggers: io::Result<Vec<_>> = loggers.collect();
            let held = carried.stdin_held.map(CarriedFd::take).transpose()?;
            Ok((stdin, outputs?, loggers?, held))
        };
        let (stdin, outputs, loggers, held) = parts().map_err(failed)?;
        let (closing, _) = watch::channel(carried.stdin_closing);
        let streams = Streams::begin(stdin, outputs, loggers, held, closing);
        if carried.stdin_begun {
            streams.begin_stdin();
        }
        Ok(streams)
    }

    /// Why they cannot be carried just now.
    pub(crate) fn busy(&self) -> Option<&'static str> {
        let writes =
            |slot: &Arc<output::Slot>| lock(slot).as_ref().is_some_and(output::Flow::is_busy);
        if self.streamed {
            return Some("a stream of containerd's streaming service");
        }
        let writes = self.outputs.iter().any(writes);
        writes.then_some("a write to a log file")
    }

    /// What goes along when the program changes. They must not be [busy](Streams::busy).
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let stdin = self.stdin.as_ref().and_then(|(_, slot)| {
            let slot = lock(slot);
            slot.as_ref().map(|flow| flow.carry(bag))
        });
        let stdin = stdin.transpose()?;
        let mut outputs = Vec::new();
        for slot in &self.outputs {
            if let Some(flow) = &*lock(slot) {
                outputs.push(flow.carry(bag)?);
            }
        }
        let held = lock(&self.stdin_held);
        Ok(Carried {
            stdin,
            stdin_held: held.as_ref().map(|held| bag.put(held)).transpose()?,
            stdin_closing: *self.stdin_closing.borrow(),
            stdin_begun: self.stdin_begins.have(),
            outputs,
            loggers: lock(&self.loggers).iter().map(Logger::carry).collect(),
        })
    }

    /// Begins to read stdin: its process starts.
    pub fn begin_stdin(&self) {
        self.stdin_begins.begin();
    }

    /// Lets stdin end once its writers are gone and what they wrote is delivered.
    pub fn close_stdin(&self) {
        lock(&self.stdin_held).take();
        self.stdin_closing.send_replace(true);
        self.begin_stdin();
    }

    /// Waits until all output is delivered and closed, at most `limit`.
    pub async fn drained(&self, limit: Duration) {
        let mut open = self.outputs_open.clone();
        let _ = timeout(limit, open.wait_for(|open| *open == 0)).await;
    }

    /// Stops reading stdin: its process is gone.
    pub fn stop_stdin(&self) {
        self.close_stdin();
        if let Some((task, slot)) = &self.stdin {
            task.abort();
            lock(slot).take();
        }
    }

    /// Closes them by force, and ends the programs that log them.
    pub async fn close(&self, patience: Patience) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        tasks.shutdown().await;
        // And with these the ends of the programs' pipes.
        for slot in &self.outputs {
            lock(slot).take();
        }
        if let Some((_, slot)) = &self.stdin {
            lock(slot).take();
        }
        let loggers = std::mem::take(&mut *lock(&self.loggers));
        futures::future::join_all(loggers.into_iter().map(|logger| logger.end(patience))).await;
    }
}

/// Opens stdout and stderr. If both name the same, it is opened once.
async fn open_outputs(
    stdout: Option<Target>,
    stderr: Option<Target>,
    id: &str,
    host: &StreamHost,
) -> Result<([Option<Output>; 2], Vec<Logger>)> {
    let mut loggers = Vec::new();
    let same = stdout == stderr;
    let mut open = async |target| {
        let Opened { ways, logger } = Output::open(target, id, host).await?;
        loggers.extend(logger);
        Ok::<_, Error>(ways.map(Some))
    };
    let outputs = match (stdout, stderr) {
        (Some(both), Some(_)) if same => open(both).await?,
        (stdout, stderr) => {
            let mut outputs = [None, None];
            if let Some(target) = stdout {
                [outputs[0], _] = open(target).await?;
            }
            if let Some(target) = stderr {
                [_, outputs[1]] = open(target).await?;
            }
            outputs
        }
    };
    Ok((outputs, loggers))
}

/// Says, once and for all, that stdin is read.
#[derive(Debug, Default)]
struct Begins {
    begun: AtomicBool,
    news: Notify,
}

impl Begins {
    fn begin(&self) {
        self.begun.store(true, Ordering::SeqCst);
        self.news.notify_one();
    }

    fn have(&self) -> bool {
        self.begun.load(Ordering::SeqCst)
    }
}

async fn relay_in(begins: Arc<Begins>, slot: Arc<input::Slot>) {
    begins.news.notified().await;
    input::relay(&slot).await;
    debug!("stdin ended");
    // Closing at once could overtake what the VMM has not read yet.
    input::linger(&slot).await;
}

/// Passes output on, and then takes it out of the count of those that are open.
async fn relay_out(slot: Arc<output::Slot>, open: Arc<watch::Sender<usize>>) {
    let rest = output::relay(&slot).await;
    open.send_modify(|open| *open = open.saturating_sub(1));
    if let Some(outlet) = rest {
        outlet.linger().await;
    }
}

#[cfg(test)]
mod tests;
