//! The console (virtio 1.2, 5.3): one port, hvc0 in the guest.
//!
//! What the guest writes is kept in a ring of 64 KiB and, where a descriptor is
//! given for it, passed on. A slow reader of that descriptor holds the guest's
//! output back, never a thread of the VMM: up to 64 KiB wait here, the rest in
//! the queue. Whoever ends the machine writes what still waits ([`Output::finish`]).
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::{
    collections::VecDeque,
    io,
    os::fd::OwnedFd,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{
    Device, Io, Worker,
    queue::{Chain, Ring, Served, State},
};
use crate::{
    event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched},
    exit::printable,
};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
};

/// Bytes kept of what the guest wrote, and most bytes that wait for the reader.
const KEPT: usize = 64 << 10;
/// A pipe that is ready takes this much without blocking (PIPE_BUF).
const PART: usize = 4096;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;
const INPUT: u32 = 2;
const OUTPUT: u32 = 3;

/// What the guest has written.
#[derive(Clone, Debug)]
pub struct Output(Arc<Mutex<Written>>);

#[derive(Debug)]
struct Written {
    kept: VecDeque<u8>,
    waiting: VecDeque<u8>,
    reader: Option<OwnedFd>,
}

impl Output {
    /// Output that goes to `reader`, if there is one.
    #[must_use]
    pub fn new(reader: Option<OwnedFd>) -> Output {
        Output(Arc::new(Mutex::new(Written {
            kept: VecDeque::new(),
            waiting: VecDeque::new(),
            reader,
        })))
    }

    /// The last lines, at most `count`, escaped.
    #[must_use]
    pub fn last_lines(&self, count: usize) -> Vec<String> {
        let text: Vec<u8> = self.lock().kept.iter().copied().collect();
        let lines: Vec<&[u8]> = text.trim_ascii_end().split(|byte| *byte == b'\n').collect();
        let skipped = lines.len().saturating_sub(count);
        lines
            .into_iter()
            .skip(skipped)
            .map(printable)
            .filter(|line| !line.is_empty())
            .collect()
    }

    /// Writes what still waits, unless the reader stays away for `limit`.
    pub fn finish(&self, limit: Duration) {
        let mut written = self.lock();
        let started = Instant::now();
        while let Some(left) = limit.checked_sub(started.elapsed())
            && !written.pass_on(left)
        {}
    }

    fn lock(&self) -> MutexGuard<'_, Written> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Written {
    fn push(&mut self, bytes: &[u8]) {
        self.kept.extend(bytes);
        let excess = self.kept.len().saturating_sub(KEPT);
        self.kept.drain(..excess);
        if self.reader.is_some() {
            self.waiting.extend(bytes);
        }
    }

    fn is_full(&self) -> bool {
        self.waiting.len() >= KEPT
    }

    /// Writes what the reader takes within `limit`; says whether nothing waits any
    /// more.
    fn pass_on(&mut self, limit: Duration) -> bool {
        while let Some(reader) = &self.reader
            && !self.waiting.is_empty()
        {
            let limit = Timespec::try_from(limit).ok();
            let mut ready = [PollFd::new(reader, PollFlags::OUT)];
            match poll(&mut ready, limit.as_ref()) {
                Ok(0) | Err(Errno::INTR) => return false,
                Ok(_) | Err(_) => {}
            }
            let (front, _) = self.waiting.as_slices();
            let (part, _) = front.split_at(front.len().min(PART));
            match rustix::io::write(reader, part) {
                Ok(count) => {
                    self.waiting.drain(..count.min(self.waiting.len()));
                }
                Err(Errno::INTR | Errno::AGAIN) => return false,
                // The reader is gone: the ring still keeps the last of it.
                Err(_) => {
                    self.reader = None;
                    self.waiting = VecDeque::new();
                }
            }
        }
        true
    }
}

/// The device.
#[derive(Debug)]
pub struct Console {
    events: Arc<EventLoop>,
    output: Output,
    input: Option<Arc<OwnedFd>>,
}

impl Console {
    /// A console served by `events`. Reads of `input` may not block once it polls
    /// as readable.
    #[must_use]
    pub fn new(events: Arc<EventLoop>, output: Output, input: Option<OwnedFd>) -> Console {
        Console {
            events,
            output,
            input: input.map(Arc::new),
        }
    }
}

