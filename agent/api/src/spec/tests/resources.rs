//! Limits, sysctls and devices.

use serde_json::{Value, json};

use super::{super::plan::Absent, *};

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
        json!({"memory": {"limit": 1 << 20, "swap": 1 << 20, "reservation": -1}}),
        &[
            ("memory.max", "1048576"),
            ("memory.swap.max", "0"),
            ("memory.low", "max"),
        ],
    );
    check(
        json!({"memory": {"limit": -1, "swap": -1}}),
        &[("memory.max", "max"), ("memory.swap.max", "max")],
    );
    check(
        json!({"memory": {"limit": -1}}),
        &[("memory.max", "max"), ("memory.swap.max", "max")],
    );
    check(
        json!({"memory": {"limit": 0, "swap": 0, "swappiness": 60}}),
        &[],
    );
    check(
        json!({"cpu": {"shares": 1024, "quota": 50_000, "period": 100_000, "burst": 7}}),
        &[
            ("cpu.weight", "100"),
            ("cpu.max", "50000 100000"),
            ("cpu.max.burst", "7"),
        ],
    );
    check(
        json!({"cpu": {"shares": 2, "quota": -1}}),
        &[("cpu.weight", "1"), ("cpu.max", "max 100000")],
    );
    check(
        json!({"cpu": {"shares": u64::MAX, "mems": "", "idle": 1}}),
        &[("cpu.weight", "10000"), ("cpu.idle", "1")],
    );
    // The curve of current runtimes: the default is the default.
    for (shares, weight) in [
        (0, None),
        (1, Some("1")),
        (3, Some("2")),
        (512, Some("59")),
        (1_024, Some("100")),
        (2_048, Some("174")),
        (262_143, Some("10000")),
    ] {
        let plan = accepted("linux/resources", json!({"cpu": {"shares": shares}}));
        let seen = plan
            .resources
            .settings
            .first()
            .map(|setting| setting.value.as_str());
        assert_eq!(seen, weight, "{shares}");
    }
    check(json!({"pids": {"limit": 5}}), &[("pids.max", "5")]);
    check(json!({"pids": {"limit": -1}}), &[("pids.max", "max")]);
    check(json!({"pids": {"limit": 0}}), &[("pids.max", "1")]);
    check(json!({"pids": {}}), &[]);
    check(json!({"pids": null}), &[]);
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
    check(
        json!({"unified": {"io.max": "8:0 rbps=1\n8:16 wbps=2\n"}}),
        &[("io.max", "8:0 rbps=1"), ("io.max", "8:16 wbps=2")],
    );
    check(
        json!({"unified": {"hugetlb.1GB.rsvd.max": "0"}}),
        &[("hugetlb.1GB.rsvd.max", "0")],
    );
    for (limit, absent) in [(0, Absent::Kept), (1 << 21, Absent::Refused)] {
        let pages = json!({"hugepageLimits": [{"pageSize": "2MB", "limit": limit}]});
        let value = limit.to_string();
        check(
            pages.clone(),
            &[
                ("hugetlb.2MB.max", &value),
                ("hugetlb.2MB.rsvd.max", &value),
            ],
        );
        let settings = accepted("linux/resources", pages).resources.settings;
        assert_eq!(
            (settings[0].absent, settings[1].absent),
            (absent, Absent::Kept)
        );
    }

    let bad = |resources: Value, expected: &str| refused("linux/resources", resources, expected);
    for limit in [1, (1 << 20) - 1, -2] {
        bad(
            json!({"memory": {"limit": limit}}),
            "linux.resources.memory.limit",
        );
    }
    bad(json!({"memory": {"swap": 5}}), "memory.swap");
    bad(
        json!({"memory": {"limit": 1 << 21, "swap": 1 << 20}}),
        "memory.swap",
    );
    bad(json!({"cpu": {"quota": 1}}), "linux.resources.cpu.quota");
    bad(json!({"cpu": {"period": 10}}), "linux.resources.cpu.period");
    bad(
        json!({"cpu": {"period": 1_000_001}}),
        "linux.resources.cpu.period",
    );
    bad(
        json!({"cpu": {"quota": 1_000, "burst": 1_001}}),
        "cpu.burst",
    );
    bad(json!({"cpu": {"idle": 2}}), "cpu.idle");
    bad(json!({"blockIO": {"weight": 1001}}), "blockIO.weight");
    for file in [
        "../x.y",
        "memory/../cgroup.kill",
        "memory",
        "memory.",
        "hugetlb.2MB/..max",
        "cgroup.kill",
    ] {
        let expected = format!("linux.resources.unified.{file} = ");
        bad(json!({"unified": {file: "1"}}), &expected);
    }
    for file in ["memory.limit_in_bytes", "nope.max", "hugetlb.2MB.x"] {
        let told = format!("linux.resources.unified.{file} is ignored");
        let plan = noted("linux/resources", json!({"unified": {file: "1"}}), &told);
        assert_eq!(plan.resources.settings, []);
    }
    bad(
        json!({"hugepageLimits": [{"pageSize": "../B", "limit": 0}]}),
        "pageSize",
    );
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
fn limits_of_what_the_guest_does_not_have_are_left_out_with_a_note_b11() {
    for resources in [
        json!({"memory": {"disableOOMKiller": true}}),
        json!({"cpu": {"realtimeRuntime": 5}}),
        json!({"cpu": {"cpus": "0-99999"}}),
        json!({"blockIO": {"throttleReadBpsDevice": [{}]}}),
        json!({"network": {"classID": 1}}),
        json!({"rdma": {"mlx": {}}}),
    ] {
        let (group, limit) = resources.as_object().unwrap().iter().next().unwrap();
        let name = limit.as_object().unwrap().keys().next().unwrap();
        let expected = match group.as_str() {
            "rdma" => "linux.resources.rdma is ignored".to_owned(),
            group => format!("linux.resources.{group}.{name} is ignored"),
        };
        let plan = noted("linux/resources", resources, &expected);
        assert_eq!(plan.resources.settings, []);
    }
}

