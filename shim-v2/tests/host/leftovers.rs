//! Who removes what, when shims of one id follow each other or end badly.

use std::{fs, path::Path};

use rustix::process::{Signal, kill_process};
use serde_json::json;

use crate::support::*;

#[test]
fn a_shim_at_its_end_takes_nothing_from_its_successor() {
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
