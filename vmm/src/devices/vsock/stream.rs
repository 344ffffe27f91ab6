//! One stream: the guest's half as packets, the host's half as a socket.
//!
//! Bytes of the guest that the socket does not take are kept, at most
//! [`STREAM_BUFFER`](super::limits::STREAM_BUFFER) of them, and go out as it
//! drains, also after the guest has closed or reset the stream. Bytes of the host
//! stay in its socket until the guest has both a buffer and credit for them.

use std::{collections::VecDeque, io, os::fd::OwnedFd};

use rustix::net::{self, RecvFlags, SendFlags, Shutdown};

use super::{
    credit::{Credit, Overrun},
    limits::PACKET,
    packet::{Header, TYPE_STREAM, op},
    state::{Ended, Event, State, Step},
};
use crate::{
    devices::queue::{Reader, Writer},
    event_loop::Watched,
};

/// Context id of the host (virtio 1.2, 5.10.4).
pub(super) const HOST_CID: u64 = 2;

/// The two ports of a stream, which name it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Ports {
    pub(super) host: u32,
    pub(super) guest: u32,
}

/// Who opened a stream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opener {
    Guest,
    Host,
}

/// A stream of the multiplexer.
#[derive(Debug)]
pub(super) struct Stream {
    pub(super) ports: Ports,
    pub(super) opener: Opener,
    guest_cid: u64,
    socket: Socket,
    state: State,
    credit: Credit,
    owed: Owed,
    /// The multiplexer has it in its list of streams with something for the guest.
    pub(super) queued: bool,
    /// The socket may have something to read: it has not yet said that it would
    /// block.
    readable: bool,
}

/// Control packets that the guest is still to get.
#[derive(Debug, Default)]
struct Owed {
    request: bool,
    response: bool,
    shutdown: bool,
    credit_update: bool,
    /// The guest was asked for credit and has not said a word since.
    asked_for_credit: bool,
}

/// The stream is broken by the guest: reset it.
#[derive(Debug)]
pub(super) struct Broken;

impl From<Overrun> for Broken {
    fn from(_: Overrun) -> Broken {
        Broken
    }
}

/// What the stream wants after a packet of the guest.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum After {
    GoesOn,
    /// The guest has closed it: confirm, and drain what is left for the host.
    Closed,
}

/// What a stream has for the guest.
#[derive(Debug)]
pub(super) enum Next {
    Packet(Header),
    /// Bytes, but the buffers have room for a header only.
    NoRoom,
    /// Nothing after all.
    Nothing,
}

impl Stream {
    /// The host's program asks for a connection to the guest.
    pub(super) fn to_guest(ports: Ports, guest_cid: u64, socket: Watched<OwnedFd>) -> Stream {
        let mut stream = Stream::new(ports, Opener::Host, guest_cid, socket);
        stream.owed.request = true;
        stream
    }

    /// The guest asked for a connection, and the host's end is delivered.
    pub(super) fn to_host(ports: Ports, guest_cid: u64, socket: Watched<OwnedFd>) -> Stream {
        let mut stream = Stream::new(ports, Opener::Guest, guest_cid, socket);
        stream.owed.response = true;
        stream
    }

    fn new(ports: Ports, opener: Opener, guest_cid: u64, socket: Watched<OwnedFd>) -> Stream {
        let state = match opener {
            Opener::Guest => State::OPEN,
            Opener::Host => State::Asked,
        };
        Stream {
            ports,
            opener,
            guest_cid,
            socket: Socket::new(socket),
            state,
            credit: Credit::default(),
            owed: Owed::default(),
            queued: false,
            readable: true,
        }
    }

    /// The state of the guest's buffer, as a packet tells it.
    pub(super) fn hear(&mut self, header: &Header) {
        self.credit.hear(header.buf_alloc, header.fwd_cnt);
        self.owed.asked_for_credit &= self.credit.to_guest() == 0;
    }

    /// A packet of the guest for this stream, other than a reset. The payload's
    /// length is what the header says.
    pub(super) fn take(&mut self, header: &Header, payload: Reader<'_>) -> Result<After, Broken> {
        self.hear(header);
        let event = match header.op {
            op::REQUEST => Event::Request,
            op::RESPONSE => Event::Response,
            op::RW => Event::Data,
            op::SHUTDOWN => Event::GuestEnds(Ended::from_flags(header.flags)),
            op::CREDIT_UPDATE | op::CREDIT_REQUEST => Event::Credit,
            _ => return Err(Broken),
        };
        let was = self.state;
        match was.after(event) {
            Step::To(state) => self.state = state,
            Step::Over => return Ok(After::Closed),
            Step::Refuse => return Err(Broken),
        }
        match event {
            Event::Response => self.greet()?,
            Event::Data => self.take_data(payload)?,
            Event::GuestEnds(ended) => {
                if ended.send {
                    self.socket.end_after_pending();
                }
                if ended.receive {
                    self.socket.refuse_input();
                }
            }
            Event::Credit if header.op == op::CREDIT_REQUEST => {
                self.owed.credit_update = true;
            }
            Event::Credit | Event::Request | Event::HostEnds(_) => {}
        }
        Ok(After::GoesOn)
    }