impl Device for Console {
    fn id(&self) -> u32 {
        3
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn activate(&mut self, mut io: Io) -> io::Result<Box<dyn Worker>> {
        let registration = self.events.add(|watch| {
            let mut server = Server {
                receive: io.take(0),
                transmit: io.take(1),
                output: self.output.clone(),
                output_watched: None,
                input: self.input.clone(),
                input_watched: None,
                unread: VecDeque::new(),
            };
            for (ring, token) in [
                (&mut server.receive, RECEIVE),
                (&mut server.transmit, TRANSMIT),
            ] {
                if let Some(ring) = ring {
                    ring.watch(watch, token)?;
                }
            }
            server.watch_input(watch)?;
            Ok(server)
        })?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        let rings = Registration::stop(*self).map(|server| [server.receive, server.transmit]);
        let rings = rings.into_iter().flatten();
        rings.map(|ring| ring.map(Ring::into_state)).collect()
    }
}

struct Server {
    receive: Option<Ring>,
    transmit: Option<Ring>,
    output: Output,
    /// A copy of the reader's descriptor, while output waits for it.
    output_watched: Option<Watched<OwnedFd>>,
    input: Option<Arc<OwnedFd>>,
    /// It is read only when no input waits for buffers.
    input_watched: Option<Watched<Arc<OwnedFd>>>,
    /// Input that waits for buffers.
    unread: VecDeque<u8>,
}

impl Handler for Server {
    fn ready(&mut self, token: u32, _: EventFlags, watch: &Watch<'_>) -> io::Result<()> {
        match token {
            RECEIVE => {
                if let Some(ring) = &self.receive {
                    ring.acknowledge();
                }
                self.receive();
            }
            TRANSMIT => {
                if let Some(ring) = &self.transmit {
                    ring.acknowledge();
                }
                self.transmit(watch)?;
            }
            INPUT => {
                self.read_input();
                self.receive();
            }
            OUTPUT => self.transmit(watch)?,
            _ => {}
        }
        self.watch_input(watch)
    }
}

impl Server {
    fn transmit(&mut self, watch: &Watch<'_>) -> io::Result<()> {
        let mut output = self.output.lock();
        let mut kept = true;
        while std::mem::take(&mut kept) {
            if let Some(ring) = &mut self.transmit {
                ring.turn(|chain| {
                    kept = output.is_full();
                    if kept {
                        return Served::Kept;
                    }
                    take(chain, &mut output);
                    Served::Used(0)
                });
            }
            // A chain that was kept is taken now if that made room for it.
            kept &= output.pass_on(Duration::ZERO);
        }
        let waits = !output.waiting.is_empty();
        match (&self.output_watched, &output.reader) {
            (None, Some(reader)) if waits => {
                let copy = reader.try_clone()?;
                self.output_watched = Some(watch.add(copy, OUTPUT, EventFlags::OUT)?);
            }
            (Some(_), _) if !waits => self.output_watched = None,
            _ => {}
        }
        Ok(())
    }

