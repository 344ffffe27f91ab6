//! Connections of the shim's callers, as bytes: which of their requests wait for an
//! answer.
//!
//! The ttrpc library serves a connection and tells nobody what is under way on it. A
//! [`Connection`] lies below the library and follows the frames, so that the program can
//! change ([`carry`](crate::carry)) while callers wait for the end of a process: their
//! requests go along and are asked again, of the new one. No other request is repeated;
//! those are let come to their end, and new ones wait at the [gate](Callers::close).
//!
//! It answers what the library would answer with another code than callers look for: a
//! service that is not there, and a request that is too long. Both are passed on as
//! requests of [`Refusals`].

use std::{
    collections::{BTreeMap, HashMap},
    io,
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream as StdStream},
    pin::Pin,
    sync::{Arc, Mutex, Weak},
    task::{Context, Poll, Waker, ready},
};

use async_trait::async_trait;
use containerd_shim_protos::protobuf::Message;
use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    sync::Notify,
};
use ttrpc::{
    Code, Request, Response,
    r#async::{MethodHandler, Service, TtrpcContext},
    proto::{
        FLAG_REMOTE_CLOSED, MESSAGE_HEADER_LENGTH, MESSAGE_LENGTH_MAX, MESSAGE_TYPE_DATA,
        MESSAGE_TYPE_REQUEST, MESSAGE_TYPE_RESPONSE, MessageHeader,
    },
};

use crate::{
    carry::{Bag, Bytes, CarriedFd},
    frames::{Next, Part, header, payload},
    lock::lock,
};

/// Bytes that are read at once.
const READ: usize = 16 << 10;
/// The one method whose requests can be asked again.
const AGAIN: &str = "Wait";
/// The service that answers what must be refused; callers cannot name it.
const REFUSALS: &str = "bulkhead.Refusals";
const ABSENT: &str = "Absent";
const TOO_LONG: &str = "TooLong";

/// All connections.
#[derive(Clone, Debug)]
pub(crate) struct Callers(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    /// Names of the services that are there.
    services: Vec<String>,
    state: Mutex<State>,
    /// Something was answered.
    news: Notify,
}

#[derive(Debug, Default)]
struct State {
    closed: bool,
    wires: Vec<Weak<Mutex<Wire>>>,
}

/// What goes along of one connection.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    stream: CarriedFd,
    /// Requests that are asked again, and then a part of a further one.
    asked: Bytes,
    skip: usize,
}

impl Callers {
    /// Callers of these services.
    pub(crate) fn of(services: &HashMap<String, Service>) -> Self {
        Callers(Arc::new(Shared {
            services: services.keys().cloned().collect(),
            state: Mutex::default(),
            news: Notify::new(),
        }))
    }

    /// A new connection.
    pub(crate) fn connection(&self, stream: UnixStream) -> Connection {
        self.add(Wire::new(stream))
    }

    fn add(&self, wire: Wire) -> Connection {
        let wire = Arc::new(Mutex::new(wire));
        let mut state = lock(&self.0.state);
        state.wires.retain(|wire| wire.strong_count() > 0);
        state.wires.push(Arc::downgrade(&wire));
        Connection {
            wire,
            shared: Arc::clone(&self.0),
        }
    }

    /// Connections that the program before this one had.
    pub(crate) fn unpack(&self, carried: Vec<Carried>) -> io::Result<Vec<Connection>> {
        let resume = |carried: Carried| {
            let stream = StdStream::from(carried.stream.take()?);
            let mut wire = Wire::new(UnixStream::from_std(stream)?);
            wire.take(&carried.asked, &self.0.services);
            wire.skip = carried.skip;
            Ok(self.add(wire))
        };
        carried.into_iter().map(resume).collect()
    }

    fn wires(&self) -> Vec<Arc<Mutex<Wire>>> {
        let state = lock(&self.0.state);
        state.wires.iter().filter_map(Weak::upgrade).collect()
    }

