//! Limits of a container that exists.

use serde_json::{Value, json};

use super::*;

/// Half a processor, 64 MiB.
const NOW: InForce = InForce {
    memory: Some(64 << 20),
    quota: Some(25_000),
    period: 50_000,
};
const NONE: InForce = InForce {
    memory: None,
    quota: None,
    period: 100_000,
};

fn judged(resources: &Value, now: InForce) -> Result<Checked<Update>, Error> {
    let text = serde_json::to_vec(resources).unwrap();
    update(json::from_slice("linux.resources", &text)?, now)
}

#[track_caller]
fn check(resources: &Value, now: InForce, expected: &[(&str, &str)]) {
    let settings = judged(resources, now).unwrap().plan.settings;
    let seen: Vec<_> = settings.iter().map(|s| (&*s.file, &*s.value)).collect();
    assert_eq!(seen, expected, "{resources}");
}

#[test]
fn what_an_update_does_not_name_stays_as_it_is_ta_67() {
    for now in [NOW, NONE] {
        check(&json!({}), now, &[]);
        check(&json!({"pids": {"limit": 7}}), now, &[("pids.max", "7")]);
    }
    // One file of cgroup v2 has both of these.
    check(
        &json!({"cpu": {"quota": 10_000}}),
        NOW,
        &[("cpu.max", "10000 50000")],
    );
    check(
        &json!({"cpu": {"period": 200_000}}),
        NOW,
        &[("cpu.max", "25000 200000")],
    );
    check(
        &json!({"cpu": {"period": 200_000}}),
        NONE,
        &[("cpu.max", "max 200000")],
    );
    check(
        &json!({"cpu": {"quota": -1}}),
        NOW,
        &[("cpu.max", "max 50000")],
    );
    // Swap counts the memory in, whose limit is not named.
    check(
        &json!({"memory": {"swap": 96 << 20}}),
        NOW,
        &[("memory.max", "67108864"), ("memory.swap.max", "33554432")],
    );
    assert!(judged(&json!({"memory": {"swap": 96 << 20}}), NONE).is_err());
}

#[test]
fn swap_is_raised_before_memory_and_lowered_after_it_ta_67() {
    let both = |limit: i64, swap: i64| json!({"memory": {"limit": limit, "swap": swap}});
    check(
        &both(128 << 20, 128 << 20),
        NOW,
        &[("memory.swap.max", "0"), ("memory.max", "134217728")],
    );
    check(
        &both(-1, -1),
        NOW,
        &[("memory.swap.max", "max"), ("memory.max", "max")],
    );
    for limit in [32 << 20, 64 << 20] {
        check(
            &both(limit, limit),
            NOW,
            &[("memory.max", &limit.to_string()), ("memory.swap.max", "0")],
        );
    }
}

#[test]
fn what_grows_is_told_apart_ta_68() {
    let grown = |resources: Value, now| {
        let plan = judged(&resources, now).unwrap().plan;
        (plan.more_memory, plan.more_processors)
    };
    let memory = |limit: i64| json!({"memory": {"limit": limit}});
    assert_eq!(grown(memory(64 << 20), NOW), (None, None));
    assert_eq!(grown(memory(65 << 20), NOW), (Some(65 << 20), None));
    assert_eq!(grown(memory(1 << 20), NONE), (Some(1 << 20), None));
    // No limit is always to be had: it is what the machine has.
    assert_eq!(grown(memory(-1), NOW), (None, None));
    let cpu = |quota: i64, period: u64| json!({"cpu": {"quota": quota, "period": period}});
    assert_eq!(grown(cpu(50_000, 100_000), NOW), (None, None));
    assert_eq!(grown(cpu(51_000, 100_000), NOW), (None, Some(510)));
    assert_eq!(grown(cpu(0, 10_000), NOW), (None, Some(2_500)));
    assert_eq!(grown(cpu(-1, 0), NOW), (None, None));
    assert_eq!(grown(cpu(300_000, 0), NONE), (None, Some(3_000)));
    assert_eq!(grown(json!({"cpu": {"shares": 9}}), NONE), (None, None));
}

#[test]
fn what_an_update_cannot_change_is_said_and_no_error_ta_68() {
    for (resources, field) in [
        (
            json!({"devices": [{"allow": false, "access": "rwm"}]}),
            "devices",
        ),
        (json!({"cpu": {"cpus": "0-127"}}), "cpu.cpus"),
        (json!({"cpu": {"mems": "1"}}), "cpu.mems"),
    ] {
        let judged = judged(&resources, NOW).unwrap();
        assert_eq!(judged.plan.settings, []);
        let [note] = judged.notes.as_slice() else {
            panic!("{:?}", judged.notes);
        };
        assert!(note.field == format!("linux.resources.{field}"), "{note}");
    }
}

#[test]
fn an_update_is_judged_like_a_creation_b11() {
    for (resources, field) in [
        (json!({"memory": {"limit": 5}}), "memory.limit"),
        (json!({"cpu": {"period": 5}}), "cpu.period"),
        (json!({"blockIO": {"weight": 5}}), "blockIO.weight"),
        (json!({"unified": {"cgroup.freeze": "1"}}), "cgroup.freeze"),
        (json!({"pids": {"limit": "many"}}), "pids.limit"),
        (json!([]), "linux.resources"),
        (json!(null), "linux.resources"),
    ] {
        let text = judged(&resources, NOW).unwrap_err().to_string();
        assert!(text.contains(field), "{text}");
    }
}

#[test]
fn a_limit_below_what_is_in_use_is_refused_only_if_asked_for() {
    let wanted = |resources: Value| judged(&resources, NOW).unwrap().plan.not_in_use;
    assert_eq!(wanted(json!({"memory": {"limit": 1 << 20}})), None);
    assert_eq!(
        wanted(json!({"memory": {"limit": 1 << 20, "checkBeforeUpdate": true}})),
        Some(1 << 20)
    );
    assert_eq!(wanted(json!({"memory": {"checkBeforeUpdate": true}})), None);
}
