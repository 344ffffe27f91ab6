//! The agent's connection, as bytes: frames are bounded, and outlive the program.
//!
//! The ttrpc library reads a frame of up to 4 GiB to its end in order to answer
//! politely. A guest is not owed that: the connection ends before a frame becomes too
//! long.
//!
//! When the program changes ([`carry`](crate::carry)), requests that wait for their
//! answer stay with the agent, and those of the new program get numbers that were not
//! used yet. Who asks there for what was asked already, the end of a process say, is not
//! passed on: the answer to the first request is theirs. Other answers of that time are
//! nobody's.

use std::{
    collections::BTreeMap,
    io,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream as StdStream},
    pin::Pin,
    sync::{Arc, Mutex},
    task::{Context, Poll, ready},
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};
use ttrpc::proto::{MESSAGE_TYPE_REQUEST, MessageHeader};

use crate::{
    carry::{Bag, Bytes, CarriedFd},
    frames::{Next, Part, payload},
    lock::lock,
};

/// Longest payload, in bytes.
const MAX_PAYLOAD: usize = 4 << 20;
/// Longest payload of a request that is known again: those that wait are short.
const KNOWN: usize = 1024;
/// Bytes that are read at once.
const READ: usize = 16 << 10;

/// The connection, for the library and for who carries it along.
#[derive(Clone, Debug)]
pub(super) struct Wire(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    stream: UnixStream,
    /// A part of a frame that comes.
    part: Part,
    /// Frames that the library has not read yet, up to `given`.
    frames: Vec<u8>,
    given: usize,
    /// How many frames have come for it.
    heard: u64,
    /// A part of a frame that the library writes.
    half: Part,
    /// Frames that are not sent yet, up to `sent`.
    out: Vec<u8>,
    sent: usize,
    /// What is added to the library's numbers; even, as they are odd.
    base: u32,
    /// The highest number in use.
    last: u32,
    /// Requests without an answer, by their number.
    open: BTreeMap<u32, Open>,
}

#[derive(Debug)]
struct Open {
    /// The library's number; `None` if nobody has asked for it in this program.
    asker: Option<u32>,
    /// What is asked, if it is short.
    asked: Option<Bytes>,
}

/// What goes along.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    stream: CarriedFd,
    part: Bytes,
    last: u32,
    open: Vec<(u32, Bytes)>,
}

impl Wire {
    pub(super) fn new(stream: UnixStream) -> Self {
        Wire(Arc::new(Mutex::new(Inner {
            stream,
            part: Part::default(),
            frames: Vec::new(),
            given: 0,
            heard: 0,
            half: Part::default(),
            out: Vec::new(),
            sent: 0,
            base: 0,
            last: 0,
            open: BTreeMap::new(),
        })))
    }

    /// Goes on with the connection of the program before this one.
    pub(super) fn unpack(carried: Carried) -> io::Result<Self> {
        let stream = StdStream::from(carried.stream.take()?);
        let wire = Wire::new(UnixStream::from_std(stream)?);
        let mut inner = lock(&wire.0);
        inner.part = carried.part.into();
        inner.last = carried.last;
        inner.base = carried.last.next_multiple_of(2);
        let open = carried.open.into_iter().map(|(number, asked)| {
            let open = Open {
                asker: None,
                asked: Some(asked),
            };
            (number, open)
        });
        inner.open = open.collect();
        drop(inner);
        Ok(wire)
    }

    /// Is a frame under way between this program's memory and the connection?
    pub(super) fn is_busy(&self) -> bool {
        let inner = lock(&self.0);
        inner.given < inner.frames.len()
            || !inner.half.bytes().is_empty()
            || inner.sent < inner.out.len()
    }

    /// How many answers have come.
    pub(super) fn heard(&self) -> u64 {
        lock(&self.0).heard
    }

    /// What goes along. It must not be [busy](Wire::is_busy).
    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let inner = lock(&self.0);
        let known = |(number, open): (&u32, &Open)| Some((*number, open.asked.clone()?));
        Ok(Carried {
            stream: bag.put(inner.stream.as_fd())?,
            part: inner.part.bytes().to_vec(),
            last: inner.last,
            open: inner.open.iter().filter_map(known).collect(),
        })
    }
}

