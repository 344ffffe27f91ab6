//! The life of a pod, with everything that can come at a bad moment.

pub(crate) mod copies;
mod faults;
pub(crate) mod harness;
mod hooks;
mod network;
mod pids;
mod resources;
pub(crate) mod script;
mod size;
mod sockets;

use bulkhead_agent_api::agent::cause::Kind;
use futures::{future::join_all, poll};
use tokio::{io::AsyncReadExt, net::unix::pipe, time::Instant};

use self::harness::{named, run};
use super::*;
use crate::io::Stdio;

#[test]
fn a_container_of_another_pod_is_refused_before_anything_is_done_lc_39() {
    run(async |bench| {
        let joins = |sandbox: &str| {
            let annotations = serde_json::json!({
                "io.kubernetes.cri.container-type": "container",
                "io.kubernetes.cri.sandbox-id": sandbox,
            });
            move |spec: &mut serde_json::Value| spec["annotations"] = annotations
        };
        let request = bench.request_with("c", joins("other"));
        let error = bench.pod.create(request).await.unwrap_err();
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        let text = error.to_string();
        for word in ["io.kubernetes.cri.sandbox-id", "other", "pod \"pod\""] {
            assert!(text.contains(word), "{text}");
        }
        assert_eq!(bench.booted(), 0);
        let request = bench.request_with("c", joins("pod"));
        bench.pod.create(request).await.unwrap();
    });
}

#[test]
fn every_step_of_a_life_has_its_event_in_order_lc_72_lc_73_ta_41() {
    run(async |bench| {
        bench.running("c").await;
        bench.executing("c/e").await;
        bench.agent.exits("c", "e", 3);
        assert_eq!(bench.wait("c/e").await, 3);
        assert_eq!(bench.delete("c/e").await.unwrap(), 3);
        bench.agent.exits("c", "", 7);
        assert_eq!(bench.wait("c").await, 7);
        assert_eq!(bench.delete("c").await.unwrap(), 7);
        assert_eq!(
            bench.told.all(),
            [
                "/tasks/create c",
                "/tasks/start c",
                "/tasks/exec-added e",
                "/tasks/exec-started e",
                "/tasks/exit e 3",
                "/tasks/exit c 7",
                "/tasks/delete c 7",
            ]
        );
        assert_eq!(bench.shared(), 0);
        bench.agent.emptied().await;
    });
}

#[test]
fn a_first_process_is_not_told_to_have_ended_before_its_execs_lc_73() {
    run(async |bench| {
        bench.running("c").await;
        for exec in ["c/a", "c/b", "c/hangs"] {
            bench.executing(exec).await;
        }
        bench.add("c/never-started", Stdio::default()).unwrap();
        let begun = Instant::now();
        bench.agent.exits("c", "", 1);
        bench.agent.exits("c", "b", 5);
        bench.agent.exits("c", "a", 4);
        assert_eq!(bench.wait("c").await, 1);
        // The agent does not say how the third one ended.
        assert!(begun.elapsed() < DIE * 2);
        assert_eq!(bench.wait("c/hangs").await, 137);
        let mut told = bench.told_of("/tasks/exit");
        assert_eq!(told.pop().unwrap(), "/tasks/exit c 1");
        told.sort();
        assert_eq!(
            told,
            [
                "/tasks/exit a 4",
                "/tasks/exit b 5",
                "/tasks/exit hangs 137"
            ]
        );
        assert_eq!(bench.wait("c/never-started").await, 137);
        // Nothing begins in a container that is over.
        let error = bench.start("c/never-started").await.unwrap_err();
        assert_eq!(error.code(), Code::FAILED_PRECONDITION);
        assert!(bench.add("c/late", Stdio::default()).is_err());
        bench.delete("c").await.unwrap();
        assert_eq!(bench.told_of("/tasks/exit").len(), 4);
    });
}

#[test]
fn an_end_in_the_middle_of_the_start_is_told_after_it_ta_23() {
    run(async |bench| {
        bench.create("c").await.unwrap();
        bench.agent.hold("Start");
        let (pod, name) = (Arc::clone(&bench.pod), named("c"));
        let start = tokio::spawn(async move { pod.start(&name).await });
        bench.agent.called("Start c").await;
        bench.agent.exits("c", "", 9);
        tokio::time::sleep(Duration::from_secs(1)).await;
        assert!(bench.told_of("/tasks/exit").is_empty());
        bench.agent.release("Start");
        start.await.unwrap().unwrap();
        assert_eq!(bench.wait("c").await, 9);
        let told = bench.told.all();
        assert_eq!(told[1..], ["/tasks/start c", "/tasks/exit c 9"]);
    });
}

