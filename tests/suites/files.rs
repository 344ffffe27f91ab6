//! Files that the guest and the host share.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{
    BUSYBOX, BUSYBOX_NAME, Command, DEBIAN, DEBIAN_NAME, Outcome, TOOLS, bundle,
    volume::{debian, volume},
};

#[test]
fn what_a_container_writes_is_on_the_host_with_owner_mode_and_attributes() {
    // On the disk: tmpfs of the lab host's kernel has no user attributes.
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let volume = format!("{}:/data", dir.path().display());
    Command::bulkhead([
        "run", "--rm", "-v", &volume, DEBIAN, "--", "sh", "-c",
        "cd /data && echo text > f && chmod 4751 f && chown 1234:2345 f && setfattr -n user.colour -v blue f \
         && mkfifo p && ln -s f l && ln f h && mkdir -m 1777 d",
    ])
    .run()
    .success();
    let file = fs::metadata(dir.path().join("f")).unwrap();
    assert_eq!(
        (file.uid(), file.gid(), file.mode() & 0o7777, file.nlink()),
        (1234, 2345, 0o751, 2)
    );
    assert_eq!(fs::read_to_string(dir.path().join("h")).unwrap(), "text\n");
    assert_eq!(
        fs::read_link(dir.path().join("l")).unwrap().to_str(),
        Some("f")
    );
    assert_eq!(
        fs::metadata(dir.path().join("d")).unwrap().mode() & 0o7777,
        0o1777
    );
    let colour = Command::new(
        "getfattr",
        [
            "--only-values",
            "-n",
            "user.colour",
            dir.path().join("f").to_str().unwrap(),
        ],
    )
    .run();
    assert_eq!(colour.success(), "blue");
}

#[test]
fn a_read_only_volume_refuses_writes() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("f"), "kept").unwrap();
    let volume = format!("{}:/data:ro", dir.path().display());
    let out = Command::bulkhead([
        "run",
        "--rm",
        "-v",
        &volume,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "cat /data/f; echo x > /data/f; rm /data/f; touch /data/g; chmod 777 /data/f",
    ])
    .run();
    assert!(out.stdout.starts_with("kept"), "{out}");
    assert_eq!(
        out.stderr.matches("Read-only file system").count(),
        4,
        "{out}"
    );
    assert_eq!(fs::read_to_string(dir.path().join("f")).unwrap(), "kept");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
}

#[test]
fn a_guest_that_mounts_it_writable_cannot_write_to_a_read_only_volume_b64_fs_29() {
    let dir = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("f"), "kept").unwrap();
    // The guest's own kernel no longer stands in the way: every request goes out.
    let mut config = bundle::privileged_config(
        "mount -o remount,bind,rw /data && grep -c ' /data virtiofs rw' /proc/mounts && cd /data && \
         echo x > f; echo x >> f; rm f; mv f g; ln f l; chmod 0 f; touch -d @1 f; mkdir d; \
         mknod p p; truncate -s 1 f; cat f",
    );
    let mount = serde_json::json!({
        "destination": "/data", "type": "bind", "source": volume.path(), "options": ["bind", "ro"],
    });
    config["mounts"].as_array_mut().unwrap().push(mount);
    bundle::write(dir.path(), &config);
    let out = Command::bulkhead(["run", "--rm", "--bundle", dir.path().to_str().unwrap()]).run();
    assert_eq!(out.stdout, "1\nkept", "{out}");
    assert_eq!(
        out.stderr.matches("Read-only file system").count(),
        10,
        "{out}"
    );
    assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 1);
}

#[test]
fn a_single_file_volume_does_not_show_its_siblings_fs_20() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("shown"), "shown").unwrap();
    fs::write(dir.path().join("secret"), "secret").unwrap();
    let volume = format!("{}:/etc/shown", dir.path().join("shown").display());
    let out = Command::bulkhead([
        "run",
        "--rm",
        "-v",
        &volume,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "cat /etc/shown; find / -xdev -name secret; ls /run/bulkhead 2>&1",
    ])
    .run();
    assert!(out.stdout.starts_with("shown"), "{out}");
    assert!(!out.stdout.contains("secret"), "{out}");
}

