//! What single operations cost: requests that Linux's own client makes for them.

use std::{collections::BTreeMap, fs::File, io::Write};

use rustix::fs::{AtFlags, Mode, OFlags, mkdirat, openat, renameat, symlinkat, unlinkat};

use super::{
    linux::{Linux, wait_for},
    *,
};

/// So often an operation is done, each time with another name.
const TIMES: usize = 20;

/// Requests of one operation after the other in a directory, all in all: the number of
/// each kind, but for the forgetting and what the way to the directory costs.
fn requests(linux: &Linux, work: impl Fn(&File, &str)) -> BTreeMap<u32, usize> {
    let dir = File::open(linux.place.0.join("in/d")).unwrap();
    // The first of its kind may find out what is not offered.
    work(&dir, "first");
    settle(linux);
    linux.counts().clear();
    for number in 0..TIMES {
        work(&dir, &number.to_string());
    }
    settle(linux);
    let mut counts = linux.counts().clone();
    counts.retain(|&opcode, _| opcode != FORGET && opcode != BATCH_FORGET);
    counts
}

/// Waits until files that were closed are given back.
fn settle(linux: &Linux) {
    let mut seen = None;
    wait_for(|| {
        std::thread::sleep(std::time::Duration::from_millis(20));
        let now = linux.counts().clone();
        seen.replace(now.clone()) == Some(now)
    });
}

fn create(dir: &File, name: &str, flags: OFlags) -> File {
    let flags = flags | OFlags::CREATE | OFlags::WRONLY | OFlags::CLOEXEC;
    openat(dir, name, flags, Mode::from_raw_mode(0o644))
        .unwrap()
        .into()
}

/// An operation, and at most how many requests it costs in a shared mount and in a
/// private one.
///
/// Before there were policies, making a file cost 4 requests and removing one 3; a
/// shared mount has one more now for each file that is closed, for its locks, and one for
/// each name that it was told too long ago, if this machine is slow. The guest's
/// kernel is patched and makes fewer in a private one: 2, 3, 2, 2, 2, 1, 1 and 1.
type Operation = (&'static str, (usize, usize), fn(&File, &str));

/// In their order: each needs what those before it made.
const OPERATIONS: [Operation; 8] = [
    ("create", (5, 3), |dir, name| {
        create(dir, name, OFlags::TRUNC);
    }),
    ("create and write", (7, 5), |dir, name| {
        let mut file = create(dir, &format!("w{name}"), OFlags::TRUNC);
        file.write_all(&[b'x'; 1024]).unwrap();
    }),
    ("mkdir", (3, 3), |dir, name| {
        mkdirat(dir, format!("d{name}"), Mode::from_raw_mode(0o755)).unwrap();
    }),
    ("symlink", (3, 3), |dir, name| {
        symlinkat("target", dir, format!("l{name}")).unwrap();
    }),
    ("rename", (5, 3), |dir, name| {
        renameat(dir, name, dir, format!("r{name}")).unwrap();
    }),
    ("unlink", (4, 2), |dir, name| {
        unlinkat(dir, format!("r{name}"), AtFlags::empty()).unwrap();
    }),
    ("unlink, written", (4, 2), |dir, name| {
        unlinkat(dir, format!("w{name}"), AtFlags::empty()).unwrap();
    }),
    ("rmdir", (3, 2), |dir, name| {
        unlinkat(dir, format!("d{name}"), AtFlags::REMOVEDIR).unwrap();
    }),
];

#[test]
fn making_and_removing_costs_no_more_requests_than_was_counted() {
    for policy in [Policy::Shared, Policy::Private] {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        linux.sh("mkdir d");
        for (name, (shared, private), work) in OPERATIONS {
            let counts = requests(&linux, work);
            let most = match policy {
                Policy::Shared => shared,
                Policy::Private => private,
            };
            let total: usize = counts.values().sum();
            assert!(
                total <= most * TIMES + 1,
                "{policy:?}, {name}: {total} of {TIMES}: {counts:?}"
            );
        }
    }
}
