//! Standard streams of a process: FIFOs that the shim opens by name, and the threads
//! that copy between them and our own streams.
//!
//! A FIFO is opened before the shim knows of it, with an end of our own that keeps
//! opens from blocking and reads from ending; [`Streams::attached`] drops these ends
//! when the shim holds its own. From then on every read ends when the shim closes
//! its end or dies; or, once the process has ended, when nothing more comes: what it
//! left in the background may hold its output open for ever.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rustix::{
    event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll},
    fs::{Mode, OFlags},
    io::Errno,
};
use tokio::sync::oneshot;

use crate::error::{Result, at, host};

/// Bytes copied at once.
const BUFFER: usize = 64 << 10;

/// How long output is waited for, in all, after its process has ended. The shim has it
/// by then: this is the time from there to here.
const LAST_WAIT: Duration = Duration::from_secs(2);

/// Most bytes taken after the end: more than all buffers on the way hold.
const LAST_BYTES: u64 = 8 << 20;

/// Which streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Pass our standard input on.
    pub stdin: bool,
    /// One stream for output and messages.
    pub terminal: bool,
}

/// A FIFO, removed when this is dropped.
#[derive(Debug)]
struct Fifo {
    path: PathBuf,
}

impl Fifo {
    fn make(dir: &Path, name: &str) -> Result<Self> {
        let path = dir.join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR)
            .map_err(at("make the FIFO", &path))?;
        Ok(Fifo { path })
    }

    fn open(&self, direction: OFlags) -> Result<OwnedFd> {
        let flags = direction | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::open(&self.path, flags, Mode::empty()).map_err(at("open the FIFO", &self.path))
    }
}

impl Drop for Fifo {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// Our end of one FIFO.
#[derive(Debug)]
struct End {
    fifo: Fifo,
    /// The end that we copy from or to.
    ours: Option<File>,
    /// Keeps the FIFO open in both directions.
    keeper: Option<OwnedFd>,
}

impl End {
    fn new(dir: &Path, name: &str, direction: OFlags) -> Result<Self> {
        let fifo = Fifo::make(dir, name)?;
        let keeper = fifo.open(OFlags::RDWR)?;
        let ours = fifo.open(direction)?;
        // Only the open must not block; the thread that copies shall.
        let flags = rustix::fs::fcntl_getfl(&ours).map_err(host("read the flags of a FIFO"))?;
        rustix::fs::fcntl_setfl(&ours, flags - OFlags::NONBLOCK)
            .map_err(host("set the flags of a FIFO"))?;
        Ok(End {
            fifo,
            ours: Some(ours.into()),
            keeper: Some(keeper),
        })
    }
}

/// How a copy of output ended.
#[derive(Debug)]
pub enum Copied {
    /// All of it.
    All,
    /// Nobody reads our own output any more.
    NoReader,
    /// Our own output cannot be written.
    Failed(io::Error),
}

/// Tells copies of output that their process has ended.
#[derive(Debug)]
struct Ending {
    ended: AtomicBool,
    /// Readable from the end on.
    event: OwnedFd,
}

impl Ending {
    fn new() -> Result<Self> {
        let event = eventfd(0, EventfdFlags::CLOEXEC).map_err(host("make an event"))?;
        Ok(Ending {
            ended: AtomicBool::new(false),
            event,
        })
    }

    fn set(&self) {
        self.ended.store(true, Ordering::Release);
        // Fails only if the counter is full.
        let _ = rustix::io::write(&self.event, &1_u64.to_ne_bytes());
    }

    fn is_set(&self) -> bool {
        self.ended.load(Ordering::Acquire)
    }
}

/// The streams of one process.
#[derive(Debug)]
pub struct Streams {
    stdin: Option<End>,
    stdout: End,
    stderr: Option<End>,
    ending: Arc<Ending>,
}

impl Streams {
    /// Makes the FIFOs below `dir`; `prefix` tells processes apart.
    pub fn new(dir: &Path, prefix: &str, wanted: Wanted) -> Result<Self> {
        let stdin = if wanted.stdin {
            Some(End::new(dir, &format!("{prefix}stdin"), OFlags::WRONLY)?)
        } else {
            None
        };
        let stdout = End::new(dir, &format!("{prefix}stdout"), OFlags::RDONLY)?;
        let stderr = if wanted.terminal {
            None
        } else {
            Some(End::new(dir, &format!("{prefix}stderr"), OFlags::RDONLY)?)
        };
        Ok(Streams {
            stdin,
            stdout,
            stderr,
            ending: Arc::new(Ending::new()?),
        })
    }

