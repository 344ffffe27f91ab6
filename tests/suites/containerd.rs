//! The runtime under containerd, driven by `ctr`.

use bulkhead_tests::{Command, Outcome};

const IMAGE: &str = bulkhead_tests::BUSYBOX_NAME;

fn ctr<'a>(args: impl IntoIterator<Item = &'a str>) -> Outcome {
    Command::new("ctr", args).run()
}

const RUN: [&str; 4] = ["run", "--runtime", "io.containerd.bulkhead.v2", "--rm"];

#[test]
fn ctr_run_gives_output_and_exit_code() {
    let out = ctr(RUN
        .into_iter()
        .chain([IMAGE, "c1", "sh", "-c", "uname -r; exit 42"]));
    assert!(out.stdout.starts_with("6.12."), "{out}");
    assert_eq!(out.code, 42, "{out}");
}

#[test]
fn two_containers_at_once_are_two_machines_and_leave_nothing() {
    for id in ["a", "b"] {
        ctr([
            "run",
            "--runtime",
            "io.containerd.bulkhead.v2",
            "--detach",
            IMAGE,
            id,
            "sleep",
            "1000",
        ])
        .success();
    }
    let list = ctr(["task", "ls"]).success();
    assert_eq!(list.matches("RUNNING").count(), 2, "{list}");
    let boot = |id| {
        ctr([
            "task",
            "exec",
            "--exec-id",
            "e1",
            id,
            "cat",
            "/proc/sys/kernel/random/boot_id",
        ])
        .success()
    };
    assert_ne!(boot("a"), boot("b"));
    let vmms = Command::new("pgrep", ["-c", "-x", "bulkhead-vmm"])
        .run()
        .success();
    assert_eq!(vmms.trim(), "2");
    for id in ["a", "b"] {
        ctr(["task", "kill", "--signal", "SIGKILL", id]).success();
        ctr(["task", "rm", "--force", id]);
        ctr(["container", "rm", id]).success();
    }
}

#[test]
fn ctr_exec_gives_output_and_exit_code() {
    ctr([
        "run",
        "--runtime",
        "io.containerd.bulkhead.v2",
        "--detach",
        IMAGE,
        "x",
        "sleep",
        "1000",
    ])
    .success();
    let exec = ctr([
        "task",
        "exec",
        "--exec-id",
        "e",
        "x",
        "sh",
        "-c",
        "echo hello; exit 5",
    ]);
    assert_eq!((exec.code, exec.stdout.as_str()), (5, "hello\n"), "{exec}");
    ctr(["task", "rm", "--force", "x"]).success();
    ctr(["container", "rm", "x"]).success();
}