    /// Tells the program that asked for the connection that it stands.
    fn greet(&mut self) -> Result<(), Broken> {
        let line = format!("OK {}\n", self.ports.host);
        // The socket is fresh and has room for a line; if not, nobody is there.
        match net::send(&self.socket.fd, line.as_bytes(), SendFlags::NOSIGNAL) {
            Ok(sent) if sent == line.len() => Ok(()),
            _ => Err(Broken),
        }
    }

    fn take_data(&mut self, payload: Reader<'_>) -> Result<(), Broken> {
        let len = length(payload.len());
        self.credit.received(len)?;
        if self.state.flows_to_host() {
            match self.socket.send(payload) {
                Ok(sent) => self.forwarded(sent),
                Err(Gone) => self.host_stopped_reading(),
            }
        } else {
            self.forwarded(payload.len());
        }
        Ok(())
    }

    fn forwarded(&mut self, len: usize) {
        self.credit.forwarded(length(len));
        self.owed.credit_update |= self.credit.owes_update();
    }

    /// Nothing more can reach the host's program: what is left is dropped, and
    /// the guest hears of it.
    fn host_stopped_reading(&mut self) {
        let lost = self.socket.drop_pending();
        self.forwarded(lost);
        self.host_ends(Ended {
            receive: true,
            send: false,
        });
    }

    fn host_ends(&mut self, ended: Ended) {
        if let Step::To(state) = self.state.after(Event::HostEnds(ended)) {
            self.owed.shutdown |= state != self.state;
            self.state = state;
        }
    }

    /// The socket may be readable, writable, or hung up.
    ///
    /// An error says that the program which asked for the connection has gone
    /// before the guest answered.
    pub(super) fn socket_ready(&mut self, hung_up: bool) -> Result<(), Broken> {
        self.readable = true;
        if self.state == State::Asked {
            return if hung_up { Err(Broken) } else { Ok(()) };
        }
        match self.socket.flush() {
            Ok(sent) => self.forwarded(sent),
            Err(Gone) => self.host_stopped_reading(),
        }
        if hung_up {
            self.host_stopped_reading();
        }
        Ok(())
    }

    /// Whether there is, or may be, something for the guest.
    pub(super) fn owes(&self) -> bool {
        let Owed {
            request,
            response,
            shutdown,
            credit_update,
            asked_for_credit,
        } = self.owed;
        request
            || response
            || credit_update
            || if self.may_read() {
                self.credit.to_guest() > 0 || !asked_for_credit
            } else {
                shutdown
            }
    }

    fn may_read(&self) -> bool {
        self.readable && self.state.flows_to_guest()
    }

    /// The next packet for the guest, its payload already in `room`, the part of
    /// the buffers after the header.
    pub(super) fn next(&mut self, room: &mut Writer<'_>) -> Next {
        if std::mem::take(&mut self.owed.request) {
            return Next::Packet(self.header(op::REQUEST));
        }
        if std::mem::take(&mut self.owed.response) {
            return Next::Packet(self.header(op::RESPONSE));
        }
        if self.may_read() {
            match self.next_data(room) {
                Next::Nothing => {}
                next => return next,
            }
        }
        // After the data: what the host wrote before it closed arrives first.
        if !self.may_read()
            && let State::Open { host, .. } = self.state
            && std::mem::take(&mut self.owed.shutdown)
        {
            let mut header = self.header(op::SHUTDOWN);
            header.flags = host.flags();
            return Next::Packet(header);
        }
        if std::mem::take(&mut self.owed.credit_update) {
            return Next::Packet(self.header(op::CREDIT_UPDATE));
        }
        Next::Nothing
    }

