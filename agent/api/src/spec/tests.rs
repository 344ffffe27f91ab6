mod devices;
mod hooks;
mod mounts;
mod process;
mod random;
mod resources;
mod update;

use serde_json::{Value, json};

use super::{
    plan::{ContainerPlan, MountKind, Namespace, TimeOffset},
    *,
};

fn minimal() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"args": ["true"], "cwd": "/", "user": {"uid": 0, "gid": 0}},
        "root": {"path": "/rootfs"},
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "uts"}, {"type": "ipc"}, {"type": "network"}
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

fn read(text: &[u8]) -> Result<Checked<ContainerPlan>, Error> {
    container(json::from_slice("", text)?, None)
}

fn check(spec: &Value) -> Result<Checked<ContainerPlan>, Error> {
    read(&serde_json::to_vec(spec).unwrap())
}

/// What passes passes again in the form that the guest gets, and means the same.
fn plan(spec: &Value) -> Result<ContainerPlan, Error> {
    let mut plan = check(spec)?.plan;
    let spec: oci::Spec = json::from_value("", spec.clone())?;
    let wire = serde_json::to_vec(&spec).unwrap();
    let again = read(&wire).unwrap_or_else(|e| panic!("the second reader refuses: {e}"));
    // The host's stay there.
    plan.hooks = plan::Hooks {
        start_container: plan.hooks.start_container,
        ..plan::Hooks::default()
    };
    assert_eq!(again.plan, plan);
    Ok(plan)
}

#[track_caller]
fn accepted(path: &str, value: Value) -> ContainerPlan {
    plan(&with(path, value)).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// Accepted with something left out, which one note says.
#[track_caller]
fn noted(path: &str, value: Value, expected: &str) -> ContainerPlan {
    let checked = check(&with(path, value)).unwrap_or_else(|e| panic!("{path}: {e}"));
    match checked.notes.as_slice() {
        [note] => assert!(
            note.to_string().contains(expected),
            "{note:?} does not say {expected:?}"
        ),
        other => panic!("{other:?}"),
    }
    checked.plan
}

#[track_caller]
fn refused(path: &str, value: Value, expected: &str) {
    let spec = with(path, value);
    let text = plan_text(&spec);
    assert!(
        text.contains(expected),
        "{text:?} does not say {expected:?}"
    );
    assert!(text.len() < 700, "{text}");
}

#[test]
fn what_is_not_json_is_refused_b1() {
    let check = |bytes: &[u8]| assert!(read(bytes).is_err(), "{bytes:?}");
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
        r#"process.user.uid = "root": invalid type"#,
    );
    refused(
        "mounts",
        json!([{"destination": 7}]),
        "mounts[0].destination = 7: invalid type",
    );
    refused("process", json!([]), "process = []: it must be an object");
    refused(
        "mounts",
        json!([{"destination": "/a", "type": "tmpfs"}, ["/b", "tmpfs"]]),
        "mounts[1] = [\"/b\",\"tmpfs\"]: it must be an object",
    );
    refused("process/user", json!([5]), "process.user = [5]");
    refused("linux", json!(7), "linux = 7: invalid type");
    assert!(
        read(b"7")
            .unwrap_err()
            .to_string()
            .starts_with("config.json = 7: ")
    );
}

#[test]
fn only_version_one_is_understood_b2() {
    accepted("ociVersion", json!("1.0.2-dev"));
    refused("ociVersion", json!("99.0.0"), "ociVersion = \"99.0.0\": ");
    refused("ociVersion", json!("1"), "ociVersion");
    refused("ociVersion", json!("0.9.0"), "ociVersion");
    refused("ociVersion", json!(""), "ociVersion");
    refused("ociVersion", json!(1), "ociVersion");
    refused("ociVersion", Value::Null, "ociVersion");
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
        check("pid", path, "linux.namespaces[0].path");
    }
    check("user", "/proc/7/ns/user", "cannot be shared");
    check("cgroup", "/proc/7/ns/cgroup", "cannot be shared");
    check("time", "/proc/7/ns/time", "cannot be shared");
    check("mount", "", "given twice");
    check("net", "", "no such namespace");
    let joined = accepted(
        "linux/namespaces/0",
        json!({"type": "pid", "path": "/proc/7/ns/pid"}),
    );
    assert_eq!(
        joined.namespaces.pid,
        Namespace::Join("/proc/7/ns/pid".into())
    );
    refused(
        "linux/uidMappings",
        json!([{"containerID": 0, "hostID": 0, "size": 1}]),
        "there is no user namespace",
    );
    refused(
        "linux/namespaces/3",
        json!({"type": "user"}),
        "needs 1 to 340",
    );
}