#[test]
fn delete_of_an_exec_that_is_being_started_waits_and_loses_no_process() {
    run(async |bench| {
        bench.running("c").await;
        bench.add("c/e", Stdio::default()).unwrap();
        bench.agent.hold("Exec");
        let mut start = std::pin::pin!(bench.start("c/e"));
        assert!(poll!(&mut start).is_pending());
        bench.agent.called("Exec c/e").await;
        let mut delete = std::pin::pin!(bench.delete("c/e"));
        let mut kill = std::pin::pin!(bench.kill("c/e", 9));
        assert!(poll!(&mut delete).is_pending());
        assert!(poll!(&mut kill).is_pending());
        bench.agent.release("Exec");
        let (start, delete, kill) = tokio::join!(start, delete, kill);
        start.unwrap();
        assert_eq!(delete.unwrap_err().code(), Code::FAILED_PRECONDITION);
        // It still has its name: it can be killed, and is told to have ended.
        kill.unwrap();
        assert_eq!(bench.wait("c/e").await, 137);
        assert_eq!(bench.delete("c/e").await.unwrap(), 137);
        assert_eq!(bench.told_of("/tasks/exit"), ["/tasks/exit e 137"]);
        assert!(!bench.agent.has("c", "e"));
    });
}

#[test]
fn delete_of_an_exec_that_was_never_started_ends_its_waiters_ta_30() {
    run(async |bench| {
        bench.running("c").await;
        bench.add("c/e", Stdio::default()).unwrap();
        let mut wait = std::pin::pin!(bench.wait("c/e"));
        assert!(poll!(&mut wait).is_pending());
        assert_eq!(bench.delete("c/e").await.unwrap(), 0);
        assert_eq!(wait.await, 0);
        assert_eq!(
            bench.start("c/e").await.unwrap_err().code(),
            Code::NOT_FOUND
        );
        assert!(bench.told_of("/tasks/exit").is_empty());
    });
}

#[test]
fn a_cancelled_create_leaves_nothing_in_the_guest_ta_17() {
    run(async |bench| {
        bench.running("other").await;
        bench.agent.hold("Create");
        let (pod, request) = (Arc::clone(&bench.pod), bench.request("c"));
        let create = tokio::spawn(async move { pod.create(request).await });
        bench.agent.called("Create c").await;
        let mut delete = std::pin::pin!(bench.delete("c"));
        assert!(poll!(&mut delete).is_pending());
        tokio::task::yield_now().await;
        bench.agent.release("Create");
        assert_eq!(delete.await.unwrap_err().code(), Code::NOT_FOUND);
        assert_eq!(create.await.unwrap().unwrap_err().code(), Code::ABORTED);
        assert!(!bench.agent.has("c", ""));
        assert_eq!(bench.shared(), 1);
        // The id is free, in the guest too.
        bench.running("c").await;
        assert!(bench.told_of("/tasks/exit").is_empty());
    });
}

#[test]
fn a_create_that_took_too_long_is_taken_back_when_it_is_there_f38() {
    run(async |bench| {
        bench.running("other").await;
        bench.agent.hold("Create");
        let error = bench.create("c").await.unwrap_err();
        assert_eq!(error.code(), Code::DEADLINE_EXCEEDED);
        assert_eq!(bench.shared(), 1);
        bench.agent.release("Create");
        bench.agent.called("Delete c").await;
        assert!(!bench.agent.has("c", ""));
        assert!(bench.told_of(" c").is_empty());
    });
}

#[test]
fn an_exec_that_took_too_long_is_taken_back_when_it_is_there_f38() {
    run(async |bench| {
        bench.running("c").await;
        bench.add("c/e", Stdio::default()).unwrap();
        bench.agent.hold("Exec");
        let error = bench.start("c/e").await.unwrap_err();
        assert_eq!(error.code(), Code::DEADLINE_EXCEEDED);
        assert_eq!(bench.wait("c/e").await, 255);
        bench.agent.release("Exec");
        bench.agent.called("Delete c/e").await;
        assert!(!bench.agent.has("c", "e"));
        assert!(bench.told_of("exec-started").is_empty());
        assert!(bench.told_of("/tasks/exit").is_empty());
    });
}

#[test]
fn a_start_that_was_not_confirmed_does_not_leave_a_program_running() {
    run(async |bench| {
        bench.create("c").await.unwrap();
        bench.agent.hold("Start");
        let error = bench.start("c").await.unwrap_err();
        assert_eq!(error.code(), Code::DEADLINE_EXCEEDED);
        assert_eq!(bench.wait("c").await, 137);
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        assert!(bench.told_of("/tasks/start").is_empty());
        assert_eq!(bench.told_of("/tasks/exit"), ["/tasks/exit c 137"]);
    });
}

