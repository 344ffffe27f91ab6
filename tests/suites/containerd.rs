//! The runtime under containerd, driven by `ctr`.

use std::{fs, thread, time::Duration};

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

/// Layers are images with erofs there, and containerd puts them up for a runtime that does
/// not ask for them as they are.
#[test]
fn a_root_of_the_erofs_snapshotter_can_be_used_and_is_taken_down_again_fs_15() {
    let line = "test -x /bin/busybox && echo new > /bin/new && rm /etc/passwd &&
        ls /bin/new /etc/passwd; exit 9";
    let snapshotter = ["--snapshotter", "erofs"];
    let run = RUN.into_iter().chain(snapshotter);
    let out = ctr(run.chain([IMAGE, "erofs", "sh", "-c", line]));
    assert_eq!(out.code, 9, "{out}");
    assert!(out.stdout.contains("/bin/new\n"), "{out}");
    assert!(out.stderr.contains("/etc/passwd"), "{out}");
    let is_up = || {
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        mounts.lines().any(|mount| mount.contains(" erofs "))
    };
    for _ in 0..100 {
        if !is_up() {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("{}", fs::read_to_string("/proc/self/mounts").unwrap());
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

#[test]
fn output_goes_to_a_log_file_that_containerd_names() {
    let dir = tempfile::tempdir().expect("a directory");
    let log = dir.path().join("out.log");
    let uri = format!("file://{}", log.display());
    let line = "echo to-stdout; echo to-stderr >&2; exit 3";
    let arguments = ["--log-uri", &uri, IMAGE, "logged", "sh", "-c", line];
    let out = ctr(RUN.into_iter().chain(arguments));
    assert_eq!(out.code, 3, "{out}");
    let log = std::fs::read_to_string(log).expect("the log");
    let mut lines: Vec<&str> = log.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["to-stderr", "to-stdout"]);
}

#[test]
fn a_container_survives_its_client_and_can_be_attached_to() {
    let run = [
        "run",
        "--runtime",
        "io.containerd.bulkhead.v2",
        IMAGE,
        "left",
    ];
    let line = [
        "sh",
        "-c",
        "echo ready; while read word; do echo got $word; done; echo end",
    ];
    let client = Command::new("ctr", run.iter().chain(&line)).start();
    client.wait_for_output("ready");
    client.signal(libc::SIGKILL);
    assert_eq!(client.wait().code, 137);
    let list = ctr(["task", "ls"]).success();
    assert!(
        list.lines()
            .any(|line| line.starts_with("left") && line.contains("RUNNING")),
        "{list}"
    );
    let hello = ctr(["task", "exec", "--exec-id", "e", "left", "echo", "hello"]);
    assert_eq!(hello.success(), "hello\n");
    ctr(["task", "rm", "--force", "left"]).success();
    ctr(["container", "rm", "left"]).success();
}

#[test]
fn an_exit_is_told_though_containerd_was_away_for_long_tt_08_lc_29_lc_64() {
    let run = [
        "run",
        "--runtime",
        "io.containerd.bulkhead.v2",
        "--detach",
        IMAGE,
        "away",
    ];
    ctr(run.into_iter().chain(["sh", "-c", "sleep 3; exit 9"])).success();
    Command::new(
        "systemctl",
        ["kill", "--kill-whom=main", "--signal=KILL", "containerd"],
    )
    .run()
    .success();
    Command::new("systemctl", ["stop", "containerd"])
        .run()
        .success();
    std::thread::sleep(std::time::Duration::from_secs(12));
    Command::new("systemctl", ["start", "containerd"])
        .run()
        .success();
    let waited = Command::new("sh", ["-c",
        "for i in $(seq 100); do ctr task ls 2>/dev/null | grep -q 'away.*STOPPED' && break; sleep 0.3; done; ctr task ls"])
        .run()
        .success();
    assert!(
        waited
            .lines()
            .any(|line| line.starts_with("away") && line.contains("STOPPED")),
        "{waited}"
    );
    let rm = ctr(["task", "rm", "away"]);
    assert!(rm.code == 9 || rm.code == 0, "{rm}");
    assert!(rm.stderr.contains('9') || rm.code == 9, "{rm}");
    ctr(["container", "rm", "away"]).success();
}

/// Shims change while containerd is away, and again while it is there; nothing that it
/// knows of its containers is other than before.
fn live_through(count: usize) {
    let ids: Vec<String> = (0..count).map(|number| format!("live{number}")).collect();
    for id in &ids {
        let run = ["run", "--runtime", RUN[2], "--detach", IMAGE, id];
        let forever = ["sh", "-c", "while true; do sleep 1; done"];
        ctr(run.into_iter().chain(forever)).success();
    }
    let pids = || {
        let list = ctr(["task", "ls"]).success();
        assert_eq!(list.matches("RUNNING").count(), count, "{list}");
        let mut lines: Vec<String> = list.lines().map(str::to_owned).collect();
        lines.sort();
        lines
    };
    let before = pids();
    let upgrade = || {
        let told = Command::new("bulkhead", ["upgrade", "--namespace", "default"]);
        let told = told.run().success();
        assert_eq!(told.matches("goes on as version").count(), count, "{told}");
    };
    let systemctl = |verb| {
        Command::new("systemctl", [verb, "containerd"])
            .run()
            .success()
    };
    systemctl("stop");
    upgrade();
    systemctl("start");
    let ready = "for i in $(seq 100); do ctr version >/dev/null 2>&1 && break; sleep 0.3; done";
    Command::new("sh", ["-c", ready]).run().success();
    assert_eq!(pids(), before);
    upgrade();
    assert_eq!(pids(), before);
    for id in &ids {
        let exec = ["task", "exec", "--exec-id", "e", id, "echo", "on"];
        assert_eq!(ctr(exec).success(), "on\n");
        ctr(["task", "kill", "--signal", "SIGKILL", id]).success();
        let gone = format!(
            "for i in $(seq 100); do ctr task ls | grep -q '^{id} .*STOPPED' && break; sleep 0.1; done"
        );
        Command::new("sh", ["-c", &gone]).run().success();
        let rm = ctr(["task", "rm", id]);
        assert!(rm.code == 0 || rm.code == 137, "{rm}");
        ctr(["container", "rm", id]).success();
    }
}

#[test]
fn containers_live_through_another_shim_and_a_containerd_that_starts_again() {
    live_through(3);
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn twenty_containers_live_through_another_shim_and_a_containerd_that_starts_again() {
    live_through(20);
}

/// The containerd of the lab host reads a configuration that `bulkhead install` has
/// changed: with ours beside what was there.
#[test]
fn containerd_reads_what_install_wrote_beside_its_own_runtimes_cl_01_k8_03() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.toml");
    let file = config.to_str().unwrap();
    let dump = || {
        let args = ["--config", file, "config", "dump"];
        Command::new("containerd", args).run().success()
    };
    for (version, plugin) in [
        (3, "io.containerd.cri.v1.runtime"),
        (2, "io.containerd.grpc.v1.cri"),
    ] {
        let before = format!(
            "version = {version}\n[plugins.\"{plugin}\".containerd.runtimes.other]\n\
             runtime_type = \"io.containerd.other.v2\" # ours\n"
        );
        fs::write(&config, &before).unwrap();
        let install = ["install", "containerd", "--config", file];
        Command::bulkhead(install).run().success();
        let dumped = dump();
        for runtime in ["other", "bulkhead", "runc"] {
            let wanted = format!("io.containerd.{runtime}.v2");
            assert!(dumped.contains(&wanted), "{wanted}: {dumped}");
        }
        Command::bulkhead(install.into_iter().chain(["--remove"]))
            .run()
            .success();
        let dumped = dump();
        assert!(!dumped.contains("io.containerd.bulkhead.v2"), "{dumped}");
        assert!(dumped.contains("io.containerd.other.v2"), "{dumped}");
        assert!(fs::read_to_string(&config).unwrap().contains("# ours"));
    }
}
