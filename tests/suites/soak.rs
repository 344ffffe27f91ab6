//! Many containers and many execs: what is left of each is what would add up.
//!
//! Twenty containers at a time, and twenty execs, as often as `BULKHEAD_ROUNDS` says: five
//! times by default.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{env, thread};

use bulkhead_tests::{BUSYBOX_NAME, Command, Outcome, process::resident};

/// How many are in flight.
const AT_ONCE: usize = 20;
/// What the shim may grow by, in KiB, after its first round.
const GROWTH: u64 = 1024;

fn rounds() -> usize {
    let said = env::var("BULKHEAD_ROUNDS").ok();
    said.map_or(5, |said| said.parse().unwrap())
}

fn ctr(words: &[&str]) -> Outcome {
    Command::new("ctr", words).run()
}

/// Does this for each number of a round, all at once.
fn at_once(doing: impl Fn(usize) + Sync) {
    thread::scope(|scope| {
        for number in 0..AT_ONCE {
            let doing = &doing;
            scope.spawn(move || doing(number));
        }
    });
}

#[test]
#[ignore = "it takes a quarter of an hour: cargo xtask test --full runs it"]
fn containers_come_and_go_twenty_at_a_time_and_nothing_is_left() {
    for round in 0..rounds() {
        at_once(|number| {
            let id = format!("soak-{round}-{number}");
            let run = ["run", "--rm", "--runtime", "io.containerd.bulkhead.v2"];
            let out = ctr(&[&run[..], &[BUSYBOX_NAME, &id, "echo", &id]].concat());
            assert_eq!(out.success(), format!("{id}\n"));
        });
    }
}

/// Resident KiB of the one shim.
fn shim() -> u64 {
    let pid = Command::new("pgrep", ["-f", "containerd-shim-bulkhead-v2"]).run();
    resident(pid.success().trim().parse().unwrap())
}

#[test]
#[ignore = "it takes minutes: cargo xtask test --full runs it"]
fn a_shim_does_not_grow_by_execs() {
    let run = ["run", "--detach", "--runtime", "io.containerd.bulkhead.v2"];
    ctr(&[&run[..], &[BUSYBOX_NAME, "soak", "sleep", "100000"]].concat()).success();
    let round = |round: usize| {
        at_once(|number| {
            let id = format!("e-{round}-{number}");
            let exec = ["task", "exec", "--exec-id", &id, "soak"];
            let out = ctr(&[&exec[..], &["echo", &id]].concat());
            assert_eq!(out.success(), format!("{id}\n"));
        });
    };
    round(0);
    let before = shim();
    for number in 1..=rounds() {
        round(number);
    }
    let after = shim();
    eprintln!(
        "{before} KiB, {after} KiB after {} execs",
        rounds() * AT_ONCE
    );
    assert!(after < before + GROWTH, "{before} KiB, then {after} KiB");
    ctr(&["task", "rm", "--force", "soak"]).success();
    ctr(&["container", "rm", "soak"]).success();
}