#[test]
fn an_exec_whose_container_ends_during_its_start_is_taken_back() {
    run(async |bench| {
        bench.running("c").await;
        bench.add("c/e", Stdio::default()).unwrap();
        bench.agent.hold("Exec");
        let mut start = std::pin::pin!(bench.start("c/e"));
        assert!(poll!(&mut start).is_pending());
        bench.agent.called("Exec c/e").await;
        bench.agent.exits("c", "", 0);
        assert_eq!(bench.wait("c").await, 0);
        bench.agent.release("Exec");
        assert_eq!(start.await.unwrap_err().code(), Code::FAILED_PRECONDITION);
        bench.agent.called("Delete c/e").await;
        assert_eq!(bench.wait("c/e").await, 137);
        assert_eq!(bench.told_of("exit"), ["/tasks/exit c 0"]);
        assert!(bench.told_of("exec-started").is_empty());
    });
}

#[test]
fn a_program_that_cannot_be_executed_is_a_failed_start_ta_22_ta_25() {
    run(async |bench| {
        bench.running("c").await;
        let missing = Kind::PROGRAM_NOT_FOUND;
        bench.agent.refuse("Exec", Code::INVALID_ARGUMENT, missing);
        bench.add("c/e", Stdio::default()).unwrap();
        let mut wait = std::pin::pin!(bench.wait("c/e"));
        assert!(poll!(&mut wait).is_pending());
        let error = bench.start("c/e").await.unwrap_err();
        assert_eq!(error.code(), Code::INVALID_ARGUMENT);
        assert_eq!(wait.await, 127);
        assert_eq!(bench.delete("c/e").await.unwrap(), 127);
        bench
            .agent
            .refuse("Create", Code::INVALID_ARGUMENT, missing);
        assert!(bench.create("d").await.is_err());
        assert_eq!(bench.shared(), 1);
        let told = bench.told.all();
        assert_eq!(
            told,
            ["/tasks/create c", "/tasks/start c", "/tasks/exec-added e"]
        );
    });
}

#[test]
fn an_oom_kill_is_told_when_it_happens_and_once_lc_77() {
    run(async |bench| {
        bench.running("c").await;
        bench.agent.oom("c");
        let mut told = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(5);
        while told.is_empty() && Instant::now() < deadline {
            tokio::time::sleep(Duration::from_millis(10)).await;
            told = bench.told_of("/tasks/oom");
        }
        assert_eq!(told, ["/tasks/oom c"]);
        for exec in ["c/a", "c/b"] {
            bench.executing(exec).await;
            bench.kill(exec, 9).await.unwrap();
            bench.wait(exec).await;
        }
        assert_eq!(bench.told_of("/tasks/oom").len(), 1);
        // The next one hits the first process, and comes before its end.
        bench.agent.oom("c");
        bench.agent.exits("c", "", 137);
        assert_eq!(bench.wait("c").await, 137);
        let told = bench.told.all();
        assert_eq!(
            told[told.len() - 2..],
            ["/tasks/oom c", "/tasks/exit c 137"]
        );
        assert_eq!(bench.told_of("/tasks/oom").len(), 2);
        bench.delete("c").await.unwrap();
    });
}

#[test]
fn requests_that_come_twice_make_nothing_twice_f67() {
    run(async |bench| {
        let (one, two, again) =
            tokio::join!(bench.create("a"), bench.create("b"), bench.create("a"));
        one.unwrap();
        two.unwrap();
        assert_eq!(again.unwrap_err().code(), Code::ALREADY_EXISTS);
        assert_eq!(bench.booted(), 1);
        let error = bench.create("a").await.unwrap_err();
        assert_eq!(error.code(), Code::ALREADY_EXISTS);
        let (first, second) = tokio::join!(bench.start("a"), bench.start("a"));
        first.unwrap();
        assert_eq!(second.unwrap_err().code(), Code::FAILED_PRECONDITION);
        bench.executing("a/e").await;
        let error = bench.add("a/e", Stdio::default()).unwrap_err();
        assert_eq!(error.code(), Code::ALREADY_EXISTS);
        bench.kill("a", 9).await.unwrap();
        bench.wait("a").await;
        assert_eq!(
            bench.kill("a", 9).await.unwrap_err().code(),
            Code::NOT_FOUND
        );
        let (first, second) = tokio::join!(bench.delete("a"), bench.delete("a"));
        first.unwrap();
        assert_eq!(second.unwrap_err().code(), Code::NOT_FOUND);
        assert_eq!(bench.told_of("/tasks/delete").len(), 1);
        assert_eq!(bench.told_of("/tasks/exit a ").len(), 1);
        // The id can be used again.
        bench.running("a").await;
    });
}

