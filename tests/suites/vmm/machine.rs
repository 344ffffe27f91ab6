//! A machine for a test: an initramfs with busybox and a script, and the VMM.

use std::{
    fs::{self, File},
    io::{self, BufRead, BufReader, IoSlice, PipeReader, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::CommandExt,
    },
    path::PathBuf,
    process::{Child, Command, Stdio},
};

use bulkhead_vmm::control::{Answer, Answered, Asked, LONGEST, Request, decode, encode};
use rustix::net::{
    RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, recv, send, sendmsg,
};
use serde_json::{Value, json};
use tempfile::TempDir;

const KERNEL: &str = "/usr/share/bulkhead/vmlinux";
const BUSYBOX: &str = "/usr/bin/busybox";
/// Seconds after which a machine that hangs is ended.
const DEADLINE_S: &str = "300";
const CMDLINE: &str = "console=hvc0 quiet panic=-1 reboot=k";

/// A machine that has not started.
pub(crate) struct Machine {
    dir: TempDir,
    options: Vec<(String, String)>,
    cmdline: String,
    console: bool,
    places: u8,
    interfaces: u8,
    more_vcpus: u8,
    more_memory_mib: u32,
    input: Option<(String, String)>,
}

/// How a machine ended.
pub(crate) struct Ended {
    pub(crate) status: Option<i32>,
    /// What the guest wrote.
    pub(crate) console: String,
    /// The last line on standard error that is no JSON.
    pub(crate) reason: String,
    /// What `--stats` says.
    pub(crate) stats: Value,
}

/// Checks status and reason.
pub(crate) fn ended_with(end: &Ended, status: i32, reason: &str) {
    assert_eq!(
        (end.status, end.reason.as_str()),
        (Some(status), format!("bulkhead-vmm: {reason}").as_str()),
        "console:\n{}",
        end.console
    );
}

impl Machine {
    /// A machine whose first process is this shell script.
    pub(crate) fn running(script: &str) -> Machine {
        let dir = tempfile::tempdir().expect("temporary directory");
        let init = format!(
            "#!/bin/busybox sh\n/bin/busybox mkdir -p /usr/bin /proc /sys\n\
             /bin/busybox --install -s /bin\nexport PATH=/bin\n\
             mount -t proc proc /proc\nmount -t sysfs sys /sys\n\
             mount -t devtmpfs dev /dev\n{script}\n"
        );
        let busybox = fs::read(BUSYBOX).expect("a static busybox");
        let mut archive = Vec::new();
        for (name, mode, data) in [
            ("bin", 0o40755, &[][..]),
            ("dev", 0o40755, &[]),
            ("bin/busybox", 0o100_755, &busybox),
            ("init", 0o100_755, init.as_bytes()),
        ] {
            entry(&mut archive, name, mode, data);
        }
        // The kernel opens it for the first process.
        device(&mut archive, "dev/console", 5, 1);
        entry(&mut archive, "TRAILER!!!", 0, &[]);
        fs::write(dir.path().join("initramfs"), archive).expect("initramfs");
        Machine {
            dir,
            options: Vec::new(),
            cmdline: CMDLINE.into(),
            console: true,
            places: 0,
            interfaces: 0,
            more_vcpus: 0,
            more_memory_mib: 0,
            input: None,
        }
    }

    /// Adds an option; without a value if that is empty.
    pub(crate) fn option(mut self, name: &str, value: &str) -> Machine {
        self.options.push((name.into(), value.into()));
        self
    }

    /// Adds to the kernel's command line.
    pub(crate) fn cmdline(mut self, more: &str) -> Machine {
        self.cmdline = format!("{} {more}", self.cmdline);
        self
    }

    /// What is typed at the console once the guest has written this line.
    pub(crate) fn input_after(mut self, line: &str, text: &str) -> Machine {
        self.input = Some((line.into(), text.into()));
        self
    }

    /// Places for disks that come later.
    pub(crate) fn places(mut self, count: u8) -> Machine {
        self.places = count;
        self
    }

    /// Places for network interfaces that come later.
    pub(crate) fn interfaces(mut self, count: u8) -> Machine {
        self.interfaces = count;
        self
    }

    /// What may come later.
    pub(crate) fn growing(mut self, vcpus: u8, memory_mib: u32) -> Machine {
        (self.more_vcpus, self.more_memory_mib) = (vcpus, memory_mib);
        self
    }

    /// No console.
    pub(crate) fn without_console(mut self) -> Machine {
        self.console = false;
        self
    }