    /// Lets no further request in until the gate is dropped.
    pub(crate) fn close(&self) -> Gate<'_> {
        lock(&self.0.state).closed = true;
        Gate(self)
    }

    /// A request that is under way and cannot be asked again.
    pub(crate) fn busy(&self) -> Option<String> {
        self.wires().iter().find_map(|wire| lock(wire).busy())
    }

    /// Is this asked just now?
    pub(crate) fn is_asked(&self, service: &str, method: &str) -> bool {
        let name = format!("{service}/{method}");
        let asks = |waiting: &Waiting| matches!(waiting, Waiting::Once(asked) if *asked == name);
        let mut wires = self.wires().into_iter();
        wires.any(|wire| lock(&wire).waiting.values().any(asks))
    }

    /// Waits until something was answered.
    pub(crate) async fn answered(&self) {
        self.0.news.notified().await;
    }

    /// What goes along. Nobody must be [busy](Callers::busy).
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Vec<Carried>> {
        let wires = self.wires();
        wires.iter().map(|wire| lock(wire).carry(bag)).collect()
    }
}

/// Keeps new requests from being heard.
#[derive(Debug)]
pub(crate) struct Gate<'a>(&'a Callers);

impl Drop for Gate<'_> {
    fn drop(&mut self) {
        lock(&self.0.0.state).closed = false;
        for wire in self.0.wires() {
            if let Some(reader) = lock(&wire).reader.take() {
                reader.wake();
            }
        }
    }
}

/// A connection for the library to serve.
#[derive(Debug)]
pub(crate) struct Connection {
    wire: Arc<Mutex<Wire>>,
    shared: Arc<Shared>,
}

/// A request without an answer.
#[derive(Debug)]
enum Waiting {
    /// Its frame.
    Again(Bytes),
    /// Its name.
    Once(String),
}

#[derive(Debug)]
struct Wire {
    stream: UnixStream,
    /// Frames that the library has not read yet, up to `given`.
    frames: Vec<u8>,
    given: usize,
    /// A part of a further frame.
    part: Part,
    /// Bytes to come of one that is too long.
    skip: usize,
    /// By the number of the stream.
    waiting: BTreeMap<u32, Waiting>,
    said: Said,
    /// Waits at the gate.
    reader: Option<Waker>,
}

impl Wire {
    fn new(stream: UnixStream) -> Self {
        Wire {
            stream,
            frames: Vec::new(),
            given: 0,
            part: Part::default(),
            skip: 0,
            waiting: BTreeMap::new(),
            said: Said::default(),
            reader: None,
        }
    }

    fn busy(&self) -> Option<String> {
        let once = |waiting: &Waiting| match waiting {
            Waiting::Once(name) => Some(name.clone()),
            Waiting::Again(_) => None,
        };
        if self.given < self.frames.len() || !self.said.is_whole() {
            return Some("a message".to_owned());
        }
        self.waiting.values().find_map(once)
    }

    fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let again = self.waiting.values().filter_map(|waiting| match waiting {
            Waiting::Again(frame) => Some(frame.as_slice()),
            Waiting::Once(_) => None,
        });
        let parts: Vec<&[u8]> = again.chain([self.part.bytes()]).collect();
        Ok(Carried {
            stream: bag.put(self.stream.as_fd())?,
            asked: parts.concat(),
            skip: self.skip,
        })
    }

    /// Takes what has come.
    fn take(&mut self, mut bytes: &[u8], services: &[String]) {
        loop {
            let skipped = self.skip.min(bytes.len());
            self.skip -= skipped;
            bytes = bytes.get(skipped..).unwrap_or_default();
            match self.part.next(&mut bytes, MESSAGE_LENGTH_MAX) {
                Some(Next::Frame(header, frame)) => self.hear(header, frame, services),
                Some(Next::TooLong(header)) => {
                    self.skip = header.length as usize;
                    self.replace(header, REFUSALS, TOO_LONG, self.skip.to_string());
                }
                None => return,
            }
        }
    }

    /// Notes a frame and gives it to the library.
    fn hear(&mut self, header: MessageHeader, frame: Bytes, services: &[String]) {
        if header.type_ == MESSAGE_TYPE_REQUEST {
            // What cannot be read the library refuses.
            let request = Request::parse_from_bytes(payload(&frame)).unwrap_or_default();
            if !request.service.is_empty() && !services.contains(&request.service) {
                self.replace(header, REFUSALS, ABSENT, request.service);
                return;
            }
            let waiting = match request.method == AGAIN {
                true => Waiting::Again(frame.clone()),
                false => Waiting::Once(format!("{}/{}", request.service, request.method)),
            };
            self.waiting.insert(header.stream_id, waiting);
        }
        self.frames.extend(frame);
    }

    /// Gives the library another request in place of one.
    fn replace(&mut self, header: MessageHeader, service: &str, method: &str, detail: String) {
        let request = Request {
            service: service.to_owned(),
            method: method.to_owned(),
            payload: detail.into_bytes(),
            ..Request::default()
        };
        let payload = request.write_to_bytes().unwrap_or_default();
        let length = u32::try_from(payload.len()).unwrap_or(0);
        let header = MessageHeader::new_request(header.stream_id, length);
        let name = Waiting::Once(format!("{service}/{method}"));
        self.waiting.insert(header.stream_id, name);
        self.frames.extend(Vec::from(header));
        self.frames.extend(payload);
    }

    /// Gives the library what there is for it.
    fn give(&mut self, buffer: &mut ReadBuf<'_>) -> bool {
        let rest = self.frames.get(self.given..).unwrap_or_default();
        let count = rest.len().min(buffer.remaining());
        buffer.put_slice(rest.get(..count).unwrap_or_default());
        self.given += count;
        if self.given == self.frames.len() {
            // A long one is not kept for the sake of its room.
            (self.frames, self.given) = (Vec::new(), 0);
        }
        count > 0
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let mut wire = lock(&self.wire);
        loop {
            if wire.give(buffer) {
                return Poll::Ready(Ok(()));
            }
            if lock(&self.shared.state).closed {
                wire.reader = Some(context.waker().clone());
                return Poll::Pending;
            }
            let mut space = [MaybeUninit::uninit(); READ];
            let mut read = ReadBuf::uninit(&mut space);
            ready!(Pin::new(&mut wire.stream).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            wire.take(read.filled(), &self.shared.services);
        }
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let mut wire = lock(&self.wire);
        let count = ready!(Pin::new(&mut wire.stream).poll_write(context, bytes))?;
        let Wire { said, waiting, .. } = &mut *wire;
        said.follow(bytes.get(..count).unwrap_or_default(), |header| {
            let ends = match header.type_ {
                MESSAGE_TYPE_RESPONSE => true,
                MESSAGE_TYPE_DATA => header.flags & FLAG_REMOTE_CLOSED != 0,
                _ => false,
            };
            if ends {
                waiting.remove(&header.stream_id);
            }
        });
        self.shared.news.notify_one();
        Poll::Ready(Ok(count))
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.wire).stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut lock(&self.wire).stream).poll_shutdown(context)
    }
}

/// Where in a frame the library is that writes it.
#[derive(Debug, Default)]
struct Said {
    header: Vec<u8>,
    /// Bytes of the payload that are to come.
    left: usize,
}

impl Said {
    fn is_whole(&self) -> bool {
        self.header.is_empty() && self.left == 0
    }

    /// Follows what was written, and tells of each frame that is whole.
    fn follow(&mut self, mut bytes: &[u8], mut whole: impl FnMut(MessageHeader)) {
        while !bytes.is_empty() {
            let missing = MESSAGE_HEADER_LENGTH - self.header.len();
            let count = match missing {
                0 => self.left,
                missing => missing,
            };
            let (new, rest) = bytes.split_at(count.min(bytes.len()));
            bytes = rest;
            match missing {
                0 => self.left -= new.len(),
                _ => {
                    self.header.extend_from_slice(new);
                    self.left = header(&self.header).map_or(0, |header| header.length as usize);
                }
            }
            if self.left == 0
                && let Some(header) = header(&self.header)
            {
                self.header.clear();
                whole(header);
            }
        }
    }
}

/// Answers what must be refused.
struct Refusals;

/// The service that answers them, under its name.
pub(crate) fn refusals() -> HashMap<String, Service> {
    let methods = [ABSENT, TOO_LONG].map(|name| {
        let handler: Box<dyn MethodHandler + Send + Sync> = Box::new(Refusals);
        (name.to_owned(), handler)
    });
    let service = Service {
        methods: HashMap::from(methods),
        streams: HashMap::new(),
    };
    HashMap::from([(REFUSALS.to_owned(), service)])
}

#[async_trait]
impl MethodHandler for Refusals {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        let detail = String::from_utf8_lossy(&request.payload).into_owned();
        let (code, text) = match request.method.as_str() {
            ABSENT => (
                Code::UNIMPLEMENTED,
                format!("service {detail:?} is not there"),
            ),
            _ => (
                Code::RESOURCE_EXHAUSTED,
                format!("a message of {detail} bytes is too long: {MESSAGE_LENGTH_MAX} at most"),
            ),
        };
        // As an error the library would give it a code of its own.
        Ok(Response {
            status: Some(ttrpc::get_status(code, text)).into(),
            ..Response::default()
        })
    }
}

#[cfg(test)]
mod tests;
