//! Whatever breaks: one sentence with the cause, an exit code that is not 0, and
//! nothing left behind.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use bulkhead_agent_api::SHARE_DIR;
use bulkhead_tests::{BUSYBOX, Command, LeakCheck, Outcome, Running, bundle};

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
    let dir = tempfile::tempdir().unwrap();
    bundle::write(dir.path(), &bundle::privileged_config(script));
    let dir = dir.path().to_str().unwrap();
    Command::bulkhead(["run", "--rm", "--name", PRIVILEGED, "--bundle", dir]).run()
}

#[test]
fn a_panic_of_the_guest_is_reported_with_its_message_f53() {
    let outcome = run_privileged("echo 2 > /proc/sys/vm/panic_on_oom; tail /dev/zero");
    assert_eq!(outcome.code, 255, "{outcome}");
    assert_said(&outcome, "The guest's kernel panicked: Out of memory");
}

#[test]
fn a_killed_agent_is_reported_as_what_it_is_f53() {
    // No signal reaches the first process of a guest. What the guest's kernel starts
    // for a core dump sees that process, and can take its code away.
    let outcome = run_privileged(&format!(
        r#"cat > /kill << 'END'
code=$(grep -m1 r-xp /proc/1/maps)
dd if=/dev/zero of=/proc/1/mem bs=4096 seek=$((0x${{code%%-*}} / 4096)) count=64 conv=notrunc
END
root={SHARE_DIR}/{PRIVILEGED}/rootfs
echo "|$root/bin/busybox sh $root/kill" > /proc/sys/kernel/core_pattern
sh -c 'kill -SEGV $$'
sleep 60"#
    ));
    assert_eq!(outcome.code, 255, "{outcome}");
    assert_said(&outcome, "Attempted to kill init!");
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

#[test]
fn the_clock_of_a_guest_follows_the_hosts_f16() {
    let run = endless_named("clock");
    let ahead = || {
        let guest = Command::bulkhead(["exec", "clock", "date", "+%s"])
            .run()
            .success();
        let host = std::time::SystemTime::UNIX_EPOCH
            .elapsed()
            .unwrap()
            .as_secs();
        guest.trim().parse::<i64>().unwrap() - host.cast_signed()
    };
    assert!(ahead().abs() <= 2);
    for hour in ["+1 hour", "-1 hour"] {
        let date = format!("now {hour}");
        Command::new("date", ["-s", &date]).run().success();
        let end = Instant::now() + Duration::from_secs(15);
        while ahead().abs() > 2 {
            assert!(
                Instant::now() < end,
                "after {hour} the guest is {} s ahead",
                ahead()
            );
        }
    }
    Command::bulkhead(["kill", "clock", "KILL"]).run().success();
    assert_eq!(run.wait().code, 137);
}
