//! `bulkhead run`, `exec`, `kill` and `rm`, as people and scripts use them.

use bulkhead_tests::{BUSYBOX, Command, DEBIAN, LoopDevice, Outcome, Terminal};

/// Runs a shell line in a fresh busybox container.
fn sh(line: &str) -> Outcome {
    Command::bulkhead(["run", "--rm", BUSYBOX, "--", "sh", "-c", line]).run()
}

/// Runs a shell line in a fresh container of the Debian image.
fn debian(line: &str) -> Outcome {
    Command::bulkhead([
        "run", "--rm", "--memory", "512M", DEBIAN, "--", "sh", "-c", line,
    ])
    .run()
}

#[test]
fn every_container_has_a_kernel_of_its_own() {
    let host = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
    let first = sh("uname -r; cat /proc/sys/kernel/random/boot_id").success();
    let second = sh("uname -r; cat /proc/sys/kernel/random/boot_id").success();
    assert!(first.starts_with("6.12."), "{first}");
    assert_ne!(first, second);
    assert!(!first.contains(host.trim()) && !second.contains(host.trim()));
}

#[test]
fn the_exit_code_of_the_command_is_ours() {
    for code in [0, 1, 42] {
        assert_eq!(sh(&format!("exit {code}")).code, code);
    }
}

#[test]
fn a_killed_command_gives_137() {
    let run = Command::bulkhead([
        "run",
        "--rm",
        "--name",
        "victim",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; sleep 1000",
    ])
    .start();
    run.wait_for_output("ready");
    Command::bulkhead(["kill", "victim", "KILL"])
        .run()
        .success();
    assert_eq!(run.wait().code, 137);
}

#[test]
fn a_missing_command_gives_127_and_a_file_that_cannot_be_executed_126() {
    let missing = Command::bulkhead(["run", "--rm", BUSYBOX, "--", "no-such-command"]).run();
    assert_eq!(missing.code, 127, "{missing}");
    assert!(missing.stderr.contains("no-such-command"), "{missing}");
    assert!(missing.stderr.contains("not found"), "{missing}");
    let forbidden = Command::bulkhead(["run", "--rm", BUSYBOX, "--", "/etc/passwd"]).run();
    assert_eq!(forbidden.code, 126, "{forbidden}");
    assert!(
        forbidden.stderr.contains("permission denied"),
        "{forbidden}"
    );
}

#[test]
fn stdout_and_stderr_stay_apart() {
    let out = sh("echo out; echo err >&2");
    assert_eq!(out.stdout, "out\n");
    assert_eq!(out.stderr, "err\n");
}

#[test]
fn environment_directory_and_user_are_as_asked() {
    let out = Command::bulkhead([
        "run",
        "--rm",
        "-e",
        "COLOUR=blue",
        "-w",
        "/tmp",
        "-u",
        "1000:1001",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo $COLOUR $PWD $(id -u) $(id -g)",
    ])
    .run();
    assert_eq!(out.success(), "blue /tmp 1000 1001\n");
}

#[test]
fn memory_and_processors_are_as_asked() {
    let out = Command::bulkhead([
        "run",
        "--rm",
        "--cpus",
        "2",
        "--memory",
        "300M",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "nproc; cd /sys/fs/cgroup; cat cpu.max memory.max",
    ])
    .run()
    .success();
    // No more processors than the host has would help.
    let hosts = std::thread::available_parallelism().unwrap().get();
    let expected = format!("{}\n200000 100000\n{}\n", hosts.min(2), 300 << 20);
    assert_eq!(out, expected);
}

