use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use bulkhead_agent_api::spec::Fate;

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
        "linux": {"namespaces": [
            {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}, {"type": "network"},
        ]},
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

fn run(spec: Value) -> Result<Prepared, Error> {
    prepare(
        &id(),
        spec,
        Terminal::No,
        bulkhead_agent_api::SHARE_DIR,
        |path| match path.to_str() {
            Some("/host/shm") => Kind::Tmpfs(65_536),
            Some("/host/socket") => Kind::Socket,
            _ => Kind::Other,
        },
    )
}

/// What the guest gets.
fn guest(prepared: &Prepared) -> Value {
    serde_json::from_slice(&prepared.guest).unwrap()
}

/// The agent's side of it.
fn agent(prepared: &Prepared) -> Result<plan::ContainerPlan, Error> {
    let filter =
        bulkhead_agent_api::spec::seccomp(&prepared.filter.program, prepared.filter.flags)?;
    let spec = json::from_slice("", &prepared.guest)?;
    Ok(bulkhead_agent_api::spec::container(spec, filter)?.plan)
}

/// What is not done as it says.
fn remarks(fields: &[Note]) -> Vec<String> {
    let remarks = fields.iter().filter(|note| note.is_remark());
    remarks.map(ToString::to_string).collect()
}

/// The refusal names the field.
fn refused(pointer: &str, value: Value, field: &str) {
    let shown = value.to_string();
    let text = run(with(pointer, value))
        .map(drop)
        .expect_err(&format!("{pointer} = {shown:.60}"))
        .to_string();
    assert!(text.starts_with(&format!("{field} = ")), "{text}");
    assert!(text.len() < 400, "{text}");
}

#[test]
fn a_plain_specification_passes() {
    let prepared = run(base()).unwrap();
    assert_eq!(prepared.root, Path::new("rootfs"));
    let guest = guest(&prepared);
    assert_eq!(guest["root"]["path"], "/run/bulkhead/share/c1/rootfs");
    assert_eq!(guest["process"]["terminal"], false);
    assert_eq!(remarks(&prepared.fields), Vec::<String>::new());
    assert_eq!(agent(&prepared).unwrap().process.args, ["/bin/sh"]);
}

#[test]
fn what_the_agent_would_refuse_is_refused_before_there_is_a_virtual_machine() {
    let mount = |value: Value| json!([value]);
    for (pointer, value, field) in [
        ("ociVersion", json!("99.0.0"), "ociVersion"),
        ("process.args", json!([]), "process.args"),
        ("process.cwd", json!("tmp"), "process.cwd"),
        ("process.user.uid", json!(u32::MAX), "process.user.uid"),
        ("process.user.umask", json!(0o7777), "process.user.umask"),
        (
            "process.scheduler",
            json!({"policy": "X"}),
            "process.scheduler.policy",
        ),
        ("hostname", json!("a b"), "hostname"),
        (
            "hooks",
            json!({"prestart": [{"path": "bin/true"}]}),
            "hooks.prestart[0].path",
        ),
        (
            "linux.sysctl",
            json!({"vm.swappiness": "1"}),
            "linux.sysctl.vm.swappiness",
        ),
        (
            "linux.personality",
            json!({"domain": "BSD"}),
            "linux.personality.domain",
        ),
        (
            "linux.timeOffsets",
            json!({"monotonic": {}}),
            "linux.timeOffsets",
        ),
        (
            "linux.resources",
            json!({"memory": {"limit": 1}}),
            "linux.resources.memory.limit",
        ),
        (
            "linux.resources",
            json!({"unified": {"cgroup.kill": "1"}}),
            "linux.resources.unified.cgroup.kill",
        ),
        (
            "mounts",
            mount(json!({"destination": "/x", "type": "nfs"})),
            "mounts[0].type",
        ),
        (
            "mounts",
            mount(json!({"destination": "/x", "type": "tmpfs", "options": ["nope"]})),
            "mounts[0].options",
        ),
        (
            "mounts",
            mount(json!({"destination": "/proc/x", "type": "bind", "source": "/y"})),
            "mounts[0].destination",
        ),
        (
            "mounts",
            mount(
                json!({"destination": "/x", "type": "bind", "source": "/y", "options": ["rshared"]}),
            ),
            "mounts[0].options[0]",
        ),
    ] {
        refused(pointer, value, field);
    }
}

