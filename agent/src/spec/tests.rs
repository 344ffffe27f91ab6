use serde_json::{Value, json};

use super::{
    plan::{Absent, Attributes, MountKind, Namespace},
    *,
};

fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "/rootfs"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}
        ]}
    })
}

/// The minimal specification with `value` at `path` (as `process/cwd`).
fn with(path: &str, value: Value) -> Value {
    let mut spec = minimal();
    let mut at = &mut spec;
    for part in path.split('/') {
        at = match part.parse::<usize>() {
            Ok(n) => &mut at[n],
            Err(_) => &mut at[part],
        };
    }
    *at = value;
    spec
}

fn plan(spec: &Value) -> Result<ContainerPlan, SpecError> {
    container(&serde_json::to_vec(spec).unwrap(), None)
}

#[track_caller]
fn accepted(path: &str, value: Value) -> ContainerPlan {
    plan(&with(path, value)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

#[track_caller]
fn refused(path: &str, value: Value, expected: &str) {
    let spec = with(path, value);
    let text = plan(&spec).unwrap_err().to_string();
    assert!(
        text.contains(expected),
        "{text:?} does not say {expected:?}"
    );
}

#[test]
fn what_is_not_json_is_refused_b1() {
    let check = |bytes: &[u8]| assert!(container(bytes, None).is_err(), "{bytes:?}");
    check(b"");
    check(b"\0");
    check(b"\xef\xbb\xbf{}");
    check(b"null");
    check(&vec![b'['; 1 << 20]);
    check(b"{} trailing");
    let twice = minimal()
        .to_string()
        .replacen('{', r#"{"root":{"path":"/a"},"#, 1);
    check(twice.as_bytes());
}

#[test]
fn unknown_properties_and_nulls_are_fine() {
    accepted("unheardOf", json!({"a": 1}));
    accepted("process/capabilities", Value::Null);
    accepted("process/env", Value::Null);
    accepted("mounts", Value::Null);
    accepted("linux/resources", Value::Null);
    accepted("linux/sysctl", Value::Null);
}

#[test]
fn a_wrong_type_is_named_by_its_path() {
    refused(
        "process/user/uid",
        json!("root"),
        "process.user.uid: invalid type",
    );
    refused(
        "mounts",
        json!([{"destination": 7}]),
        "mounts[0].destination: invalid type",
    );
}

#[test]
fn only_version_one_is_understood_b2() {
    accepted("ociVersion", json!("1.0.2-dev"));
    refused("ociVersion", json!("99.0.0"), "ociVersion is \"99.0.0\"");
    refused("ociVersion", json!(1), "ociVersion");
    refused("ociVersion", Value::Null, "ociVersion");
}

#[test]
fn a_program_is_needed_b3() {
    refused("process/args", json!([]), "process.args");
    refused("process/args", json!([""]), "process.args");
    refused("process/args", Value::Null, "process.args");
    refused("process/args", json!(["a", "b\0c"]), "process.args[1]");
    refused("process/env", json!(["A=\0"]), "process.env[0]");
    let long = "x".repeat(1 << 20);
    assert_eq!(
        accepted("process/args", json!(["a", &long])).process.args[1],
        long
    );
}

#[test]
fn ids_are_kept_exactly_and_minus_one_is_none_b4() {
    assert_eq!(
        accepted("process/user/uid", json!(2_147_483_648_u32))
            .process
            .uid,
        1 << 31
    );
    refused("process/user/uid", json!(u32::MAX), "process.user.uid");
    refused("process/user/gid", json!(u32::MAX), "process.user.gid");
    refused("process/user/uid", json!(-1), "process.user.uid");
    refused(
        "process/user/additionalGids",
        json!([u32::MAX]),
        "additionalGids",
    );
    refused(
        "process/user/additionalGids",
        json!(vec![1; 65_537]),
        "additionalGids",
    );
    accepted("process/user/additionalGids", json!(vec![1; 65_536]));
    refused("process/user/umask", json!(0o1000), "umask");
}

#[test]
fn a_working_directory_is_absolute_b5() {
    refused("process/cwd", json!("relative"), "process.cwd");
    refused("process/cwd", json!(""), "process.cwd");
    refused("process/cwd", json!("/a\0b"), "process.cwd");
    accepted("process/cwd", json!("/../.."));
}

#[test]
fn namespaces_are_the_containers_or_a_neighbours_b6() {
    let own = accepted("hostname", json!("h")).namespaces;
    assert_eq!(
        (own.pid, own.ipc, own.uts),
        (Namespace::Own, Namespace::Own, Namespace::Own)
    );
    let check = |kind: &str, path: &str, expected: &str| {
        refused(
            "linux/namespaces/0",
            json!({"type": kind, "path": path}),
            expected,
        );
    };
    for path in [
        "/proc/1/ns/pid",
        "/run/netns/x",
        "/proc/self/ns/pid",
        "/proc/7/ns/ipc",
        "pid",
    ] {
        check("pid", path, "linux.namespaces.pid");
    }
    check("user", "/proc/7/ns/user", "cannot be shared");
    check("cgroup", "/proc/7/ns/cgroup", "cannot be shared");
    check("time", "", "not supported");
    check("mount", "", "given twice");
    check("network", "", "no pid");
    let joined = accepted(
        "linux/namespaces/0",
        json!({"type": "pid", "path": "/proc/7/ns/pid"}),
    );
    assert_eq!(
        joined.namespaces.pid,
        Namespace::Join("/proc/7/ns/pid".into())
    );
    refused("linux/namespaces", json!([{"type": "pid"}]), "no mount");
    refused(
        "linux/uidMappings",
        json!([{"containerID": 0, "hostID": 0, "size": 1}]),
        "no user",
    );
    refused(
        "linux/namespaces/3",
        json!({"type": "user"}),
        "needs 1 to 340",
    );
}

#[test]
fn rlimits_are_known_and_in_order_b7() {
    let limit =
        |name: &str, soft: u64, hard: u64| json!([{"type": name, "soft": soft, "hard": hard}]);
    let plan = accepted("process/rlimits", limit("RLIMIT_NOFILE", 1, u64::MAX));
    assert_eq!(
        (
            plan.process.rlimits[0].resource,
            plan.process.rlimits[0].hard
        ),
        (7, u64::MAX)
    );
    refused("process/rlimits", limit("RLIMIT_NOPE", 1, 1), "RLIMIT_NOPE");
    refused("process/rlimits", limit("nofile", 1, 1), "nofile");
    refused(
        "process/rlimits",
        limit("RLIMIT_CORE", 2, 1),
        "RLIMIT_CORE is \"2\"",
    );
    let one = limit("RLIMIT_CORE", 1, 1)[0].clone();
    refused("process/rlimits", json!([one, one]), "given twice");
}

#[test]
fn capabilities_are_known_b8() {
    let plan = accepted(
        "process/capabilities",
        json!({"bounding": ["CAP_CHOWN", "CAP_BPF"]}),
    );
    assert_eq!(plan.process.capabilities.bounding, 1 | 1 << 39);
    for name in ["CAP_NOPE", "cap_chown", "CHOWN", "ALL", ""] {
        let sets = json!({"effective": [name]});
        refused(
            "process/capabilities",
            sets,
            "process.capabilities.effective",
        );
    }
    accepted(
        "process/capabilities",
        json!({"bounding": vec!["CAP_KILL"; 100_000]}),
    );
}

#[test]
fn a_filter_is_whole_and_no_longer_than_the_kernel_takes_b9() {
    assert_eq!(seccomp(&[], 0).unwrap(), None);
    assert_eq!(seccomp(&[0; 16], 0).unwrap().unwrap().filter, [0, 0]);
    assert!(seccomp(&[0; 7], 0).is_err());
    assert!(seccomp(&[0; 8 * 4_096], 0).is_ok());
    assert!(seccomp(&[0; 8 * 4_097], 0).is_err());
    assert!(seccomp(&[0; 8], 8).is_err(), "a notification descriptor");
    refused(
        "linux/seccomp",
        json!({"defaultAction": "SCMP_ACT_ALLOW"}),
        "linux.seccomp",
    );
}

#[test]
fn limits_become_files_of_cgroup_v2_b11() {
    let check = |resources: Value, expected: &[(&str, &str)]| {
        let plan = accepted("linux/resources", resources);
        let settings = &plan.resources.settings;
        let seen: Vec<_> = settings.iter().map(|s| (&*s.file, &*s.value)).collect();
        assert_eq!(seen, expected);
    };
    check(json!({}), &[]);
    check(
        json!({"memory": {"limit": 1, "swap": 1, "reservation": -1}}),
        &[
            ("memory.max", "1"),
            ("memory.swap.max", "0"),
            ("memory.low", "max"),
        ],
    );
    check(
        json!({"memory": {"limit": -1, "swap": -1}}),
        &[("memory.max", "max"), ("memory.swap.max", "max")],
    );
    check(
        json!({"memory": {"limit": 0, "swap": 0, "swappiness": 60}}),
        &[],
    );
    check(
        json!({"cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 7}}),
        &[
            ("cpu.weight", "39"),
            ("cpu.max", "50000 100000"),
            ("cpu.max.burst", "7"),
        ],
    );
    check(
        json!({"cpu": {"shares": 2, "quota": -1}}),
        &[("cpu.weight", "1"), ("cpu.max", "max 100000")],
    );
    check(
        json!({"cpu": {"shares": u64::MAX, "cpus": "0-1", "mems": "", "idle": 1}}),
        &[
            ("cpu.weight", "10000"),
            ("cpu.idle", "1"),
            ("cpuset.cpus", "0-1"),
        ],
    );
    check(json!({"pids": {"limit": 5}}), &[("pids.max", "5")]);
    check(json!({"pids": {"limit": -1}}), &[("pids.max", "max")]);
    check(json!({"pids": {"limit": 0}}), &[]);
    check(
        json!({"blockIO": {"weight": 10}}),
        &[("io.weight", "default 1")],
    );
    check(
        json!({"blockIO": {"weight": 1000}}),
        &[("io.weight", "default 10000")],
    );
    check(
        json!({"unified": {"memory.high": "4k"}}),
        &[("memory.high", "4k")],
    );
    let pages = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": 0}]});
    check(pages.clone(), &[("hugetlb.2MB.max", "0")]);
    assert_eq!(
        accepted("linux/resources", pages).resources.settings[0].absent,
        Absent::Kept
    );

    let bad = |resources: Value, expected: &str| refused("linux/resources", resources, expected);
    bad(json!({"memory": {"swap": 5}}), "memory.swap");
    bad(json!({"memory": {"limit": 6, "swap": 5}}), "memory.swap");
    bad(
        json!({"memory": {"disableOOMKiller": true}}),
        "disableOOMKiller",
    );
    bad(json!({"cpu": {"realtimeRuntime": 5}}), "realtimeRuntime");
    bad(json!({"blockIO": {"weight": 1001}}), "blockIO.weight");
    bad(
        json!({"blockIO": {"throttleReadBpsDevice": [{}]}}),
        "throttleReadBpsDevice",
    );
    bad(json!({"unified": {"../x.y": "1"}}), "unified");
    bad(json!({"unified": {"cgroup.kill": "1"}}), "unified");
    bad(
        json!({"hugepageLimits": [{"pageSize": "../B", "limit": 0}]}),
        "pageSize",
    );
    bad(json!({"network": {"classID": 1}}), "network.classID");
    bad(json!({"rdma": {"mlx": {}}}), "rdma");
    bad(
        json!({"devices": [{"allow": true, "type": "x"}]}),
        "devices[0].type",
    );
    bad(
        json!({"devices": [{"allow": true, "access": "rx"}]}),
        "devices[0].access",
    );
    bad(
        json!({"devices": [{"allow": true, "major": -2}]}),
        "devices[0].major",
    );
}

#[test]
fn a_sysctl_is_a_name_and_no_path_b12() {
    let plan = accepted(
        "linux/sysctl",
        json!({"net.core.somaxconn": "5", "kernel.shm_rmid_forced": "1"}),
    );
    assert_eq!(
        plan.sysctls[1].0,
        std::path::Path::new("net/core/somaxconn")
    );
    for name in [
        "net/core/x",
        "net..x",
        "../x",
        ".net",
        "net",
        "net.a b",
        "net.\0",
        "",
    ] {
        refused("linux/sysctl", json!({name: "1"}), "linux.sysctl");
    }
    let mut spec = with("linux/sysctl", json!({"kernel.msgmax": "1"}));
    spec["linux"]["namespaces"].as_array_mut().unwrap().pop();
    assert!(plan_text(&spec).contains("no IPC namespace"));
}

fn plan_text(spec: &Value) -> String {
    plan(spec).unwrap_err().to_string()
}

#[test]
fn only_harmless_devices_are_made_b13() {
    let device = |kind: &str, major: i64, minor: i64| json!([{"path": "/dev/x", "type": kind, "major": major, "minor": minor}]);
    accepted("linux/devices", device("c", 1, 3));
    accepted("linux/devices", device("c", 10, 229));
    accepted("linux/devices", device("p", 0, 0));
    for (kind, major, minor) in [("c", 1, 1), ("b", 8, 0), ("c", -1, 0), ("b", 1, 3)] {
        refused(
            "linux/devices",
            device(kind, major, minor),
            "linux.devices[0].type",
        );
    }
    let relative = json!([{"path": "x", "type": "c", "major": 1, "minor": 3}]);
    refused("linux/devices", relative, "linux.devices[0].path");
}

#[test]
fn a_host_name_is_short_and_plain_b16() {
    accepted("hostname", json!("a".repeat(64)));
    refused("hostname", json!("a".repeat(65)), "hostname");
    for name in ["a\nb", "a\0", "a b", "\u{1b}[1m"] {
        refused("hostname", json!(name), "hostname");
        refused("domainname", json!(name), "domainname");
    }
    let mut spec = with("hostname", json!("h"));
    spec["linux"]["namespaces"]
        .as_array_mut()
        .unwrap()
        .remove(2);
    assert!(plan_text(&spec).contains("no UTS namespace"));
}

#[test]
fn labels_are_never_dropped_silently_b17() {
    refused(
        "process/apparmorProfile",
        json!("docker-default"),
        "process.apparmorProfile",
    );
    refused(
        "process/selinuxLabel",
        json!("a:b:c"),
        "process.selinuxLabel",
    );
    refused("linux/mountLabel", json!("a:b:c"), "linux.mountLabel");
    accepted("process/apparmorProfile", json!(""));
}

#[test]
fn what_is_not_supported_is_refused() {
    refused("linux/intelRdt", json!({}), "linux.intelRdt");
    refused(
        "linux/timeOffsets",
        json!({"monotonic": {}}),
        "linux.timeOffsets",
    );
    refused(
        "process/scheduler",
        json!({"policy": "SCHED_FIFO"}),
        "process.scheduler",
    );
    refused(
        "linux/personality",
        json!({"domain": "BSD"}),
        "personality.domain",
    );
    refused(
        "process/ioPriority",
        json!({"class": "X", "priority": 0}),
        "ioPriority.class",
    );
    refused("process/oomScoreAdj", json!(1001), "oomScoreAdj");
    refused("root/path", json!("rootfs"), "root.path");
    refused("linux/maskedPaths", json!(["x"]), "linux.maskedPaths[0]");
}

fn mount(options: &[&str]) -> Value {
    json!([{"destination": "/m", "type": "bind", "source": "/s", "options": options}])
}

#[test]
fn mount_options_become_attributes() {
    let check = |options: &[&str], own: (u64, u64), recursive: (u64, u64)| {
        let plan = accepted("mounts", mount(options));
        let (Attributes { set, clear }, all) = (
            plan.mounts[0].attributes,
            plan.mounts[0].recursive_attributes,
        );
        assert_eq!(
            ((set, clear), (all.set, all.clear)),
            (own, recursive),
            "{options:?}"
        );
    };
    check(&["rbind", "rprivate"], (0, 0), (0, 0));
    check(&["ro"], (1, 0), (0, 0));
    check(&["rw"], (0, 1), (0, 0));
    check(&["ro", "rw"], (0, 1), (0, 0));
    check(&["rw", "ro"], (1, 0), (0, 0));
    check(&["rro"], (0, 0), (1, 0));
    check(
        &["nosuid", "nodev", "noexec", "nodiratime", "nosymfollow"],
        (0x20_008e, 0),
        (0, 0),
    );
    check(&["noatime"], (0x10, 0x70), (0, 0));
    check(&["noatime", "relatime"], (0, 0x70), (0, 0));
    check(&["rstrictatime", "rnosuid"], (0, 0), (0x22, 0x70));
}

#[test]
fn a_bind_knows_whether_it_is_recursive() {
    let kind = |options: &[&str]| match accepted("mounts", mount(options)).mounts.remove(0).kind {
        MountKind::Bind { recursive, .. } => recursive,
        other => panic!("{other:?}"),
    };
    assert!(kind(&["rbind"]));
    assert!(!kind(&["bind"]));
    assert!(!kind(&[]));
}

#[test]
fn options_of_a_file_system_are_its_own() {
    let tmpfs =
        json!([{"destination": "/m", "type": "tmpfs", "options": ["ro", "size=1k", "huge"]}]);
    match &accepted("mounts", tmpfs).mounts[0].kind {
        MountKind::Filesystem { data, .. } => assert_eq!(
            data,
            &[
                ("size".to_owned(), Some("1k".to_owned())),
                ("huge".to_owned(), None)
            ]
        ),
        other => panic!("{other:?}"),
    }
    refused("mounts", mount(&["size=1k"]), "mounts[0].options");
    refused("mounts", mount(&["a\0"]), "mounts[0].options[0]");
    refused("mounts", mount(&[""]), "mounts[0].options[0]");
    refused("mounts", mount(&["idmap"]), "id-mapped");
    for kind in [
        "ext4", "overlay", "virtiofs", "nfs", "", "debugfs", "devtmpfs",
    ] {
        let other = json!([{"destination": "/m", "type": kind, "source": "/s"}]);
        refused("mounts", other, "mounts[0].type");
    }
    let relative = json!([{"destination": "/m", "type": "bind", "source": "s"}]);
    refused("mounts", relative, "mounts[0].source");
}

#[test]
fn the_kernels_trees_are_not_covered_b33() {
    let bind = |at: &str| json!([{"destination": at, "type": "bind", "source": "/s"}]);
    for at in [
        "/proc",
        "/proc/",
        "/proc/self/x",
        "/a/../proc/sys",
        "/sys",
        "/dev",
        "/",
        "/a/..",
        "m",
    ] {
        refused("mounts", bind(at), "mounts[0].destination");
    }
    for at in [
        "/proc/meminfo",
        "/sys/fs/cgroup",
        "/dev/shm",
        "/proceed",
        "/processes/x",
    ] {
        accepted("mounts", bind(at));
    }
    let at = |kind: &str, at: &str| json!([{"destination": at, "type": kind}]);
    accepted("mounts", at("proc", "/proc"));
    accepted("mounts", at("tmpfs", "/dev"));
    refused("mounts", at("tmpfs", "/proc"), "only proc goes there");
    refused("mounts", at("tmpfs", "/sys"), "only sysfs goes there");
}

#[test]
fn mounts_are_private_only_b34() {
    for option in ["shared", "rshared", "slave", "rslave"] {
        refused("mounts", mount(&["rbind", option]), "private mounts only");
    }
    refused(
        "linux/rootfsPropagation",
        json!("rshared"),
        "private mounts only",
    );
    accepted("linux/rootfsPropagation", json!("rprivate"));
}
