//! What only a guest shows of the OCI runtime specification, and what is told of it.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    os::unix::fs::{MetadataExt, chown},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{BUSYBOX_NAME, Command, Outcome, Setting, bundle};
use serde_json::{Value, json};

/// A bundle with a script whose specification this has changed.
fn made(dir: &Path, script: &str, change: impl FnOnce(&mut Value)) {
    let mut config = bundle::config(script);
    change(&mut config);
    bundle::write(dir, &config);
}

/// Runs a script in a bundle that this has changed.
fn run(script: &str, change: impl FnOnce(&mut Value)) -> Outcome {
    let dir = tempfile::tempdir().unwrap();
    made(dir.path(), script, change);
    Command::bulkhead(["run", "--rm", "--bundle", dir.path().to_str().unwrap()]).run()
}

/// What a hook on the host writes down of itself: its kind, the status that it was told,
/// its namespaces and its directory.
fn hook(kind: &str, into: &Path) -> Value {
    let script = format!(
        "s=$(sed 's/.*\"status\":\"\\([a-z]*\\)\".*/\\1/'); \
         echo {kind} $s $(readlink /proc/self/ns/mnt /proc/self/ns/net) $(pwd) >> {}",
        into.display()
    );
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 60}])
}

#[test]
fn hooks_run_on_the_host_and_in_the_guest_each_at_its_moment_oc_04_oc_05_oc_07() {
    let dir = tempfile::tempdir().unwrap();
    let (place, log) = (dir.path().join("bundle"), dir.path().join("log"));
    fs::create_dir(&place).unwrap();
    let script = format!("cat /hooked; test ! -e {}", log.display());
    made(&place, &script, |config| {
        for kind in [
            "prestart",
            "createRuntime",
            "createContainer",
            "poststart",
            "poststop",
        ] {
            config["hooks"][kind] = hook(kind, &log);
        }
        config["hooks"]["startContainer"] = json!([{
            "path": "/bin/sh",
            "args": ["sh", "-c", "cat > /state; uname -r > /hooked; grep -c status...created /state >> /hooked; readlink /proc/self/ns/pid > /dev/null && echo inside >> /hooked"],
            "env": ["PATH=/bin"],
        }]);
    });
    let out = Command::bulkhead(["run", "--rm", "--bundle", place.to_str().unwrap()]).run();
    let release = out.success();
    assert!(release.contains("-bulkhead\n1\ninside\n"), "{release}");
    let own = |kind: &str| fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
    let (mounts, network) = (own("mnt"), own("net"));
    let text = fs::read_to_string(&log).unwrap();
    let lines: Vec<Vec<&str>> = text.lines().map(|line| line.split(' ').collect()).collect();
    let expected = [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("createContainer", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ];
    assert_eq!(lines.len(), expected.len(), "{text}");
    for (line, (kind, status)) in lines.iter().zip(expected) {
        assert_eq!((line[0], line[1]), (kind, status), "{text}");
        assert_eq!(line[2], mounts.to_str().unwrap(), "{text}");
        // In the pod's network is only the one that asks to be in the container.
        let outside = line[3] == network.to_str().unwrap();
        assert_eq!(outside, kind != "createContainer", "{text}");
        assert_eq!(line[4], place.to_str().unwrap(), "{text}");
    }
}

#[test]
fn a_hook_that_fails_leaves_nothing_and_those_of_the_end_run_oc_06() {
    let dir = tempfile::tempdir().unwrap();
    let (place, log) = (dir.path().join("bundle"), dir.path().join("log"));
    fs::create_dir(&place).unwrap();
    made(&place, "echo ran", |config| {
        config["hooks"]["createRuntime"] = json!([
            {"path": "/bin/sh", "args": ["sh", "-c", "echo no network; exit 4"]},
        ]);
        config["hooks"]["poststart"] = hook("poststart", &log);
        config["hooks"]["poststop"] = hook("poststop", &log);
    });
    let out = Command::bulkhead(["run", "--rm", "--bundle", place.to_str().unwrap()]).run();
    assert!(out.stdout.is_empty(), "{out}");
    let words = "Hook createRuntime[0] /bin/sh failed: it ended with exit status: 4: no network";
    assert!(out.stderr.contains(words), "{out}");
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.starts_with("poststop stopped ") && text.lines().count() == 1,
        "{text}"
    );
    // One in the guest is a start that fails.
    let out = run("echo ran", |config| {
        config["hooks"]["startContainer"] = json!([{"path": "/bin/false"}]);
    });
    assert!(out.stdout.is_empty() && out.code != 0, "{out}");
    assert!(
        out.stderr
            .contains("hooks.startContainer[0] /bin/false: it ended with status 1"),
        "{out}"
    );
}