#[test]
fn a_change_on_the_host_is_seen_at_once_even_at_the_same_size_ss_50() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("f");
    fs::write(&file, "first value\n").unwrap();
    let volume = format!("{}:/data", dir.path().display());
    let run = Command::bulkhead([
        "run",
        "--rm",
        "-i",
        "-v",
        &volume,
        BUSYBOX,
        "--",
        "sh",
        "-c",
        "cat /data/f; read x; cat /data/f",
    ])
    .start();
    run.wait_for_output("first value");
    fs::write(&file, "other value\n").unwrap();
    run.write("go\n");
    assert_eq!(run.wait().stdout, "first value\nother value\n");
}

/// A root directory on the host's own disk: busybox, the test programs, two users.
fn plain_root() -> tempfile::TempDir {
    let root = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| root.path().join(name);
    bundle::busybox_root(root.path());
    Command::new(
        "cp",
        ["-a".as_ref(), TOOLS.as_ref(), path("tools").as_os_str()],
    )
    .run()
    .success();
    // The sleep of busybox is not one under another name, as which the suite runs it.
    let libraries = [
        "lib64/ld-linux-x86-64.so.2",
        "lib/x86_64-linux-gnu/libc.so.6",
    ];
    for file in libraries.into_iter().chain(["bin/sleep"]) {
        fs::create_dir_all(path(file).parent().unwrap()).unwrap();
        let _ = fs::remove_file(path(file));
        fs::copy(Path::new("/").join(file), path(file)).unwrap();
    }
    fs::write(path("pjdfstest.toml"), PJDFSTEST).unwrap();
    let users = "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\ndaemon:x:1:1::/:/bin/sh\n";
    fs::write(path("etc/passwd"), users).unwrap();
    let groups = "root:x:0:\nnogroup:x:65534:\ndaemon:x:1:\n";
    fs::write(path("etc/group"), groups).unwrap();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    root
}

/// Runs a line of the shell on it.
fn on_plain_root(line: &str) -> Outcome {
    let root = plain_root();
    let path = root.path().to_str().unwrap();
    Command::bulkhead(["run", "--rm", "--rootfs", path, "--", "sh", "-c", line])
        .deadline(Duration::from_secs(1100))
        .run()
}

/// What the suite is told: which optional calls the host's ext4 has, and two users.
const PJDFSTEST: &str = r#"
[features]
posix_fallocate = {}
rename_ctime = {}
utimensat = {}
utime_now = {}
[settings]
naptime = 0.01
[dummy_auth]
entries = [["nobody", "nogroup"], ["daemon", "daemon"]]
"#;

/// Why tests of pjdfstest may be skipped: a container may not mount a second file
/// system, and pathconf(3) knows the greatest count of links of few file systems.
const SKIPPED: [&str; 4] = [
    "Remounts (allow_remount) are not allowed",
    "No secondary file-system has been configured",
    "process doesn't have the CAP_SYS_ADMIN cap",
    "Cannot get value for LINK_MAX",
];

#[test]
fn pjdfstest_finds_no_fault_of_the_shared_root_g7() {
    let out = on_plain_root("mkdir /w && cd /w && /tools/pjdfstest -c /pjdfstest.toml -p /w");
    assert_eq!(out.code, 0, "{out}");
    let mut lines = out.stdout.lines();
    while let Some(line) = lines.next() {
        if line.ends_with("skipped") {
            let reason = lines.next().unwrap().trim();
            let good = SKIPPED.iter().any(|known| reason.starts_with(known));
            assert!(good, "{line}: {reason}");
        }
    }
    // Such as `Summary: 0 failed, 17 skipped, 381 passed, 0 expected failures, 398 total`.
    let summary = out
        .stdout
        .lines()
        .rfind(|line| line.starts_with("Summary: "));
    let count = |what: &str| -> u32 {
        let counts = summary.unwrap().trim_start_matches("Summary: ").split(", ");
        let mut found = counts.filter_map(|count| count.strip_suffix(what));
        found.next().unwrap().trim().parse().unwrap()
    };
    assert_eq!(count("failed"), 0, "{out}");
    assert!(count("passed") >= 375, "{out}");
}

/// Operations of one process of fsx: it does not undo its mappings, and becomes slower
/// with each.
const FSX_OPERATIONS: u32 = 5_000;

/// Runs fsx once with each seed.
fn fsx(seeds: std::ops::Range<u32>) {
    let (first, last) = (seeds.start, seeds.end - 1);
    on_plain_root(&format!(
        "for seed in $(seq {first} {last}); do
             /tools/fsx -N {FSX_OPERATIONS} -S $seed /fsx.file || exit; done"
    ))
    .success();
}

