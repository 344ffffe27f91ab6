//! Who removes what, when shims of one id follow each other or end badly.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use containerd_shim_protos::{
    api::{ConnectRequest, DeleteResponse},
    protobuf::Message,
};
use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::support::*;

#[test]
fn a_shim_at_its_end_takes_nothing_from_its_successor_ta_07() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let mut task = connect(&host.start(&bundle, "c1")).await;
        for _ in 0..5 {
            let (_, old) = process(&task).await;
            shutdown(&task, "c1").await;
            // The old one has answered, but has not ended yet.
            task = connect(&host.start(&bundle, "c1")).await;
            assert!(bulkhead_shim::statedir::ended(&old, 5000));
            let (pid, _) = process(&task).await;
            let dir = Path::new("/run/bulkhead/default/c1");
            let record = fs::read_to_string(dir.join("processes.json")).unwrap();
            let record: serde_json::Value = serde_json::from_str(&record).unwrap();
            assert_eq!(record["shim"]["pid"], pid.as_raw_nonzero().get());
            assert!(dir.join("share").is_dir());
            let maps = fs::read_to_string(format!("/proc/{}/mounts", pid.as_raw_nonzero()));
            assert!(maps.unwrap().contains("/run/bulkhead/default/c1/share"));
        }
        shutdown(&task, "c1").await;
    });
}

#[test]
fn many_starts_on_a_stale_socket_make_one_shim_lc_32() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        for _ in 0..5 {
            let task = connect(&host.start(&bundle, "c1")).await;
            murder(&task).await;
            let starts: Vec<_> = (0..6)
                .map(|_| host.command(&bundle, "c1", "start").spawn().unwrap())
                .collect();
            for start in starts {
                let output = start.wait_with_output().unwrap();
                assert!(output.status.success(), "{output:?}");
            }
            assert_eq!(shims(&host.containerd()).len(), 1);
            let address = fs::read_to_string(bundle.join("address")).unwrap();
            shutdown(&connect(&address).await, "c1").await;
            host.assert_clean();
        }
    });
}

#[test]
fn an_address_that_cannot_be_written_leaves_no_shim_lc_28() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        fs::create_dir_all(bundle.join("address/in the way")).unwrap();
        let output = host.run(&bundle, "c1", "start");
        assert!(!output.status.success() && output.stdout.is_empty());
        assert_eq!(String::from_utf8(output.stderr).unwrap().lines().count(), 1);
    });
}

#[test]
fn what_a_full_disk_left_behind_does_not_block_the_next_start_f9() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        murder(&connect(&host.start(&bundle, "c1")).await).await;
        fs::write("/run/bulkhead/default/c1/reason.new", "hal").unwrap();
        let task = connect(&host.start(&bundle, "c1")).await;
        murder(&task).await;
        fs::write("/run/bulkhead/default/c1/reason.new", "hal").unwrap();
        let output = host.run(&bundle, "c1", "delete");
        assert!(output.status.success(), "{output:?}");
    });
}

#[test]
fn delete_finds_the_pod_of_a_label_whether_its_shim_lives_or_not_lc_49() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let mut spec = spec();
        spec["annotations"] = json!({"io.containerd.runc.v2.group": "group"});
        host.write_spec(&bundle, &spec);
        for dead in [false, true] {
            for bundle_is_gone in [false, true] {
                let task = connect(&host.start(&bundle, "c1")).await;
                assert!(Path::new("/run/bulkhead/default/group").is_dir());
                if dead {
                    murder(&task).await;
                }
                if bundle_is_gone {
                    fs::remove_file(bundle.join("config.json")).unwrap();
                }
                let output = host.run(&bundle, "c1", "delete");
                assert!(
                    output.status.success() && output.stderr.is_empty(),
                    "{output:?}"
                );
                host.assert_clean();
                host.write_spec(&bundle, &spec);
            }
        }
    });
}

#[test]
fn signals_that_ask_for_a_report_do_not_end_the_shim_lc_42() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let task = connect(&host.start(&bundle, "c1")).await;
        let (pid, _) = process(&task).await;
        for signal in [Signal::USR1, Signal::USR2, Signal::HUP, Signal::PIPE] {
            kill_process(pid, signal).unwrap();
            assert_eq!(process(&task).await.0, pid, "{signal:?}");
        }
        shutdown(&task, "c1").await;
    });
}

