//! Standard streams under containerd: each kind that a caller can name, byte for byte,
//! and who goes away in the middle of them.

#[path = "streams/caller.rs"]
mod caller;

use std::{fs, os::unix::fs::PermissionsExt, path::Path, thread, time::Duration};

use bulkhead_tests::{Command, Outcome, Running, Terminal};
use tempfile::TempDir;

use self::caller::Caller;

const IMAGE: &str = bulkhead_tests::BUSYBOX_NAME;
const RUNTIME: [&str; 3] = ["run", "--runtime", "io.containerd.bulkhead.v2"];
/// Lines of what [`NUMBERS`] prints, 5.3 MB.
const LINES: usize = 700_000;
const NUMBERS: &str = "seq 1 700000";

fn ctr<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    Command::new("ctr", arguments).run()
}

/// Runs a shell line in a container, with options of `ctr run`, to its end.
fn run(options: &[&str], id: &str, line: &str) -> Outcome {
    let arguments = RUNTIME.iter().chain(options).copied();
    ctr(arguments.chain([IMAGE, id, "sh", "-c", line]))
}

/// Starts the same.
fn start(options: &[&str], id: &str, line: &str) -> Running {
    let arguments = RUNTIME.iter().chain(options).copied();
    Command::new("ctr", arguments.chain([IMAGE, id, "sh", "-c", line])).start()
}

fn remove(id: &str) {
    ctr(["task", "rm", "--force", id]);
    ctr(["container", "rm", id]).success();
}

/// What `seq 1 LAST` prints.
fn numbers(last: usize) -> String {
    (1..=last).map(|number| format!("{number}\n")).collect()
}

/// Fails without printing millions of bytes.
#[track_caller]
fn same(got: &str, expected: &str) {
    let place = got.bytes().zip(expected.bytes()).position(|(a, b)| a != b);
    assert!(
        got == expected,
        "{} bytes instead of {}; they differ at {place:?}",
        got.len(),
        expected.len()
    );
}

/// A directory with a program that logs.
fn logger(script: &str) -> (TempDir, String) {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let path = dir.path().join("logger");
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("the script");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("its mode");
    let uri = format!("binary://{0}/logger?dir={0}", dir.path().display());
    (dir, uri)
}

fn read(dir: &TempDir, name: &str) -> String {
    fs::read_to_string(dir.path().join(name)).unwrap_or_default()
}

/// Waits until a file has a text in it.
fn wait_for_text(path: &Path, text: &str) {
    for _ in 0..600 {
        if fs::read_to_string(path).is_ok_and(|all| all.contains(text)) {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("no {text:?} in {path:?}");
}

/// Kills containerd and starts it again.
fn restart_containerd() {
    let kill = ["kill", "--kill-whom=main", "--signal=KILL", "containerd"];
    Command::new("systemctl", kill).run().success();
    let _ = Command::new("systemctl", ["stop", "containerd"]).run();
    Command::new("systemctl", ["start", "containerd"])
        .run()
        .success();
}

#[test]
fn a_logging_program_gets_every_byte_of_a_container_io_18_io_19() {
    let (dir, uri) = logger(
        "{ echo $CONTAINER_ID in $CONTAINER_NAMESPACE; echo $(ls /proc/self/fd)
           readlink /proc/self/ns/mnt; } >$2/who
         echo >&5; exec 5>&-
         cat <&3 >$2/out & cat <&4 >$2/err & wait; echo ended >$2/end",
    );
    let line = format!("{NUMBERS}; seq 1 1000 >&2; exit 4");
    let out = run(&["--rm", "--log-uri", &uri], "logged", &line);
    assert_eq!(out.code, 4, "{out}");
    same(&read(&dir, "out"), &numbers(LINES));
    same(&read(&dir, "err"), &numbers(1000));
    assert_eq!(read(&dir, "end"), "ended\n");
    let own = fs::read_link("/proc/self/ns/mnt").expect("a namespace");
    // The last descriptor is that of the directory which is listed.
    let who = format!("logged in default\n0 1 2 3 4 5 6\n{}\n", own.display());
    assert_eq!(read(&dir, "who"), who);
}

#[test]
fn a_container_whose_logging_program_dies_is_not_left_hanging_io_20() {
    let (_dir, uri) = logger("echo >&5; exit 0");
    let out = run(
        &["--rm", "--log-uri", &uri],
        "unlogged",
        "yes; echo $?; exit 5",
    );
    assert_eq!(out.code, 5, "{out}");
}

#[test]
fn a_logging_program_that_ignores_its_end_is_ended_with_its_container_io_18() {
    let (dir, uri) = logger("trap '' TERM; echo $$ >$2/pid; echo >&5; exec sleep 1000");
    run(&["--rm", "--log-uri", &uri], "stubborn", "echo hello").success();
    let pid = read(&dir, "pid");
    assert!(!pid.is_empty());
    assert!(!Path::new("/proc").join(pid.trim()).exists());
}

#[test]
fn a_logging_program_that_cannot_be_used_is_named_io_18() {
    let (dir, missing) = logger("exit 1");
    fs::remove_file(dir.path().join("logger")).expect("it was there");
    let (_dir, silent) = logger("exec 5>&-; cat <&3 >/dev/null");
    let silent = silent.replace("binary:", "binary-v2:");
    for uri in [missing, silent] {
        let out = run(&["--rm", "--log-uri", &uri], "refused", "true");
        assert!(out.failure().contains("/logger"));
        ctr(["container", "rm", "refused"]);
    }
}

#[test]
fn a_log_file_gets_every_byte_of_both_outputs() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let uri = format!("file://{}/new/dir/the%20log", dir.path().display());
    let line = format!("{NUMBERS}; echo last >&2");
    run(&["--rm", "--log-uri", &uri], "filed", &line).success();
    let log = read(&dir, "new/dir/the log");
    // Two streams: which one comes first is nobody's promise.
    assert!(log.contains("last\n"));
    same(&log.replacen("last\n", "", 1), &numbers(LINES));
    let mode = |path| fs::metadata(dir.path().join(path)).expect("it is there");
    let mode = |path| mode(path).permissions().mode() & 0o7777;
    assert_eq!((mode("new/dir"), mode("new/dir/the log")), (0o755, 0o644));
}

