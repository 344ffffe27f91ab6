use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn id() -> ContainerId {
    ContainerId::new("c1").unwrap()
}

fn base() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["/bin/sh"],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": "rootfs"},
        "linux": {"namespaces": [{"type": "pid"}, {"type": "mount"}]},
    })
}

/// The base with one value replaced or added.
fn with(pointer: &str, value: Value) -> Value {
    let mut spec = base();
    let mut at = &mut spec;
    let mut parts = pointer.split('.').peekable();
    while let Some(part) = parts.next() {
        at = &mut at[part];
        if parts.peek().is_none() {
            *at = value;
            return spec;
        }
    }
    spec
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "the tests make what they pass"
)]
fn run(spec: Value) -> Result<Prepared, Error> {
    prepare(&id(), &spec, Terminal::No, |path| {
        (path == Path::new("/host/shm")).then_some(65_536)
    })
}

/// The refusal names the field.
fn refused(pointer: &str, value: Value, field: &str) {
    let shown = value.to_string();
    let text = run(with(pointer, value))
        .expect_err(&format!("{pointer} = {shown:.60}"))
        .to_string();
    assert!(
        text.starts_with(&format!("config.json: {field} = ")),
        "{text}"
    );
    assert!(text.len() < 400, "{text}");
}

#[test]
fn a_plain_specification_passes() {
    let prepared = run(base()).unwrap();
    assert_eq!(prepared.root, Path::new("rootfs"));
    assert_eq!(
        prepared.guest["root"]["path"],
        "/run/bulkhead/share/c1/rootfs"
    );
    assert_eq!(prepared.guest["linux"]["cgroupsPath"], "/bulkhead/c1");
    assert_eq!(prepared.guest["process"]["terminal"], false);
    assert_eq!(prepared.notes, Vec::<String>::new());
}

#[test]
fn versions_other_than_1_are_refused_b2() {
    for bad in [
        json!("99.0.0"),
        json!("1"),
        json!(1),
        json!(""),
        json!("0.9.0"),
        json!(null),
    ] {
        refused("ociVersion", bad, "ociVersion");
    }
    for good in ["1.0.0", "1.0.2-dev", "1.3.0"] {
        run(with("ociVersion", json!(good))).unwrap();
    }
}

#[test]
fn a_process_needs_a_program_b3() {
    refused("process.args", json!([]), "process.args");
    refused("process.args", json!(null), "process.args");
    refused("process.args", json!("sh"), "process.args");
    refused("process.args", json!(["a\0b"]), "process.args[0]");
    refused("process.args", json!([1]), "process.args[0]");
    refused("process.env", json!(["A=\0"]), "process.env[0]");
    run(with("process.args", json!(["x".repeat(1 << 20)]))).unwrap();
}

#[test]
fn user_and_group_ids_are_kept_or_refused_never_changed_b4() {
    for good in [0_u32, 2_147_483_648, 4_294_967_294] {
        let prepared = run(with("process.user.uid", json!(good))).unwrap();
        assert_eq!(prepared.guest["process"]["user"]["uid"], good);
    }
    for bad in [
        json!(4_294_967_295_u32),
        json!(-1),
        json!(1_u64 << 40),
        json!(0.5),
        json!("0"),
    ] {
        refused("process.user.uid", bad.clone(), "process.user.uid");
        refused("process.user.gid", bad, "process.user.gid");
    }
    refused(
        "process.user.additionalGids",
        json!(vec![1; 65_537]),
        "process.user.additionalGids",
    );
    refused(
        "process.user.additionalGids",
        json!([-1]),
        "process.user.additionalGids[0]",
    );
}

#[test]
fn the_working_directory_is_absolute_b5() {
    refused("process.cwd", json!("tmp"), "process.cwd");
    refused("process.cwd", json!("/a\0"), "process.cwd");
    for left_to_the_guest in ["", "/..", "/proc/self/fd/7"] {
        run(with("process.cwd", json!(left_to_the_guest))).unwrap();
    }
}

#[test]
fn namespaces_of_the_host_are_refused_except_the_network_b6() {
    for kind in ["pid", "ipc", "uts", "user", "cgroup", "mount", "time"] {
        let spec = json!([{"type": kind, "path": "/proc/1/ns/x"}]);
        refused("linux.namespaces", spec, "linux.namespaces[0].path");
    }
    refused(
        "linux.namespaces",
        json!([{"type": "net"}]),
        "linux.namespaces[0].type",
    );
    let spec = json!([{"type": "network", "path": "/run/netns/a"}, {"type": "ipc"}]);
    let prepared = run(with("linux.namespaces", spec)).unwrap();
    assert_eq!(
        prepared.guest["linux"]["namespaces"],
        json!([{"type": "ipc"}])
    );
}

