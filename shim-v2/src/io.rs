//! Standard streams: the caller's FIFOs or log files on one side, vsock connections
//! of the guest on the other.
//!
//! Bytes are relayed by one task a stream, which holds one buffer: a reader that
//! stalls stalls its stream, nothing else, and nothing is lost. Each FIFO is held
//! open in both directions, so that a caller can go away and come back; it is
//! closed when the guest's end is reached.
//!
//! A connection is nobody's in the guest until the request that names it is
//! answered, and the agent has room for few of those. So room is reserved before
//! the first byte is sent: however many processes begin at once, none of them finds
//! its output refused.

use std::{
    fs::{DirBuilder, File},
    io::{self, Write},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{STREAM_PORT, STREAMS_WAITING, agent};
use rustix::fs::{FileType, Mode, OFlags};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::{AbortHandle, JoinSet, spawn_blocking},
    time::timeout,
};
use tracing::{debug, warn};

use crate::{
    error::{Error, Result, host},
    lock::lock,
};

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
        if let Some(Target::File(_)) = Target::named(&self.stdin)? {
            return Err(refused(
                &self.stdin,
                "a process cannot read from a log file",
            ));
        }
        Target::named(&self.stdout)?;
        Target::named(&self.stderr)?;
        Ok(())
    }
}

fn refused(name: &str, reason: &str) -> Error {
    Error::Argument {
        what: "Standard stream",
        value: name.chars().take(120).collect(),
        reason: reason.to_owned(),
    }
}

/// What a string names.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Target {
    Fifo(PathBuf),
    /// A file of the host that output is appended to.
    File(PathBuf),
}

impl Target {
    /// `None` for "nothing".
    fn named(name: &str) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let (path, target): (_, fn(PathBuf) -> Self) = match name.split_once("://") {
            Some(("fifo", path)) => (path, Target::Fifo),
            Some(("file", path)) => (path, Target::File),
            Some(("binary" | "binary-v2", _)) => {
                return Err(refused(name, "logging programs are not supported"));
            }
            Some((scheme, _)) if !scheme.contains('/') => {
                return Err(refused(name, "the scheme is not supported"));
            }
            _ => (name, Target::Fifo),
        };
        if !path.starts_with('/') || path.contains('\0') {
            return Err(refused(name, "it is not an absolute path"));
        }
        Ok(Some(target(PathBuf::from(path))))
    }
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
        return Err(refused(&path.display().to_string(), "it is not a FIFO"));
    }
    Ok(fd)
}

/// Opens a log file, which is made if it is not there; a blocking function.
fn open_file(path: &Path) -> Result<File> {
    let failed = |source| Error::Path {
        action: "open the log file",
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(failed)?;
    }
    // Without waiting for the reader of what turns out to be a FIFO.
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(refused(&path.display().to_string(), "it is not a file"));
    }
    Ok(file)
}

/// Opens connections to the guest over its vsock.
#[derive(Debug)]
pub struct Dialer {
    /// Directory of the socket.
    dir: OwnedFd,
    name: &'static str,
    next: AtomicU64,
    /// Connections that may wait in the guest for the request that names them.
    room: Arc<Semaphore>,
}

/// Room in the guest for the streams of one process. Held until the request that
/// names them is answered.
#[derive(Debug)]
#[must_use]
pub struct Room {
    _permit: Option<OwnedSemaphorePermit>,
}

impl Dialer {
    /// Dials by the socket `name` in `dir`.
    #[must_use]
    pub fn new(dir: OwnedFd, name: &'static str) -> Self {
        Dialer {
            dir,
            name,
            next: AtomicU64::new(1),
            room: Arc::new(Semaphore::new(STREAMS_WAITING)),
        }
    }

    /// Waits until the guest has room for so many streams at once.
    async fn reserve(&self, streams: u32) -> Room {
        let room = Arc::clone(&self.room).acquire_many_owned(streams).await;
        // The semaphore is never closed.
        Room { _permit: room.ok() }
    }

