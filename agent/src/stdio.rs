//! The standard streams of a process, between its pipes and the host.
//!
//! The process always has pipes or a pseudo-terminal, never the connection
//! itself: programs open `/dev/stdout`, which works with no socket. A pump
//! copies each stream; it reads no further than its buffer while the other side
//! is not taking, so that whoever writes too fast waits.
//!
//! Promises: output is complete before [`Pumps::drained`] answers; a reader
//! that goes away does not end the process (its output is thrown away instead),
//! unless the request wants just that.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use bulkhead_agent_api::agent::Stdio;
use futures::future::Either;
use rustix::{
    fs::{Mode, OFlags},
    pipe::{PipeFlags, pipe_with},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::unix::pipe::{Receiver, Sender},
    sync::{Notify, watch},
};

use crate::{
    error::{Doing, Error},
    reaper::{ExitWatch, ended},
    streams::{BoxStream, Claim, Streams},
};

/// What one read takes: the size of a pipe.
const BUFFER_BYTES: usize = 64 * 1024;

/// Both sides of a process's streams before the process is there.
#[derive(Debug)]
pub(crate) struct Prepared {
    stdin: Option<(Claim, Option<OwnedFd>)>,
    outputs: Vec<(Option<Claim>, Option<OwnedFd>)>,
    breaks: bool,
}

/// The same when the host's connections are there.
#[derive(Debug)]
pub(crate) struct Connected {
    stdin: Option<(BoxStream, Option<OwnedFd>)>,
    outputs: Vec<(Option<BoxStream>, Option<OwnedFd>)>,
    breaks: bool,
}

/// Makes what the process gets as its streams 0, 1 and 2, and our side of it.
///
/// With a terminal all three are `/dev/null`; it is made in the container, and
/// [`Connected::start`] gets its other end.
pub(crate) fn prepare(
    stdio: &Stdio,
    streams: &Arc<Streams>,
) -> Result<([OwnedFd; 3], Prepared), Error> {
    let claim = |id| {
        if id == 0 {
            Ok(None)
        } else {
            streams.claim(id).map(Some)
        }
    };
    let (stdin, stdout) = (claim(stdio.stdin)?, claim(stdio.stdout)?);
    if stdio.terminal {
        let prepared = Prepared {
            stdin: stdin.map(|claim| (claim, None)),
            // Somebody must read what a terminal says, if only to drop it.
            outputs: vec![(stdout, None)],
            breaks: false,
        };
        return Ok(([null()?, null()?, null()?], prepared));
    }
    let mut prepared = Prepared {
        stdin: None,
        outputs: Vec::new(),
        breaks: stdio.breaks,
    };
    let for_process = [
        match stdin {
            None => null()?,
            Some(claim) => {
                let (read, write) = pipe()?;
                prepared.stdin = Some((claim, Some(write)));
                read
            }
        },
        output(stdout, &mut prepared)?,
        output(claim(stdio.stderr)?, &mut prepared)?,
    ];
    Ok((for_process, prepared))
}

fn output(claim: Option<Claim>, prepared: &mut Prepared) -> Result<OwnedFd, Error> {
    let Some(claim) = claim else {
        return null();
    };
    let (read, write) = pipe()?;
    prepared.outputs.push((Some(claim), Some(read)));
    Ok(write)
}

pub(crate) fn pipe() -> Result<(OwnedFd, OwnedFd), Error> {
    pipe_with(PipeFlags::CLOEXEC).doing("make a pipe")
}

pub(crate) fn null() -> Result<OwnedFd, Error> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/null", flags, Mode::empty()).doing("open /dev/null")
}

/// The running copies of a process's streams.
#[derive(Debug)]
pub(crate) struct Pumps {
    close_stdin: Arc<Notify>,
    outputs: watch::Receiver<()>,
}

impl Prepared {
    /// Waits for the host's connections. A process is not made without them: what
    /// it says would be lost in silence.
    pub(crate) async fn connect(self) -> Result<Connected, Error> {
        let stdin = match self.stdin {
            Some((claim, pipe)) => Some((claim.stream().await?, pipe)),
            None => None,
        };
        let mut outputs = Vec::new();
        for (claim, pipe) in self.outputs {
            let stream = match claim {
                Some(claim) => Some(claim.stream().await?),
                None => None,
            };
            outputs.push((stream, pipe));
        }
        Ok(Connected {
            stdin,
            outputs,
            breaks: self.breaks,
        })
    }
}

impl Connected {
    /// Starts to copy. `terminal` is the master of the process's terminal.
    pub(crate) fn start(
        self,
        terminal: Option<&OwnedFd>,
        exit: &ExitWatch,
    ) -> Result<Pumps, Error> {
        let pumps = self.pumps(terminal, exit);
        pumps.doing("set up the standard streams")
    }

