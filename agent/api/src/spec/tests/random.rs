//! Any value in any place.

use proptest::prelude::*;
use serde_json::{Value, json};

use super::{minimal, plan, read};

fn arbitrary_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-2_i64..2_000_000).prop_map(Value::from),
        ".{0,8}".prop_map(Value::from),
        prop::sample::select(WORDS).prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(prop::sample::select(NAMES), inner, 0..4).prop_map(|map| {
                Value::Object(map.into_iter().map(|(k, v)| (k.to_owned(), v)).collect())
            }),
        ]
    })
}

/// Values that mean something somewhere.
const WORDS: &[&str] = &[
    "/",
    "/m",
    "1.2.0",
    "CAP_KILL",
    "RLIMIT_CORE",
    "SCHED_RR",
    "bind",
    "c",
    "cgroup",
    "mount",
    "rbind",
    "ro",
    "rslave",
    "rw",
    "size=1k",
    "time",
    "tmpcopyup",
    "tmpfs",
    "user",
    "/proc/7/ns/pid",
];

/// Members of objects, many of them known somewhere.
const NAMES: &[&str] = &[
    "allow",
    "ambient",
    "args",
    "boottime",
    "bounding",
    "containerID",
    "cpu",
    "cwd",
    "destination",
    "domain",
    "effective",
    "env",
    "hard",
    "hostID",
    "inheritable",
    "kernel.sem",
    "limit",
    "major",
    "memory",
    "minor",
    "monotonic",
    "nanosecs",
    "net.x",
    "options",
    "path",
    "permitted",
    "pids",
    "policy",
    "priority",
    "quota",
    "secs",
    "shares",
    "size",
    "soft",
    "source",
    "swap",
    "type",
    "uid",
    "unified",
    "x",
];

/// Where a value is put.
const PLACES: &[&str] = &[
    "domainname",
    "hooks",
    "hostname",
    "linux",
    "linux/devices",
    "linux/gidMappings",
    "linux/maskedPaths",
    "linux/namespaces",
    "linux/personality",
    "linux/resources",
    "linux/resources/cpu",
    "linux/resources/devices",
    "linux/resources/hugepageLimits",
    "linux/resources/memory",
    "linux/resources/unified",
    "linux/rootfsPropagation",
    "linux/sysctl",
    "linux/timeOffsets",
    "linux/uidMappings",
    "mounts",
    "ociVersion",
    "process",
    "process/additionalGids",
    "process/args",
    "process/capabilities",
    "process/consoleSize",
    "process/cwd",
    "process/env",
    "process/ioPriority",
    "process/oomScoreAdj",
    "process/rlimits",
    "process/scheduler",
    "process/user",
    "root",
    "root/path",
    "root/readonly",
    "vm",
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_value_in_any_place_panics_and_both_readers_agree(
        values in prop::collection::vec((prop::sample::select(PLACES), arbitrary_json()), 1..4)
    ) {
        let mut spec = minimal();
        for (place, value) in values {
            let mut at = &mut spec;
            for part in place.split('/') {
                if !at.is_object() {
                    *at = json!({});
                }
                at = &mut at[part];
            }
            *at = value;
        }
        let _ = plan(&spec);
    }

    #[test]
    fn no_text_panics(text in ".{0,64}", bytes: Vec<u8>) {
        let _ = read(text.as_bytes());
        let _ = read(&bytes);
    }
}
