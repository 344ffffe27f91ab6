//! `bench-files`: operations on files in a container's own root, beside runc on the
//! host's overlay, and beside virtiofsd in QEMU's `microvm` machine with the same guest
//! kernel. Runs in the lab host; `/lab/inside` is the static program that measures.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::{Running, head, kvm_counters, median, output, row};

const IMAGE: &str = "localhost/lab/busybox:latest";
const INSIDE: &str = "/lab/inside";
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";
const KERNEL: &str = "/usr/share/bulkhead/vmlinux";

/// What each operation took in milliseconds, in order, and all exits of guests.
struct Run {
    steps: Vec<(String, f64)>,
    exits: u64,
}

fn run(what: impl FnOnce() -> Result<String>) -> Result<Run> {
    let before = kvm_counters()?["exits"];
    let text = what()?;
    let exits = kvm_counters()?["exits"].saturating_sub(before);
    let mut steps = Vec::new();
    for line in text.lines() {
        let Some((name, ns)) = line.trim().rsplit_once(' ') else {
            continue;
        };
        ensure!(!name.starts_with("failed"), "{line}");
        if let Ok(ns) = ns.parse::<u32>() {
            steps.push((name.to_owned(), f64::from(ns) / 1e6));
        } else if let Ok(ns) = ns.parse::<u64>() {
            steps.push((name.to_owned(), f64::from(u32::try_from(ns / 1000)?) / 1e3));
        }
    }
    ensure!(!steps.is_empty(), "Nothing was measured:\n{text}");
    Ok(Run { steps, exits })
}

fn container(runtime: &str) -> Result<String> {
    let mount = format!("type=bind,src={INSIDE},dst=/inside,options=rbind:ro");
    let run = [
        "ctr",
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--mount",
        &mount,
    ];
    output(&[&run[..], &[IMAGE, "bench-files", "/inside", "/"]].concat())
}

/// QEMU with virtiofsd on a directory of the lab host's root disk.
fn virtiofsd(cache: &str) -> Result<String> {
    let folder = tempfile::tempdir_in("/root")?;
    let share = folder.path().join("share");
    fs::create_dir(&share)?;
    let socket = folder.path().join("socket");
    let initramfs = folder.path().join("initramfs");
    initramfs_with(Path::new(INSIDE), &initramfs)?;
    let _server = Running::start(
        Command::new(VIRTIOFSD)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(&share)
            .args([
                "--cache",
                cache,
                "--log-level",
                "error",
                "--sandbox",
                "none",
            ]),
    )?;
    while !socket.exists() {
        std::thread::yield_now();
    }
    let place = |path: &Path| path.to_string_lossy().into_owned();
    output(&[
        "qemu-system-x86_64",
        "-M",
        "microvm,accel=kvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=off,memory-backend=mem",
        "-cpu",
        "host",
        "-m",
        "512",
        "-nodefaults",
        "-no-user-config",
        "-nographic",
        "-no-reboot",
        "-kernel",
        KERNEL,
        "-initrd",
        &place(&initramfs),
        "-append",
        "quiet console=hvc0 panic=-1 reboot=t",
        "-object",
        "memory-backend-memfd,id=mem,size=512M,share=on",
        "-chardev",
        &format!("socket,id=fs,path={}", place(&socket)),
        "-device",
        "vhost-user-fs-device,chardev=fs,tag=share",
        "-chardev",
        "stdio,id=console,signal=off",
        "-device",
        "virtio-serial-device",
        "-device",
        "virtconsole,chardev=console",
    ])
}

/// An initial file system whose only program is `/init`.
fn initramfs_with(program: &Path, to: &Path) -> Result<()> {
    let image = bulkhead_guest::root::build(program, to);
    image
        .map(drop)
        .context("Cannot make the initial file system")
}

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(1), |n| n.parse())
        .context("Usage: bench-files [ROUNDS]")?;
    let ways: [(&str, &dyn Fn() -> Result<String>); 4] = [
        ("bulkhead", &|| container("io.containerd.bulkhead.v2")),
        ("runc", &|| container("io.containerd.runc.v2")),
        ("virtiofsd always", &|| virtiofsd("always")),
        ("virtiofsd auto", &|| virtiofsd("auto")),
    ];
    let mut runs: BTreeMap<&str, Vec<Run>> = BTreeMap::new();
    for round in 0..rounds {
        for (name, way) in &ways {
            runs.entry(name)
                .or_default()
                .push(run(*way).context(*name)?);
            eprintln!("{name}: round {} of {rounds}", round + 1);
        }
    }
    println!("files: operations on a container's root, virtual ms, {rounds} rounds, medians");
    let [ours, peers @ ..] = ways.map(|(name, _)| name);
    head(ours, &peers);
    let steps: Vec<String> = runs[ours][0]
        .steps
        .iter()
        .map(|(name, _)| name.clone())
        .collect();
    for (index, step) in steps.iter().enumerate() {
        let of = |name: &str| median(runs[name].iter().map(|run| run.steps[index].1));
        row(step, of(ours), &peers.map(of));
    }
    let exits = |name: &str| {
        let counts = runs[name].iter().map(|run| u32::try_from(run.exits));
        median(counts.map(|count| count.map_or(f64::NAN, f64::from)))
    };
    row("exits of the guest, all", exits(ours), &peers.map(exits));
    Ok(())
}