    fn initramfs(&self) -> PathBuf {
        self.dir.path().join("initramfs")
    }

    /// Runs it to its end.
    pub(crate) fn run(self) -> Ended {
        let mut command = Command::new("timeout");
        command.args([DEADLINE_S, "bulkhead-vmm", "--stats"]);
        command.arg("--initramfs").arg(self.initramfs());
        command.args(["--cmdline", &self.cmdline]);
        if self.console {
            command.arg("--console");
        }
        if !self.options.iter().any(|(name, _)| name == "--kernel") {
            command.args(["--kernel", KERNEL]);
        }
        for (name, value) in &self.options {
            command.arg(name);
            if !value.is_empty() {
                command.arg(value);
            }
        }
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("bulkhead-vmm starts");
        let mut stdin = child.stdin.take().expect("piped");
        let mut console = String::new();
        if let Some((line, text)) = &self.input {
            let mut stdout = BufReader::new(child.stdout.take().expect("piped"));
            while console.lines().last().map(str::trim_end) != Some(line.as_str()) {
                let count = stdout.read_line(&mut console).expect("console");
                assert_ne!(count, 0, "the machine ended before {line:?}");
            }
            stdin.write_all(text.as_bytes()).expect("typed");
            stdout.read_to_string(&mut console).expect("console");
        }
        let output = child.wait_with_output().expect("bulkhead-vmm ends");
        drop(stdin);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        let stats = errors.lines().find(|line| line.starts_with('{'));
        Ended {
            status: output.status.code(),
            console: console + &String::from_utf8_lossy(&output.stdout),
            reason: errors
                .lines()
                .rfind(|line| !line.starts_with('{'))
                .unwrap_or_default()
                .to_owned(),
            stats: stats
                .and_then(|line| serde_json::from_str(line).ok())
                .unwrap_or_default(),
        }
    }

    /// Starts it as the shim does: by a configuration on a descriptor.
    pub(crate) fn start_by_config(self, control: &OwnedFd) -> io::Result<Running> {
        let kvm = File::options().read(true).write(true).open("/dev/kvm")?;
        let kernel = File::open(KERNEL)?;
        let initramfs = File::open(self.initramfs())?;
        let (output, console) = io::pipe()?;
        let (report, report_end) = io::pipe()?;
        let config = json!({
            "kvm": 10, "kernel": 11, "initramfs": 12, "cmdline": self.cmdline,
            "vcpus": 1, "memory_mib": 128, "shares": [], "disks": [], "rng": true, "notices": false,
            "vsock": {"guest_cid": 3, "ports": [1024]},
            "console": {"output": 13}, "control": 14, "report": 15, "places": self.places,
            "interfaces": self.interfaces, "more_vcpus": self.more_vcpus, "more_memory_mib": self.more_memory_mib,
        });
        let path = self.dir.path().join("config");
        fs::write(&path, config.to_string())?;
        let config = File::open(path)?;
        let passed: Vec<(RawFd, RawFd)> = [
            kvm.as_raw_fd(),
            kernel.as_raw_fd(),
            initramfs.as_raw_fd(),
            console.as_raw_fd(),
            control.as_raw_fd(),
            report_end.as_raw_fd(),
            config.as_raw_fd(),
        ]
        .into_iter()
        .zip(10..)
        .collect();
        let mut command = Command::new("bulkhead-vmm");
        command.args(["--config-fd", "16"]).stdin(Stdio::null());
        // SAFETY: between fork and exec only descriptors are duplicated, by calls
        // that are safe there.
        unsafe {
            command.pre_exec(move || pass(&passed));
        }
        let child = command.spawn()?;
        Ok(Running {
            child,
            console: BufReader::new(output),
            report,
            _dir: self.dir,
        })
    }
}

/// The machine's end of a control socket, and the other one.
pub(crate) fn control() -> io::Result<(OwnedFd, OwnedFd)> {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let flags = SocketFlags::CLOEXEC;
    Ok(socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        flags,
        None,
    )?)
}

/// Asks the machine; `None` once it has ended.
pub(crate) fn ask(socket: &OwnedFd, request: Request) -> Option<Answer> {
    let message = encode(&Asked { number: 1, request }).expect("a message");
    send(socket, &message, SendFlags::NOSIGNAL).ok()?;
    answer(socket)
}

