//! Connections that carry standard streams, until their process claims them.
//!
//! Owns what has arrived and nobody has asked for, and what has been asked for
//! and has not arrived: either can come first. Promises that neither lasts
//! longer than [`WAIT`] and that at most [`STREAMS_WAITING`] connections wait: for
//! each of them there is [`Room`], without which none is taken. The host keeps to
//! the same number, so that a connection never waits for one of another process
//! whose request comes behind it.

use std::{
    collections::HashMap,
    fmt::Debug,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use bulkhead_agent_api::STREAMS_WAITING;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite},
    sync::{OwnedSemaphorePermit, Semaphore, oneshot},
    time::{sleep, timeout},
};

use crate::error::Error;

/// How long a connection and its request wait for each other.
pub const WAIT: Duration = Duration::from_secs(10);

/// Any connection.
pub trait Stream: AsyncRead + AsyncWrite + Send + Unpin + Debug {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + Debug> Stream for T {}

/// A connection whose transport does not matter any more.
pub type BoxStream = Box<dyn Stream>;

/// The meeting point of connections and requests.
#[derive(Debug)]
pub struct Streams {
    slots: Mutex<HashMap<u64, Slot>>,
    unclaimed: Arc<Semaphore>,
}

#[derive(Debug)]
enum Slot {
    /// The connection is there; it counts as unclaimed.
    Arrived(BoxStream, #[expect(dead_code, reason = "held")] Room),
    /// A process waits for it.
    Claimed(oneshot::Sender<BoxStream>),
}

/// The right of one connection to wait to be claimed.
#[derive(Debug)]
pub struct Room(#[expect(dead_code, reason = "held")] OwnedSemaphorePermit);

impl Streams {
    /// With nothing in it.
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            slots: Mutex::default(),
            unclaimed: Arc::new(Semaphore::new(STREAMS_WAITING)),
        })
    }

    /// Waits until there is room for another connection.
    pub async fn room(&self) -> Room {
        let permit = Arc::clone(&self.unclaimed).acquire_owned().await;
        Room(permit.expect("nobody closes the semaphore"))
    }

    /// Takes a new connection.
    pub fn accept(self: &Arc<Self>, connection: impl Stream + 'static, room: Room) {
        let streams = Arc::clone(self);
        tokio::spawn(async move { streams.place(Box::new(connection), room).await });
    }

    /// Closes those of these connections that have arrived and were not claimed:
    /// the request that names them has failed.
    pub fn forget(&self, ids: [u64; 3]) {
        let mut slots = self.lock();
        for id in ids {
            if let Some(Slot::Arrived(..)) = slots.get(&id) {
                slots.remove(&id);
            }
        }
    }

    async fn place(&self, mut connection: BoxStream, room: Room) {
        let Ok(Ok(id)) = timeout(WAIT, connection.read_u64_le()).await else {
            return;
        };
        if !self.hand_over(id, connection, room) {
            return;
        }
        sleep(WAIT).await;
        let mut slots = self.lock();
        if let Some(Slot::Arrived(..)) = slots.get(&id) {
            slots.remove(&id);
        }
    }

    /// Gives the connection to its process; true if it has to wait for one.
    fn hand_over(&self, id: u64, connection: BoxStream, room: Room) -> bool {
        let mut slots = self.lock();
        match slots.remove(&id) {
            None if id != 0 => {
                slots.insert(id, Slot::Arrived(connection, room));
                true
            }
            None => false,
            Some(Slot::Claimed(process)) => {
                // A process that has given up meanwhile closes it.
                let _ = process.send(connection);
                false
            }
            // Ids are never used twice: the first connection counts.
            Some(first @ Slot::Arrived(..)) => {
                slots.insert(id, first);
                false
            }
        }
    }

