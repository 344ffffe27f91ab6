//! Verbs of tasks in every order: each step's exit code and the states after it.

use bulkhead_tests::{BUSYBOX_NAME, Command};

use crate::case::same;

const ID: &str = "task";

/// What a step gives: its exit code, what it prints, and the states of the tasks then.
/// `{}` is where a runtime and an image belong.
fn step(words: &str, runtime: &str) -> String {
    let words = words.replace("{}", &format!("--runtime {runtime} {BUSYBOX_NAME}"));
    let words: Vec<&str> = words.split(' ').collect();
    let out = Command::new("ctr", &words).run();
    let list = Command::new("ctr", ["task", "ls"]).run().success();
    let states: Vec<&str> = list
        .lines()
        .skip(1)
        .filter_map(|line| line.split_whitespace().nth(2))
        .collect();
    // Lists of processes hold pids.
    let printed = if words.contains(&"exec") {
        &*out.stdout
    } else {
        ""
    };
    format!("{words:?}: {} {printed:?} {states:?}", out.code)
}

fn tidy() {
    let _ = Command::new("ctr", ["task", "rm", "--force", ID]).run();
    let _ = Command::new("ctr", ["container", "rm", ID]).run();
}

#[test]
fn a_task_goes_from_state_to_state_as_with_runc() {
    let steps = [
        "container create {} task sleep 1000",
        "task start --detach task",
        "task start --detach task",
        "container rm task",
        "task exec --exec-id one task echo hello",
        "task exec --exec-id two task false",
        "task exec --exec-id two task sh -c exit${IFS}7",
        "task exec --exec-id three task no-such-program",
        "task exec --exec-id four --cwd /tmp task pwd",
        "task exec --exec-id five --user 1000 task id",
        "task pause task",
        "task resume task",
        "task rm task",
        "task kill --signal SIGKILL task",
        "task kill --signal SIGKILL none",
        "task rm task",
        "task rm task",
        "task exec --exec-id six task true",
        "task start --detach task",
        "task kill --signal SIGTERM --all task",
        "task rm --force task",
        "container rm task",
        "container rm task",
    ];
    same(&steps, step, tidy);
}

#[test]
#[ignore = "it takes a minute: cargo xtask test --full runs it"]
fn a_program_that_cannot_start_leaves_what_it_leaves_with_runc() {
    let steps = [
        "run --detach {} task no-such-program",
        "task rm task",
        "container rm task",
        "run --detach {} task sleep 1000",
        "run --detach {} task sleep 1000",
        "task exec --detach --exec-id one task sleep 1000",
        "task exec --exec-id one task true",
        "task kill --exec-id one --signal SIGKILL task",
        "task exec --exec-id two task no-such-program",
        "task exec --exec-id two task true",
        "task rm --force task",
        "container rm task",
    ];
    same(&steps, step, tidy);
}
