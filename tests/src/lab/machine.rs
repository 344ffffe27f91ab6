//! The QEMU machine of the lab host: its one command line, and its process.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow};
use bulkhead_guest::Progress;
use rustix::io::{FdFlags, fcntl_setfd};

use super::accelerator::Accelerator;
use super::core::Core;
use super::counter;
use super::emulator::Emulator;
use bulkhead_guest::command::{clean, last_lines, output};

/// Memory of the lab host in MiB. Only what it touches is taken.
pub const MEMORY_MIB: u32 = 4096;

/// The kernel's command line. `nx_huge_pages` costs milliseconds for each VM
/// and guards against a flaw that an emulated processor has not. A kernel that
/// doubts its time stamp counter reads a slow clock. A kernel that has failed, or
/// that does not get on for a minute, ends the machine, and QEMU with it.
const KERNEL_ARGUMENTS: &str = "root=/dev/vda rw console=ttyS0 quiet loglevel=5 mitigations=off \
     kvm.nx_huge_pages=never kvm.report_ignored_msrs=0 tsc=reliable \
     oops=panic softlockup_panic=1 watchdog_thresh=30 panic=-1 \
     systemd.show_status=0 net.ifnames=0 apparmor=0";

/// Lines of log and console that an error shows: the journal's end is among them.
const LINES: usize = 40;

/// How the lab host's time passes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Clock {
    /// With that of this machine.
    Wall,
    /// With the instructions executed, one nanosecond each, whatever else this
    /// machine does. For benches.
    Instructions,
}

/// The files that a machine is made of.
#[derive(Debug)]
pub(crate) struct Parts<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initrd: &'a Path,
    /// Root disk, a qcow2 file that is written to.
    pub(crate) disk: &'a Path,
    /// The second disk, raw.
    pub(crate) second: &'a Path,
    /// The third disk, a qcow2 file that is written to.
    pub(crate) store: &'a Path,
    /// The state to restore; with none the machine boots.
    pub(crate) state: Option<&'a Path>,
    pub(crate) clock: Clock,
    pub(crate) accelerator: Accelerator,
    /// Where it is known on which processors lab hosts run.
    pub(crate) cores: &'a Path,
    /// QEMU's directory; the console is written to `console.log` there.
    pub(crate) directory: &'a Path,
}

/// A running machine; killed when dropped.
#[derive(Debug)]
pub(crate) struct Machine {
    child: Child,
    log: PathBuf,
    /// The port to the lab host.
    pub(crate) port: BufReader<UnixStream>,
    monitor: Option<UnixStream>,
    /// The processor that it runs on, if that matters.
    _core: Option<Core>,
}

/// All that decides whether a saved state fits: QEMU's version and the command
/// line.
pub(crate) fn fingerprint(emulator: &Emulator, accelerator: Accelerator) -> String {
    let arguments = arguments(
        &Parts {
            kernel: Path::new("k"),
            initrd: Path::new("i"),
            disk: Path::new("d"),
            second: Path::new("s"),
            store: Path::new("t"),
            state: None,
            clock: Clock::Wall,
            accelerator,
            cores: Path::new("."),
            directory: Path::new("."),
        },
        KERNEL_ARGUMENTS,
        0,
        0,
    );
    format!("{}\n{}", emulator.version, arguments.join("\n"))
}

/// The kernel's command line, with what only this start of the machine decides about.
///
/// The emulated counter of time stamps is this machine's. A kernel that measures it while
/// this machine is busy may be wrong by a factor of ten, for good: then clocks rush and
/// everything takes too long.
fn kernel_arguments(parts: &Parts) -> String {
    match (parts.clock, parts.accelerator) {
        (Clock::Wall, Accelerator::Emulation) => {
            format!("{KERNEL_ARGUMENTS} tsc_early_khz={}", counter::khz())
        }
        _ => KERNEL_ARGUMENTS.to_owned(),
    }
}

