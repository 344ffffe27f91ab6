//! What the building machine and the lab host say to each other.
//!
//! One virtio-serial port carries frames in both directions: a byte for the
//! kind, the length of the payload as a little-endian `u32`, the payload. One
//! job runs at a time; it is over with its [`Frame::Exit`].

use std::io::{self, Read, Write};

use serde::{Deserialize, Serialize};

/// Name of the port in the lab host, below `/dev/virtio-ports`.
pub const PORT: &str = "bulkhead.lab";

/// The longest payload that either side takes.
pub const PAYLOAD_MAX: usize = 1 << 20;

/// A program to start in the lab host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// Program and arguments.
    pub argv: Vec<String>,
    /// Added to the environment of every job.
    pub env: Vec<(String, String)>,
    /// The terminal it gets; with none it gets three pipes.
    pub terminal: Option<Size>,
}

/// Size of a terminal in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Size {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub cols: u16,
}

/// One message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// To the lab host: start this.
    Run(Request),
    /// To the lab host: bytes of standard input; none mean its end.
    Stdin(Vec<u8>),
    /// To the lab host: the terminal has another size now.
    Resize(Size),
    /// To the lab host: end the job's processes.
    Kill,
    /// To the lab host: nothing, but an interrupt.
    Tick,
    /// From the lab host: bytes of standard output, or of the terminal.
    Stdout(Vec<u8>),
    /// From the lab host: bytes of standard error.
    Stderr(Vec<u8>),
    /// From the lab host: the job ended with this code; 128 and more for a
    /// signal, as shells say it.
    Exit(u8),
}

impl Frame {
    /// Writes the frame.
    ///
    /// # Errors
    ///
    /// The channel fails, or the payload is longer than [`PAYLOAD_MAX`].
    pub fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let (kind, payload) = match self {
            Frame::Run(request) => (1, serde_json::to_vec(request)?),
            Frame::Stdin(bytes) => (2, bytes.clone()),
            Frame::Resize(size) => (3, serde_json::to_vec(size)?),
            Frame::Kill => (4, Vec::new()),
            Frame::Tick => (8, Vec::new()),
            Frame::Stdout(bytes) => (5, bytes.clone()),
            Frame::Stderr(bytes) => (6, bytes.clone()),
            Frame::Exit(code) => (7, vec![*code]),
        };
        let len = u32::try_from(payload.len())
            .ok()
            .filter(|_| payload.len() <= PAYLOAD_MAX)
            .ok_or_else(|| invalid("The payload is too long"))?;
        let mut frame = Vec::with_capacity(5 + payload.len());
        frame.push(kind);
        frame.extend(len.to_le_bytes());
        frame.extend(payload);
        to.write_all(&frame)?;
        to.flush()
    }

    /// Reads the next frame; none at the end of the channel.
    ///
    /// # Errors
    ///
    /// The channel fails, ends within a frame, or carries something else.
    pub fn read(from: &mut impl Read) -> io::Result<Option<Frame>> {
        let mut kind = [0];
        if from.read(&mut kind)? == 0 {
            return Ok(None);
        }
        let mut len = [0; 4];
        from.read_exact(&mut len)?;
        let len = usize::try_from(u32::from_le_bytes(len))
            .ok()
            .filter(|len| *len <= PAYLOAD_MAX)
            .ok_or_else(|| invalid("The payload is too long"))?;
        let mut payload = vec![0; len];
        from.read_exact(&mut payload)?;
        Ok(Some(match kind[0] {
            1 => Frame::Run(serde_json::from_slice(&payload)?),
            2 => Frame::Stdin(payload),
            3 => Frame::Resize(serde_json::from_slice(&payload)?),
            4 => Frame::Kill,
            8 => Frame::Tick,
            5 => Frame::Stdout(payload),
            6 => Frame::Stderr(payload),
            7 => match payload[..] {
                [code] => Frame::Exit(code),
                _ => return Err(invalid("An exit code is one byte")),
            },
            _ => return Err(invalid("Not a kind of frame")),
        }))
    }
}

fn invalid(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_frame_arrives_as_it_was_sent() {
        let size = Size { rows: 24, cols: 80 };
        let frames = [
            Frame::Run(Request {
                argv: vec!["echo".to_owned(), "a b".to_owned()],
                env: vec![("TERM".to_owned(), "xterm".to_owned())],
                terminal: Some(size),
            }),
            Frame::Stdin(vec![0, 255, 10]),
            Frame::Stdin(Vec::new()),
            Frame::Resize(size),
            Frame::Kill,
            Frame::Tick,
            Frame::Stdout(vec![7; 70_000]),
            Frame::Stderr(b"no".to_vec()),
            Frame::Exit(137),
        ];
        let mut bytes = Vec::new();
        for frame in &frames {
            frame.write(&mut bytes).unwrap();
        }
        let mut rest = &bytes[..];
        for frame in frames {
            assert_eq!(Frame::read(&mut rest).unwrap(), Some(frame));
        }
        assert_eq!(Frame::read(&mut rest).unwrap(), None);
    }

    #[test]
    fn a_frame_that_is_none_is_refused() {
        for bytes in [
            &[9, 0, 0, 0, 0][..],
            &[7, 0, 0, 0, 0],
            &[5, 255, 255, 255, 255],
            &[5, 9, 0, 0, 0, 1],
            &[1, 1, 0, 0, 0, b'{'],
        ] {
            assert!(Frame::read(&mut &bytes[..]).is_err(), "{bytes:?}");
        }
    }
}