#[test]
fn stdout_and_stderr_reach_their_reader_apart_and_whole() {
    let line = format!("{NUMBERS} & seq 1 300000 >&2; wait");
    let out = run(&["--rm"], "apart", &line);
    assert_eq!(out.code, 0);
    same(&out.stdout, &numbers(LINES));
    same(&out.stderr, &numbers(300_000));
}

#[test]
fn output_waits_for_a_reader_that_comes_back_after_containerd_was_restarted_io_06() {
    let line = format!("echo ready; while [ ! -e /go ]; do sleep 0.2; done; {NUMBERS}");
    let client = start(&[], "back", &line);
    client.wait_for_output("ready");
    client.signal(libc::SIGKILL);
    assert_eq!(client.wait().code, 137);
    ctr(["task", "exec", "--exec-id", "go", "back", "touch", "/go"]).success();
    // Output is under way, and nobody reads it.
    restart_containerd();
    let back = ctr(["task", "attach", "back"]);
    assert_eq!(back.code, 0);
    same(&back.stdout, &numbers(LINES));
    remove("back");
}

#[test]
fn a_reader_that_stops_stops_its_stream_only_and_loses_nothing_io_10_io_11() {
    let line = format!("echo ready; {NUMBERS}");
    let client = start(&["--rm"], "stopped", &line);
    client.wait_for_output("ready");
    client.signal(libc::SIGSTOP);
    let exec = [
        "task",
        "exec",
        "--exec-id",
        "e",
        "stopped",
        "sh",
        "-c",
        "seq 1 100000",
    ];
    same(&ctr(exec).success(), &numbers(100_000));
    client.signal(libc::SIGCONT);
    let out = client.wait();
    assert_eq!(out.code, 0);
    same(&out.stdout, &format!("ready\n{}", numbers(LINES)));
}

#[test]
fn a_terminal_can_be_left_and_attached_to_again_io_14() {
    let arguments = RUNTIME.iter().chain(&["-t", IMAGE, "left", "sh"]);
    let mut terminal = Terminal::open(90, 20, &Command::new("ctr", arguments));
    terminal.expect("# ");
    terminal.send("word=kept; stty size\n");
    terminal.expect("20 90");
    // The client is killed.
    drop(terminal);
    let mut terminal = Terminal::open(70, 30, &Command::new("ctr", ["task", "attach", "left"]));
    // Its size arrives beside what is typed.
    terminal.send("until [ \"$(stty size)\" = '30 70' ]; do sleep 0.2; done; echo it is $word\n");
    terminal.expect("it is kept");
    terminal.send("exit 6\n");
    assert_eq!(terminal.wait(), 6);
    remove("left");
}

#[test]
fn a_stream_is_served_to_who_comes_for_it_with_credit_io_21() {
    let socket = Caller::socket("streamed");
    let uri = format!("ttrpc+unix://{}?streaming_id=it", socket.display());
    run(&["--detach", "--log-uri", &uri], "streamed", NUMBERS).success();
    let mut caller = Caller::call(&socket, "it");
    same(&caller.read_to_end(), &numbers(LINES));
    remove("streamed");
}

#[test]
fn a_stream_goes_on_for_who_comes_again_io_22() {
    let dir = tempfile::tempdir_in("/var/tmp").expect("a directory");
    let volume = format!(
        "type=bind,src={},dst=/v,options=rbind:rw",
        dir.path().display()
    );
    let socket = Caller::socket("again");
    let uri = format!("ttrpc+unix://{}?streaming_id=it", socket.display());
    let line =
        format!("seq 1 10; touch /v/ready; while [ ! -e /v/go ]; do sleep 0.2; done; {NUMBERS}");
    let options = ["--detach", "--log-uri", &uri, "--mount", &volume];
    run(&options, "again", &line).success();
    let mut first = Caller::call(&socket, "it");
    let beginning = numbers(10);
    same(&first.read(beginning.len()), &beginning);
    // Credit for what it took: all of it is acknowledged.
    first.acknowledge(beginning.len());
    wait_for_text(&dir.path().join("ready"), "");
    drop(first);
    restart_containerd();
    let mut second = Caller::call(&socket, "it");
    fs::write(dir.path().join("go"), "").expect("the volume");
    same(&second.read_to_end(), &numbers(LINES));
    remove("again");
}

#[test]
fn a_shim_with_a_stream_of_containerds_stays_the_program_it_is_and_says_why() {
    let socket = Caller::socket("stays");
    let uri = format!("ttrpc+unix://{}?streaming_id=it", socket.display());
    let line = format!("seq 1 10; sleep 1000 & trap 'kill $!' TERM; wait $!; {NUMBERS}");
    run(&["--detach", "--log-uri", &uri], "stays", &line).success();
    let mut caller = Caller::call(&socket, "it");
    let beginning = numbers(10);
    same(&caller.read(beginning.len()), &beginning);
    let told = Command::bulkhead(["upgrade", "stays", "--format", "json"]).run();
    assert_eq!(told.code, 125, "{told}");
    assert!(told.stdout.contains("a stream of containerd's"), "{told}");
    // It lost nothing by that.
    ctr(["task", "kill", "--signal", "TERM", "stays"]).success();
    same(&caller.read_to_end(), &numbers(LINES));
    remove("stays");
}
