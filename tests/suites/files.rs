//! Files that the guest and the host share.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    time::Duration,
};

use bulkhead_agent_api::SHARE_TAG;
use bulkhead_tests::{BUSYBOX, Command, DEBIAN, LeakCheck, Outcome, TOOLS, bundle};

#[test]
fn what_a_container_writes_is_on_the_host_with_owner_mode_and_attributes() {
    let leaks = LeakCheck::start();
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
    leaks.finish();
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
fn a_guest_that_mounts_it_anew_cannot_write_to_a_read_only_volume_b64() {
    let leaks = LeakCheck::start();
    let dir = tempfile::tempdir().unwrap();
    let volume = tempfile::tempdir().unwrap();
    fs::write(volume.path().join("f"), "kept").unwrap();
    // Once through the mount of the container, once through a mount of all that the
    // guest is shown: in both no kernel but the host's stands in the way.
    let mut config = bundle::privileged_config(&format!(
        "try() {{ (cd $1 && echo x > f; echo x >> f; rm f; mv f g; ln f l; chmod 0 f; touch -d @1 f; \
         mkdir d; mknod p p; truncate -s 1 f; cat f); }}
         mount -o remount,bind,rw /data && try /data
         mount -t virtiofs {SHARE_TAG} /mnt && try $(dirname $(find /mnt -path '*volumes*' -name f))"
    ));
    let mount = serde_json::json!({
        "destination": "/data", "type": "bind", "source": volume.path(), "options": ["bind", "ro"],
    });
    config["mounts"].as_array_mut().unwrap().push(mount);
    bundle::write(dir.path(), &config);
    fs::create_dir_all(dir.path().join("rootfs/mnt")).unwrap();
    let out = Command::bulkhead(["run", "--rm", "--bundle", dir.path().to_str().unwrap()]).run();
    assert_eq!(out.stdout, "keptkept", "{out}");
    assert_eq!(
        out.stderr.matches("Read-only file system").count(),
        20,
        "{out}"
    );
    assert_eq!(fs::read_dir(volume.path()).unwrap().count(), 1);
    leaks.finish();
}

#[test]
fn a_single_file_volume_does_not_show_its_siblings() {
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
    let leaks = LeakCheck::start();
    let root = plain_root();
    let path = root.path().to_str().unwrap();
    let outcome = Command::bulkhead([
        "run", "--rm", "--cpus", "2", "--rootfs", path, "--", "sh", "-c", line,
    ])
    .deadline(Duration::from_secs(1100))
    .run();
    leaks.finish();
    outcome
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

/// The last line of the suite, such as
/// `Summary: 0 failed, 17 skipped, 381 passed, 0 expected failures, 398 total`.
fn summary(out: &Outcome) -> &str {
    let last = out
        .stdout
        .lines()
        .rfind(|line| line.starts_with("Summary:"));
    last.unwrap_or_else(|| panic!("{out}"))
}

#[test]
fn pjdfstest_finds_on_the_shared_root_what_it_finds_on_the_hosts_disk_g7() {
    let line = "mkdir /w && cd /w && /tools/pjdfstest -c /pjdfstest.toml -p /w";
    let guest = on_plain_root(line);
    let root = plain_root();
    let host = Command::new(
        "chroot",
        [
            root.path(),
            Path::new("/bin/sh"),
            Path::new("-c"),
            Path::new(line),
        ],
    )
    .run();
    assert_eq!(guest.code, 0, "{guest}");
    assert!(summary(&guest).contains(" 0 failed,"), "{guest}");
    assert_eq!(summary(&guest), summary(&host));
    let passed = summary(&guest)
        .split(", ")
        .find_map(|count| count.strip_suffix(" passed"));
    assert!(passed.unwrap().parse::<u32>().unwrap() >= 375, "{guest}");
}

/// Processes of fsx side by side, each on a file of its own: the emulated machine has
/// something to do while one of them waits.
const FSX_PROCESSES: u32 = 4;

/// Operations of each.
const FSX_OPERATIONS: u32 = 25_000;

#[test]
fn fsx_finds_no_fault_g8() {
    let out = on_plain_root(&format!(
        "for seed in $(seq {FSX_PROCESSES}); do
             (/tools/fsx -N {FSX_OPERATIONS} -S $seed /file$seed || echo $seed failed) & done; wait"
    ));
    assert_eq!(out.code, 0, "{out}");
    let good = out.stdout.matches("All operations completed A-OK!").count();
    assert_eq!(good, FSX_PROCESSES as usize, "{out}");
}