    fn pumps(self, terminal: Option<&OwnedFd>, exit: &ExitWatch) -> io::Result<Pumps> {
        let close_stdin = Arc::new(Notify::new());
        // Each output pump holds a sender; when the last is gone, all is out.
        let (running, outputs) = watch::channel(());
        let our_end = |pipe: Option<OwnedFd>| match (pipe, terminal) {
            (Some(pipe), _) => Ok(pipe),
            (None, Some(terminal)) => Ok(rustix::io::fcntl_dupfd_cloexec(terminal.as_fd(), 0)?),
            (None, None) => Err(io::Error::from(io::ErrorKind::InvalidInput)),
        };
        if let Some((stream, pipe)) = self.stdin {
            let to_process = Sender::from_owned_fd_unchecked(not_blocking(our_end(pipe)?)?)?;
            let close = Arc::clone(&close_stdin);
            tokio::spawn(pump_in(stream, to_process, close, exit.clone()));
        }
        let breaks = self.breaks;
        for (stream, pipe) in self.outputs {
            let from_process = Receiver::from_owned_fd_unchecked(not_blocking(our_end(pipe)?)?)?;
            let running = running.clone();
            tokio::spawn(async move {
                pump_out(stream, from_process, breaks).await;
                drop(running);
            });
        }
        Ok(Pumps {
            close_stdin,
            outputs,
        })
    }
}

impl Pumps {
    /// Ends the standard input when what has arrived so far is written.
    pub(crate) fn close_stdin(&self) {
        self.close_stdin.notify_one();
    }

    /// Waits until all output has been handed to the host.
    pub(crate) async fn drained(&self) {
        let mut outputs = self.outputs.clone();
        // It never changes: the only news is that the last sender is gone.
        while outputs.changed().await.is_ok() {}
    }
}

/// One pipe of ours by itself.
#[derive(Debug)]
pub(crate) enum Pump {
    /// What the host sends goes into it.
    In(OwnedFd),
    /// What comes out of it goes to the host. A host that takes no more closes it.
    Out(OwnedFd),
}

impl Pump {
    /// Copies until the end of what comes, of whom it is for, or of the process.
    pub(crate) fn run(
        self,
        host: BoxStream,
        exit: ExitWatch,
    ) -> Result<impl Future<Output = ()>, Error> {
        const DOING: &str = "watch a pipe";
        Ok(match self {
            Self::In(pipe) => {
                let pipe = Sender::from_owned_fd_unchecked(not_blocking(pipe).doing(DOING)?);
                let close = Arc::new(Notify::new());
                Either::Left(pump_in(host, pipe.doing(DOING)?, close, exit))
            }
            Self::Out(pipe) => {
                let pipe = Receiver::from_owned_fd_unchecked(not_blocking(pipe).doing(DOING)?);
                Either::Right(pump_out(Some(host), pipe.doing(DOING)?, true))
            }
        })
    }
}

/// Our end of a pipe is ours alone, so this concerns nobody else.
fn not_blocking(fd: OwnedFd) -> io::Result<OwnedFd> {
    rustix::io::ioctl_fionbio(&fd, true)?;
    Ok(fd)
}

async fn pump_in(
    mut stream: BoxStream,
    mut to_process: Sender,
    close: Arc<Notify>,
    exit: ExitWatch,
) {
    let mut buffer = vec![0; BUFFER_BYTES];
    let ended = ended(exit);
    tokio::pin!(ended);
    loop {
        let read = tokio::select! {
            // What has arrived comes before the wish to close.
            biased;
            read = stream.read(&mut buffer) => read,
            () = close.notified() => return,
            _ = &mut ended => return,
        };
        let Ok(length @ 1..) = read else {
            return;
        };
        let written = tokio::select! {
            written = to_process.write_all(&buffer[..length]) => written,
            _ = &mut ended => return,
        };
        if written.is_err() {
            return;
        }
    }
}

async fn pump_out(mut stream: Option<BoxStream>, mut from_process: Receiver, breaks: bool) {
    let mut buffer = vec![0; BUFFER_BYTES];
    // A terminal without a process reads as an error: that is its end.
    while let Ok(length @ 1..) = from_process.read(&mut buffer).await {
        if let Some(to_host) = &mut stream
            && to_host.write_all(&buffer[..length]).await.is_err()
        {
            if breaks {
                return;
            }
            stream = None;
        }
    }
    if let Some(mut to_host) = stream {
        // The host may have closed it first.
        let _ = to_host.shutdown().await;
    }
}
