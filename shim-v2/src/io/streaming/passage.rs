//! A stream that carries one thing, once: the link that its caller opened is the only
//! one, and what breaks it ends the matter.
//!
//! Holds one buffer. Bytes are asked for no faster than they are taken at the other
//! end, in both directions.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    time::timeout,
};

use super::{
    Claim,
    link::{Ended, Link, Message},
    outgoing::Outgoing,
    window::Window,
};
use crate::error::{Error, Result};

/// Bytes that are read from the guest at once.
const BUFFER: usize = 64 << 10;
/// Time for a stream to be opened that a request has named: callers open it before.
const OPENING: Duration = Duration::from_secs(2);
/// Time for a caller to say what it had begun to say.
const REST: Duration = Duration::from_secs(5);

/// Why bytes go no further.
#[derive(Debug)]
pub(crate) enum Interrupted {
    /// The caller takes or sends no more.
    Caller,
    /// The other end takes or sends no more.
    Other(io::Error),
}

impl From<Ended> for Interrupted {
    fn from(_: Ended) -> Self {
        Interrupted::Caller
    }
}

/// The stream. Dropping it ends it.
#[derive(Debug)]
pub(crate) struct Passage {
    link: Link,
    window: Window,
    /// Nobody else can name it meanwhile.
    _claim: Claim,
}

impl Passage {
    /// Waits for the caller's link, which should be there; `id` names the stream.
    pub(crate) async fn open(claim: Claim, id: &str) -> Result<Self> {
        let link = timeout(OPENING, claim.next()).await;
        let link = link.map_err(|_| Error::NoStream(id.chars().take(120).collect()))?;
        Ok(Passage {
            link,
            window: Window::default(),
            _claim: claim,
        })
    }

    /// Passes on what the caller sends, to its end.
    pub(crate) async fn receive(
        &mut self,
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<(), Interrupted> {
        loop {
            match self.next().await {
                Ok(bytes) => to.write_all(&bytes).await.map_err(Interrupted::Other)?,
                Err(Ended::Finished) => return to.shutdown().await.map_err(Interrupted::Other),
                Err(Ended::Broken) => return Err(Interrupted::Caller),
            }
        }
    }

    async fn next(&mut self) -> Result<Vec<u8>, Ended> {
        loop {
            self.window.open(&self.link).await?;
            if let Message::Data(bytes) = self.link.receive().await? {
                self.window.took(bytes.len());
                return Ok(bytes);
            }
        }
    }

    /// Takes what the caller still sends of something that nobody needs any more, so
    /// that it comes to its end in peace.
    pub(crate) async fn drain(mut self) {
        let _ = timeout(REST, async { while self.next().await.is_ok() {} }).await;
    }

    /// Passes on all that can be read, as the caller grants credit.
    pub(crate) async fn send(
        &mut self,
        from: &mut (impl AsyncRead + Unpin),
    ) -> Result<(), Interrupted> {
        let mut out = Outgoing::default();
        let mut buffer = Vec::with_capacity(BUFFER);
        let (mut all_read, mut grants) = (false, true);
        loop {
            while let Some(message) = out.next() {
                let sent = self.link.data(message).await;
                sent.map_err(|_| Interrupted::Caller)?;
            }
            if all_read && out.unsent() == 0 {
                return Ok(());
            }
            tokio::select! {
                received = self.link.receive(), if grants => match received {
                    Ok(Message::Credit(credit)) => out.grant(credit),
                    Ok(Message::Data(_) | Message::Other) => {}
                    // It has granted all that it will.
                    Err(Ended::Finished) => grants = false,
                    Err(Ended::Broken) => return Err(Interrupted::Caller),
                },
                read = from.read_buf(&mut buffer), if out.unsent() == 0 => {
                    all_read = read.map_err(Interrupted::Other)? == 0;
                    out.push(&buffer);
                    buffer.clear();
                }
                else => return Err(Interrupted::Caller),
            }
        }
    }
}
