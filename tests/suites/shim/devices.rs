//! Block devices of the host that are devices of a container.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use bulkhead_tests::{Command, LoopDevice, bundle};
use rustix::fs::{FlockOperation, flock};
use serde_json::{Value, json};

use crate::{
    client::{Shim, ext4, mount},
    output::within,
    pod::Pod,
    process::Streams,
    root::{Root, config, forever, process},
    upgrade::upgraded,
};

const SECOND: Duration = Duration::from_secs(1);

/// Makes the block device with these numbers one of a container.
fn add(config: &mut Value, (major, minor): (u32, u32), path: &str, access: &str) {
    let device = json!({
        "path": path, "type": "b", "major": major, "minor": minor,
        "fileMode": 0o640, "uid": 0, "gid": 6,
    });
    let rule = json!({
        "allow": true, "type": "b", "major": major, "minor": minor, "access": access,
    });
    push(&mut config["linux"]["devices"], device);
    push(&mut config["linux"]["resources"]["devices"], rule);
}

fn push(list: &mut Value, item: Value) {
    match list.as_array_mut() {
        Some(list) => list.push(item),
        None => *list = json!([item]),
    }
}

/// A file of a mebibyte that begins with this text.
fn image(dir: &Path, text: &str) -> PathBuf {
    let path = dir.join(text);
    let mut content = text.as_bytes().to_vec();
    content.resize(1 << 20, b'.');
    fs::write(&path, content).unwrap();
    path
}

fn starts_with(image: &Path, text: &str) -> bool {
    fs::read(image).unwrap().starts_with(text.as_bytes())
}

#[test]
fn disks_of_the_host_are_devices_of_their_container_as_its_rules_say_fs_36() {
    let dir = tempfile::tempdir().unwrap();
    let images = ["data", "fixed"].map(|text| image(dir.path(), text));
    let [data, fixed] = images.each_ref().map(|image| LoopDevice::new(image));
    let mut config = config(&forever(&[]));
    add(&mut config, data.numbers(), "/dev/xvda", "rwm");
    add(&mut config, fixed.numbers(), "/dev/disks/fixed", "rm");
    let pod = Pod::start("devices", Root::new(), &config);
    let init = pod.run(Streams::Output);
    assert!(!data.is_free(), "another could write to it");
    let script = "
        stat -c '%F %a %u %g' /dev/xvda /dev/disks/fixed
        head -c 4 /dev/xvda; head -c 5 /dev/disks/fixed; echo
        echo more | dd of=/dev/xvda conv=notrunc 2>/dev/null && echo written
        echo more 2>/dev/null > /dev/disks/fixed || echo refused
        blockdev --getsize64 /dev/xvda";
    let uses = pod.exec(&process(&["sh", "-c", script]), Streams::Output);
    uses.start().unwrap();
    assert_eq!(uses.wait(), 0, "{}", uses.words());
    let said = uses.output(within(10 * SECOND));
    assert_eq!(
        String::from_utf8(said).unwrap(),
        "block special file 640 0 6\nblock special file 640 0 6\ndatafixed\nwritten\nrefused\n1048576\n"
    );
    // They go along when the shim is another program, and back to the host in the end.
    upgraded(&pod);
    assert!(!data.is_free(), "the machine has lost it");
    init.kill();
    assert_eq!(init.wait(), 137);
    init.delete().unwrap();
    assert!(data.is_free() && fixed.is_free());
    assert!(starts_with(&images[0], "more\n..."));
    assert!(starts_with(&images[1], "fixed..."));
    pod.end();
}

#[test]
fn what_a_container_wrote_is_on_the_host_when_it_stands_still_fs_36_ta_53() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), "old");
    let device = LoopDevice::new(&image);
    let mut config = config(&forever(&[]));
    add(&mut config, device.numbers(), "/dev/data", "rw");
    let pod = Pod::start("paused-device", Root::new(), &config);
    // As udev does, which has it for a moment.
    let looks = File::open(device.path()).unwrap();
    flock(&looks, FlockOperation::LockShared).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            thread::sleep(SECOND);
            drop(looks);
        });
        pod.run(Streams::Output);
    });
    // It holds them open, so that no end of a file writes back.
    let script = "exec 3<>/dev/data 4>/file; echo new >&3; echo text >&4; echo done; sleep 1000";
    let writes = pod.exec(&process(&["sh", "-c", script]), Streams::Output);
    writes.start().unwrap();
    writes.says("done\n", within(10 * SECOND));
    pod.pause();
    assert!(starts_with(&image, "new\n"));
    assert_eq!(fs::read(pod.written("file")).unwrap(), b"text\n");
    pod.resume();
    pod.end();
}