    /// The process has ended: output that is on its way is still copied, however long
    /// writing it takes, but no longer waited for than a moment.
    pub fn process_ended(&self) {
        self.ending.set();
    }

    /// Paths of stdin, stdout and stderr; empty for none.
    pub fn names(&self) -> [String; 3] {
        let name = |end: Option<&End>| {
            end.map_or_else(String::new, |end| {
                end.fifo.path.to_string_lossy().into_owned()
            })
        };
        [
            name(self.stdin.as_ref()),
            name(Some(&self.stdout)),
            name(self.stderr.as_ref()),
        ]
    }

    /// Is our standard input passed on?
    pub fn has_stdin(&self) -> bool {
        self.stdin.is_some()
    }

    /// The shim holds its ends: ours that kept them open go.
    pub fn attached(&mut self) {
        self.stdout.keeper = None;
        for end in [&mut self.stdin, &mut self.stderr].into_iter().flatten() {
            end.keeper = None;
        }
    }

    /// Starts to pass standard input on. The answer comes when there is no more of
    /// it; the FIFO is closed by then.
    pub fn copy_stdin(&mut self) -> Option<oneshot::Receiver<()>> {
        let fifo = self.stdin.as_mut()?.ours.take()?;
        let (done, ended) = oneshot::channel();
        // Blocks in a read of our standard input until the process ends: nothing
        // waits for this thread.
        thread::spawn(move || {
            let source = unbuffered(io::stdin().as_fd());
            if let Ok(source) = source {
                copy(&source, &fifo, None);
            }
            drop(fifo);
            let _ = done.send(());
        });
        Some(ended)
    }

