//! Runs jobs in the lab host for the machine that builds.
//!
//! Started from the second disk with the port as descriptor 3. First it copies
//! what lies in `root/` of the disk over the lab host's root: the product is
//! installed as it is anywhere. Then it takes one job after another until the
//! machine is switched off.
//!
//! `labd around PROGRAM ARGUMENT…` runs a program and looks for what it left behind.
//!
//! Never stops because of a job: whatever fails is the job's standard error.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{FromRawFd, OwnedFd};
use std::path::Path;
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;
use std::{env, os::unix::process::ExitStatusExt};

use anyhow::{Context, Result, bail};
use bulkhead_tests::inside::leaks;
use bulkhead_tests::lab::protocol::{Frame, Request, Size};
use nix::pty::openpty;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use rustix::termios::{Winsize, tcsetwinsize};

/// Where the second disk is mounted.
const DISK: &str = "/lab";

/// The third disk, and where it is mounted: the product's own place.
const STORE_DEVICE: &str = "/dev/vdc";
const STORE: &str = "/var/lib/bulkhead";

/// Pieces of standard input that wait for a job to read them, 64 KiB each.
const STDIN_PIECES: usize = 64;

/// How long output may come after the end of the job's first process: whatever
/// stays in the background and keeps the pipe is not waited for.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

type Port = Arc<Mutex<File>>;

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    if let [word, argv @ ..] = arguments.as_slice()
        && word == "around"
    {
        return Ok(ExitCode::from(leaks::around(argv)));
    }
    // SAFETY: whoever starts us leaves the port open as descriptor 3, and
    // nothing in this process has touched it.
    let port = File::from(unsafe { OwnedFd::from_raw_fd(3) });
    rustix::io::fcntl_setfd(&port, rustix::io::FdFlags::CLOEXEC)?;
    install()?;
    serve(port)?;
    Ok(ExitCode::SUCCESS)
}

/// Mounts the third disk, and copies what the second one has for the root.
fn install() -> Result<()> {
    fs::create_dir_all(STORE)?;
    // What was read of it before the machine was saved is of another disk.
    for line in [
        &["blockdev", "--flushbufs", STORE_DEVICE][..],
        &["mount", STORE_DEVICE, STORE],
    ] {
        let status = Command::new(line[0]).args(&line[1..]).status();
        let status = status.with_context(|| format!("Cannot run {}", line[0]))?;
        if !status.success() {
            bail!("{} failed: {status}", line.join(" "));
        }
    }
    let from = Path::new(DISK).join("root");
    if from.exists() {
        let status = Command::new("cp")
            .arg("-rT")
            .arg(&from)
            .arg("/")
            .status()
            .context("Cannot run cp")?;
        if !status.success() {
            bail!("Cannot install the files of {}", from.display());
        }
    }
    Ok(())
}

/// Takes frames until the port ends. One thread reads them; each job has
/// threads of its own.
fn serve(mut port: File) -> Result<()> {
    let out: Port = Arc::new(Mutex::new(port.try_clone()?));
    let mut job: Option<Job> = None;
    loop {
        match Frame::read(&mut port)? {
            None => return Ok(()),
            Some(Frame::Run(request)) => {
                job = match Job::start(&request, &out) {
                    Ok(job) => Some(job),
                    Err(error) => {
                        send(&out, &Frame::Stderr(format!("{error:#}\n").into_bytes()));
                        send(&out, &Frame::Exit(127));
                        None
                    }
                }
            }
            Some(frame) => {
                if let Some(job) = &job {
                    job.take(frame);
                }
            }
        }
    }
}

/// A running job.
struct Job {
    group: Pid,
    stdin: SyncSender<Vec<u8>>,
    /// The job's terminal, from our side.
    terminal: Option<File>,
}

