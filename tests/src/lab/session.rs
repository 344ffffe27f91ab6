//! One run of the lab host, and the jobs in it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use bulkhead_guest::Progress;
use nix::sys::signal::{SigSet, Signal};

use super::accelerator::Accelerator;
use super::disk::Contents;
use super::image::Image;
use super::machine::{self, Clock, Machine, Parts};
use super::programs::Programs;
use super::protocol::{Frame, Request};
use super::store::{self, Store};
use super::{emulator, root, saved, terminal};
use bulkhead_guest::cache::Cache;

/// Longest time for a restored lab host to answer; a busy machine is slow.
const RESTORE_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest time for a boot.
const BOOT_TIMEOUT: Duration = Duration::from_secs(1800);
/// How often a lab host that says nothing gets an interrupt. Its emulator loses one of
/// the timer's once in a day or so, and then its kernel stands still until the next of
/// any other kind, for good if a job waits for time to pass.
const TICK: Duration = Duration::from_secs(1);
/// What a job may take beyond its deadline until the lab host is given up.
const KILL_GRACE: Duration = Duration::from_secs(20);

/// Where in the cache it is known on which processors lab hosts run.
pub(super) const CORES: &str = "lab-cores";

/// Sends a tick.
type Tick<'a> = dyn FnMut(&mut UnixStream) -> io::Result<()> + 'a;

/// Gets what a job writes.
type Take<'a> = dyn FnMut(&Frame) -> io::Result<()> + 'a;

/// What a lab host is made of.
#[derive(Debug)]
pub struct Lab {
    /// Where all of it is kept.
    pub cache: Cache,
    /// containerd and runc, if it shall have them.
    pub programs: Option<Programs>,
    /// What it finds below `/usr/share/lab/images`, and its containerd knows.
    pub images: Vec<Image>,
    /// What runs its instructions.
    pub accelerator: Accelerator,
}

/// A lab host that runs. It ends, and is forgotten, when dropped.
#[derive(Debug)]
pub struct Session {
    machine: Machine,
    directory: Directory,
    /// The third disk.
    store: PathBuf,
    /// It may be interrupted at any time: no instructions of it are counted.
    ticks: bool,
}

/// A job to run.
#[derive(Clone, Debug)]
pub struct Job {
    request: Request,
    deadline: Option<Duration>,
    silence: Option<Duration>,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// With this code; 128 and more for a signal, as shells say it.
    Code(u8),
    /// It was killed at its deadline.
    Deadline,
}

/// What a job wrote.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub exit: Exit,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
}

impl Job {
    /// A program and its arguments.
    #[must_use]
    pub fn new(argv: impl IntoIterator<Item = impl Into<String>>) -> Job {
        Job {
            request: Request {
                argv: argv.into_iter().map(Into::into).collect(),
                ..Request::default()
            },
            deadline: None,
            silence: None,
        }
    }

    /// A variable in its environment.
    #[must_use]
    pub fn env(mut self, name: &str, value: &str) -> Job {
        self.request.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// The lab host is given up when the job writes nothing for so long.
    #[must_use]
    pub fn silence(mut self, limit: Duration) -> Job {
        self.silence = Some(limit);
        self
    }

    /// It is killed when it takes longer.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Job {
        self.deadline = Some(deadline);
        self
    }
}

impl Session {
    /// Starts the lab host `lab`, with `contents` on its second disk and what `store`
    /// has on the third:
    /// restored from its saved state, or booted for [`Clock::Instructions`].
    ///
    /// # Errors
    ///
    /// The lab host cannot be made, or does not come up.
    pub fn start(
        lab: &Lab,
        contents: &Contents,
        store: Option<&Store>,
        clock: Clock,
        progress: &dyn Progress,
    ) -> Result<Session> {
        let cache = &lab.cache;
        let emulator = emulator::ensure(cache, progress)?;
        let root = root::ensure(cache, progress)?;
        let lab_host = saved::ensure(lab, &emulator, &root, progress)?;
        let directory = Directory::new(&cache.path().join("lab-sessions"))?;
        progress.step("Packing what the lab host gets");
        let second = directory.path.path().join("second.img");
        contents.write(&second)?;
        let disk = directory.path.path().join("disk.qcow2");
        machine::overlay(&lab_host.disk(), "qcow2", &disk)?;
        let store = store::disk(store, directory.path.path())?;
        let [kernel, initrd, _] = root::paths(&root);
        let saved = lab_host.state();
        let mut machine = Machine::start(
            &emulator,
            &Parts {
                kernel: &kernel,
                initrd: &initrd,
                disk: &disk,
                second: &second,
                store: &store,
                state: (clock == Clock::Wall).then_some(saved.as_path()),
                clock,
                accelerator: lab.accelerator,
                cores: &cache.path().join(CORES),
                directory: directory.path.path(),
            },
        )?;
        match clock {
            Clock::Wall => progress.step("Restoring the lab host"),
            Clock::Instructions => {
                progress.step("Booting the lab host");
                machine.ready(BOOT_TIMEOUT, progress)?;
            }
        }
        machine.go("labd")?;
        let mut session = Session {
            machine,
            directory,
            store,
            ticks: clock == Clock::Wall,
        };
        // The first job proves that the lab host answers.
        let answer = session
            .wait_without_input(&Job::new(["true"]).deadline(RESTORE_TIMEOUT), &mut |_| {
                Ok(())
            })
            .with_context(|| format!("The lab host does not answer: {}", session.machine.said()))?;
        if answer != Exit::Code(0) {
            bail!("The lab host cannot run a program: {answer:?}");
        }
        Ok(session)
    }

