//! A raw disk (virtio 1.2, 5.2): read, write, flush and get-id.
//!
//! Each disk has a thread of its own, since its file may block. The size is taken
//! once, at the start; what lies beyond is refused, whatever the sector number. Requests
//! that its limit does not allow yet wait in the queue, all others behind them.
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
    fs::File,
    io::{self, Seek, SeekFrom},
    sync::Arc,
};

use serde::{Deserialize, Serialize};

use super::{
    Device, Io, Worker,
    limit::Limiter,
    queue::{Chain, Reader, Ring, Served, State, Writer},
};
use crate::event_loop::{EventFlags, EventLoop, Handler, Registration, Watch, Watched};

const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 256;
/// The queues of a disk.
pub const QUEUES: &[u16] = &[QUEUE_SIZE];

/// Bytes of a request that are no data: its header and its answer (5.2.6).
const FRAME: usize = 17;

const REQUESTS: u32 = 0;
const TIMER: u32 = 1;

/// Feature bits (5.2.3).
const SEG_MAX: u64 = 1 << 2;
const READ_ONLY: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;

/// Request types and answers (5.2.6).
mod request {
    pub(super) const IN: u32 = 0;
    pub(super) const OUT: u32 = 1;
    pub(super) const FLUSH: u32 = 4;
    pub(super) const GET_ID: u32 = 8;
}
mod answer {
    pub(super) const OK: u8 = 0;
    pub(super) const IO_ERROR: u8 = 1;
    pub(super) const UNSUPPORTED: u8 = 2;
}

/// The device.
#[derive(Debug)]
pub struct Block {
    events: Arc<EventLoop>,
    disk: Arc<Disk>,
    limiter: Arc<Limiter>,
    config: [u8; 16],
}

#[derive(Debug)]
struct Disk {
    file: File,
    /// Bytes, whole sectors only.
    size: u64,
    read_only: bool,
    /// What get-id answers.
    name: String,
}

/// Whether the guest may write.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Writes are refused.
    ReadOnly,
    /// Writes reach the file.
    ReadWrite,
}

/// What became of a disk's requests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Totals {
    /// Microseconds for which a request waited for the limit.
    pub held_us: u64,
}

impl Block {
    /// A disk with the content of `file`, served by `events`, which nothing else
    /// should share. `name` is cut to 20 bytes.
    pub fn new(
        events: Arc<EventLoop>,
        mut file: File,
        access: Access,
        name: String,
    ) -> io::Result<Block> {
        let sectors = file.seek(SeekFrom::End(0))? / SECTOR;
        let mut config = [0; 16];
        let (capacity, rest) = config.split_at_mut(8);
        capacity.copy_from_slice(&sectors.to_le_bytes());
        // seg_max follows size_max: the queue without header and status.
        let segments = u32::from(QUEUE_SIZE).saturating_sub(2);
        rest.split_at_mut(4)
            .1
            .copy_from_slice(&segments.to_le_bytes());
        let disk = Arc::new(Disk {
            file,
            size: sectors.saturating_mul(SECTOR),
            read_only: access == Access::ReadOnly,
            name,
        });
        Ok(Block {
            events,
            disk,
            limiter: Arc::new(Limiter::new()?),
            config,
        })
    }

    /// What bounds its requests: nothing as yet.
    #[must_use]
    pub fn limiter(&self) -> Arc<Limiter> {
        Arc::clone(&self.limiter)
    }
}

impl Device for Block {
    fn id(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        let access = if self.disk.read_only { READ_ONLY } else { 0 };
        SEG_MAX | FLUSH | access
    }

    fn queue_sizes(&self) -> &[u16] {
        QUEUES
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn activate(&mut self, mut io: Io) -> io::Result<Box<dyn Worker>> {
        let mut ring = io.take(0);
        let (disk, limiter) = (Arc::clone(&self.disk), self.limiter());
        let registration = self.events.add(|watch| {
            if let Some(ring) = &mut ring {
                ring.watch(watch, REQUESTS)?;
            }
            Ok(Server {
                ring,
                disk,
                limiter: watch.add(limiter, TIMER, EventFlags::IN)?,
            })
        })?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<Server> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        let server = Registration::stop(*self);
        vec![server.and_then(|server| {
            server.limiter.leave();
            server.ring.map(Ring::into_state)
        })]
    }
}

struct Server {
    ring: Option<Ring>,
    disk: Arc<Disk>,
    limiter: Watched<Arc<Limiter>>,
}

impl Handler for Server {
    fn ready(&mut self, token: u32, _: EventFlags, _: &Watch<'_>) -> io::Result<()> {
        if token == TIMER {
            self.limiter.acknowledge();
        }
        if let Some(ring) = &mut self.ring {
            ring.acknowledge();
            ring.turn(|chain| {
                // All that it may move, whatever its header says when it is read.
                let len = chain.readable_len().saturating_add(chain.writable_len());
                let data = len.saturating_sub(FRAME);
                if !self.limiter.allows(data) {
                    return Served::Kept;
                }
                self.limiter.spend(data);
                Served::Used(self.disk.serve(chain))
            });
        }
        Ok(())
    }
}

impl Disk {
    /// Serves one request; returns the number of bytes written to the chain.
    fn serve(&self, chain: &Chain) -> usize {
        // The last writable byte takes the answer.
        let Some(room) = chain.writable_len().checked_sub(1) else {
            return 0;
        };
        let mut status = chain.writer();
        let mut data = status.split(room);
        let answer = match self.answer(&mut chain.reader(), &mut data) {
            Ok(answer) => answer,
            Err(_) => answer::IO_ERROR,
        };
        data.written().saturating_add(status.write(&[answer]))
    }

