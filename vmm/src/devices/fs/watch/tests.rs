use std::{
    os::fd::OwnedFd,
    process::Command,
    time::{Duration, Instant},
};

use nix::{
    sys::stat::{SFlag, mknod},
    unistd::truncate,
};
use rustix::{
    event::Timespec,
    fs::{Mode, OFlags},
};

use super::{super::file::statx_at, *};
use crate::{
    config::Policy,
    devices::{
        Device, Io, Worker,
        fs::{
            file::statx,
            node::{About, Birth, Identity},
            share::Caller,
            table::ROOT,
        },
        notices::Notices,
        testing::{self, WRITE},
    },
    event_loop::event_fd,
    jail,
};

/// Buffers of the driver, one for each descriptor.
const BUFFERS: u64 = 0x1_0000;
const SIZE: u32 = 284;

/// A share in a new directory `v`, and a driver that takes notices.
struct Watched {
    dir: tempfile::TempDir,
    shared: Arc<Shared>,
    guest: testing::Guest,
    heard: Vec<Notice>,
    _worker: Box<dyn Worker>,
}

impl Watched {
    fn new(limit: usize) -> Watched {
        let dir = tempfile::tempdir().unwrap();
        let open = |path: &std::path::Path| -> OwnedFd {
            rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap()
        };
        let proc_self_fd = jail::enter(None).unwrap().proc_self_fd().unwrap();
        let root = open(dir.path());
        let mut shared = Shared::new(root, proc_self_fd, false, Policy::Shared, 4096).unwrap();
        let mut guest = testing::Guest::new();
        for index in 0..16 {
            guest
                .driver
                .offer(&[(BUFFERS + u64::from(SIZE) * index, SIZE, WRITE)]);
        }
        let mut notices = Notices::default();
        let mut watch = Watch::new(Group::new().unwrap(), notices.outbox()).unwrap();
        watch.limit = limit;
        shared.watch = Some(watch);
        let ring = guest.driver.ring(testing::interrupt(&guest.irq));
        let io = Io {
            queues: vec![Some(ring)],
            features: 0,
        };
        let shared = Arc::new(shared);
        let its = Arc::clone(&shared);
        // It lives as long as the process.
        thread::spawn(move || its.watch.as_ref().unwrap().run(&its));
        Watched {
            _worker: notices.activate(io).unwrap(),
            dir,
            shared,
            guest,
            heard: Vec::new(),
        }
    }

    /// The number of a file, as the guest gets it by its path.
    fn look_up(&self, path: &str) -> u64 {
        path.split('/').fold(ROOT, |parent, name| {
            let node = self.shared.table.node(parent).unwrap();
            let name = CString::new(name).unwrap();
            self.shared.find(parent, &node, &name).unwrap().node
        })
    }

    /// Another process runs a line of the shell in the directory.
    fn others(&self, line: &str) {
        let mut shell = Command::new("sh");
        let shell = shell.args(["-ec", line]).current_dir(&self.dir);
        assert!(shell.status().unwrap().success(), "{line}");
    }