impl Inner {
    /// Takes bytes that have come; false if a frame is too long.
    fn take(&mut self, mut bytes: &[u8]) -> bool {
        while let Some(next) = self.part.next(&mut bytes, MAX_PAYLOAD) {
            match next {
                Next::Frame(header, frame) => self.hear(header, &frame),
                Next::TooLong(_) => return false,
            }
        }
        true
    }

    /// Gives a frame to the library, under its number.
    fn hear(&mut self, mut header: MessageHeader, frame: &[u8]) {
        let Some(open) = self.open.remove(&header.stream_id) else {
            return;
        };
        let Some(asker) = open.asker else { return };
        header.set_stream_id(asker);
        self.heard += 1;
        self.frames.extend(Vec::from(header));
        self.frames.extend_from_slice(payload(frame));
    }

    /// Takes bytes that the library writes.
    fn say(&mut self, mut bytes: &[u8]) {
        while let Some(Next::Frame(header, frame)) = self.half.next(&mut bytes, usize::MAX) {
            self.ask(header, &frame);
        }
    }

    /// Sends a frame of the library under its number on the connection, unless it was
    /// sent before.
    fn ask(&mut self, mut header: MessageHeader, frame: &[u8]) {
        let payload = payload(frame);
        let asker = Some(header.stream_id);
        let number = header.stream_id.wrapping_add(self.base);
        header.set_stream_id(number);
        if header.type_ == MESSAGE_TYPE_REQUEST {
            let mut open = self.open.values_mut();
            let same =
                |open: &&mut Open| open.asker.is_none() && open.asked.as_deref() == Some(payload);
            if let Some(open) = open.find(same) {
                open.asker = asker;
                return;
            }
            let asked = (payload.len() <= KNOWN).then(|| payload.to_vec());
            self.open.insert(number, Open { asker, asked });
            self.last = self.last.max(number);
        }
        self.out.extend(Vec::from(header));
        self.out.extend_from_slice(payload);
    }

    /// Sends what there is to send.
    fn flush(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.sent < self.out.len() {
            let rest = self.out.get(self.sent..).unwrap_or_default();
            match ready!(Pin::new(&mut self.stream).poll_write(context, rest))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.sent += count,
            }
        }
        // A long one is not kept for the sake of its room.
        (self.out, self.sent) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

impl AsyncRead for Wire {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.0);
        loop {
            let rest = inner.frames.get(inner.given..).unwrap_or_default();
            if !rest.is_empty() {
                let count = rest.len().min(buffer.remaining());
                buffer.put_slice(rest.get(..count).unwrap_or_default());
                inner.given += count;
                return Poll::Ready(Ok(()));
            }
            (inner.frames, inner.given) = (Vec::new(), 0);
            let mut space = [MaybeUninit::uninit(); READ];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut inner.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            if !inner.take(read.filled()) {
                let text = "a frame exceeds 4 MiB";
                return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
            }
        }
    }
}

