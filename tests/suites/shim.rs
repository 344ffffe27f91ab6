//! The shim's binary by itself: started as containerd starts it, called as containerd
//! calls it, without containerd. Here are roots that are disks.
//!
//! What a suite for shims checks is here in our own words; `docs/rules.md` says which id
//! is what. Limits of time there are for hardware, and this host is emulated: the order of
//! what happens is taken as it is (output before Delete, its end before Delete), each
//! limit tenfold. Sizes are as there, but in the long runs (`stress.rs`).
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

#[path = "shim/client.rs"]
mod client;
#[path = "shim/devices.rs"]
mod devices;
#[path = "shim/events.rs"]
mod events;
#[path = "shim/execs.rs"]
mod execs;
#[path = "shim/growth.rs"]
mod growth;
#[path = "shim/network.rs"]
mod network;
#[path = "shim/output.rs"]
mod output;
#[path = "shim/pod.rs"]
mod pod;
#[path = "shim/process.rs"]
mod process;
#[path = "shim/root.rs"]
mod root;
#[path = "shim/runs.rs"]
mod runs;
#[path = "shim/stress.rs"]
mod stress;
#[path = "shim/task.rs"]
mod task;
#[path = "shim/upgrade.rs"]
mod upgrade;

use std::{fs, path::Path, process::Command};

use bulkhead_tests::bundle;
use client::{Shim, ext4, mount};
use serde_json::json;

impl Shim {
    /// Runs its program to the end; answers the exit code.
    fn run(&self) -> ttrpc::Result<u32> {
        self.start_program()?;
        self.wait()
    }
}

/// The content of a file in an image, as the host's tools read it.
fn in_image(image: &Path, file: &str) -> String {
    let read = Command::new("debugfs")
        .args(["-R", &format!("cat {file}")])
        .arg(image)
        .output()
        .unwrap();
    String::from_utf8(read.stdout).unwrap()
}

#[test]
fn a_root_that_is_a_disk_is_mounted_by_the_guest_and_keeps_what_is_written_fs_03() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    ext4(&image);
    let script = "grep ' / ' /proc/mounts; echo written > /new; ls /lost+found; exit 7";
    let shim = Shim::start("disk", &bundle::config(script));
    assert!(
        shim.create(vec![mount("ext4", &image, &["rw", "loop"])])
            .unwrap()
            > 0
    );
    assert_eq!(shim.run(), Ok(7), "{}", shim.said());
    assert!(shim.said().contains(" / ext4 rw"), "{}", shim.said());
    // What somebody reads after Delete is whole.
    assert_eq!(shim.delete(), Ok(7));
    assert_eq!(in_image(&image, "/new"), "written\n");
    let check = Command::new("e2fsck")
        .args(["-f", "-n"])
        .arg(&image)
        .output()
        .unwrap();
    assert!(check.status.success(), "{check:?}");
    // And nobody holds it any more.
    fs::rename(&image, dir.path().join("other")).unwrap();
    shim.shutdown();
}

#[test]
fn a_disk_that_is_read_only_cannot_be_written_and_can_be_shared_fs_03() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    ext4(&image);
    let before = fs::read(&image).unwrap();
    let mut config = bundle::config("touch /new || echo refused");
    // As engines have it: on a root that cannot be written no device could be made.
    let dev = json!({"destination": "/dev", "type": "tmpfs", "source": "tmpfs"});
    config["mounts"].as_array_mut().unwrap().push(dev);
    let shims = ["one", "two"].map(|id| Shim::start(id, &config));
    for shim in &shims {
        shim.create(vec![mount("ext4", &image, &["ro"])]).unwrap();
    }
    for shim in shims {
        assert_eq!(shim.run(), Ok(0), "{}", shim.said());
        assert!(shim.said().contains("refused\n"), "{}", shim.said());
        assert_eq!(shim.delete(), Ok(0));
        shim.shutdown();
    }
    assert!(fs::read(&image).unwrap() == before);
}

#[test]
fn a_disk_of_another_container_is_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    ext4(&image);
    let config = bundle::config("true");
    let rootfs = || vec![mount("ext4", &image, &["rw"])];
    let first = Shim::start("first", &config);
    first.create(rootfs()).unwrap();
    let second = Shim::start("second", &config);
    let error = second.create(rootfs()).unwrap_err().to_string();
    assert!(error.contains("another container uses it"), "{error}");
    first.kill().unwrap();
    assert_eq!(first.delete(), Ok(137));
    // As soon as the first is gone, while its machine still lives.
    second.create(rootfs()).unwrap();
    assert_eq!(second.run(), Ok(0), "{}", second.said());
    second.delete().unwrap();
    second.shutdown();
    first.shutdown();
}

#[test]
fn a_disk_without_a_file_system_is_refused_and_nothing_is_left() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    fs::write(&image, vec![0; 1 << 20]).unwrap();
    let shim = Shim::start("empty", &bundle::config("true"));
    let error = shim
        .create(vec![mount("ext4", &image, &["rw"])])
        .unwrap_err()
        .to_string();
    assert!(error.contains("mount the root file system"), "{error}");
    // The disk is free again, whatever became of the machine.
    ext4(&image);
    shim.create(vec![mount("ext4", &image, &["rw"])]).unwrap();
    assert_eq!(shim.run(), Ok(0), "{}", shim.said());
    shim.delete().unwrap();
    shim.shutdown();
}