#[test]
fn resource_limits_are_checked_by_name_b7() {
    let limit =
        |kind: &str, soft: Value, hard: Value| json!([{"type": kind, "soft": soft, "hard": hard}]);
    refused(
        "process.rlimits",
        limit("RLIMIT_X", json!(1), json!(1)),
        "process.rlimits[0].type",
    );
    refused(
        "process.rlimits",
        limit("RLIMIT_NOFILE", json!(2), json!(1)),
        "process.rlimits[0].soft",
    );
    refused(
        "process.rlimits",
        limit("RLIMIT_NOFILE", json!(-1), json!(1)),
        "process.rlimits[0].soft",
    );
    run(with(
        "process.rlimits",
        limit("RLIMIT_NOFILE", json!(u64::MAX), json!(u64::MAX)),
    ))
    .unwrap();
}

#[test]
fn unknown_capabilities_are_refused_b8() {
    for bad in ["CAP_NONE", "cap_chown", "CHOWN", ""] {
        refused(
            "process.capabilities",
            json!({"bounding": [bad]}),
            "process.capabilities.bounding[0]",
        );
    }
    let flood = json!({"bounding": vec!["CAP_CHOWN"; 100_000]});
    refused(
        "process.capabilities",
        flood,
        "process.capabilities.bounding",
    );
    run(with(
        "process.capabilities",
        json!({"bounding": ["CAP_CHOWN"], "ambient": []}),
    ))
    .unwrap();
}

#[test]
fn seccomp_is_taken_out_b9() {
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW"});
    let prepared = run(with("linux.seccomp", profile.clone())).unwrap();
    assert_eq!(prepared.seccomp, Some(profile));
    assert!(prepared.guest["linux"].get("seccomp").is_none());
}

#[test]
fn hooks_are_refused_unless_empty_b10() {
    for name in [
        "prestart",
        "createRuntime",
        "createContainer",
        "startContainer",
        "poststart",
        "poststop",
    ] {
        refused(
            "hooks",
            json!({name: [{"path": "/bin/true"}]}),
            &format!("hooks.{name}"),
        );
        run(with("hooks", json!({name: []}))).unwrap();
    }
}

#[test]
fn limits_that_no_program_survives_are_refused_b11() {
    refused(
        "linux.resources",
        json!({"memory": {"limit": 1}}),
        "linux.resources.memory.limit",
    );
    refused(
        "linux.resources",
        json!({"memory": {"limit": -2}}),
        "linux.resources.memory.limit",
    );
    refused(
        "linux.resources",
        json!({"cpu": {"quota": 1}}),
        "linux.resources.cpu.quota",
    );
    refused(
        "linux.resources",
        json!({"cpu": {"period": 10}}),
        "linux.resources.cpu.period",
    );
    let prepared = run(with(
        "linux.resources",
        json!({"memory": {"limit": 67_108_864}, "cpu": {"quota": 150_000, "period": 100_000, "cpus": "0-99999"}}),
    ))
    .unwrap();
    assert_eq!(
        prepared.limits,
        Limits {
            cpus: Some(2),
            memory: Some(67_108_864)
        }
    );
    assert!(
        prepared.guest["linux"]["resources"]["cpu"]
            .get("cpus")
            .is_none()
    );
    assert_eq!(prepared.notes.len(), 1, "{:?}", prepared.notes);
    for none in [
        json!({"memory": {"limit": -1}}),
        json!({"cpu": {"quota": -1}}),
        json!({"cpu": {"quota": 0}}),
    ] {
        assert_eq!(
            run(with("linux.resources", none)).unwrap().limits,
            Limits::default()
        );
    }
}

#[test]
fn sysctl_names_cannot_be_paths_b12() {
    for bad in ["../x", "net/ipv4/x", "", "a b", "net..x"] {
        refused(
            "linux.sysctl",
            json!({bad: "1"}),
            &format!("linux.sysctl.{bad}"),
        );
    }
    run(with("linux.sysctl", json!({"net.ipv4.ip_forward": "1"}))).unwrap();
    let flood: Map<String, Value> = (0..10_000)
        .map(|n| (format!("net.x{n}"), json!("1")))
        .collect();
    refused("linux.sysctl", Value::Object(flood), "linux.sysctl");
}

#[test]
fn devices_of_the_host_are_refused_b13() {
    let device = |path: &str, kind: &str, major: i64, minor: i64| json!([{"path": path, "type": kind, "major": major, "minor": minor}]);
    refused(
        "linux.devices",
        device("/dev/mem", "c", 1, 1),
        "linux.devices[0].path",
    );
    refused(
        "linux.devices",
        device("/dev/sda", "b", 8, 0),
        "linux.devices[0].path",
    );
    refused(
        "linux.devices",
        device("/dev/x", "c", -1, 0),
        "linux.devices[0].major",
    );
    run(with("linux.devices", device("/dev/null", "c", 1, 3))).unwrap();
    run(with("linux.devices", device("/dev/fuse", "c", 10, 229))).unwrap();
}

#[test]
fn the_root_needs_a_path_b14() {
    refused("root", json!(null), "root");
    refused("root", json!({}), "root.path");
    refused("root.path", json!("a\0"), "root.path");
}

