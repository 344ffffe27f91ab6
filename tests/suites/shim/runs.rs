//! The life of a container: each in a machine of its own.

use std::{fs, time::Duration};

use containerd_shim_protos::{
    api::Status,
    events::task::{TaskCreate, TaskDelete, TaskExit, TaskStart},
};
use nix::sys::stat::{Mode, SFlag, mknod};
use serde_json::json;

use crate::{
    events::content,
    output::{pattern, same, within, within_ms},
    pod::Pod,
    process::Streams,
    root::{PATTERN, Root, config, forever, write_pattern},
    task::{NAMESPACE, TASK_V3},
};

const SECOND: Duration = Duration::from_secs(1);

fn lives_and_is_killed(service: &'static str) {
    let config = config(&forever(&["hello"]));
    let pod = Pod::start_as(service, "lifecycle", Root::new(), &config);
    let init = pod.create(Streams::Output);
    assert_eq!(init.state(), Status::CREATED.into());
    init.start().unwrap();
    assert_eq!(init.state(), Status::RUNNING.into());
    init.says("hello\n", within(30 * SECOND));
    init.kill();
    assert_eq!(init.wait(), 137);
    assert_eq!(init.state(), Status::STOPPED.into());
    assert_eq!(init.delete().unwrap().exit_status, 137);
    pod.end();
}

#[test]
fn a_container_runs_from_start_to_kill_ss_01() {
    lives_and_is_killed(TASK_V3);
}

#[test]
fn the_service_of_version_2_is_on_the_same_socket_ss_01() {
    lives_and_is_killed("containerd.task.v2.Task");
}

#[test]
fn the_exit_code_of_a_first_process_is_that_of_its_program_ss_02() {
    for code in [0, 1, 2, 42, 127, 255] {
        let script = format!("exit {code}");
        let config = config(&["sh", "-c", &script]);
        let pod = Pod::start("init-exit-codes", Root::new(), &config);
        let init = pod.run(Streams::Output);
        assert_eq!(init.wait(), code, "{}", init.words());
        assert_eq!(init.delete().unwrap().exit_status, code);
        pod.end();
    }
}

#[test]
fn all_lines_come_in_their_order_and_before_delete_ss_03() {
    let script = "for i in $(seq 50); do echo line $i; sleep 0.001; done; exit 7";
    let config = config(&["sh", "-c", script]);
    let pod = Pod::start("output-then-exit", Root::new(), &config);
    let init = pod.run(Streams::Output);
    assert_eq!(init.wait(), 7, "{}", init.words());
    let lines: String = (1..=50).map(|line| format!("line {line}\n")).collect();
    same(&init.output(within(5 * SECOND)), lines.as_bytes());
    init.delete().unwrap();
    pod.end();
}

#[test]
fn events_tell_a_life_in_order_and_its_end_before_delete_ss_04() {
    let config = config(&["true"]);
    let pod = Pod::start("events", Root::new(), &config);
    let init = pod.run(Streams::Output);
    assert_eq!(init.wait(), 0, "{}", init.words());
    let exit = pod.events.wait_for("/tasks/exit", within(2 * SECOND));
    let exit: TaskExit = content(&exit, "containerd.events.TaskExit");
    init.delete().unwrap();
    pod.events.wait_for("/tasks/delete", within(5 * SECOND));
    let all = pod.events.all();
    let [create, start, end, delete] = &all[..] else {
        panic!("{all:?}");
    };
    for (event, topic) in [(create, "create"), (start, "start"), (end, "exit")] {
        assert_eq!(event.topic, format!("/tasks/{topic}"));
    }
    for event in &all {
        assert_eq!(event.namespace, NAMESPACE);
        assert_ne!(event.timestamp.seconds, 0);
    }
    let id = &pod.task.id;
    let create: TaskCreate = content(create, "containerd.events.TaskCreate");
    let start: TaskStart = content(start, "containerd.events.TaskStart");
    let delete: TaskDelete = content(delete, "containerd.events.TaskDelete");
    assert_eq!((&create.container_id, &start.container_id), (id, id));
    assert_eq!((&exit.container_id, &exit.id), (id, id));
    assert_eq!((&delete.container_id, delete.exit_status), (id, 0));
    assert_eq!(exit.exit_status, 0);
    let pids = [create.pid, start.pid, exit.pid, delete.pid];
    assert!(pids[0] != 0 && pids.iter().all(|pid| *pid == pids[0]));
    pod.end();
}

#[test]
fn the_output_of_a_fast_end_comes_without_wait_and_delete_ss_05() {
    let script = write_pattern(8, 0);
    let config = config(&["sh", "-c", &script]);
    let pod = Pod::start("fast-exit-init", Root::with_data(), &config);
    let init = pod.run(Streams::Output);
    pod.shutdown();
    let output = init.output(within(30 * SECOND));
    same(&output, &pattern(8 * PATTERN));
    pod.delete();
}

#[test]
fn a_program_that_outgrows_its_memory_ends_with_137_ss_22() {
    let grow = "BEGIN { while (1) held[n++] = sprintf(\"%1048576s\", \"\") }";
    let mut config = config(&["awk", grow]);
    let limit = 134_217_728;
    config["linux"]["resources"] = json!({"memory": {"limit": limit, "swap": limit}});
    let pod = Pod::start("oom", Root::new(), &config);
    let init = pod.run(Streams::Output);
    assert_eq!(init.wait(), 137, "{}", init.words());
    pod.events.wait_for("/tasks/oom", within(SECOND));
    pod.end();
}

#[test]
fn a_root_may_have_a_hundred_layers_over_its_base_ss_23() {
    let mut root = Root::new().layer(|layer| {
        fs::create_dir(layer.join("base")).unwrap();
        fs::write(layer.join("base/gone"), "").unwrap();
    });
    for number in 1..=100 {
        root = root.layer(|layer| {
            fs::create_dir(layer.join("added")).unwrap();
            fs::write(layer.join(format!("added/{number}")), number.to_string()).unwrap();
            if number == 50 {
                // A layer that removes a file has a device without a number in its place.
                fs::create_dir(layer.join("base")).unwrap();
                let gone = layer.join("base/gone");
                mknod(&gone, SFlag::S_IFCHR, Mode::empty(), 0).unwrap();
            }
        });
    }
    let script = "ls /added | wc -l; ls -A /base | wc -l; cat /added/1 /added/57 /added/100";
    let config = config(&["sh", "-c", script]);
    let pod = Pod::start("hundred-layers", root, &config);
    let init = pod.run(Streams::Output);
    assert_eq!(init.wait(), 0, "{}", init.words());
    same(&init.output(within(5 * SECOND)), b"100\n0\n157100");
    pod.end();
}

#[test]
fn a_shim_that_never_had_a_container_ends_at_shutdown_ss_64() {
    let config = config(&["true"]);
    let pod = Pod::start("start-alone", Root::new(), &config);
    let shim = pod.shim();
    pod.shutdown();
    let limit = within_ms(500);
    let exe = format!("/proc/{shim}/exe");
    while fs::read_link(&exe).is_ok() {
        assert!(std::time::Instant::now() < limit, "the shim lives on");
        std::thread::sleep(Duration::from_millis(20));
    }
    pod.delete();
}