#[test]
fn a_sysctl_is_a_name_and_no_path_b12() {
    let plan = accepted(
        "linux/sysctl",
        json!({
            "kernel.shm_rmid_forced": "1",
            "net.core.somaxconn": "5",
            "net.ipv4.conf.eth0/100.forwarding": "1",
            "net/ipv4/conf/eth0.100/mtu": "1",
        }),
    );
    let paths: Vec<_> = plan
        .sysctls
        .iter()
        .map(|(path, _)| path.to_str().unwrap())
        .collect();
    assert_eq!(
        paths,
        [
            "kernel/shm_rmid_forced",
            "net/core/somaxconn",
            "net/ipv4/conf/eth0.100/forwarding",
            "net/ipv4/conf/eth0.100/mtu",
        ]
    );
    for name in [
        "net..x",
        "net/../x",
        "net/./x",
        "net.ipv4.//",
        "net/ipv4//x",
        "../x",
        ".net",
        "net",
        "net.a b",
        "net.\0",
        "",
    ] {
        refused("linux/sysctl", json!({name: "1"}), "linux.sysctl");
    }
    refused("linux/sysctl", json!({"net.x": "\0"}), "linux.sysctl.net.x");
    let flood: serde_json::Map<String, Value> = (0..10_000)
        .map(|n| (format!("net.x{n}"), json!("1")))
        .collect();
    refused(
        "linux/sysctl",
        Value::Object(flood),
        "linux.sysctl = 10000 entries",
    );
}

#[test]
fn only_sysctls_of_the_containers_namespaces_are_set_b12() {
    for name in [
        "vm.overcommit_memory",
        "kernel.core_pattern",
        "kernel.msg_next_id",
        "kernel/panic",
        "kernel.hostname",
        "fs.file-max",
        "fs.mqueue",
        "network.x",
    ] {
        let expected = format!("linux.sysctl.{name} = ");
        refused("linux/sysctl", json!({name: "1"}), &expected);
    }
    accepted(
        "linux/sysctl",
        json!({"kernel/domainname": "x", "fs.mqueue.msg_max": "1"}),
    );
}

#[test]
fn only_harmless_devices_are_made_b13() {
    let device = |kind: &str, major: i64, minor: i64| json!([{"path": "/dev/x", "type": kind, "major": major, "minor": minor}]);
    accepted("linux/devices", device("c", 1, 3));
    accepted("linux/devices", device("c", 10, 229));
    accepted("linux/devices", device("p", 0, 0));
    accepted("linux/devices", device("b", 8, 0));
    for (kind, major, minor) in [("c", 1, 1), ("u", 8, 0), ("c", -1, 0)] {
        let expected = format!("linux.devices[0] = \"{kind} {major}:{minor}\"");
        refused("linux/devices", device(kind, major, minor), &expected);
    }
    let relative = json!([{"path": "x", "type": "c", "major": 1, "minor": 3}]);
    refused("linux/devices", relative, "linux.devices[0].path");
}
