//! Standard streams of a process: FIFOs that the shim opens by name, and the threads
//! that copy between them and our own streams.
//!
//! A FIFO is opened before the shim knows of it, with an end of our own that keeps
//! opens from blocking and reads from ending; [`Streams::attached`] drops these ends
//! when the shim holds its own. From then on every read ends when the shim closes
//! its end or dies.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    thread,
};

use rustix::fs::{Mode, OFlags};
use tokio::sync::oneshot;

use crate::error::{Result, at, host};

/// Bytes copied at once.
const BUFFER: usize = 64 << 10;

/// Which streams a process has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Wanted {
    /// Pass our standard input on.
    pub(crate) stdin: bool,
    /// One stream for output and messages.
    pub(crate) terminal: bool,
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
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// All of it.
    All,
    /// Nobody reads our own output any more.
    NoReader,
}

/// The streams of one process.
#[derive(Debug)]
pub(crate) struct Streams {
    stdin: Option<End>,
    stdout: End,
    stderr: Option<End>,
}

impl Streams {
    /// Makes the FIFOs below `dir`; `prefix` tells processes apart.
    pub(crate) fn new(dir: &Path, prefix: &str, wanted: Wanted) -> Result<Self> {
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
        })
    }

    /// Paths of stdin, stdout and stderr; empty for none.
    pub(crate) fn names(&self) -> [String; 3] {
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
    pub(crate) fn has_stdin(&self) -> bool {
        self.stdin.is_some()
    }

    /// The shim holds its ends: ours that kept them open go.
    pub(crate) fn attached(&mut self) {
        self.stdout.keeper = None;
        for end in [&mut self.stdin, &mut self.stderr].into_iter().flatten() {
            end.keeper = None;
        }
    }

    /// Starts to pass standard input on. The answer comes when there is no more of
    /// it; the FIFO is closed by then.
    pub(crate) fn copy_stdin(&mut self) -> Option<oneshot::Receiver<()>> {
        let fifo = self.stdin.as_mut()?.ours.take()?;
        let (done, ended) = oneshot::channel();
        // Blocks in a read of our standard input until the process ends: nothing
        // waits for this thread.
        thread::spawn(move || {
            let source = unbuffered(io::stdin().as_fd());
            if let Ok(source) = source {
                copy(source, &fifo);
            }
            drop(fifo);
            let _ = done.send(());
        });
        Some(ended)
    }

    /// Starts to pass output on; the answers come when all of it was.
    pub(crate) fn copy_output(&mut self) -> Vec<oneshot::Receiver<Copied>> {
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
            thread::spawn(move || {
                let copied = match sink {
                    Ok(sink) => copy(fifo, &sink),
                    Err(_) => Copied::NoReader,
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

fn copy(mut from: File, mut to: &File) -> Copied {
    let mut buffer = vec![0; BUFFER];
    loop {
        let count = match from.read(&mut buffer) {
            Ok(0) => return Copied::All,
            Ok(count) => count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            // Our own streams may not block if whoever started us made them so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                if wait_for(&from, rustix::event::PollFlags::IN).is_err() {
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
                    if wait_for(to, rustix::event::PollFlags::OUT).is_err() {
                        return Copied::NoReader;
                    }
                }
                Err(_) => return Copied::NoReader,
            }
        }
    }
}

fn wait_for(file: &File, flags: rustix::event::PollFlags) -> io::Result<()> {
    let mut fds = [rustix::event::PollFd::new(file, flags)];
    match rustix::event::poll(&mut fds, None) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
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
        assert_eq!(
            copy(
                streams.stdout.ours.take().unwrap(),
                &File::create("/dev/null").unwrap()
            ),
            Copied::All
        );
        drop(streams);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
