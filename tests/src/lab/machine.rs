//! QEMU: the machine's command line, booting and saving it.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_guest_kernel::Progress;
use sha2::{Digest, Sha256};

use super::{
    Clock,
    root::{Root, run},
};

/// Memory of the lab host.
const MEMORY: &str = "6G";

/// Size of the second and third disk; the saved machine has seen it.
pub(super) const DISK_MIB: u64 = 2048;

/// No boot under emulation on two busy processors took more than a third of it.
const BOOT_DEADLINE: Duration = Duration::from_secs(600);

/// Channels of a call, as ports of a virtio serial device.
pub(super) const PORTS: [&str; 4] = ["lab.stdin", "lab.stdout", "lab.stderr", "lab.exit"];

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub(super) struct Machine {
    child: Child,
    dir: PathBuf,
}

/// What a machine is started from. Everything else of it lies in a directory of
/// its own: sockets, `console.log`, `in.img`, `out.img`.
#[derive(Debug)]
pub(super) struct Start<'a> {
    pub(super) root: &'a Root,
    /// A copy-on-write image that the machine may write to.
    pub(super) disk: &'a Path,
    pub(super) clock: Clock,
    /// RAM and devices of a saved machine.
    pub(super) state: Option<&'a Path>,
}

impl Machine {
    pub(super) fn start(dir: &Path, start: &Start<'_>) -> Result<Machine> {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-M",
            "q35",
            "-cpu",
            "max",
            "-m",
            MEMORY,
            "-nodefaults",
            "-nographic",
            "-no-reboot",
        ]);
        match start.clock {
            Clock::Wall => command.args(["-accel", "tcg,thread=multi,tb-size=1024", "-smp", "2"]),
            Clock::Instructions => command.args([
                "-accel",
                "tcg,tb-size=1024",
                "-smp",
                "1",
                "-icount",
                "shift=0,sleep=off",
            ]),
        };
        command
            .arg("-kernel")
            .arg(&start.root.kernel)
            .arg("-initrd")
            .arg(&start.root.initrd);
        command.args([
            "-append",
            "root=/dev/vda rw console=ttyS0 quiet loglevel=3 mitigations=off kvm.nx_huge_pages=never \
             systemd.show_status=0 net.ifnames=0 apparmor=0",
        ]);
        let drive = |file: &Path, format: &str| {
            format!(
                "file={},format={format},if=virtio,cache=unsafe",
                file.display()
            )
        };
        command.arg("-drive").arg(drive(start.disk, "qcow2"));
        command
            .arg("-drive")
            .arg(drive(&dir.join("in.img"), "raw") + ",readonly=on");
        command
            .arg("-drive")
            .arg(drive(&dir.join("out.img"), "raw"));
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        let socket = |name: &str| {
            format!(
                "socket,id={name},path={},server=on,wait=off",
                dir.join(name).display()
            )
        };
        for port in PORTS {
            command.arg("-chardev").arg(socket(port));
            command
                .arg("-device")
                .arg(format!("virtserialport,chardev={port},name={port}"));
        }
        command
            .arg("-serial")
            .arg(format!("file:{}", dir.join("console.log").display()));
        command
            .arg("-chardev")
            .arg(socket("lab.start"))
            .args(["-serial", "chardev:lab.start"]);
        command
            .arg("-chardev")
            .arg(socket("monitor"))
            .args(["-mon", "chardev=monitor,mode=readline"]);
        if let Some(state) = start.state {
            command
                .arg("-incoming")
                .arg(format!("exec:cat '{}'", state.display()));
        }
        let log = fs::File::create(dir.join("qemu.log"))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("Cannot start qemu-system-x86_64: install the package qemu-system-x86")?;
        Ok(Machine {
            child,
            dir: dir.to_owned(),
        })
    }

    /// Connects to one of the machine's sockets, as soon as it is there.
    pub(super) fn connect(&mut self, name: &str) -> Result<UnixStream> {
        let path = self.dir.join(name);
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            match UnixStream::connect(&path) {
                Ok(stream) => return Ok(stream),
                Err(error) if Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("Cannot reach {}", path.display()));
                }
                Err(_) => self.check_alive()?,
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    pub(super) fn check_alive(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait()? {
            let log = fs::read_to_string(self.dir.join("qemu.log")).unwrap_or_default();
            bail!("The lab host's QEMU ended ({status}): {}", log.trim());
        }
        Ok(())
    }

    /// Waits for the service in the machine to say that it is ready.
    pub(super) fn wait_ready(&mut self) -> Result<()> {
        let console = self.dir.join("console.log");
        let deadline = Instant::now() + BOOT_DEADLINE;
        loop {
            let text = fs::read(&console).unwrap_or_default();
            if String::from_utf8_lossy(&text).contains("LAB-READY") {
                return Ok(());
            }
            self.check_alive()?;
            ensure!(
                Instant::now() < deadline,
                "The lab host is not ready after {} s; its console: {}",
                BOOT_DEADLINE.as_secs(),
                String::from_utf8_lossy(&text)
            );
            thread::sleep(Duration::from_millis(200));
        }
    }

    /// Writes RAM and devices to `state` and ends the machine, its disk as it is.
    fn save(mut self, state: &Path) -> Result<()> {
        let mut monitor = self.connect("monitor")?;
        monitor.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut ask = |line: &str| -> Result<String> {
            writeln!(monitor, "{line}")?;
            let mut answer = String::new();
            let mut buffer = [0; 4096];
            // The prompt stands before the echo of the line and after the answer.
            while answer.matches("(qemu) ").count() < 1 || !answer.ends_with("(qemu) ") {
                let n = monitor
                    .read(&mut buffer)
                    .context("QEMU's monitor does not answer")?;
                ensure!(n > 0, "QEMU closed its monitor");
                answer.push_str(&String::from_utf8_lossy(&buffer[..n]));
            }
            Ok(answer)
        };
        ask("")?;
        ask("migrate_set_parameter max-bandwidth 4G")?;
        ask(&format!("migrate -d \"exec:cat > '{}'\"", state.display()))?;
        let deadline = Instant::now() + Duration::from_secs(300);
        loop {
            let answer = ask("info migrate")?;
            if answer.contains("completed") {
                break;
            }
            ensure!(
                !answer.contains("failed") && Instant::now() < deadline,
                "Cannot save the lab host: {answer}"
            );
            thread::sleep(Duration::from_millis(200));
        }
        // The end of the machine is the answer.
        let _ = writeln!(monitor, "quit");
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A copy-on-write image over `base`.
pub(super) fn overlay(base: &Path, format: &str, image: &Path) -> Result<()> {
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-F", format, "-b"])
        .args([base, image]))
}

