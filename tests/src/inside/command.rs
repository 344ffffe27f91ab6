//! Running programs in the lab host, each with a deadline.

use std::{
    ffi::{OsStr, OsString},
    fmt,
    fs::File,
    io::Write,
    os::unix::process::ExitStatusExt,
    path::Path,
    process::{self, Child, Stdio},
    thread,
    time::{Duration, Instant},
};

use super::reader::Reader;

/// A hang is a failure. The machine is emulated and slow.
const DEADLINE: Duration = Duration::from_secs(300);

/// A program to be run.
#[derive(Debug)]
pub struct Command {
    program: OsString,
    arguments: Vec<OsString>,
    stdin: Option<File>,
    stdout: Option<File>,
    deadline: Duration,
}

impl Command {
    /// `bulkhead` with these arguments.
    #[must_use]
    pub fn bulkhead<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Command {
        Command::new("bulkhead", arguments)
    }

    /// Any program.
    #[must_use]
    pub fn new<A: AsRef<OsStr>>(
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = A>,
    ) -> Command {
        Command {
            program: program.as_ref().to_owned(),
            arguments: arguments
                .into_iter()
                .map(|a| a.as_ref().to_owned())
                .collect(),
            stdin: None,
            stdout: None,
            deadline: DEADLINE,
        }
    }

    /// Another deadline than the usual one.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Command {
        self.deadline = deadline;
        self
    }

    /// Standard input is this file.
    #[must_use]
    pub fn stdin_from(mut self, path: &Path) -> Command {
        self.stdin = Some(File::open(path).expect("the test made the file"));
        self
    }

    /// Standard output goes to this file.
    #[must_use]
    pub fn stdout_to(mut self, path: &Path) -> Command {
        self.stdout = Some(File::create(path).expect("the test made the directory"));
        self
    }

    /// Runs it to its end, without input unless some was given.
    #[must_use]
    pub fn run(mut self) -> Outcome {
        if self.stdin.is_none() {
            self.stdin = Some(File::open("/dev/null").expect("there is a /dev/null"));
        }
        self.start().wait()
    }

    /// Starts it; its input stays open.
    #[must_use]
    pub fn start(self) -> Running {
        let text = format!("{:?} {:?}", self.program, self.arguments);
        let mut child = self
            .to_process()
            .stdin(self.stdin.map_or_else(Stdio::piped, Stdio::from))
            .stdout(self.stdout.map_or_else(Stdio::piped, Stdio::from))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("Cannot start {text}: {error}"));
        let stdout = child.stdout.take().map(Reader::start);
        let stderr = child.stderr.take().map(Reader::start);
        Running {
            text,
            child,
            stdout,
            stderr,
            end: Instant::now() + self.deadline,
        }
    }

    pub(super) fn to_process(&self) -> process::Command {
        let mut command = process::Command::new(&self.program);
        command.args(&self.arguments);
        command
    }
}

/// A started program; killed when dropped.
#[derive(Debug)]
pub struct Running {
    text: String,
    child: Child,
    stdout: Option<Reader>,
    stderr: Option<Reader>,
    end: Instant,
}

impl Running {
    /// Process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until standard output holds `text`.
    pub fn wait_for_output(&self, text: &str) {
        let reader = self
            .stdout
            .as_ref()
            .expect("standard output is not redirected");
        if !reader.wait_for(text, self.end) {
            panic!(
                "{}: no {text:?} on standard output, but {:?}; on standard error {:?}",
                self.text,
                reader.text(),
                self.stderr.as_ref().map(Reader::text)
            );
        }
    }

    /// Writes to standard input.
    pub fn write(&self, text: &str) {
        let mut input = self
            .child
            .stdin
            .as_ref()
            .expect("standard input is not redirected");
        input
            .write_all(text.as_bytes())
            .expect("the program reads its input");
    }

    /// Sends a signal.
    pub fn signal(&self, signal: i32) {
        let pid = i32::try_from(self.child.id()).expect("process ids are small");
        // SAFETY: no memory is involved; the child is not yet waited for.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Waits for its end; closes standard input first.
    #[must_use]
    pub fn wait(mut self) -> Outcome {
        drop(self.child.stdin.take());
        let status = loop {
            match self.child.try_wait().expect("the child is ours") {
                Some(status) => break status,
                None if Instant::now() > self.end => {
                    panic!(
                        "{} does not end; standard output {:?}, standard error {:?}",
                        self.text,
                        self.stdout.as_ref().map(Reader::text),
                        self.stderr.as_ref().map(Reader::text)
                    );
                }
                None => thread::sleep(Duration::from_millis(10)),
            }
        };
        let finish = |reader: Option<Reader>| {
            let bytes = reader.map(|reader| {
                let end = reader.end(self.end);
                end.expect("somebody keeps an output of the ended program open")
            });
            String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned()
        };
        let code = status
            .code()
            .unwrap_or_else(|| 128 + status.signal().unwrap_or(127));
        let (stdout, stderr) = (finish(self.stdout.take()), finish(self.stderr.take()));
        Outcome {
            text: self.text.clone(),
            code,
            stdout,
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How a program ended.
#[derive(Debug)]
pub struct Outcome {
    text: String,
    /// Exit code; 128 + n if signal n ended it.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Outcome {
    /// Standard output of a program that must have succeeded.
    #[track_caller]
    pub fn success(self) -> String {
        assert!(self.code == 0, "{self}");
        self.stdout
    }

    /// Standard error of a program that must have failed.
    #[track_caller]
    pub fn failure(self) -> String {
        assert!(self.code != 0, "{self}");
        self.stderr
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: exit code {}\nstdout: {}\nstderr: {}",
            self.text, self.code, self.stdout, self.stderr
        )
    }
}
