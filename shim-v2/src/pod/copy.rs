//! Copies of files between a container and whoever asks for them.
//!
//! The work is the agent's; here bytes are passed on between the caller's stream and
//! one of the guest's. A copy takes as long as its caller has patience: it ends at once
//! when that one is gone, and the agent is told.

use std::pin::pin;

use bulkhead_agent_api::COPY_BEGINS;
use tokio::{
    io::AsyncReadExt,
    net::UnixStream,
    sync::oneshot,
    task::{JoinError, JoinHandle},
    time::{Duration, timeout},
};
use tracing::debug;

use super::{COPIES, Pod, check};
use crate::{
    agent::{Agent, Copying},
    error::{Error, Result},
    io::{
        Room,
        streaming::{Interrupted, Passage},
    },
    names::ContainerId,
    state::Op,
};

impl Pod {
    /// Copies files. `caller` never says anything, and breaks when whoever asked has
    /// gone.
    pub(crate) async fn copy(
        &self,
        id: &ContainerId,
        copying: &Copying,
        mut passage: Passage,
        mut caller: oneshot::Receiver<()>,
    ) -> Result<()> {
        let (container, init) = self.first(id)?;
        check(&container, &init, Op::Copy)?;
        let turn = self.copies.try_acquire();
        let _turn = turn.map_err(|_| Error::TooManyCopies(COPIES))?;
        let guest = self.living()?;
        let connected = async {
            let room = guest.dialer().reserve(1).await;
            let (stream, connection) = guest.dialer().stream().await?;
            Ok((room, stream, connection))
        };
        let connected = tokio::select! {
            connected = connected => connected,
            _ = &mut caller => Err(Error::GivenUp),
        };
        let copied = match connected {
            Ok((room, stream, connection)) => {
                let copy = Copy {
                    agent: guest.agent().clone(),
                    copying,
                    stream,
                };
                copy.run(id, room, connection, &mut passage, caller).await
            }
            Err(error) => Err(error),
        };
        match copied {
            Ok(()) => {
                if matches!(copying, Copying::In { .. }) {
                    tokio::spawn(passage.drain());
                }
                Ok(())
            }
            Err(error) => {
                self.doubt_if_late(&error);
                Err(self.explained(error).await)
            }
        }
    }
}

/// One copy.
struct Copy<'a> {
    agent: Agent,
    copying: &'a Copying,
    stream: u64,
}

/// The agent's answer.
type Answer = JoinHandle<Result<()>>;

impl Copy<'_> {
    /// Runs it to its end, or has the agent give it up.
    async fn run(
        &self,
        id: &ContainerId,
        room: Room,
        connection: UnixStream,
        passage: &mut Passage,
        caller: oneshot::Receiver<()>,
    ) -> Result<()> {
        // A request that was given up while it is written would end the connection.
        let (agent, copying, stream) = (self.agent.clone(), self.copying.clone(), self.stream);
        let id = id.clone();
        let mut answer = tokio::spawn(async move { agent.copy(&id, stream, &copying).await });
        let copied = tokio::select! {
            copied = self.both(&mut answer, room, connection, passage) => copied,
            _ = caller => Err(Error::GivenUp),
        };
        // The connection is closed by now, by which most copies end.
        if !answer.is_finished() {
            if let Err(error) = self.agent.cancel_copy(self.stream).await {
                debug!(stream, error = error.text(), "a copy goes on");
            }
            answer.abort();
        }
        copied
    }

    /// The agent's answer, and the bytes meanwhile.
    async fn both(
        &self,
        answer: &mut Answer,
        room: Room,
        mut connection: UnixStream,
        passage: &mut Passage,
    ) -> Result<()> {
        let limit = self.agent.limits().request;
        let mut relay = pin!(async {
            if !begins(&mut connection, limit).await? {
                // Refused: the answer says why.
                return Ok(Ok(()));
            }
            drop(room);
            let relayed = match self.copying {
                Copying::In { .. } => passage.receive(&mut connection).await,
                Copying::Out { .. } => passage.send(&mut connection).await,
            };
            match relayed {
                Ok(()) => Ok(Ok(())),
                Err(Interrupted::Caller) => Err(Error::GivenUp),
                // As long as there is no answer, that may be in order.
                Err(Interrupted::Other(error)) => Ok(Err(error)),
            }
        });
        let relayed = tokio::select! {
            biased;
            answer = &mut *answer => {
                self::answer(answer)?;
                match self.copying {
                    // What comes behind the archive's end is not part of it.
                    Copying::In { .. } => return Ok(()),
                    Copying::Out { .. } => relay.await?,
                }
            }
            relayed = &mut relay => {
                let relayed = relayed?;
                self::answer(answer.await)?;
                relayed
            }
        };
        match (self.copying, relayed) {
            (Copying::Out { .. }, Err(error)) => Err(Error::Stream(error)),
            (Copying::Out { .. }, Ok(())) | (Copying::In { .. }, _) => Ok(()),
        }
    }
}

fn answer(joined: Result<Result<()>, JoinError>) -> Result<()> {
    joined.unwrap_or(Err(Error::Panicked("Copy")))
}

/// Waits for the agent to take its end of the connection; false if it has closed it.
async fn begins(connection: &mut UnixStream, limit: Duration) -> Result<bool> {
    match timeout(limit, connection.read_u8()).await {
        Ok(said) => Ok(said.is_ok_and(|said| said == COPY_BEGINS)),
        Err(_) => Err(Error::Deadline {
            call: "Copy",
            limit_ms: limit.as_millis(),
        }),
    }
}

#[cfg(test)]
impl Pod {
    /// How many more could be begun.
    pub(crate) fn copies_left(&self) -> usize {
        self.copies.available_permits()
    }
}
