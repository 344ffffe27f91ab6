//! The process object.

use std::path::Path;

use serde_json::json;

use super::{super::*, *};

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
    refused("process/cwd", json!("/a\0b"), "process.cwd");
    refused(
        "process/cwd",
        json!(format!("/{}", "a".repeat(4_095))),
        "process.cwd",
    );
    accepted("process/cwd", json!("/../.."));
    for absent in [json!(""), Value::Null] {
        assert_eq!(accepted("process/cwd", absent).process.cwd, Path::new("/"));
    }
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
        "process.rlimits[0].soft = 2: ",
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
    accepted(
        "process/capabilities",
        json!({"bounding": vec!["CAP_KILL"; 100_000]}),
    );
    refused(
        "process/capabilities",
        json!({"permitted": ["CAP_KILL"], "effective": ["CAP_KILL", "CAP_CHOWN"]}),
        r#"process.capabilities.effective = "CAP_CHOWN""#,
    );
    refused(
        "process/capabilities",
        json!({"inheritable": ["CAP_BPF"]}),
        r#"process.capabilities.inheritable = "CAP_BPF""#,
    );
}

#[test]
fn unknown_capabilities_are_left_out_with_a_note_b8() {
    for name in [
        "CAP_OF_TOMORROW",
        "cap_chown",
        "CHOWN",
        "ALL",
        "",
        "\u{1b}[1m",
    ] {
        let sets = json!({"bounding": ["CAP_KILL", name]});
        let plan = noted(
            "process/capabilities",
            sets,
            "process.capabilities.bounding",
        );
        assert_eq!(plan.process.capabilities.bounding, 1 << 5);
    }
    let flood = json!({"bounding": vec!["x".repeat(70); 100_000]});
    let spec = with("process/capabilities", flood);
    let notes = check(&spec).unwrap().notes;
    assert!(notes.len() == 1 && notes[0].why.len() < 200, "{notes:?}");
    assert!(notes[0].why.contains("99999 more"), "{notes:?}");
}

#[test]
fn ambient_capabilities_that_the_kernel_would_not_raise_are_left_out() {
    let sets = json!({
        "bounding": ["CAP_KILL", "CAP_CHOWN"],
        "permitted": ["CAP_KILL", "CAP_CHOWN"],
        "inheritable": ["CAP_KILL"],
        "ambient": ["CAP_KILL", "CAP_CHOWN"],
    });
    let plan = noted("process/capabilities", sets, "CAP_CHOWN");
    assert_eq!(plan.process.capabilities.ambient, 1 << 5);
}

#[test]
fn the_last_word_on_a_variable_counts() {
    let env = json!(["PATH=/a", "A=1", "PATH=/b", "B", "A=", "B"]);
    assert_eq!(
        accepted("process/env", env).process.env,
        ["PATH=/b", "A=", "B"]
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
fn scheduling_is_what_the_kernel_takes() {
    let of = |scheduler: Value| {
        accepted("process/scheduler", scheduler)
            .process
            .scheduler
            .unwrap()
    };
    let fifo = of(json!({
        "policy": "SCHED_FIFO",
        "priority": 5,
        "flags": ["SCHED_FLAG_RESET_ON_FORK"],
    }));
    assert_eq!((fifo.policy, fifo.priority, fifo.flags), (1, 5, 1));
    assert_eq!(of(json!({"policy": "SCHED_OTHER", "nice": -20})).nice, -20);
    let deadline = json!({"policy": "SCHED_DEADLINE", "runtime": 1, "deadline": 2, "period": 3});
    assert_eq!(of(deadline).period, 3);
    let bad = |scheduler: Value, name: &str| {
        let expected = format!("process.scheduler.{name}");
        refused("process/scheduler", scheduler, &expected);
    };
    bad(json!({}), "policy");
    bad(json!({"policy": "SCHED_ISO"}), "policy");
    bad(json!({"policy": "SCHED_OTHER", "nice": 20}), "nice");
    bad(json!({"policy": "SCHED_OTHER", "priority": 1}), "priority");
    bad(json!({"policy": "SCHED_RR"}), "priority");
    bad(json!({"policy": "SCHED_RR", "priority": -1}), "priority");
    bad(
        json!({"policy": "SCHED_RR", "priority": 1, "runtime": 1}),
        "runtime",
    );
    bad(
        json!({"policy": "SCHED_IDLE", "flags": ["SCHED_FLAG_UTIL_CLAMP_MIN"]}),
        "flags[0]",
    );
}

#[test]
fn what_an_exec_has_from_its_container_is_not_its_own_to_choose() {
    let inherited = Inherited {
        seccomp: seccomp(&[0; 8], 0).unwrap(),
        personality: Some(8),
    };
    let spec =
        json!({"args": ["sh"], "consoleSize": {"width": 80, "height": 24}, "terminal": true});
    let plan = process(json::from_value("process", spec).unwrap(), &inherited)
        .unwrap()
        .plan;
    assert_eq!(plan.personality, Some(8));
    assert_eq!(plan.seccomp, inherited.seccomp);
    assert_eq!(
        (plan.cwd.as_path(), plan.terminal),
        (Path::new("/"), Some((80, 24)))
    );
    let text = json::from_value::<oci::Process>("process", json!({"args": [1]}))
        .unwrap_err()
        .to_string();
    assert!(text.starts_with("process.args[0] = 1: "), "{text}");
}

#[test]
fn a_user_of_the_container_has_an_id_in_the_guest() {
    let map = |container_id, guest_id, size| plan::IdMap {
        container_id,
        guest_id,
        size,
    };
    assert_eq!(plan::guest_id(&[], 7), Some(7));
    let maps = [map(0, 100_000, 10), map(10, 5, 1)];
    assert_eq!(plan::guest_id(&maps, 9), Some(100_009));
    assert_eq!(plan::guest_id(&maps, 10), Some(5));
    assert_eq!(plan::guest_id(&maps, 11), None);
}
