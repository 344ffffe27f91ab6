//! Creation, start, end and every way in which one of them is refused.

use bulkhead_agent_api::agent::Stdio;
use serde_json::{Value, json};

use crate::support::{Host, block_on, busybox_spec, refusal};

fn add_mount(spec: &mut Value, mount: Value) {
    spec["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_container_runs_its_program_and_reports_its_exit_ta_34_ta_46() {
    block_on(async |host: &mut Host| {
        let ran = host
            .run(busybox_spec([
                "sh",
                "-c",
                "echo out; echo err >&2; exit 42",
            ]))
            .await;
        assert_eq!(
            (ran.status, &*ran.stdout, &*ran.stderr),
            (42, "out\n", "err\n")
        );
        // The first process of a pid namespace is deaf to its own signals.
        let ran = host
            .run(busybox_spec(["sh", "-c", "kill -9 $$; true"]))
            .await;
        assert_eq!(ran.status, 0);
        let ran = host
            .run(busybox_spec(["sh", "-c", "sh -c 'kill -9 $$'; exit $?"]))
            .await;
        assert_eq!(ran.status, 137);
        assert!(!ran.oom_killed);
    });
}

#[test]
fn a_program_that_cannot_be_executed_is_named_in_the_known_words_ta_21_cl_10() {
    block_on(async |host: &mut Host| {
        let check = async |program: &str, expected: &str| {
            assert_eq!(refusal(host, busybox_spec([program])).await, expected);
        };
        check(
            "nope",
            r#"exec: "nope": executable file not found in $PATH"#,
        )
        .await;
        check("/nope", r#"exec: "/nope": no such file or directory"#).await;
        check("/etc/passwd", r#"exec: "/etc/passwd": permission denied"#).await;
    });
}

#[test]
fn a_creation_that_fails_at_any_step_leaves_nothing_and_says_why() {
    block_on(async |host: &mut Host| {
        let check = async |expected: &str, change: &dyn Fn(&mut Value)| {
            let mut spec = busybox_spec(["true"]);
            change(&mut spec);
            let text = refusal(host, spec).await;
            assert!(
                text.contains(expected),
                "{text:?} does not say {expected:?}"
            );
        };
        check("/nowhere", &|s| s["root"]["path"] = "/nowhere".into()).await;
        check("mount source /nowhere", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "bind", "source": "/nowhere"}),
            );
        })
        .await;
        check("/dev/null: only files, directories and sockets", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "bind", "source": "/dev/null"}),
            );
        })
        .await;
        check("nonsense", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "tmpfs", "options": ["nonsense=1"]}),
            );
        })
        .await;
        // The kernel's own words.
        check("Bad value for 'size'", &|s| {
            add_mount(
                s,
                json!({"destination": "/x", "type": "tmpfs", "options": ["size=nonsense"]}),
            );
        })
        .await;
        check("nothing can be mounted inside /proc", &|s| {
            add_mount(s, json!({"destination": "/proc/self/x", "type": "tmpfs"}));
        })
        .await;
        check("sysctl", &|s| {
            s["linux"]["sysctl"] = json!({"kernel.nope": "1"});
        })
        .await;
        check("set the sysctl net/nope", &|s| {
            s["linux"]["sysctl"] = json!({"net.nope": "1"});
        })
        .await;
        check("cwd", &|s| s["process"]["cwd"] = "/etc/passwd".into()).await;
        check("process.capabilities.effective", &|s| {
            s["process"]["capabilities"]["effective"] = json!(["CAP_SYS_BOOT"]);
        })
        .await;
        check("memory.high", &|s| {
            s["linux"]["resources"]["unified"] = json!({"memory.high": "nonsense"});
        })
        .await;
        check("/proc/999999/ns/ipc", &|s| {
            s["linux"]["namespaces"][1]["path"] = "/proc/999999/ns/ipc".into();
        })
        .await;
    });
}