#[test]
fn who_leaves_the_network_alone_out_means_the_hosts_which_is_refused_nw_29_nw_30() {
    let of = |kinds: &[&str]| {
        let kinds = kinds.iter().map(|kind| json!({ "type": kind }));
        run(with("linux.namespaces", kinds.collect()))
    };
    // As Docker, `ctr run --net-host` and pods with the host's network have it.
    for kinds in [
        &["mount", "pid", "ipc", "uts"][..],
        &["mount", "pid", "ipc"],
    ] {
        let text = of(kinds).unwrap_err().to_string();
        assert!(
            text.contains("linux.namespaces") && text.contains("choose another"),
            "{text}"
        );
    }
    for kinds in [
        &["mount"][..],
        &["mount", "pid"],
        &["mount", "pid", "ipc", "network"],
    ] {
        of(kinds).unwrap();
    }
}

#[test]
fn namespaces_of_the_host_are_refused_except_the_network_b6_cl_07() {
    for kind in ["pid", "ipc", "uts", "user", "cgroup", "mount", "time"] {
        let spec = json!([{"type": kind, "path": "/proc/7/ns/pid"}]);
        refused("linux.namespaces", spec, "linux.namespaces[0].path");
    }
    let spec = json!([{"type": "network", "path": "/run/netns/a"}, {"type": "ipc"}]);
    let prepared = run(with("linux.namespaces", spec)).unwrap();
    assert!(!prepared.guest.windows(5).any(|part| part == b"netns"));
}

#[test]
fn the_filter_is_compiled_and_its_profile_stays_here_b9() {
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": [
        {"names": ["read"], "action": "SCMP_ACT_ALLOW"},
    ]});
    let prepared = run(with("linux.seccomp", profile)).unwrap();
    assert!(!prepared.filter.program.is_empty());
    assert_eq!(guest(&prepared)["linux"]["seccomp"], Value::Null);
    assert!(agent(&prepared).unwrap().process.seccomp.is_some());
    // More instructions than the kernel takes, found out here.
    let rules: Vec<Value> = (0..6_000_u32)
        .map(|n| {
            json!({"names": ["ioctl"], "action": "SCMP_ACT_ALLOW",
            "args": [{"index": 1, "value": n, "op": "SCMP_CMP_EQ"}]})
        })
        .collect();
    let profile = json!({"defaultAction": "SCMP_ACT_ERRNO", "syscalls": rules});
    refused("linux.seccomp", profile, "linux.seccomp");
}

#[test]
fn limits_decide_the_size_of_the_virtual_machine_b11() {
    let limits = |resources: Value| run(with("linux.resources", resources)).unwrap().limits;
    let given =
        json!({"memory": {"limit": 67_108_864}, "cpu": {"quota": 150_000, "period": 100_000}});
    let given = limits(given);
    assert_eq!(given.thousandths(), Some(1_500));
    assert_eq!(given.memory, Some(67_108_864));
    for none in [
        json!({"memory": {"limit": -1}}),
        json!({"cpu": {"quota": -1}}),
        json!({"cpu": {"quota": 0, "period": 5_000}}),
        json!({}),
    ] {
        let limits = limits(none);
        assert_eq!((limits.thousandths(), limits.memory), (None, None));
    }
    assert_eq!(
        limits(json!({"cpu": {"quota": 1_001}})).thousandths(),
        Some(11),
        "rounded up"
    );
}

