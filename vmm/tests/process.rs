//! The program as a process, with a guest of seven bytes: what can be seen without
//! a kernel for it. Needs root and a usable `/dev/kvm`, and is skipped without.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs::File,
    io::{self, IoSlice, PipeReader, Read, Seek, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd},
        unix::process::{CommandExt, ExitStatusExt},
    },
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use bulkhead_vmm::{
    config::{Config, Fd, Jail},
    control::{Answer, Answered, Asked, LONGEST, Request, Status, decode, encode},
    devices::{
        block,
        limit::{Limit, Limits, Rate},
        net,
    },
    exit::{End, Report},
    jail::{posture, threads::ThreadKind},
};
use rustix::{
    fs::MemfdFlags,
    io::{FdFlags, fcntl_setfd},
    mount::{MountFlags, MountPropagationFlags, mount, mount_change},
    net::{
        AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
        SocketFlags, SocketType, recv, sendmsg, socketpair,
    },
    thread::UnshareFlags,
};

/// The pod's user.
const USER: u32 = 0x7000_4321;

/// A guest that does nothing but make exits: `mov dx, 0x80; l: out dx, al; jmp l`.
const EXITS: [u8; 7] = [0x66, 0xba, 0x80, 0x00, 0xee, 0xeb, 0xfd];
/// A guest that never leaves by itself: `jmp $`.
const SPINS: [u8; 2] = [0xeb, 0xfe];

/// An executable that the VMM takes for a kernel.
fn kernel(code: &[u8]) -> File {
    const AT: u64 = 0x100_0000;
    const OFFSET: u64 = 0x1000;
    let mut elf = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    elf.resize(16, 0);
    let length = u64::try_from(code.len()).unwrap();
    // ELF header after its identification, then one program header.
    for half in [2_u16, 62] {
        elf.extend(half.to_le_bytes());
    }
    elf.extend(1_u32.to_le_bytes());
    for word in [AT, 64, 0] {
        elf.extend(word.to_le_bytes());
    }
    elf.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    for word in [1_u32, 5] {
        elf.extend(word.to_le_bytes());
    }
    for word in [OFFSET, AT, AT, length, length, OFFSET] {
        elf.extend(word.to_le_bytes());
    }
    elf.resize(usize::try_from(OFFSET).unwrap(), 0);
    elf.extend(code);
    file(&elf)
}

