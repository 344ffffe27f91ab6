//! Somebody who comes for a stream at the shim's socket, as containerd's CRI does:
//! ttrpc frame by frame, so that what is on the wire is seen.

use std::{
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_shim::names::{GroupId, Namespace, SOCKET_DIR, socket_path};

const DEADLINE: Duration = Duration::from_secs(120);
const REQUEST: u8 = 1;
const DATA: u8 = 3;
/// More is to come, and there is none in this frame.
const OPEN_EMPTY: u8 = 6;
/// No more is to come, and there is none in this frame.
const CLOSED_EMPTY: u8 = 5;
const WINDOW: usize = 64 << 10;

/// A call under way.
#[derive(Debug)]
pub(crate) struct Caller {
    stream: UnixStream,
    /// Credit that the shim has.
    open: usize,
}

impl Caller {
    /// Where the shim of a container will listen.
    pub(crate) fn socket(id: &str) -> PathBuf {
        let namespace = Namespace::new("default").expect("a name");
        let group = GroupId::new(id).expect("a name");
        let containerd = "/run/containerd/containerd.sock";
        socket_path(SOCKET_DIR, containerd, &namespace, &group)
    }

    /// Comes for a stream.
    pub(crate) fn call(socket: &Path, id: &str) -> Caller {
        let stream = UnixStream::connect(socket).expect("the shim listens");
        stream.set_read_timeout(Some(DEADLINE)).expect("a limit");
        let mut caller = Caller { stream, open: 0 };
        let service = field(1, b"containerd.services.streaming.v1.Streaming");
        let request = [service, field(2, b"Stream")].concat();
        caller.send(REQUEST, OPEN_EMPTY, &request);
        let init = field(1, id.as_bytes());
        let kind = "containerd.services.streaming.v1.StreamInit";
        caller.send(DATA, 0, &any(kind, &init));
        let (kind, flags, answer) = caller.receive();
        assert_eq!((kind, flags), (DATA, 0));
        assert_eq!(answer, any("google.protobuf.Empty", b""));
        caller
    }

    /// Takes so many bytes.
    pub(crate) fn read(&mut self, count: usize) -> String {
        let mut taken = Vec::new();
        while taken.len() < count {
            taken.extend(self.data().expect("it ended"));
        }
        String::from_utf8(taken).expect("text")
    }

    /// Takes all there is.
    pub(crate) fn read_to_end(&mut self) -> String {
        let mut taken = Vec::new();
        while let Some(bytes) = self.data() {
            taken.extend(bytes);
        }
        String::from_utf8(taken).expect("text")
    }

    /// Gives credit, of which the next byte is asked for no more.
    pub(crate) fn acknowledge(&mut self, count: usize) {
        let update = [vec![8], varint(count)].concat();
        let update = any("containerd.types.transfer.WindowUpdate", &update);
        self.send(DATA, 0, &update);
        self.open += count;
    }

    fn data(&mut self) -> Option<Vec<u8>> {
        if self.open < WINDOW {
            self.acknowledge(WINDOW);
        }
        let (kind, flags, message) = self.receive();
        assert_eq!(kind, DATA, "{message:?}");
        if flags == CLOSED_EMPTY {
            assert!(message.is_empty());
            return None;
        }
        assert_eq!(flags, 0);
        let head = field(1, b"containerd.types.transfer.Data");
        let rest = message.strip_prefix(&head[..]).expect("data");
        let bytes = content(content(rest, 2), 1);
        assert!(bytes.len() <= 32 << 10 && bytes.len() <= self.open);
        self.open -= bytes.len();
        Some(bytes.to_vec())
    }

    fn send(&mut self, kind: u8, flags: u8, payload: &[u8]) {
        let length = u32::try_from(payload.len()).expect("it is short");
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(1_u32.to_be_bytes());
        frame.extend([kind, flags]);
        frame.extend(payload);
        self.stream.write_all(&frame).expect("the shim reads");
    }

    fn receive(&mut self) -> (u8, u8, Vec<u8>) {
        let mut head = [0; 10];
        self.stream.read_exact(&mut head).expect("the shim answers");
        let [a, b, c, d, _, _, _, _, kind, flags] = head;
        let length = u32::from_be_bytes([a, b, c, d]);
        let mut payload = vec![0; usize::try_from(length).expect("64 bits")];
        self.stream.read_exact(&mut payload).expect("all of it");
        (kind, flags, payload)
    }
}

/// A message of type Any; empty content is left out.
fn any(kind: &str, content: &[u8]) -> Vec<u8> {
    let mut any = field(1, kind.as_bytes());
    if !content.is_empty() {
        any.extend(field(2, content));
    }
    any
}

/// A field of bytes.
fn field(number: u8, content: &[u8]) -> Vec<u8> {
    [&[number << 3 | 2], &varint(content.len())[..], content].concat()
}

/// What a message holds that consists of this field alone.
fn content(message: &[u8], number: u8) -> &[u8] {
    assert_eq!(message.first(), Some(&(number << 3 | 2)));
    let (mut length, mut at) = (0, 1);
    loop {
        length |= usize::from(message[at] & 0x7f) << (7 * (at - 1));
        at += 1;
        if message[at - 1] < 0x80 {
            break;
        }
    }
    assert_eq!(message.len(), at + length);
    &message[at..]
}

fn varint(mut number: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = u8::try_from(number & 0x7f).expect("seven bits");
        number >>= 7;
        if number == 0 {
            bytes.push(low);
            return bytes;
        }
        bytes.push(low | 0x80);
    }
}
