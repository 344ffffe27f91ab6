//! What containers do with the cgroup that is theirs.

use bulkhead_agent_api::agent::Stdio;
use rustix::fs::{Mode, OFlags};
use serde_json::Value;

use crate::support::{Host, block_on, busybox_spec, read_until};

/// A specification of a container that may write to its cgroup.
fn with_cgroups(script: &str) -> Value {
    let mut spec = busybox_spec(["sh", "-c", script]);
    writable_cgroups(&mut spec);
    spec
}

/// Has the container mount its cgroup such that it may write there.
pub(crate) fn writable_cgroups(spec: &mut Value) {
    for mount in spec["mounts"].as_array_mut().unwrap() {
        if mount["type"] == "cgroup" {
            mount["options"] = ["nosuid", "noexec", "nodev"].as_slice().into();
        }
    }
}

#[test]
fn an_exec_follows_a_first_process_that_has_moved_below_its_cgroup() {
    block_on(async |host: &mut Host| {
        // As systemd does, and Docker in a container.
        let script = "cd /sys/fs/cgroup; mkdir init.scope && echo $$ > init.scope/cgroup.procs
            for c in $(cat cgroup.controllers); do echo +$c > cgroup.subtree_control; done
            cat cgroup.subtree_control; echo ready; exec sleep 100";
        let (stdio, [_in, mut stdout, _err]) = host.pipes().await;
        let id = host.create(with_cgroups(script), stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let said = read_until(&mut stdout, "ready\n").await;
        if said == "ready\n" {
            eprintln!("half of it skipped: cgroup v2 has no controller here");
        }
        let process = busybox_spec(["cat", "/proc/self/cgroup"])["process"].clone();
        let expected = match said.as_str() {
            "ready\n" => "0::/",
            _ => "0::/init.scope",
        };
        for _ in 0..3 {
            let ran = host.run_exec(&id, &process).await;
            let unified = ran.stdout.lines().find(|line| line.starts_with("0::"));
            assert_eq!(unified, Some(expected), "{}", ran.stderr);
        }
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn an_exec_gets_into_a_container_that_is_at_its_limit_of_processes_f58() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("pids") {
            return;
        }
        let script = "for i in 1 2 3 4 5 6 7; do sleep 100 & done; echo ready; exec sleep 100";
        let mut spec = busybox_spec(["sh", "-c", script]);
        spec["linux"]["resources"]["pids"] = serde_json::json!({"limit": 8});
        let (stdio, [_in, mut stdout, _err]) = host.pipes().await;
        let id = host.create(spec, stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        read_until(&mut stdout, "ready\n").await;
        let script = "echo $$ inside; exec cat /proc/self/cgroup /sys/fs/cgroup/pids.current";
        let process = busybox_spec(["sh", "-c", script])["process"].clone();
        let ran = host.run_exec(&id, &process).await;
        let said: Vec<_> = ran.stdout.lines().collect();
        assert!(
            said[0].ends_with(" inside"),
            "{} {}",
            ran.stdout,
            ran.stderr
        );
        assert_eq!(said[1..], ["0::/", "9"], "{}", ran.stderr);
        host.kill_all(&id, 9).await.unwrap();
        host.wait(&id, "").await.unwrap();
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_deep_tree_of_cgroups_is_bounded_listed_and_removed() {
    block_on(async |host: &mut Host| {
        let spec = busybox_spec(["sleep", "100"]);
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        // The whole path of the last one is longer than the kernel takes.
        let name = "n".repeat(200);
        let flags = OFlags::RDONLY | OFlags::DIRECTORY;
        let mut at = rustix::fs::open(host.cgroup(&id), flags, Mode::empty()).unwrap();
        let mut depth = 0;
        let refused = loop {
            if let Err(errno) = rustix::fs::mkdirat(&at, &name, Mode::from_raw_mode(0o755)) {
                break errno;
            }
            depth += 1;
            at = rustix::fs::openat(&at, &name, flags, Mode::empty()).unwrap();
        };
        assert_eq!((depth, refused), (64, rustix::io::Errno::AGAIN));
        let pids = host.pids(&id).await;
        let procs = rustix::fs::openat(&at, "cgroup.procs", OFlags::WRONLY, Mode::empty());
        rustix::io::write(procs.unwrap(), pids[0].to_string().as_bytes()).unwrap();
        assert_eq!(host.pids(&id).await, pids);
        host.kill_all(&id, 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
        assert_eq!(host.cgroups(), 0);
    });
}