fn file(content: &[u8]) -> File {
    let mut file = File::from(rustix::fs::memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(content).unwrap();
    file.rewind().unwrap();
    file
}

/// A machine as the shim starts it: jailed, with a socket by which it is
/// controlled.
struct Machine {
    child: Child,
    control: Option<OwnedFd>,
    report: PipeReader,
    asked: u64,
    _root: tempfile::TempDir,
}

impl Machine {
    /// Starts it; `None` where that is not possible.
    fn start(code: &[u8], vcpus: u8) -> Option<Machine> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: it needs root");
            return None;
        }
        let kvm = File::options().read(true).write(true).open("/dev/kvm");
        if kvm.is_err() {
            eprintln!("skipped: it needs /dev/kvm");
        }
        let kvm = kvm.ok()?;
        let (kernel, disk) = (kernel(code), file(&[0; 4096]));
        let (control, its_control) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        let (report, its_report) = io::pipe().unwrap();
        let root = tempfile::tempdir().unwrap();
        let config = Config {
            kvm: Fd(kvm.as_raw_fd()),
            kernel: Fd(kernel.as_raw_fd()),
            initramfs: None,
            cmdline: String::new(),
            vcpus,
            more_vcpus: 0,
            memory_mib: 32,
            more_memory_mib: 0,
            shares: vec![bulkhead_vmm::config::Share {
                tag: "share".into(),
                dir: root.path().into(),
                read_only: false,
                policy: bulkhead_vmm::config::Policy::Shared,
                queues: 1,
            }],
            vsock: None,
            disks: vec![bulkhead_vmm::config::Disk {
                fd: Fd(disk.as_raw_fd()),
                read_only: true,
            }],
            places: 1,
            interfaces: 1,
            console: None,
            rng: true,
            notices: true,
            jail: Some(Jail {
                root: root.path().into(),
                user: USER,
            }),
            control: Some(Fd(its_control.as_raw_fd())),
            report: Some(Fd(its_report.as_raw_fd())),
        };
        let config = file(&encode(&config).unwrap());
        let inherited: Vec<RawFd> = vec![
            kvm.as_raw_fd(),
            kernel.as_raw_fd(),
            disk.as_raw_fd(),
            its_control.as_raw_fd(),
            its_report.as_raw_fd(),
            config.as_raw_fd(),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        command
            .args(["--config-fd", &config.as_raw_fd().to_string()])
            .env_clear()
            .stdin(Stdio::null());
        let inherit = move || {
            for fd in &inherited {
                // SAFETY: it is open until the exec, and the child has its own table.
                let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
                fcntl_setfd(fd, FdFlags::empty())?;
            }
            Ok(())
        };
        // SAFETY: the closure neither allocates nor locks.
        unsafe { command.pre_exec(inherit) };
        let place = root.path().to_owned();
        // The namespaces are those of a thread that ends.
        let child = std::thread::spawn(move || {
            // SAFETY: only this thread's namespaces and file system context change.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWPID) }
                .unwrap();
            let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
            mount_change("/", private).unwrap();
            mount("share", &place, "tmpfs", MountFlags::empty(), None).unwrap();
            command.spawn().unwrap()
        });
        Some(Machine {
            child: child.join().unwrap(),
            control: Some(control),
            report,
            asked: 0,
            _root: root,
        })
    }

    fn ask(&mut self, request: Request) -> Answer {
        self.ask_with(request, &[])
    }

    /// The same, with descriptors.
    fn ask_with(&mut self, request: Request, files: &[BorrowedFd<'_>]) -> Answer {
        self.asked += 1;
        let number = self.asked;
        let message = encode(&Asked { number, request }).unwrap();
        let socket = self.control.as_ref().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() {
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(files)));
        }
        let message = [IoSlice::new(&message)];
        sendmsg(socket, &message, &mut ancillary, SendFlags::NOSIGNAL).unwrap();
        let mut message = vec![0; LONGEST];
        let (length, _) = recv(socket, message.as_mut_slice(), RecvFlags::empty()).unwrap();
        let answered: Answered = decode(&message[..length]).unwrap();
        assert_eq!(answered.number, number);
        answered.answer
    }

    fn status(&mut self) -> Status {
        match self.ask(Request::Status) {
            Answer::Status(status) => status,
            other => panic!("{other:?}"),
        }
    }

    /// Waits for this to hold, or fails.
    fn until(&mut self, what: &str, holds: impl Fn(&Status) -> bool) -> Status {
        let begun = Instant::now();
        loop {
            let status = self.status();
            if holds(&status) {
                return status;
            }
            assert!(
                begun.elapsed() < Duration::from_secs(20),
                "{what}: {status:?}"
            );
        }
    }

    /// Its end, which comes by itself.
    fn end(mut self) -> (ExitStatus, Option<Report>) {
        let mut text = String::new();
        self.report.read_to_string(&mut text).unwrap();
        let status = self.child.wait().unwrap();
        (status, serde_json::from_str(&text).ok())
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // It may have ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_paused_machine_makes_no_exits_and_goes_on_when_resumed() {
    let Some(mut machine) = Machine::start(&EXITS, 2) else {
        return;
    };
    let running = machine.until("it runs", |status| status.exits.port > 1000);
    assert_eq!(
        (running.paused, running.vcpus, running.memory_mib),
        (false, 2, 32)
    );
    for _ in 0..50 {
        assert_eq!(machine.ask(Request::Pause), Answer::Done);
        let before = machine.status();
        assert!(before.paused);
        let after = machine.status();
        assert_eq!(after.exits, before.exits);
        assert_eq!(machine.ask(Request::Resume), Answer::Done);
        machine.until("it goes on", |status| {
            !status.paused && status.exits.port > after.exits.port
        });
    }
}

#[test]
fn a_guest_that_never_leaves_by_itself_is_paused_all_the_same() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    for _ in 0..50 {
        assert_eq!(machine.ask(Request::Pause), Answer::Done);
        assert!(machine.status().paused);
        assert_eq!(machine.ask(Request::Resume), Answer::Done);
        assert!(!machine.status().paused);
    }
}

#[test]
fn the_process_ends_with_its_control_socket_f1() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    machine.status();
    drop(machine.control.take());
    let (status, report) = machine.end();
    assert_eq!(status.code(), Some(17));
    assert_eq!(report.unwrap().end, End::Orphaned);
}

#[test]
fn a_socket_that_ends_before_the_guest_runs_ends_the_process_too_f2() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    // Whatever it is doing: it was only just started.
    drop(machine.control.take());
    let (status, report) = machine.end();
    assert_eq!(status.code(), Some(17));
    assert_eq!(report.unwrap().end, End::Orphaned);
}

#[test]
fn a_paused_machine_ends_with_its_control_socket() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    assert_eq!(machine.ask(Request::Pause), Answer::Done);
    drop(machine.control.take());
    assert_eq!(machine.end().0.code(), Some(17));
}

#[test]
fn a_stopped_process_does_not_see_its_socket_end_but_can_be_killed_f25() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    machine.status();
    let pid = rustix::process::Pid::from_child(&machine.child);
    rustix::process::kill_process(pid, rustix::process::Signal::STOP).unwrap();
    drop(machine.control.take());
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let (status, report) = machine.end();
    assert_eq!((status.signal(), report), (Some(libc::SIGKILL), None));
}