    /// Takes notices until there is this one; all since the last call.
    fn until(&mut self, is_last: impl Fn(&Notice) -> bool) -> Vec<Notice> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.heard.iter().any(&is_last) {
            assert!(Instant::now() < deadline, "only {:?}", self.heard);
            let limit = Timespec::try_from(Duration::from_millis(100)).unwrap();
            let irq = event_fd(&self.guest.irq);
            poll(&mut [PollFd::new(&irq, PollFlags::IN)], Some(&limit)).unwrap();
            let _ = self.guest.irq.read();
            for (head, length) in self.guest.driver.all_used() {
                let at = BUFFERS + u64::from(SIZE) * u64::from(head);
                let bytes = self.guest.driver.read(at, usize::try_from(length).unwrap());
                let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
                let long = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap());
                assert_eq!(word(24) as usize, bytes.len() - 28);
                self.heard.push(Notice {
                    node: long(0),
                    child: long(8),
                    mask: word(16),
                    cookie: word(20),
                    name: bytes[28..].to_vec(),
                });
                self.guest.driver.make_available(head);
                self.guest.driver.notify();
            }
        }
        std::mem::take(&mut self.heard)
    }

    /// What is heard of a line of the shell of another process: each single event,
    /// however the kernel has merged them.
    fn told(&mut self, line: &str) -> Vec<(u64, u64, u32, String)> {
        self.others(&format!("{line}; : > v/last"));
        let heard = self.until(|notice| notice.name == b"last" && notice.mask & CLOSED != 0);
        let mut told = Vec::new();
        for notice in heard.iter().filter(|notice| notice.name != b"last") {
            for event in EVENTS.into_iter().filter(|event| notice.mask & event != 0) {
                let name = String::from_utf8(notice.name.clone()).unwrap();
                let event = event | notice.mask & DIR;
                told.push((notice.node, notice.child, event, name));
            }
        }
        told.dedup();
        told
    }

    /// The same directory by another mount.
    fn look_up_elsewhere(&self, name: &CStr) -> u64 {
        let root = self.shared.table.node(ROOT).unwrap();
        let flags = OFlags::PATH | OFlags::CLOEXEC;
        let fd = rustix::fs::openat(&*root.fd().unwrap(), name, flags, Mode::empty()).unwrap();
        let mut identity = Identity::of(&statx(&fd).unwrap());
        identity.mount += 1000;
        let about = About {
            identity,
            birth: Birth::Unknown,
            kind: libc::S_IFDIR,
            salt: 0,
        };
        let node = self.shared.table.residents.admit(Some(fd), about);
        let (number, node) = self
            .shared
            .table
            .look_up(node, (ROOT, &root), None)
            .unwrap();
        let watch = self.shared.watch.as_ref().unwrap();
        watch.hold(number, &node.unwrap(), &root, name);
        number
    }

    fn marks(&self) -> usize {
        self.shared.watch.as_ref().unwrap().marks().by_key.len()
    }

    fn only_one_mark_stays(&self) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while self.marks() > 1 {
            assert!(Instant::now() < deadline, "the mark stays");
            thread::yield_now();
        }
    }
}

const CLOSED: u32 = libc::IN_CLOSE_WRITE;
const DIR: u32 = libc::IN_ISDIR;

/// In the order in which they happen.
const EVENTS: [u32; 9] = [
    libc::IN_CREATE,
    libc::IN_ATTRIB,
    libc::IN_MODIFY,
    CLOSED,
    libc::IN_MOVED_FROM,
    libc::IN_MOVED_TO,
    libc::IN_DELETE,
    libc::IN_DELETE_SELF,
    libc::IN_MOVE_SELF,
];

#[test]
fn what_others_change_is_told_by_the_numbers_that_the_guest_has() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir -p v/d; : > v/f; : > v/g; : > v/last");
    let (v, f, g) = (
        watched.look_up("v"),
        watched.look_up("v/f"),
        watched.look_up("v/g"),
    );
    let d = watched.look_up("v/d");
    let name = |name: &str| name.to_owned();
    assert_eq!(
        watched.told("echo x >> v/f; echo x > v/new"),
        [
            (v, f, libc::IN_MODIFY, name("f")),
            (v, f, CLOSED, name("f")),
            (v, 0, libc::IN_CREATE, name("new")),
            (v, 0, libc::IN_MODIFY, name("new")),
            (v, 0, CLOSED, name("new")),
        ]
    );
    assert_eq!(
        watched.told("chmod 700 v/d; chmod 600 v/f"),
        [
            (d, 0, libc::IN_ATTRIB, name("")),
            (v, f, libc::IN_ATTRIB, name("f")),
        ]
    );
    // The file that is replaced is no more; the one that is moved keeps its number.
    let (from, to) = (libc::IN_MOVED_FROM, libc::IN_MOVED_TO);
    let (moved, gone) = (libc::IN_MOVE_SELF, libc::IN_DELETE_SELF);
    assert_eq!(
        watched.told("mv v/f v/g; mv v/g v/d/h; mkdir v/e"),
        [
            (v, 0, from, name("f")),
            (v, g, gone, name("g")),
            (v, f, to, name("g")),
            (v, f, moved, name("g")),
            (v, 0, from, name("g")),
            (d, f, to, name("h")),
            (d, f, moved, name("h")),
            (v, 0, libc::IN_CREATE | DIR, name("e")),
        ]
    );
    assert_eq!(watched.look_up("v/d/h"), f);
    assert_eq!(
        watched.told("rm v/d/h v/new; rmdir v/d"),
        [
            (d, f, libc::IN_DELETE, name("h")),
            (d, f, gone, name("h")),
            (v, 0, libc::IN_DELETE, name("new")),
            (v, d, libc::IN_DELETE | DIR, name("d")),
            (v, d, gone | DIR, name("d")),
        ]
    );
}