    /// The lab host's console, as it is now.
    #[must_use]
    pub fn console(&self) -> PathBuf {
        self.directory.path.path().join("console.log")
    }

    /// Ends the lab host and keeps its third disk in the new cache entry `to`.
    ///
    /// # Errors
    ///
    /// The disk is in use, or cannot be copied.
    pub fn keep_store(mut self, to: &Path) -> Result<()> {
        let unmounted = self.output(&Job::new(["umount", "/var/lib/bulkhead"]))?;
        if unmounted.exit != Exit::Code(0) {
            bail!("{}", String::from_utf8_lossy(&unmounted.stderr).trim());
        }
        self.machine.monitor()?.quit()?;
        self.machine.wait()?;
        store::keep(&self.store, to)
    }

    /// Runs a job with its output to ours, its input from ours: on a terminal
    /// of its own if ours is one and `interactive` says so.
    ///
    /// # Errors
    ///
    /// The lab host is lost.
    pub fn run(&mut self, mut job: Job, interactive: bool) -> Result<Exit> {
        let size = terminal::size().filter(|_| interactive);
        job.request.terminal = size;
        if let (Some(_), Ok(term)) = (size, std::env::var("TERM")) {
            job = job.env("TERM", &term);
        }
        let raw = size.map(|_| terminal::Raw::new()).transpose()?;
        Frame::Run(job.request.clone()).write(self.machine.port.get_mut())?;
        let input = Input::start(self.machine.port.get_ref(), size.is_some())?;
        let port = Arc::clone(&input.port);
        let exit = self.wait(
            &mut |_| {
                // Not between the bytes of what is typed.
                let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
                port.as_mut().map_or(Ok(()), |port| Frame::Tick.write(port))
            },
            &mut |frame| match frame {
                Frame::Stdout(bytes) => {
                    let mut stdout = io::stdout().lock();
                    stdout.write_all(bytes).and_then(|()| stdout.flush())
                }
                Frame::Stderr(bytes) => io::stderr().write_all(bytes),
                _ => Ok(()),
            },
            job.deadline,
            job.silence,
        );
        input.stop();
        drop(raw);
        exit
    }