fn arguments(parts: &Parts, kernel: &str, port: i32, monitor: i32) -> Vec<String> {
    // One processor: with several, QEMU's emulation of SVM loses interrupts and the
    // state of its host now and then, which panics the lab host's kernel. It is not
    // slower, and two lab hosts side by side are faster.
    let cpus = "1";
    // Instructions can be counted by the emulator alone.
    let accelerator = match parts.clock {
        Clock::Wall => parts.accelerator,
        Clock::Instructions => Accelerator::Emulation,
    };
    let memory = MEMORY_MIB.to_string();
    let drive = |path: &Path, format: &str| {
        // A comma in a value of QEMU's is written twice.
        let path = path.display().to_string().replace(',', ",,");
        format!("file={path},format={format},if=virtio,cache=unsafe")
    };
    let mut arguments: Vec<String> = ["-M", "q35", "-smp", cpus]
        .into_iter()
        .chain(accelerator.arguments())
        .chain(["-m", &memory, "-nodefaults", "-display", "none"])
        .chain(["-no-reboot", "-append", kernel])
        .chain(["-netdev", "user,id=n,restrict=on"])
        .chain(["-device", "virtio-net-pci,netdev=n"])
        .chain(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"])
        .chain(["-device", "virtserialport,chardev=port,name=bulkhead.lab"])
        .chain(["-chardev", "file,id=console,path=console.log"])
        .chain(["-serial", "chardev:console"])
        .chain(["-mon", "chardev=monitor,mode=control"])
        .map(str::to_owned)
        .collect();
    arguments.extend([
        "-kernel".to_owned(),
        parts.kernel.display().to_string(),
        "-initrd".to_owned(),
        parts.initrd.display().to_string(),
        "-drive".to_owned(),
        drive(parts.disk, "qcow2"),
        "-drive".to_owned(),
        drive(parts.second, "raw") + ",readonly=on",
        "-drive".to_owned(),
        drive(parts.store, "qcow2"),
        "-chardev".to_owned(),
        format!("socket,id=port,fd={port}"),
        "-chardev".to_owned(),
        format!("socket,id=monitor,fd={monitor}"),
    ]);
    if parts.clock == Clock::Instructions {
        arguments.extend(["-icount".to_owned(), "shift=0,sleep=off".to_owned()]);
    }
    arguments
}

impl Machine {
    /// Starts it: booting, or going on where it was saved.
    pub(crate) fn start(emulator: &Emulator, parts: &Parts) -> Result<Machine> {
        let (port, port_theirs) = inherited_pair()?;
        let (monitor, monitor_theirs) = inherited_pair()?;
        let mut arguments = arguments(
            parts,
            &kernel_arguments(parts),
            port_theirs.as_raw_fd(),
            monitor_theirs.as_raw_fd(),
        );
        if let Some(state) = parts.state {
            // The shell that QEMU starts gets the path as it is: no quoting.
            let link = parts.directory.join("incoming");
            std::os::unix::fs::symlink(state, link)?;
            arguments.extend(["-incoming".to_owned(), "exec:cat incoming".to_owned()]);
        }
        let core = match (parts.clock, parts.accelerator) {
            (Clock::Instructions, _) | (_, Accelerator::Emulation) => {
                Some(Core::take(parts.cores)?)
            }
            _ => None,
        };
        let log = parts.directory.join("qemu.log");
        let log_file = fs::File::create(&log)?;
        let core_number = core.as_ref().map(|core| core.number);
        let child = emulator
            .command(parts.directory, core_number)
            .args(arguments)
            .stdout(log_file.try_clone()?)
            .stderr(log_file)
            .spawn()
            .context("Cannot start QEMU")?;
        Ok(Machine {
            child,
            log,
            port: BufReader::new(port),
            monitor: Some(monitor),
            _core: core,
        })
    }

    /// QEMU's monitor; it can be had once.
    pub(crate) fn monitor(&mut self) -> Result<super::qmp::Monitor> {
        super::qmp::Monitor::new(self.monitor.take().context("The monitor is in use")?)
    }

    /// Waits until the lab host listens on its port. It may take `timeout` to boot,
    /// and for each step of a program of which it tells.
    pub(crate) fn ready(&mut self, timeout: Duration, progress: &dyn Progress) -> Result<()> {
        self.port.get_ref().set_read_timeout(Some(timeout))?;
        let mut step = "Booting".to_owned();
        let outcome = loop {
            let mut line = String::new();
            match self.port.read_line(&mut line) {
                Ok(0) => break Err(anyhow!("QEMU ended")),
                Ok(_) => {}
                Err(error) => {
                    let seconds = timeout.as_secs();
                    let silent = format!("The lab host says nothing for {seconds} s ({step})");
                    break Err(anyhow::Error::new(error).context(silent));
                }
            }
            match line.trim_end() {
                "ready" => break Ok(()),
                "failed" => break Err(anyhow!("The lab host cannot be made ready ({step})")),
                line => match line.strip_prefix("step ") {
                    Some(text) => {
                        text.clone_into(&mut step);
                        progress.step(&format!("In the lab host: {step}"));
                    }
                    None => break Err(anyhow!("The lab host says {line:?}")),
                },
            }
        };
        self.port.get_ref().set_read_timeout(None)?;
        outcome.map_err(|error| anyhow!("{error:#}:\n{}", self.said()))
    }

    /// Lets the lab host start `program` of the second disk.
    pub(crate) fn go(&mut self, program: &str) -> Result<()> {
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH)?.as_secs();
        // An empty line first: a restored port may lose what it had half read.
        self.port
            .get_mut()
            .write_all(format!("\n{program} {seconds}\n").as_bytes())
            .with_context(|| format!("QEMU ended: {}", self.said()))
    }

    /// Waits for QEMU to end by itself.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.child.wait().map(drop).context("Cannot wait for QEMU")
    }

    /// What QEMU and the lab host's kernel wrote last.
    pub(crate) fn said(&self) -> String {
        let console = self.log.with_file_name("console.log");
        let [log, console] = [&self.log, &console].map(|path| {
            let text = fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&text).into_owned()
        });
        let text = log + &console;
        last_lines(&text.replace('\r', ""), LINES)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if QEMU has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A socket pair whose second end is inherited by programs that we start.
fn inherited_pair() -> Result<(UnixStream, OwnedFd)> {
    let (ours, theirs) = UnixStream::pair()?;
    let theirs = OwnedFd::from(theirs);
    fcntl_setfd(&theirs, FdFlags::empty())?;
    Ok((ours, theirs))
}

/// Makes the qcow2 file `out`, which holds the differences to `base`, a file of this
/// format.
pub(crate) fn overlay(base: &Path, format: &str, out: &Path) -> Result<()> {
    let mut command: Command = clean("qemu-img");
    command
        .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
        .arg(base)
        .arg(out);
    output(&mut command).map(drop)
}