#[test]
fn namespaces_that_are_not_named_are_the_containers_own() {
    for some in [json!([]), Value::Null, json!([{"type": "mount"}])] {
        let own = accepted("linux/namespaces", some).namespaces;
        assert_eq!(
            (own.pid, own.ipc, own.uts, own.own_user, own.time),
            (Namespace::Own, Namespace::Own, Namespace::Own, false, None)
        );
    }
    let mut spec = with("hostname", json!("h"));
    spec["linux"]["namespaces"] = json!([{"type": "mount"}]);
    assert_eq!(plan(&spec).unwrap().hostname.as_deref(), Some("h"));
}

#[test]
fn a_time_namespace_has_the_offsets_of_two_clocks() {
    let of = |offsets: Value, namespaces: Value| {
        let mut spec = with("linux/timeOffsets", offsets);
        spec["linux"]["namespaces"] = namespaces;
        plan(&spec)
    };
    let own = || json!([{"type": "time"}]);
    let offsets = json!({"monotonic": {"secs": -5, "nanosecs": 7}, "boottime": {"secs": 9}});
    let offset = |clock: &str, secs, nanosecs| TimeOffset {
        clock: clock.to_owned(),
        secs,
        nanosecs,
    };
    assert_eq!(
        of(offsets.clone(), own()).unwrap().namespaces.time,
        Some(vec![offset("boottime", 9, 0), offset("monotonic", -5, 7)])
    );
    assert_eq!(of(json!({}), own()).unwrap().namespaces.time, Some(vec![]));
    for (offsets, namespaces, expected) in [
        (offsets, json!([]), "there is no time namespace"),
        (json!({"realtime": {"secs": 1}}), own(), "linux.timeOffsets"),
        (
            json!({"monotonic": {"nanosecs": 1_000_000_000}}),
            own(),
            "linux.timeOffsets.monotonic.nanosecs",
        ),
        (
            json!({"monotonic": {"secs": i64::MIN}}),
            own(),
            "linux.timeOffsets.monotonic.secs",
        ),
    ] {
        let text = of(offsets, namespaces).unwrap_err().to_string();
        assert!(text.contains(expected), "{text}");
    }
}

fn plan_text(spec: &Value) -> String {
    plan(spec).unwrap_err().to_string()
}

#[test]
fn a_host_name_is_short_and_plain_b16() {
    accepted("hostname", json!("a".repeat(64)));
    refused("hostname", json!("a".repeat(65)), "hostname");
    for name in ["a\nb", "a\0", "a b", "\u{1b}[1m"] {
        refused("hostname", json!(name), "hostname");
        refused("domainname", json!(name), "domainname");
    }
}

#[test]
fn labels_are_ignored_but_never_silently_b17() {
    for (path, field) in [
        (
            "process/apparmorProfile",
            "process.apparmorProfile is ignored",
        ),
        ("process/selinuxLabel", "process.selinuxLabel is ignored"),
        ("linux/mountLabel", "linux.mountLabel is ignored"),
    ] {
        noted(path, json!("a:b:c"), field);
        assert_eq!(check(&with(path, json!(""))).unwrap().notes, []);
    }
    let options = ["nosuid", "context=\"system_u:object_r:a_t:s0:c1,c2\""];
    let tmpfs = json!([{"destination": "/m", "type": "tmpfs", "options": options}]);
    let plan = noted("mounts", tmpfs, "mounts[0].options[1] is ignored");
    assert!(matches!(&plan.mounts[0].kind, MountKind::Filesystem { data, .. } if data.is_empty()));
}

#[test]
fn what_belongs_to_the_host_is_left_to_it_with_a_note() {
    for (path, value, told) in [
        (
            "linux/intelRdt",
            json!({"closID": "x"}),
            "linux.intelRdt is ignored",
        ),
        (
            "linux/memoryPolicy",
            json!({"mode": "MPOL_BIND"}),
            "linux.memoryPolicy is ignored",
        ),
        ("vm", json!({"kernel": {"path": "/x"}}), "vm is ignored"),
    ] {
        accepted(path, value.clone());
        let rows = report(&with(path, value), &[]);
        assert!(
            rows.iter().any(|row| row.to_string().starts_with(told)),
            "{rows:?}"
        );
    }
    noted(
        "process/execCPUAffinity",
        json!({"initial": "0"}),
        "process.execCPUAffinity",
    );
    refused("linux/netDevices", json!({"eth0": {}}), "linux.netDevices");
    accepted("linux/netDevices", json!({}));
}

