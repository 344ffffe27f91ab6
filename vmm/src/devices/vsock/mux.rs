//! The multiplexer: two queues on one side, many Unix sockets on the other.
//!
//! Runs on an event loop and never blocks. Each socket is registered once,
//! edge-triggered; what it was last ready for is remembered in its stream. A
//! stream with something for the guest stands in one list, from which the receive
//! queue is filled in turn, one packet each. The driver is interrupted at most
//! once for each event, however many packets it brought.

use std::{
    collections::{HashMap, VecDeque},
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, OwnedFd},
    sync::Arc,
};

use super::{
    Host, limits,
    packet::{HEADER_LEN, Header, TYPE_STREAM, op},
    stream::{After, Broken, Draining, HOST_CID, Next, Opener, Ports, Stream},
};
use crate::{
    devices::{
        Io,
        queue::{Reader, Ring, State, Writer},
    },
    event_loop::{EventFlags, Handler, Watch, Watched},
};
use rustix::net::{
    self, AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    SocketFlags, SocketType,
};

/// Tokens of the event loop; those of sockets count up from the last.
const RX: u32 = 0;
const TX: u32 = 1;
const LISTENER: u32 = 2;
const FIRST_SOCKET: u32 = 3;

/// Host ports of connections that the host opens start here: far from those on
/// which a guest may look for a service.
const FIRST_PORT: u32 = 1 << 30;

/// All that a socket is ever watched for.
const SOCKET_EVENTS: EventFlags = EventFlags::IN
    .union(EventFlags::OUT)
    .union(EventFlags::RDHUP)
    .union(EventFlags::ET);

/// A running device.
#[derive(Debug)]
pub(super) struct Mux {
    host: Arc<Host>,
    rx: Ring,
    tx: Ring,
    /// Nothing is ever put into it.
    event: Option<Ring>,
    pub(super) sockets: HashMap<u32, Peer>,
    pub(super) by_ports: HashMap<Ports, u32>,
    last_token: u32,
    last_port: u32,
    /// Streams with something for the guest, each once.
    pub(super) ready: VecDeque<u32>,
    pub(super) resets: VecDeque<Header>,
    /// Watched as long as the device runs.
    _listener: Option<Watched<Arc<OwnedFd>>>,
}

/// Who is at the other end of a socket, by the step that it has reached.
#[derive(Debug)]
pub(super) enum Peer {
    /// A program that has not said yet to which port it wants.
    Greeting(Watched<OwnedFd>),
    Stream(Stream),
    Draining(Draining),
}

impl Mux {
    /// Takes the queues over and watches them and the listener.
    pub(super) fn new(host: Arc<Host>, mut io: Io, watch: &Watch<'_>) -> io::Result<Mux> {
        let mut take = |index| {
            io.take(index)
                .ok_or_else(|| io::Error::other("The driver left a queue of vsock out"))
        };
        let (mut rx, mut tx) = (take(0)?, take(1)?);
        rx.watch(watch, RX)?;
        tx.watch(watch, TX)?;
        let listener = host.listener.as_ref().map(|listener| {
            let events = EventFlags::IN | EventFlags::ET;
            watch.add(Arc::clone(listener), LISTENER, events)
        });
        Ok(Mux {
            _listener: listener.transpose()?,
            host,
            rx,
            tx,
            event: io.take(2),
            sockets: HashMap::new(),
            by_ports: HashMap::new(),
            last_token: FIRST_SOCKET - 1,
            last_port: FIRST_PORT - 1,
            ready: VecDeque::new(),
            resets: VecDeque::new(),
        })
    }

    /// How far it came with receive, transmit and event queue.
    pub(super) fn into_states(self) -> [Option<State>; 3] {
        [
            Some(self.rx.into_state()),
            Some(self.tx.into_state()),
            self.event.map(Ring::into_state),
        ]
    }

    /// Takes packets from the guest, as many as the queue can hold at most.
    fn transmit(&mut self, watch: &Watch<'_>) {
        for _ in 0..limits::QUEUE {
            let Some(chain) = self.tx.pop() else {
                return;
            };
            let mut reader = chain.reader();
            // A chain that is no packet is given back and otherwise ignored:
            // there is nobody to reset.
            if let Ok(bytes) = reader.read_array() {
                self.packet(&Header::parse(&bytes), reader, watch);
            }
            self.tx.give_back(chain, 0);
        }
        // More came in meanwhile: others get their turn first.
        self.tx.again();
    }

    /// A packet of the guest.
    fn packet(&mut self, header: &Header, mut rest: Reader<'_>, watch: &Watch<'_>) {
        // Somebody else's packet (virtio 1.2, 5.10.6: src_cid must be the
        // guest's): there is nobody to answer to.
        if header.src_cid != self.host.guest_cid {
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        let operation = header.op;
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            return self.refuse(header);
        }
        let Some(&token) = self.by_ports.get(&ports) else {
            if operation == op::REQUEST {
                self.accept(ports, header, watch);
            } else {
                self.refuse(header);
            }
            return;
        };
        if operation == op::RST {
            self.end(token);
            return;
        }
        let len = header.len as usize;
        let payload = rest.split(len.min(limits::PACKET));
        let Some(Peer::Stream(stream)) = self.sockets.get_mut(&token) else {
            return;
        };
        let after = if operation == op::RW && payload.len() != len {
            Err(Broken)
        } else {
            stream.take(header, payload)
        };
        match after {
            Ok(After::GoesOn) => self.note(token),
            Ok(After::Closed) | Err(Broken) => self.reset(token),
        }
    }