#[test]
fn a_created_container_is_deleted_with_its_end_told_ta_36() {
    run(async |bench| {
        bench.create("c").await.unwrap();
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        // One whose guest does not obey, too.
        bench.create("d").await.unwrap();
        bench.create("sibling").await.unwrap();
        bench.agent.hold("Kill");
        bench.agent.hold("Delete");
        assert_eq!(bench.delete("d").await.unwrap(), 137);
        let told = bench.told_of(" d");
        assert_eq!(
            told,
            [
                "/tasks/create d",
                "/tasks/exit d 137",
                "/tasks/delete d 137"
            ]
        );
        assert_eq!(bench.told_of("/tasks/exit c"), ["/tasks/exit c 137"]);
    });
}

#[test]
fn the_end_of_the_pod_tells_the_end_of_everything_in_it() {
    run(async |bench| {
        bench.running("c").await;
        bench.executing("c/e").await;
        bench.create("waits").await.unwrap();
        bench.pod.stop().await;
        let told = bench.told_of("/tasks/exit");
        assert_eq!(told.len(), 3, "{told:?}");
        assert!(bench.create("late").await.is_err());
        assert!(!bench.state.exists());
    });
}

#[test]
fn a_background_process_that_holds_the_output_does_not_hold_up_the_end_ta_38() {
    run(async |bench| {
        bench.running("c").await;
        let stdio = Stdio {
            stdout: bench.fifo("out"),
            ..Stdio::default()
        };
        bench.add("c/e", stdio).unwrap();
        bench.start("c/e").await.unwrap();
        let begun = Instant::now();
        bench.agent.keeps_output("c", "e", 7);
        assert_eq!(bench.wait("c/e").await, 7);
        assert!(
            begun.elapsed() < Duration::from_secs(1),
            "{:?}",
            begun.elapsed()
        );
        assert_eq!(bench.delete("c/e").await.unwrap(), 7);
    });
}

#[test]
fn a_slow_reader_gets_the_rest_of_what_a_deleted_container_wrote_ta_35() {
    run(async |bench| {
        let mut request = bench.request("c");
        request.stdio.stdout = bench.fifo("out");
        let fifo = pipe::OpenOptions::new();
        let mut reader = fifo.open_receiver(&request.stdio.stdout).unwrap();
        // Nobody has read for so long that there is no room for another word.
        let filler = fifo.open_sender(&request.stdio.stdout).unwrap();
        filler.writable().await.unwrap();
        while filler.try_write(&[b'x'; 4096]).is_ok() {}
        bench.pod.create(request).await.unwrap();
        drop(filler);
        bench.start("c").await.unwrap();
        bench.agent.exits("c", "", 0);
        bench.wait("c").await;
        let read = async {
            tokio::time::sleep(LAST_DRAIN / 2).await;
            let mut text = String::new();
            reader.read_to_string(&mut text).await.unwrap();
            text
        };
        let (deleted, text) = tokio::join!(bench.delete("c"), read);
        deleted.unwrap();
        assert!(text.ends_with("xoutput of c "), "{} bytes", text.len());
    });
}

#[test]
fn a_hundred_execs_at_once_lose_no_output_ta_29() {
    run(async |bench| {
        bench.running("c").await;
        let execs = (0..100).map(|number| async move {
            let name = format!("c/e{number}");
            let stdio = Stdio {
                stdin: bench.fifo(&format!("in{number}")),
                stdout: bench.fifo(&format!("out{number}")),
                stderr: bench.fifo(&format!("err{number}")),
                terminal: false,
            };
            let mut out = pipe::OpenOptions::new()
                .open_receiver(&stdio.stdout)
                .unwrap();
            bench.add(&name, stdio).unwrap();
            bench.start(&name).await.unwrap();
            let mut text = vec![0; format!("output of c e{number}").len()];
            out.read_exact(&mut text).await.unwrap();
            bench.agent.exits("c", &format!("e{number}"), 0);
            assert_eq!(bench.wait(&name).await, 0);
            let mut rest = Vec::new();
            out.read_to_end(&mut rest).await.unwrap();
            assert!(rest.is_empty());
            String::from_utf8(text).unwrap()
        });
        for (number, text) in join_all(execs).await.into_iter().enumerate() {
            assert_eq!(text, format!("output of c e{number}"));
        }
        assert_eq!(bench.told_of("/tasks/exit").len(), 100);
    });
}

#[test]
fn a_pod_that_nobody_uses_is_given_up_after_ten_minutes_ta_74() {
    run(async |bench| {
        let begun = Instant::now();
        crate::daemon::unused(&bench.pod).await;
        assert_eq!(begun.elapsed().as_secs(), 600);
        bench.running("c").await;
        let given_up = crate::daemon::unused(&bench.pod);
        assert!(timeout(Duration::from_secs(7200), given_up).await.is_err());
        bench.kill("c", 9).await.unwrap();
        bench.wait("c").await;
        bench.delete("c").await.unwrap();
    });
}
