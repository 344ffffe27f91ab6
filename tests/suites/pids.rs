//! The processes of the host that stand for those of a container, and what is set for
//! one pod alone.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{BUSYBOX, BUSYBOX_NAME, Command, Outcome};

const RUNTIME: &str = "io.containerd.bulkhead.v2";

fn ctr<'a>(arguments: impl IntoIterator<Item = &'a str>) -> Outcome {
    Command::new("ctr", arguments).run()
}

/// A container of containerd that sleeps until it is dropped.
struct Container(&'static str);

impl Container {
    fn start(name: &'static str, options: &[&str]) -> Container {
        let container = Container(name);
        let run = ["run", "--runtime", RUNTIME, "--detach"];
        let rest = [BUSYBOX_NAME, name, "sleep", "1000"];
        let words = run.iter().chain(options).chain(&rest).copied();
        ctr(words).success();
        container
    }

    /// Pids with what is known of each, as containerd lists them.
    fn pids(&self) -> Vec<(u32, String)> {
        let list = ctr(["task", "ps", self.0]).success();
        let line = |line: &str| {
            let (pid, info) = line.split_once(char::is_whitespace).unwrap();
            (pid.parse().unwrap(), info.trim().to_owned())
        };
        list.lines().skip(1).map(line).collect()
    }

    fn pid(&self) -> u32 {
        self.pids()[0].0
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        // Each of them may find that it is too late.
        ctr(["task", "rm", "--force", self.0]);
        ctr(["container", "rm", self.0]);
    }
}

fn proc(pid: u32, name: &str) -> PathBuf {
    format!("/proc/{pid}/{name}").into()
}

fn vmm() -> u32 {
    let pid = Command::new("pgrep", ["-x", "bulkhead-vmm"])
        .run()
        .success();
    pid.trim().parse().unwrap()
}

fn until(what: &str, mut seen: impl FnMut() -> bool) {
    let end = Instant::now() + Duration::from_secs(60);
    while !seen() {
        assert!(Instant::now() < end, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

fn kill(pid: u32) {
    Command::new("kill", ["-KILL", &pid.to_string()])
        .run()
        .success();
}

#[test]
fn the_pids_of_a_container_are_small_processes_of_the_host_next_to_its_vmm_ta_50() {
    let container = Container::start("held", &[]);
    let exec = [
        "task",
        "exec",
        "--detach",
        "--exec-id",
        "second",
        "held",
        "sleep",
        "1000",
    ];
    ctr(exec).success();
    let pids = container.pids();
    let [(first, none), (second, which)] = pids.as_slice() else {
        panic!("{pids:?}");
    };
    assert!(none == "-" && which.contains("second"), "{pids:?}");
    let list = ctr(["task", "ls"]).success();
    let line = list.lines().find(|line| line.starts_with("held")).unwrap();
    assert_eq!(line.split_whitespace().nth(1), Some(&*first.to_string()));
    let vmm = vmm();
    for (pid, label) in [(first, "default/held"), (second, "default/held/second")] {
        let words = fs::read_to_string(proc(*pid, "cmdline")).unwrap();
        assert_eq!(words, format!("bulkhead-task\0{label}\0"));
        let link = |pid: u32, name: &str| fs::read_link(proc(pid, name)).unwrap();
        assert_eq!(link(*pid, "ns/net"), link(vmm, "ns/net"));
        assert_ne!(link(*pid, "ns/net"), link(1, "ns/net"));
        let read = |pid: u32, name: &str| fs::read_to_string(proc(pid, name)).unwrap();
        assert_eq!(read(*pid, "cgroup"), read(vmm, "cgroup"));
        assert_eq!(fs::read_dir(proc(*pid, "fd")).unwrap().count(), 0);
        let memory = read(*pid, "smaps_rollup");
        let share = memory
            .lines()
            .find(|line| line.starts_with("Pss:"))
            .unwrap();
        let share: u64 = share.split_whitespace().nth(1).unwrap().parse().unwrap();
        println!("{label}: {share} KiB");
        assert!(share <= 32, "{share} KiB");
    }
    let kill = [
        "task",
        "kill",
        "--exec-id",
        "second",
        "--signal",
        "SIGKILL",
        "held",
    ];
    ctr(kill).success();
    until("the exec has ended", || container.pids().len() == 1);
    assert!(!proc(*second, "stat").exists());
    assert_eq!(container.pid(), *first);
}

#[test]
fn whoever_kills_a_pid_ends_that_container_and_no_other_ta_13() {
    let (killed, other) = (
        Container::start("killed", &[]),
        Container::start("other", &[]),
    );
    kill(killed.pid());
    until("it is stopped", || {
        let list = ctr(["task", "ls"]).success();
        let line = list.lines().find(|line| line.starts_with("killed"));
        line.is_some_and(|line| line.contains("STOPPED"))
    });
    let rm = ctr(["task", "rm", "killed"]);
    assert!(rm.code == 137 || rm.stderr.contains("137"), "{rm}");
    let list = ctr(["task", "ls"]).success();
    let line = list.lines().find(|line| line.starts_with("other")).unwrap();
    assert!(line.contains("RUNNING"), "{list}");
    assert!(proc(other.pid(), "stat").exists());
}

#[test]
fn a_pid_is_in_the_network_namespace_of_the_pod_ta_09() {
    let namespace = Command::new(
        "unshare",
        ["--net", "sh", "-c", "echo ready; exec sleep 1000"],
    );
    let namespace = namespace.start();
    namespace.wait_for_output("ready");
    let path = proc(namespace.pid(), "ns/net");
    let expected = fs::read_link(&path).unwrap();
    let with = format!("network:{}", path.display());
    let container = Container::start("networked", &["--with-ns", &with]);
    let found = fs::read_link(proc(container.pid(), "ns/net")).unwrap();
    drop(container);
    namespace.signal(libc::SIGKILL);
    assert_eq!(namespace.wait().code, 137);
    assert_eq!(found, expected);
}

#[test]
fn pids_end_with_the_shim_whatever_ends_it_f1() {
    let container = Container::start("orphan", &[]);
    let pid = container.pid();
    Command::new("pkill", ["-KILL", "-f", "containerd-shim-bulkhead-v2"])
        .run()
        .success();
    until("the pid is gone", || !proc(pid, "stat").exists());
    until("containerd has seen it", || {
        !ctr(["task", "ls"]).success().contains("orphan")
    });
}

#[test]
fn the_end_of_a_container_is_told_though_its_shim_is_dead_lc_53() {
    let name = "told";
    let run = ["run", "--runtime", RUNTIME, "--detach", BUSYBOX_NAME, name];
    ctr(run.into_iter().chain(["sh", "-c", "exit 7"])).success();
    until("it has ended", || {
        ctr(["task", "ls"]).success().contains("STOPPED")
    });
    let events = Command::new("ctr", ["events"]).start();
    // It says nothing before there is an event.
    thread::sleep(Duration::from_secs(1));
    Command::new("pkill", ["-KILL", "-f", "containerd-shim-bulkhead-v2"])
        .run()
        .success();
    events.wait_for_output("/tasks/delete");
    thread::sleep(Duration::from_secs(1));
    events.signal(libc::SIGKILL);
    let told = events.wait().stdout;
    ctr(["container", "rm", name]).success();
    let exit = told.lines().find(|line| line.contains("/tasks/delete"));
    assert!(exit.unwrap().contains("\"exit_status\":7"), "{told}");
}

#[test]
fn a_pod_has_the_settings_of_the_file_that_its_caller_names_ta_19() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("two.toml");
    fs::write(&file, "memory_mib = 300\n").unwrap();
    let run = |path: &Path| {
        let run = ["run", "--runtime", RUNTIME, "--rm", "--runtime-config-path"];
        let rest = [path.to_str().unwrap(), BUSYBOX_NAME, "configured"];
        let script = ["sh", "-c", "grep MemTotal /proc/meminfo"];
        ctr(run.into_iter().chain(rest).chain(script))
    };
    let total = run(&file).success();
    let total: u64 = total.split_whitespace().nth(1).unwrap().parse().unwrap();
    assert!((200 << 10..300 << 10).contains(&total), "{total} KiB");
    let missing = run(Path::new("/nowhere/settings.toml"));
    ctr(["container", "rm", "configured"]);
    assert!(
        missing.code != 0 && missing.stderr.contains("/nowhere/settings.toml"),
        "{missing}"
    );
}

#[test]
fn a_container_without_containerd_has_a_pid_too_ta_09() {
    let run = [
        "run",
        "--rm",
        "--name",
        "alone",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; exec sleep 1000",
    ];
    let run = Command::bulkhead(run).start();
    run.wait_for_output("ready");
    let pids = Command::new("pgrep", ["-x", "bulkhead-task"])
        .run()
        .success();
    kill(pids.trim().parse().unwrap());
    assert_eq!(run.wait().code, 137);
}
