//! The device against a guest made of two rings in ordinary memory.
//!
//! The device runs on its own event loop, as in the VMM; the guest waits for its
//! interrupts with a deadline.

mod hostile;

use std::{
    collections::VecDeque,
    io::{IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    sync::Arc,
    thread,
    time::Duration,
};

use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    net::{
        AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags,
        SocketType,
    },
};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Vsock,
    limits::{GUEST_STREAMS, PACKET, RESETS, STREAM_BUFFER},
    mux::Mux,
    packet::{HEADER_LEN, Header, TYPE_STREAM, op},
};
use crate::{
    devices::{
        Device, Io, Worker,
        testing::{Driver, SIZE, WRITE, interrupt, memory},
    },
    event_loop::{EventLoop, event_fd},
    exit::Ending,
};

const CID: u64 = 3;
const PORT: u32 = 1024;
const DEADLINE: Timespec = Timespec {
    tv_sec: 20,
    tv_nsec: 0,
};

struct Guest {
    mem: Arc<GuestMemoryMmap>,
    rx: Driver,
    tx: Driver,
    free: VecDeque<u16>,
    irq: Arc<EventFd>,
    device: Vsock,
    worker: Option<Box<dyn Worker>>,
    acceptor: OwnedFd,
    path: std::path::PathBuf,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Guest {
    fn new() -> Guest {
        Guest::with_buffers(SIZE)
    }

    /// A guest that offers this many receive buffers at first.
    fn with_buffers(buffers: u16) -> Guest {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "bulkhead-vsock-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        ));
        let listener = UnixListener::bind(&path).unwrap();
        let (acceptor, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let events = EventLoop::new("test").unwrap();
        events.spawn(Ending::new().unwrap()).unwrap();
        let device = Vsock::new(
            u32::try_from(CID).unwrap(),
            Some(listener.into()),
            Some(theirs),
            vec![PORT],
            events,
        )
        .unwrap();
        let mem = memory(0x100_0000);
        let mut guest = Guest {
            rx: Driver::new(&mem, 0x1000, 4096),
            tx: Driver::new(&mem, 0x10_0000, 0x1_1000),
            mem,
            free: VecDeque::new(),
            irq: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            device,
            worker: None,
            acceptor,
            path,
        };
        guest.activate(buffers);
        guest
    }

    /// Starts the device with fresh queues and this many receive buffers.
    fn activate(&mut self, buffers: u16) {
        let io = self.io(buffers);
        self.worker = Some(self.device.activate(io).unwrap());
    }

    fn io(&mut self, buffers: u16) -> Io {
        let (rx, tx) = (self.rx.base, self.tx.base);
        for base in [rx, tx] {
            self.rx.write(base, &[0; 0x3000]);
        }
        self.rx = Driver::new(&self.mem, rx, 4096);
        self.tx = Driver::new(&self.mem, tx, 0x1_1000);
        self.free = (0..SIZE).collect();
        for index in 0..buffers {
            self.rx.describe(index, self.rx.buffer_len, WRITE);
            self.rx.make_available(index);
        }
        let line = interrupt(&self.irq);
        Io {
            queues: vec![
                Some(self.rx.ring(line.clone())),
                Some(self.tx.ring(line)),
                None,
            ],
            features: 0,
        }
    }

    fn wait(&self) {
        let ready = poll(
            &mut [PollFd::from_borrowed_fd(event_fd(&self.irq), PollFlags::IN)],
            Some(&DEADLINE),
        )
        .unwrap();
        assert_eq!(ready, 1, "no interrupt in time");
        let _ = self.irq.read();
    }

    /// The next receive buffer that comes back.
    fn used(&mut self) -> (u16, u32) {
        loop {
            if let Some(used) = self.rx.used() {
                return used;
            }
            self.wait();
        }
    }

    fn send_raw(&mut self, bytes: &[u8]) {
        let index = loop {
            while let Some((index, _)) = self.tx.used() {
                self.free.push_back(index);
            }
            match self.free.pop_front() {
                Some(index) => break index,
                None => self.wait(),
            }
        };
        self.mem.write_slice(bytes, self.tx.buffer(index)).unwrap();
        let len = u32::try_from(bytes.len()).unwrap();
        self.tx.describe(index, len, 0);
        self.tx.make_available(index);
        self.tx.notify();
    }

    fn send(&mut self, header: Header, payload: &[u8]) {
        let mut bytes = header.bytes().to_vec();
        bytes.extend(payload);
        self.send_raw(&bytes);
    }

    /// The next packet, if one is there.
    fn poll(&mut self) -> Option<(Header, Vec<u8>)> {
        let (index, len) = self.rx.used()?;
        let mut bytes = vec![0; len as usize];
        self.mem
            .read_slice(&mut bytes, self.rx.buffer(index))
            .unwrap();
        self.rx.describe(index, self.rx.buffer_len, WRITE);
        self.rx.make_available(index);
        self.rx.notify();
        let header = Header::parse(bytes[..HEADER_LEN].try_into().unwrap());
        assert_eq!(header.len as usize, bytes.len() - HEADER_LEN);
        assert_eq!(header.dst_cid, CID);
        Some((header, bytes.split_off(HEADER_LEN)))
    }

    fn receive(&mut self) -> (Header, Vec<u8>) {
        loop {
            if let Some(packet) = self.poll() {
                return packet;
            }
            self.wait();
        }
    }

    /// The next packet, which must be this operation.
    fn expect(&mut self, op: u16) -> Header {
        let (header, _) = self.receive();
        assert_eq!(header.op, op, "{header:?}");
        header
    }

    /// Connects to the host from this port; the host's end.
    fn connect(&mut self, port: u32) -> UnixStream {
        self.send(to_host(port, op::REQUEST), &[]);
        self.expect(op::RESPONSE);
        self.accepted().unwrap()
    }

    /// What came over the acceptor.
    fn accepted(&self) -> Option<UnixStream> {
        let mut port = [0; 4];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        rustix::net::recvmsg(
            &self.acceptor,
            &mut [IoSliceMut::new(&mut port)],
            &mut control,
            RecvFlags::DONTWAIT,
        )
        .ok()?;
        assert_eq!(u32::from_le_bytes(port), PORT);
        control.drain().find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next().map(|fd| {
                let stream = UnixStream::from(fd);
                stream.set_nonblocking(false).unwrap();
                stream
                    .set_read_timeout(Some(Duration::from_secs(20)))
                    .unwrap();
                stream
            }),
            _ => None,
        })
    }

