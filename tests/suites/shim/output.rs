//! FIFOs as a caller makes them, and how long it waits.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::Path,
    time::{Duration, Instant},
};

use bulkhead_tests::Reader;
use rustix::{
    event::{PollFd, PollFlags, poll},
    fs::{CWD, FileType, Mode, OFlags},
};

/// By how much an emulated host is slower than hardware, at the least.
const SLOWER: u32 = 10;

/// When a limit that hardware has to keep is over here.
pub(crate) fn within(hardware: Duration) -> Instant {
    Instant::now() + hardware * SLOWER
}

/// The same in milliseconds.
pub(crate) fn within_ms(hardware: u64) -> Instant {
    within(Duration::from_millis(hardware))
}

/// Makes a FIFO that only its owner may use.
pub(crate) fn fifo(path: &Path) {
    let mode = Mode::RUSR | Mode::WUSR;
    rustix::fs::mknodat(CWD, path, FileType::Fifo, mode, 0).expect("a FIFO");
}

/// Makes one and reads from it, from before there is somebody who writes.
pub(crate) fn read_fifo(path: &Path) -> Reader {
    fifo(path);
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fifo = rustix::fs::open(path, flags, Mode::empty()).expect("the FIFO is there");
    Reader::start(ReadEnd(fifo.into()))
}

/// The end of a FIFO at which one reads. It is at its end when a writer has come and the
/// last one has gone: a plain read would take it for that before the first comes.
struct ReadEnd(File);

impl Read for ReadEnd {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        poll(&mut [PollFd::new(&self.0, PollFlags::IN)], None)?;
        self.0.read(buffer)
    }
}

/// Opens the end of a FIFO at which one writes; somebody reads from it already.
pub(crate) fn write_fifo(path: &Path) -> File {
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let fifo: OwnedFd = rustix::fs::open(path, flags, Mode::empty()).expect("somebody reads");
    // From now on it waits for who reads.
    rustix::io::ioctl_fionbio(&fifo, false).expect("it is ours");
    fifo.into()
}

/// The bytes 00 to ff, again and again.
pub(crate) fn pattern(length: usize) -> Vec<u8> {
    let all: Vec<u8> = (0..=u8::MAX).collect();
    let mut bytes = all.repeat(length.div_ceil(all.len()));
    bytes.truncate(length);
    bytes
}

/// Fails without printing millions of bytes.
#[track_caller]
pub(crate) fn same(got: &[u8], expected: &[u8]) {
    let place = got.iter().zip(expected).position(|(a, b)| a != b);
    assert!(
        got == expected,
        "{} bytes instead of {}; they differ at {place:?}",
        got.len(),
        expected.len()
    );
}