#[test]
fn the_hooks_of_the_end_run_though_the_shim_is_gone_oc_06() {
    let dir = tempfile::tempdir().unwrap();
    let (place, log) = (dir.path().join("bundle"), dir.path().join("log"));
    fs::create_dir(&place).unwrap();
    made(&place, "sleep 1000", |config| {
        config["root"]["path"] = json!(place.join("rootfs"));
        config["hooks"]["poststop"] = hook("poststop", &log);
    });
    let config = place.join("config.json");
    let run = [
        "run",
        "--runtime",
        "io.containerd.bulkhead.v2",
        "--detach",
        "--config",
    ];
    let arguments = [config.to_str().unwrap(), "bereft"];
    Command::new("ctr", run.into_iter().chain(arguments))
        .run()
        .success();
    Command::new(
        "pkill",
        ["-KILL", "-f", "containerd-shim-bulkhead-v2.*-id=bereft"],
    )
    .run()
    .success();
    let deadline = Instant::now() + Duration::from_secs(60);
    while !log.exists() {
        assert!(Instant::now() < deadline, "they do not run");
        thread::sleep(Duration::from_millis(100));
    }
    // containerd may have forgotten the task already.
    let _ = Command::new("ctr", ["task", "rm", "--force", "bereft"]).run();
    Command::new("ctr", ["container", "rm", "bereft"])
        .run()
        .success();
    let text = fs::read_to_string(&log).unwrap();
    assert!(
        text.starts_with("poststop stopped ") && text.lines().count() == 1,
        "{text}"
    );
}

#[test]
fn a_user_namespace_has_its_map_and_files_their_owners_oc_01() {
    let dir = tempfile::tempdir().unwrap();
    let (place, volume) = (dir.path().join("bundle"), dir.path().join("volume"));
    fs::create_dir(&place).unwrap();
    fs::create_dir(&volume).unwrap();
    chown(&volume, Some(100_000), Some(100_000)).unwrap();
    let script =
        "tr -s ' ' < /proc/self/uid_map; id -u; echo x > /v/new; stat -c %u /v/new / /proc/1";
    made(&place, script, |config| {
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65_536}]);
        config["linux"]["uidMappings"] = map.clone();
        config["linux"]["gidMappings"] = map;
        config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "user"}));
        let mount =
            json!({"destination": "/v", "type": "bind", "source": volume, "options": ["bind"]});
        config["mounts"].as_array_mut().unwrap().push(mount);
    });
    let root = place.join("rootfs");
    Command::new("chown", ["-R", "100000:100000", root.to_str().unwrap()])
        .run()
        .success();
    let out = Command::bulkhead(["run", "--rm", "--bundle", place.to_str().unwrap()]).run();
    assert_eq!(out.success(), " 0 100000 65536\n0\n0\n0\n0\n");
    assert_eq!(fs::metadata(volume.join("new")).unwrap().uid(), 100_000);
}

#[test]
fn a_volume_can_have_a_map_of_ids_oc_01_fs_30() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir(&volume).unwrap();
    fs::write(volume.join("old"), "old\n").unwrap();
    for path in [&volume, &volume.join("old")] {
        chown(path, Some(1000), Some(2000)).unwrap();
    }
    let script = "stat -c '%u %g' /v /v/old; echo more >> /v/old; cat /v/old; echo x > /v/new; chown 5:6 /v/new; stat -c '%u %g' /v/new";
    let out = run(script, |config| {
        let map = |on_disk: u32| json!([{"containerID": on_disk, "hostID": 0, "size": 10}]);
        let mount = json!({
            "destination": "/v", "type": "bind", "source": volume, "options": ["bind"],
            "uidMappings": map(1000), "gidMappings": map(2000),
        });
        config["mounts"].as_array_mut().unwrap().push(mount);
        config["process"]["capabilities"] = json!({
            "bounding": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"],
        });
    });
    assert_eq!(out.success(), "0 0\n0 0\nold\nmore\n5 6\n");
    let new = fs::metadata(volume.join("new")).unwrap();
    assert_eq!((new.uid(), new.gid()), (1005, 2006));
}