    fn next_data(&mut self, room: &mut Writer<'_>) -> Next {
        let credit = self.credit.to_guest();
        if credit == 0 {
            return if std::mem::replace(&mut self.owed.asked_for_credit, true) {
                Next::Nothing
            } else {
                Next::Packet(self.header(op::CREDIT_REQUEST))
            };
        }
        let mut room = room.split(PACKET.min(credit as usize));
        let received = if room.is_empty() {
            // What is there stays there.
            let peek = RecvFlags::PEEK | RecvFlags::DONTWAIT;
            net::recv(&self.socket.fd, &mut [0][..], peek)
                .map(|(_, seen)| seen)
                .map_err(io::Error::from)
        } else {
            room.receive_from(&self.socket.fd)
        };
        match received {
            Ok(0) => self.host_ends(Ended::SEND),
            Ok(_) if room.written() == 0 => return Next::NoRoom,
            Ok(len) => {
                let len = length(len);
                self.credit.sent(len);
                let mut header = self.header(op::RW);
                header.len = len;
                return Next::Packet(header);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => self.readable = false,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // ECONNRESET: it closed without reading all. Nothing more will come.
            Err(_) => {
                self.host_ends(Ended::SEND);
                self.host_stopped_reading();
            }
        }
        Next::Nothing
    }

    fn header(&mut self, op: u16) -> Header {
        let (buf_alloc, fwd_cnt) = self.credit.announce();
        self.owed.credit_update = false;
        Header {
            src_cid: HOST_CID,
            dst_cid: self.guest_cid,
            src_port: self.ports.host,
            dst_port: self.ports.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc,
            fwd_cnt,
            ..Header::default()
        }
    }

    /// The guest's part is over. What is left of its bytes for the host, if any.
    pub(super) fn close(self) -> Option<Draining> {
        let Stream {
            mut socket,
            state,
            opener,
            ..
        } = self;
        if state.flows_to_host() {
            socket.end_after_pending();
        } else {
            socket.drop_pending();
        }
        let mut draining = Draining { opener, socket };
        (!draining.flush()).then_some(draining)
    }
}

/// The host's end of a stream that the guest has left, with bytes that the host's
/// program has not taken yet. The program decides how long it lives.
#[derive(Debug)]
pub(super) struct Draining {
    pub(super) opener: Opener,
    socket: Socket,
}

impl Draining {
    /// Passes on what the socket takes; whether everything is done.
    pub(super) fn flush(&mut self) -> bool {
        self.socket.flush().is_err() || self.socket.pending.is_empty()
    }
}

impl Drop for Draining {
    fn drop(&mut self) {
        // A socket closed with unread input gives its peer ECONNRESET where it
        // should see the end of file.
        self.socket.discard_input();
    }
}

/// A socket of the host and the guest's bytes that it has not taken.
#[derive(Debug)]
struct Socket {
    fd: Watched<OwnedFd>,
    pending: VecDeque<u8>,
    /// After the pending bytes comes the end.
    ends: bool,
}

/// The peer takes no more bytes.
struct Gone;

impl Socket {
    fn new(fd: Watched<OwnedFd>) -> Socket {
        Socket {
            fd,
            pending: VecDeque::new(),
            ends: false,
        }
    }

    /// Sends now what the socket takes and keeps the rest. How much was sent.
    fn send(&mut self, mut payload: Reader<'_>) -> Result<usize, Gone> {
        let sent = if self.pending.is_empty() {
            would_block_is_zero(payload.send_to(&self.fd))?
        } else {
            0
        };
        let mut bytes = [0; 4096];
        while !payload.is_empty() {
            let count = payload.read(&mut bytes);
            self.pending.extend(bytes.iter().take(count));
        }
        Ok(sent)
    }

    /// Sends pending bytes; how many went.
    fn flush(&mut self) -> Result<usize, Gone> {
        let mut total = 0;
        while !self.pending.is_empty() {
            let (front, _) = self.pending.as_slices();
            let sent = would_block_is_zero(
                net::send(&self.fd, front, SendFlags::NOSIGNAL | SendFlags::DONTWAIT)
                    .map_err(io::Error::from),
            )?;
            if sent == 0 {
                return Ok(total);
            }
            self.pending.drain(..sent);
            total = total.saturating_add(sent);
        }
        if total > 0 {
            self.pending.shrink_to_fit();
        }
        if self.ends {
            // Fails only if the peer has gone, which is an end as well.
            let _ = net::shutdown(&self.fd, Shutdown::Write);
        }
        Ok(total)
    }

    fn end_after_pending(&mut self) {
        self.ends = true;
        // A peer that has gone is noticed by the hang-up event.
        let _ = self.flush();
    }

    fn refuse_input(&self) {
        // Fails only if the peer has gone.
        let _ = net::shutdown(&self.fd, Shutdown::Read);
    }

    fn drop_pending(&mut self) -> usize {
        std::mem::take(&mut self.pending).len()
    }

    fn discard_input(&self) {
        self.refuse_input();
        let mut bytes = [0_u8; 16 * 1024];
        // Bounded: after the shutdown nothing more comes in.
        while let Ok((_, 1..)) = net::recv(&self.fd, &mut bytes[..], RecvFlags::DONTWAIT) {}
    }
}

fn would_block_is_zero(result: io::Result<usize>) -> Result<usize, Gone> {
    match result {
        Ok(sent) => Ok(sent),
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
            ) =>
        {
            Ok(0)
        }
        Err(_) => Err(Gone),
    }
}

/// A length below 4 GiB: all lengths here are bounded by a packet or a buffer.
fn length(len: usize) -> u32 {
    u32::try_from(len).unwrap_or(u32::MAX)
}