    /// Connects a new stream; answers its id too.
    async fn stream(&self) -> Result<(u64, UnixStream)> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let connected = timeout(CONNECT, self.connect(id)).await;
        let stream = connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::Stream)?;
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
    /// Opens FIFOs and files, connects each to the guest and begins to relay.
    /// Answers what the agent must be told, and the room that the streams take up
    /// until it has answered.
    pub async fn open(stdio: &Stdio, dialer: &Dialer) -> Result<(Self, agent::Stdio, Room)> {
        let mut told = agent::Stdio {
            terminal: stdio.terminal,
            ..agent::Stdio::default()
        };
        let mut tasks = JoinSet::new();
        let (count, outputs) = watch::channel(0_usize);
        let count = Arc::new(count);
        let mut held = None;
        let mut stdin = None;
        let input = Target::named(&stdio.stdin)?;
        let stderr = if stdio.terminal {
            ""
        } else {
            stdio.stderr.as_str()
        };
        let named = [stdio.stdin.as_str(), &stdio.stdout, stderr];
        let streams = named.iter().filter(|name| !name.is_empty()).count();
        let room = dialer.reserve(u32::try_from(streams).unwrap_or(0)).await;
        if let Some(Target::Fifo(path) | Target::File(path)) = input {
            let reader = open_fifo(&path, OFlags::RDONLY)?;
            held = Some(open_fifo(&path, OFlags::WRONLY)?);
            let reader = pipe::Receiver::from_owned_fd(reader).map_err(host("watch stdin"))?;
            let (id, stream) = dialer.stream().await?;
            told.stdin = id;
            stdin = Some(tasks.spawn(relay_in(reader, stream)));
        }
        for (name, told) in [
            (stdio.stdout.as_str(), &mut told.stdout),
            (stderr, &mut told.stderr),
        ] {
            let Some(target) = Target::named(name)? else {
                continue;
            };
            let output = Output::open(target).await?;
            let (id, stream) = dialer.stream().await?;
            *told = id;
            count.send_modify(|open| *open += 1);
            let count = Arc::clone(&count);
            tasks.spawn(async move {
                match relay_out(stream, output).await {
                    Ok(()) => debug!(stream = id, "output ended"),
                    Err(error) => warn!(stream = id, %error, "output is lost from here"),
                }
                count.send_modify(|open| *open = open.saturating_sub(1));
            });
        }
        let streams = Streams {
            stdin_held: held.into(),
            stdin,
            outputs,
            _tasks: tasks,
        };
        Ok((streams, told, room))
    }

    /// Lets stdin end once its writers are gone and what they wrote is delivered.
    pub fn close_stdin(&self) {
        lock(&self.stdin_held).take();
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

/// Where output goes to.
enum Output {
    Fifo {
        writer: pipe::Sender,
        /// Without a read end the write end could not be opened while the caller is
        /// not there yet, and would break when it goes.
        _held: OwnedFd,
    },
    File(Arc<File>),
}

impl Output {
    async fn open(target: Target) -> Result<Self> {
        match target {
            Target::Fifo(path) => {
                let held = open_fifo(&path, OFlags::RDONLY)?;
                let writer = open_fifo(&path, OFlags::WRONLY)?;
                Ok(Output::Fifo {
                    writer: pipe::Sender::from_owned_fd(writer).map_err(host("watch an output"))?,
                    _held: held,
                })
            }
            Target::File(path) => {
                let opened = spawn_blocking(move || open_file(&path)).await;
                let file = opened.map_err(|_| Error::Panicked("opening a log file"))??;
                Ok(Output::File(Arc::new(file)))
            }
        }
    }

    /// Writes `buffer` and gives it back.
    async fn write(&mut self, buffer: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Output::Fifo { writer, .. } => {
                writer.write_all(&buffer).await?;
                Ok(buffer)
            }
            // A disk may take its time, for which nobody else shall wait.
            Output::File(file) => {
                let file = Arc::clone(file);
                let written = spawn_blocking(move || {
                    (&*file).write_all(&buffer)?;
                    Ok(buffer)
                });
                written.await.map_err(io::Error::other)?
            }
        }
    }
}

async fn relay_out(mut stream: UnixStream, mut output: Output) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(BUFFER);
    loop {
        buffer.clear();
        if stream.read_buf(&mut buffer).await? == 0 {
            return Ok(());
        }
        buffer = output.write(buffer).await?;
    }
}

#[cfg(test)]
mod tests;