    /// A program of the host connects to a port of the guest, which accepts.
    fn program(&mut self, port: u32) -> (UnixStream, Header) {
        let mut program = UnixStream::connect(&self.path).unwrap();
        program
            .set_read_timeout(Some(Duration::from_secs(20)))
            .unwrap();
        program
            .write_all(format!("CONNECT {port}\n").as_bytes())
            .unwrap();
        let request = self.expect(op::REQUEST);
        assert_eq!(request.dst_port, port);
        let answer = answer(&request, op::RESPONSE);
        self.send(answer, &[]);
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let mut byte = [0];
            program.read_exact(&mut byte).unwrap();
            line.push(byte[0]);
        }
        assert_eq!(line, format!("OK {}\n", request.src_port).as_bytes());
        (program, answer)
    }
}

fn to_host(port: u32, op: u16) -> Header {
    Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: port,
        dst_port: PORT,
        kind: TYPE_STREAM,
        op,
        buf_alloc: 256 * 1024,
        ..Header::default()
    }
}

fn answer(to: &Header, op: u16) -> Header {
    Header {
        src_cid: to.dst_cid,
        dst_cid: to.src_cid,
        src_port: to.dst_port,
        dst_port: to.src_port,
        op,
        len: 0,
        buf_alloc: 256 * 1024,
        ..*to
    }
}

fn data(of: &Header, len: usize) -> Header {
    Header {
        op: op::RW,
        len: u32::try_from(len).unwrap(),
        ..*of
    }
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()[3]
        })
        .collect()
}

#[test]
fn a_program_of_the_host_talks_to_the_guest() {
    let mut guest = Guest::new();
    let (mut program, port) = guest.program(5000);
    program.write_all(b"ping").unwrap();
    let (header, bytes) = guest.receive();
    assert_eq!((header.op, &bytes[..]), (op::RW, &b"ping"[..]));
    guest.send(data(&port, 4), b"pong");
    let mut bytes = [0; 4];
    program.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"pong");
}

#[test]
fn bytes_written_together_with_the_first_line_arrive() {
    let mut guest = Guest::new();
    let mut program = UnixStream::connect(&guest.path).unwrap();
    program.write_all(b"CONNECT 77\nhello").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.send(answer(&request, op::RESPONSE), &[]);
    assert_eq!(guest.receive().1, b"hello");
}

#[test]
fn a_first_line_that_is_no_connect_ends_the_program() {
    for line in [
        "HELLO\n",
        "CONNECT \n",
        "CONNECT +1\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 2\n",
        "CONNECT 00000000000000000000000000000001\n",
    ] {
        let guest = Guest::new();
        let mut program = UnixStream::connect(&guest.path).unwrap();
        program.write_all(line.as_bytes()).unwrap();
        let mut rest = Vec::new();
        let end = program.read_to_end(&mut rest);
        assert!(rest.is_empty() && !matches!(end, Ok(1..)), "{line:?}");
    }
}

#[test]
fn a_guest_that_refuses_gives_the_program_end_of_file() {
    let mut guest = Guest::new();
    let mut program = UnixStream::connect(&guest.path).unwrap();
    program.write_all(b"CONNECT 1\n").unwrap();
    let request = guest.expect(op::REQUEST);
    guest.send(answer(&request, op::RST), &[]);
    assert_eq!(program.read(&mut [0; 8]).unwrap(), 0);
}

#[test]
fn a_program_that_gives_up_before_the_answer_resets_the_request() {
    let mut guest = Guest::new();
    let mut program = UnixStream::connect(&guest.path).unwrap();
    program.write_all(b"CONNECT 1\n").unwrap();
    guest.expect(op::REQUEST);
    drop(program);
    guest.expect(op::RST);
}

