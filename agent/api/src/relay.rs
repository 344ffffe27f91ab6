//! Two connections made one: what comes from either goes to the other.
//!
//! Promises: every byte that one side sent before it ended its direction reaches the
//! other side before it learns of that end, whoever closed first and whether or not
//! the other direction has broken. The end of a direction is passed on as that, the end
//! of a side as the end of both. A side that does not read stops the other, at
//! [`BUFFER`] bytes; a connection on which nothing is said holds no memory.

use std::{
    future::{Future, poll_fn},
    io,
    mem::MaybeUninit,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};

/// Most bytes that are held in each direction.
pub const BUFFER: usize = 32 << 10;

/// How often it is looked whether a side that has ended its direction has gone since: of
/// that nothing tells who neither reads nor writes.
const LOOK: Duration = Duration::from_secs(1);

/// Passes on what comes from either side until neither has anything for the other.
/// Dropping it closes both.
pub async fn relay<A, B>(a: A, b: B)
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    let mut relay = Relay::new(a, b, Way::default(), Way::default());
    poll_fn(|context| relay.poll(context)).await;
}

/// The same as a value, which is whole whenever nobody polls it.
#[derive(Debug)]
pub struct Relay<A, B> {
    a: A,
    b: B,
    there: Way,
    back: Way,
    look: Pin<Box<Sleep>>,
}

impl<A, B> Relay<A, B>
where
    A: AsyncRead + AsyncWrite + Unpin,
    B: AsyncRead + AsyncWrite + Unpin,
{
    /// Between two sides, with what is on its way from the one to the other and back.
    pub fn new(a: A, b: B, there: Way, back: Way) -> Self {
        let look = Box::pin(sleep(LOOK));
        Relay {
            a,
            b,
            there,
            back,
            look,
        }
    }

    /// Passes on what there is; ready when it is over.
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let (a, b) = (&mut self.a, &mut self.b);
        let there_is_over = self.there.poll(context, a, b).is_ready();
        let back_is_over = self.back.poll(context, b, a).is_ready();
        let over = match (there_is_over, back_is_over) {
            (true, true) => true,
            // Who has gone takes nothing any more, whatever the other one has to say.
            (true, false) => is_gone(context, a),
            (false, true) => is_gone(context, b),
            (false, false) => return Poll::Pending,
        };
        if over {
            return Poll::Ready(());
        }
        while self.look.as_mut().poll(context).is_ready() {
            self.look.as_mut().reset(Instant::now() + LOOK);
        }
        Poll::Pending
    }

    /// Both sides, and what is on its way from the one to the other and back.
    pub fn parts(&self) -> (&A, &B, &Way, &Way) {
        (&self.a, &self.b, &self.there, &self.back)
    }
}

/// One direction: what was read from one side and not passed on to the other yet. It is
/// whole whenever nobody polls it, so that it can be stopped, taken elsewhere and go on.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Way {
    /// Read, and passed on up to `passed`.
    bytes: Vec<u8>,
    passed: usize,
    state: State,
    /// Why it is over, if not because all has passed.
    #[serde(skip)]
    broken: Option<io::ErrorKind>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
enum State {
    #[default]
    Open,
    /// Nothing more comes, which is still to be said.
    Ended,
    /// Nothing more passes.
    Over,
}

