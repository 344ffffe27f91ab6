//! Whatever breaks: one sentence with the cause, an exit code that is not 0, and
//! nothing left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bulkhead_agent_api::SHARE_DIR;
use bulkhead_tests::{BUSYBOX, Command, LeakCheck, Outcome, Running, Setting, bundle};
use serde_json::{Value, json};
use tempfile::TempDir;

/// A container that runs until something happens to it.
fn endless() -> Running {
    let run = Command::bulkhead([
        "run",
        "--rm",
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "echo ready; while :; do sleep 1; done",
    ])
    .start();
    run.wait_for_output("ready");
    run
}

/// A named container that sleeps.
fn endless_named(name: &str) -> Running {
    let line = "echo ready; exec sleep 1000";
    let run = [
        "run", "--rm", "--name", name, BUSYBOX, "--", "sh", "-c", line,
    ];
    let run = Command::bulkhead(run).start();
    run.wait_for_output("ready");
    run
}

fn kill_all(pattern: &str) {
    Command::new("pkill", ["-KILL", "-f", pattern])
        .run()
        .success();
}

/// A failure that a person can read: one line that names the cause.
#[track_caller]
fn assert_said(outcome: &Outcome, cause: &str) {
    assert!(outcome.code != 0, "{outcome}");
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    let [line] = lines.as_slice() else {
        panic!("not one line: {outcome}");
    };
    assert!(
        line.starts_with("bulkhead: ") && line.contains(cause),
        "{outcome}"
    );
}

fn run_true() -> Outcome {
    Command::bulkhead(["run", "--rm", BUSYBOX, "--", "true"]).run()
}

#[test]
fn a_machine_that_dies_leaves_the_files_of_a_container_that_is_kept_f22() {
    let line = "echo work > /f; sync; echo ready; exec sleep 1000";
    let run = ["run", "--name", "orphan", BUSYBOX, "--", "sh", "-c", line];
    let run = Command::bulkhead(run).start();
    run.wait_for_output("ready");
    kill_all("bulkhead-vmm");
    let outcome = run.wait();
    assert!(outcome.code != 0, "{outcome}");
    let work = fs::read_to_string("/var/lib/bulkhead/containers/orphan/upper/f");
    let list = Command::bulkhead(["list"]).run().success();
    Command::bulkhead(["rm", "orphan"]).run().success();
    assert_eq!(work.unwrap(), "work\n");
    assert!(list.contains("orphan"), "{list}");
    assert!(!Path::new("/var/lib/bulkhead/containers/orphan").exists());
}

#[test]
fn a_supervisor_that_hangs_keeps_nobody_waiting_and_can_be_removed() {
    let run = endless_named("hung");
    // Without its launcher only the supervisor can say what the container does.
    run.signal(libc::SIGKILL);
    assert_eq!(run.wait().code, 137);
    let stop = ["-STOP", "-f", "containerd-shim-bulkhead-v2"];
    Command::new("pkill", stop).run().success();
    let began = Instant::now();
    let list = Command::bulkhead(["list"]).run().success();
    let took = began.elapsed();
    let refused = Command::bulkhead(["rm", "hung"]).run();
    Command::bulkhead(["rm", "--force", "hung"]).run().success();
    assert!(list.contains("silent"), "{list}");
    assert!(took < Duration::from_secs(30), "{took:?}");
    assert!(refused.failure().contains("--force"));
}

/// Puts a file aside; it is back when this is dropped.
struct Aside(PathBuf);

impl Aside {
    fn put(path: impl Into<PathBuf>) -> Aside {
        let path = path.into();
        fs::rename(&path, path.with_extension("aside")).unwrap();
        Aside(path)
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        fs::rename(self.0.with_extension("aside"), &self.0).unwrap();
    }
}

/// A tmpfs of one MiB, full but for a few pages; unmounted when dropped.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(path: &str) -> SmallDisk {
        fs::create_dir_all(path).unwrap();
        Command::new(
            "mount",
            ["-t", "tmpfs", "-o", "size=1M,mode=0700", "small", path],
        )
        .run()
        .success();
        SmallDisk(path.into())
    }

    fn fill(&self) {
        let mut file = File::create(self.0.join("fill")).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        Command::new("umount", ["-l", self.0.to_str().unwrap()])
            .run()
            .success();
    }
}