#[test]
fn fsx_finds_no_fault_in_10_000_operations_g8() {
    fsx(0..2);
}

// Two halves, so that two lab hosts share the work.

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn fsx_finds_no_fault_in_100_000_operations_first_half_g8() {
    fsx(0..10);
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn fsx_finds_no_fault_in_100_000_operations_second_half_g8() {
    fsx(10..20);
}

#[test]
fn locks_exclude_between_containers_and_the_host_fs_33() {
    let (dir, volume) = volume();
    let lock = dir.path().join("lock");
    fs::write(&lock, "").unwrap();
    let line = "flock /v/lock sh -c 'echo ready; exec sleep 1000'";
    let holder = [
        "run", "--rm", "--name", "holder", "--memory", "512M", "-v", &volume, DEBIAN, "--", "sh",
        "-c", line,
    ];
    let holder = Command::bulkhead(holder).start();
    holder.wait_for_output("ready");
    let host = || {
        Command::new("flock", ["-n", lock.to_str().unwrap(), "true"])
            .run()
            .code
    };
    assert_eq!(host(), 1, "the host took a lock that a container holds");
    assert_eq!(
        debian(&volume, "flock -n /v/lock true; echo $?").success(),
        "1\n"
    );
    Command::bulkhead(["kill", "holder", "KILL"])
        .run()
        .success();
    assert_eq!(holder.wait().code, 137);
    assert_eq!(host(), 0, "the lock outlived its container");
    // And the other way: POSIX locks, held by the host.
    let python = format!(
        "import fcntl, time\nf = open({:?}, 'r+')\nfcntl.lockf(f, fcntl.LOCK_EX)\nprint('held', flush=True)\ntime.sleep(1000)",
        lock.to_str().unwrap()
    );
    let held = Command::new("python3", ["-c", &python]).start();
    held.wait_for_output("held");
    let line = "python3 -c \"import fcntl; fcntl.lockf(open('/v/lock', 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)\" 2>&1 | tail -n 1";
    let out = debian(&volume, line).success();
    assert!(out.contains("BlockingIOError"), "{out}");
}

#[test]
fn who_waits_for_a_lock_can_be_killed() {
    let (dir, volume) = volume();
    let lock = dir.path().join("lock");
    fs::write(&lock, "").unwrap();
    let holder = Command::new(
        "flock",
        [
            // Else the sleep would be a child that stays.
            "--no-fork",
            lock.to_str().unwrap(),
            "sh",
            "-c",
            "echo held; exec sleep 1000",
        ],
    )
    .start();
    holder.wait_for_output("held");
    // 73 is the system call flock.
    let line = "flock /v/lock echo got-it & p=$!
        until grep -q '^73 ' /proc/$p/syscall; do :; done
        kill -9 $p; wait $p; echo $?";
    assert_eq!(debian(&volume, line).success(), "137\n");
}

/// Runs a command in a container of containerd's with a root of its own, which may read
/// what others may not: `/proc/interrupts` is hidden from them.
fn privileged(image: &str, command: &[&str]) -> String {
    let run = [
        "run",
        "--rm",
        "--privileged",
        "--runtime",
        "io.containerd.bulkhead.v2",
        image,
        "counts",
    ];
    let arguments = run.into_iter().chain(command.iter().copied());
    Command::new("ctr", arguments).run().success()
}

/// Requests to the file systems of the guest, by their interrupts, for each of some lines
/// of busybox's shell, done in `/d`.
fn requests(lines: &[&str]) -> Vec<u32> {
    let mut script = "for d in /sys/bus/virtio/devices/*; do
            test $(cat $d/device) = 0x001a && names=\"$names ${d##*/}\"; done
        count() { awk -v names=\"$names \" 'index(names, \" \" $NF \" \") {
            for (i = 2; $i ~ /^[0-9]+$/; i++) n += $i } END { print n }' /proc/interrupts; }
        mkdir /d; cd /d; count > /dev/null\n"
        .to_owned();
    for line in lines {
        script += &format!("a=$(count); {line}\n b=$(count); echo $((b - a))\n");
    }
    let out = privileged(BUSYBOX_NAME, &["sh", "-c", &script]);
    out.lines().map(|line| line.parse().unwrap()).collect()
}

#[test]
fn making_writing_and_removing_files_costs_a_root_half_of_the_requests_it_did() {
    let counts = requests(&[
        "for i in $(seq 100); do : > $i; done",
        "for i in $(seq 100); do echo x > w$i; done",
        "find / -xdev > /dev/null; find / -xdev > /dev/null",
        "find /bin /d > /dev/null",
        "rm $(seq 100)",
    ]);
    // Before there was a policy of private roots 4, 6 and 4 each. One interrupt may tell of
    // several answers.
    let [created, written, _, found, removed] = counts[..] else {
        panic!("{counts:?}");
    };
    assert!((100..=200 + 10).contains(&created), "{counts:?}");
    assert!((100..=300 + 10).contains(&written), "{counts:?}");
    assert!(found <= 2, "{counts:?}");
    // Each is forgotten, too, for which nobody waits.
    assert!((100..=200 + 10).contains(&removed), "{counts:?}");
}

#[test]
fn that_files_have_no_extended_attributes_is_asked_once() {
    let program = "import os
names = [d for d in os.listdir('/sys/bus/virtio/devices')
         if open(f'/sys/bus/virtio/devices/{d}/device').read().strip() == '0x001a']
def count():
    lines = [line.split() for line in open('/proc/interrupts')]
    return sum(int(n) for line in lines if line and line[-1] in names for n in line if n.isdigit())
os.mkdir('/d')
paths = [f'/d/{i}' for i in range(100)]
for path in paths:
    open(path, 'w').close()
count()
counts = [count()]
for _ in range(2):
    assert all(os.listxattr(path) == [] for path in paths)
    counts.append(count())
print(counts[1] - counts[0], counts[2] - counts[1])
";
    let said = privileged(DEBIAN_NAME, &["python3", "-c", program]);
    let counts: Vec<u32> = said
        .split_whitespace()
        .map(|n| n.parse().unwrap())
        .collect();
    assert!(
        (100..=110).contains(&counts[0]) && counts[1] <= 2,
        "{counts:?}"
    );
}

#[test]
fn an_extended_attribute_is_seen_whenever_there_is_one() {
    let (_dir, volume) = volume();
    let program = "import os
open('/root/f', 'w').close()
open('/v/f', 'w').close()
for path in '/root/f', '/v/f':
    said = []
    said.append(os.listxattr(path))
    os.setxattr(path, 'user.a', b'x')
    said.append(os.listxattr(path))
    os.setxattr(path, 'user.b', b'x')
    os.removexattr(path, 'user.a')
    said.append(os.listxattr(path))
    os.removexattr(path, 'user.b')
    said.append(os.listxattr(path))
    said.append(os.listxattr(path))
    print(said)
";
    let line = format!("cat > /tmp/p.py <<'.'\n{program}.\npython3 /tmp/p.py");
    let each = "[[], ['user.a'], ['user.b'], [], []]\n";
    assert_eq!(debian(&volume, &line).success(), each.repeat(2));
}

#[test]
fn an_extended_attribute_that_the_host_sets_is_seen_in_a_volume() {
    let (dir, volume) = volume();
    fs::write(dir.path().join("f"), "").unwrap();
    let program = "import os, time
print(os.listxattr('/v/f'), os.listxattr('/v/f'))
open('/v/ready', 'w').close()
while not os.path.exists('/v/done'):
    time.sleep(0.05)
time.sleep(0.2)
print(os.listxattr('/v/f'))
";
    fs::write(dir.path().join("p.py"), program).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            let asked = Instant::now();
            let ready = dir.path().join("ready");
            while !ready.exists() && asked.elapsed() < Duration::from_secs(100) {
                thread::sleep(Duration::from_millis(50));
            }
            let (path, flags) = (dir.path().join("f"), rustix::fs::XattrFlags::empty());
            rustix::fs::setxattr(path, "user.host", b"x", flags).unwrap();
            fs::write(dir.path().join("done"), "").unwrap();
        });
        let said = debian(&volume, "timeout 100 python3 /v/p.py").success();
        assert_eq!(said, "[] []\n['user.host']\n");
    });
}