    /// Runs a job without input, and collects what it writes.
    ///
    /// # Errors
    ///
    /// The lab host is lost.
    pub fn output(&mut self, job: &Job) -> Result<Output> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let exit = self.wait_without_input(job, &mut |frame| {
            match frame {
                Frame::Stdout(bytes) => stdout.extend(bytes),
                Frame::Stderr(bytes) => stderr.extend(bytes),
                _ => {}
            }
            Ok(())
        })?;
        Ok(Output {
            exit,
            stdout,
            stderr,
        })
    }

    /// Runs a job whose standard input is at its end.
    fn wait_without_input(&mut self, job: &Job, take: &mut Take<'_>) -> Result<Exit> {
        let port = self.machine.port.get_mut();
        Frame::Run(job.request.clone()).write(port)?;
        Frame::Stdin(Vec::new()).write(port)?;
        self.wait(
            &mut |port| Frame::Tick.write(port),
            take,
            job.deadline,
            job.silence,
        )
    }

    /// Takes the frames of the job that runs until it has ended, and ticks while there are
    /// none.
    fn wait(
        &mut self,
        tick: &mut Tick<'_>,
        take: &mut Take<'_>,
        deadline: Option<Duration>,
        silence: Option<Duration>,
    ) -> Result<Exit> {
        let mut deadline = deadline.map(|limit| Instant::now() + limit);
        let (mut killed, mut heard) = (false, Instant::now());
        loop {
            let left = deadline.map(|at| at.saturating_duration_since(Instant::now()));
            let frame = self.frame(Some(left.map_or(TICK, |left| left.min(TICK))))?;
            let quiet = match frame {
                Some(_) => Duration::ZERO,
                None => heard.elapsed(),
            };
            if frame.is_some() {
                heard = Instant::now();
            }
            match frame {
                None if silence.is_some_and(|silence| quiet >= silence) => {
                    bail!("The lab host is silent: {}", self.machine.said());
                }
                None if left.is_none_or(|left| left > TICK) => {
                    if self.ticks {
                        // One that has ended will be noticed by the next look.
                        let _ = tick(self.machine.port.get_mut());
                    }
                }
                Some(Frame::Exit(_)) if killed => return Ok(Exit::Deadline),
                Some(Frame::Exit(code)) => return Ok(Exit::Code(code)),
                // Our own output may be closed; the job goes on to its end.
                Some(frame) => drop(take(&frame)),
                None if killed => bail!("The lab host hangs: {}", self.machine.said()),
                None => {
                    Frame::Kill.write(self.machine.port.get_mut())?;
                    killed = true;
                    deadline = Some(Instant::now() + KILL_GRACE);
                }
            }
        }
    }

    /// The next frame; none if `timeout` passes first.
    fn frame(&mut self, timeout: Option<Duration>) -> Result<Option<Frame>> {
        let port = &mut self.machine.port;
        if port.buffer().is_empty() {
            // Zero would mean no limit.
            let timeout = timeout.map(|limit| limit.max(Duration::from_millis(1)));
            port.get_ref().set_read_timeout(timeout)?;
            let waited = io::BufRead::fill_buf(port).map(<[u8]>::len);
            port.get_ref().set_read_timeout(None)?;
            match waited {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    return Ok(None);
                }
                other => drop(other.context("Cannot read from the lab host")?),
            }
        }
        match Frame::read(port).context("The lab host sends no frame")? {
            Some(frame) => Ok(Some(frame)),
            None => bail!("The lab host ended: {}", self.machine.said()),
        }
    }
}

/// The directory of a session, removed with it.
#[derive(Debug)]
struct Directory {
    path: tempfile::TempDir,
    /// Locked while the session lives: a directory whose lock is free was left
    /// by a process that was killed.
    _lock: File,
}

impl Directory {
    /// Makes one in `folder`, and removes what killed processes left there.
    fn new(folder: &Path) -> Result<Directory> {
        fs::create_dir_all(folder).with_context(|| format!("Cannot make {}", folder.display()))?;
        let all = File::create(folder.join("lock"))?;
        all.lock().context("Cannot lock the sessions")?;
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let left = File::open(path.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok());
            if left {
                fs::remove_dir_all(&path)
                    .with_context(|| format!("Cannot remove {}", path.display()))?;
            }
        }
        let path = tempfile::Builder::new()
            .prefix("session-")
            .tempdir_in(folder)?;
        let lock = File::create(path.path().join("lock"))?;
        lock.lock()?;
        Ok(Directory { path, _lock: lock })
    }
}

/// Hands our input, and changes of the terminal's size, to the job.
struct Input {
    port: Arc<Mutex<Option<UnixStream>>>,
}

impl Input {
    fn start(port: &UnixStream, terminal: bool) -> Result<Input> {
        let port = Arc::new(Mutex::new(Some(port.try_clone()?)));
        let send = |port: &Mutex<Option<UnixStream>>, frame: &Frame| -> bool {
            let mut port = port.lock().unwrap_or_else(PoisonError::into_inner);
            port.as_mut().is_some_and(|port| frame.write(port).is_ok())
        };
        if terminal {
            let mut signals = SigSet::empty();
            signals.add(Signal::SIGWINCH);
            signals.thread_block()?;
            let port = Arc::clone(&port);
            thread::spawn(move || {
                while signals.wait().is_ok() {
                    if let Some(size) = terminal::size()
                        && !send(&port, &Frame::Resize(size))
                    {
                        break;
                    }
                }
            });
        }
        let to = Arc::clone(&port);
        // This thread ends with the process: a read of a terminal cannot be
        // called off.
        thread::spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut buffer = vec![0; 64 << 10];
            loop {
                let n = stdin.read(&mut buffer).unwrap_or(0);
                if !send(&to, &Frame::Stdin(buffer[..n].to_vec())) || n == 0 {
                    break;
                }
            }
        });
        Ok(Input { port })
    }

    /// Nothing is sent from here on.
    fn stop(self) {
        *self.port.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}