#[test]
fn bundles_of_a_pod_have_the_address_of_its_one_shim_which_a_member_does_not_end_lc_40_lc_48() {
    Host::with(async |host: &Host| {
        let (sandbox, member) = (host.bundle("pod"), host.bundle("c1"));
        for (bundle, role) in [(&sandbox, "sandbox"), (&member, "container")] {
            let mut spec = spec();
            spec["annotations"] = json!({
                "io.kubernetes.cri.sandbox-id": "pod",
                "io.kubernetes.cri.container-type": role,
            });
            host.write_spec(bundle, &spec);
        }
        let address = host.start(&sandbox, "pod");
        let starts: Vec<_> = [(&sandbox, "pod"), (&member, "c1"), (&member, "c1")]
            .map(|(bundle, id)| host.command(bundle, id, "start").spawn().unwrap())
            .into();
        for start in starts {
            let output = start.wait_with_output().unwrap();
            assert_eq!(output.stdout, address.as_bytes(), "{output:?}");
            assert!(output.stderr.is_empty(), "{output:?}");
        }
        for bundle in [&sandbox, &member] {
            assert_eq!(fs::read_to_string(bundle.join("address")).unwrap(), address);
        }
        assert_eq!(shims(&host.containerd()).len(), 1);
        // What is left of a member is no matter of the pod, whatever else is in it.
        let output = host.run(&member, "c1", "delete");
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        let task = connect(&address).await;
        process(&task).await;
        shutdown(&task, "pod").await;
    });
}

#[test]
fn delete_tells_the_end_that_the_shim_has_recorded_lc_53() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let end = json!({"status": 7, "seconds": 1_700_000_000, "nanos": 5});
        for (record, told) in [
            (
                json!({"c1": {"pid": 4_000_000, "end": end}}),
                (4_000_000, 7, Some(1_700_000_000)),
            ),
            (
                json!({"c1": {"pid": 4_000_000, "end": null}}),
                (4_000_000, 137, None),
            ),
            (json!({"other": {"pid": 3, "end": end}}), (0, 137, None)),
            (json!("broken"), (0, 137, None)),
        ] {
            murder(&connect(&host.start(&bundle, "c1")).await).await;
            let file = "/run/bulkhead/default/c1/tasks.json";
            fs::write(file, record.to_string()).unwrap();
            let begun = Instant::now();
            let output = host.run(&bundle, "c1", "delete");
            assert!(begun.elapsed() < Duration::from_secs(2));
            assert!(
                output.status.success() && output.stderr.is_empty(),
                "{output:?}"
            );
            let answer = DeleteResponse::parse_from_bytes(&output.stdout).unwrap();
            let (pid, status, at) = told;
            assert_eq!((answer.pid, answer.exit_status), (pid, status));
            let seconds = answer.exited_at.seconds;
            assert!(at.map_or(seconds > 1_700_000_000, |at| seconds == at));
            host.assert_clean();
        }
    });
}

#[test]
fn delete_unmounts_the_root_that_containerd_could_not_lc_52() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let root = bundle.join("rootfs");
        let flags = rustix::mount::MountFlags::empty();
        rustix::mount::mount("test", &root, "tmpfs", flags, None).unwrap();
        let busy = fs::File::create(root.join("busy")).unwrap();
        let output = host.run(&bundle, "c1", "delete");
        assert!(
            output.status.success() && output.stderr.is_empty(),
            "{output:?}"
        );
        assert_eq!(fs::read_dir(&root).unwrap().count(), 0);
        drop(busy);
    });
}

#[test]
fn a_burst_of_connections_is_answered_for_every_id_lc_62_ta_70() {
    Host::with(async |host: &Host| {
        let bundle = host.bundle("c1");
        let address = host.start(&bundle, "c1");
        let connects = (0..100).map(|n| {
            let address = &address;
            async move {
                let task = connect(address).await;
                let id = if n % 2 == 0 { "c1" } else { "unknown" };
                let request = ConnectRequest {
                    id: id.into(),
                    ..ConnectRequest::default()
                };
                task.connect(context(), &request).await.unwrap().task_pid
            }
        });
        let pids = futures::future::join_all(connects).await;
        assert!(pids.iter().all(|pid| *pid == 0));
        shutdown(&connect(&address).await, "c1").await;
    });
}