#[test]
fn an_update_changes_the_limits_that_it_names_ta_67() {
    let before = Limits {
        quota: Some(200_000),
        period: 0,
        memory: Some(1 << 30),
    };
    let updated = |resources: Value| before.updated(resources.to_string().as_bytes());
    assert_eq!(updated(json!({})), before);
    let other = updated(json!({"memory": {"limit": 5}}));
    assert_eq!((other.memory, other.quota), (Some(5), before.quota));
    assert_eq!(updated(json!({"memory": {"limit": -1}})).memory, None);
    let other = updated(json!({"cpu": {"period": 50_000}}));
    assert_eq!(other.thousandths(), Some(4_000));
    assert_eq!(updated(json!({"cpu": {"quota": -1}})).quota, None);
    assert_eq!(updated(json!({"memory": {"limit": "5"}})), before);
    assert_eq!(before.updated(b"nonsense"), before);
}

#[test]
fn what_is_too_long_for_a_message_is_refused_b3() {
    let args = |bytes: usize| json!(["a", "x".repeat(bytes)]);
    run(with("process.args", args(4_000_000))).unwrap();
    refused("process.args", args(4_300_000), "config.json");
    let process = json!({"args": args(4_300_000)});
    let text = prepare_process(process, Terminal::No)
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("process = "), "{text}");
}

#[test]
fn an_exec_is_judged_as_a_first_process_is() {
    let process = json!({
        "args": ["sh"],
        "terminal": false,
        "consoleSize": {"width": 80, "height": 24},
        "apparmorProfile": "x",
    });
    let prepared = prepare_process(process, Terminal::Yes).unwrap();
    assert_eq!(prepared.console, (80, 24));
    assert_eq!(prepared.guest["terminal"], true);
    assert!(prepared.guest.get("apparmorProfile").is_none());
    let remarks = remarks(&prepared.fields);
    assert_eq!(
        remarks,
        ["process.apparmorProfile is ignored: it belongs to the host's kernel"]
    );
    let text = strictly(&prepared.fields).unwrap_err().to_string();
    assert!(text.starts_with("process.apparmorProfile = "), "{text}");
    let bytes = serde_json::to_vec(&prepared.guest).unwrap();
    let again: oci::Process = json::from_slice("process", &bytes).unwrap();
    bulkhead_agent_api::spec::process(again, &Inherited::default()).unwrap();
    for (process, field) in [
        (json!({"args": []}), "process.args = "),
        (json!({"args": ["a"], "cwd": "b"}), "process.cwd = "),
        (json!(7), "process = 7: "),
    ] {
        let text = prepare_process(process, Terminal::No)
            .unwrap_err()
            .to_string();
        assert!(text.starts_with(field), "{text}");
    }
}

#[test]
fn the_root_needs_a_path_b14() {
    refused("root", json!(null), "root");
    refused("root", json!({}), "root.path");
    refused("root.path", json!("a\0"), "root.path");
    let source = json!([{"destination": "/x", "type": "bind"}]);
    refused("mounts", source, "mounts[0].source");
}

#[test]
fn sockets_become_mounts_of_the_guests_own_and_keep_their_order_ss_21_fs_31() {
    let mounts = json!([
        {"destination": "/run", "type": "tmpfs", "source": "tmpfs"},
        {"destination": "/run/a.sock", "type": "uds", "source": "/not/there/yet"},
        {"destination": "/data", "type": "bind", "source": "/srv/data"},
        {"destination": "b.sock", "type": "bind", "source": "/host/socket", "options": ["rbind", "ro"]},
    ]);
    let prepared = run(with("mounts", mounts)).unwrap();
    let socket = |source: &str, destination: &str, may_be_absent| Socket {
        source: source.into(),
        destination: destination.into(),
        may_be_absent,
    };
    assert_eq!(
        prepared.sockets,
        [
            socket("/not/there/yet", "/run/a.sock", true),
            socket("/host/socket", "/b.sock", false)
        ]
    );
    assert_eq!(prepared.volumes.len(), 1);
    let text = String::from_utf8(prepared.guest.clone()).unwrap();
    assert!(
        !text.contains("/host") && !text.contains("/not/there"),
        "{text}"
    );
    let plan = agent(&prepared).unwrap();
    let sources = plan.mounts.iter().map(|mount| match &mount.kind {
        plan::MountKind::Bind { source, .. } => source.to_str().unwrap(),
        _ => "",
    });
    let expected = [
        "",
        "/run/bulkhead/sockets/c1/0",
        "/run/bulkhead/share/c1/volumes/0",
        "/run/bulkhead/sockets/c1/1",
    ];
    assert!(sources.eq(expected), "{text}");
    assert!(plan.mounts[3].is_read_only());
    let remarks = remarks(&prepared.fields);
    assert_eq!(
        remarks,
        ["mounts[3]: a socket: each connection is carried on to it on the host"]
    );
}