#[test]
fn a_killed_vmm_ends_the_container_f22() {
    let run = endless();
    kill_all("bulkhead-vmm");
    let outcome = run.wait();
    assert_eq!(outcome.code, 137, "{outcome}");
    assert_said(&outcome, "the VM was killed");
}

#[test]
fn a_killed_shim_takes_the_machine_with_it_f1() {
    let run = endless();
    kill_all("containerd-shim-bulkhead-v2");
    assert_said(&run.wait(), "its supervisor is gone");
}

#[test]
fn a_vmm_that_is_stopped_while_its_shim_is_killed_leaves_nothing_f25() {
    let run = endless();
    // It cannot see its socket end: whoever cleans up must kill it.
    Command::new("pkill", ["-STOP", "-x", "bulkhead-vmm"])
        .run()
        .success();
    kill_all("containerd-shim-bulkhead-v2");
    assert_said(&run.wait(), "its supervisor is gone");
}

/// Name of the container in [`run_privileged`].
const PRIVILEGED: &str = "privileged";

/// Runs `script` in a guest in which it may do everything.
fn run_privileged(script: &str) -> Outcome {
    let (run, _dir) = start_privileged(script);
    run.wait()
}

/// Starts it.
fn start_privileged(script: &str) -> (Running, TempDir) {
    start_bundle(&bundle::privileged_config(script))
}

/// Starts a container with this configuration and an input; the bundle is in the
/// directory.
fn start_bundle(config: &Value) -> (Running, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    bundle::write(dir.path(), config);
    let path = dir.path().to_str().unwrap();
    let arguments = ["run", "-i", "--rm", "--name", PRIVILEGED, "--bundle", path];
    (Command::bulkhead(arguments).start(), dir)
}

#[test]
fn a_panic_of_the_guest_is_reported_with_its_message_f53() {
    let outcome = run_privileged("echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero");
    assert_eq!(outcome.code, 255, "{outcome}");
    assert_said(&outcome, "The guest's kernel panicked: Out of memory");
}

#[test]
fn a_killed_agent_is_reported_as_what_it_is_f53() {
    // No signal reaches the first process of a guest, and no container sees it. But
    // a program that is refused the memory for a message ends itself.
    let (run, _dir) = start_privileged(
        "echo 1 > /proc/sys/vm/overcommit_kbytes
        echo 0 > /proc/sys/vm/admin_reserve_kbytes
        echo 2 > /proc/sys/vm/overcommit_memory
        echo ready; read forever",
    );
    run.wait_for_output("ready");
    let much = "x".repeat(120_000);
    let exec = Command::bulkhead(["exec", PRIVILEGED, "true", &much]).run();
    assert!(exec.code != 0, "{exec}");
    let outcome = run.wait();
    assert_eq!(outcome.code, 255, "{outcome}");
    assert_said(&outcome, "Attempted to kill init!");
}

#[test]
fn a_guest_that_never_comes_up_is_ended_and_told_with_where_it_stands_tt_10_a6() {
    // It finds no first program, and waits long before it looks for another root.
    let hang = "boot_timeout_s = 5\nkernel_cmdline = \"rdinit=/none rootdelay=1000\"\n";
    let setting = Setting::put(hang);
    let outcome = run_true();
    drop(setting);
    assert_said(&outcome, "the agent did not connect within 5 s; device 0");
    assert_said(&outcome, ", processor 0 is halted at 0xffffffff8");
    run_true().success();
}

#[test]
fn the_kernel_of_the_guest_starts_no_program_for_a_container() {
    let outcome = run_privileged(&format!(
        r#"printf '#!%s\ntouch /made' {SHARE_DIR}/{PRIVILEGED}/rootfs/bin/sh > /helper
chmod 755 /helper
echo "|{SHARE_DIR}/{PRIVILEGED}/rootfs/helper" > /proc/sys/kernel/core_pattern
# The dying process waits for what reads its dump.
echo 1 > /proc/sys/kernel/core_pipe_limit
ulimit -c unlimited
sh -c 'kill -SEGV $$'
ls /"#
    ));
    let listed = outcome.success();
    assert!(
        listed.contains("helper") && !listed.contains("made"),
        "{listed}"
    );
}

#[test]
fn a_memory_hog_without_a_limit_dies_alone_f55() {
    let (run, _dir) = start_privileged("tail /dev/zero; echo hog $?; read until");
    run.wait_for_output("hog 137");
    let exec = Command::bulkhead(["exec", PRIVILEGED, "echo", "alive"]).run();
    assert_eq!(exec.success(), "alive\n");
    run.write("\n");
    run.wait().success();
}

