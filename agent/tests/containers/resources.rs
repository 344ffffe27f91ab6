//! A container that stands still, lives with other limits, tells what it has used.

use bulkhead_agent_api::agent::{ContainerRequest, StatsResponse, Stdio, UpdateRequest};
use serde_json::{Value, json};
use ttrpc::{Code, context::Context};

use crate::support::{Host, block_on, busybox_spec};

fn of(id: &str) -> ContainerRequest {
    ContainerRequest {
        container_id: id.into(),
        ..Default::default()
    }
}

fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        other => panic!("{other}"),
    }
}

async fn running(host: &Host, spec: Value) -> String {
    let id = host.create(spec, Stdio::default()).await.unwrap();
    host.start_container(&id).await.unwrap();
    id
}

async fn end(host: &Host, id: &str) {
    host.kill(id, "", 9).await.unwrap();
    assert_eq!(host.wait(id, "").await.unwrap().exit_status, 137);
    host.delete(id, "").await.unwrap();
}

async fn stats(host: &Host, id: &str) -> StatsResponse {
    let answer = host.client.stats(Context::default(), &of(id)).await;
    answer.unwrap()
}

async fn update(host: &Host, id: &str, resources: &Value) -> ttrpc::Result<Vec<String>> {
    let request = UpdateRequest {
        container_id: id.into(),
        resources: serde_json::to_vec(resources).unwrap(),
        ..Default::default()
    };
    let answer = host.client.update(Context::default(), &request).await;
    Ok(answer?.notes)
}

fn cgroup_file(host: &Host, id: &str, file: &str) -> String {
    std::fs::read_to_string(host.cgroup(id).join(file)).unwrap()
}

#[test]
fn a_frozen_container_stands_still_takes_no_exec_and_can_be_killed_ta_51() {
    block_on(async |host: &mut Host| {
        let id = running(host, busybox_spec(["sh", "-c", "while :; do :; done"])).await;
        let frozen = |host: &Host| cgroup_file(host, &id, "cgroup.events").contains("frozen 1");
        for _ in 0..2 {
            let answer = host.client.freeze(Context::default(), &of(&id)).await;
            answer.unwrap();
            assert!(frozen(host));
        }
        let (first, second) = (stats(host, &id).await, stats(host, &id).await);
        assert_eq!(first.cpu["usage_usec"], second.cpu["usage_usec"]);
        let process = busybox_spec(["true"])["process"].clone();
        let exec = host.exec(&id, "e", &process, Stdio::default()).await;
        assert_eq!(code(exec), Code::FAILED_PRECONDITION);
        let answer = host.client.thaw(Context::default(), &of(&id)).await;
        answer.unwrap();
        assert!(!frozen(host));
        assert_eq!(host.run_exec(&id, &process).await.status, 0);
        let answer = host.client.freeze(Context::default(), &of(&id)).await;
        answer.unwrap();
        end(host, &id).await;
    });
}

#[test]
fn only_what_runs_is_frozen() {
    block_on(async |host: &mut Host| {
        let spec = busybox_spec(["sleep", "100"]);
        let id = host.create(spec, Stdio::default()).await.unwrap();
        let answer = host.client.freeze(Context::default(), &of(&id)).await;
        assert_eq!(code(answer), Code::FAILED_PRECONDITION);
        let answer = host.client.freeze(Context::default(), &of("none")).await;
        assert_eq!(code(answer), Code::NOT_FOUND);
        end(host, &id).await;
    });
}

#[test]
fn what_a_container_has_used_is_told_with_its_end_ta_65() {
    block_on(async |host: &mut Host| {
        let id = running(
            host,
            busybox_spec(["sh", "-c", "for i in $(seq 9999); do :; done"]),
        )
        .await;
        let ended = host.wait(&id, "").await.unwrap();
        assert!(ended.stats.cpu["usage_usec"] > 0);
        assert!(ended.stats.interfaces.iter().any(|it| it.name == "lo"));
        host.delete(&id, "").await.unwrap();
    });
}

#[test]
fn an_update_changes_what_it_names_and_says_what_it_leaves_out_ta_66() {
    block_on(async |host: &mut Host| {
        if !["memory", "pids", "cpu"]
            .iter()
            .all(|it| host.has_controller(it))
        {
            return;
        }
        let mut spec = busybox_spec(["sleep", "100"]);
        spec["linux"]["resources"]["memory"] = json!({"limit": 64 << 20});
        let id = running(host, spec).await;
        let change = json!({"pids": {"limit": 9}, "cpu": {"quota": 20_000, "cpus": "0-127"}});
        let notes = update(host, &id, &change).await.unwrap();
        assert!(
            notes.len() == 1 && notes[0].contains("cpu.cpus"),
            "{notes:?}"
        );
        update(host, &id, &json!({"cpu": {"period": 50_000}}))
            .await
            .unwrap();
        for (file, value) in [
            ("pids.max", "9\n"),
            ("cpu.max", "20000 50000\n"),
            ("memory.max", "67108864\n"),
        ] {
            assert_eq!(cgroup_file(host, &id, file), value, "{file}");
        }
        let refused = update(host, &id, &json!({"memory": {"limit": 1_i64 << 50}})).await;
        assert_eq!(code(refused), Code::FAILED_PRECONDITION);
        let refused = update(host, &id, &json!({"unified": {"memory.max": "much"}})).await;
        let text = refused.unwrap_err().to_string();
        assert!(
            text.contains("memory.max") && text.contains("much"),
            "{text}"
        );
        let said = stats(host, &id).await;
        assert_eq!((said.pids.current, said.pids.limit), (1, 9));
        assert_eq!(said.memory_use.limit, 64 << 20);
        end(host, &id).await;
    });
}

#[test]
fn a_limit_below_what_is_in_use_can_be_refused_ta_68() {
    block_on(async |host: &mut Host| {
        if !host.has_controller("memory") {
            return;
        }
        let id = running(host, busybox_spec(["sleep", "100"])).await;
        let used = stats(host, &id).await.memory_use.current;
        // More than anything that a sleeping program has.
        let fill = "head -c 8388608 /dev/zero > /dev/shm/ballast";
        let process = busybox_spec(["sh", "-c", fill])["process"].clone();
        assert_eq!(host.run_exec(&id, &process).await.status, 0);
        assert!(stats(host, &id).await.memory_use.current > used);
        let limit = json!({"memory": {"limit": 4 << 20, "checkBeforeUpdate": true}});
        let refused = update(host, &id, &limit).await;
        assert_eq!(code(refused), Code::FAILED_PRECONDITION);
        assert_eq!(cgroup_file(host, &id, "memory.max"), "max\n");
        end(host, &id).await;
    });
}