#[test]
fn a_disk_belongs_to_the_user_of_its_container_in_a_user_namespace_too_fs_36() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), "mapped");
    let device = LoopDevice::new(&image);
    let script = "stat -c '%a %u %g' /dev/data; head -c 6 /dev/data; echo";
    let mut config = bundle::config(script);
    add(&mut config, device.numbers(), "/dev/data", "rwm");
    let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
    config["linux"]["uidMappings"] = map.clone();
    config["linux"]["gidMappings"] = map;
    push(&mut config["linux"]["namespaces"], json!({"type": "user"}));
    let place = dir.path().join("bundle");
    fs::create_dir(&place).unwrap();
    bundle::write(&place, &config);
    let root = place.join("rootfs");
    let owner = ["-R", "100000:100000", root.to_str().unwrap()];
    Command::new("chown", owner).run().success();
    let out = Command::bulkhead(["run", "--rm", "--bundle", place.to_str().unwrap()]).run();
    assert_eq!(out.success(), "640 0 6\nmapped\n");
    assert!(device.is_free());
}

#[test]
fn a_container_that_joins_a_pod_later_gets_its_disks_too_fs_36_fs_03() {
    let dir = tempfile::tempdir().unwrap();
    let image = image(dir.path(), "data");
    let device = LoopDevice::new(&image);
    let mut sandbox = config(&forever(&[]));
    sandbox["annotations"] = json!({"io.kubernetes.cri.container-type": "sandbox"});
    let pod = Pod::start("sandbox", Root::new(), &sandbox);
    pod.run(Streams::Nothing);
    let mut joins = config(&forever(&[]));
    joins["annotations"] = json!({
        "io.kubernetes.cri.container-type": "container",
        "io.kubernetes.cri.sandbox-id": pod.id(),
    });
    add(&mut joins, device.numbers(), "/dev/data", "r");
    for round in 0..2 {
        let member = pod.join(&format!("member-{round}"), Root::new(), &joins);
        member.run(Streams::Nothing);
        let reads = process(&["head", "-c", "4", "/dev/data"]);
        let reads = member.exec(&reads, Streams::Output);
        reads.start().unwrap();
        assert_eq!(reads.wait(), 0, "{}", reads.words());
        assert_eq!(reads.output(within(10 * SECOND)), b"data");
        member.leave();
        assert!(device.is_free());
    }
    pod.end();
}

#[test]
fn a_disk_that_the_host_uses_or_does_not_have_is_refused_and_nothing_is_left_fs_36() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk");
    ext4(&image);
    let device = LoopDevice::new(&image);
    let root = tempfile::tempdir().unwrap();
    bundle::busybox_root(root.path());
    let place = dir.path().join("mnt");
    fs::create_dir(&place).unwrap();
    let arguments = [device.path(), place.to_str().unwrap()];
    Command::new("mount", arguments).run().success();
    let refused = |config: &Value, words: &str| {
        let shim = Shim::start("refused", config);
        let error = shim.create(vec![mount("bind", root.path(), &["rbind"])]);
        let error = error.unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        shim.shutdown();
    };
    let mut config = bundle::config("true");
    add(&mut config, device.numbers(), "/dev/data", "rwm");
    refused(&config, "the host uses it");
    Command::new("umount", [&place]).run().success();

    assert!(device.is_free());

    let mut config = bundle::config("true");
    add(&mut config, (4_095, 0), "/dev/0", "rwm");
    refused(&config, "4095:0");
    for minor in 1..9 {
        add(&mut config, (4_095, minor), &format!("/dev/{minor}"), "r");
    }
    // Before it is looked whether they are there.
    refused(&config, "9 disks");
}