#[test]
fn both_halves_of_a_rename_have_one_cookie() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir v; : > v/a; : > v/b");
    watched.look_up("v");
    watched.others("mv v/a v/c; mv v/b v/d");
    let heard = watched.until(|notice| notice.name == b"d");
    let cookies: Vec<u32> = heard.iter().map(|notice| notice.cookie).collect();
    assert_eq!(cookies, [COOKIE, COOKIE, COOKIE | 1, COOKIE | 1]);
}

#[test]
fn a_link_that_is_replaced_as_the_kubelet_does_it_is_told_fs_21() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir -p v/1 v/2; ln -s 1 v/..data");
    let (v, data) = (watched.look_up("v"), watched.look_up("v/..data"));
    let told = watched.told("ln -s 2 v/..data_tmp; mv -T v/..data_tmp v/..data");
    let name = |name: &str| name.to_owned();
    assert_eq!(
        told,
        [
            (v, 0, libc::IN_CREATE, name("..data_tmp")),
            (v, 0, libc::IN_MOVED_FROM, name("..data_tmp")),
            (v, data, libc::IN_DELETE_SELF, name("..data")),
            (v, 0, libc::IN_MOVED_TO, name("..data")),
            (v, 0, libc::IN_MOVE_SELF, name("..data")),
        ]
    );
}

#[test]
fn what_this_process_changes_is_not_told() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir v");
    let v = watched.look_up("v");
    let own = watched.dir.path().join("v/own");
    // The threads of the file server are threads of this process. Nothing is opened:
    // a program that another test starts meanwhile would have it open as well for a
    // moment, and its closing is another process's doing.
    let server = thread::spawn(move || {
        mknod(&own, SFlag::S_IFREG, nix::sys::stat::Mode::S_IRWXU, 0).unwrap();
        truncate(&own, 1).unwrap();
        std::fs::rename(&own, own.with_extension("new")).unwrap();
        std::fs::remove_file(own.with_extension("new")).unwrap();
    });
    server.join().unwrap();
    assert_eq!(
        watched.told("mkdir v/other"),
        [(v, 0, libc::IN_CREATE | DIR, "other".to_owned())]
    );
}

#[test]
fn a_name_that_comes_and_goes_is_told_as_it_ends() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir v; : > v/kept");
    let v = watched.look_up("v");
    // One process, whose events the kernel may merge.
    let program = "for my $name ('v/kept', 'v/gone') {
        for (1 .. $name eq 'v/kept' ? 3 : 2) {
            if (-e $name) { unlink $name or die } else { open my $file, '>', $name or die }
        }
    }";
    watched.others(&format!("perl -e \"{}\"", program.replace('$', "\\$")));
    watched.others(": > v/last");
    let heard = watched.until(|notice| notice.name == b"last");
    // However they were merged: the last word on whether a name is there holds.
    let last = |name: &[u8]| {
        let is_of = |notice: &&Notice| {
            notice.name == name && notice.mask & (libc::IN_CREATE | libc::IN_DELETE) != 0
        };
        let of = heard.iter().rfind(is_of).unwrap();
        assert_eq!(of.node, v);
        of.mask
    };
    for name in ["kept", "gone"] {
        let there = watched.dir.path().join("v").join(name).exists();
        let told = last(name.as_bytes());
        assert_eq!(told & libc::IN_DELETE == 0, there, "{name}: {told:x}");
    }
}

