//! What a container may use and has used, and its standing still: under containerd and
//! by the command line.

use std::{
    fs,
    time::{Duration, Instant},
};

use bulkhead_tests::{
    BUSYBOX, BUSYBOX_NAME, Command, DEBIAN_NAME, Outcome, Running, Setting, volume::volume,
};
use serde_json::Value;

fn ctr<'a>(args: impl IntoIterator<Item = &'a str>) -> Outcome {
    Command::new("ctr", args).run()
}

/// A container of containerd that runs a shell line; removed when dropped.
struct Task(&'static str);

impl Task {
    fn run(id: &'static str, options: &[&str], line: &str) -> Task {
        Task::of(BUSYBOX_NAME, id, options, line)
    }

    fn of(image: &str, id: &'static str, options: &[&str], line: &str) -> Task {
        let runtime = ["run", "--runtime", "io.containerd.bulkhead.v2", "--detach"];
        let task = Task(id);
        let command = [image, id, "sh", "-c", line];
        let arguments = runtime.iter().chain(options).chain(&command).copied();
        ctr(arguments).success();
        task
    }

    /// `ctr task VERB ID`.
    fn does(&self, verb: &str) -> Outcome {
        ctr(["task", verb, self.0])
    }

    fn exec(&self, exec: &str, line: &str) -> Outcome {
        ctr(["task", "exec", "--exec-id", exec, self.0, "sh", "-c", line])
    }

    fn status(&self) -> String {
        let list = ctr(["task", "ls"]).success();
        let line = list.lines().find(|line| line.starts_with(self.0));
        let last = line.and_then(|line| line.split_whitespace().last());
        last.unwrap_or("none").to_owned()
    }

    /// Waits until it has ended.
    fn ended(&self) {
        let end = Instant::now() + Duration::from_secs(120);
        while self.status() != "STOPPED" {
            assert!(Instant::now() < end, "{} does not end", self.0);
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    fn metrics(&self) -> Value {
        let text = ctr(["task", "metrics", "--format", "json", self.0]).success();
        serde_json::from_str(&text).expect("metrics are JSON")
    }
}

impl Drop for Task {
    fn drop(&mut self) {
        let _ = ctr(["task", "resume", self.0]);
        let _ = ctr(["task", "rm", "--force", self.0]);
        let _ = ctr(["container", "rm", self.0]);
    }
}

#[test]
fn a_paused_container_stands_still_until_it_is_resumed_ta_51() {
    let events = Command::new("ctr", ["events"]).start();
    let line = "n=0; while :; do n=$((n+1)); echo $n > /next; mv /next /count; done";
    let task = Task::run("still", &[], line);
    let holder = [
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "side",
        "still",
        "sleep",
        "1000",
    ];
    ctr(holder).success();
    let count = || task.exec("count", "cat /count").success();
    let first = count();
    assert_ne!(first, count());
    task.does("pause").success();
    assert_eq!(task.status(), "PAUSED");
    let refused = task.exec("late", "true").failure();
    assert!(refused.contains("paused"), "{refused}");
    // Pausing again changes nothing and is told nobody.
    task.does("pause").success();
    let used = task.metrics()["cpu"]["usage_usec"].as_u64();
    std::thread::sleep(Duration::from_secs(2));
    assert_eq!(task.metrics()["cpu"]["usage_usec"].as_u64(), used);
    task.does("resume").success();
    assert_eq!(task.status(), "RUNNING");
    let second = count();
    assert_ne!(second, count());
    events.wait_for_output("/tasks/resumed");
    events.signal(libc::SIGTERM);
    let told = events.wait().stdout;
    assert_eq!(told.matches("/tasks/paused").count(), 1, "{told}");
    assert_eq!(told.matches("/tasks/resumed").count(), 1, "{told}");
}

/// A program that writes into a file through memory and keeps it mapped.
const MAPS: &str = r#"
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>
int main(void) {
    int file = open("/v/file", O_RDWR | O_CREAT, 0644);
    if (ftruncate(file, 8192))
        return 1;
    char *page = mmap(0, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    page[0] = 'a';
    page[4096] = 'b';
    creat("/v/ready", 0644);
    for (;;)
        pause();
}
"#;

#[test]
fn what_was_written_through_memory_is_on_the_host_when_it_stands_still_ta_53() {
    let (dir, _) = volume();
    let place = dir.path().to_str().expect("UTF-8");
    fs::write(dir.path().join("maps.c"), MAPS).expect("the volume");
    let mount = format!("type=bind,src={place},dst=/v,options=rbind:rw");
    let line = "cc -o /tmp/maps /v/maps.c && exec /tmp/maps";
    let task = Task::of(DEBIAN_NAME, "maps", &["--mount", &mount], line);
    let end = Instant::now() + Duration::from_secs(240);
    while !dir.path().join("ready").exists() {
        assert!(Instant::now() < end, "it does not run: {}", task.status());
        std::thread::sleep(Duration::from_millis(200));
    }
    task.does("pause").success();
    let file = fs::read(dir.path().join("file")).expect("the file");
    assert_eq!((file[0], file[4096], file.len()), (b'a', b'b', 8192));
}

#[test]
fn a_paused_container_dies_of_sigkill_ta_47() {
    let task = Task::run("frozen", &[], "exec sleep 1000");
    task.does("pause").success();
    ctr(["task", "kill", "--signal", "SIGKILL", "frozen"]).success();
    task.ended();
}

#[test]
fn statistics_tell_limits_and_use_of_the_container_itself_ta_57() {
    let limit = ["--memory-limit", "134217728"];
    let task = Task::run("counted", &limit, "i=0; while :; do i=$((i+1)); done");
    let first = task.metrics();
    let number = |metrics: &Value, part: &str, name: &str| metrics[part][name].as_u64();
    assert_eq!(
        number(&first, "memory", "usage_limit"),
        Some(134_217_728),
        "{first}"
    );
    assert!(number(&first, "memory", "usage") > Some(0), "{first}");
    assert_eq!(number(&first, "pids", "current"), Some(1), "{first}");
    std::thread::sleep(Duration::from_secs(1));
    let second = task.metrics();
    let (before, after) = (
        number(&first, "cpu", "usage_usec"),
        number(&second, "cpu", "usage_usec"),
    );
    assert!(after > before && before > Some(0), "{first} {second}");
}

#[test]
fn statistics_of_what_the_oom_killer_ended_say_so_until_it_is_deleted_ta_65() {
    let limit = ["--memory-limit", "33554432"];
    let task = Task::run("greedy", &limit, "exec tail /dev/zero");
    task.ended();
    let metrics = task.metrics();
    assert_eq!(
        metrics["memory_events"]["oom_kill"].as_u64(),
        Some(1),
        "{metrics}"
    );
    assert_eq!(
        metrics["memory"]["usage_limit"].as_u64(),
        Some(33_554_432),
        "{metrics}"
    );
    ctr(["task", "rm", "greedy"]);
    assert!(
        ctr(["task", "metrics", "greedy"])
            .failure()
            .contains("not found")
    );
}

/// A named container of the command line that says `ready` and then runs a line.
fn named(name: &str, options: &[&str], image: &str, line: &str) -> Running {
    let run = ["run", "--rm", "--name", name];
    let command = [image, "--", "sh", "-c", line];
    let run = Command::bulkhead(run.iter().chain(options).chain(&command)).start();
    run.wait_for_output("ready");
    run
}

fn bulkhead(arguments: &[&str]) -> Outcome {
    Command::bulkhead(arguments).run()
}

fn end(name: &str, run: Running) {
    bulkhead(&["kill", name, "KILL"]).success();
    assert_eq!(run.wait().code, 137);
}

#[test]
fn limits_change_in_the_guest_and_others_stay_ta_66() {
    let line = "echo ready; exec sleep 1000";
    let run = named("grown", &["--memory", "256m"], BUSYBOX, line);
    let limits = || {
        let files =
            ["memory.max", "pids.max", "cpu.max"].map(|file| format!("/sys/fs/cgroup/{file}"));
        let cat: Vec<&str> = ["exec", "grown", "cat"]
            .into_iter()
            .chain(files.iter().map(String::as_str))
            .collect();
        bulkhead(&cat).success()
    };
    assert_eq!(limits(), "268435456\nmax\nmax 100000\n");
    bulkhead(&["update", "--memory", "64m", "--pids", "50", "grown"]).success();
    assert_eq!(limits(), "67108864\n50\nmax 100000\n");
    bulkhead(&["update", "--cpus", "0.5", "grown"]).success();
    assert_eq!(limits(), "67108864\n50\n50000 100000\n");
    // Back to what it had, which its machine has for sure.
    bulkhead(&["update", "--memory", "256m", "grown"]).success();
    assert_eq!(limits(), "268435456\n50\n50000 100000\n");
    let refused = bulkhead(&["update", "--memory", "512g", "grown"]).failure();
    assert!(
        refused.contains("memory.limit") && refused.contains("at most"),
        "{refused}"
    );
    let refused = bulkhead(&["update", "--cpus", "64", "grown"]).failure();
    assert!(
        refused.contains("cpu.quota") && refused.contains("at most"),
        "{refused}"
    );
    assert_eq!(limits(), "268435456\n50\n50000 100000\n");
    let stats = bulkhead(&["stats", "--format", "json", "grown"]).success();
    let stats: Value = serde_json::from_str(&stats).expect("statistics are JSON");
    assert_eq!(
        stats[0]["memory_limit"].as_u64(),
        Some(268_435_456),
        "{stats}"
    );
    assert_eq!(stats[0]["pids_limit"].as_u64(), Some(50), "{stats}");
    let table = bulkhead(&["stats"]).success();
    assert!(
        table
            .lines()
            .any(|line| line.contains("grown") && line.contains("256.0 MiB")),
        "{table}"
    );
    end("grown", run);
}

#[test]
fn a_machine_grows_for_an_update_and_gives_back_what_is_not_needed_ta_66_rs_14() {
    let _setting = Setting::put("most_vcpus = 3\nmost_memory_mib = 1024\n");
    let line = "echo ready; exec sleep 1000";
    let run = named("grown", &["--memory", "128m", "--cpus", "1"], BUSYBOX, line);
    let exec = |line: &str| bulkhead(&["exec", "grown", "sh", "-c", line]);
    let size = || {
        let line = "nproc; awk '/MemTotal/ { print int($2 / 1024) }' /proc/meminfo";
        let lines = exec(line).success();
        let mut lines = lines.lines().map(|line| line.parse::<u64>());
        let mut next = || lines.next().and_then(Result::ok).expect("a number");
        (next(), next())
    };
    let (processors, memory) = size();
    assert_eq!(processors, 1);
    bulkhead(&["update", "--memory", "600m", "--cpus", "2.5", "grown"]).success();
    assert_eq!(size(), (3, memory + 472));
    // All of it can be used at once, which the machine had no place for at first.
    exec("dd if=/dev/zero of=/dev/null bs=500M count=1").success();
    exec("for n in 0 1 2; do taskset -p $((1 << n)) $$ || exit 1; done").success();
    for (option, value, field) in [
        ("--memory", "1025m", "memory.limit"),
        ("--cpus", "3.01", "cpu.quota"),
    ] {
        let refused = bulkhead(&["update", option, value, "grown"]).failure();
        assert!(
            refused.contains(field) && refused.contains("can have at most"),
            "{refused}"
        );
    }
    bulkhead(&["update", "--memory", "128m", "--cpus", "1", "grown"]).success();
    // What the guest's kernel uses itself it cannot give back.
    let end_at = Instant::now() + Duration::from_secs(60);
    while !matches!(size(), (1, now) if now <= memory + 16) {
        assert!(Instant::now() < end_at, "{:?}, not {memory}", size());
    }
    end("grown", run);
}
