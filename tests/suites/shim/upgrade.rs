//! Another program takes the shim's place while its pod runs.

use std::{
    fs,
    io::Write,
    os::unix::fs::PermissionsExt,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::Command as Run;
use containerd_shim_protos::api::Status;
use serde_json::Value;

use crate::{
    output::{pattern, same, within, within_ms},
    pod::Pod,
    process::Streams,
    root::{Root, config, forever, process},
    task::{BINARY, NAMESPACE},
};

const SECOND: Duration = Duration::from_secs(1);

/// What `bulkhead upgrade` says of the pods of this suite.
fn upgrade() -> Value {
    let arguments = ["upgrade", "--namespace", NAMESPACE, "--format", "json"];
    let told = Run::new("bulkhead", arguments).run();
    serde_json::from_str(&told.stdout).unwrap_or_else(|error| panic!("{error}: {told}"))
}

/// Waits until so many ends were told: events come after the answers. There must be no
/// more of them.
#[track_caller]
fn ends_are_told(pod: &Pod, count: usize) {
    let told = || {
        let events = pod.events.all().into_iter();
        events.filter(|event| event.topic == "/tasks/exit").count()
    };
    let limit = within(10 * SECOND);
    while told() < count && Instant::now() < limit {
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(told(), count);
}

/// Has the shim of the one pod become its program anew.
#[track_caller]
pub(crate) fn upgraded(pod: &Pod) {
    let told = upgrade();
    assert_eq!(told[0]["outcome"], "taken over", "{told}\n{}", pod.log());
    assert_eq!(told.as_array().unwrap().len(), 1, "{told}");
}

#[test]
fn who_waits_reads_and_writes_does_not_notice_that_the_shim_is_another_program() {
    let pod = Pod::start("upgrade", Root::new(), &config(&forever(&[])));
    let init = pod.run(Streams::Output);
    let shim = pod.shim();
    let cat = pod.exec(&process(&["cat"]), Streams::All);
    let started = cat.start();
    started.unwrap();
    let mut stdin = cat.stdin();
    let line = "i=0; while [ $i -lt 3 ]; do read w; echo $i $w; i=$((i+1)); done; exit 9";
    let counts = pod.exec(&process(&["/bin/sh", "-c", line]), Streams::All);
    // Registered by the one program, started by another.
    let later = pod.exec(&process(&["sh", "-c", "exit 5"]), Streams::Output);
    counts.start().unwrap();
    let mut numbers = counts.stdin();
    thread::scope(|scope| {
        let waits = [&init, &cat, &counts].map(|process| scope.spawn(|| process.wait()));
        for round in 0..3 {
            upgraded(&pod);
            assert_eq!(pod.shim(), shim, "it is another process");
            assert_eq!(init.state(), Status::RUNNING.into());
            writeln!(numbers, "word").unwrap();
            counts.says(&format!("{round} word\n"), within(10 * SECOND));
            writeln!(stdin, "line {round}").unwrap();
            cat.says(&format!("line {round}\n"), within(10 * SECOND));
        }
        later.start().unwrap();
        assert_eq!(later.wait(), 5);
        later.delete().unwrap();
        cat.close_stdin();
        drop(stdin);
        init.kill();
        let ends = waits.map(|wait| wait.join().unwrap());
        assert_eq!((ends[0], ends[2]), (137, 9));
        // It reads its end, or dies with the first process.
        assert!(matches!(ends[1], 0 | 137), "{ends:?}");
    });
    ends_are_told(&pod, 4);
    for exec in [&cat, &counts] {
        exec.delete().unwrap();
    }
    pod.end();
}

#[test]
fn no_byte_is_lost_or_told_twice_when_the_shim_is_another_program() {
    let pod = Pod::start("upgrade-bytes", Root::new(), &config(&forever(&[])));
    pod.run(Streams::Output);
    let cat = pod.exec(&process(&["cat"]), Streams::All);
    cat.start().unwrap();
    let bytes = pattern(8 << 20);
    let mut stdin = cat.stdin();
    thread::scope(|scope| {
        let writing = scope.spawn(move || {
            for part in bytes.chunks(100_000) {
                stdin.write_all(part).unwrap();
            }
            bytes
        });
        let mut rounds = 0;
        while !writing.is_finished() || rounds < 3 {
            upgraded(&pod);
            rounds += 1;
        }
        let bytes = writing.join().unwrap();
        cat.close_stdin();
        assert_eq!(cat.wait(), 0, "{}", cat.words());
        same(&cat.output(within(30 * SECOND)), &bytes);
    });
    cat.delete().unwrap();
    pod.end();
}

#[test]
fn an_end_that_comes_while_the_shim_changes_is_told_once_with_its_code() {
    let pod = Pod::start("upgrade-end", Root::new(), &config(&forever(&[])));
    pod.run(Streams::Output);
    for code in 1..=5_u32 {
        let line = format!("sleep 0.{code}; exit {code}");
        let exec = pod.exec(&process(&["/bin/sh", "-c", &line]), Streams::Output);
        exec.start().unwrap();
        thread::scope(|scope| {
            let wait = scope.spawn(|| exec.wait());
            upgraded(&pod);
            assert_eq!(wait.join().unwrap(), code);
        });
        exec.delete().unwrap();
    }
    ends_are_told(&pod, 5);
    pod.end();
}

#[test]
fn a_paused_container_is_paused_for_the_next_program_too() {
    let pod = Pod::start("upgrade-paused", Root::new(), &config(&forever(&[])));
    let init = pod.run(Streams::Output);
    pod.pause();
    upgraded(&pod);
    assert_eq!(init.state(), Status::PAUSED.into());
    pod.resume();
    assert_eq!(init.state(), Status::RUNNING.into());
    // Killed on the host by the number that stands for it.
    let pid = init.pid();
    upgraded(&pod);
    Command::new("kill")
        .args(["-9", &pid.to_string()])
        .status()
        .unwrap();
    assert_eq!(init.wait(), 137);
    pod.end();
}

#[test]
fn a_program_that_cannot_take_over_changes_nothing() {
    let pod = Pod::start("upgrade-no", Root::new(), &config(&forever(&[])));
    let init = pod.run(Streams::Output);
    let own = fs::read_link(format!("/proc/{}/exe", pod.shim())).unwrap();
    let aside = own.with_extension("aside");
    // As a package does it: a new file under the old name.
    let replaced = |with: &str| {
        let new = own.with_extension("new");
        fs::copy(with, &new).unwrap();
        fs::rename(&new, &own).unwrap();
    };
    fs::hard_link(&own, &aside).unwrap();
    // It says the right words, and does not understand what it is shown.
    let says = Run::new(BINARY, ["-carries"]).run();
    let version = says.success();
    let deaf = format!(
        "#!/bin/sh\n[ -n \"$(cat)\" ] || echo '{}'\n",
        version.trim_end()
    );
    let place = own.with_extension("deaf");
    fs::write(&place, deaf).unwrap();
    fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
    for (with, words) in [
        ("/bin/true", "cannot take over"),
        ("/etc/hostname", ""),
        (place.to_str().unwrap(), "cannot take over"),
    ] {
        replaced(with);
        let told = upgrade();
        assert_eq!(told[0]["outcome"], "refused", "{told}");
        let reason = told[0]["reason"].as_str().unwrap();
        assert!(reason.contains(words), "{told}");
        assert_eq!(init.state(), Status::RUNNING.into());
    }
    fs::remove_file(&place).unwrap();
    fs::rename(&aside, &own).unwrap();
    upgraded(&pod);
    let exec = pod.exec(&process(&["echo", "on"]), Streams::Output);
    exec.start().unwrap();
    assert_eq!(exec.wait(), 0);
    assert_eq!(exec.output(within_ms(200)), b"on\n");
    exec.delete().unwrap();
    pod.end();
}
