//! What a thread of the file server that was taken over reaches by what it holds.

use std::{
    ffi::CStr,
    os::fd::{AsFd, AsRawFd},
};

use rustix::{
    fs::{AtFlags, RawDir, RenameFlags, StatxFlags},
    path::DecInt,
};

use super::*;

/// Runs `body` in a thread that is sealed as one of the file server.
fn in_files_thread<T: Send + 'static>(
    confined: &Confined,
    body: impl FnOnce() -> T + Send + 'static,
) -> T {
    report_violations(Some(2)).unwrap();
    let seal = confined.seal(ThreadKind::Files);
    let thread = thread::spawn(move || {
        seal.apply().unwrap();
        body()
    });
    thread.join().unwrap()
}

#[test]
fn the_directory_of_descriptors_leads_to_nothing_else_of_procfs() {
    outside("reach::procfs", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn procfs() {
    let confined = enter(Some(&root())).unwrap();
    let proc = confined.proc_self_fd().unwrap();
    let reached = in_files_thread(&confined, move || {
        let own = proc.as_raw_fd();
        let mut reached = Vec::new();
        for way in ["", "../", "../../", "../../1/", "../../self/"] {
            for way in [way.to_owned(), format!("{own}/{way}")] {
                for name in [
                    "mem", "maps", "exe", "root", "task", "fdinfo", "stat", "sys",
                ] {
                    let path = format!("{way}{name}");
                    for flags in [OFlags::PATH, OFlags::RDONLY, OFlags::RDWR] {
                        if rustix::fs::openat(&proc, &path, flags, Mode::empty()).is_ok() {
                            reached.push(path.clone());
                        }
                    }
                }
            }
        }
        // By the working directory, which is where such a thread lives.
        rustix::process::fchdir(&proc).unwrap();
        if rustix::fs::openat(CWD, "../mem", OFlags::RDWR, Mode::empty()).is_ok() {
            reached.push("../mem".to_owned());
        }
        let inode = |path| {
            let status = rustix::fs::statx(&proc, path, AtFlags::empty(), StatxFlags::INO);
            status.unwrap().stx_ino
        };
        assert_eq!(inode(".."), inode("."));
        // What it is for works.
        assert!(inode("0") != inode("."));
        reached
    });
    assert_eq!(reached, Vec::<String>::new());
    meet();
}

#[test]
fn a_file_server_does_below_its_root_what_it_is_for() {
    outside("reach::below", |root| {
        // A mount that comes later is below it as well.
        let later = root.join("later");
        mount("later", &later, "tmpfs", MountFlags::empty(), None).unwrap();
        fs::write(later.join("file"), "later").unwrap();
    });
}

#[test]
#[ignore = "the inner half of the test above"]
fn below() {
    let confined = enter(Some(&root())).unwrap();
    let proc = confined.proc_self_fd().unwrap();
    meet();
    in_files_thread(&confined, move || serve_once(&proc, c"later"));
}

/// One of each operation on names in the directory `name` of the root.
fn serve_once(proc: &OwnedFd, name: &CStr) {
    let place = |dir: &OwnedFd, name: &CStr| {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(dir, name, flags, Mode::empty()).unwrap()
    };
    let anew = |fd: &OwnedFd, flags| {
        rustix::fs::openat(proc, DecInt::from_fd(fd), flags, Mode::empty()).unwrap()
    };
    let mode = Mode::from_raw_mode(0o755);
    let root = rustix::fs::openat(CWD, "/", OFlags::PATH, Mode::empty()).unwrap();
    let dir = place(&root, name);
    let file = anew(&place(&dir, c"file"), OFlags::RDWR);
    rustix::io::pwritev(&file, &[std::io::IoSlice::new(b"L")], 0).unwrap();
    rustix::fs::ftruncate(&file, 1).unwrap();
    for one in ["a", "b"] {
        rustix::fs::mkdirat(&dir, one, mode).unwrap();
    }
    let (a, b) = (place(&dir, c"a"), place(&dir, c"b"));
    let (plain, exchange) = (RenameFlags::empty(), RenameFlags::EXCHANGE);
    // From one directory to another.
    rustix::fs::renameat_with(&dir, "file", &a, "moved", plain).unwrap();
    rustix::fs::renameat_with(&dir, "b", &a, "b", plain).unwrap();
    rustix::fs::symlinkat("moved", &b, "link").unwrap();
    rustix::fs::renameat_with(&a, "moved", &b, "link", exchange).unwrap();
    let moved = place(&b, c"link");
    let follow = AtFlags::SYMLINK_FOLLOW;
    rustix::fs::linkat(proc, DecInt::from_fd(&moved), &a, "hard", follow).unwrap();
    let nameless = OFlags::TMPFILE | OFlags::RDWR;
    let nameless = rustix::fs::openat(&a, ".", nameless, mode).unwrap();
    rustix::fs::linkat(proc, DecInt::from_fd(&nameless), &b, "named", follow).unwrap();
    drop(anew(&moved, OFlags::WRONLY | OFlags::TRUNC));
    for (one, kind) in [("fifo", FileType::Fifo), ("socket", FileType::Socket)] {
        rustix::fs::mknodat(&a, one, kind, mode, 0).unwrap();
    }
    let device = rustix::fs::mknodat(&a, "null", FileType::CharacterDevice, mode, 0x103);
    device.unwrap_err();
    let list = anew(&a, OFlags::RDONLY | OFlags::DIRECTORY);
    let mut space = [std::mem::MaybeUninit::uninit(); 2048];
    let mut entries = RawDir::new(list.as_fd(), &mut space);
    let mut names = Vec::new();
    while let Some(entry) = entries.next() {
        names.push(entry.unwrap().file_name().to_str().unwrap().to_owned());
    }
    names.sort();
    assert_eq!(names, [".", "..", "b", "fifo", "hard", "moved", "socket"]);
    for one in ["fifo", "hard", "moved", "socket"] {
        rustix::fs::unlinkat(&a, one, AtFlags::empty()).unwrap();
    }
    for one in ["link", "named"] {
        rustix::fs::unlinkat(&b, one, AtFlags::empty()).unwrap();
    }
    rustix::fs::unlinkat(&a, "b", AtFlags::REMOVEDIR).unwrap();
}