#[test]
fn clocks_and_priorities_are_what_the_specification_says_oc_01() {
    // Fields 41 and 40 of the line: policy and real-time priority.
    let script = "cut -d. -f1 /proc/uptime; sed 's/.*) //' /proc/self/stat | cut -d' ' -f38,39; ionice -p $$; uname -m";
    let out = run(script, |config| {
        config["linux"]["namespaces"]
            .as_array_mut()
            .unwrap()
            .push(json!({"type": "time"}));
        config["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}});
        config["linux"]["personality"] = json!({"domain": "LINUX32"});
        config["process"]["scheduler"] = json!({"policy": "SCHED_RR", "priority": 7});
        config["process"]["ioPriority"] = json!({"class": "IOPRIO_CLASS_BE", "priority": 5});
    });
    let text = out.success();
    let lines: Vec<&str> = text.lines().collect();
    let uptime: u64 = lines[0].parse().unwrap();
    assert!((1_000_000..1_010_000).contains(&uptime), "{text}");
    assert_eq!(lines[1..], ["7 2", "best-effort: prio 5", "i686"], "{text}");
}

#[test]
fn a_privileged_container_has_no_device_of_the_host_oc_01_cl_12_fs_37() {
    let script =
        "ls -d /dev/sd* /dev/vd* /dev/loop0 /dev/kvm /dev/mem 2>/dev/null; ls -d /dev/null";
    let run = [
        "run",
        "--runtime",
        "io.containerd.bulkhead.v2",
        "--rm",
        "--privileged",
    ];
    let arguments = [BUSYBOX_NAME, "privileged", "sh", "-c", script];
    let out = Command::new("ctr", run.into_iter().chain(arguments)).run();
    assert_eq!(out.success(), "/dev/null\n");
}

#[test]
fn what_became_of_a_specification_can_be_asked_whoever_started_it_oc_01() {
    let profile = ["--apparmor-profile", "nobody-has-it"];
    let run = ["run", "--runtime", "io.containerd.bulkhead.v2", "--detach"];
    let arguments = [BUSYBOX_NAME, "explained", "sleep", "1000"];
    Command::new("ctr", run.into_iter().chain(profile).chain(arguments))
        .run()
        .success();
    let table = Command::bulkhead(["explain", "explained"]).run().success();
    let line = |field: &str| {
        let line = table
            .lines()
            .find(|line| line.trim_start().starts_with(field));
        line.unwrap_or_else(|| panic!("no {field} in {table}"))
            .to_owned()
    };
    assert!(line("process.args").contains("guest"), "{table}");
    assert!(line("linux.cgroupsPath").contains("host"), "{table}");
    assert!(
        line("process.apparmorProfile").contains("ignored by design"),
        "{table}"
    );
    let json = Command::bulkhead(["explain", "explained", "--format", "json"])
        .run()
        .success();
    let json: Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["namespace"], "default");
    let fields = json["fields"].as_array().unwrap();
    assert!(
        fields
            .iter()
            .any(|note| note["field"] == "mounts" && note["fate"] == "both"),
        "{json}"
    );
    Command::new("ctr", ["task", "rm", "--force", "explained"])
        .run()
        .success();
    Command::new("ctr", ["container", "rm", "explained"])
        .run()
        .success();
    let gone = Command::bulkhead(["explain", "explained"]).run().failure();
    assert!(gone.contains("there is no such container"), "{gone}");
    // One that does not run, and would not.
    let dir = tempfile::tempdir().unwrap();
    made(dir.path(), "true", |config| {
        config["process"]["cwd"] = json!("relative");
    });
    let place = dir.path().to_str().unwrap();
    let table = Command::bulkhead(["explain", "--bundle", place])
        .run()
        .success();
    assert!(
        table
            .lines()
            .any(|line| line.contains("process.cwd") && line.contains("refused")),
        "{table}"
    );
}

#[test]
fn a_strict_administrator_has_no_container_without_the_protection_it_asks_for_oc_01_b17() {
    let setting = Setting::put("strict = true\n");
    let label = |config: &mut Value| config["process"]["apparmorProfile"] = json!("docker-default");
    let out = run("true", label);
    assert!(out.failure().contains("process.apparmorProfile"));
    run("true", |_| {}).success();
    drop(setting);
    run("true", label).success();
}

/// Binds what the host has at `source`.
fn bind(config: &mut Value, source: &Path, destination: &str, options: &[&str]) {
    let mount = json!({
        "destination": destination, "type": "bind", "source": source, "options": options,
    });
    config["mounts"].as_array_mut().unwrap().push(mount);
}

#[test]
fn a_volume_is_read_only_with_all_below_it_as_kubernetes_asks_for_it_fs_29() {
    let volume = tempfile::tempdir().unwrap();
    let below = volume.path().join("below");
    fs::create_dir(&below).unwrap();
    let mounted = below.to_str().unwrap();
    Command::new("mount", ["-t", "tmpfs", "tmpfs", mounted])
        .run()
        .success();
    fs::write(below.join("f"), "kept").unwrap();
    let script = "touch /data/g; touch /data/below/g; cat /data/below/f";
    let out = run(script, |config| {
        bind(
            config,
            volume.path(),
            "/data",
            &["rbind", "rprivate", "rro"],
        );
    });
    Command::new("umount", [mounted]).run().success();
    assert_eq!(out.stdout, "kept", "{out}");
    let refused = out.stderr.matches("Read-only file system").count();
    assert_eq!(refused, 2, "{out}");
}

#[test]
fn a_bound_part_of_proc_sys_or_dev_is_the_guests_fs_31() {
    let script = "ls /host/dev | grep -c ^kvm$; ls /host/cgroup | grep -c ^system.slice$
        cat /host/cgroup/cgroup.controllers > /dev/null && echo cgroup
        cd /proc/sys/kernel/random; cat boot_id /host/proc/sys/kernel/random/boot_id | uniq | wc -l
        echo 1 2>/dev/null > /host/proc/sys/kernel/panic || echo refused";
    assert!(Path::new("/dev/kvm").exists() && Path::new("/sys/fs/cgroup/system.slice").exists());
    let out = run(script, |config| {
        for (source, place, access) in [
            ("/proc", "/host/proc", "ro"),
            ("/sys/fs/cgroup", "/host/cgroup", "ro"),
            ("/dev", "/host/dev", "rw"),
        ] {
            bind(config, Path::new(source), place, &["rbind", access]);
        }
    });
    assert_eq!(out.stdout, "0\n0\ncgroup\n1\nrefused\n", "{out}");
}
