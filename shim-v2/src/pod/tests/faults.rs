//! The end of the VM, of its connection, and of its agent's wits.

use futures::poll;
use tokio::time::Instant;

use super::{super::*, harness::run};
use crate::io::Stdio;

#[test]
fn the_end_of_the_vm_ends_every_process_once_f22_lc_68_ta_33() {
    run(async |bench| {
        bench.running("c").await;
        bench.executing("c/e").await;
        bench.create("waits").await.unwrap();
        bench.guest().ends(255, "guest panic");
        for name in ["c", "c/e", "waits"] {
            assert_eq!(bench.wait(name).await, 255, "{name}");
        }
        let told = bench.told_of("/tasks/exit");
        assert_eq!(told.len(), 3, "{told:?}");
        let place = |event: &str| told.iter().position(|told| told == event).unwrap();
        assert!(place("/tasks/exit e 255") < place("/tasks/exit c 255"));
        place("/tasks/exit waits 255");
        let reason = std::fs::read_to_string(bench.state.path().join("reason")).unwrap();
        assert_eq!(reason, "guest panic\n");
        bench.delete("c").await.unwrap();
        bench.delete("waits").await.unwrap();
        assert_eq!(bench.told_of("/tasks/exit").len(), 3);
    });
}

#[test]
fn kill_between_the_end_of_the_vm_and_that_of_its_processes_finds_nothing_ta_04() {
    run(async |bench| {
        bench.running("c").await;
        bench.guest().ends(255, "guest panic");
        // Nobody had time to record anything.
        for signal in [15, 9] {
            let error = bench.kill("c", signal).await.unwrap_err();
            assert_eq!(error.code(), Code::NOT_FOUND);
            assert!(error.to_string().contains("process already finished"));
        }
    });
}

#[test]
fn a_lost_connection_ends_a_vm_that_goes_on_f34() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.hold("Kill");
        let mut kill = std::pin::pin!(bench.kill("c", 15));
        assert!(poll!(&mut kill).is_pending());
        bench.agent.called("Kill c 15").await;
        bench.guest().disconnects();
        assert_eq!(kill.await.unwrap_err().code(), Code::NOT_FOUND);
        assert_eq!(bench.wait("c").await, 137);
    });
}

#[test]
fn a_vm_that_ends_during_create_or_exec_leaves_no_waiter_behind() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.hold("Create");
        bench.agent.hold("Exec");
        bench.add("c/e", Stdio::default()).unwrap();
        let create = bench.create("late");
        let (exec, early) = (bench.start("c/e"), bench.wait("c/e"));
        let end = async {
            bench.agent.called("Create late").await;
            bench.agent.called("Exec c/e").await;
            bench.guest().ends(255, "guest panic");
        };
        let (create, exec, early, ()) = tokio::join!(create, exec, early, end);
        assert_eq!(create.unwrap_err().code(), Code::UNAVAILABLE);
        assert_eq!(exec.unwrap_err().code(), Code::UNAVAILABLE);
        assert_eq!(early, 255);
        assert_eq!(bench.delete("c/e").await.unwrap(), 255);
        assert_eq!(
            bench.delete("late").await.unwrap_err().code(),
            Code::NOT_FOUND
        );
        assert_eq!(bench.wait("c").await, 255);
        assert_eq!(bench.told_of("exit"), ["/tasks/exit c 255"]);
        assert!(bench.told_of("exec-started").is_empty());
    });
}

#[test]
fn a_stream_that_breaks_with_the_vm_tells_why_the_vm_ended() {
    run(async |bench| {
        bench.running("c").await;
        std::fs::remove_file(bench.state.path().join("vsock.sock")).unwrap();
        let stdio = Stdio {
            stdout: bench.fifo("out"),
            ..Stdio::default()
        };
        bench.add("c/e", stdio).unwrap();
        let end = async {
            // The stream breaks first.
            tokio::time::sleep(Duration::from_millis(100)).await;
            bench.guest().ends(137, "the VM was killed");
        };
        let (error, ()) = tokio::join!(bench.start("c/e"), end);
        let text = error.unwrap_err().text();
        assert!(text.contains("the VM was killed"), "{text}");
    });
}