#[test]
fn every_thread_of_a_running_machine_has_what_the_table_says() {
    let Some(mut machine) = Machine::start(&EXITS, 2) else {
        return;
    };
    machine.until("it runs", |status| status.exits.port > 0);
    let mut kinds = Vec::new();
    for task in std::fs::read_dir(format!("/proc/{}/task", machine.child.id())).unwrap() {
        let task = task.unwrap().path();
        let read = |name: &str| std::fs::read_to_string(task.join(name)).unwrap();
        let name = read("comm");
        // KVM's own, which never leaves the kernel.
        if name.starts_with("kvm-") {
            continue;
        }
        let kind = ThreadKind::of(name.trim_end()).unwrap_or_else(|| panic!("{name}"));
        posture::check(kind, USER, &read("status")).unwrap();
        kinds.push(kind);
    }
    kinds.sort_by_key(|kind| format!("{kind:?}"));
    kinds.dedup();
    use ThreadKind::{Devices, Disk, Files, Hotplug, Main, Processor};
    assert_eq!(kinds, [Devices, Disk, Files, Hotplug, Main, Processor]);
}

#[test]
fn disks_and_interfaces_can_be_limited_as_long_as_they_are_there() {
    let Some(mut machine) = Machine::start(&SPINS, 1) else {
        return;
    };
    let limit = Limit {
        bytes: Rate {
            per_second: 1 << 20,
            burst: 0,
        },
        ..Limit::default()
    };
    let disk = |device| Request::Limit {
        device,
        limits: Limits::Disk(limit),
    };
    let interface = |device| Request::Limit {
        device,
        limits: Limits::Interface {
            receive: limit,
            transmit: limit,
        },
    };
    let refused = |text: &str| Answer::Refused(text.into());
    // The share, the disk from the start, and what comes at the two places.
    let none = refused("no disk and no interface is device 0");
    assert_eq!(machine.ask(disk(0)), none);
    assert_eq!(machine.ask(disk(1)), Answer::Done);
    let content = file(&[0; 4096]);
    let attach = Request::Attach { read_only: true };
    let attached = machine.ask_with(attach, &[content.as_fd()]);
    assert_eq!(attached, Answer::Attached(4));
    let (tap, _other) = socketpair(
        AddressFamily::UNIX,
        SocketType::SEQPACKET,
        SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
        None,
    )
    .unwrap();
    let mac = [2, 0, 0, 0, 0, 1];
    let attach = Request::AttachInterface { mac, mtu: 1500 };
    let attached = machine.ask_with(attach, &[tap.as_fd()]);
    assert_eq!(attached, Answer::Attached(5));
    assert_eq!(machine.ask(disk(4)), Answer::Done);
    assert_eq!(machine.ask(interface(5)), Answer::Done);
    let wrong = refused("device 4 is a disk, not an interface");
    assert_eq!(machine.ask(interface(4)), wrong);
    let held = [1, 4].map(|device| (device, block::Totals::default()));
    assert_eq!(machine.ask(Request::Disks), Answer::Disks(held.into()));
    let passed = vec![(5, net::Totals::default())];
    assert_eq!(machine.ask(Request::Interfaces), Answer::Interfaces(passed));
    for device in [4, 5] {
        assert_eq!(machine.ask(Request::Detach { device }), Answer::Done);
    }
    let none = refused("no disk and no interface is device 4");
    assert_eq!(machine.ask(disk(4)), none);
    assert_eq!(
        machine.ask(Request::Interfaces),
        Answer::Interfaces(Vec::new())
    );
}

#[test]
fn a_configuration_that_names_its_own_descriptor_is_refused() {
    let json = r#"{"kvm":9,"kernel":FD,"cmdline":"","vcpus":1,"memory_mib":32,"shares":[],
        "disks":[],"rng":false,"notices":false}"#;
    let mut config = file(&[]);
    let text = json.replace("FD", &config.as_raw_fd().to_string());
    config.write_all(text.as_bytes()).unwrap();
    config.rewind().unwrap();
    fcntl_setfd(&config, FdFlags::empty()).unwrap();
    let run = |number: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bulkhead-vmm"));
        let output = command.args(["--config-fd", number]).output().unwrap();
        let errors = String::from_utf8(output.stderr).unwrap();
        (output.status.code(), errors)
    };
    let number = config.as_raw_fd().to_string();
    let expected = format!(
        "bulkhead-vmm: Descriptor {number} is named by the configuration that came from it\n"
    );
    assert_eq!(run(&number), (Some(15), expected));
    for number in ["-1", "0", "2"] {
        let (status, errors) = run(number);
        assert_eq!(status, Some(2), "{number}: {errors}");
    }
}