#[test]
fn a_program_that_is_written_to_loses_its_capabilities_on_root_and_volume() {
    let (_dir, volume) = volume();
    let program = "import os
for place in '/root', '/v':
    path = place + '/f'
    open(path, 'w').write('x')
    for change in (lambda: os.write(os.open(path, os.O_WRONLY), b'y')), (lambda: os.truncate(path, 0)):
        os.setxattr(path, 'security.capability', bytes.fromhex('0100000200040000000000000000000000000000'))
        print(len(os.listxattr(path)), end=' ')
        change()
        print(len(os.listxattr(path)), end=' ')
";
    let line = format!("cat > /tmp/p.py <<'.'\n{program}.\npython3 /tmp/p.py");
    assert_eq!(debian(&volume, &line).success(), "1 0 1 0 1 0 1 0 ");
}

#[test]
fn a_file_without_a_name_can_be_made_and_named() {
    let (dir, volume) = volume();
    let program = "import os
fd = os.open('/v', os.O_TMPFILE | os.O_RDWR, 0o640)
os.write(fd, b'hello')
os.link('/proc/self/fd/%d' % fd, '/v/new', src_dir_fd=os.open('/', os.O_RDONLY), follow_symlinks=True)
print(open('/v/new').read(), oct(os.stat('/v/new').st_mode))";
    fs::write(dir.path().join("t.py"), program).unwrap();
    assert_eq!(
        debian(&volume, "python3 /v/t.py").success(),
        "hello 0o100640\n"
    );
    assert_eq!(fs::read_to_string(dir.path().join("new")).unwrap(), "hello");
}