#[test]
fn a_vm_that_ends_with_the_answer_to_create_leaves_no_waiter_behind() {
    run(async |bench| {
        bench.agent.hold("Create");
        let (pod, request) = (Arc::clone(&bench.pod), bench.request("c"));
        let create = tokio::spawn(async move { pod.create(request).await });
        bench.agent.called("Create c").await;
        bench.agent.release("Create");
        // The answer is on its way when the end comes.
        while !bench.agent.has("c", "") {
            tokio::task::yield_now().await;
        }
        bench.guest().ends(255, "guest panic");
        if create.await.unwrap().is_ok() {
            assert_eq!(bench.wait("c").await, 255);
            assert_eq!(bench.told_of("/tasks/exit"), ["/tasks/exit c 255"]);
        } else {
            assert!(bench.told.all().is_empty());
        }
    });
}

#[test]
fn a_hung_agent_is_found_out_and_its_pod_ends_f52() {
    run(async |bench| {
        bench.running("c").await;
        bench.running("sibling").await;
        for call in ["Ping", "Wait", "Kill", "Delete", "Exec"] {
            bench.agent.hold(call);
        }
        let begun = Instant::now();
        assert!(bench.kill("c", 15).await.is_err());
        assert!(begun.elapsed() <= Duration::from_secs(10));
        for name in ["c", "sibling"] {
            assert_eq!(bench.wait(name).await, 255, "{name}");
        }
        assert!(
            begun.elapsed() <= Duration::from_secs(12),
            "{:?}",
            begun.elapsed()
        );
        let reason = std::fs::read_to_string(bench.state.path().join("reason")).unwrap();
        assert_eq!(reason, "agent unresponsive\n");
        let deleting = Instant::now();
        bench.delete("c").await.unwrap();
        bench.delete("sibling").await.unwrap();
        assert!(deleting.elapsed() < Duration::from_secs(1));
    });
}

#[test]
fn an_agent_that_nobody_asks_is_found_out_too_f52_lc_69() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.hold("Ping");
        let begun = Instant::now();
        assert_eq!(bench.wait("c").await, 255);
        assert!(
            begun.elapsed() <= Duration::from_secs(12),
            "{:?}",
            begun.elapsed()
        );
    });
}

#[test]
fn an_agent_that_is_slow_now_and_then_is_left_alone_f52_lc_69() {
    run(async |bench| {
        bench.running("c").await;
        for _ in 0..10 {
            bench.agent.hold("Ping");
            tokio::time::sleep(Duration::from_secs(7)).await;
            bench.agent.release("Ping");
            tokio::time::sleep(Duration::from_secs(20)).await;
        }
        bench.kill("c", 0).await.unwrap();
        let pings = bench
            .agent
            .calls()
            .iter()
            .filter(|call| *call == "Ping")
            .count();
        assert!(pings > 10, "{pings}");
    });
}

#[test]
fn a_hung_agent_does_not_hold_up_delete_for_long() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.exits("c", "", 0);
        assert_eq!(bench.wait("c").await, 0);
        bench.agent.hold("Delete");
        let begun = Instant::now();
        assert_eq!(bench.delete("c").await.unwrap(), 0);
        assert!(
            begun.elapsed() <= Duration::from_secs(4),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(bench.shared(), 0);
    });
}

#[test]
fn sigkill_needs_no_agent_and_spares_siblings_once_ta_49() {
    run(async |bench| {
        bench.running("c").await;
        bench.running("sibling").await;
        bench.agent.hold("Kill");
        let begun = Instant::now();
        let error = bench.kill("c", 9).await.unwrap_err();
        assert_eq!(error.code(), Code::DEADLINE_EXCEEDED);
        bench.kill("c", 9).await.unwrap();
        assert!(
            begun.elapsed() <= Duration::from_secs(3),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(bench.wait("c").await, 137);
        assert_eq!(bench.wait("sibling").await, 137);
    });
}

#[test]
fn without_the_socket_of_streams_a_new_exec_fails_and_the_rest_lives_f36() {
    run(async |bench| {
        bench.running("c").await;
        bench.executing("c/before").await;
        std::fs::remove_file(bench.state.path().join("vsock.sock")).unwrap();
        let stdio = Stdio {
            stdout: bench.fifo("out"),
            ..Stdio::default()
        };
        bench.add("c/e", stdio).unwrap();
        let error = bench.start("c/e").await.unwrap_err();
        assert_eq!(error.code(), Code::UNAVAILABLE, "{}", error.text());
        assert_eq!(bench.delete("c/e").await.unwrap(), 255);
        bench.kill("c/before", 9).await.unwrap();
        assert_eq!(bench.wait("c/before").await, 137);
        bench.kill("c", 0).await.unwrap();
    });
}