    /// Claims the stream of an id, from now on.
    pub fn claim(self: &Arc<Self>, id: u64) -> Result<Claim, Error> {
        let (sender, receiver) = oneshot::channel();
        let mut slots = self.lock();
        match slots.remove(&id) {
            Some(Slot::Arrived(connection, _)) => {
                // The receiver is in our hand.
                let _ = sender.send(connection);
            }
            Some(taken @ Slot::Claimed(_)) => {
                slots.insert(id, taken);
                return Err(Error::StreamTaken(id));
            }
            None => {
                slots.insert(id, Slot::Claimed(sender));
            }
        }
        Ok(Claim {
            id,
            streams: Arc::clone(self),
            receiver,
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Slot>> {
        self.slots.lock().expect("no holder of the lock panics")
    }
}

/// The right to one stream; dropping it gives the right up.
#[derive(Debug)]
pub struct Claim {
    id: u64,
    streams: Arc<Streams>,
    receiver: oneshot::Receiver<BoxStream>,
}

impl Claim {
    /// Waits for the stream; an error if it does not come in time.
    pub async fn stream(mut self) -> Result<BoxStream, Error> {
        let stream = timeout(WAIT, &mut self.receiver).await;
        stream
            .ok()
            .and_then(Result::ok)
            .ok_or(Error::StreamMissing(self.id))
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut slots = self.streams.lock();
        if let Some(Slot::Claimed(_)) = slots.get(&self.id) {
            slots.remove(&self.id);
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncWriteExt, duplex};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_stream_and_its_claim_meet_in_either_order() {
        let streams = Streams::new();
        let (mut host, guest) = duplex(64);
        let claim = streams.claim(7).unwrap();
        streams.accept(guest, streams.room().await);
        host.write_all(b"\x07\0\0\0\0\0\0\0x").await.unwrap();
        assert_eq!(claim.stream().await.unwrap().read_u8().await.unwrap(), b'x');

        let (mut host, guest) = duplex(64);
        streams.accept(guest, streams.room().await);
        host.write_all(b"\x08\0\0\0\0\0\0\0y").await.unwrap();
        tokio::task::yield_now().await;
        let claim = streams.claim(8).unwrap();
        assert_eq!(claim.stream().await.unwrap().read_u8().await.unwrap(), b'y');
        assert!(streams.lock().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn neither_waits_for_ever() {
        let streams = Streams::new();
        let missing = streams.claim(7).unwrap().stream().await;
        assert!(matches!(missing, Err(Error::StreamMissing(7))));

        let (mut host, guest) = duplex(64);
        streams.accept(guest, streams.room().await);
        host.write_all(b"\x08\0\0\0\0\0\0\0").await.unwrap();
        let mut byte = [0];
        assert_eq!(host.read(&mut byte).await.unwrap(), 0);
        assert!(streams.lock().is_empty());
        assert_eq!(streams.unclaimed.available_permits(), STREAMS_WAITING);
    }

    #[tokio::test(start_paused = true)]
    async fn the_sixty_fifth_unclaimed_connection_waits_and_loses_nothing() {
        let streams = Streams::new();
        let mut hosts = Vec::new();
        for id in 1..=STREAMS_WAITING as u64 {
            let (mut host, guest) = duplex(64);
            streams.accept(guest, streams.room().await);
            host.write_all(&id.to_le_bytes()).await.unwrap();
            hosts.push(host);
        }
        let mut next = std::pin::pin!(streams.room());
        assert!(futures::poll!(&mut next).is_pending());
        // Whoever claims one makes room.
        let claimed = streams.claim(7).unwrap().stream().await.unwrap();
        let (mut host, guest) = duplex(64);
        streams.accept(guest, next.await);
        host.write_all(b"\x00\x01\0\0\0\0\0\0z").await.unwrap();
        let mut stream = streams.claim(256).unwrap().stream().await.unwrap();
        assert_eq!(stream.read_u8().await.unwrap(), b'z');
        drop(claimed);
    }

    #[tokio::test(start_paused = true)]
    async fn the_streams_of_a_failed_request_take_up_no_room() {
        let streams = Streams::new();
        let (mut host, guest) = duplex(64);
        streams.accept(guest, streams.room().await);
        host.write_all(b"\x07\0\0\0\0\0\0\0").await.unwrap();
        tokio::task::yield_now().await;
        streams.forget([0, 7, 8]);
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
        assert_eq!(streams.unclaimed.available_permits(), STREAMS_WAITING);
    }

    #[tokio::test(start_paused = true)]
    async fn an_id_is_claimed_once_and_zero_is_none() {
        let streams = Streams::new();
        let _claim = streams.claim(7).unwrap();
        assert!(matches!(streams.claim(7), Err(Error::StreamTaken(7))));

        let (mut host, guest) = duplex(64);
        streams.accept(guest, streams.room().await);
        host.write_all(&[0; 8]).await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
    }
}
