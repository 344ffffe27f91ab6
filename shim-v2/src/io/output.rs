//! Where output goes to.

use std::{
    fmt,
    fs::File,
    future::poll_fn,
    io::{self, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Poll, ready},
};

use bulkhead_agent_api::relay::{BUFFER, Way};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, ReadBuf},
    net::{UnixStream, unix::pipe},
    sync::Mutex as AsyncMutex,
    task::spawn_blocking,
};
use tracing::{debug, warn};

use super::{
    StreamHost,
    logger::Logger,
    open::{open_fifo, open_file},
    streaming::Outlet,
    target::Target,
};
use crate::{
    carry::{Bag, CarriedFd},
    error::{Error, Result},
    lock::lock,
};

/// One way into a target.
#[derive(Debug)]
pub(super) enum Output {
    Fifo {
        writer: pipe::Sender,
        /// Without a read end the write end could not be opened while the caller is
        /// not there yet, and would break when it goes.
        held: OwnedFd,
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
                        held,
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
}

/// An output on its way. It is whole whenever its task waits, but while a file is
/// written to.
#[derive(Debug)]
pub(super) struct Flow {
    stream: UnixStream,
    output: Output,
    way: Way,
    writing: bool,
}

/// What goes along of it when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    stream: CarriedFd,
    way: Way,
    to: To,
}

/// What goes along of a target.
#[derive(Debug, Serialize, Deserialize)]
enum To {
    Fifo { writer: CarriedFd, held: CarriedFd },
    File(CarriedFd),
    Program(PathBuf, CarriedFd),
}

impl Flow {
    /// From the guest's stream to a target.
    pub(super) fn new(stream: UnixStream, output: Output) -> Self {
        Flow {
            stream,
            output,
            way: Way::default(),
            writing: false,
        }
    }

    /// Goes on with one of the program before this one.
    pub(super) fn unpack(carried: Carried) -> io::Result<Self> {
        let sender = |fd: CarriedFd| pipe::Sender::from_owned_fd(fd.take()?);
        let output = match carried.to {
            To::Fifo { writer, held } => Output::Fifo {
                writer: sender(writer)?,
                held: held.take()?,
            },
            To::File(file) => Output::File(Arc::new(file.take()?.into())),
            To::Program(path, writer) => Output::Program(path, sender(writer)?),
        };
        let stream = StdStream::from(carried.stream.take()?);
        Ok(Flow {
            way: carried.way,
            ..Flow::new(UnixStream::from_std(stream)?, output)
        })
    }

    /// Is it a stream of containerd's streaming service, which cannot be carried?
    pub(super) fn is_stream(&self) -> bool {
        matches!(self.output, Output::Stream(_))
    }

    /// Is there a write under way, so that it cannot be carried just now?
    pub(super) fn is_busy(&self) -> bool {
        self.writing
    }

    /// What goes along. It must not be [busy](Flow::is_busy).
    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let to = match &self.output {
            Output::Fifo { writer, held } => To::Fifo {
                writer: bag.put(writer.as_fd())?,
                held: bag.put(held)?,
            },
            Output::File(file) => To::File(bag.put(file.as_fd())?),
            Output::Program(path, writer) => To::Program(path.clone(), bag.put(writer.as_fd())?),
            Output::Stream(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        Ok(Carried {
            stream: bag.put(self.stream.as_fd())?,
            way: self.way.clone(),
            to,
        })
    }
}

/// Where an output is as long as it flows.
pub(super) type Slot = Mutex<Option<Flow>>;

/// Passes on all that the guest sends, and leaves the slot empty. Answers a stream for
/// which somebody may still come.
pub(super) async fn relay(slot: &Slot) -> Option<Outlet> {
    let relayed = poll_fn(|context| match &mut *lock(slot) {
        Some(Flow {
            stream,
            output: Output::Fifo { writer, .. } | Output::Program(_, writer),
            way,
            ..
        }) => {
            ready!(way.poll(context, stream, writer));
            Poll::Ready(Some(way.broken().map_or(Ok(()), |kind| Err(kind.into()))))
        }
        _ => Poll::Ready(None),
    });
    let relayed = match relayed.await {
        Some(relayed) => relayed,
        None => relay_slowly(slot).await,
    };
    let flow = lock(slot).take();
    let output = flow?.output;
    match relayed {
        Ok(()) => debug!(%output, "ended"),
        Err(error) => warn!(%output, %error, "output is lost from here"),
    }
    output.end().await
}

/// The same to a target that is not simply written to.
async fn relay_slowly(slot: &Slot) -> io::Result<()> {
    loop {
        let read = poll_fn(|context| {
            let mut slot = lock(slot);
            let Some(flow) = &mut *slot else {
                return Poll::Ready(Ok((Vec::new(), None)));
            };
            let mut space = [MaybeUninit::uninit(); BUFFER];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut flow.stream).poll_read(context, &mut read))?;
            let bytes = read.filled().to_vec();
            let output = match &flow.output {
                Output::File(file) => Slow::File(Arc::clone(file)),
                Output::Stream(outlet) => Slow::Stream(Arc::clone(outlet)),
                Output::Fifo { .. } | Output::Program(..) => {
                    return Poll::Ready(Err(io::ErrorKind::Unsupported.into()));
                }
            };
            flow.writing = !bytes.is_empty();
            Poll::Ready(Ok::<_, io::Error>((bytes, Some(output))))
        });
        let (bytes, output) = read.await?;
        if bytes.is_empty() {
            return Ok(());
        }
        match output {
            // A disk may take its time, for which nobody else shall wait.
            Some(Slow::File(file)) => {
                let written = spawn_blocking(move || (&*file).write_all(&bytes)).await;
                written.map_err(io::Error::other)??;
            }
            Some(Slow::Stream(outlet)) => outlet.lock().await.write(&bytes).await,
            None => {}
        }
        if let Some(flow) = &mut *lock(slot) {
            flow.writing = false;
        }
    }
}

enum Slow {
    File(Arc<File>),
    Stream(Arc<AsyncMutex<Outlet>>),
}
