//! What the processes of a running pod may do, held against the tables in the
//! source.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{collections::HashSet, fs, path::Path};

use bulkhead_tests::{BUSYBOX, Command};
use bulkhead_vmm::jail::{posture, threads::ThreadKind};

/// The one process of this name.
fn process(name: &str) -> String {
    let pids = Command::new("pgrep", ["-x", name]).run().success();
    let mut pids = pids.lines().map(str::to_owned);
    let pid = pids.next().unwrap();
    assert_eq!(pids.next(), None);
    pid
}

#[test]
fn every_thread_of_the_vmm_has_what_the_table_says() {
    let script = "echo ready; read line; echo $line > /file; cat /file";
    let run = Command::bulkhead(["run", "-i", "--rm", BUSYBOX, "--", "sh", "-c", script]).start();
    run.wait_for_output("ready");
    let vmm = Path::new("/proc").join(process("bulkhead-vmm"));
    let mut kinds = HashSet::new();
    let mut user = None;
    for task in fs::read_dir(vmm.join("task")).unwrap() {
        let task = task.unwrap().path();
        let read = |name: &str| fs::read_to_string(task.join(name)).unwrap();
        let name = read("comm");
        // KVM's own, which never leaves the kernel.
        if name.starts_with("kvm-") {
            continue;
        }
        let kind = ThreadKind::of(name.trim_end()).unwrap_or_else(|| panic!("{name}"));
        let status = read("status");
        let ids = status.lines().find_map(|line| line.strip_prefix("Uid:\t"));
        let id: u32 = ids.unwrap().split('\t').next().unwrap().parse().unwrap();
        if kind != ThreadKind::Files {
            assert_eq!(*user.get_or_insert(id), id, "{name}");
        }
        kinds.insert((kind, status));
    }
    // Far above what any account of the host has, and not root's.
    let user = user.unwrap();
    assert!(user > 0x7000_0000, "{user}");
    for (kind, status) in &kinds {
        posture::check(*kind, user, status).unwrap();
    }
    let kinds: HashSet<_> = kinds.into_iter().map(|(kind, _)| kind).collect();
    for kind in ThreadKind::ALL {
        assert_eq!(kinds.contains(&kind), kind != ThreadKind::Disk, "{kind:?}");
    }
    // It is still good for something.
    run.write("line\n");
    assert!(run.wait().success().ends_with("line\n"));
}