    /// The guest asks for a connection.
    fn accept(&mut self, ports: Ports, header: &Header, watch: &Watch<'_>) {
        let token = if self.has_room(Opener::Guest) && self.host.ports.contains(&ports.host) {
            self.offer(ports.host).and_then(|socket| {
                let token = self.next_token();
                let socket = watch.add(socket, token, SOCKET_EVENTS)?;
                let mut stream = Stream::to_host(ports, self.host.guest_cid, socket);
                stream.hear(header);
                self.sockets.insert(token, Peer::Stream(stream));
                Ok(token)
            })
        } else {
            Err(io::ErrorKind::ConnectionRefused.into())
        };
        match token {
            Ok(token) => {
                self.by_ports.insert(ports, token);
                self.note(token);
            }
            Err(_) => self.refuse(header),
        }
    }

    /// Whether one stream more can begin.
    fn has_room(&self, opener: Opener) -> bool {
        let limit = match opener {
            Opener::Guest => limits::GUEST_STREAMS,
            Opener::Host => limits::HOST_STREAMS,
        };
        let peers = self.sockets.values();
        self.resets.len() < limits::RESETS
            && peers.filter(|peer| peer.opener() == opener).count() < limit
    }

    /// Makes a pair of sockets and sends one end to whoever serves `port`.
    fn offer(&self, port: u32) -> io::Result<OwnedFd> {
        let acceptor = self
            .host
            .acceptor
            .as_ref()
            .ok_or(io::ErrorKind::ConnectionRefused)?;
        let (ours, theirs) = net::socketpair(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let descriptors = [theirs.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&descriptors));
        net::sendmsg(
            acceptor,
            &[IoSlice::new(&port.to_le_bytes())],
            &mut control,
            SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
        )?;
        Ok(ours)
    }