fn answer(socket: &OwnedFd) -> Option<Answer> {
    let mut message = vec![0; LONGEST];
    let (length, _) = recv(socket, message.as_mut_slice(), RecvFlags::empty()).ok()?;
    if length == 0 {
        return None;
    }
    let answered: Answered = decode(&message[..length]).expect("an answer");
    Some(answered.answer)
}

/// Hands the machine a disk.
pub(crate) fn attach(socket: &OwnedFd, disk: &File, read_only: bool) -> Option<Answer> {
    hand(socket, disk.as_fd(), Request::Attach { read_only })
}

/// Hands the machine a tap.
pub(crate) fn attach_interface(
    socket: &OwnedFd,
    tap: &OwnedFd,
    mac: [u8; 6],
    mtu: u16,
) -> Option<Answer> {
    hand(socket, tap.as_fd(), Request::AttachInterface { mac, mtu })
}

fn hand(socket: &OwnedFd, file: BorrowedFd<'_>, request: Request) -> Option<Answer> {
    let message = encode(&Asked { number: 2, request }).expect("a message");
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let files = [file];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
    let message = [IoSlice::new(&message)];
    sendmsg(socket, &message, &mut ancillary, SendFlags::NOSIGNAL).ok()?;
    answer(socket)
}

/// Puts descriptors where the configuration names them.
fn pass(passed: &[(RawFd, RawFd)]) -> io::Result<()> {
    // First out of the way of the numbers that are wanted, then to these.
    for (from, to) in passed {
        // SAFETY: duplicating a descriptor touches no memory.
        if unsafe { libc::dup2(*from, to + 100) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for (_, to) in passed {
        // SAFETY: as above.
        if unsafe { libc::dup2(to + 100, *to) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the copy was made above for this process alone.
        unsafe { libc::close(to + 100) };
    }
    Ok(())
}

/// A machine that runs.
pub(crate) struct Running {
    child: Child,
    console: BufReader<PipeReader>,
    report: PipeReader,
    _dir: TempDir,
}

impl Running {
    /// Reads the console up to this line.
    pub(crate) fn wait_for(&mut self, expected: &str) {
        let mut line = String::new();
        while line.trim_end() != expected {
            line.clear();
            let count = self.console.read_line(&mut line).expect("console");
            assert_ne!(count, 0, "the machine ended before {expected:?}");
        }
    }

    /// Waits for the end: exit status and report.
    pub(crate) fn finish(mut self) -> (Option<i32>, Value) {
        let mut text = String::new();
        self.report.read_to_string(&mut text).expect("report");
        let status = self.child.wait().expect("the process ends");
        let report = serde_json::from_str(&text).expect("one JSON line");
        (status.code(), report)
    }

    /// Resident memory of the process in KiB without the guest's.
    pub(crate) fn resident_beside_guest_kib(&self) -> u64 {
        let path = format!("/proc/{}/smaps", self.child.id());
        let mappings = fs::read_to_string(path).expect("smaps");
        let (mut resident, mut size) = (0, 0);
        for line in mappings.lines() {
            let number = || {
                let number = line.split_whitespace().nth(1);
                number.and_then(|number| number.parse::<u64>().ok())
            };
            if line.starts_with("Size:") {
                size = number().expect("a number");
            } else if line.starts_with("Rss:") && size < 128 << 10 {
                resident += number().expect("a number");
            }
        }
        resident
    }
}

impl Running {
    /// Resident memory of the process in KiB, the guest's too.
    pub(crate) fn resident_kib(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let number = line.and_then(|line| line.split_whitespace().nth(1)?.parse().ok());
        number.expect("VmRSS")
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Adds a file or directory to a cpio archive in the "newc" format.
fn entry(archive: &mut Vec<u8>, name: &str, mode: u32, data: &[u8]) {
    header(archive, name, mode, data.len(), (0, 0));
    archive.extend_from_slice(data);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

fn device(archive: &mut Vec<u8>, name: &str, major: u32, minor: u32) {
    header(archive, name, 0o20600, 0, (major, minor));
}

fn header(archive: &mut Vec<u8>, name: &str, mode: u32, size: usize, device: (u32, u32)) {
    let (major, minor) = device;
    let number = archive.len();
    let length = name.len() + 1;
    let text = format!(
        "070701{number:08x}{mode:08x}{:08x}{:08x}{:08x}{:08x}{size:08x}{:08x}{:08x}{major:08x}{minor:08x}{length:08x}{:08x}{name}\0",
        0, 0, 1, 0, 0, 0, 0
    );
    archive.extend_from_slice(text.as_bytes());
    archive.resize(archive.len().next_multiple_of(4), 0);
}