#[test]
fn access_control_lists_hold_on_volume_and_root_fs_34() {
    let (_dir, volume) = volume();
    let line = "for place in /v /root; do cd $place; echo aaa > f; chmod 640 f; setfacl -m u:1000:r f
        sed -i s/a/b/ f; echo $(stat -c %a f) $(cat f) $(getfacl -nc f 2>&1 | grep user:1000); done";
    assert_eq!(
        debian(&volume, line).success(),
        "640 baa user:1000:r--\n640 baa user:1000:r--\n"
    );
}

#[test]
fn a_device_node_that_a_container_makes_works_there_and_nowhere_else() {
    let (dir, volume) = volume();
    let line = "for place in /root /v; do mknod $place/null c 1 3 && echo x > $place/null && stat -c %F $place/null; done";
    let run = [
        "run", "--rm", "-v", &volume, BUSYBOX, "--", "sh", "-c", line,
    ];
    let out = Command::bulkhead(run).run().success();
    assert_eq!(out, "character special file\ncharacter special file\n");
    // On the host it is nothing that anybody could open as a device.
    let node = fs::symlink_metadata(dir.path().join("null")).unwrap();
    assert!(node.rdev() == 0, "{node:?}");
}

/// Opens files until that is refused; then shows that other work goes on, and that what
/// is closed can be opened again.
const OPENS_ALL: &str = r#"
import errno, os
held = []
try:
    for number in range(20_000):
        held.append(os.open(f"/data/{number % 30}/1", os.O_RDONLY))
except OSError as error:
    print(errno.errorcode[error.errno], len(held) > 500)
print(os.stat("/data/7/7").st_size)
os.close(held.pop())
held.append(os.open("/data/8/8", os.O_RDONLY))
print(os.read(held[-1], 10))
"#;

#[test]
fn a_volume_of_more_files_than_descriptors_is_served_and_open_ones_end_at_the_limit_f44() {
    let dir = tempfile::tempdir_in("/var/tmp").unwrap();
    for below in 0..30 {
        let below = dir.path().join(below.to_string());
        fs::create_dir(&below).unwrap();
        for file in 0..100 {
            fs::write(below.join(file.to_string()), "x").unwrap();
        }
    }
    let volume = format!("{}:/data", dir.path().display());
    let script =
        "find /data -type f | xargs cat | wc -c; echo walked; read line; python3 -c \"$1\"";
    // The VMM takes what it is given, if that is less than its own limit.
    let limited = [
        "--nofile=2048:2048",
        "bulkhead",
        "run",
        "-i",
        "--rm",
        "-v",
        &volume,
    ];
    let pod = [DEBIAN, "--", "sh", "-c", script, "sh", OPENS_ALL];
    let run = Command::new("prlimit", limited.into_iter().chain(pod)).start();
    run.wait_for_output("walked");
    let vmm = Command::new("pgrep", ["-x", "bulkhead-vmm"])
        .run()
        .success();
    let fds = format!("/proc/{}/fd", vmm.trim());
    let held = fs::read_dir(fds).unwrap().count();
    run.write("\n");
    let out = run.wait().success();
    // Those that are idle were let go of.
    assert!(held < 1000, "{held} descriptors");
    assert_eq!(out, "3000\nwalked\nENFILE True\n1\nb'x'\n");
}
