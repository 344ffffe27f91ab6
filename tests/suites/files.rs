//! Files that the guest and the host share.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    time::Duration,
};

use bulkhead_tests::{BUSYBOX, Command, DEBIAN, LeakCheck, TOOLS};

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

/// Operations of fsx. A hundred thousand take longer than a test may.
const FSX_OPERATIONS: &str = "10000";

/// A root directory on the host's own disk: busybox and the test
/// programs, without an overlay.
fn plain_root() -> tempfile::TempDir {
    let root = tempfile::tempdir_in("/var/tmp").unwrap();
    let path = |name: &str| root.path().join(name);
    let blobs = fs::read_dir(format!("{BUSYBOX}/blobs/sha256"))
        .unwrap()
        .flatten();
    let layer = blobs
        .max_by_key(|blob| blob.metadata().unwrap().len())
        .unwrap();
    Command::new(
        "tar",
        ["-C".as_ref(), root.path(), "-xf".as_ref(), &layer.path()],
    )
    .run()
    .success();
    Command::new(
        "cp",
        ["-a".as_ref(), TOOLS.as_ref(), path("tools").as_os_str()],
    )
    .run()
    .success();
    fs::set_permissions(root.path(), fs::Permissions::from_mode(0o755)).unwrap();
    root
}

#[test]
fn fsx_finds_no_fault_g8() {
    let leaks = LeakCheck::start();
    let root = plain_root();
    Command::bulkhead([
        "run",
        "--rm",
        "--rootfs",
        root.path().to_str().unwrap(),
        "--",
        "/tools/fsx",
        "-N",
        FSX_OPERATIONS,
        "-S",
        "7",
        "/fsx.file",
    ])
    .deadline(Duration::from_secs(500))
    .run()
    .success();
    leaks.finish();
}