#[test]
fn sockets_that_cannot_be_are_refused_ss_21() {
    let uds = |options: Value| json!([{"destination": "/s", "type": "uds", "source": "/host/socket", "options": options}]);
    refused("mounts", uds(json!(["bind"])), "mounts[0].options");
    let at =
        |destination: &str| json!([{"destination": destination, "type": "uds", "source": "/s"}]);
    refused("mounts", at("/proc/1/x"), "mounts[0].destination");
    refused("mounts", at("/"), "mounts[0].destination");
    let mapped = json!([{"destination": "/s", "type": "bind", "source": "/host/socket",
        "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}],
        "gidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]}]);
    refused("mounts", mapped, "mounts[0].source");
    let many: Vec<_> = (0..65).map(|_| uds(json!([]))[0].clone()).collect();
    run(with("mounts", json!(many[..64]))).unwrap();
    refused("mounts", json!(many), "mounts[64].source");
}

#[test]
fn bind_mounts_become_volumes_of_the_share_fs_17_fs_27() {
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
        ids: None,
    };
    assert_eq!(
        prepared.volumes,
        [
            volume("/srv/data", "/data", true, true),
            volume("/var/lib/x/hosts", "/etc/hosts", false, false)
        ]
    );
    let guest = &guest(&prepared)["mounts"];
    assert_eq!(guest[0]["type"], "proc");
    assert_eq!(guest[1]["source"], "/run/bulkhead/share/c1/volumes/0");
    assert_eq!(guest[2]["source"], "/run/bulkhead/share/c1/volumes/1");
    assert_eq!(guest[3]["type"], "tmpfs");
    assert_eq!(guest[3]["options"][4], "size=65536");
}

#[test]
fn what_belongs_to_a_kernel_is_the_guests_own_fs_31() {
    let bind =
        |source: &str| json!([{"destination": "/x", "source": source, "options": ["bind", "ro"]}]);
    for source in [
        "/proc",
        "/sys/fs/cgroup",
        "/dev",
        "/dev/fuse",
        "/proc/sys/net",
    ] {
        let prepared = run(with("mounts", bind(source))).unwrap();
        assert_eq!(prepared.volumes, [], "{source}");
        assert_eq!(guest(&prepared)["mounts"][0]["source"], source);
        let told = remarks(&prepared.fields);
        assert_eq!(
            told,
            ["mounts[0].source: that of the guest: it belongs to the kernel of the host"]
        );
    }
    // These are the host's: files under such a name, and its devices, which are refused
    // when they are looked at.
    for source in [
        "/process",
        "/proc/1/root/etc",
        "/proc/self/fd/7",
        "/proc/../etc",
        "/dev/sda",
        "/dev/dir/x",
        "/srv/proc",
        "/",
    ] {
        let prepared = run(with("mounts", bind(source))).unwrap();
        assert_eq!(prepared.volumes.len(), 1, "{source}");
    }
}

#[test]
fn the_guest_sees_no_path_of_the_host_b38() {
    let mut spec = with(
        "annotations",
        json!({"nerdctl/state-dir": "/host-secret/a"}),
    );
    spec["linux"]["cgroupsPath"] = json!("/host-secret/b");
    spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/host-secret/c"}]);
    let hooks = [
        ("prestart", "f"),
        ("createContainer", "g"),
        ("poststop", "h"),
    ];
    for (kind, name) in hooks {
        spec["hooks"][kind] = json!([{"path": format!("/host-secret/{name}")}]);
    }
    spec["mounts"] = json!([{"destination": "/d", "type": "bind", "source": "/host-secret/d"}]);
    spec["root"]["path"] = json!("/host-secret/e");
    let guest = String::from_utf8(run(spec).unwrap().guest).unwrap();
    assert!(!guest.contains("host-secret"), "{guest}");
}

#[test]
fn what_stays_on_the_host_is_taken_out_and_kept_oc_09() {
    let mut spec = with("annotations", json!({"a": "b"}));
    spec["hooks"] = json!({"poststop": [{"path": "/h"}], "startContainer": [{"path": "/g"}]});
    spec["linux"]["namespaces"] = json!([{"type": "network", "path": "/run/netns/a"}]);
    let prepared = run(spec).unwrap();
    assert_eq!(prepared.annotations["a"], "b");
    assert_eq!(prepared.network.as_deref(), Some(Path::new("/run/netns/a")));
    assert_eq!(prepared.hooks.poststop[0].path, Path::new("/h"));
    let guest = guest(&prepared);
    assert_eq!(
        guest["hooks"],
        json!({"startContainer": [{"path": "/g", "args": [], "env": [], "timeout": null}]})
    );
    assert_eq!(agent(&prepared).unwrap().hooks.start_container.len(), 1);
}

#[test]
fn a_map_of_ids_is_the_hosts_affair_fs_30() {
    let map = json!([{"containerID": 0, "hostID": 1000, "size": 9}]);
    let mut spec = with(
        "mounts",
        json!([
            {"destination": "/a", "type": "bind", "source": "/s", "options": ["rbind", "ridmap"]},
            {"destination": "/b", "type": "bind", "source": "/s", "uidMappings": map, "gidMappings": map},
            {"destination": "/c", "type": "bind", "source": "/s"},
        ]),
    );
    spec["linux"]["namespaces"] = json!([{"type": "user"}]);
    spec["linux"]["uidMappings"] = json!([{"containerID": 0, "hostID": 7, "size": 9}]);
    spec["linux"]["gidMappings"] = spec["linux"]["uidMappings"].clone();
    let prepared = run(spec).unwrap();
    let ids: Vec<_> = prepared
        .volumes
        .iter()
        .map(|volume| {
            volume
                .ids
                .as_ref()
                .map(|ids| (ids.uids[0].guest_id, ids.recursive))
        })
        .collect();
    assert_eq!(ids, [Some((7, true)), Some((1000, false)), None]);
    agent(&prepared).unwrap();
    refused(
        "mounts",
        json!([{"destination": "/a", "type": "bind", "source": "/s", "options": ["idmap"]}]),
        "mounts[0].options",
    );
}

#[test]
fn a_specification_that_is_not_run_can_be_explained() {
    let mut spec = with("process.selinuxLabel", json!("u:r:t:s0"));
    let fate = |spec: &Value, field: &str| {
        let fields = explain(spec);
        fields
            .iter()
            .find(|note| note.field == field)
            .map(|note| (note.fate, note.security))
    };
    assert_eq!(
        fate(&spec, "process.selinuxLabel"),
        Some((Fate::Ignored, true))
    );
    assert_eq!(fate(&spec, "process.args"), Some((Fate::Guest, false)));
    spec["process"]["cwd"] = json!("relative");
    assert_eq!(fate(&spec, "process.cwd"), Some((Fate::Refused, false)));
    assert_eq!(fate(&spec, "process.args"), Some((Fate::Guest, false)));
    assert_eq!(fate(&json!(7), "config.json"), Some((Fate::Refused, false)));
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
    fn no_value_in_any_known_place_panics_and_the_agent_takes_what_passes(value in arbitrary_json(), place in 0_usize..26) {
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
        if let Ok(prepared) = run(spec) {
            agent(&prepared).unwrap();
        }
    }
}
