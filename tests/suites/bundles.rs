//! Specifications as engines really write them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::fs;

use bulkhead_tests::{
    Command, Outcome, bundle,
    image::{Folder, Form, Image, Layer},
};
use serde_json::{Value, json};

/// Runs a script in a bundle that this has changed.
fn run(script: &str, change: impl FnOnce(&mut Value)) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    let mut config = bundle::config(script);
    change(&mut config);
    bundle::write(dir.path(), &config);
    Command::bulkhead(["run", "--rm", "--bundle", dir.path().to_str().unwrap()]).run()
}

#[test]
fn namespaces_that_are_not_named_are_fresh_ones() {
    let script = "echo $$; hostname changed && hostname; ls /sys/class/net 2>/dev/null; cat /proc/net/dev | grep -c :";
    let out = run(script, |config| {
        config["linux"]["namespaces"] = json!([{"type": "mount"}]);
        config["process"]["capabilities"] = json!({
            "bounding": ["CAP_SYS_ADMIN"], "permitted": ["CAP_SYS_ADMIN"], "effective": ["CAP_SYS_ADMIN"],
        });
    });
    assert_eq!(out.success(), "1\nchanged\n1\n");
}

#[test]
fn a_capability_of_another_kernel_is_left_out() {
    let out = run("grep CapBnd /proc/self/status", |config| {
        config["process"]["capabilities"] = json!({"bounding": ["CAP_CHOWN", "CAP_OF_TOMORROW"]});
    });
    assert_eq!(out.success(), "CapBnd:\t0000000000000001\n");
}

#[test]
fn a_tmpfs_can_start_with_what_the_image_has_there() {
    let script = "head -n 1 /etc/group; grep -c ' /etc tmpfs' /proc/mounts; echo x > /etc/group && cat /etc/group";
    let out = run(script, |config| {
        let mount = json!({
            "destination": "/etc", "type": "tmpfs", "source": "tmpfs",
            "options": ["nosuid", "tmpcopyup"],
        });
        config["mounts"].as_array_mut().unwrap().push(mount);
    });
    assert_eq!(out.success(), "root:x:0:\n1\nx\n");
}

#[test]
fn a_tmpfs_has_the_mode_of_the_directory_that_it_covers() {
    let script = "stat -c %a /root/private";
    let dir = tempfile::tempdir().unwrap();
    let mut config = bundle::config(script);
    let mount = json!({"destination": "/root/private", "type": "tmpfs", "source": "tmpfs"});
    config["mounts"].as_array_mut().unwrap().push(mount);
    bundle::write(dir.path(), &config);
    let private = dir.path().join("rootfs/root/private");
    fs::create_dir_all(&private).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o710);
    fs::set_permissions(&private, mode).unwrap();
    let out = Command::bulkhead(["run", "--rm", "--bundle", dir.path().to_str().unwrap()]).run();
    assert_eq!(out.success(), "710\n");
}

#[test]
fn a_volume_at_a_link_that_leads_nowhere_is_made_where_it_leads_b30() {
    let folder = Folder::new();
    let layer = Layer::new()
        .dir("etc", 0o755)
        .symlink("etc/resolv.conf", "../run/resolve/stub.conf")
        .symlink("data", "/run/data");
    let layout = folder.place("layout");
    Image::busybox()
        .layer(layer, Form::Plain)
        .write_layout(layout.as_ref(), "localhost/test/dangling:latest");
    fs::write(folder.place("file"), "nameserver\n").unwrap();
    fs::create_dir(folder.place("dir")).unwrap();
    fs::write(folder.place("dir/a"), "hello\n").unwrap();
    let file = format!("{}:/etc/resolv.conf:ro", folder.place("file"));
    let dir = format!("{}:/data", folder.place("dir"));
    let line = "cat /etc/resolv.conf /run/resolve/stub.conf /data/a /run/data/a; test -L /data && echo link";
    let out = Command::bulkhead([
        "run", "--rm", "-v", &file, "-v", &dir, &layout, "--", "sh", "-c", line,
    ]);
    assert_eq!(
        out.run().success(),
        "nameserver\nnameserver\nhello\nhello\nlink\n"
    );
}

#[test]
fn a_system_call_newer_than_the_profile_does_not_exist() {
    // The standard profile; a call that no kernel has yet gives ENOSYS, an old one that
    // the profile leaves out gives EPERM.
    let program = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n\
        for call in (600, 175):\n  libc.syscall(call, 0, 0, 0)\n  print(ctypes.get_errno())";
    let out = Command::bulkhead([
        "run",
        "--rm",
        "--memory",
        "512M",
        bulkhead_tests::DEBIAN,
        "--",
        "python3",
        "-c",
        program,
    ])
    .run();
    if out.stderr.contains("No module named 'ctypes'") {
        // The minimal interpreter has none: the same by perl, which every Debian has.
        let program = "for (600, 175) { $! = 0; syscall($_, 0, 0, 0); print $! + 0, \"\\n\" }";
        let out = Command::bulkhead([
            "run",
            "--rm",
            "--memory",
            "512M",
            bulkhead_tests::DEBIAN,
            "--",
            "perl",
            "-e",
            program,
        ]);
        assert_eq!(out.run().success(), "38\n1\n");
    } else {
        assert_eq!(out.success(), "38\n1\n");
    }
}

#[test]
fn an_exec_finds_its_way_though_the_container_uses_its_cgroup() {
    let name = "delegated";
    let dir = tempfile::tempdir().unwrap();
    let script = "mount -t cgroup2 cgroup /sys/fs/cgroup && cd /sys/fs/cgroup && mkdir inner && echo 1 > inner/cgroup.procs && \
        echo +pids > cgroup.subtree_control && cat cgroup.subtree_control && exec sleep 1000";
    let mut config = bundle::privileged_config(script);
    config["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .push(json!({"type": "cgroup"}));
    config["mounts"].as_array_mut().unwrap().push(json!({
        "destination": "/sys", "type": "sysfs", "source": "sysfs",
    }));
    bundle::write(dir.path(), &config);
    let place = dir.path().to_str().unwrap();
    let run = Command::bulkhead(["run", "--rm", "--name", name, "--bundle", place]).start();
    run.wait_for_output("pids");
    let out = Command::bulkhead(["exec", name, "sh", "-c", "cat /proc/self/cgroup"]).run();
    assert_eq!(out.success(), "0::/inner\n");
    Command::bulkhead(["kill", name, "KILL"]).run().success();
    assert_eq!(run.wait().code, 137);
}

#[test]
fn what_others_write_means_here_what_it_means_there_b12_b17() {
    let script = "uname -m; cat /proc/sys/net/core/somaxconn; ls -d /made/here";
    let out = run(script, |config| {
        config["process"]["apparmorProfile"] = json!("docker-default");
        config["linux"]["personality"] = json!({"domain": "LINUX32"});
        config["linux"]["sysctl"] = json!({"net/core/somaxconn": "77"});
        let relative = json!({"destination": "made/here", "type": "tmpfs", "options": ["rslave"]});
        config["mounts"].as_array_mut().unwrap().push(relative);
    });
    assert_eq!(out.success(), "i686\n77\n/made/here\n");
}
