//! Further processes in a container whose first one does not end by itself.

use std::{
    fs,
    io::Write,
    path::Path,
    process::Command,
    thread,
    time::{Duration, SystemTime},
};

use containerd_shim_protos::api::Status;
use serde_json::{Value, json};

use crate::{
    output::{pattern, same, within, within_ms},
    pod::Pod,
    process::{Process, Streams},
    root::{PATTERN, Root, config, forever, large_file, process, write_pattern},
};

const SECOND: Duration = Duration::from_secs(1);

/// A pod whose container waits for execs.
fn waiting(name: &str, root: Root) -> Pod {
    waiting_as(name, root, &config(&forever(&[])))
}

fn waiting_as(name: &str, root: Root, config: &Value) -> Pod {
    let pod = Pod::start(name, root, config);
    pod.run(Streams::Output);
    pod
}

/// A shell line without an environment.
fn shell(line: &str) -> Value {
    json!({"args": ["/bin/sh", "-c", line], "cwd": "/"})
}

/// Runs an exec to its end, which must be 0; its output has to be there soon after.
fn outcome(exec: &Process<'_>) -> Vec<u8> {
    exec.start().unwrap();
    assert_eq!(exec.wait(), 0, "{}", exec.words());
    let output = exec.output(within_ms(200));
    exec.delete().unwrap();
    output
}

/// Sends bytes through an exec of `cat`; all comes back before it is deleted.
fn round_trip(pod: &Pod, bytes: &[u8]) {
    let exec = pod.exec(&process(&["cat"]), Streams::All);
    exec.start().unwrap();
    let mut stdin = exec.stdin();
    let limit = within(90 * SECOND);
    stdin.write_all(bytes).unwrap();
    assert!(std::time::Instant::now() < limit, "writing took too long");
    drop(stdin);
    exec.close_stdin();
    assert_eq!(exec.wait(), 0, "{}", exec.words());
    same(&exec.output(within(30 * SECOND)), bytes);
    exec.delete().unwrap();
}

#[test]
fn the_output_of_an_exec_is_there_when_its_end_is_told_ss_06() {
    let pod = waiting("exec", Root::new());
    let exec = pod.exec(&process(&["echo", "hello"]), Streams::Output);
    assert_eq!(outcome(&exec), b"hello\n");
    pod.end();
}

#[test]
fn what_is_written_to_an_exec_comes_back_while_it_runs_ss_07() {
    let pod = waiting("stdio-round-trip", Root::new());
    let exec = pod.exec(&process(&["cat"]), Streams::All);
    exec.start().unwrap();
    let mut stdin = exec.stdin();
    stdin.write_all(b"a token\n").unwrap();
    exec.says("a token\n", within(30 * SECOND));
    assert_eq!(exec.state(), Status::RUNNING.into());
    exec.kill();
    assert_eq!(exec.wait(), 137);
    exec.delete().unwrap();
    pod.end();
}

#[test]
fn twenty_megabytes_go_through_an_exec_and_its_output_ends_before_delete_ss_08() {
    let pod = waiting("large-stdio-round-trip", Root::new());
    round_trip(&pod, &pattern(20 << 20));
    pod.end();
}

#[test]
fn standard_input_ends_when_its_caller_says_so_and_not_when_it_goes_ss_09() {
    let pod = waiting("stdin-detach-reattach", Root::new());
    let exec = pod.exec(&process(&["cat"]), Streams::All);
    exec.start().unwrap();
    for line in ["first\n", "second\n"] {
        let mut stdin = exec.stdin();
        stdin.write_all(line.as_bytes()).unwrap();
        drop(stdin);
        // That it is not taken for the end must have had time to go wrong.
        thread::sleep(Duration::from_millis(500));
        assert_eq!(exec.state(), Status::RUNNING.into());
    }
    exec.close_stdin();
    assert_eq!(exec.wait(), 0, "{}", exec.words());
    exec.delete().unwrap();
    same(&exec.output(within_ms(0)), b"first\nsecond\n");
    pod.end();
}

#[test]
fn an_exec_of_a_paused_container_is_paused_with_it_ta_52() {
    let pod = waiting("paused-exec", Root::new());
    let exec = pod.exec(&process(&["cat"]), Streams::All);
    exec.start().unwrap();
    let stdin = exec.stdin();
    pod.pause();
    assert_eq!(exec.state(), Status::PAUSED.into());
    pod.resume();
    assert_eq!(exec.state(), Status::RUNNING.into());
    drop(stdin);
    exec.close_stdin();
    assert_eq!(exec.wait(), 0, "{}", exec.words());
    exec.delete().unwrap();
    pod.end();
}

#[test]
fn the_clock_of_the_guest_is_that_of_the_host_ss_10() {
    let seconds = || SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
    let pod = waiting("clock", Root::new());
    let before = seconds();
    let exec = pod.exec(&process(&["date", "+%s"]), Streams::Output);
    let told = String::from_utf8(outcome(&exec)).unwrap();
    let told: u64 = told.trim().parse().unwrap();
    assert!((before - 2..=seconds() + 2).contains(&told), "{told}");
    pod.end();
}