/// An empty disk image.
pub(super) fn empty_disk(path: &Path) -> Result<()> {
    Ok(fs::File::create(path)?.set_len(DISK_MIB << 20)?)
}

/// Finds the saved machine in `dir`, or boots and saves it. The directory that is
/// returned holds `disk.qcow2` and `state`.
pub(super) fn ensure_saved(dir: &Path, root: &Root, progress: &dyn Progress) -> Result<PathBuf> {
    let version = Command::new("qemu-system-x86_64")
        .arg("--version")
        .output()
        .context("Cannot start qemu-system-x86_64: install the package qemu-system-x86")?;
    let mut hash = Sha256::new();
    hash.update(&root.key);
    hash.update(&version.stdout);
    hash.update(include_str!("machine.rs"));
    let place = dir.join(format!("state-{}", hex::encode(&hash.finalize()[..12])));
    if place.is_dir() {
        return Ok(place);
    }
    progress.step("Booting the lab host, once");
    let work = tempfile::Builder::new().prefix("boot-").tempdir_in(dir)?;
    let done = work.path().join("done");
    fs::create_dir(&done)?;
    let disk = done.join("disk.qcow2");
    overlay(&root.image, "raw", &disk)?;
    empty_disk(&work.path().join("in.img"))?;
    empty_disk(&work.path().join("out.img"))?;
    let start = Start {
        root,
        disk: &disk,
        clock: Clock::Wall,
        state: None,
    };
    let mut machine = Machine::start(work.path(), &start)?;
    machine.wait_ready()?;
    progress.step("Saving the lab host");
    machine.save(&done.join("state"))?;
    fs::rename(&done, &place)?;
    Ok(place)
}