#[test]
fn the_order_of_requests_is_kept_b25_b26() {
    block_on(async |host: &mut Host| {
        let code = |result: ttrpc::Result<_>| match result {
            Err(ttrpc::Error::RpcStatus(status)) => status.code(),
            other => panic!("{:?}", other.map(|_: bulkhead_agent_api::agent::Empty| ())),
        };
        let process = busybox_spec(["true"])["process"].clone();
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        let early = host
            .exec(&id, "e", &process, Stdio::default())
            .await
            .map(|_| Default::default());
        assert_eq!(code(early), ttrpc::Code::FAILED_PRECONDITION);
        assert_eq!(
            code(host.delete(&id, "").await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        host.kill(&id, "", 0).await.unwrap();
        host.start_container(&id).await.unwrap();
        assert_eq!(
            code(host.start_container(&id).await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        assert_eq!(host.pids(&id).await.len(), 1);
        assert_eq!(
            code(host.kill(&id, "", 65).await),
            ttrpc::Code::INVALID_ARGUMENT
        );
        assert_eq!(
            code(host.resize(&id, 1, 1).await),
            ttrpc::Code::FAILED_PRECONDITION
        );
        host.exec(&id, "e", &process, Stdio::default())
            .await
            .unwrap();
        assert_eq!(host.wait(&id, "e").await.unwrap().exit_status, 0);
        let again = host
            .exec(&id, "e", &process, Stdio::default())
            .await
            .map(|_| Default::default());
        assert_eq!(code(again), ttrpc::Code::ALREADY_EXISTS);
        host.delete(&id, "e").await.unwrap();
        host.kill(&id, "", 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        assert_eq!(code(host.kill(&id, "", 9).await), ttrpc::Code::NOT_FOUND);
        assert_eq!(code(host.kill_all(&id, 9).await), ttrpc::Code::NOT_FOUND);
        host.delete(&id, "").await.unwrap();
        assert_eq!(code(host.delete(&id, "").await), ttrpc::Code::NOT_FOUND);
    });
}

#[test]
fn a_created_container_ends_by_any_signal_that_ends_programs_ta_44() {
    block_on(async |host: &mut Host| {
        for signal in [1, 2, 9, 10, 15] {
            let spec = busybox_spec(["sleep", "1000"]);
            let id = host.create(spec, Stdio::default()).await.unwrap();
            host.kill(&id, "", signal).await.unwrap();
            let exit = host.wait(&id, "").await.unwrap();
            assert_eq!(exit.exit_status, 128 + signal);
            host.delete(&id, "").await.unwrap();
        }
        // What the program then makes of them is its own affair.
        let spec = busybox_spec(["sleep", "1000"]);
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        host.kill(&id, "", 15).await.unwrap();
        host.kill(&id, "", 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn an_exec_joins_the_container_in_everything() {
    block_on(async |host: &mut Host| {
        let mut spec = busybox_spec(["sh", "-c", "mkdir /tmp/here; exec sleep 100"]);
        spec["hostname"] = "inside".into();
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        let script = "hostname; until ls -d /tmp/here 2>/dev/null; do sleep 0.01; done; for n in pid mnt ipc uts cgroup; do
            test $(readlink /proc/1/ns/$n) = $(readlink /proc/self/ns/$n) || echo other $n; done
            grep -E 'CapEff|NoNew' /proc/self/status; echo $(ps | grep -c sleep)";
        let process = busybox_spec(["sh", "-c", script])["process"].clone();
        let ran = host.run_exec(&id, &process).await;
        let expected = "inside\n/tmp/here\nCapEff:\t00000000080005eb\nNoNewPrivs:\t1\n";
        assert!(
            ran.stdout.starts_with(expected),
            "{} {}",
            ran.stdout,
            ran.stderr
        );

        let missing = busybox_spec(["nope"])["process"].clone();
        let error = host
            .exec(&id, "x", &missing, Stdio::default())
            .await
            .unwrap_err();
        assert!(
            error
                .to_string()
                .contains("executable file not found in $PATH"),
            "{error}"
        );
        host.kill_all(&id, 9).await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_shutdown_kills_and_ends_the_service() {
    block_on(async |host: &mut Host| {
        let id = host
            .create(busybox_spec(["sleep", "100"]), Stdio::default())
            .await
            .unwrap();
        host.start_container(&id).await.unwrap();
        host.shutdown().await.unwrap();
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        host.delete(&id, "").await.unwrap();
        assert_eq!(
            (&mut host.agent).await.unwrap(),
            bulkhead_agent::rpc::End::Shutdown
        );
    });
}