#[test]
fn an_exec_gets_into_a_container_full_of_processes_f58() {
    let mut config = bundle::privileged_config(
        "sh -c 'while :; do sleep 1000 & done' 2> /dev/null; echo full; read until",
    );
    config["linux"]["resources"] = json!({"pids": {"limit": 32}});
    let (run, _dir) = start_bundle(&config);
    run.wait_for_output("full");
    let exec = Command::bulkhead(["exec", PRIVILEGED, "echo", "alive"]).run();
    assert_eq!(exec.success(), "alive\n");
    Command::bulkhead(["kill", PRIVILEGED, "KILL"])
        .run()
        .success();
    assert_eq!(run.wait().code, 137);
}

/// The clock of this host, which is set back to what it would be.
struct HostClock {
    began: Instant,
    time: SystemTime,
}

impl HostClock {
    fn take() -> HostClock {
        HostClock {
            began: Instant::now(),
            time: SystemTime::now(),
        }
    }

    /// What it would be if nobody had set it, in seconds since 1970.
    fn unset(&self) -> u64 {
        let time = self.time + self.began.elapsed();
        time.duration_since(UNIX_EPOCH).unwrap().as_secs()
    }
}

impl Drop for HostClock {
    fn drop(&mut self) {
        set_clock(self.unset());
    }
}

fn set_clock(seconds: u64) {
    let time = format!("@{seconds}");
    Command::new("date", ["-s", time.as_str()]).run().success();
}

#[test]
fn the_clock_of_a_guest_follows_that_of_the_host_f16() {
    const HOUR: u64 = 3_600;
    const WITHIN: Duration = Duration::from_secs(10);
    let clock = HostClock::take();
    let now = clock.unset();
    let (later, before) = (now + HOUR / 2, now - HOUR / 2);
    let script = format!(
        "echo ready
        until [ $(date +%s) -gt {later} ]; do sleep 1; done; echo forward
        until [ $(date +%s) -lt {before} ]; do sleep 1; done; echo back"
    );
    let run = Command::bulkhead(["run", "--rm", BUSYBOX, "--", "sh", "-c", &script]).start();
    run.wait_for_output("ready");
    for (time, said) in [(now + HOUR, "forward"), (now - HOUR, "back")] {
        set_clock(time);
        let set = Instant::now();
        run.wait_for_output(said);
        assert!(set.elapsed() < WITHIN, "{said} after {:?}", set.elapsed());
    }
    run.wait().success();
}

/// Longest time until a process of a started container is there.
const APPEARS: Duration = Duration::from_secs(60);

/// Kills every process whose command line has `pattern` after each of these delays
/// from the start of a container. What is said must be one of `causes`: which one
/// depends on how far the start had come.
fn killed_after(pattern: &str, causes: &[&str], delays_ms: impl IntoIterator<Item = u64>) {
    for delay in delays_ms {
        let leaks = LeakCheck::start();
        let run = Command::bulkhead(["run", "--rm", BUSYBOX, "--", "sleep", "600"]).start();
        thread::sleep(Duration::from_millis(delay));
        // It may not be there yet.
        let end = Instant::now() + APPEARS;
        while Command::new("pkill", ["-KILL", "-f", pattern]).run().code != 0 {
            assert!(Instant::now() < end, "no {pattern} appears");
            thread::sleep(Duration::from_millis(10));
        }
        let outcome = run.wait();
        assert_said(&outcome, "");
        assert!(
            causes.iter().any(|cause| outcome.stderr.contains(cause)),
            "after {delay} ms: {outcome}"
        );
        let left = leaks.left_over();
        assert!(left.is_empty(), "after {delay} ms: {left:?}\n{outcome}");
    }
}

#[test]
fn a_vmm_killed_at_any_moment_leaves_nothing_f22() {
    killed_after(
        "bulkhead-vmm",
        &["the VM was killed"],
        (0..3000).step_by(430),
    );
}

#[test]
fn a_shim_killed_at_any_moment_leaves_nothing_f1() {
    killed_after(
        "containerd-shim-bulkhead-v2",
        &["its supervisor is gone"],
        (0..3000).step_by(430),
    );
}