impl Job {
    fn start(request: &Request, out: &Port) -> Result<Job> {
        // setsid(1) starts it in a session of its own, which can be killed as a
        // whole and can own the terminal. It executes the program in the same
        // process, so the process group is known.
        let mut command = Command::new("setsid");
        if request.terminal.is_some() {
            command.arg("--ctty");
        }
        command
            .args(&request.argv)
            .current_dir("/root")
            .env_clear()
            .env(
                "PATH",
                "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            )
            .env("HOME", "/root")
            .env("LANG", "C.UTF-8")
            .envs(env::var_os("INVOCATION_ID").map(|id| ("INVOCATION_ID", id)))
            .envs(request.env.iter().map(|(name, value)| (name, value)));

        let (sender, receiver) = mpsc::sync_channel(STDIN_PIECES);
        let (done, drained) = mpsc::channel();
        let (child, terminal) = match request.terminal {
            Some(size) => {
                let (child, terminal) = on_terminal(&mut command, size)?;
                feed(receiver, terminal.try_clone()?);
                copy(terminal.try_clone()?, out, Frame::Stdout, &done);
                (child, Some(terminal))
            }
            None => {
                let mut child = command
                    .stdin(Stdio::piped())
                    .stdout(Stdio::piped())
                    .stderr(Stdio::piped())
                    .spawn()
                    .context("Cannot run setsid")?;
                feed(receiver, child.stdin.take().context("No pipe for stdin")?);
                let stdout = child.stdout.take().context("No pipe for stdout")?;
                let stderr = child.stderr.take().context("No pipe for stderr")?;
                copy(stdout, out, Frame::Stdout, &done);
                copy(stderr, out, Frame::Stderr, &done);
                (child, None)
            }
        };
        drop(done);
        let group = Pid::from_raw(child.id().cast_signed());
        report(child, drained, Arc::clone(out));
        Ok(Job {
            group,
            stdin: sender,
            terminal,
        })
    }

    fn take(&self, frame: Frame) {
        match frame {
            // A job that has ended or closed its input does not want it.
            Frame::Stdin(bytes) => drop(self.stdin.send(bytes)),
            Frame::Resize(size) => {
                if let Some(terminal) = &self.terminal {
                    let _ = tcsetwinsize(terminal, winsize(size));
                }
            }
            Frame::Kill => drop(killpg(self.group, Signal::SIGKILL)),
            Frame::Tick | Frame::Run(_) | Frame::Stdout(_) | Frame::Stderr(_) | Frame::Exit(_) => {}
        }
    }
}

/// Starts the command on a new terminal: the process and our side of it.
fn on_terminal(command: &mut Command, size: Size) -> Result<(Child, File)> {
    let pty = openpty(None, None).context("Cannot make a terminal")?;
    tcsetwinsize(&pty.slave, winsize(size))?;
    let child = command
        .stdin(pty.slave.try_clone()?)
        .stdout(pty.slave.try_clone()?)
        .stderr(pty.slave)
        .spawn()
        .context("Cannot run setsid")?;
    // The command still holds the other side, which must close with the job.
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    Ok((child, File::from(pty.master)))
}

fn winsize(size: Size) -> Winsize {
    Winsize {
        ws_row: size.rows,
        ws_col: size.cols,
        ws_xpixel: 0,
        ws_ypixel: 0,
    }
}

/// Writes what arrives to the job's input; an empty piece closes it.
fn feed(pieces: Receiver<Vec<u8>>, mut to: impl Write + Send + 'static) {
    thread::spawn(move || {
        for piece in pieces {
            if piece.is_empty() || to.write_all(&piece).is_err() {
                break;
            }
        }
    });
}

/// Sends what the job writes, until it closes; then says so on `done`.
fn copy(
    mut from: impl Read + Send + 'static,
    out: &Port,
    frame: fn(Vec<u8>) -> Frame,
    done: &Sender<()>,
) -> JoinHandle<()> {
    let (out, done) = (Arc::clone(out), done.clone());
    thread::spawn(move || {
        let mut buffer = vec![0; 64 << 10];
        loop {
            // A terminal whose last user is gone gives EIO: the end as well.
            let n = match from.read(&mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) | Ok(0) => break,
                Ok(n) => n,
            };
            send(&out, &frame(buffer[..n].to_vec()));
        }
        // The receiver stops waiting after a while.
        let _ = done.send(());
    })
}

/// Waits for the job's process and its output, and reports the end.
fn report(mut child: Child, drained: Receiver<()>, out: Port) {
    thread::spawn(move || {
        let code = child.wait().map_or(255, code);
        // Ends when all senders are gone, or with the first that takes too long.
        while drained.recv_timeout(DRAIN_TIMEOUT).is_ok() {}
        send(&out, &Frame::Exit(code));
    });
}

/// The exit code as shells say it.
fn code(status: ExitStatus) -> u8 {
    let code = status
        .code()
        .or_else(|| Some(128 + status.signal()?))
        .unwrap_or(255);
    u8::try_from(code).unwrap_or(255)
}

fn send(out: &Port, frame: &Frame) {
    let mut port = out.lock().unwrap_or_else(PoisonError::into_inner);
    // Without its port the lab host is about to be switched off.
    drop(frame.write(&mut *port));
}