#[test]
fn a_container_is_confined_as_runc_would_confine_it() {
    let out = sh("grep -E '^(CapEff|Seccomp|NoNewPrivs):' /proc/self/status
         head -c 1 /proc/kcore | wc -c
         mkdir -p /mnt; mount -t tmpfs none /mnt 2>&1 && echo mounted
         echo x 2>&1 > /proc/sysrq-trigger && echo triggered
         echo end")
    .success();
    let lines: Vec<&str> = out.lines().collect();
    let [capabilities, privileges, filter, kcore, rest @ ..] = lines.as_slice() else {
        panic!("{out}");
    };
    assert_eq!(*capabilities, "CapEff:\t00000000a80425fb");
    // Programs such as sudo work, as they do under other command lines.
    assert_eq!(*privileges, "NoNewPrivs:\t0");
    assert_eq!(*filter, "Seccomp:\t2");
    assert_eq!(*kcore, "0", "a byte of the kernel's memory");
    assert!(rest.iter().any(|line| line.contains("ermi")), "{out}");
    assert!(
        rest.iter()
            .all(|line| !["mounted", "triggered"].contains(line)),
        "{out}"
    );
    assert_eq!(rest.last(), Some(&"end"), "{out}");
}

#[test]
fn sixty_four_mebibytes_pass_in_and_out_unchanged() {
    let dir = tempfile::tempdir().unwrap();
    let (input, output) = (dir.path().join("in"), dir.path().join("out"));
    Command::new(
        "sh",
        [
            "-c",
            &format!("head -c 67108864 /dev/urandom > {}", input.display()),
        ],
    )
    .run()
    .success();
    let run = Command::bulkhead(["run", "--rm", "-i", BUSYBOX, "--", "cat"])
        .stdin_from(&input)
        .stdout_to(&output)
        .run();
    assert_eq!(run.code, 0, "{run}");
    assert!(
        Command::new("cmp", [&input, &output]).run().code == 0,
        "what came out differs"
    );
}

#[test]
fn output_of_a_command_that_exits_at_once_is_complete_io_12() {
    for _ in 0..5 {
        assert_eq!(
            sh("head -c 1000000 /dev/zero | tr '\\0' x").success().len(),
            1_000_000
        );
    }
}

#[test]
fn a_shell_on_a_terminal_is_interactive_and_follows_its_size() {
    let mut terminal = Terminal::open(
        100,
        30,
        &Command::bulkhead(["run", "--rm", "-t", "-i", BUSYBOX, "--", "sh"]),
    );
    terminal.expect("# ");
    terminal.send("stty size\n");
    terminal.expect("30 100");
    terminal.resize(120, 40);
    terminal.send("sleep 1; stty size\n");
    terminal.expect("40 120");
    terminal.send("tty; exit 7\n");
    terminal.expect("/dev/pts/0");
    assert_eq!(terminal.wait(), 7);
}

#[test]
fn python_runs() {
    assert_eq!(debian("python3 -c 'print(sum(range(10)), __import__(\"hashlib\").sha256(b\"x\").hexdigest()[:8])'").success(), "45 2d711642\n");
}

#[test]
fn the_package_manager_runs() {
    assert!(debian("apt-get --version").success().starts_with("apt "));
}

#[test]
fn a_c_compiler_builds_a_program_that_runs() {
    let out = debian(
        "cd /tmp && printf '#include <stdio.h>\\nint main(){puts(\"compiled\");return 3;}\\n' > a.c && cc a.c -o a && ./a; echo $?",
    );
    assert_eq!(out.success(), "compiled\n3\n");
}

#[test]
fn redis_answers_a_client_in_the_same_container() {
    let server = Command::bulkhead([
        "run",
        "--rm",
        "--name",
        "redis",
        "--memory",
        "512M",
        DEBIAN,
        "--",
        "redis-server",
    ])
    .start();
    server.wait_for_output("Ready to accept connections");
    let cli = |args: &[&str]| {
        let mut all = vec!["exec", "redis", "redis-cli"];
        all.extend(args);
        Command::bulkhead(all).run().success()
    };
    assert_eq!(cli(&["set", "answer", "42"]), "OK\n");
    assert_eq!(cli(&["get", "answer"]), "42\n");
    Command::bulkhead(["kill", "redis", "TERM"]).run().success();
    assert_eq!(server.wait().code, 0);
}

#[test]
fn a_signal_to_the_launcher_reaches_the_command() {
    let run = Command::bulkhead([
        "run",
        "--rm",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "trap 'echo caught; exit 9' TERM; echo ready; while :; do sleep 0.1; done",
    ])
    .start();
    run.wait_for_output("ready");
    run.signal(libc::SIGTERM);
    let out = run.wait();
    assert_eq!((out.code, out.stdout.as_str()), (9, "ready\ncaught\n"));
}

#[test]
fn a_read_only_root_refuses_writes_and_volumes_take_them_fs_08() {
    let line = "touch /f 2>&1; mkdir /d 2>&1; touch /tmp/f 2>&1; echo x > /data/f && cat /data/f";
    let dir = tempfile::tempdir().unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let run = [
        "run",
        "--rm",
        "--read-only",
        "-v",
        &volume,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        line,
    ];
    let out = Command::bulkhead(run).run().success();
    assert_eq!(out.matches("Read-only file system").count(), 3, "{out}");
    assert!(out.ends_with("\nx\n"), "{out}");
}

#[test]
fn a_disk_of_the_host_is_a_device_if_the_command_line_says_so_fs_36() {
    let image = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(image.path(), "first line\n".repeat(100)).unwrap();
    let disk = LoopDevice::new(image.path());
    let device = format!("--device={}:/dev/data:r", disk.path());
    let line = "head -n 1 /dev/data; echo x 2>/dev/null > /dev/data || echo refused";
    let out = Command::bulkhead(["run", "--rm", &device, BUSYBOX, "--", "sh", "-c", line]).run();
    assert_eq!(out.success(), "first line\nrefused\n");
    assert!(disk.is_free());
    let none = Command::bulkhead(["run", "--rm", "--device=/etc/passwd", BUSYBOX]).run();
    assert_eq!(none.code, 125, "{none}");
    assert!(
        none.stderr.contains("/etc/passwd: it is no device"),
        "{none}"
    );
}

#[test]
fn a_full_disk_behind_the_output_is_told() {
    let run = [
        "run",
        "--rm",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo lost; exit 0",
    ];
    let out = Command::bulkhead(run).stdout_to("/dev/full".as_ref()).run();
    assert!(out.code != 0, "{out}");
    assert!(out.stderr.contains("No space left"), "{out}");
}

#[test]
fn every_signal_of_a_long_life_reaches_the_command() {
    let line = "n=0; trap 'n=$((n + 1)); echo caught $n; [ $n -lt 5 ] || exit 9' INT; echo ready; while :; do sleep 0.1; done";
    let run = Command::bulkhead(["run", "--rm", BUSYBOX, "--", "sh", "-c", line]).start();
    run.wait_for_output("ready");
    for number in 1..=5 {
        run.signal(libc::SIGINT);
        run.wait_for_output(&format!("caught {number}"));
        // Not the haste of somebody who wants it to end.
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    assert_eq!(run.wait().code, 9);
}

#[test]
fn a_fork_bomb_without_a_limit_leaves_agent_and_kill_alone_f58() {
    let bomb = "echo ready; b() { b | b & }; b 2>/dev/null; sleep 1000";
    let run = [
        "run", "--rm", "--name", "bomb", BUSYBOX, "--", "sh", "-c", bomb,
    ];
    let run = Command::bulkhead(run).start();
    run.wait_for_output("ready");
    // A further process shares the processor with thousands of others, each of which has
    // its turn first, and may fall to the OOM killer: it may fail and be slow, but it ends.
    let out = Command::bulkhead(["exec", "bomb", "true"]).run();
    assert!([0, 125, 137].contains(&out.code), "{out}");
    Command::bulkhead(["kill", "bomb", "KILL"]).run().success();
    assert_eq!(run.wait().code, 137);
}