impl AsyncWrite for Wire {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut inner = lock(&self.0);
        // One frame at most waits here.
        ready!(inner.flush(context))?;
        inner.say(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.0).flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut inner = lock(&self.0);
        ready!(inner.flush(context))?;
        Pin::new(&mut inner.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    fn frame(number: u32, kind: u8, payload: &[u8]) -> Vec<u8> {
        let length = u32::try_from(payload.len()).unwrap();
        let mut header = MessageHeader::new_request(number, length);
        header.type_ = kind;
        [Vec::from(header), payload.to_vec()].concat()
    }

    fn inner() -> (Inner, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let wire = Wire::new(ours);
        (
            Arc::into_inner(wire.0).unwrap().into_inner().unwrap(),
            theirs,
        )
    }

    #[tokio::test]
    async fn a_frame_beyond_the_limit_ends_the_connection_b70() {
        let too_long = |length: usize| {
            let length = u32::try_from(length).unwrap();
            Vec::from(MessageHeader::new_response(1, length))
        };
        assert!(inner().0.take(&too_long(MAX_PAYLOAD)));
        assert!(!inner().0.take(&too_long(MAX_PAYLOAD + 1)));
        assert!(!inner().0.take(&too_long(u32::MAX as usize)));
    }

    #[tokio::test]
    async fn what_was_asked_before_is_not_asked_again_and_its_answer_is_heard() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut wire = Wire::new(ours);
        for (number, asked) in [(1, b"wait".as_slice()), (3, b"ping"), (5, b"wait 2")] {
            wire.write_all(&frame(number, 1, asked)).await.unwrap();
            wire.flush().await.unwrap();
        }
        let mut sent = vec![0; 3 * 10 + 14];
        theirs.read_exact(&mut sent).await.unwrap();
        // An answer that comes in part while the program changes.
        let answer = frame(1, 2, b"ended");
        theirs.write_all(&answer[..12]).await.unwrap();
        let mut one = [0; 1];
        let read = tokio::time::timeout(std::time::Duration::from_millis(50), wire.read(&mut one));
        assert!(read.await.is_err());
        assert!(!wire.is_busy());

        let mut bag = Bag::default();
        let carried = wire.carry(&mut bag).unwrap();
        let text = serde_json::to_string(&carried).unwrap();
        std::mem::forget((bag, carried));
        drop(wire);
        let mut wire = Wire::unpack(serde_json::from_str(&text).unwrap()).unwrap();
        // The new program counts from one again.
        for (number, asked) in [(1, b"clock".as_slice()), (3, b"wait")] {
            wire.write_all(&frame(number, 1, asked)).await.unwrap();
            wire.flush().await.unwrap();
        }
        let mut sent = vec![0; 15];
        theirs.read_exact(&mut sent).await.unwrap();
        assert_eq!(sent, frame(7, 1, b"clock"));
        // That to the ping is nobody's.
        theirs.write_all(&answer[12..]).await.unwrap();
        for (number, said) in [(3, b"pong"), (7, b"noon")] {
            theirs.write_all(&frame(number, 2, said)).await.unwrap();
        }
        let mut heard = vec![0; 15 + 14];
        wire.read_exact(&mut heard).await.unwrap();
        assert_eq!(
            heard,
            [frame(3, 2, b"ended"), frame(1, 2, b"noon")].concat()
        );
        // Nothing was sent twice.
        theirs.shutdown().await.unwrap();
        drop(wire);
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).await.unwrap();
        assert_eq!(rest, b"");
    }

    #[tokio::test]
    async fn answers_that_nobody_asked_for_are_not_heard() {
        let (mut inner, _theirs) = inner();
        assert!(inner.take(&frame(9, 2, b"said")));
        inner.say(&frame(1, 1, b"asked"));
        assert!(inner.take(&frame(1, 2, b"said")));
        assert!(inner.take(&frame(1, 2, b"again")));
        assert_eq!(inner.frames, frame(1, 2, b"said"));
    }

    proptest! {
        #[test]
        fn frames_are_followed_however_they_are_cut(
            lengths in prop::collection::vec(0_usize..300, 1..8),
            cut in 1_usize..50,
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.unwrap();
            let _inside = runtime.enter();
            let (mut inner, _theirs) = inner();
            let mut asked = Vec::new();
            for (number, length) in lengths.into_iter().enumerate() {
                let number = u32::try_from(number * 2 + 1).unwrap();
                asked.push(frame(number, 1, &vec![7; length]));
            }
            let asked = asked.concat();
            for part in asked.chunks(cut) {
                inner.say(part);
            }
            prop_assert_eq!(&inner.out, &asked);
            prop_assert!(inner.half.bytes().is_empty());
            for part in asked.chunks(cut) {
                prop_assert!(inner.take(part));
            }
            prop_assert_eq!(&inner.frames, &asked);
            prop_assert!(inner.open.is_empty());
        }
    }
}
