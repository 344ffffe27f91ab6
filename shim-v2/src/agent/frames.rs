//! A byte stream that ends with an error before a ttrpc frame becomes too long.
//!
//! The ttrpc library reads a frame of up to 4 GiB to its end in order to answer
//! politely. A guest is not owed that.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
};

/// Longest payload, in bytes.
const MAX_PAYLOAD: u32 = 4 << 20;
/// Length of a header: payload length (big endian), stream id, type, flags.
const HEADER: usize = 10;

/// The stream, and where in a frame it is.
#[derive(Debug)]
pub(super) struct Bounded {
    stream: UnixStream,
    position: Position,
}

#[derive(Clone, Copy, Debug, Default)]
struct Position {
    /// Bytes of the header that were seen.
    header: usize,
    /// Length of the payload, as far as the header tells.
    length: u32,
    /// Bytes of the payload that are to come.
    left: u32,
}

impl Position {
    /// Follows bytes of the stream; false if a frame is too long.
    fn follow(&mut self, mut bytes: &[u8]) -> bool {
        while let Some((&byte, rest)) = bytes.split_first() {
            if self.left > 0 {
                let skip = usize::try_from(self.left)
                    .unwrap_or(usize::MAX)
                    .min(bytes.len());
                self.left -= u32::try_from(skip).unwrap_or(self.left);
                bytes = bytes.get(skip..).unwrap_or_default();
                continue;
            }
            if self.header < 4 {
                self.length = self.length << 8 | u32::from(byte);
            }
            self.header += 1;
            if self.header == 4 && self.length > MAX_PAYLOAD {
                return false;
            }
            if self.header == HEADER {
                *self = Position {
                    left: self.length,
                    ..Position::default()
                };
            }
            bytes = rest;
        }
        true
    }
}

impl Bounded {
    pub(super) fn new(stream: UnixStream) -> Self {
        Bounded {
            stream,
            position: Position::default(),
        }
    }
}

impl AsyncRead for Bounded {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(context, buffer))?;
        let new = buffer.filled().get(before..).unwrap_or_default();
        if self.position.follow(new) {
            Poll::Ready(Ok(()))
        } else {
            buffer.set_filled(before);
            Poll::Ready(Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a frame exceeds 4 MiB",
            )))
        }
    }
}

impl AsyncWrite for Bounded {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(length: u32, payload: usize) -> Vec<u8> {
        let mut bytes = length.to_be_bytes().to_vec();
        bytes.extend([0, 0, 0, 1, 2, 0]);
        bytes.resize(HEADER + payload, 0xff);
        bytes
    }

    #[test]
    fn a_frame_beyond_the_limit_ends_the_connection_b70() {
        assert!(Position::default().follow(&frame(MAX_PAYLOAD, 0)));
        assert!(!Position::default().follow(&frame(MAX_PAYLOAD + 1, 0)));
        assert!(!Position::default().follow(&frame(u32::MAX, 0)));
    }

    proptest! {
        #[test]
        fn frames_are_followed_however_they_are_cut(
            lengths in prop::collection::vec(0_usize..300, 0..8),
            cut in 1_usize..50,
        ) {
            let mut stream = Vec::new();
            for length in lengths {
                stream.extend(frame(u32::try_from(length).unwrap(), length));
            }
            let mut position = Position::default();
            for part in stream.chunks(cut) {
                prop_assert!(position.follow(part));
            }
            prop_assert_eq!((position.header, position.left), (0, 0));
            prop_assert!(!position.follow(&frame(u32::MAX, 0)));
        }
    }
}