impl Way {
    /// Passes on what there is; ready once nothing more will pass.
    pub fn poll(
        &mut self,
        context: &mut Context<'_>,
        from: &mut (impl AsyncRead + Unpin),
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Poll<()> {
        while self.state != State::Over {
            self.state = if self.passed < self.bytes.len() {
                let rest = &self.bytes[self.passed..];
                match ready!(Pin::new(&mut *to).poll_write(context, rest)) {
                    Ok(count @ 1..) => {
                        self.passed += count;
                        self.state
                    }
                    Ok(_) => self.breaks(io::ErrorKind::WriteZero),
                    Err(error) => self.breaks(error.kind()),
                }
            } else if self.state == State::Ended {
                // Who has gone meanwhile needs not be told.
                let _ = ready!(Pin::new(&mut *to).poll_shutdown(context));
                State::Over
            } else {
                (self.bytes, self.passed) = (Vec::new(), 0);
                let mut space = [MaybeUninit::uninit(); BUFFER];
                let mut read = ReadBuf::uninit(&mut space);
                match ready!(Pin::new(&mut *from).poll_read(context, &mut read)) {
                    Ok(()) if !read.filled().is_empty() => {
                        read.filled().clone_into(&mut self.bytes);
                        State::Open
                    }
                    // A connection that breaks brings nothing more either.
                    Ok(()) | Err(_) => State::Ended,
                }
            };
        }
        Poll::Ready(())
    }

    fn breaks(&mut self, error: io::ErrorKind) -> State {
        self.broken = Some(error);
        State::Over
    }

    /// Why what is left of it did not pass.
    #[must_use]
    pub fn broken(&self) -> Option<io::ErrorKind> {
        self.broken
    }
}

/// Whether a side takes no more bytes: it would not even take none.
fn is_gone(context: &mut Context<'_>, side: &mut (impl AsyncWrite + Unpin)) -> bool {
    matches!(Pin::new(side).poll_write(context, &[]), Poll::Ready(Err(_)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::UnixStream,
        task::JoinHandle,
        time::timeout,
    };

    use super::*;

    /// No test waits longer.
    const LIMIT: Duration = Duration::from_secs(20);

    /// Two ends with a relay between them.
    fn pair() -> (UnixStream, UnixStream, JoinHandle<()>) {
        let (left, a) = UnixStream::pair().unwrap();
        let (b, right) = UnixStream::pair().unwrap();
        (left, right, tokio::spawn(relay(a, b)))
    }

    async fn ends(relaying: JoinHandle<()>) {
        timeout(LIMIT, relaying).await.expect("it goes on").unwrap();
    }

    /// So many bytes that are not the same everywhere.
    fn bytes(count: usize, seed: u8) -> Vec<u8> {
        (0..count)
            .map(|n| u8::try_from(n % 251).unwrap().wrapping_mul(seed))
            .collect()
    }

    #[tokio::test]
    async fn four_mebibytes_pass_each_way_at_once_unharmed_ss_66() {
        let (left, right, relaying) = pair();
        let send = async |side: UnixStream, out: Vec<u8>, expected: Vec<u8>| {
            let (mut from, mut to) = side.into_split();
            let write = async {
                to.write_all(&out).await.unwrap();
                to.shutdown().await.unwrap();
            };
            let mut got = Vec::new();
            let ((), read) = tokio::join!(write, from.read_to_end(&mut got));
            read.unwrap();
            assert!(got == expected, "{} bytes came", got.len());
        };
        let (there, back) = (bytes(4 << 20, 3), bytes(4 << 20, 7));
        tokio::join!(
            send(left, there.clone(), back.clone()),
            send(right, back, there)
        );
        ends(relaying).await;
    }

    #[tokio::test]
    async fn the_end_of_one_direction_leaves_the_other_open_ss_21() {
        let (mut left, mut right, relaying) = pair();
        left.write_all(b"question").await.unwrap();
        left.shutdown().await.unwrap();
        let mut got = String::new();
        right.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "question");
        assert!(!relaying.is_finished());
        right.write_all(b"answer").await.unwrap();
        drop(right);
        got.clear();
        left.read_to_string(&mut got).await.unwrap();
        assert_eq!(got, "answer");
        ends(relaying).await;
    }

    #[tokio::test]
    async fn who_closes_first_is_heard_to_the_end_while_the_other_still_writes_ss_21() {
        let (left, mut right, relaying) = pair();
        let answer = bytes(1 << 20, 5);
        let (mut from, mut to) = left.into_split();
        // It writes until it is told that nobody reads.
        let writing = tokio::spawn(async move { while to.write_all(&[1; 4096]).await.is_ok() {} });
        right.read_exact(&mut [0; 4096]).await.unwrap();
        let mut got = Vec::new();
        let (written, read) = tokio::join!(
            async {
                right.write_all(&answer).await.unwrap();
                drop(right);
            },
            from.read_to_end(&mut got)
        );
        let () = written;
        // Its own bytes were not all read, and that is all it is told.
        let _ = read;
        assert!(got == answer, "{} bytes came", got.len());
        ends(relaying).await;
        timeout(LIMIT, writing)
            .await
            .expect("it writes on")
            .unwrap();
    }

    #[tokio::test]
    async fn the_end_of_a_side_is_not_hidden_by_a_silent_other_side_ss_43() {
        let (left, mut right, relaying) = pair();
        drop(left);
        ends(relaying).await;
        assert!(right.write_all(b"x").await.is_err());
    }

    #[tokio::test]
    async fn a_side_that_goes_after_it_has_ended_its_direction_is_missed_ss_43() {
        let (mut left, mut right, relaying) = pair();
        left.shutdown().await.unwrap();
        // Its end has been passed on; only then it goes.
        assert_eq!(right.read(&mut [0]).await.unwrap(), 0);
        drop(left);
        ends(relaying).await;
        assert!(right.write_all(b"x").await.is_err());
    }

    #[tokio::test]
    async fn a_side_that_does_not_read_stops_the_other_ss_66() {
        let (mut left, right, relaying) = pair();
        let all = vec![0; 64 << 20];
        let written = timeout(Duration::from_millis(300), left.write_all(&all)).await;
        assert!(written.is_err(), "somebody takes 64 MiB");
        drop((left, right));
        ends(relaying).await;
    }
}
