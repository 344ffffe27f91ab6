//! One command in the lab host: files in, streams through, exit code and files out.

use std::{
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::Shutdown,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail, ensure};

use super::{
    Clock, Lab,
    machine::{DISK_MIB, Machine, Start, empty_disk, overlay},
    root::{make_ext4, run},
};

/// A command to be run in the lab host.
#[derive(Debug)]
pub struct Call<'a> {
    lab: &'a Lab,
    script: String,
    files: Vec<(PathBuf, String)>,
    terminal: Option<(u16, u16)>,
    input: bool,
    clock: Clock,
    deadline: Duration,
}

/// How a call ended.
#[derive(Debug)]
pub struct Ended {
    /// Exit code of the script.
    pub code: u8,
    /// Where the files lie that the script left in `/var/lib/lab/evidence`, if any.
    pub evidence: Option<PathBuf>,
}

impl<'a> Call<'a> {
    pub(super) fn new(lab: &'a Lab) -> Self {
        Call {
            lab,
            script: String::new(),
            files: Vec::new(),
            terminal: None,
            input: false,
            clock: Clock::Wall,
            deadline: Duration::from_secs(3600),
        }
    }

    /// Shell script that runs as root. The files of the call are below `/mnt/in`,
    /// read-only.
    #[must_use]
    pub fn script(mut self, text: impl Into<String>) -> Self {
        self.script = text.into();
        self
    }

    /// Puts a file or directory into the call, at `name` below `/mnt/in`.
    #[must_use]
    pub fn file(mut self, path: impl Into<PathBuf>, name: impl Into<String>) -> Self {
        self.files.push((path.into(), name.into()));
        self
    }

    /// Gives the script a terminal of this many rows and columns.
    #[must_use]
    pub fn terminal(mut self, rows: u16, columns: u16) -> Self {
        self.terminal = Some((rows, columns));
        self.input = true;
        self
    }

    /// Has the script a terminal?
    #[must_use]
    pub fn has_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Passes our standard input to the script.
    #[must_use]
    pub fn with_input(mut self) -> Self {
        self.input = true;
        self
    }

    /// Chooses the machine's clock.
    #[must_use]
    pub fn clock(mut self, clock: Clock) -> Self {
        self.clock = clock;
        self
    }

    /// Ends the machine and fails when the script takes longer.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs the script; its output goes to `stdout` and `stderr` as it comes.
    ///
    /// # Errors
    /// The machine does not start, ends by itself, or the deadline passes.
    pub fn run(
        self,
        stdout: impl Write + Send + 'static,
        stderr: impl Write + Send + 'static,
    ) -> Result<Ended> {
        let work = tempfile::Builder::new().prefix("bulkhead-lab-").tempdir()?;
        let dir = work.path();
        self.pack(dir)?;
        let disk = dir.join("disk.qcow2");
        let (base, format, state) = match self.clock {
            Clock::Wall => (
                self.lab.state.join("disk.qcow2"),
                "qcow2",
                Some(self.lab.state.join("state")),
            ),
            Clock::Instructions => (self.lab.root.image.clone(), "raw", None),
        };
        overlay(&base, format, &disk)?;
        let start = Start {
            root: &self.lab.root,
            disk: &disk,
            clock: self.clock,
            state: state.as_deref(),
        };
        let mut machine = Machine::start(dir, &start)?;
        let out = pump(machine.connect("lab.stdout")?, stdout);
        let err = pump(machine.connect("lab.stderr")?, stderr);
        let exit = machine.connect("lab.exit")?;
        let input = machine.connect("lab.stdin")?;
        let mut trigger = machine.connect("lab.start")?;
        if state.is_none() {
            machine.wait_ready()?;
        }
        if self.input {
            thread::spawn(move || {
                let mut input = input;
                // Fails when the machine ends first.
                let _ = io::copy(&mut io::stdin().lock(), &mut input);
                let _ = input.shutdown(Shutdown::Both);
            });
        } else {
            drop(input);
        }
        let (mode, rows, columns) = match self.terminal {
            Some((rows, columns)) => ("terminal", rows, columns),
            None => ("plain", 24, 80),
        };
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        // The first characters after a restore can get lost.
        write!(trigger, "\n\nGO {now} {mode} {rows} {columns}\n")?;

        let code = self.wait(&mut machine, exit)?;
        let evidence = unpack(&dir.join("out.img"))?;
        drop(machine);
        for pump in [out, err] {
            ensure!(pump.join().is_ok(), "Cannot copy the script's output");
        }
        Ok(Ended { code, evidence })
    }

    fn wait(&self, machine: &mut Machine, exit: std::os::unix::net::UnixStream) -> Result<u8> {
        let end = Instant::now() + self.deadline;
        exit.set_read_timeout(Some(Duration::from_secs(1)))?;
        let mut exit = BufReader::new(exit);
        let mut line = String::new();
        loop {
            match exit.read_line(&mut line) {
                Ok(0) => {
                    machine.check_alive()?;
                    bail!("The lab host ended before the script");
                }
                Ok(_) if line.ends_with('\n') => break,
                Ok(_) => {}
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut
                    ) =>
                {
                    machine.check_alive()?;
                    ensure!(
                        Instant::now() < end,
                        "The script is not done after {} s",
                        self.deadline.as_secs()
                    );
                }
                Err(error) => return Err(error.into()),
            }
        }
        line.trim()
            .parse()
            .with_context(|| format!("The lab host gives {line:?} as exit code"))
    }

    /// Makes the machine's second and third disk.
    fn pack(&self, dir: &Path) -> Result<()> {
        let tree = dir.join("in");
        fs::create_dir(&tree)?;
        for (path, name) in &self.files {
            let target = tree.join(name);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent)?;
            }
            run(Command::new("cp").arg("-a").arg(path).arg(&target))?;
        }
        let script = tree.join("run");
        let size = if self.terminal.is_some() {
            "stty rows \"$ROWS\" columns \"$COLUMNS\"\n"
        } else {
            ""
        };
        fs::write(&script, format!("#!/bin/bash\n{size}{}\n", self.script))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        make_ext4(&tree, &dir.join("in.img"), DISK_MIB)?;
        fs::remove_dir_all(&tree)?;
        empty_disk(&dir.join("out.img"))
    }
}

fn pump(
    mut from: impl Read + Send + 'static,
    mut to: impl Write + Send + 'static,
) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        let mut buffer = vec![0; 1 << 16];
        while let Ok(n @ 1..) = from.read(&mut buffer) {
            if to
                .write_all(&buffer[..n])
                .and_then(|()| to.flush())
                .is_err()
            {
                break;
            }
        }
    })
}

/// Takes the evidence off the third disk: a tar archive from its first byte, or
/// nothing but zeros.
fn unpack(disk: &Path) -> Result<Option<PathBuf>> {
    let mut first = [0];
    fs::File::open(disk)?.read_exact(&mut first)?;
    if first == [0] {
        return Ok(None);
    }
    let dir = tempfile::Builder::new()
        .prefix("bulkhead-evidence-")
        .tempdir()?
        .keep();
    run(Command::new("tar").arg("-C").arg(&dir).arg("-xf").arg(disk))?;
    Ok(Some(dir))
}