#[test]
fn sixty_four_mib_pass_both_ways_unchanged() {
    const TOTAL: usize = 64 << 20;
    let mut guest = Guest::new();
    let mut host = guest.connect(900);
    let echo = thread::spawn(move || {
        let mut bytes = vec![0; 50_000];
        loop {
            let len = host.read(&mut bytes).unwrap();
            if len == 0 {
                return;
            }
            host.write_all(&bytes[..len]).unwrap();
        }
    });
    let text = noise(1 << 20);
    let (mut sent, mut back) = (0_usize, 0_usize);
    let mut known = 0_u32;
    while back < TOTAL {
        let free = STREAM_BUFFER - u32::try_from(sent).unwrap().wrapping_sub(known);
        let at = sent % text.len();
        let len = PACKET
            .min(free as usize)
            .min(text.len() - at)
            .min(TOTAL - sent);
        let mut header = data(&to_host(900, op::RW), len);
        header.fwd_cnt = u32::try_from(back).unwrap();
        if len > 0 {
            guest.send(header, &text[at..at + len]);
            sent += len;
        } else {
            guest.wait();
        }
        while let Some((header, bytes)) = guest.poll() {
            known = header.fwd_cnt;
            match header.op {
                op::RW => {
                    let at = back % text.len();
                    let split = bytes.len().min(text.len() - at);
                    assert!(bytes[..split] == text[at..at + split]);
                    assert!(bytes[split..] == text[..bytes.len() - split]);
                    back += bytes.len();
                }
                op::CREDIT_REQUEST => {
                    let mut header = to_host(900, op::CREDIT_UPDATE);
                    header.fwd_cnt = u32::try_from(back).unwrap();
                    guest.send(header, &[]);
                }
                other => assert_eq!(other, op::CREDIT_UPDATE),
            }
        }
    }
    let mut end = to_host(900, op::SHUTDOWN);
    end.flags = 3;
    guest.send(end, &[]);
    guest.expect(op::RST);
    echo.join().unwrap();
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_program() {
    for closing in [op::SHUTDOWN, op::RST] {
        let mut guest = Guest::new();
        let mut host = guest.connect(900);
        rustix::net::sockopt::set_socket_recv_buffer_size(&host, 4096).unwrap();
        let text = noise(STREAM_BUFFER as usize);
        for part in text.chunks(PACKET) {
            guest.send(data(&to_host(900, op::RW), part.len()), part);
        }
        let mut end = to_host(900, closing);
        end.flags = 3;
        guest.send(end, &[]);
        if closing == op::SHUTDOWN {
            while guest.receive().0.op != op::RST {}
        }
        let mut got = Vec::new();
        host.read_to_end(&mut got).unwrap();
        assert!(got == text);
    }
}

#[test]
fn what_a_program_wrote_before_it_closed_reaches_the_guest() {
    let mut guest = Guest::with_buffers(2);
    let mut host = guest.connect(900);
    let text = noise(100_000);
    host.write_all(&text).unwrap();
    drop(host);
    let mut got = Vec::new();
    loop {
        let (header, bytes) = guest.receive();
        match header.op {
            op::RW => got.extend(bytes),
            op => {
                assert_eq!((op, header.flags), (op::SHUTDOWN, 3));
                break;
            }
        }
    }
    assert!(got == text);
    guest.send(to_host(900, op::RST), &[]);
    let _again = guest.connect(900);
}

#[test]
fn each_direction_closes_by_itself() {
    let mut guest = Guest::new();
    let mut host = guest.connect(900);
    let mut end = to_host(900, op::SHUTDOWN);
    end.flags = 2;
    guest.send(data(&to_host(900, op::RW), 3), b"abc");
    guest.send(end, &[]);
    let mut got = Vec::new();
    host.read_to_end(&mut got).unwrap();
    assert_eq!(got, b"abc");
    host.write_all(b"still").unwrap();
    assert_eq!(guest.receive().1, b"still");
    host.shutdown(std::net::Shutdown::Write).unwrap();
    // Both directions are over, so the host takes no more either; it may say so
    // in two steps.
    while guest.expect(op::SHUTDOWN).flags != 3 {}

    let mut host = guest.connect(901);
    host.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 2);
    guest.send(data(&to_host(901, op::RW), 3), b"xyz");
    let mut bytes = [0; 3];
    host.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"xyz");
}

#[test]
fn a_guest_that_reads_no_more_gives_the_program_a_broken_pipe() {
    let mut guest = Guest::new();
    let mut host = guest.connect(900);
    let mut end = to_host(900, op::SHUTDOWN);
    end.flags = 1;
    guest.send(end, &[]);
    guest.send(data(&to_host(900, op::RW), 1), b"x");
    host.read_exact(&mut [0]).unwrap();
    let error = host.write_all(b"too late").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_program_that_is_gone_is_told_to_the_guest_and_harms_nobody() {
    let mut guest = Guest::new();
    let host = guest.connect(900);
    drop(host);
    assert_eq!(guest.expect(op::SHUTDOWN).flags, 3);
    guest.send(data(&to_host(900, op::RW), 4), b"lost");
    let _other = guest.connect(901);
}
