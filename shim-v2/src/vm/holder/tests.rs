use std::{fs, path::PathBuf, time::Duration};

use nix::sched::{CloneFlags, unshare};
use rustix::process::Pid;
use tokio::time::timeout;

use super::*;
use crate::{
    cgroup::{Cgroup, Place},
    statedir::{HostProcess, ended, signal},
};

fn own_network() -> OwnedFd {
    File::open("/proc/thread-self/ns/net").unwrap().into()
}

fn quarters() -> Quarters {
    Quarters::new(None, own_network())
}

/// What the kernel tells of it.
fn told(holder: &Holder, name: &str) -> PathBuf {
    format!("/proc/{}/{name}", holder.pid()).into()
}

fn pidfd(holder: &Holder) -> OwnedFd {
    let process = HostProcess::of(holder.pid().cast_signed()).unwrap();
    process.open().unwrap().unwrap()
}

/// The share of memory that is its own, in KiB.
fn memory(holder: &Holder) -> u64 {
    let text = fs::read_to_string(told(holder, "smaps_rollup")).unwrap();
    let line = text.lines().find(|line| line.starts_with("Pss:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

#[test]
fn a_holder_has_a_name_and_next_to_nothing_else_ta_12() {
    let holder = quarters().hold("default/c1", None).unwrap();
    let words = fs::read(told(&holder, "cmdline")).unwrap();
    assert_eq!(words, b"bulkhead-task\0default/c1\0");
    assert!(fs::read(told(&holder, "environ")).unwrap().is_empty());
    // It takes a moment to call itself so, and to close what it was made with.
    let mut tries = 0;
    while fs::read(told(&holder, "comm")).unwrap() != b"bulkhead-task\n"
        || fs::read_dir(told(&holder, "fd")).unwrap().count() > 0
    {
        tries += 1;
        assert!(tries < 1000);
        std::thread::sleep(Duration::from_millis(5));
    }
    let memory = memory(&holder);
    assert!(memory <= 32, "{memory} KiB");
    let stat = fs::read_to_string(told(&holder, "stat")).unwrap();
    let session = stat.rsplit_once(')').unwrap().1.split_whitespace().nth(3);
    assert_eq!(session, Some(holder.pid().to_string().as_str()));
}

#[test]
fn where_its_program_cannot_run_a_holder_is_a_copy_that_sleeps() {
    let quarters = quarters();
    let unfit = File::open("/dev/null").unwrap();
    quarters.program.set(Some(unfit.into())).unwrap();
    let holder = quarters.hold("default/c1", None).unwrap();
    assert_eq!(fs::read_dir(told(&holder, "fd")).unwrap().count(), 0);
    let pidfd = pidfd(&holder);
    assert!(!ended(&pidfd, 50));
    drop(holder);
    assert!(ended(&pidfd, 5_000));
}

#[test]
fn a_holder_is_in_the_network_namespace_that_it_is_given_ta_09() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let own = fs::read_link("/proc/thread-self/ns/net").unwrap();
    let other = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        own_network()
    });
    let other = other.join().unwrap();
    let quarters = quarters();
    let here = quarters.hold("here", None).unwrap();
    let there = quarters.hold("there", Some(other.as_fd())).unwrap();
    assert_eq!(fs::read_link(told(&here, "ns/net")).unwrap(), own);
    assert_ne!(fs::read_link(told(&there, "ns/net")).unwrap(), own);
    let file = File::open("/dev/null").unwrap();
    let error = quarters.hold("nowhere", Some(file.as_fd())).unwrap_err();
    assert!(error.text().contains("Invalid argument"), "{error:?}");
}

#[test]
fn a_holder_ends_with_whoever_made_it_lc_67() {
    let (quarters, (sender, receiver)) = (quarters(), std::sync::mpsc::channel());
    std::thread::spawn(move || {
        let holder = quarters.hold("default/c1", None).unwrap();
        sender.send(pidfd(&holder)).unwrap();
        std::mem::forget(holder);
    });
    assert!(ended(&receiver.recv().unwrap(), 5000));
}

#[tokio::test]
async fn only_sigkill_ends_a_holder_and_that_is_seen_ta_13() {
    let holder = quarters().hold("default/c1", None).unwrap();
    let process = pidfd(&holder);
    for other in [Signal::TERM, Signal::INT, Signal::HUP, Signal::USR1] {
        signal(&process, other).unwrap();
    }
    let seen = timeout(Duration::from_millis(50), holder.ended()).await;
    assert!(seen.is_err(), "it has ended");
    signal(&process, Signal::KILL).unwrap();
    let seen = timeout(Duration::from_secs(5), holder.ended()).await;
    assert!(seen.is_ok(), "nobody has seen it");
}

#[test]
fn a_holder_that_is_dropped_is_reaped() {
    let holder = quarters().hold("default/c1", None).unwrap();
    let (pid, pidfd) = (holder.pid(), pidfd(&holder));
    drop(holder);
    assert!(ended(&pidfd, 5_000));
    // One that took its time is reaped with the next.
    drop(quarters().hold("default/c2", None).unwrap());
    let pid = Pid::from_raw(pid.cast_signed()).unwrap();
    assert_eq!(rustix::process::test_kill_process(pid), Err(Errno::SRCH));
}

#[test]
fn a_holder_is_born_next_to_the_vmm() {
    let name = format!("/bulkhead-test-{}-held", std::process::id());
    let state = tempfile::tempdir().unwrap();
    let place = Place::new(&name).unwrap().unwrap();
    let Ok(Some(cgroup)) = Cgroup::make(&place, 5, state.path()) else {
        println!("skipped: no cgroups can be made here");
        return;
    };
    let entrance = cgroup.entrance().try_clone().unwrap();
    let quarters = Quarters::new(Some(entrance), own_network());
    let holder = quarters.hold("default/c1", None).unwrap();
    let places = fs::read_to_string(told(&holder, "cgroup")).unwrap();
    assert!(places.contains(&name), "{places}");
    drop(holder);
    drop(cgroup);
    // Where there is no cgroup any more there is no holder.
    assert!(quarters.hold("default/c2", None).is_err());
}
