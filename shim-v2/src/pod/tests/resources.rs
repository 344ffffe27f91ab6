//! Pause and statistics at bad moments; what they do in a guest is seen in the lab.

use bulkhead_agent_api::agent::cause::Kind;
use futures::poll;
use tokio::time::Instant;

use super::{super::*, harness::run};
use crate::io::Stdio;

fn id(text: &str) -> ContainerId {
    ContainerId::new(text).unwrap()
}

#[test]
fn a_pause_waits_for_the_exec_that_is_being_started_and_lets_no_other_begin_ta_51() {
    run(async |bench| {
        bench.running("c").await;
        bench.add("c/early", Stdio::default()).unwrap();
        bench.add("c/late", Stdio::default()).unwrap();
        bench.agent.hold("Exec");
        let mut start = std::pin::pin!(bench.start("c/early"));
        assert!(poll!(&mut start).is_pending());
        bench.agent.called("Exec c/early").await;
        let c = id("c");
        let mut pause = std::pin::pin!(bench.pod.pause(&c));
        assert!(poll!(&mut pause).is_pending());
        assert!(!bench.agent.calls().contains(&"Freeze c".to_owned()));
        let refused = [
            bench.start("c/late").await.unwrap_err(),
            bench.add("c/later", Stdio::default()).unwrap_err(),
            bench.delete("c").await.unwrap_err(),
        ];
        for error in refused {
            assert_eq!(error.code(), Code::FAILED_PRECONDITION, "{error}");
        }
        bench.agent.release("Exec");
        let (start, pause) = tokio::join!(start, pause);
        start.unwrap();
        pause.unwrap();
        bench.pod.pause(&c).await.unwrap();
        bench.pod.resume(&c).await.unwrap();
        bench.pod.resume(&c).await.unwrap();
        bench.start("c/late").await.unwrap();
        assert_eq!(bench.told_of("/tasks/paused").len(), 1);
        assert_eq!(bench.told_of("/tasks/resumed").len(), 1);
    });
}

#[test]
fn a_paused_container_can_be_killed_and_is_told_to_have_ended_once_ta_47() {
    run(async |bench| {
        bench.running("c").await;
        bench.executing("c/e").await;
        bench.pod.pause(&id("c")).await.unwrap();
        bench.kill("c", 9).await.unwrap();
        assert_eq!(bench.wait("c").await, 137);
        assert_eq!(bench.wait("c/e").await, 137);
        let error = bench.pod.resume(&id("c")).await.unwrap_err();
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        assert!(bench.told_of("/tasks/resumed").is_empty());
        assert_eq!(bench.told_of("/tasks/exit c").len(), 1);
    });
}

#[test]
fn a_pause_that_the_guest_does_not_answer_is_taken_back_f38() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.hold("Freeze");
        let error = bench.pod.pause(&id("c")).await.unwrap_err();
        assert_eq!(error.code(), Code::DEADLINE_EXCEEDED);
        bench.agent.called("Thaw c").await;
        bench.executing("c/e").await;
        assert!(bench.told_of("/tasks/paused").is_empty());
        bench.agent.release("Freeze");
        bench.agent.refuse("Freeze", Code::INTERNAL, Kind::STEP);
        assert!(bench.pod.pause(&id("c")).await.is_err());
        bench.executing("c/f").await;
    });
}

#[test]
fn statistics_are_the_last_known_ones_when_the_guest_is_silent_ta_59() {
    run(async |bench| {
        let used = async || bench.pod.stats(&id("c")).await.unwrap().cpu.usage_usec;
        bench.create("c").await.unwrap();
        bench.agent.uses(3);
        // Nothing has run yet.
        assert_eq!(used().await, 0);
        bench.start("c").await.unwrap();
        assert_eq!(used().await, 3);
        bench.agent.uses(5);
        bench.agent.hold("Stats");
        let begun = Instant::now();
        assert_eq!(used().await, 3);
        assert!(begun.elapsed() < Duration::from_secs(2));
        bench.agent.release("Stats");
        assert_eq!(used().await, 5);
        bench.agent.refuse("Stats", Code::INTERNAL, Kind::STEP);
        assert_eq!(used().await, 5);
    });
}

#[test]
fn statistics_of_what_has_ended_are_its_last_ta_65() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.uses(7);
        bench.agent.oom("c");
        bench.agent.exits("c", "", 137);
        bench.wait("c").await;
        // A guest that is gone as well does not matter.
        bench.guest().ends(255, "gone");
        let stats = bench.pod.stats(&id("c")).await.unwrap();
        assert_eq!((stats.cpu.usage_usec, stats.memory_events.oom_kill), (7, 1));
        bench.delete("c").await.unwrap();
        let error = bench.pod.stats(&id("c")).await.unwrap_err();
        assert_eq!(error.code(), Code::NOT_FOUND);
    });
}