#[test]
fn masked_paths_are_absolute_and_bounded_b15() {
    refused(
        "linux.maskedPaths",
        json!(["proc/kcore"]),
        "linux.maskedPaths[0]",
    );
    refused(
        "linux.readonlyPaths",
        json!(vec!["/x"; 20_000]),
        "linux.readonlyPaths",
    );
    run(with("linux.maskedPaths", json!(vec!["/x"; 10_000]))).unwrap();
}

#[test]
fn host_names_are_short_and_printable_b16() {
    for bad in ["x".repeat(1_000_000), "a\0b".into(), "a\nb".into()] {
        refused("hostname", json!(bad), "hostname");
    }
    run(with("hostname", json!("web-1"))).unwrap();
}

#[test]
fn security_labels_of_the_host_are_never_dropped_silently_b17() {
    for label in ["apparmorProfile", "selinuxLabel"] {
        let prepared = run(with(&format!("process.{label}"), json!("profile"))).unwrap();
        assert!(prepared.notes[0].contains(label), "{:?}", prepared.notes);
        assert!(prepared.guest["process"].get(label).is_none());
    }
}

#[test]
fn bind_mounts_become_volumes_of_the_share_fs_17() {
    let mounts = json!([
        {"destination": "/proc", "type": "proc", "source": "proc"},
        {"destination": "/data", "type": "bind", "source": "/srv/data", "options": ["rbind", "rprivate", "ro"]},
        {"destination": "/etc/hosts", "source": "/var/lib/x/hosts", "options": ["bind"]},
        {"destination": "/dev/shm", "type": "bind", "source": "/host/shm", "options": ["rbind"]},
    ]);
    let prepared = run(with("mounts", mounts)).unwrap();
    let volume = |source: &str, destination: &str, recursive, read_only| Volume {
        source: source.into(),
        destination: destination.into(),
        recursive,
        read_only,
    };
    assert_eq!(
        prepared.volumes,
        [
            volume("/srv/data", "/data", true, true),
            volume("/var/lib/x/hosts", "/etc/hosts", false, false)
        ]
    );
    let guest = &prepared.guest["mounts"];
    assert_eq!(guest[0]["type"], "proc");
    assert_eq!(guest[1]["source"], "/run/bulkhead/share/c1/volumes/0");
    assert_eq!(guest[2]["source"], "/run/bulkhead/share/c1/volumes/1");
    assert_eq!(guest[2]["type"], "bind");
    assert_eq!(guest[3]["type"], "tmpfs");
    assert_eq!(guest[3]["options"][4], "size=65536");
}

#[test]
fn mounts_that_cannot_work_are_refused_b34() {
    let mount = |kind: &str, options: Value| json!([{"destination": "/x", "type": kind, "source": "/y", "options": options}]);
    for option in ["shared", "rshared", "slave", "rslave"] {
        refused(
            "mounts",
            mount("bind", json!(["rbind", option])),
            "mounts[0].options",
        );
    }
    refused(
        "mounts",
        mount("bind", json!(["ridmap"])),
        "mounts[0].options",
    );
    refused("mounts", mount("nfs", json!([])), "mounts[0].type");
    refused(
        "mounts",
        json!([{"destination": "x", "type": "proc"}]),
        "mounts[0].destination",
    );
    refused(
        "mounts",
        json!([{"destination": "/x", "type": "bind"}]),
        "mounts[0].source",
    );
}

#[test]
fn the_guest_sees_no_path_of_the_host_b38() {
    let mut spec = with(
        "annotations",
        json!({"nerdctl/state-dir": "/host-secret/a"}),
    );
    spec["linux"]["cgroupsPath"] = json!("/host-secret/b");
    spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/host-secret/c"}]);
    spec["mounts"] = json!([{"destination": "/d", "type": "bind", "source": "/host-secret/d"}]);
    spec["root"]["path"] = json!("/host-secret/e");
    let guest = run(spec).unwrap().guest.to_string();
    assert!(!guest.contains("host-secret"), "{guest}");
}

fn arbitrary_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-z]{1,8}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #[test]
    fn no_value_in_any_known_place_panics(value in arbitrary_json(), place in 0_usize..26) {
        let places = [
            "ociVersion", "process", "process.args", "process.env", "process.cwd", "process.user",
            "process.user.additionalGids", "process.rlimits", "process.capabilities", "process.consoleSize",
            "process.oomScoreAdj", "root", "root.path", "root.readonly", "hostname", "mounts", "hooks",
            "linux", "linux.namespaces", "linux.devices", "linux.sysctl", "linux.maskedPaths",
            "linux.resources", "linux.resources.memory", "linux.resources.cpu", "linux.netDevices",
        ];
        let mut spec = base();
        spec["linux"]["resources"] = json!({});
        let mut at = &mut spec;
        for part in places[place].split('.') {
            at = &mut at[part];
        }
        *at = value;
        let _ = run(spec);
    }
}
