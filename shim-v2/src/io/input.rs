//! Where input comes from.

use std::{
    future::poll_fn,
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    pin::Pin,
    sync::Mutex,
    task::{Poll, ready},
};

use bulkhead_agent_api::relay::Way;
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWriteExt, ReadBuf},
    net::{UnixStream, unix::pipe},
    sync::watch,
};

use super::{StreamHost, open::open_fifo, streaming::Inlet, target::Target};
use crate::{
    carry::{Bag, CarriedFd},
    error::{Result, host},
    lock::lock,
};

/// A source of input.
#[derive(Debug)]
pub(super) enum Input {
    Fifo(pipe::Receiver),
    Stream(Inlet),
}

impl Input {
    /// Opens a target; of a FIFO also the end that keeps it from ending.
    pub(super) async fn open(
        target: Target,
        streams: &StreamHost,
        closing: watch::Receiver<bool>,
    ) -> Result<(Option<Self>, Option<OwnedFd>)> {
        match target {
            Target::Fifo(path) => {
                let reader = open_fifo(&path, OFlags::RDONLY)?;
                let held = open_fifo(&path, OFlags::WRONLY)?;
                let reader = pipe::Receiver::from_owned_fd(reader).map_err(host("watch stdin"))?;
                Ok((Some(Input::Fifo(reader)), Some(held)))
            }
            Target::Stream(address) => {
                let claim = streams.hub.claim(&address).await?;
                Ok((Some(Input::Stream(Inlet::new(claim, closing))), None))
            }
            // Refused before.
            Target::File(_) | Target::Program(_) => Ok((None, None)),
        }
    }
}

/// Input on its way. It is whole whenever its task waits.
#[derive(Debug)]
pub(super) struct Flow {
    /// `None` once there is no more.
    input: Option<Input>,
    stream: UnixStream,
    way: Way,
}

/// What goes along of it when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    reader: Option<CarriedFd>,
    stream: CarriedFd,
    way: Way,
}

/// Where input is as long as it flows.
pub(super) type Slot = Mutex<Option<Flow>>;

impl Flow {
    /// From a source to the guest's stream.
    pub(super) fn new(input: Input, stream: UnixStream) -> Self {
        Flow {
            input: Some(input),
            stream,
            way: Way::default(),
        }
    }

    /// Goes on with one of the program before this one.
    pub(super) fn unpack(carried: Carried) -> io::Result<Self> {
        let reader = |fd: CarriedFd| pipe::Receiver::from_owned_fd(fd.take()?);
        let reader = carried.reader.map(reader).transpose()?;
        let stream = StdStream::from(carried.stream.take()?);
        Ok(Flow {
            input: reader.map(Input::Fifo),
            stream: UnixStream::from_std(stream)?,
            way: carried.way,
        })
    }

    /// Is it a stream of containerd's streaming service, which cannot be carried?
    pub(super) fn is_stream(&self) -> bool {
        matches!(self.input, Some(Input::Stream(_)))
    }

    /// What goes along.
    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let reader = match &self.input {
            Some(Input::Fifo(reader)) => Some(bag.put(reader.as_fd())?),
            Some(Input::Stream(_)) => return Err(io::ErrorKind::Unsupported.into()),
            None => None,
        };
        Ok(Carried {
            reader,
            stream: bag.put(self.stream.as_fd())?,
            way: self.way.clone(),
        })
    }
}

/// Passes on all that the source has, and lets go of it.
pub(super) async fn relay(slot: &Slot) {
    poll_fn(|context| match &mut *lock(slot) {
        Some(Flow {
            input: Some(Input::Fifo(reader)),
            stream,
            way,
        }) => way.poll(context, reader, stream),
        _ => Poll::Ready(()),
    })
    .await;
    let rest = match &mut *lock(slot) {
        Some(flow) => match flow.input.take() {
            Some(Input::Stream(inlet)) => Some(inlet),
            _ => None,
        },
        None => None,
    };
    if let Some(inlet) = rest {
        let flow = lock(slot).take();
        if let Some(flow) = flow {
            let stream = relay_stream(inlet, flow.stream).await;
            *lock(slot) = Some(Flow {
                input: None,
                stream,
                way: Way::default(),
            });
        }
    }
}

/// The same of a stream of containerd's.
async fn relay_stream(mut inlet: Inlet, mut stream: UnixStream) -> UnixStream {
    while let Some(bytes) = inlet.read().await {
        if stream.write_all(&bytes).await.is_err() {
            return stream;
        }
    }
    let _ = stream.shutdown().await;
    stream
}

/// Waits until the guest has closed the stream.
pub(super) async fn linger(slot: &Slot) {
    poll_fn(|context| {
        let mut slot = lock(slot);
        let Some(flow) = &mut *slot else {
            return Poll::Ready(());
        };
        loop {
            let mut space = [0; 64];
            let mut rest = ReadBuf::new(&mut space);
            let read = ready!(Pin::new(&mut flow.stream).poll_read(context, &mut rest));
            if read.is_err() || rest.filled().is_empty() {
                return Poll::Ready(());
            }
        }
    })
    .await;
    lock(slot).take();
}
