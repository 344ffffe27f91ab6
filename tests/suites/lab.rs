//! The lab itself: what every other suite relies on.

use bulkhead_tests::{BUSYBOX_NAME, Command, DEBIAN, LeakCheck};

#[test]
fn kvm_of_the_lab_host_runs_64_bit_code() {
    Command::bulkhead(["check"]).run().success();
}

#[test]
fn containerd_answers_and_knows_the_images() {
    let images = Command::new("ctr", ["images", "ls", "-q"]).run().success();
    assert!(images.lines().any(|name| name == BUSYBOX_NAME), "{images}");
    assert!(std::path::Path::new(DEBIAN).join("index.json").exists());
}

#[test]
fn a_reference_runtime_runs_the_image_and_leaves_nothing() {
    let leaks = LeakCheck::start();
    let run = ["run", "--rm", BUSYBOX_NAME, "reference", "echo", "hello"];
    assert_eq!(Command::new("ctr", run).run().success(), "hello\n");
    leaks.finish();
}

#[test]
fn a_mount_that_is_left_is_found() {
    let leaks = LeakCheck::start();
    Command::new("mount", ["-t", "tmpfs", "left", "/mnt"])
        .run()
        .success();
    assert_eq!(leaks.left_over(), ["mount /mnt"]);
    Command::new("umount", ["/mnt"]).run().success();
    leaks.finish();
}

#[test]
fn a_process_that_is_left_is_found() {
    let leaks = LeakCheck::start();
    let process = Command::new("cat", ["-"]).start();
    let left = leaks.left_over();
    assert_eq!(left, [format!("process {} cat", process.pid())]);
    drop(process);
    leaks.finish();
}

#[test]
fn a_network_namespace_that_is_left_is_found() {
    let leaks = LeakCheck::start();
    Command::new("ip", ["netns", "add", "left"]).run().success();
    let left = leaks.left_over();
    assert!(
        left.iter().any(|what| what == "path /run/netns/left"),
        "{left:?}"
    );
    Command::new("ip", ["netns", "delete", "left"])
        .run()
        .success();
    // Mounting the directory of namespaces on itself is iproute2's first act.
    let left = leaks.left_over();
    assert!(
        left.iter()
            .all(|what| what == "mount /run/netns" || what == "path /run/netns"),
        "{left:?}"
    );
    Command::new("umount", ["/run/netns"]).run().success();
    Command::new("rmdir", ["/run/netns"]).run().success();
}