#[test]
fn masked_paths_are_absolute_and_bounded_b15() {
    refused(
        "linux/readonlyPaths",
        json!(vec!["/x"; 20_000]),
        "linux.readonlyPaths",
    );
    accepted("linux/maskedPaths", json!(vec!["/x"; 10_000]));
}

#[test]
fn the_parts_that_every_container_needs_are_required_b14() {
    for part in ["process", "root", "linux"] {
        refused(
            part,
            Value::Null,
            &format!("{part} = nothing: it is required"),
        );
    }
    refused("root", json!({}), "root.path = nothing");
    refused("root/path", json!("/a\0"), "root.path");
}

#[test]
fn what_is_not_supported_is_refused() {
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
    refused(
        "process",
        json!({"args": ["a"], "terminal": true, "consoleSize": {"width": 65_536}}),
        "process.consoleSize.width",
    );
    refused("root/path", json!("rootfs"), "root.path");
    refused("linux/maskedPaths", json!(["x"]), "linux.maskedPaths[0]");
}

/// What a public suite for shims sends: hardly anything.
#[test]
fn the_barest_specification_of_others_is_accepted() {
    let bare = json!({
        "ociVersion": "1.3.0",
        "root": {"path": "/rootfs"},
        "process": {"args": ["/bin/x"], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0}},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": "mount"}]},
    });
    let checked = check(&bare).unwrap();
    let names = "does not name ipc, network, pid, uts: ";
    assert!(
        checked.notes.len() == 1 && checked.notes[0].to_string().contains(names),
        "{:?}",
        checked.notes
    );
    assert_eq!(plan(&bare).unwrap().process.capabilities.bounding, 0);
    let user = json!({
        "uidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1000, "size": 1}],
        "namespaces": [{"type": "mount"}, {"type": "user"}, {"type": "pid"}, {"type": "network"}],
    });
    let mut spec = bare;
    spec["linux"] = user;
    plan(&spec).unwrap();
}

/// What an engine sends for a container without any wish, zeros and all.
#[test]
fn the_usual_specification_of_an_engine_is_accepted_as_it_is() {
    let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
    let usual = json!({
        "ociVersion": "1.2.0+dev",
        "hostname": "0123456789ab",
        "annotations": {"a": "b"},
        "process": {
            "terminal": true,
            "consoleSize": {"height": 0, "width": 0},
            "user": {"uid": 0, "gid": 0, "additionalGids": [0, 10]},
            "args": ["sh"], "env": ["PATH=/bin", "TERM=xterm"], "cwd": "/",
            "capabilities": {"bounding": ["CAP_CHOWN"], "effective": ["CAP_CHOWN"], "permitted": ["CAP_CHOWN"]},
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "oomScoreAdj": 0,
        },
        "root": {"path": "/rootfs"},
        "mounts": [
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", &["ro", "nosuid", "noexec", "nodev", "relatime"]),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/dev/shm", "tmpfs", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            {"destination": "/etc/hosts", "type": "bind", "source": "/v/0", "options": ["rbind", "rprivate"]},
            {"destination": "/data", "type": "none", "source": "/v/1", "options": ["bind", "rro"]},
        ],
        "hooks": {"prestart": []},
        "linux": {
            "cgroupsPath": "system.slice:docker:0123",
            "namespaces": [
                {"type": "mount"}, {"type": "network", "path": ""}, {"type": "uts"}, {"type": "pid"},
                {"type": "ipc"}, {"type": "cgroup"},
            ],
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0", "net.ipv4.ping_group_range": "0 2147483647"},
            "resources": {
                "devices": [
                    {"allow": false, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 1, "minor": 5, "access": "rwm"},
                    {"allow": true, "type": "c", "major": 5, "minor": -1, "access": ""},
                ],
                "memory": {"disableOOMKiller": false, "checkBeforeUpdate": false},
                "cpu": {"shares": 0, "quota": 0, "period": 0, "cpus": "", "mems": ""},
                "blockIO": {"weight": 0, "throttleReadBpsDevice": null, "weightDevice": []},
                "network": {}, "rdma": null, "hugepageLimits": [],
            },
            "rootfsPropagation": "",
            "mountLabel": "",
            "maskedPaths": ["/proc/kcore"],
            "readonlyPaths": ["/proc/sys"],
        },
    });
    assert_eq!(check(&usual).unwrap().notes, []);
    let remarks: Vec<_> = report(&usual, &[])
        .into_iter()
        .filter(Note::is_remark)
        .collect();
    assert_eq!(remarks, []);
    let plan = plan(&usual).unwrap();
    assert_eq!(plan.resources.settings, []);
    assert!(plan.mounts[8].is_read_only() && !plan.mounts[7].is_read_only());
}
