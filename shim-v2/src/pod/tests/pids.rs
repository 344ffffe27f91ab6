//! The processes of the host that stand for those of a pod.

use std::{fs, os::fd::OwnedFd};

use rustix::process::Signal;
use serde_json::json;

use super::{
    super::*,
    harness::{Bench, run},
};
use crate::{
    io::Stdio,
    statedir::{HostProcess, ended, signal},
};

impl Bench {
    fn holder(&self, name: &str) -> OwnedFd {
        let process = HostProcess::of(self.pid(name).cast_signed()).unwrap();
        process.open().unwrap().unwrap()
    }
}

/// Kills a process from outside, and waits until it is dead.
fn murder(process: &OwnedFd) {
    signal(process, Signal::KILL).unwrap();
    assert!(ended(process, 5000));
}

#[test]
fn a_process_has_a_pid_of_its_own_from_its_making_until_its_end_was_told_ta_09_ta_10() {
    run(async |bench| {
        let pid = bench.create("c").await.unwrap();
        let holder = bench.holder("c");
        assert_eq!(
            (bench.start("c").await.unwrap(), bench.pid("c")),
            (pid, pid)
        );
        bench.add("c/e", Stdio::default()).unwrap();
        assert_eq!(bench.pid("c/e"), 0, "there is no process yet");
        let exec_pid = bench.start("c/e").await.unwrap();
        let exec_holder = bench.holder("c/e");
        assert!(pid != exec_pid && bench.pid("c/e") == exec_pid);
        for (pid, label) in [(pid, "default/c"), (exec_pid, "default/c/e")] {
            let words = std::fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap();
            assert_eq!(words, format!("bulkhead-task\0{label}\0"));
        }
        bench.agent.exits("c", "e", 0);
        bench.wait("c/e").await;
        bench.agent.exits("c", "", 7);
        bench.wait("c").await;
        for (name, holder) in [("c", holder), ("c/e", exec_holder)] {
            assert!(ended(&holder, 5000), "{name}");
        }
        // What was told does not change any more.
        assert_eq!((bench.pid("c"), bench.pid("c/e")), (pid, exec_pid));
        bench.delete("c").await.unwrap();
        for event in bench.told.events() {
            match event {
                Event::Create(event) => assert_eq!(event.pid, pid),
                Event::Start(event) => assert_eq!(event.pid, pid),
                Event::ExecStarted(event) => assert_eq!(event.pid, exec_pid),
                Event::Exit(event) if event.id == "e" => assert_eq!(event.pid, exec_pid),
                Event::Exit(event) => assert_eq!(event.pid, pid),
                Event::Delete(event) => assert_eq!(event.pid, pid),
                Event::ExecAdded(_)
                | Event::Oom(_)
                | Event::Paused(_)
                | Event::Resumed(_)
                | Event::Carried { .. } => {}
            }
        }
    });
}

#[test]
fn whoever_kills_a_pid_kills_that_process_alone_ta_11_ta_13() {
    run(async |bench| {
        bench.running("c").await;
        bench.running("other").await;
        bench.executing("c/e").await;
        murder(&bench.holder("c/e"));
        assert_eq!(bench.wait("c/e").await, 137);
        assert_eq!(bench.agent.last_call(), "Kill c/e 9");
        assert!(!ended(&bench.holder("c"), 0));
        murder(&bench.holder("c"));
        assert_eq!(bench.wait("c").await, 137);
        bench.delete("c").await.unwrap();
        assert!(!ended(&bench.holder("other"), 0));
        assert_eq!(bench.told_of("/tasks/exit other"), Vec::<String>::new());
    });
}

#[test]
fn a_container_that_waits_for_its_start_can_be_killed_by_its_pid_ta_13() {
    run(async |bench| {
        bench.create("c").await.unwrap();
        murder(&bench.holder("c"));
        assert_eq!(bench.wait("c").await, 137);
    });
}

#[test]
fn pids_are_those_of_what_runs_and_that_of_the_first_process_until_delete_lc_63() {
    run(async |bench| {
        let id = ContainerId::new("c").unwrap();
        let pids = || {
            let pids = bench.pod.pids(&id);
            pids.map(|pids| pids.into_iter().map(|held| held.pid).collect::<Vec<_>>())
        };
        assert_eq!(pids().unwrap_err().code(), Code::NOT_FOUND);
        let pid = bench.create("c").await.unwrap();
        assert_eq!(pids().unwrap(), [pid]);
        bench.start("c").await.unwrap();
        bench.add("c/added", Stdio::default()).unwrap();
        bench.executing("c/e").await;
        assert_eq!(pids().unwrap(), [pid, bench.pid("c/e")]);
        bench.agent.exits("c", "e", 0);
        bench.wait("c/e").await;
        assert_eq!(pids().unwrap(), [pid]);
        // The guest is not asked.
        bench.guest().ends(255, "guest panic");
        bench.wait("c").await;
        assert_eq!(pids().unwrap(), [pid]);
        bench.delete("c").await.unwrap();
        assert_eq!(pids().unwrap_err().code(), Code::NOT_FOUND);
    });
}

#[test]
fn what_comes_to_nothing_leaves_no_pid_ta_17() {
    run(async |bench| {
        bench.running("c").await;
        let children = || {
            let list = format!("/proc/self/task/{}/children", rustix::thread::gettid());
            fs::read_to_string(list).unwrap().split_whitespace().count()
        };
        let before = children();
        bench.agent.refuse(
            "Create",
            Code::INTERNAL,
            bulkhead_agent_api::agent::cause::Kind::OTHER,
        );
        bench.create("refused").await.unwrap_err();
        bench.agent.refuse(
            "Exec",
            Code::INTERNAL,
            bulkhead_agent_api::agent::cause::Kind::OTHER,
        );
        bench.add("c/e", Stdio::default()).unwrap();
        bench.start("c/e").await.unwrap_err();
        assert_eq!(bench.wait("c/e").await, 255);
        tokio::task::yield_now().await;
        assert_eq!(children(), before);
    });
}

#[test]
fn a_pid_is_in_the_network_namespace_that_the_specification_names_ta_09() {
    run(async |bench| {
        let own = "/proc/thread-self/ns/net";
        let unshared = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            (fs::read_link(own).unwrap(), fs::File::open(own).unwrap())
        });
        let (named_namespace, file) = unshared.join().unwrap();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        let request = bench.request("c");
        let set = |path: &str| {
            let place = request.bundle.join("config.json");
            let mut spec: serde_json::Value =
                serde_json::from_slice(&fs::read(&place).unwrap()).unwrap();
            spec["linux"]["namespaces"] =
                json!([{"type": "network", "path": path}, {"type": "mount"}]);
            fs::write(place, spec.to_string()).unwrap();
        };
        let fifo = bench.fifo("fifo");
        for (wrong, code) in [
            (fifo.as_str(), Code::INVALID_ARGUMENT),
            ("/nowhere", Code::NOT_FOUND),
        ] {
            set(wrong);
            let error = bench.pod.create(request.clone()).await.unwrap_err();
            assert_eq!(error.code(), code, "{}", error.text());
            assert!(error.text().contains(wrong), "{}", error.text());
        }
        set(&path);
        bench.pod.create(request.clone()).await.unwrap();
        bench.start("c").await.unwrap();
        bench.executing("c/e").await;
        for name in ["c", "c/e"] {
            let link = fs::read_link(format!("/proc/{}/ns/net", bench.pid(name)));
            assert_eq!(link.unwrap(), named_namespace, "{name}");
        }
    });
}
