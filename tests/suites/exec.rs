//! More commands in a running container: who they are, what they write, how they end.

use std::time::{Duration, Instant};

use bulkhead_tests::{BUSYBOX, Command, Outcome, Running, Terminal};

/// A container with this name that sleeps.
fn sleeper(name: &str) -> Running {
    let run = [
        "run",
        "--rm",
        "--name",
        name,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ];
    let run = Command::bulkhead(run).start();
    run.wait_for_output("ready");
    run
}

fn exec(name: &str, arguments: &[&str]) -> Outcome {
    Command::bulkhead(
        ["exec"]
            .iter()
            .chain(arguments)
            .copied()
            .map(|argument| if argument == "NAME" { name } else { argument }),
    )
    .run()
}

fn end(name: &str, run: Running) {
    Command::bulkhead(["kill", name, "KILL"]).run().success();
    assert_eq!(run.wait().code, 137);
}

#[test]
fn an_exec_as_another_user_has_its_group_and_home() {
    let run = sleeper("who");
    let who = "echo $HOME $(id -u):$(id -g)";
    // The busybox image's passwd says that 1000 has the group 1000 and lives in /tmp.
    for (user, expected) in [
        ("1000", "/tmp 1000:1000\n"),
        ("1000:7", "/tmp 1000:7\n"),
        ("root", "/root 0:0\n"),
        ("4711", "/ 4711:0\n"),
    ] {
        let out = exec("who", &["-u", user, "NAME", "sh", "-c", who]);
        assert_eq!(out.success(), expected, "{user}");
    }
    let unknown = exec("who", &["-u", "nobody-knows", "NAME", "true"]);
    assert!(unknown.failure().contains("nobody-knows"));
    end("who", run);
}

#[test]
fn an_exec_ends_with_its_command_though_a_child_holds_its_output() {
    let run = sleeper("child");
    let began = Instant::now();
    let out = exec(
        "child",
        &["NAME", "sh", "-c", "sleep 300 & echo started; exit 7"],
    );
    assert_eq!((out.code, out.stdout.as_str()), (7, "started\n"), "{out}");
    assert!(
        began.elapsed() < Duration::from_secs(60),
        "it waited for the child"
    );
    end("child", run);
}

#[test]
fn a_hundred_execs_at_once_lose_nothing() {
    let run = sleeper("many");
    let running: Vec<Running> = (0..100)
        .map(|number| {
            let line = format!(
                "echo out-{number}; echo err-{number} >&2; exit {}",
                number % 7
            );
            Command::bulkhead(["exec", "many", "sh", "-c", &line]).start()
        })
        .collect();
    for (number, exec) in running.into_iter().enumerate() {
        let out = exec.wait();
        assert_eq!(
            (out.stdout.as_str(), out.stderr.as_str(), out.code),
            (
                format!("out-{number}\n").as_str(),
                format!("err-{number}\n").as_str(),
                i32::try_from(number % 7).unwrap_or(-1)
            ),
            "{out}"
        );
    }
    end("many", run);
}

#[test]
fn an_exec_on_a_terminal_is_interactive() {
    let run = sleeper("terminal");
    let shell = ["exec", "-t", "-i", "terminal", "sh"];
    let mut terminal = Terminal::open(90, 20, &Command::bulkhead(shell));
    terminal.expect("# ");
    terminal.send("stty size; tty; exit 4\n");
    terminal.expect("20 90");
    terminal.expect("/dev/pts/");
    assert_eq!(terminal.wait(), 4);
    end("terminal", run);
}

#[test]
fn what_is_listed_is_there_and_what_is_removed_is_gone() {
    let name = "kept";
    let run = Command::bulkhead([
        "run",
        "--name",
        name,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo x > /f",
    ]);
    assert_eq!(run.run().code, 0);
    let list = Command::bulkhead(["list"]).run().success();
    assert!(
        list.lines().any(|line| line.trim_start().starts_with(name)),
        "{list}"
    );
    let taken = Command::bulkhead(["run", "--name", name, BUSYBOX, "--", "true"]).run();
    assert!(taken.failure().contains(name));
    Command::bulkhead(["rm", name]).run().success();
    let list = Command::bulkhead(["list"]).run().success();
    assert!(!list.contains(name), "{list}");
    let again = Command::bulkhead(["rm", name]).run();
    assert!(again.failure().contains(name));
}

#[test]
fn a_running_container_is_not_removed_without_force() {
    let run = sleeper("busy");
    let refused = Command::bulkhead(["rm", "busy"]).run();
    assert!(refused.failure().contains("busy"));
    end("busy", run);
}