    /// Starts to pass output on; the answers come when all of it was.
    pub fn copy_output(&mut self) -> Vec<oneshot::Receiver<Copied>> {
        let stderr = self
            .stderr
            .as_mut()
            .and_then(|end| Some((end.ours.take()?, unbuffered(io::stderr().as_fd()))));
        let stdout = self
            .stdout
            .ours
            .take()
            .map(|fifo| (fifo, unbuffered(io::stdout().as_fd())));
        let mut answers = Vec::new();
        for (fifo, sink) in stdout.into_iter().chain(stderr) {
            let (done, ended) = oneshot::channel();
            let ending = Arc::clone(&self.ending);
            thread::spawn(move || {
                let copied = match sink {
                    Ok(sink) => copy(&fifo, &sink, Some(&ending)),
                    Err(error) => Copied::Failed(error),
                };
                let _ = done.send(copied);
            });
            answers.push(ended);
        }
        answers
    }
}

/// Our own stream without the buffer of the standard library.
fn unbuffered(fd: std::os::fd::BorrowedFd<'_>) -> io::Result<File> {
    Ok(fd.try_clone_to_owned()?.into())
}

/// Copies all there is; if it is the output of a process that has ended, not for ever.
fn copy(mut from: &File, mut to: &File, ending: Option<&Ending>) -> Copied {
    let mut buffer = vec![0; BUFFER];
    let (mut wait, mut bytes) = (LAST_WAIT, LAST_BYTES);
    loop {
        if let Some(ending) = ending {
            match readable(from, ending, &mut wait) {
                Ok(true) => {}
                Ok(false) | Err(_) => return Copied::All,
            }
        }
        let count = match from.read(&mut buffer) {
            Ok(0) => return Copied::All,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Our own streams may not block if whoever started us made them so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if wait_for(from, PollFlags::IN).is_err() {
                    return Copied::All;
                }
                continue;
            }
            Err(_) => return Copied::All,
        };
        let mut rest = buffer.get(..count).unwrap_or_default();
        while !rest.is_empty() {
            match to.write(rest) {
                Ok(written) => rest = rest.get(written..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if let Err(error) = wait_for(to, PollFlags::OUT) {
                        return Copied::Failed(error);
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                    return Copied::NoReader;
                }
                Err(error) => return Copied::Failed(error),
            }
        }
        if ending.is_some_and(Ending::is_set) {
            bytes = bytes.saturating_sub(count as u64);
            if bytes == 0 {
                return Copied::All;
            }
        }
    }
}

/// Waits until there is something to read, or its end. After the end of the process
/// only as long as `wait` has left; `false` if nothing came.
fn readable(from: &File, ending: &Ending, wait: &mut Duration) -> io::Result<bool> {
    loop {
        let has_ended = ending.is_set();
        let limit = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let start = Instant::now();
        let ready = if has_ended {
            let mut fds = [PollFd::new(from, PollFlags::IN)];
            poll(&mut fds, Some(&limit)).map(|count| count > 0)
        } else {
            let mut fds = [
                PollFd::new(from, PollFlags::IN),
                PollFd::new(&ending.event, PollFlags::IN),
            ];
            let polled = poll(&mut fds, None);
            polled.map(|_| !fds[0].revents().is_empty())
        };
        if has_ended {
            *wait = wait.saturating_sub(start.elapsed());
        }
        match ready {
            Ok(true) => return Ok(true),
            Ok(false) if has_ended => return Ok(false),
            Ok(false) | Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn wait_for(file: &File, flags: PollFlags) -> io::Result<()> {
    let mut fds = [PollFd::new(file, flags)];
    match poll(&mut fds, None) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_read_ends_when_the_shims_end_is_closed_and_not_before() {
        let dir = tempfile::tempdir().unwrap();
        let wanted = Wanted {
            stdin: true,
            terminal: false,
        };
        let mut streams = Streams::new(dir.path(), "", wanted).unwrap();
        let [_, stdout, stderr] = streams.names();
        assert!(!stderr.is_empty());
        let mut shim = File::options().write(true).open(&stdout).unwrap();
        streams.attached();
        shim.write_all(b"all of it").unwrap();
        drop(shim);
        let mut text = String::new();
        streams
            .stdout
            .ours
            .take()
            .unwrap()
            .read_to_string(&mut text)
            .unwrap();
        assert_eq!(text, "all of it");
    }

    #[test]
    fn nothing_hangs_if_the_shim_never_opens_its_end() {
        let dir = tempfile::tempdir().unwrap();
        let mut streams = Streams::new(
            dir.path(),
            "x-",
            Wanted {
                stdin: false,
                terminal: true,
            },
        )
        .unwrap();
        streams.attached();
        let fifo = streams.stdout.ours.take().unwrap();
        let sink = File::create("/dev/null").unwrap();
        let copied = copy(&fifo, &sink, Some(&streams.ending));
        assert!(matches!(copied, Copied::All), "{copied:?}");
        drop(streams);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    /// Copies what a pipe holds while its writer stays.
    fn copy_from_a_living_writer(text: &[u8], to: &File) -> Copied {
        let (from, mut writer) = io::pipe().unwrap();
        writer.write_all(text).unwrap();
        let ending = Ending::new().unwrap();
        ending.set();
        let copied = copy(&OwnedFd::from(from).into(), to, Some(&ending));
        drop(writer);
        copied
    }

    #[test]
    fn output_that_cannot_be_written_is_told_from_output_that_nobody_reads() {
        let full = File::options().write(true).open("/dev/full").unwrap();
        let Copied::Failed(error) = copy_from_a_living_writer(b"x", &full) else {
            panic!("a full disk takes it");
        };
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let copied = copy_from_a_living_writer(b"x", &OwnedFd::from(writer).into());
        assert!(matches!(copied, Copied::NoReader), "{copied:?}");
    }

    #[test]
    fn after_the_end_of_a_process_its_output_is_copied_but_not_waited_for_long() {
        let mut sink = tempfile::tempfile().unwrap();
        let start = Instant::now();
        let copied = copy_from_a_living_writer(b"all of it", &sink);
        assert!(matches!(copied, Copied::All), "{copied:?}");
        assert!(start.elapsed() >= LAST_WAIT && start.elapsed() < 10 * LAST_WAIT);
        let mut text = String::new();
        io::Seek::rewind(&mut sink).unwrap();
        sink.read_to_string(&mut text).unwrap();
        assert_eq!(text, "all of it");
    }

    #[test]
    fn a_background_process_that_never_stops_writing_keeps_nobody_waiting() {
        let (from, mut writer) = io::pipe().unwrap();
        let endless = thread::spawn(move || while writer.write_all(&[b'y'; 4096]).is_ok() {});
        let ending = Ending::new().unwrap();
        ending.set();
        let sink = File::create("/dev/null").unwrap();
        let from = File::from(OwnedFd::from(from));
        let copied = copy(&from, &sink, Some(&ending));
        assert!(matches!(copied, Copied::All), "{copied:?}");
        drop(from);
        endless.join().unwrap();
    }

    #[test]
    fn a_copy_that_waits_hears_of_the_end() {
        let (from, writer) = io::pipe().unwrap();
        let ending = Arc::new(Ending::new().unwrap());
        let copying = thread::spawn({
            let ending = Arc::clone(&ending);
            move || {
                let sink = File::create("/dev/null").unwrap();
                copy(&OwnedFd::from(from).into(), &sink, Some(&ending))
            }
        });
        ending.set();
        assert!(matches!(copying.join().unwrap(), Copied::All));
        drop(writer);
    }
}
