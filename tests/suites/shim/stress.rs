//! Many rounds: a few of them by default, more if `BULKHEAD_ROUNDS` says so.
//!
//! An emulated host moves some megabytes a second: the streams of execs are 16 times
//! smaller than on hardware, and so is what the shim's memory may grow by.

use std::{env, io::Write, thread, time::Duration};

use bulkhead_tests::process::resident;

use crate::{
    output::{pattern, same, within},
    pod::Pod,
    process::{Process, Streams},
    root::{PATTERN, Root, config, forever, process, write_pattern},
};

const SECOND: Duration = Duration::from_secs(1);
/// Smallest and largest length of a round trip, in bytes.
const TRIP: (usize, usize) = (32 << 10, 2 << 20);
/// What the shim's memory may grow by, in KiB.
const GROWTH: u64 = (384 << 10) / 16;
/// Those that are run at once.
const WORKERS: usize = 4;

fn rounds() -> usize {
    let said = env::var("BULKHEAD_ROUNDS").ok();
    said.map_or(5, |said| said.parse().unwrap())
}

#[test]
fn shims_come_and_go_again_and_again_ss_59() {
    for round in 0..rounds() {
        let word = format!("round {round}");
        let pod = Pod::start("stress-lifecycle", Root::new(), &config(&["echo", &word]));
        let init = pod.run(Streams::Output);
        init.says(&word, within(5 * SECOND));
        assert_eq!(init.wait(), 0, "{}", init.words());
        init.delete().unwrap();
        pod.end();
    }
}

/// Numbers that are the same in each run.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> usize {
        // Knuth's constants, of which the upper bits are good.
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005);
        self.0 = self.0.wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap()
    }
}

/// Lets an exec run and gives it this input, waits for its end, and deletes it at once:
/// all of its output must have come, and in time.
fn is_whole(exec: &Process<'_>, input: &[u8], expected: &[u8]) {
    let limit = within(5 * SECOND);
    exec.start().unwrap();
    if !input.is_empty() {
        exec.stdin().write_all(input).unwrap();
        exec.close_stdin();
    }
    assert_eq!(exec.wait(), 0, "{}", exec.words());
    exec.delete().unwrap();
    same(&exec.output(limit), expected);
}

fn echo(pod: &Pod, word: &str) {
    let exec = pod.exec(&process(&["echo", word]), Streams::Output);
    is_whole(&exec, b"", format!("{word}\n").as_bytes());
}

fn write(pod: &Pod) {
    let script = write_pattern(2, 0);
    let exec = pod.exec(&process(&["sh", "-c", &script]), Streams::Output);
    is_whole(&exec, b"", &pattern(2 * PATTERN));
}

fn round_trip(pod: &Pod, length: usize) {
    let bytes = pattern(length);
    let exec = pod.exec(&process(&["cat"]), Streams::All);
    is_whole(&exec, &bytes, &bytes);
}

#[test]
fn four_execs_at_once_lose_nothing_and_the_shim_does_not_grow_ss_60() {
    let pod = Pod::start("stress-exec", Root::with_data(), &config(&forever(&[])));
    pod.run(Streams::Output);
    let shim = pod.shim();
    let before = resident(shim);
    let work = |worker: usize| {
        let mut numbers = Numbers(u64::try_from(worker).unwrap());
        for round in 0..rounds() {
            match (worker + round) % 3 {
                0 => echo(&pod, &format!("worker {worker} round {round}")),
                1 => write(&pod),
                _ => round_trip(&pod, TRIP.0 + numbers.next() % (TRIP.1 - TRIP.0)),
            }
        }
    };
    thread::scope(|scope| {
        for worker in 0..WORKERS {
            scope.spawn(move || work(worker));
        }
    });
    let after = resident(shim);
    assert!(after <= before + GROWTH, "{before} KiB, then {after} KiB");
    pod.end();
}
