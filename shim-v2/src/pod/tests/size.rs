//! The machine follows its containers.

use bulkhead_agent_api::agent::cause::Kind;
use serde_json::{Value, json};

use super::{
    super::*,
    harness::{Bench, run_with},
};
use crate::{config::Config, vm::Size};

/// Runs a test on a host that is large enough.
fn run(test: impl AsyncFnOnce(&Bench) + Send) {
    let config = Config {
        most_vcpus: Some(4),
        most_memory_mib: Some(4_096),
        ..Config::default()
    };
    run_with(config, test);
}

/// The MiB of its machine so far, the first one too.
fn sizes(bench: &Bench) -> Vec<u32> {
    let sizes = lock(&bench.guest().sizes).clone();
    sizes.iter().map(|size| size.memory_mib).collect()
}

async fn settled(bench: &Bench) {
    while bench.pod.busy().is_some() {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

fn limited(mib: u64) -> impl FnOnce(&mut Value) {
    move |spec| spec["linux"]["resources"] = json!({"memory": {"limit": mib << 20}})
}

async fn create(bench: &Bench, id: &str, mib: u64) {
    let request = bench.request_with(id, limited(mib));
    bench.pod.create(request).await.unwrap();
    bench.start(id).await.unwrap();
}

async fn update(bench: &Bench, id: &str, resources: Value) -> Result<()> {
    let id = ContainerId::new(id).unwrap();
    let resources = resources.to_string().into_bytes();
    let updated = bench.pod.update(&id, resources).await;
    settled(bench).await;
    updated
}

#[test]
fn the_machine_grows_for_who_joins_and_shrinks_when_it_leaves_rs_13() {
    run(async |bench| {
        create(bench, "first", 100).await;
        assert_eq!(bench.guest().size().await.memory_mib, 228);
        create(bench, "second", 200).await;
        assert_eq!(bench.guest().size().await.memory_mib, 428);
        create(bench, "third", 50).await;
        for id in ["second", "third"] {
            bench.kill(id, 9).await.unwrap();
            bench.wait(id).await;
            bench.delete(id).await.unwrap();
            settled(bench).await;
        }
        assert_eq!(sizes(bench), [428, 478, 278, 228]);
    });
}

#[test]
fn a_container_gets_more_once_the_machine_has_it_and_the_machine_less_afterwards_rs_14() {
    run(async |bench| {
        create(bench, "c", 100).await;
        bench.agent.hold("Update");
        let more = json!({"memory": {"limit": 300 << 20}, "cpu": {"quota": 250_000}});
        let mut more = std::pin::pin!(update(bench, "c", more));
        assert!(futures::poll!(&mut more).is_pending());
        bench.agent.called("Update c").await;
        let grown = Size {
            vcpus: 3,
            memory_mib: 428,
        };
        assert_eq!(bench.guest().size().await, grown);
        bench.agent.release("Update");
        more.await.unwrap();
        bench.agent.hold("Update");
        let mut less = std::pin::pin!(update(bench, "c", json!({"memory": {"limit": 64 << 20}})));
        assert!(futures::poll!(&mut less).is_pending());
        assert_eq!(bench.guest().size().await, grown, "not before");
        bench.agent.release("Update");
        less.await.unwrap();
        let size = bench.guest().size().await;
        assert_eq!((size.vcpus, size.memory_mib), (3, 192));
    });
}

#[test]
fn a_refused_update_leaves_the_machine_as_it_was_ta_68() {
    run(async |bench| {
        create(bench, "c", 100).await;
        let before = bench.guest().size().await;
        bench
            .agent
            .refuse("Update", Code::INVALID_ARGUMENT, Kind::LIMIT);
        let error = update(bench, "c", json!({"memory": {"limit": 300 << 20}})).await;
        assert_eq!(error.unwrap_err().code(), Code::INVALID_ARGUMENT);
        assert_eq!(bench.guest().size().await, before);
        assert_eq!(sizes(bench), [428, 228]);
    });
}

#[test]
fn what_the_machine_can_never_give_is_refused_with_the_most_and_costs_nothing_ta_68() {
    run(async |bench| {
        create(bench, "c", 100).await;
        for (resources, expected) in [
            (
                json!({"memory": {"limit": 1_u64 << 40}}),
                "linux.resources.memory.limit = 1099511627776 bytes: the virtual machine can \
                 have at most 4294967296 bytes",
            ),
            (
                json!({"cpu": {"quota": 400_100}}),
                "linux.resources.cpu.quota = 4.001 processors: the virtual machine can have at \
                 most 4;",
            ),
        ] {
            let error = update(bench, "c", resources).await.unwrap_err();
            assert_eq!(error.code(), Code::FAILED_PRECONDITION);
            assert!(error.to_string().starts_with(expected), "{error}");
        }
        assert!(!bench.agent.calls().contains(&"Update c".to_owned()));
        assert!(sizes(bench).is_empty());
    });
}