    fn read_input(&mut self) {
        let Some(input) = &self.input else { return };
        let mut part = [0; PART];
        match rustix::io::read(input, &mut part) {
            Ok(count @ 1..) => self.unread.extend(part.iter().take(count)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Ok(0) | Err(_) => self.input = None,
        }
    }

    fn receive(&mut self) {
        let (Some(ring), unread) = (&mut self.receive, &mut self.unread) else {
            return;
        };
        if unread.is_empty() {
            return;
        }
        ring.turn(|chain| {
            if unread.is_empty() {
                return Served::Kept;
            }
            let mut writer = chain.writer();
            let (front, _) = unread.as_slices();
            let count = writer.write(front);
            unread.drain(..count);
            Served::Used(count)
        });
    }

    /// Has the input watched if it is to be read now.
    fn watch_input(&mut self, watch: &Watch<'_>) -> io::Result<()> {
        let Some(input) = self.input.as_ref().filter(|_| self.unread.is_empty()) else {
            self.input_watched = None;
            return Ok(());
        };
        if self.input_watched.is_none() {
            match watch.add(Arc::clone(input), INPUT, EventFlags::IN) {
                // A file is always ready and cannot be watched: it gives nothing.
                Err(error) if error.raw_os_error() == Some(libc::EPERM) => self.input = None,
                other => self.input_watched = Some(other?),
            }
        }
        Ok(())
    }
}

/// Takes what the guest wrote, at most what is kept.
fn take(chain: &Chain, output: &mut Written) {
    let mut reader = chain.reader().split(KEPT);
    let mut part = [0; PART];
    while !reader.is_empty() {
        let count = reader.read(&mut part);
        output.push(part.split_at(count).0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    fn server(output: Option<OwnedFd>) -> Server {
        Server {
            receive: None,
            transmit: None,
            output: Output::new(output),
            output_watched: None,
            input: None,
            input_watched: None,
            unread: VecDeque::new(),
        }
    }

    /// A server in a loop that it is not part of.
    fn transmit(server: &mut Server, events: &Arc<EventLoop>) {
        struct Nothing;
        impl Handler for Nothing {
            fn ready(&mut self, _: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
                Ok(())
            }
        }
        let added = events.add(|watch| server.transmit(watch).map(|()| Nothing));
        drop(added.unwrap());
    }

    #[test]
    fn output_reaches_its_reader_and_is_kept() {
        let events = EventLoop::new("test").unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut server = server(Some(writer.into()));
        let mut guest = Guest::new();
        guest.driver.write(0x1_0000, b"first\nsec\x1bond\n");
        guest
            .driver
            .offer(&[(0x1_0000, 6, READ), (0x1_0006, 8, READ)]);
        server.transmit = Some(guest.ring);
        transmit(&mut server, &events);
        let mut text = [0; 14];
        (&reader).read_exact(&mut text).unwrap();
        assert_eq!(&text, b"first\nsec\x1bond\n");
        assert_eq!(server.output.last_lines(9), ["first", "sec\\x1bond"]);
        assert_eq!(server.output.last_lines(1), ["sec\\x1bond"]);
        assert_eq!(guest.irq.read().unwrap(), 1);
    }

    #[test]
    fn a_slow_reader_holds_the_guest_back_and_memory_stays_bounded_b52() {
        let events = EventLoop::new("test").unwrap();
        let (reader, writer) = io::pipe().unwrap();
        let mut server = server(Some(writer.into()));
        let mut guest = Guest::new();
        for _ in 0..16 {
            guest.driver.offer(&[(0x1_0000, 32 << 10, READ)]);
        }
        server.transmit = Some(guest.ring);
        transmit(&mut server, &events);
        // A pipe's 64 KiB, and 64 KiB that wait.
        assert_eq!(guest.driver.all_used().len(), 4);
        assert_eq!(server.output.lock().kept.len(), KEPT);
        assert!(server.output_watched.is_some());
        drop(reader);
        transmit(&mut server, &events);
        assert!(server.output_watched.is_none(), "the reader is gone");
        assert!(server.output.lock().waiting.is_empty());
    }

    #[test]
    fn input_waits_for_buffers_and_is_given_once() {
        let mut server = server(None);
        let mut guest = Guest::new();
        guest.driver.offer(&[(0x1_0000, 3, WRITE)]);
        guest.driver.offer(&[(0x1_0100, 100, READ)]);
        guest.driver.offer(&[(0x1_0200, 100, WRITE)]);
        server.receive = Some(guest.ring);
        server.unread.extend(b"abcdef");
        server.receive();
        assert!(server.unread.is_empty());
        let text = |at, length| guest.driver.read(at, length);
        assert_eq!(text(0x1_0000, 4), b"abc\0");
        assert_eq!(text(0x1_0100, 1), b"\0", "not writable: returned empty");
        assert_eq!(text(0x1_0200, 4), b"def\0");
    }

    #[test]
    fn the_end_of_the_input_and_a_reset_leave_nothing_to_watch_b48() {
        let events = EventLoop::new("test").unwrap();
        let (input, writer) = io::pipe().unwrap();
        let mut writer = Some(writer);
        let (_reader, output) = io::pipe().unwrap();
        let mut console = Console::new(
            Arc::clone(&events),
            Output::new(Some(output.into())),
            Some(input.into()),
        );
        for round in 0..3 {
            let guest = Guest::new();
            let io = Io {
                queues: vec![Some(guest.ring), None],
                features: 0,
            };
            let worker = console.activate(io).unwrap();
            events.turn().unwrap();
            assert!(!events.is_ready());
            if round == 2 {
                drop(writer.take());
                events.turn().unwrap();
                assert!(!events.is_ready(), "the end was seen and is seen again");
            }
            let states = worker.stop();
            assert!(matches!(states[..], [Some(_), None]));
            guest.driver.notify();
            assert!(!events.is_ready(), "nobody is there to be told");
        }
    }

    #[test]
    fn a_chain_outside_memory_is_returned_b44() {
        let events = EventLoop::new("test").unwrap();
        let mut server = server(None);
        let mut guest = Guest::new();
        guest.driver.offer(&[(u64::MAX - 3, 8, READ)]);
        guest.driver.offer(&[(0x1_0000, u32::MAX, READ)]);
        guest.driver.offer(&[(0x1_0000, 8, WRITE)]);
        server.transmit = Some(guest.ring);
        transmit(&mut server, &events);
        assert_eq!(guest.driver.all_used(), [(0, 0), (1, 0), (2, 0)]);
        assert!(server.output.lock().kept.is_empty());
    }
}
