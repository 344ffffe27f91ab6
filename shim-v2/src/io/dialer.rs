//! Connections to the guest, one for each stream.
//!
//! A connection is nobody's in the guest until the request that names it is
//! answered, and the agent has room for few of those. So room is reserved before
//! the first byte is sent: however many processes begin at once, none of them finds
//! its output refused.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{STREAM_PORT, STREAMS_WAITING};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

use crate::error::{Error, Result};

/// Limit for a connection to the guest.
const CONNECT: Duration = Duration::from_secs(10);

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
        Self::unpack(dir, name, 1)
    }

    /// The same, and `next` is the first id that was not used yet.
    pub(crate) fn unpack(dir: OwnedFd, name: &'static str, next: u64) -> Self {
        Dialer {
            dir,
            name,
            next: AtomicU64::new(next),
            room: Arc::new(Semaphore::new(STREAMS_WAITING)),
        }
    }

    /// Waits until the guest has room for so many streams at once.
    pub(crate) async fn reserve(&self, streams: u32) -> Room {
        let room = Arc::clone(&self.room).acquire_many_owned(streams).await;
        // The semaphore is never closed.
        Room { _permit: room.ok() }
    }

    /// Connects a new stream; answers its id too.
    pub(crate) async fn stream(&self) -> Result<(u64, UnixStream)> {
        let id = self.new_id();
        Ok((id, self.connect(id).await?))
    }

    /// The first id that was not used yet.
    pub(crate) fn next(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// An id for a stream, never used before.
    pub(crate) fn new_id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Connects the stream with this id.
    pub(crate) async fn connect(&self, id: u64) -> Result<UnixStream> {
        let connected = timeout(CONNECT, self.connect_now(id)).await;
        connected
            .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
            .map_err(Error::Stream)
    }

    async fn connect_now(&self, id: u64) -> io::Result<UnixStream> {
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
