//! The interfaces of a pod, in namespaces of this machine's kernel.

use std::os::fd::AsRawFd;

use bulkhead_agent_api::agent::cause::Kind;
use serde_json::json;

use super::{
    super::*,
    harness::{Bench, run},
};
use crate::network::tests::{ETH0, assert_nothing_of_ours, namespace, says};

const ETH1: &str = "ip link add name eth1 type veth peer name other1 \
    && ip addr add 10.9.1.2/24 dev eth1 && ip link set eth1 up";

async fn create(bench: &Bench, namespace: &std::fs::File) {
    let path = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    let request = bench.request_with("c", |spec| {
        let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
        all.push(json!({"type": "network", "path": path}));
    });
    bench.pod.create(request).await.unwrap();
}

#[test]
fn a_start_whose_network_fails_leaves_nothing_of_it_and_may_come_again() {
    let Some(namespace) = namespace(&[ETH0, ETH1]) else {
        return;
    };
    run(async |bench| {
        create(bench, &namespace).await;
        bench
            .agent
            .refuse("SetUpNetwork", Code::INTERNAL, Kind::OTHER);
        for _ in 0..2 {
            bench.start("c").await.unwrap_err();
            assert_eq!(bench.agent.last_call(), "SetUpNetwork eth0 eth1");
            assert!(lock(&bench.guest().interfaces).is_empty());
            assert_nothing_of_ours(&namespace);
        }
    });
}

#[test]
fn the_hosts_own_network_is_refused_before_there_is_a_machine_nw_29() {
    run(async |bench| {
        let request = bench.request_with("c", |spec| {
            let all = spec["linux"]["namespaces"].as_array_mut().unwrap();
            all.push(json!({"type": "network", "path": "/proc/self/ns/net"}));
        });
        let refused = bench.pod.create(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::INVALID_ARGUMENT);
        let text = refused.text();
        assert!(
            text.contains("/proc/self/ns/net") && text.contains("choose another"),
            "{text}"
        );
        assert!(bench.agent.calls().is_empty());
    });
}

/// Waits until the agent was told of a network; its interfaces.
async fn told(bench: &Bench, names: &str) {
    let wanted = format!("SetUpNetwork {names}");
    let wanted = wanted.trim_end().to_owned();
    for _ in 0..3000 {
        if bench.agent.last_call().trim_end() == wanted {
            return;
        }
        // The kernel's news do not come by the clock of the test.
        let moment = || std::thread::sleep(Duration::from_millis(10));
        tokio::task::spawn_blocking(moment).await.unwrap();
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
    panic!("{wanted:?} is not told: {:?}", bench.agent.calls());
}

#[test]
fn interfaces_that_come_and_go_while_the_pod_runs_come_and_go_in_the_guest_nw_37() {
    let Some(namespace) = namespace(&["ip link set lo up"]) else {
        return;
    };
    run(async |bench| {
        create(bench, &namespace).await;
        bench.start("c").await.unwrap();
        assert!(!bench.agent.calls().iter().any(|it| it.contains("Network")));
        says(&namespace, ETH0);
        told(bench, "eth0").await;
        says(&namespace, ETH1);
        told(bench, "eth0 eth1").await;
        assert_eq!(lock(&bench.guest().interfaces).len(), 2);
        // One that finds no place any more does not disturb the others.
        says(
            &namespace,
            "ip link add name eth2 type veth peer name other2 && ip addr add 10.9.2.2/24 dev eth2",
        );
        says(&namespace, "ip link del eth0");
        told(bench, "eth1 eth2").await;
        says(&namespace, "ip link del eth1; ip link del eth2");
        told(bench, "").await;
        while !lock(&bench.guest().interfaces).is_empty() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert_nothing_of_ours(&namespace);
    });
}

#[test]
fn who_sent_as_others_before_there_was_a_filter_does_so_after_an_upgrade() {
    let old = json!({"namespace": 7, "redirected": [{"index": 2, "made": true}], "interfaces": {}});
    let carried: network::Carried = serde_json::from_value(old).unwrap();
    assert_eq!(serde_json::to_value(&carried).unwrap()["trusted"], true);
}
