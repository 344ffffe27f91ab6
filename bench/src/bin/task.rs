//! `bench-task`: a container behind containerd, from the start of `ctr run` to its end,
//! beside runc and crun, and the memory of one that sleeps. Runs in the lab host.
//!
//! Fails when a goal is missed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::fs;

use anyhow::{Context, Result};
use bulkhead_bench::{Goals, IMAGE, OURS, RUNC, Taken, Task, head, resident, row};

/// At most so much of runc's time.
const TIME: f64 = 0.65;
/// At most so many KiB for a pod's shim, its share of what it shares.
const SHIM: f64 = 4096.0;
/// At most so many KiB of a guest that does nothing.
const GUEST: f64 = 24.0 * 1024.0;
/// A mapping of at least so many KiB is a guest's memory.
const LEAST: u64 = 64 << 10;

/// The processes whose executable has this name.
fn of(program: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for process in fs::read_dir("/proc")?.flatten() {
        let Ok(pid) = process.file_name().to_string_lossy().parse() else {
            continue;
        };
        let exe = fs::read_link(process.path().join("exe"));
        if exe.is_ok_and(|exe| exe.file_name().is_some_and(|name| name == program)) {
            found.push(pid);
        }
    }
    Ok(found)
}

/// KiB of a process's memory, of what it shares its share.
fn share(pid: u32) -> Result<u64> {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let line = rollup.lines().find_map(|line| line.strip_prefix("Pss:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    kib.context("smaps_rollup has no Pss")?
        .parse()
        .context("Pss")
}

/// The sum over all processes of a program, as a figure of the table.
fn sum(program: &str, of_one: impl Fn(u32) -> Result<u64>) -> Result<f64> {
    let sizes = of(program)?.into_iter().map(of_one);
    let kib: u64 = sizes.sum::<Result<u64>>()?;
    Ok(f64::from(u32::try_from(kib)?))
}

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(5), |n| n.parse())
        .context("Usage: bench-task [ROUNDS]")?;
    let run = |runtime: &[&'static str]| {
        let run = ["ctr", "run", "--rm", "--runtime"];
        [&run[..], runtime, &[IMAGE, "bench", "true"]].concat()
    };
    let ways = [
        ("bulkhead", run(&[OURS])),
        ("runc", run(&[RUNC])),
        ("crun", run(&[RUNC, "--runc-binary", "crun"])),
    ];
    let taken = Taken::measure(&ways, rounds)?;
    let (ours, runc, crun) = (taken.ms("bulkhead"), taken.ms("runc"), taken.ms("crun"));
    println!("task: ctr run --rm IMAGE ID true, virtual ms, {rounds} rounds, medians");
    head("bulkhead", &["runc", "crun"]);
    row("whole command", ours, &[runc, crun]);
    row("exits of the guest", taken.exits("bulkhead"), &[]);

    let _ours = Task::start("bench-ours", OURS)?;
    let _runc = Task::start("bench-runc", RUNC)?;
    let shim = sum("containerd-shim-bulkhead-v2", share)?;
    let its = sum("containerd-shim-runc-v2", share)?;
    let guest = sum("bulkhead-vmm", |pid| Ok(resident(pid, LEAST)?.0))?;
    let monitor = sum("bulkhead-vmm", |pid| Ok(resident(pid, LEAST)?.1))?;
    println!("memory of one that sleeps, KiB");
    head("bulkhead", &["runc"]);
    row("shim, its share", shim, &[its]);
    row("guest", guest, &[]);
    row("VMM beside the guest", monitor, &[]);

    let mut goals = Goals::default();
    goals.at_most("the time beside runc's", ours / runc, TIME);
    goals.at_most("the shim's memory in KiB", shim, SHIM);
    goals.at_most("the guest's memory in KiB", guest, GUEST);
    goals.kept()
}
