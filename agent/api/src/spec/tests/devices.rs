//! Devices: those of privileged containers, and disks of the host.

use super::*;
use crate::spec::{
    devices::{HostDisk, host_disks, renumber},
    plan::{DeviceKind, DeviceRule, NodeKind},
};

fn device(kind: &str, major: i64, minor: i64) -> Value {
    let path = format!("/dev/{kind}-{major}-{minor}");
    json!({"path": path, "type": kind, "major": major, "minor": minor})
}

#[test]
fn a_privileged_container_does_without_the_hosts_devices_b13_fs_37() {
    let devices = [
        device("c", 1, 3),
        device("b", 8, 0),
        device("c", 10, 229),
        device("c", 10, 232),
        device("b", 1, 3),
        device("p", 0, 0),
    ];
    let of = |rules: Value| {
        let mut spec = with("linux/devices", json!(devices));
        spec["linux"]["resources"] = json!({"devices": rules});
        check(&spec)
    };
    let all = json!({"allow": true, "access": "rwm"});
    for rules in [
        json!([all]),
        json!([{"allow": false, "access": "rwm"}, {"allow": true, "type": "a", "major": -1, "access": "rmw"}]),
    ] {
        let checked = of(rules).unwrap();
        let kinds: Vec<_> = checked.plan.devices.iter().map(|node| node.kind).collect();
        let expected = [
            NodeKind::Char(1, 3),
            NodeKind::Char(10, 229),
            NodeKind::Fifo,
        ];
        assert_eq!(kinds, expected);
        let told: Vec<_> = checked.notes.iter().map(ToString::to_string).collect();
        assert_eq!(
            told,
            ["linux.devices: linux.devices[1] and 2 more are left out: they are the host's"]
        );
    }
    for rules in [
        json!([]),
        json!([{"allow": true, "access": "rw"}]),
        json!([{"allow": true, "type": "b", "access": "rwm"}]),
        json!([all, {"allow": false}]),
    ] {
        let error = of(rules).unwrap_err().to_string();
        assert!(
            error.starts_with("linux.devices[3] = \"c 10:232\""),
            "{error}"
        );
    }
}

#[test]
fn a_disk_of_the_host_is_written_only_if_a_rule_says_so_fs_36() {
    let mut spec = with(
        "linux/devices",
        json!([
            device("b", 7, 0),
            device("b", 7, 1),
            device("b", 259, 1_048_575),
            device("b", 7, 0),
        ]),
    );
    spec["linux"]["resources"] = json!({"devices": [
        {"allow": true, "type": "b", "major": 7, "access": "rwm"},
        {"allow": true, "type": "b", "major": 259, "minor": 1_048_575, "access": "rm"},
        {"allow": false, "type": "b", "major": 7, "minor": 1, "access": "w"},
    ]});
    let checked = check(&spec).unwrap();
    let disk = |numbers, read_only| HostDisk { numbers, read_only };
    assert_eq!(
        host_disks(&checked.plan),
        [
            disk((7, 0), false),
            disk((7, 1), true),
            disk((259, 1_048_575), true)
        ]
    );
    let told = checked.notes.iter().map(|note| note.field.as_str());
    let fields = [0, 1, 2, 3].map(|n| format!("linux.devices[{n}]"));
    assert_eq!(told.collect::<Vec<_>>(), fields);
}

#[test]
fn a_disk_has_the_numbers_of_the_guest_in_nodes_and_rules_fs_36() {
    let mut spec = with(
        "linux/devices",
        json!([device("b", 8, 1), device("c", 1, 3)]),
    );
    spec["linux"]["resources"] = json!({"devices": [
        {"allow": false, "access": "rwm"},
        {"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rw"},
        {"allow": true, "type": "b", "major": 254, "minor": 0, "access": "rw"},
        {"allow": false, "major": 8, "access": "w"},
        {"allow": true, "type": "c", "major": 8, "minor": 1, "access": "r"},
        {"allow": true, "type": "b", "major": -1, "minor": 0, "access": "r"},
    ]});
    let plan = check(&spec).unwrap().plan;
    let error = renumber(&mut plan.clone(), &[]).unwrap_err().to_string();
    assert!(error.starts_with("linux.devices[0] = \"b 8:1\""), "{error}");

    let mut plan = plan;
    renumber(&mut plan, &[((8, 1), (254, 16))]).unwrap();
    let kinds: Vec<_> = plan.devices.iter().map(|node| node.kind).collect();
    assert_eq!(kinds, [NodeKind::Block(254, 16), NodeKind::Char(1, 3)]);
    let rules: Vec<_> = plan.resources.devices.iter().map(row).collect();
    let (block, char) = (Some(DeviceKind::Block), Some(DeviceKind::Char));
    let all = DeviceRule::READ | DeviceRule::WRITE | DeviceRule::MKNOD;
    assert_eq!(
        rules,
        [
            (false, None, None, None, all),
            (
                true,
                block,
                Some(254),
                Some(16),
                DeviceRule::READ | DeviceRule::WRITE
            ),
            // The host's 254:0 is not the guest's.
            (false, char, Some(8), None, DeviceRule::WRITE),
            (false, block, Some(254), Some(16), DeviceRule::WRITE),
            (true, char, Some(8), Some(1), DeviceRule::READ),
        ]
    );
}

type Row = (bool, Option<DeviceKind>, Option<u32>, Option<u32>, u32);

fn row(rule: &DeviceRule) -> Row {
    (rule.allow, rule.kind, rule.major, rule.minor, rule.access)
}

#[test]
fn a_number_that_no_device_has_is_refused_b13() {
    for (name, value) in [("major", -1), ("minor", 1_i64 << 40)] {
        let mut bad = device("b", 8, 1);
        bad[name] = json!(value);
        let error = check(&with("linux/devices", json!([bad]))).unwrap_err();
        let error = error.to_string();
        assert!(
            error.starts_with(&format!("linux.devices[0].{name} = {value}")),
            "{error}"
        );
    }
}