    fn answer(&self, reader: &mut Reader<'_>, writer: &mut Writer<'_>) -> io::Result<u8> {
        let kind = u32::from_le_bytes(reader.read_array()?);
        let _reserved: [u8; 4] = reader.read_array()?;
        let sector = u64::from_le_bytes(reader.read_array()?);
        match kind {
            request::IN => {
                let mut offset = self.offset(sector, writer.len())?;
                while !writer.is_empty() {
                    let count = whole(writer.read_at(&self.file, offset))?;
                    offset = offset.saturating_add(count);
                }
            }
            request::OUT if self.read_only => return Ok(answer::IO_ERROR),
            request::OUT => {
                let mut offset = self.offset(sector, reader.len())?;
                while !reader.is_empty() {
                    let count = whole(reader.write_at(&self.file, offset))?;
                    offset = offset.saturating_add(count);
                }
            }
            request::FLUSH => self.file.sync_data()?,
            request::GET_ID => {
                let mut id = [0; 20];
                for (to, from) in id.iter_mut().zip(self.name.bytes()) {
                    *to = from;
                }
                writer.write(&id);
            }
            _ => return Ok(answer::UNSUPPORTED),
        }
        Ok(answer::OK)
    }

    /// Where `sector` begins in the file, if `length` bytes from there lie in it
    /// and are whole sectors.
    fn offset(&self, sector: u64, length: usize) -> io::Result<u64> {
        let length = u64::try_from(length).map_err(io::Error::other)?;
        sector
            .checked_mul(SECTOR)
            .filter(|offset| {
                length.is_multiple_of(SECTOR)
                    && offset
                        .checked_add(length)
                        .is_some_and(|end| end <= self.size)
            })
            .ok_or_else(|| io::ErrorKind::InvalidInput.into())
    }
}

/// How far one call came. The file may have been cut: then nothing comes.
fn whole(moved: io::Result<usize>) -> io::Result<u64> {
    match moved {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => u64::try_from(count).map_err(io::Error::other),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(0),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    mod limits;

    use std::io::Write;

    use super::super::testing::{Guest, READ, WRITE};
    use super::*;

    const HEADER: u64 = 0x1_0000;
    const DATA: u64 = 0x2_0000;
    const STATUS: u64 = 0x1_0100;

    fn disk(sectors: u8, read_only: bool) -> Disk {
        let mut file = tempfile::tempfile().unwrap();
        for sector in 0..sectors {
            file.write_all(&[sector; 512]).unwrap();
        }
        Disk {
            file,
            size: u64::from(sectors) * SECTOR,
            read_only,
            name: "bulkhead-0".into(),
        }
    }

    fn serve(disk: &Disk, guest: &mut Guest) -> u32 {
        guest.ring.turn(|chain| Served::Used(disk.serve(chain)));
        guest.driver.used().unwrap().1
    }

    /// One request; returns the answer, the used length and the data afterwards.
    fn request(disk: &Disk, kind: u32, sector: u64, data: (u32, u16)) -> (u8, u32, Vec<u8>) {
        let mut guest = Guest::new();
        let header = [
            kind.to_le_bytes().as_slice(),
            &[0; 4],
            &sector.to_le_bytes(),
        ]
        .concat();
        guest.driver.write(HEADER, &header);
        guest.driver.write(DATA, &[0xee; 4096]);
        guest.driver.write(STATUS, &[0xaa]);
        let (length, flags) = data;
        let mut chain = vec![(HEADER, 16, READ)];
        chain.extend((length > 0).then_some((DATA, length, flags)));
        chain.push((STATUS, 1, WRITE));
        guest.driver.offer(&chain);
        let used = serve(disk, &mut guest);
        (
            guest.driver.read(STATUS, 1)[0],
            used,
            guest.driver.read(DATA, 4096),
        )
    }

    #[test]
    fn sectors_are_read_and_written() {
        let disk = disk(8, false);
        let (answer, used, data) = request(&disk, request::IN, 3, (1024, WRITE));
        assert_eq!((answer, used), (answer::OK, 1025));
        assert_eq!(data[..1024], [[3; 512], [4; 512]].concat());
        assert_eq!(request(&disk, request::OUT, 7, (512, READ)).0, answer::OK);
        assert_eq!(
            request(&disk, request::IN, 7, (512, WRITE)).2[..512],
            [0xee; 512]
        );
        assert_eq!(request(&disk, request::FLUSH, 0, (0, READ)).0, answer::OK);
        let (answer, used, data) = request(&disk, request::GET_ID, 0, (20, WRITE));
        assert_eq!((answer, used), (answer::OK, 21));
        assert_eq!(&data[..20], b"bulkhead-0\0\0\0\0\0\0\0\0\0\0");
    }

    #[test]
    fn a_read_only_disk_refuses_writes() {
        let disk = disk(8, true);
        let (answer, used, _) = request(&disk, request::OUT, 0, (512, READ));
        assert_eq!((answer, used), (answer::IO_ERROR, 1));
        assert_eq!(
            request(&disk, request::IN, 0, (512, WRITE)).2[..512],
            [0; 512]
        );
    }

    #[test]
    fn what_lies_beyond_the_end_is_refused_b52() {
        let disk = disk(8, false);
        for sector in [8, 9, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1, 1 << 55] {
            for (kind, flags) in [(request::IN, WRITE), (request::OUT, READ)] {
                let (answer, used, data) = request(&disk, kind, sector, (512, flags));
                assert_eq!((answer, used), (answer::IO_ERROR, 1), "{sector:#x}");
                assert_eq!(data, [0xee; 4096]);
            }
        }
        assert_eq!(
            request(&disk, request::IN, 7, (1024, WRITE)).0,
            answer::IO_ERROR
        );
        assert_eq!(
            request(&disk, request::IN, 0, (100, WRITE)).0,
            answer::IO_ERROR
        );
        assert_eq!(disk.file.metadata().unwrap().len(), 8 * 512);
    }

    #[test]
    fn unknown_requests_are_unsupported() {
        let disk = disk(1, false);
        for kind in [2, 3, 11, 13, u32::MAX] {
            assert_eq!(request(&disk, kind, 0, (512, WRITE)).0, answer::UNSUPPORTED);
        }
    }

    #[test]
    fn a_chain_without_header_or_answer_is_returned_b45() {
        let disk = disk(8, false);
        for chain in [
            &[(HEADER, 16, READ)][..],
            &[(STATUS, 1, WRITE)],
            &[(HEADER, 8, READ), (STATUS, 1, WRITE)],
            &[(STATUS, 1, WRITE), (HEADER, 16, READ)],
            &[
                (HEADER, 16, READ),
                (DATA, u32::MAX, WRITE),
                (STATUS, 1, WRITE),
            ],
            &[(HEADER, 16, READ), (DATA, 512, WRITE), (STATUS, 0, WRITE)],
        ] {
            let mut guest = Guest::new();
            guest.driver.offer(chain);
            let used = serve(&disk, &mut guest);
            assert!(used <= 1, "{chain:x?}");
            assert_eq!(guest.driver.used(), None, "{chain:x?}: returned once");
        }
    }

    #[test]
    fn a_processor_that_rewrites_a_request_meanwhile_reaches_nothing_beyond_the_end_b46() {
        let disk = disk(8, false);
        let guest = Guest::new();
        let (mut driver, mut ring) = (guest.driver, guest.ring);
        let mem = Arc::clone(&driver.mem);
        let stop = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                    for (kind, sector) in [(1_u32, 7_u64), (1, 8), (0, u64::MAX), (1, 1 << 55)] {
                        let header = [kind.to_le_bytes(), [0; 4]].concat();
                        for (at, bytes) in
                            [(HEADER, header), (HEADER + 8, sector.to_le_bytes().into())]
                        {
                            vm_memory::Bytes::write_slice(
                                &*mem,
                                &bytes,
                                vm_memory::GuestAddress(at),
                            )
                            .unwrap();
                        }
                    }
                }
            });
            let chain = [(HEADER, 16, READ), (DATA, 512, READ), (STATUS, 1, WRITE)];
            let head = driver.offer(&chain);
            let mut answers = [0; 3];
            while answers[0] < 100 || answers[1] < 100 {
                driver.write(STATUS, &[0xaa]);
                ring.turn(|chain| Served::Used(disk.serve(chain)));
                assert_eq!(driver.used(), Some((head, 1)));
                answers[usize::from(driver.read(STATUS, 1)[0])] += 1;
                driver.make_available(head);
            }
            stop.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        assert_eq!(disk.file.metadata().unwrap().len(), 8 * 512);
    }
}