#[test]
fn a_forgotten_directory_is_not_told_of_and_makes_room_for_another() {
    let mut watched = Watched::new(2);
    watched.others("mkdir v a b c");
    watched.look_up("v");
    let a = watched.look_up("a");
    let b = watched.look_up("b");
    assert_eq!(watched.told("mkdir b/none"), [], "there is no room for it");
    watched.shared.forget(a, 1);
    watched.shared.forget(b, 1);
    watched.only_one_mark_stays();
    let c = watched.look_up("c");
    assert_eq!(
        watched.told("mkdir a/none c/one"),
        [(c, 0, libc::IN_CREATE | DIR, "one".to_owned())]
    );
    // One that was deleted meanwhile.
    watched.told("rmdir c/one c");
    watched.shared.forget(c, 1);
    watched.only_one_mark_stays();
}

#[test]
fn after_a_reset_of_the_driver_what_it_looks_up_again_is_told_of() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir v a");
    watched.look_up("a");
    watched.shared.destroy();
    let v = watched.look_up("v");
    assert_eq!(
        watched.told("mkdir a/none v/one"),
        [(v, 0, libc::IN_CREATE | DIR, "one".to_owned())]
    );
    assert_eq!(watched.marks(), 1);
}

#[test]
fn marks_that_cannot_be_taken_away_are_let_go_of_together() {
    let mut marks = Marks::default();
    for _ in 0..=STRAYS {
        assert!(!marks.anew);
        marks.stray();
    }
    assert!(marks.anew);
}

#[test]
fn a_directory_that_is_listed_is_marked_without_a_descriptor() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir -p v/sub");
    let v = watched.look_up("v");
    let node = watched.shared.table.node(v).unwrap();
    let status = statx_at(&*node.fd().unwrap(), c"sub").unwrap();
    let entry = watched.shared.entry_by_status((v, &node), c"sub", &status);
    let sub = entry.unwrap().unwrap().node;
    assert!(!watched.shared.table.node(sub).unwrap().is_resident());
    assert_eq!(
        watched.told("mkdir v/sub/one"),
        [(sub, 0, libc::IN_CREATE | DIR, "one".to_owned())]
    );
}

#[test]
fn a_guest_that_looks_up_and_forgets_without_end_makes_no_queue() {
    let watched = Watched::new(MARKS);
    watched.others("mkdir v");
    let (shared, stopped) = (&watched.shared, Duration::from_millis(300));
    let watch = shared.watch.as_ref().unwrap();
    let until = Instant::now() + stopped;
    while Instant::now() < until {
        let v = watched.look_up("v");
        shared.forget(v, 1);
        assert!(watch.marks().gone.len() <= 1);
    }
    let v = watched.look_up("v");
    assert!(watch.marks().by_node.contains_key(&v));
}

#[test]
fn what_is_done_by_one_mount_is_told_by_the_other() {
    let mut watched = Watched::new(MARKS);
    watched.others("mkdir v");
    let v = watched.look_up("v");
    let caller = Caller { uid: 0, gid: 0 };
    let shared = Arc::clone(&watched.shared);
    let make = |name: &CStr| shared.mkdir(caller, v, name, 0o755, 0);
    make(c"before").unwrap();
    let elsewhere = watched.look_up_elsewhere(c"v");
    make(c"d").unwrap();
    shared.rename(v, c"d", v, c"e", 0).unwrap();
    shared
        .unlink(v, c"e", rustix::fs::AtFlags::REMOVEDIR)
        .unwrap();
    make(c"end").unwrap();
    let heard = watched.until(|notice| notice.name == b"end");
    let told: Vec<_> = heard
        .iter()
        .map(|n| (n.node, n.mask, std::str::from_utf8(&n.name).unwrap()))
        .collect();
    assert_eq!(
        told,
        [
            (elsewhere, libc::IN_CREATE | DIR, "d"),
            (elsewhere, libc::IN_MOVED_FROM | DIR, "d"),
            (elsewhere, libc::IN_MOVED_TO | libc::IN_MOVE_SELF | DIR, "e"),
            (elsewhere, libc::IN_DELETE | DIR, "e"),
            (elsewhere, libc::IN_CREATE | DIR, "end"),
        ]
    );
    // Of what the host does both hear.
    watched.others("mkdir v/host");
    let heard = watched.until(|notice| notice.name == b"host" && notice.node == elsewhere);
    let nodes: Vec<u64> = heard.iter().map(|notice| notice.node).collect();
    assert_eq!(nodes, [v, elsewhere]);
}
