//! `bench-syscalls`: the system calls that the VMM's threads make once a pod runs, held
//! against those that their filters allow: what a filter allows and nothing needs is a
//! door that is open for nothing. Runs in the lab host.
//!
//! A pod does all that a pod does: every operation on files, on its root and on a volume,
//! an exec, streams, signals, its end. Calls are counted by the kernel's own histogram
//! from the moment the container's program runs; what threads do before that, or only
//! when memory is short or something fails, is not seen here. Fails if a call was made
//! that is not allowed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{BufRead, BufReader, Write},
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::output;
use bulkhead_vmm::jail::{posture, threads::ThreadKind};
use libseccomp::ScmpSyscall;

/// Every operation that a file system has, in Python.
const FILES: &str = include_str!("../syscalls/files.py");

/// The image, as a layout.
const LAYOUT: &str = "/usr/share/lab/images/debian";

/// The event of all system calls, and how it is counted.
const EVENT: &str = "/sys/kernel/tracing/events/raw_syscalls/sys_enter";
const HISTOGRAM: &str = "hist:keys=common_pid,id:size=16384";

fn main() -> Result<()> {
    let volume = tempfile::tempdir()?;
    fs::write(volume.path().join("files.py"), FILES)?;
    let mount = format!("{}:/data", volume.path().display());
    let script =
        "echo up; read line; python3 /data/files.py /work /data/work && echo ready; read line";
    let mut pod = Command::new("bulkhead")
        .args([
            "run", "-i", "--rm", "--name", "counted", "-v", &mount, LAYOUT, "--",
        ])
        .args(["sh", "-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("Cannot start bulkhead")?;
    let mut input = pod.stdin.take().context("no input")?;
    let mut lines = BufReader::new(pod.stdout.take().context("no output")?).lines();
    let mut expect = |wanted: &str| -> Result<()> {
        let line = lines.next().context("The pod ended too early")??;
        ensure!(line == wanted, "The pod says {line:?}, not {wanted:?}");
        Ok(())
    };
    expect("up")?;
    let trigger = Path::new(EVENT).join("trigger");
    fs::write(&trigger, HISTOGRAM).context("Cannot count system calls")?;
    writeln!(input, "go")?;
    expect("ready")?;
    let sum = "head -c 1000000 /dev/zero | wc -c";
    output(&["bulkhead", "exec", "counted", "sh", "-c", sum])?;
    let threads = threads()?;
    writeln!(input, "end")?;
    let status = pod.wait()?;
    let counted = fs::read_to_string(Path::new(EVENT).join("hist"))?;
    fs::write(&trigger, format!("!{HISTOGRAM}"))?;
    ensure!(status.success(), "The pod ended with {status}");

    let mut used: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for (pid, number) in counted.lines().filter_map(counted_call) {
        if let Some(kind) = threads.get(&pid) {
            used.entry(label(*kind)).or_default().insert(number);
        }
    }
    let mut forbidden = Vec::new();
    for kind in ThreadKind::ALL {
        let (allowed, none) = (posture::allowed(kind), BTreeSet::new());
        let used = used.get(label(kind)).unwrap_or(&none);
        let seen = allowed.intersection(used).count();
        println!("{}: {} allowed, {seen} used", label(kind), allowed.len());
        println!("  used:   {}", names(used.iter()));
        println!("  unused: {}", names(allowed.difference(used)));
        forbidden.extend(used.difference(&allowed).copied());
    }
    ensure!(
        forbidden.is_empty(),
        "Made and not allowed: {}",
        names(forbidden.iter())
    );
    Ok(())
}

/// The VMM's threads by number, with what they are for.
fn threads() -> Result<BTreeMap<u32, ThreadKind>> {
    let vmm = output(&["pgrep", "-x", "bulkhead-vmm"])?;
    let vmm = vmm.trim();
    ensure!(
        vmm.parse::<u32>().is_ok(),
        "There is not one VMM but {vmm:?}"
    );
    let mut threads = BTreeMap::new();
    for task in fs::read_dir(format!("/proc/{vmm}/task"))? {
        let task = task?;
        let name = fs::read_to_string(task.path().join("comm"))?;
        // KVM's own never leave the kernel.
        if let Some(kind) = ThreadKind::of(name.trim_end()) {
            threads.insert(task.file_name().to_string_lossy().parse()?, kind);
        }
    }
    Ok(threads)
}

/// A line such as `{ common_pid:  447, id:  1 } hitcount:  81`.
fn counted_call(line: &str) -> Option<(u32, i64)> {
    let (pid, rest) = line.strip_prefix("{ common_pid:")?.split_once(", id:")?;
    let (number, _) = rest.split_once('}')?;
    Some((pid.trim().parse().ok()?, number.trim().parse().ok()?))
}

fn label(kind: ThreadKind) -> &'static str {
    match kind {
        ThreadKind::Main => "main",
        ThreadKind::Processor => "processor",
        ThreadKind::Devices => "devices",
        ThreadKind::Disk => "disk",
        ThreadKind::Hotplug => "hotplug",
        ThreadKind::Memory => "memory",
        ThreadKind::Network => "network",
        ThreadKind::Files => "files",
    }
}

fn names<'a>(numbers: impl Iterator<Item = &'a i64>) -> String {
    let name = |number: &i64| {
        let call = i32::try_from(*number).ok().map(ScmpSyscall::from);
        call.and_then(|call| call.get_name().ok())
            .unwrap_or_else(|| number.to_string())
    };
    numbers.map(name).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_the_histogram_tells_thread_and_call() {
        let line = "{ common_pid:        447, id:        202 } hitcount:         81";
        assert_eq!(counted_call(line), Some((447, 202)));
        assert_eq!(counted_call("Totals:"), None);
    }
}
