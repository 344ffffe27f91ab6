//! Standard streams: the caller's FIFOs on one side, vsock connections of the guest
//! on the other.
//!
//! Bytes are relayed by one task a stream, which holds one buffer: a reader that
//! stalls stalls its stream, nothing else, and nothing is lost. Each FIFO is held
//! open in both directions, so that a caller can go away and come back; it is
//! closed when the guest's end is reached.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{STREAM_PORT, agent};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::watch,
    task::{AbortHandle, JoinSet},
    time::timeout,
};
use tracing::debug;

use crate::error::{Error, Result, host};

/// Bytes that a relay holds.
const BUFFER: usize = 64 << 10;
/// Limit for a connection to the guest.
const CONNECT: Duration = Duration::from_secs(10);

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
        for name in [&self.stdin, &self.stdout, &self.stderr] {
            fifo_path(name)?;
        }
        Ok(())
    }
}

/// Path of the FIFO that a string names; `None` for "nothing".
fn fifo_path(name: &str) -> Result<Option<PathBuf>> {
    let refuse = |reason: &str| Error::Argument {
        what: "Standard stream",
        value: name.chars().take(120).collect(),
        reason: reason.to_owned(),
    };
    if name.is_empty() {
        return Ok(None);
    }
    let path = match name.split_once("://") {
        Some(("fifo", path)) => path,
        Some(("binary" | "binary-v2", _)) => {
            return Err(refuse("logging programs are not supported"));
        }
        Some(("file", _)) => return Err(refuse("log files are not supported")),
        Some((scheme, _)) if !scheme.contains('/') => {
            return Err(refuse("the scheme is not supported"));
        }
        _ => name,
    };
    if !path.starts_with('/') || path.contains('\0') {
        return Err(refuse("it is not an absolute path"));
    }
    Ok(Some(PathBuf::from(path)))
}

/// Opens a FIFO in one direction, without waiting for the other end.
fn open_fifo(path: &Path, direction: OFlags) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::Path {
        action: "open the FIFO",
        path: path.to_owned(),
        source: error,
    };
    let flags = direction | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let mode = rustix::fs::fstat(&fd)
        .map_err(|error| failed(error.into()))?
        .st_mode;
    if FileType::from_raw_mode(mode) != FileType::Fifo {
        return Err(Error::Argument {
            what: "Standard stream",
            value: path.display().to_string(),
            reason: "it is not a FIFO".to_owned(),
        });
    }
    Ok(fd)
}

/// Opens connections to the guest over its vsock.
#[derive(Debug)]
pub struct Dialer {
    /// Directory of the socket.
    dir: OwnedFd,
    name: &'static str,
    next: AtomicU64,
}

impl Dialer {
    /// Dials by the socket `name` in `dir`.
    #[must_use]
    pub fn new(dir: OwnedFd, name: &'static str) -> Self {
        Dialer {
            dir,
            name,
            next: AtomicU64::new(1),
        }
    }

    /// Connects a new stream; answers its id too.
    pub async fn stream(&self) -> Result<(u64, UnixStream)> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connected = timeout(CONNECT, self.connect(id)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(host("connect a stream to the guest"))?;
        Ok((id, stream))
    }

    async fn connect(&self, id: u64) -> io::Result<UnixStream> {
        // By the directory's descriptor: its name may be too long for a socket.
        let path = format!("/proc/self/fd/{}/{}", self.dir.as_raw_fd(), self.name);
        let mut stream = UnixStream::connect(path).await?;
        stream
            .write_all(format!("CONNECT {STREAM_PORT}\n").as_bytes())
            .await?;
        let answer = read_line(&mut stream, 32).await?;
        if !answer.starts_with(b"OK ") {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        stream.write_all(&id.to_le_bytes()).await?;
        Ok(stream)
    }
}

/// Reads up to a newline, which is the last byte taken from the stream.
pub(crate) async fn read_line(stream: &mut UnixStream, limit: usize) -> io::Result<Vec<u8>> {
    let mut line = Vec::new();
    while line.len() < limit {
        match stream.read_u8().await? {
            b'\n' => return Ok(line),
            byte => line.push(byte),
        }
    }
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        "the line is too long",
    ))
}

/// The open streams of one process. Dropping closes them by force.
#[derive(Debug)]
pub struct Streams {
    /// The write end of stdin's FIFO that keeps it from ending.
    stdin_held: Mutex<Option<OwnedFd>>,
    stdin: Option<AbortHandle>,
    outputs: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl Streams {
    /// Opens the FIFOs, connects each to the guest and begins to relay. Answers
    /// what the agent must be told.
    pub async fn open(stdio: &Stdio, dialer: &Dialer) -> Result<(Self, agent::Stdio)> {
        let mut told = agent::Stdio {
            terminal: stdio.terminal,
            ..agent::Stdio::default()
        };
        let mut tasks = JoinSet::new();
        let (count, outputs) = watch::channel(0_usize);
        let count = Arc::new(count);
        let mut held = None;
        let mut stdin = None;
        if let Some(path) = fifo_path(&stdio.stdin)? {
            let reader = open_fifo(&path, OFlags::RDONLY)?;
            held = Some(open_fifo(&path, OFlags::WRONLY)?);
            let reader = pipe::Receiver::from_owned_fd(reader).map_err(host("watch stdin"))?;
            let (id, stream) = dialer.stream().await?;
            told.stdin = id;
            stdin = Some(tasks.spawn(relay_in(reader, stream)));
        }
        let stderr = if stdio.terminal {
            ""
        } else {
            stdio.stderr.as_str()
        };
        for (name, told) in [
            (stdio.stdout.as_str(), &mut told.stdout),
            (stderr, &mut told.stderr),
        ] {
            let Some(path) = fifo_path(name)? else {
                continue;
            };
            // The read end comes first: without it the write end cannot be opened
            // while the caller is not there yet.
            let held = open_fifo(&path, OFlags::RDONLY)?;
            let writer = open_fifo(&path, OFlags::WRONLY)?;
            let writer = pipe::Sender::from_owned_fd(writer).map_err(host("watch an output"))?;
            let (id, stream) = dialer.stream().await?;
            *told = id;
            count.send_modify(|open| *open += 1);
            let count = Arc::clone(&count);
            tasks.spawn(async move {
                let result = relay_out(stream, writer).await;
                debug!(stream = id, ?result, "output ended");
                drop(held);
                count.send_modify(|open| *open = open.saturating_sub(1));
            });
        }
        Ok((
            Streams {
                stdin_held: held.into(),
                stdin,
                outputs,
                _tasks: tasks,
            },
            told,
        ))
    }

    /// Lets stdin end once its writers are gone and what they wrote is delivered.
    pub fn close_stdin(&self) {
        self.stdin_held
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
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
}

async fn relay_in(mut reader: pipe::Receiver, mut stream: UnixStream) {
    let mut buffer = vec![0; BUFFER];
    let result: io::Result<()> = async {
        loop {
            let count = reader.read(&mut buffer).await?;
            if count == 0 {
                return stream.shutdown().await;
            }
            stream
                .write_all(buffer.get(..count).unwrap_or_default())
                .await?;
        }
    }
    .await;
    drop(reader);
    debug!(?result, "stdin ended");
    // Closing at once could overtake what the VMM has not read yet.
    while stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {}
}

async fn relay_out(mut stream: UnixStream, mut writer: pipe::Sender) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = stream.read(&mut buffer).await?;
        if count == 0 {
            return Ok(());
        }
        writer
            .write_all(buffer.get(..count).unwrap_or_default())
            .await?;
    }
}

#[cfg(test)]
mod tests;
