//! Where output goes to.

use std::{
    fmt,
    fs::File,
    io::{self, Write},
    os::fd::OwnedFd,
    path::PathBuf,
    sync::Arc,
};

use rustix::fs::OFlags;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixStream, unix::pipe},
    sync::Mutex as AsyncMutex,
    task::spawn_blocking,
};

use super::{
    BUFFER, StreamHost,
    logger::Logger,
    open::{open_fifo, open_file},
    streaming::Outlet,
    target::Target,
};
use crate::error::{Error, Result};

/// One way into a target.
#[derive(Debug)]
pub(super) enum Output {
    Fifo {
        writer: pipe::Sender,
        /// Without a read end the write end could not be opened while the caller is
        /// not there yet, and would break when it goes.
        _held: OwnedFd,
    },
    File(Arc<File>),
    Program(PathBuf, pipe::Sender),
    Stream(Arc<AsyncMutex<Outlet>>),
}

impl fmt::Display for Output {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Output::Fifo { .. } => f.write_str("a FIFO"),
            Output::File(_) => f.write_str("a log file"),
            Output::Program(path, _) => write!(f, "the logging program {}", path.display()),
            Output::Stream(_) => f.write_str("a stream"),
        }
    }
}

/// Two ways into one target, for stdout and for stderr, and the program that it is.
pub(super) struct Opened {
    pub(super) ways: [Output; 2],
    pub(super) logger: Option<Logger>,
}

impl Output {
    /// Opens a target. `id` is that of the container, or of the exec.
    pub(super) async fn open(target: Target, id: &str, host: &StreamHost) -> Result<Opened> {
        let mut logger = None;
        let ways = match target {
            Target::Fifo(path) => {
                let way = || {
                    let held = open_fifo(&path, OFlags::RDONLY)?;
                    let writer = open_fifo(&path, OFlags::WRONLY)?;
                    let writer = pipe::Sender::from_owned_fd(writer);
                    Ok::<_, Error>(Output::Fifo {
                        writer: writer.map_err(crate::error::host("watch an output"))?,
                        _held: held,
                    })
                };
                [way()?, way()?]
            }
            Target::File(path) => {
                let opened = spawn_blocking(move || open_file(&path)).await;
                let file = opened.map_err(|_| Error::Panicked("opening a log file"))??;
                let file = Arc::new(file);
                [Output::File(Arc::clone(&file)), Output::File(file)]
            }
            Target::Program(command) => {
                let path = command.path.clone();
                let (program, pipes) = Logger::start(command, id, host).await?;
                logger = Some(program);
                pipes.map(|pipe| Output::Program(path.clone(), pipe))
            }
            Target::Stream(address) => {
                let outlet = Outlet::new(host.hub.claim(&address).await?);
                let outlet = Arc::new(AsyncMutex::new(outlet));
                [Output::Stream(Arc::clone(&outlet)), Output::Stream(outlet)]
            }
        };
        Ok(Opened { ways, logger })
    }

    /// Writes `buffer` and gives it back.
    async fn write(&mut self, buffer: Vec<u8>) -> io::Result<Vec<u8>> {
        match self {
            Output::Fifo { writer, .. } | Output::Program(_, writer) => {
                writer.write_all(&buffer).await?;
            }
            // A disk may take its time, for which nobody else shall wait.
            Output::File(file) => {
                let file = Arc::clone(file);
                let written = spawn_blocking(move || {
                    (&*file).write_all(&buffer)?;
                    Ok(buffer)
                });
                return written.await.map_err(io::Error::other)?;
            }
            Output::Stream(outlet) => outlet.lock().await.write(&buffer).await,
        }
        Ok(buffer)
    }

    /// Ends what ends only when it is told. Answers a stream for which somebody may
    /// still come.
    pub(super) async fn end(self) -> Option<Outlet> {
        let Output::Stream(outlet) = self else {
            return None;
        };
        // The other way into it may be open yet.
        let mut outlet = Arc::into_inner(outlet)?.into_inner();
        outlet.finish().await;
        Some(outlet)
    }

    /// Passes on all that the guest sends.
    pub(super) async fn relay(&mut self, mut stream: UnixStream) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(BUFFER);
        loop {
            buffer.clear();
            if stream.read_buf(&mut buffer).await? == 0 {
                return Ok(());
            }
            buffer = self.write(buffer).await?;
        }
    }
}
