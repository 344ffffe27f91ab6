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
mod logger;
mod open;
mod output;
pub mod streaming;
mod target;

use std::{
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex},
    time::Duration,
};

use bulkhead_agent_api::agent;
use rustix::fs::OFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::{Notify, watch},
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::{debug, warn};

pub(crate) use self::dialer::read_line;
pub use self::{
    dialer::{Dialer, Room},
    logger::Patience,
};
use self::{
    logger::Logger,
    open::open_fifo,
    output::{Opened, Output},
    streaming::{Hub, Inlet},
    target::{Target, refused},
};
use crate::{
    error::{Error, Result},
    lock::lock,
    names::Namespace,
};

/// Bytes that a relay holds.
const BUFFER: usize = 64 << 10;

/// The streams as the caller named them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
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
    stdin_begins: Arc<Notify>,
    stdin: Option<AbortHandle>,
    outputs: watch::Receiver<usize>,
    tasks: Mutex<JoinSet<()>>,
    loggers: Mutex<Vec<Logger>>,
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
        let mut tasks = JoinSet::new();
        let mut stdin = None;
        let stdin_begins = Arc::new(Notify::new());
        if let Some(input) = input {
            let (id, stream) = dialer.stream().await?;
            told.stdin = id;
            let begins = Arc::clone(&stdin_begins);
            stdin = Some(tasks.spawn(relay_in(begins, input, stream)));
        }
        let (count, open) = watch::channel(0_usize);
        let count = Arc::new(count);
        for (output, told) in outputs
            .into_iter()
            .zip([&mut told.stdout, &mut told.stderr])
        {
            let Some(output) = output else { continue };
            let (id, stream) = dialer.stream().await?;
            *told = id;
            count.send_modify(|open| *open += 1);
            tasks.spawn(relay_out(id, stream, output, Arc::clone(&count)));
        }
        let streams = Streams {
            stdin_held: held.into(),
            stdin_closing,
            stdin_begins,
            stdin,
            outputs: open,
            tasks: tasks.into(),
            loggers: loggers.into(),
        };
        Ok((streams, told, room))
    }

    /// Begins to read stdin: its process starts.
    pub fn begin_stdin(&self) {
        self.stdin_begins.notify_one();
    }

    /// Lets stdin end once its writers are gone and what they wrote is delivered.
    pub fn close_stdin(&self) {
        lock(&self.stdin_held).take();
        self.stdin_closing.send_replace(true);
        self.begin_stdin();
    }

    /// Waits until all output is delivered and closed, at most `limit`.
    pub async fn drained(&self, limit: Duration) {
        let mut outputs = self.outputs.clone();
        let _ = timeout(limit, outputs.wait_for(|open| *open == 0)).await;
    }

    /// Stops reading stdin: its process is gone.
    pub fn stop_stdin(&self) {
        self.close_stdin();
        if let Some(stdin) = &self.stdin {
            stdin.abort();
        }
    }

    /// Closes them by force, and ends the programs that log them.
    pub async fn close(&self, patience: Patience) {
        let mut tasks = std::mem::take(&mut *lock(&self.tasks));
        // Their ends of the programs' pipes go with them.
        tasks.shutdown().await;
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

/// Where input comes from.
enum Input {
    Fifo(pipe::Receiver),
    Stream(Inlet),
}

impl Input {
    /// Opens a target; of a FIFO also the end that keeps it from ending.
    async fn open(
        target: Target,
        host: &StreamHost,
        closing: watch::Receiver<bool>,
    ) -> Result<(Option<Self>, Option<OwnedFd>)> {
        match target {
            Target::Fifo(path) => {
                let reader = open_fifo(&path, OFlags::RDONLY)?;
                let held = open_fifo(&path, OFlags::WRONLY)?;
                let reader = pipe::Receiver::from_owned_fd(reader);
                let reader = reader.map_err(crate::error::host("watch stdin"))?;
                Ok((Some(Input::Fifo(reader)), Some(held)))
            }
            Target::Stream(address) => {
                let claim = host.hub.claim(&address).await?;
                Ok((Some(Input::Stream(Inlet::new(claim, closing))), None))
            }
            // Refused before.
            Target::File(_) | Target::Program(_) => Ok((None, None)),
        }
    }

    /// Reads into an empty buffer; leaves it empty at the end.
    async fn read(&mut self, buffer: &mut Vec<u8>) -> io::Result<()> {
        match self {
            Input::Fifo(reader) => {
                reader.read_buf(buffer).await?;
            }
            Input::Stream(inlet) => *buffer = inlet.read().await.unwrap_or_default(),
        }
        Ok(())
    }
}

async fn relay_in(begins: Arc<Notify>, mut input: Input, mut stream: UnixStream) {
    begins.notified().await;
    let mut buffer = Vec::with_capacity(BUFFER);
    let result: io::Result<()> = async {
        loop {
            buffer.clear();
            input.read(&mut buffer).await?;
            if buffer.is_empty() {
                return stream.shutdown().await;
            }
            stream.write_all(&buffer).await?;
        }
    }
    .await;
    drop(input);
    debug!(?result, "stdin ended");
    // Closing at once could overtake what the VMM has not read yet.
    let mut rest = [0; 64];
    while stream.read(&mut rest).await.is_ok_and(|count| count > 0) {}
}

/// Passes output on, and then takes it out of the count of those that are open.
async fn relay_out(
    id: u64,
    stream: UnixStream,
    mut output: Output,
    open: Arc<watch::Sender<usize>>,
) {
    match output.relay(stream).await {
        Ok(()) => debug!(stream = id, "output ended"),
        Err(error) => warn!(stream = id, %output, %error, "output is lost from here"),
    }
    let rest = output.end().await;
    open.send_modify(|open| *open = open.saturating_sub(1));
    if let Some(outlet) = rest {
        outlet.linger().await;
    }
}

#[cfg(test)]
mod tests;