#[test]
fn a_missing_kernel_is_named_f32() {
    let aside = Aside::put("/usr/share/bulkhead/vmlinux");
    assert_said(&run_true(), "/usr/share/bulkhead/vmlinux");
    drop(aside);
    run_true().success();
}

#[test]
fn a_kernel_with_another_hash_is_refused_f32() {
    let path = Path::new("/usr/share/bulkhead/vmlinux");
    let before = fs::read(path).unwrap();
    OpenOptions::new()
        .append(true)
        .open(path)
        .unwrap()
        .write_all(b"x")
        .unwrap();
    let outcome = run_true();
    fs::write(path, before).unwrap();
    assert_said(&outcome, "/usr/share/bulkhead/vmlinux");
    run_true().success();
}

#[test]
fn a_host_without_kvm_is_told_what_to_do_f29() {
    let aside = Aside::put("/dev/kvm");
    let outcome = run_true();
    let check = Command::bulkhead(["check"]).run();
    drop(aside);
    assert_said(&outcome, "/dev/kvm");
    assert!(check.code != 0, "{check}");
    assert!(
        check.stdout.contains("/dev/kvm") || check.stderr.contains("/dev/kvm"),
        "{check}"
    );
}

#[test]
fn a_full_run_directory_fails_the_start_f8() {
    let disk = SmallDisk::mount("/run/bulkhead");
    disk.fill();
    assert_said(&run_true(), "No space left");
    drop(disk);
    run_true().success();
}

#[test]
fn a_full_disk_is_an_error_in_the_guest_and_no_more_f10() {
    let disk = SmallDisk::mount("/mnt/small");
    let out = Command::bulkhead([
        "run", "--rm", "-v", "/mnt/small:/data", BUSYBOX, "--", "sh", "-c",
        "dd if=/dev/zero of=/data/f bs=4k count=1000; echo $?; rm /data/f; echo fits > /data/f; cat /data/f",
    ])
    .run();
    assert!(out.stderr.contains("No space left"), "{out}");
    assert_eq!(out.success(), "1\nfits\n");
    drop(disk);
}

/// Unmounts what lies on a path when it is dropped.
struct Unmounts(&'static str);

impl Drop for Unmounts {
    fn drop(&mut self) {
        Command::new("umount", [self.0]).run().success();
    }
}

#[test]
fn cgroups_that_cannot_be_made_fail_the_start_f14() {
    const CGROUPS: &str = "/sys/fs/cgroup";
    Command::new("mount", ["--bind", "-o", "ro", CGROUPS, CGROUPS])
        .run()
        .success();
    let read_only = Unmounts(CGROUPS);
    let outcome = run_true();
    drop(read_only);
    assert_said(&outcome, "Cannot make the cgroup /sys/fs/cgroup/bulkhead");
    run_true().success();
}

#[test]
fn a_cgroup_in_which_no_process_may_live_fails_the_start_f14() {
    // Beside a threaded cgroup there is none for whole processes.
    let top = Path::new("/sys/fs/cgroup/lab");
    fs::create_dir_all(top.join("threaded")).unwrap();
    fs::write(top.join("threaded/cgroup.type"), "threaded").unwrap();
    let mut config = bundle::config("true");
    config["linux"]["cgroupsPath"] = json!("/lab/vmm");
    let (run, _dir) = start_bundle(&config);
    let outcome = run.wait();
    let left = top.join("vmm").exists();
    fs::remove_dir(top.join("threaded")).unwrap();
    fs::remove_dir(top).unwrap();
    assert_said(&outcome, "/sys/fs/cgroup/lab/vmm");
    assert!(!left);
}

#[test]
fn a_cgroup_that_cannot_be_removed_keeps_nobody_waiting_f15() {
    let run = endless_named("stays");
    let dir = Path::new("/sys/fs/cgroup/bulkhead/bulkhead/stays");
    fs::create_dir(dir.join("stray")).unwrap();
    kill_all("bulkhead-vmm");
    let began = Instant::now();
    let outcome = run.wait();
    let took = began.elapsed();
    // Somebody else's is not removed, and ours with it by hand.
    fs::remove_dir(dir.join("stray")).unwrap();
    for dir in dir.ancestors().take(3) {
        fs::remove_dir(dir).unwrap();
    }
    assert_said(&outcome, "the VM was killed");
    assert!(took < Duration::from_secs(30), "{took:?}");
}
