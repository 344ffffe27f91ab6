//! Hooks that run in the container before its program.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Host, block_on, busybox_spec};

/// A container with these hooks that is created and waits.
async fn created(host: &Host, script: &str, hooks: Value) -> (String, [tokio::net::UnixStream; 3]) {
    let mut spec = busybox_spec(["sh", "-c", script]);
    spec["hooks"] = json!({"startContainer": hooks});
    let (stdio, streams) = host.pipes().await;
    (host.create(spec, stdio).await.unwrap(), streams)
}

fn shell(script: &str) -> Value {
    json!({"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/bin"], "timeout": 30})
}

#[test]
fn hooks_run_in_the_container_in_order_before_its_program_oc_04_oc_05_oc_07() {
    block_on(async |host: &mut Host| {
        let hooks = json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "cat > /tmp/state; pwd > /tmp/seen; /bin/env | /bin/grep -v -e ^PWD -e ^SHLVL -e ^_= >> /tmp/seen"], "env": ["A=b=c", "PATH=/bin"]},
            shell("echo second >> /tmp/seen; readlink /proc/self/ns/mnt > /tmp/where; readlink /proc/self/ns/pid >> /tmp/where; id -u >> /tmp/seen"),
        ]);
        let (id, streams) = created(host, "cat /tmp/seen", hooks).await;
        assert!(
            !host.rootfs.join("tmp/seen").exists(),
            "not before the start"
        );
        host.start_container(&id).await.unwrap();
        let ran = host.finish(&id, "", streams).await;
        assert_eq!(
            (ran.status, &*ran.stdout),
            (0, "/\nA=b=c\nPATH=/bin\nsecond\n0\n")
        );
        let state: Value =
            serde_json::from_slice(&fs::read(host.rootfs.join("tmp/state")).unwrap()).unwrap();
        let expected = json!({
            "ociVersion": "1.3.0", "id": id, "status": "created", "pid": 1, "bundle": "/",
        });
        assert_eq!(state, expected);
        let place = fs::read_to_string(host.rootfs.join("tmp/where")).unwrap();
        for (line, kind) in place.lines().zip(["mnt", "pid"]) {
            let ours = fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
            assert_ne!(line, ours.to_str().unwrap());
        }
        assert_eq!(place.lines().count(), 2);
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_hook_that_fails_is_a_failed_start_and_the_end_of_the_container_oc_06() {
    block_on(async |host: &mut Host| {
        for (hook, words) in [
            (
                shell("echo no luck >&2; exit 3"),
                "it ended with status 3: no luck",
            ),
            (json!({"path": "/bin/nothing"}), "no such file or directory"),
            (
                json!({"path": "/bin/sleep", "args": ["sleep", "1000"], "timeout": 1}),
                "it was killed after 1 s",
            ),
        ] {
            let hooks = json!([shell("true"), hook, shell("touch /tmp/third")]);
            let (id, streams) = created(host, "touch /tmp/ran", hooks).await;
            let error = host.start_container(&id).await.unwrap_err();
            let ttrpc::Error::RpcStatus(status) = error else {
                panic!("{error}");
            };
            assert!(
                status.message.starts_with("hooks.startContainer[1] ")
                    && status.message.contains(words),
                "{}",
                status.message
            );
            let cause = bulkhead_agent_api::cause::of(&status)
                .kind
                .enum_value_or_default();
            assert_eq!(cause, bulkhead_agent_api::agent::cause::Kind::STEP);
            let ran = host.finish(&id, "", streams).await;
            assert_eq!(ran.status, 137);
            assert!(!host.rootfs.join("tmp/third").exists());
            assert!(!host.rootfs.join("tmp/ran").exists());
            host.delete(&id, "").await.unwrap();
        }
    });
}

#[test]
fn a_hook_has_the_rights_of_the_first_process_and_says_as_much_as_it_likes() {
    block_on(async |host: &mut Host| {
        let mut spec = busybox_spec(["cat", "/tmp/who"]);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        let say =
            "id -u > /tmp/who; grep CapEff /proc/self/status >> /tmp/who; seq 200000; echo end >&2";
        spec["hooks"] = json!({"startContainer": [shell(say)]});
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        fs::set_permissions(host.rootfs.join("tmp"), open).unwrap();
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(host.directory.path(), open).unwrap();
        let (stdio, streams) = host.pipes().await;
        let id = host.create(spec, stdio).await.unwrap();
        host.start_container(&id).await.unwrap();
        let ran = host.finish(&id, "", streams).await;
        assert_eq!(ran.stdout, "1000\nCapEff:\t0000000000000000\n");
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn a_container_that_is_killed_during_its_hooks_does_not_start() {
    block_on(async |host: &mut Host| {
        let hooks = json!([shell("touch /tmp/begun; sleep 1000")]);
        let (id, _streams) = created(host, "touch /tmp/ran", hooks).await;
        let begun = host.rootfs.join("tmp/begun");
        let kill = async {
            while !begun.exists() {
                tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            }
            host.kill(&id, "", 9).await.unwrap();
        };
        let (started, ()) = tokio::join!(host.start_container(&id), kill);
        assert!(started.is_err());
        assert_eq!(host.wait(&id, "").await.unwrap().exit_status, 137);
        assert!(!host.rootfs.join("tmp/ran").exists());
        host.delete(&id, "").await.unwrap();
    });
}
