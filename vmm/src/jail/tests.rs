//! The jail from inside and from outside: the test starts itself once more, as
//! the first process of a PID namespace, and talks with it over pipes. It needs
//! root and is skipped without.

use std::{
    cell::Cell,
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
    process::{Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
};

use rustix::{
    event::epoll,
    fs::FileType,
    mount::{MountFlags, mount, mount_remount},
    thread::{capabilities, capabilities_secure_bits},
};

use super::*;
use crate::{
    config::Share,
    devices::fs::Fs,
    exit::{End, Report},
};

mod limited;
mod reach;

const ROOT: &str = "BULKHEAD_TEST_JAIL";

/// The pod's user.
const USER: u32 = 0x7012_3456;

/// A mount namespace like the shim's, in a thread of its own: a shared mount with
/// a read-only one below it. Returns when `inside` has ended, in success.
fn outside(inside: &'static str, later: impl FnOnce(&Path) + Send + 'static) {
    outside_of(inside, later, |status, rest| {
        assert!(status.success(), "{status} {rest:?}");
    });
}

/// As [`outside`]; `judge` gets the status of `inside` and what it printed at last.
fn outside_of(
    inside: &'static str,
    later: impl FnOnce(&Path) + Send + 'static,
    judge: impl FnOnce(ExitStatus, Vec<String>) + Send + 'static,
) {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: it needs root");
        return;
    }
    let test = thread::spawn(move || {
        // SAFETY: only this thread's namespaces and file system context change,
        // and the PID namespace of its children.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS | UnshareFlags::NEWPID) }
            .unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let root = env::temp_dir().join(format!("bulkhead-jail-{}-{inside}", std::process::id()));
        fs::create_dir_all(&root).unwrap();
        mount("share", &root, "tmpfs", MountFlags::empty(), None).unwrap();
        mount_change(&root, MountPropagationFlags::SHARED).unwrap();
        for dir in ["fixed", "later"] {
            fs::create_dir(root.join(dir)).unwrap();
        }
        let fixed = root.join("fixed");
        mount("fixed", &fixed, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(fixed.join("file"), "fixed").unwrap();
        mount_remount(&fixed, MountFlags::RDONLY, "").unwrap();
        rustix::fs::mknodat(
            CWD,
            root.join("null"),
            FileType::CharacterDevice,
            Mode::from_raw_mode(0o666),
            rustix::fs::makedev(1, 3),
        )
        .unwrap();
        let mut child = Command::new(env::current_exe().unwrap())
            .args(["--exact", &format!("jail::tests::{inside}")])
            .args(["--ignored", "--nocapture", "--test-threads=1"])
            .env(ROOT, &root)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let told = lines.any(|line| line.is_ok_and(|line| line.contains("ready")));
        if told {
            later(&root);
            writeln!(child.stdin.take().unwrap(), "go").unwrap();
        }
        let rest: Vec<_> = lines.map_while(Result::ok).collect();
        let status = child.wait().unwrap();
        unmount(&root, UnmountFlags::DETACH).unwrap();
        fs::remove_dir(&root).unwrap();
        assert!(told, "{status} {rest:?}");
        judge(status, rest);
    });
    test.join().unwrap();
}

fn root() -> Jail {
    Jail {
        root: PathBuf::from(env::var_os(ROOT).expect("started by the other half")),
        user: USER,
    }
}

/// Tells the other half that it may go on, and waits for it.
fn meet() {
    println!("ready");
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    assert_eq!(line, "go\n");
}

fn names(dir: &str) -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn errno<T>(result: io::Result<T>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn inside_there_is_the_share_and_nothing_else_of_the_host() {
    outside("view", |root| {
        let later = root.join("later");
        mount("later", &later, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(later.join("file"), "later").unwrap();
    });
}

#[test]
#[ignore = "the inner half of the test above"]
fn view() {
    let old_root = fs::metadata("/").unwrap();
    enter(Some(&root())).unwrap();
    assert_eq!(names("/"), ["fixed", "later", "null"]);
    assert_ne!(fs::metadata("/").unwrap().dev(), old_root.dev());
    for gone in ["/proc", "/dev", "/sys", "/tmp", "/etc"] {
        assert_eq!(errno(fs::metadata(gone)), Some(libc::ENOENT));
    }
    assert_eq!(fs::canonicalize("..").unwrap(), Path::new("/"));
    // What was read-only stays so, and cannot be changed from here.
    assert_eq!(fs::read("/fixed/file").unwrap(), b"fixed");
    assert_eq!(errno(fs::write("/fixed/file", "x")), Some(libc::EROFS));
    assert!(mount_remount("/fixed", MountFlags::empty(), "").is_err());
    assert!(unmount("/fixed", UnmountFlags::DETACH).is_err());
    // Devices are names only.
    assert!(fs::metadata("/null").unwrap().file_type().is_char_device());
    assert_eq!(errno(fs::File::open("/null")), Some(libc::EACCES));
    // A mount that the other half makes now appears.
    assert!(names("/later").is_empty());
    meet();
    assert_eq!(fs::read("/later/file").unwrap(), b"later");
}

#[test]
fn mounts_made_inside_do_not_reach_the_host() {
    outside("propagation", |root| {
        assert!(fs::read_dir(root.join("later")).unwrap().next().is_none());
    });
}

#[test]
#[ignore = "the inner half of the test above"]
fn propagation() {
    leave_mount_namespace().unwrap();
    let later = root().root.join("later");
    mount("inner", &later, "tmpfs", MountFlags::empty(), None).unwrap();
    fs::write(later.join("file"), "inner").unwrap();
    meet();
}

#[test]
fn each_kind_of_thread_has_what_the_table_says() {
    outside("posture", |_| {});
}

/// Those that the thread of what comes later starts.
const LATER: [(ThreadKind, &str); 4] = [
    (ThreadKind::Processor, "vcpu-1"),
    (ThreadKind::Disk, "disk-2"),
    (ThreadKind::Memory, "memory-3"),
    (ThreadKind::Network, "net-4"),
];

/// Threads of every kind but the main one and those of files, named as in a machine, each
/// of which runs `body` once it is sealed.
fn start(confined: &Confined, body: impl Fn(ThreadKind) + Send + Clone + 'static) {
    for (kind, name) in [
        (ThreadKind::Processor, "vcpu0"),
        (ThreadKind::Devices, "devices"),
        (ThreadKind::Disk, "disk"),
    ] {
        assert_eq!(ThreadKind::of(name), Some(kind));
        let body = body.clone();
        confined
            .spawn(kind, name.into(), move || body(kind))
            .unwrap();
    }
    let later = LATER.map(|(kind, name)| (kind, name, confined.seal(kind)));
    let (narrowed, all) = mpsc::channel();
    let starts = move || {
        for (kind, name, seal) in later {
            assert_eq!(ThreadKind::of(name), Some(kind));
            let (body, narrowed) = (body.clone(), narrowed.clone());
            let thread = thread::Builder::new().name(name.into()).spawn(move || {
                seal.narrow().unwrap();
                narrowed.send(()).unwrap();
                drop(narrowed);
                body(kind);
            });
            thread.unwrap();
        }
        drop(narrowed);
        body(ThreadKind::Hotplug);
    };
    confined
        .spawn(ThreadKind::Hotplug, "hotplug".into(), starts)
        .unwrap();
    assert_eq!(all.iter().count(), LATER.len());
}

#[test]
#[ignore = "the inner half of the test above"]
fn posture() {
    // One that does not enter, and looks when it is told to.
    let (look, told) = mpsc::channel::<()>();
    let reader = thread::Builder::new().name("reader".into()).spawn(move || {
        told.recv().unwrap();
        let harness = fs::read_link("/proc/self").unwrap();
        let tasks = fs::read_dir("/proc/self/task").unwrap();
        let tasks = tasks.map(|task| task.unwrap());
        let tasks = tasks.filter(|task| Path::new(&task.file_name()) != harness);
        let read = |task: fs::DirEntry, name| fs::read_to_string(task.path().join(name)).unwrap();
        tasks.map(|task| read(task, "status")).collect::<Vec<_>>()
    });
    let confined = enter(Some(&root())).unwrap();
    let share = Share {
        tag: "share".into(),
        dir: root().root,
        read_only: false,
        queues: 2,
        policy: crate::config::Policy::Shared,
    };
    let told = Some(crate::devices::notices::Notices::default().outbox());
    let fs = Fs::new(&share, told, &confined).unwrap();
    let (stay, parked) = mpsc::channel::<()>();
    let parked = Arc::new(std::sync::Mutex::new(parked));
    start(&confined, move |_| {
        // Ends with an error, when the other end is dropped.
        let _ = parked.lock().unwrap().recv();
    });
    for resource in [Resource::Core, Resource::Nproc] {
        let most = if resource == Resource::Core {
            0
        } else {
            THREADS
        };
        assert_eq!(getrlimit(resource).maximum, Some(most), "{resource:?}");
    }
    assert!(getrlimit(Resource::Nofile).maximum <= Some(DESCRIPTORS));
    assert!(capabilities_secure_bits().unwrap().contains(
        CapabilitiesSecureBits::NO_ROOT_LOCKED | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
    ));
    confined.close().unwrap();
    look.send(()).unwrap();
    let mut kinds = Vec::new();
    for status in reader.unwrap().join().unwrap() {
        let name = status.lines().next().unwrap().trim_start_matches("Name:\t");
        // All have a name of their kind but this one, which has the test's.
        let kind = ThreadKind::of(name).unwrap_or(ThreadKind::Main);
        if name != "reader" {
            super::posture::check(kind, USER, &status).unwrap();
            kinds.push(kind);
        }
    }
    for (kind, count) in [
        (ThreadKind::Main, 1),
        (ThreadKind::Processor, 2),
        (ThreadKind::Devices, 1),
        (ThreadKind::Disk, 2),
        (ThreadKind::Hotplug, 1),
        (ThreadKind::Memory, 1),
        (ThreadKind::Network, 1),
        // It starts others when it has work that may take its time.
        (ThreadKind::Files, 1),
    ] {
        let seen = kinds.iter().filter(|seen| **seen == kind).count();
        assert_eq!(seen, count, "{kind:?}");
    }
    drop((stay, fs));
    meet();
}

thread_local! {
    /// The last system call of this thread that was blocked.
    static BLOCKED: Cell<i64> = const { Cell::new(-1) };
}

/// Notes the call and returns to whoever made it.
extern "C" fn note(_: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the kernel passes the `siginfo_t` of a SIGSYS.
    let number = unsafe { filter::blocked_call(info) };
    BLOCKED.set(number.into());
}

/// Makes a system call; says whether it was blocked.
fn blocked(number: libc::c_long, arguments: [u64; 4]) -> bool {
    BLOCKED.set(-1);
    let [a, b, c, d] = arguments;
    // SAFETY: made only in a process that does nothing else, with calls that fail
    // or change nothing that the test relies on.
    unsafe { libc::syscall(number, a, b, c, d) };
    BLOCKED.get() == number
}

#[test]
fn no_thread_can_win_back_what_was_given_up() {
    outside("captured", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn captured() {
    let confined = enter(Some(&root())).unwrap();
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, note).unwrap();
    let (done, outcomes) = mpsc::channel();
    let attempts = move |kind| done.send(attempt_everything(kind)).unwrap();
    start(&confined, attempts.clone());
    let seal = confined.seal(ThreadKind::Files);
    let files = attempts.clone();
    thread::spawn(move || {
        seal.apply().unwrap();
        files(ThreadKind::Files);
    });
    confined.close().unwrap();
    attempts(ThreadKind::Main);
    drop(attempts);
    let mut kinds = 0;
    for succeeded in outcomes {
        assert_eq!(succeeded, Vec::<String>::new());
        kinds += 1;
    }
    // Two of disks, two of processors.
    assert_eq!(kinds, ThreadKind::ALL.len() + 2);
    meet();
}

/// What a captured thread would try; those attempts that were not blocked.
fn attempt_everything(kind: ThreadKind) -> Vec<String> {
    let name = c"/".as_ptr().expose_provenance() as u64;
    let bits = |flags: i32| u64::from(flags.cast_unsigned());
    let executable = bits(libc::PROT_READ | libc::PROT_EXEC);
    let mut attempts = vec![
        (
            "a user namespace",
            libc::SYS_unshare,
            [bits(libc::CLONE_NEWUSER), 0, 0, 0],
        ),
        (
            "a mount namespace",
            libc::SYS_unshare,
            [bits(libc::CLONE_NEWNS), 0, 0, 0],
        ),
        ("fork", libc::SYS_clone, [bits(libc::SIGCHLD), 0, 0, 0]),
        (
            "a process in a user namespace",
            libc::SYS_clone,
            [bits(libc::SIGCHLD | libc::CLONE_NEWUSER), 0, 0, 0],
        ),
        ("setns", libc::SYS_setns, [0, 0, 0, 0]),
        (
            "mount",
            libc::SYS_mount,
            [name, name, 0, bits(libc::MS_BIND.try_into().unwrap())],
        ),
        ("umount", libc::SYS_umount2, [name, 0, 0, 0]),
        ("fsopen", libc::SYS_fsopen, [name, 0, 0, 0]),
        ("open_tree", libc::SYS_open_tree, [0, name, 1, 0]),
        ("move_mount", libc::SYS_move_mount, [0, name, 0, name]),
        ("mount_setattr", libc::SYS_mount_setattr, [0, name, 0, 0]),
        ("pivot_root", libc::SYS_pivot_root, [name, name, 0, 0]),
        ("chroot", libc::SYS_chroot, [name, 0, 0, 0]),
        ("execve", libc::SYS_execve, [name, 0, 0, 0]),
        ("ptrace", libc::SYS_ptrace, [0, 0, 0, 0]),
        ("process_vm_readv", libc::SYS_process_vm_readv, [1, 0, 0, 0]),
        ("pidfd_getfd", libc::SYS_pidfd_getfd, [0, 0, 0, 0]),
        ("kill", libc::SYS_kill, [1, 0, 0, 0]),
        (
            "a signal to another process",
            libc::SYS_tgkill,
            [2, 2, 0, 0],
        ),
        ("a signal handler", libc::SYS_rt_sigaction, [31, 0, 0, 8]),
        (
            "a Unix socket",
            libc::SYS_socket,
            [bits(libc::AF_UNIX), 1, 0, 0],
        ),
        (
            "an Internet socket",
            libc::SYS_socket,
            [bits(libc::AF_INET), 1, 0, 0],
        ),
        (
            "a netlink socket",
            libc::SYS_socket,
            [bits(libc::AF_NETLINK), 3, 0, 0],
        ),
        (
            "a vsock pair",
            libc::SYS_socketpair,
            [bits(libc::AF_VSOCK), 1, 0, 0],
        ),
        ("connect", libc::SYS_connect, [0, 0, 0, 0]),
        ("bpf", libc::SYS_bpf, [0, 0, 0, 0]),
        ("keyctl", libc::SYS_keyctl, [0, 0, 0, 0]),
        ("add_key", libc::SYS_add_key, [name, name, 0, 0]),
        ("request_key", libc::SYS_request_key, [name, name, 0, 0]),
        ("perf_event_open", libc::SYS_perf_event_open, [0, 0, 0, 0]),
        ("io_uring", libc::SYS_io_uring_setup, [1, 0, 0, 0]),
        ("userfaultfd", libc::SYS_userfaultfd, [0, 0, 0, 0]),
        ("open by handle", libc::SYS_open_by_handle_at, [0, 0, 0, 0]),
        ("setresuid", libc::SYS_setresuid, [0, 0, 0, 0]),
        (
            "prctl",
            libc::SYS_prctl,
            [bits(libc::PR_SET_DUMPABLE), 1, 0, 0],
        ),
        ("prlimit", libc::SYS_prlimit64, [0, 7, 0, 0]),
        (
            "a program in memory",
            libc::SYS_memfd_create,
            [name, 0, 0, 0],
        ),
        (
            "executable memory",
            libc::SYS_mmap,
            [0, 4096, executable, 0x22],
        ),
        (
            "code made executable",
            libc::SYS_mprotect,
            [0, 4096, executable, 0],
        ),
        (
            "another virtual machine",
            libc::SYS_ioctl,
            [0, 0xae01, 0, 0],
        ),
        (
            "another device of KVM's",
            libc::SYS_ioctl,
            [0, 0xc00c_aee0, 0, 0],
        ),
        (
            "typing into a terminal",
            libc::SYS_ioctl,
            [0, libc::TIOCSTI, name, 0],
        ),
    ];
    if kind != ThreadKind::Hotplug {
        attempts.extend([
            ("another processor", libc::SYS_ioctl, [0, 0xae41, 0, 0]),
            (
                "other memory for the guest",
                libc::SYS_ioctl,
                [0, 0x4020_ae46, 0, 0],
            ),
        ]);
    }
    if kind != ThreadKind::Files {
        attempts.extend([
            ("openat2", libc::SYS_openat2, [0, name, 0, 0]),
            ("unlink", libc::SYS_unlinkat, [0, name, 0, 0]),
            ("setfsuid", libc::SYS_setfsuid, [0, 0, 0, 0]),
            ("capset", libc::SYS_capset, [0, 0, 0, 0]),
        ]);
    }
    let mut succeeded: Vec<String> = attempts
        .into_iter()
        .filter(|(_, number, arguments)| !blocked(*number, *arguments))
        .map(|(what, ..)| format!("{kind:?}: {what}"))
        .collect();
    // Some are answered as unknown instead.
    let unknown = |number| {
        // SAFETY: arguments of no size and without a name are refused in any case.
        let outcome = unsafe { libc::syscall(number, 0, 0, 0, 0) };
        outcome == -1 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOSYS)
    };
    // Where threads may start.
    let starts = matches!(kind, ThreadKind::Files | ThreadKind::Hotplug);
    if !(starts && unknown(libc::SYS_clone3) || !starts && blocked(libc::SYS_clone3, [0; 4])) {
        succeeded.push(format!("{kind:?}: clone3"));
    }
    // The C library asks for a file by itself.
    if kind != ThreadKind::Files && !unknown(libc::SYS_openat) {
        succeeded.push(format!("{kind:?}: open"));
    }
    succeeded
}

#[test]
fn a_file_servers_thread_can_start_more_of_its_kind() {
    outside("more_threads", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn more_threads() {
    let confined = enter(Some(&root())).unwrap();
    report_violations(Some(2)).unwrap();
    let seal = confined.seal(ThreadKind::Files);
    let first = thread::spawn(move || {
        seal.apply().unwrap();
        // As in the pool: where the new thread will wait, and a small stack.
        epoll::create(epoll::CreateFlags::CLOEXEC).unwrap();
        let thread = thread::Builder::new().name("fs-more".into());
        let second = thread.stack_size(256 << 10).spawn(|| {
            // SAFETY: only the calling thread's file system context changes.
            unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.unwrap();
            capabilities(None).unwrap()
        });
        second.unwrap().join().unwrap()
    });
    let its = first.join().unwrap();
    assert_eq!(its, only(ThreadKind::Files.capabilities()));
    meet();
}

#[test]
fn a_blocked_system_call_ends_the_process_with_a_report_f24() {
    outside_of(
        "violation",
        |_| {},
        |status, rest| {
            let expected = i32::from(End::Blocked.status());
            assert_eq!(status.code(), Some(expected), "{rest:?}");
            let report = rest.last().unwrap();
            let report: Report = serde_json::from_str(report).unwrap();
            assert_eq!(report.end, End::Blocked);
            let call = libc::SYS_socket;
            let expected = format!("The VMM's thread vcpu0 made the blocked system call {call}");
            assert_eq!(report.reason, expected);
        },
    );
}

#[test]
#[ignore = "the inner half of the test above"]
fn violation() {
    let confined = enter(Some(&root())).unwrap();
    report_violations(Some(1)).unwrap();
    meet();
    let name = "vcpu0".to_owned();
    confined
        .spawn(ThreadKind::Processor, name, || {
            // SAFETY: takes numbers only.
            unsafe { libc::socket(libc::AF_INET, libc::SOCK_STREAM, 0) };
        })
        .unwrap();
    confined.close().unwrap();
    // The whole process ends, wherever this thread is.
    loop {
        std::hint::spin_loop();
    }
}

#[test]
fn a_directory_that_is_no_mount_point_and_a_process_that_is_not_first_are_refused() {
    let jail = Jail {
        root: env::temp_dir(),
        user: USER,
    };
    assert!(matches!(enter(Some(&jail)), Err(Error::NotFirst { .. })));
    outside("no_mount_point", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn no_mount_point() {
    let jail = Jail {
        root: root().root.join("later"),
        user: USER,
    };
    assert!(matches!(enter(Some(&jail)), Err(Error::Root { .. })));
    meet();
}