#[test]
fn the_exit_code_of_an_exec_is_that_of_its_program_ss_11() {
    let pod = waiting("exec-exit-codes", Root::new());
    for code in [0, 1, 2, 42, 127, 255] {
        let exec = pod.exec(&shell(&format!("exit {code}")), Streams::Output);
        exec.start().unwrap();
        assert_eq!(exec.wait(), code, "{}", exec.words());
        assert_eq!(exec.delete().unwrap().exit_status, code);
    }
    pod.end();
}

/// Reads a file in the guest; it must have what that of the host has.
fn is_read_whole(pod: &Pod, in_guest: &str, on_host: &Path) {
    let exec = pod.exec(&process(&["sha256sum", in_guest]), Streams::Output);
    let got = String::from_utf8(outcome(&exec)).unwrap();
    let exec = pod.exec(&process(&["stat", "-c", "%s", in_guest]), Streams::Output);
    let length = String::from_utf8(outcome(&exec)).unwrap();
    let expected = Command::new("sha256sum").arg(on_host).output().unwrap();
    let expected = String::from_utf8(expected.stdout).unwrap();
    assert_eq!(expected.split(' ').next(), got.split(' ').next());
    assert_eq!(
        length.trim(),
        fs::metadata(on_host).unwrap().len().to_string()
    );
}

#[test]
fn a_large_file_of_a_layer_is_read_whole_ss_12() {
    let pod = waiting("large-file-read", Root::with_data());
    is_read_whole(&pod, "/data/large", &pod.on_host(1, "data/large"));
    pod.end();
}

#[test]
fn a_large_file_is_read_whole_where_nothing_was_to_bind_it_on_ss_13() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    let file = dir.path().join("large");
    large_file(&file);
    let mut config = config(&forever(&[]));
    let mount = json!({
        "destination": "/tmp/bigfile",
        "type": "bind",
        "source": file,
        "options": ["rbind"],
    });
    config["mounts"].as_array_mut().unwrap().push(mount);
    let pod = waiting_as("bind-mount-read", Root::new(), &config);
    is_read_whole(&pod, "/tmp/bigfile", &file);
    pod.end();
}

/// Starts an exec that writes eight megabytes and ends, and calls Shutdown at once.
fn writes_and_ends(pod: &Pod) -> Process<'_> {
    let exec = pod.exec(&shell(&write_pattern(8, 0)), Streams::Output);
    exec.start().unwrap();
    let limit = within(5 * SECOND);
    pod.shutdown();
    assert!(std::time::Instant::now() < limit, "Shutdown took too long");
    exec
}

#[test]
fn the_output_of_an_exec_that_ends_fast_comes_whole_ss_14() {
    let pod = waiting("fast-exit-output", Root::with_data());
    let exec = writes_and_ends(&pod);
    same(&exec.output(within(30 * SECOND)), &pattern(8 * PATTERN));
    pod.delete();
}

#[test]
fn the_output_of_an_exec_ends_with_it_though_nobody_asks_ss_15() {
    let config = config(&forever(&[]));
    let pod = Pod::start("exec-output-drain", Root::with_data(), &config);
    pod.run(Streams::Nothing);
    let exec = writes_and_ends(&pod);
    same(&exec.output(within(2 * SECOND)), &pattern(8 * PATTERN));
    pod.delete();
}

#[test]
fn an_exec_without_streams_leaves_its_container_alone_ss_16() {
    let config = config(&forever(&[]));
    let pod = Pod::start("exec-discard-io", Root::new(), &config);
    let init = pod.run(Streams::Nothing);
    let exec = pod.exec(&process(&["echo", "nobody hears"]), Streams::Nothing);
    exec.start().unwrap();
    assert_eq!(exec.wait(), 0);
    exec.delete().unwrap();
    assert_eq!(init.state(), Status::RUNNING.into());
    pod.end();
}

#[test]
fn an_exec_of_a_missing_program_fails_at_its_start_and_leaves_nothing_open_ss_17() {
    let pod = waiting("exec-command-not-found", Root::new());
    let exec = pod.exec(&process(&["/bin/is-not-there"]), Streams::All);
    let error = exec.start().unwrap_err().to_string();
    assert!(error.contains("is-not-there"), "{error}");
    assert!(exec.output(within(5 * SECOND)).is_empty());
    let limit = within(5 * SECOND);
    exec.delete().unwrap();
    assert!(std::time::Instant::now() < limit, "Delete took too long");
    let next = pod.exec(&process(&["echo", "next"]), Streams::Output);
    assert_eq!(outcome(&next), b"next\n");
    pod.end();
}

#[test]
fn streams_of_any_size_come_back_as_they_went_ss_65() {
    let pod = waiting("bench-stdio", Root::new());
    for size in [8, 4 << 10, 4 << 20] {
        round_trip(&pod, &pattern(size));
    }
    pod.end();
}