    /// Takes in programs of the host that connected to the listener.
    fn accept_programs(&mut self, watch: &Watch<'_>) {
        let host = Arc::clone(&self.host);
        let Some(listener) = &host.listener else {
            return;
        };
        while let Ok(socket) =
            net::accept_with(listener, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
        {
            // Too many: closing it is the answer.
            if self.has_room(Opener::Host) {
                let token = self.next_token();
                if let Ok(socket) = watch.add(socket, token, SOCKET_EVENTS) {
                    self.sockets.insert(token, Peer::Greeting(socket));
                    self.greeting(token);
                }
            }
        }
    }

    /// Reads the first line of a program, as far as it has come.
    fn greeting(&mut self, token: u32) {
        let Some(Peer::Greeting(socket)) = self.sockets.get(&token) else {
            return;
        };
        let port = match read_line(socket) {
            Ok(Some(port)) => port,
            Ok(None) => return,
            Err(_) => {
                self.sockets.remove(&token);
                return;
            }
        };
        let mut ports = Ports {
            host: self.last_port,
            guest: port,
        };
        loop {
            ports.host = ports.host.wrapping_add(1).max(FIRST_PORT);
            if !self.by_ports.contains_key(&ports) {
                break;
            }
        }
        self.last_port = ports.host;
        if let Some(Peer::Greeting(socket)) = self.sockets.remove(&token) {
            let stream = Stream::to_guest(ports, self.host.guest_cid, socket);
            self.sockets.insert(token, Peer::Stream(stream));
            self.by_ports.insert(ports, token);
            self.note(token);
        }
    }

    /// A token that no socket has.
    fn next_token(&mut self) -> u32 {
        let mut token = self.last_token.wrapping_add(1).max(FIRST_SOCKET);
        while self.sockets.contains_key(&token) {
            token = token.wrapping_add(1).max(FIRST_SOCKET);
        }
        self.last_token = token;
        token
    }

    /// A socket is ready for something.
    fn socket_ready(&mut self, token: u32, events: EventFlags) {
        let hung_up = events.intersects(EventFlags::HUP | EventFlags::ERR);
        match self.sockets.get_mut(&token) {
            Some(Peer::Greeting(_)) => self.greeting(token),
            Some(Peer::Stream(stream)) => match stream.socket_ready(hung_up) {
                Ok(()) => self.note(token),
                Err(Broken) => self.reset(token),
            },
            Some(Peer::Draining(draining)) => {
                let done = hung_up || draining.flush();
                if done {
                    self.sockets.remove(&token);
                }
            }
            // Reported before it was closed in the same round.
            None => {}
        }
    }

    /// Puts a stream in the list if it has something for the guest.
    fn note(&mut self, token: u32) {
        if let Some(Peer::Stream(stream)) = self.sockets.get_mut(&token)
            && stream.owes()
            && !std::mem::replace(&mut stream.queued, true)
        {
            self.ready.push_back(token);
        }
    }

    /// Ends a stream for the guest; what the guest sent before still drains.
    fn end(&mut self, token: u32) -> Option<Ports> {
        let Some(Peer::Stream(stream)) = self.sockets.remove(&token) else {
            return None;
        };
        let ports = stream.ports;
        self.by_ports.remove(&ports);
        if stream.queued {
            self.ready.retain(|other| *other != token);
        }
        if let Some(draining) = stream.close() {
            self.sockets.insert(token, Peer::Draining(draining));
        }
        Some(ports)
    }

    /// Ends a stream and tells the guest, which must hear of it.
    fn reset(&mut self, token: u32) {
        if let Some(ports) = self.end(token) {
            self.resets.push_back(self.reset_packet(
                HOST_CID,
                ports.host,
                ports.guest,
                TYPE_STREAM,
            ));
        }
    }

    /// Answers a packet that belongs to no stream, if there is room for that.
    fn refuse(&mut self, header: &Header) {
        if header.op != op::RST && self.resets.len() < limits::RESETS {
            self.resets.push_back(self.reset_packet(
                header.dst_cid,
                header.dst_port,
                header.src_port,
                header.kind,
            ));
        }
    }

    fn reset_packet(&self, from: u64, host: u32, guest: u32, kind: u16) -> Header {
        Header {
            src_cid: from,
            dst_cid: self.host.guest_cid,
            src_port: host,
            dst_port: guest,
            kind,
            op: op::RST,
            ..Header::default()
        }
    }

    /// Gives the guest what there is for it, as far as it has given buffers.
    fn receive(&mut self) {
        for _ in 0..limits::QUEUE {
            if self.resets.is_empty() && self.ready.is_empty() {
                return;
            }
            let Some(chain) = self.rx.pop() else {
                return;
            };
            let mut room = chain.writer();
            let mut header = room.split(HEADER_LEN);
            let next = if header.len() < HEADER_LEN {
                Next::NoRoom
            } else {
                self.next_packet(&mut room)
            };
            let len = match next {
                Next::Packet(next) => {
                    let payload = next.len as usize;
                    header.write(&next.bytes()).saturating_add(payload)
                }
                // Back with it: the next one may be of use.
                Next::NoRoom => 0,
                Next::Nothing => return self.rx.keep(chain),
            };
            self.rx.give_back(chain, len);
        }
        self.rx.again();
    }

    /// The next packet, its payload already in `room`.
    fn next_packet(&mut self, room: &mut Writer<'_>) -> Next {
        if let Some(header) = self.resets.pop_front() {
            return Next::Packet(header);
        }
        // Those that come again meanwhile have nothing now either.
        for _ in 0..self.ready.len() {
            let Some(token) = self.ready.pop_front() else {
                break;
            };
            let Some(Peer::Stream(stream)) = self.sockets.get_mut(&token) else {
                continue;
            };
            stream.queued = false;
            let next = stream.next(room);
            self.note(token);
            if !matches!(next, Next::Nothing) {
                return next;
            }
        }
        Next::Nothing
    }
}

impl Peer {
    fn opener(&self) -> Opener {
        match self {
            Peer::Greeting(_) => Opener::Host,
            Peer::Stream(stream) => stream.opener,
            Peer::Draining(draining) => draining.opener,
        }
    }
}

impl Handler for Mux {
    fn ready(&mut self, token: u32, events: EventFlags, watch: &Watch<'_>) -> io::Result<()> {
        match token {
            RX => self.rx.acknowledge(),
            TX => {
                self.tx.acknowledge();
                self.transmit(watch);
            }
            LISTENER => self.accept_programs(watch),
            _ => self.socket_ready(token, events),
        }
        self.receive();
        self.tx.tell();
        self.rx.tell();
        Ok(())
    }
}

/// The port in `CONNECT <port>\n`, which is taken from the socket and nothing
/// more. `None`: the line has not come to its end yet.
fn read_line(socket: impl AsFd) -> io::Result<Option<u32>> {
    let mut bytes = [0; limits::LINE];
    let (_, seen) = match net::recv(&socket, &mut bytes[..], RecvFlags::PEEK) {
        Err(rustix::io::Errno::AGAIN) => return Ok(None),
        other => other?,
    };
    let seen_line = bytes.iter().take(seen);
    let Some(end) = seen_line.copied().position(|byte| byte == b'\n') else {
        return if seen == 0 || seen == bytes.len() {
            Err(io::ErrorKind::InvalidData.into())
        } else {
            Ok(None)
        };
    };
    let (line, _) = bytes.split_at_mut(end.saturating_add(1));
    let port = std::str::from_utf8(line)
        .ok()
        .and_then(|line| line.strip_suffix('\n'))
        .and_then(|line| line.strip_prefix("CONNECT "))
        .filter(|port| port.bytes().all(|byte| byte.is_ascii_digit()))
        .and_then(|port| port.parse().ok())
        .ok_or(io::ErrorKind::InvalidData)?;
    net::recv(socket, line, RecvFlags::empty())?;
    Ok(Some(port))
}
