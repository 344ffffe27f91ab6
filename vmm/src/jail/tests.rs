//! The jail from inside and from outside: the test starts itself once more, as
//! the first process of a PID namespace, and talks with it over pipes. It needs
//! root and is skipped without.

use std::{
    env, fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::PathBuf,
    process::{Command, Stdio},
    sync::mpsc,
    thread,
};

use rustix::{
    fs::FileType,
    mount::{MountFlags, mount, mount_remount},
    thread::{capabilities, capabilities_secure_bits, capability_is_in_bounding_set},
};

use super::*;
use crate::{config::Share, devices::fs::Fs};

const ROOT: &str = "BULKHEAD_TEST_JAIL";

/// A mount namespace like the shim's, in a thread of its own: a shared mount with
/// a read-only one below it. Returns when `inside` has ended.
fn outside(inside: &'static str, later: impl FnOnce(&Path) + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
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
        assert!(told && status.success(), "{status} {rest:?}");
    });
    test.join().unwrap();
}

fn root() -> Jail {
    Jail {
        root: PathBuf::from(env::var_os(ROOT).expect("started by the other half")),
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
fn inside_only_the_file_system_keeps_capabilities() {
    outside("privileges", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn privileges() {
    let confined = enter(Some(&root())).unwrap();
    let share = Share {
        tag: "share".into(),
        dir: root().root,
        read_only: false,
        queues: 2,
        policy: crate::config::Policy::Shared,
    };
    let fs = Fs::new(&share, &confined).unwrap();
    assert_eq!(capabilities(None).unwrap(), only(FILE_SERVER));
    confined.drop_capabilities().unwrap();
    let none = only(CapabilitySet::empty());
    assert_eq!(capabilities(None).unwrap(), none);
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(capabilities(None).unwrap()).unwrap());
    assert_eq!(receiver.recv().unwrap(), none);
    for number in 0..=40 {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        assert!(!capability_is_in_bounding_set(capability).unwrap());
    }
    assert!(rustix::thread::no_new_privs().unwrap());
    assert!(capabilities_secure_bits().unwrap().contains(
        CapabilitiesSecureBits::NO_ROOT_LOCKED | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
    ));
    assert_eq!(getrlimit(Resource::Core).maximum, Some(0));
    // procfs is there for the file server, with processes only and only ours.
    let proc = confined.proc_self_fd().unwrap();
    let up = |path| rustix::fs::statat(&proc, path, rustix::fs::AtFlags::empty());
    assert!(up("0").is_ok());
    assert!(up("../../1/stat").is_ok());
    assert_eq!(up("../../sys").err(), Some(rustix::io::Errno::NOENT));
    let top = rustix::fs::openat(&proc, "../..", OFlags::RDONLY, Mode::empty()).unwrap();
    let mut processes = rustix::fs::Dir::read_from(top)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().to_str().unwrap().to_owned())
        .filter(|name| name.parse::<u32>().is_ok());
    assert_eq!(processes.next().as_deref(), Some("1"));
    assert_eq!(processes.next(), None);
    // The threads of the file system, seen from the outside of them.
    let read = |path: String| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&proc, path, flags, Mode::empty()).unwrap();
        io::read_to_string(fs::File::from(fd)).unwrap()
    };
    let tasks = rustix::fs::openat(&proc, "../task", OFlags::RDONLY, Mode::empty()).unwrap();
    let mut keeping = 0;
    for task in rustix::fs::Dir::read_from(tasks).unwrap() {
        let task = task.unwrap().file_name().to_str().unwrap().to_owned();
        // The first thread is the test's, not the one that entered.
        if task.starts_with('.') || task == "1" {
            continue;
        }
        let status = read(format!("../task/{task}/status"));
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:\t"))
            .map(|set| u64::from_str_radix(set, 16).unwrap());
        let name = read(format!("../task/{task}/comm"));
        if name.starts_with("fs-") {
            assert_eq!(effective, Some(FILE_SERVER.bits()), "{name}");
            keeping += 1;
        } else {
            assert_eq!(effective, Some(0), "{name}");
        }
    }
    // Nine for requests and one for locks.
    assert_eq!(keeping, 10);
    drop(fs);
    meet();
}

#[test]
fn a_directory_that_is_no_mount_point_and_a_process_that_is_not_first_are_refused() {
    let jail = Jail {
        root: env::temp_dir(),
    };
    assert!(matches!(enter(Some(&jail)), Err(Error::NotFirst { .. })));
    outside("no_mount_point", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn no_mount_point() {
    let jail = Jail {
        root: root().root.join("later"),
    };
    assert!(matches!(enter(Some(&jail)), Err(Error::Root { .. })));
    meet();
}
