//! The interfaces of a pod, in namespaces of this machine's kernel.

use std::os::fd::AsRawFd;

use bulkhead_agent_api::agent::cause::Kind;
use serde_json::json;

use super::{
    super::*,
    harness::{Bench, run},
};
use crate::network::tests::{ETH0, namespace, says};

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
            let left = says(&namespace, "tc qdisc show; ip -o link");
            assert!(
                !left.contains("ingress") && !left.contains("bulkhead"),
                "{left}"
            );
        }
    });
}
