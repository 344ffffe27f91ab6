//! `bench-boot`: how long a virtual machine takes from the start of its monitor to the
//! agent's greeting, beside QEMU's `microvm` machine with the same kernel, root image,
//! memory and processor count. Runs in the lab host.
//!
//! Ours is booted by the shim's own code: with its jail, its devices and its queues. Both
//! sides stop the clock when the agent's greeting has been read from vsock. Runs are
//! interleaved (ours, QEMU, QEMU, ours, …). Fails when a goal is missed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::fd::{AsRawFd, FromRawFd, OwnedFd},
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::{Goals, KVM_COUNTERS, Running, head, kvm_counters, median, resident, row};
use bulkhead_shim::{
    config::Config,
    guest::Guest,
    names::{GroupId, Namespace},
    share::{Share, enter_private_namespace},
    statedir::StateDir,
    vm::{Boot as BootOf, Pod, Shape, Size, Vm},
};
use nix::sys::{
    socket::{
        AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept, bind, listen, setsockopt,
        socket, sockopt::ReceiveTimeout,
    },
    time::TimeVal,
};

const MEMORY_MIB: u32 = 256;
/// When a guest that has not connected will not.
const DEADLINE: TimeVal = TimeVal::new(60, 0);
const ASSETS: &str = "/usr/share/bulkhead";

/// At most so much of QEMU's time, so many exits that KVM leaves to the monitor, and so
/// many KiB beside the guest's memory.
const GOALS: (f64, f64, f64) = (0.5, 60.0, 4096.0);

/// What one boot cost.
#[derive(Debug)]
struct Boot {
    virtual_ms: f64,
    counters: BTreeMap<&'static str, u64>,
    /// Resident memory of the monitor without the guest's, in KiB.
    overhead_kib: u64,
    /// Resident guest memory in KiB.
    guest_kib: u64,
    /// The monitor's threads at the end.
    threads: Vec<u32>,
}

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(5), |n| n.parse())
        .context("Usage: bench-boot [ROUNDS]")?;
    // While there is one thread.
    enter_private_namespace()?;
    let mut ours = Vec::new();
    let mut qemu = Vec::new();
    // One of each first, so that both find the files in the page cache. Counting
    // events costs time, so that it is done in these.
    let events = [counting_events(boot_ours)?, counting_events(boot_qemu)?];
    for round in 0..rounds {
        if round % 2 == 0 {
            ours.push(boot_ours()?);
            qemu.push(boot_qemu()?);
        } else {
            qemu.push(boot_qemu()?);
            ours.push(boot_ours()?);
        }
        eprintln!("round {} of {rounds}", round + 1);
    }
    println!("boot: start of the monitor to the agent's greeting, {rounds} rounds, medians");
    head("bulkhead-vmm", &["qemu microvm"]);
    let of = |boots: &[Boot], value: &dyn Fn(&Boot) -> f64| median(boots.iter().map(value));
    let line = |name: &str, value: &dyn Fn(&Boot) -> f64| {
        let (a, b) = (of(&ours, value), of(&qemu, value));
        row(name, a, &[b]);
        (a, b)
    };
    let time = line("virtual ms", &|b| b.virtual_ms);
    for name in KVM_COUNTERS {
        line(&format!("kvm {name}"), &|b| count(b.counters[name]));
    }
    for (event, (name, _)) in EVENTS.iter().enumerate() {
        let [a, b] = events.map(|counts| count(counts[event]));
        row(name, a, &[b]);
    }
    let memory = line("monitor RSS KiB", &|b| count(b.overhead_kib));
    line("guest RSS KiB", &|b| count(b.guest_kib));
    for file in [
        "/usr/bin/bulkhead-vmm",
        "/usr/bin/containerd-shim-bulkhead-v2",
        "/usr/bin/bulkhead",
        "/usr/share/bulkhead/vmlinux",
        "/usr/share/bulkhead/guest-root.cpio",
    ] {
        println!("{:<40}{:>12} bytes", file, fs::metadata(file)?.len());
    }
    let mut goals = Goals::default();
    let (ratio, exits, kib) = GOALS;
    goals.at_most("the time beside QEMU's", time.0 / time.1, ratio);
    goals.at_most("exits to user space", count(events[0][USER_EXITS]), exits);
    goals.at_most("KiB beside the guest's memory", memory.0, kib);
    goals.kept()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one boot are far below 2^52"
)]
fn count(n: u64) -> f64 {
    n as f64
}

/// Events of the host's kernel that are counted: system calls, and exits that KVM
/// leaves to the monitor.
const EVENTS: [(&str, &str); 2] = [
    ("system calls", "raw_syscalls/sys_enter"),
    ("exits to user space", "kvm/kvm_userspace_exit"),
];

/// The place of those exits among them.
const USER_EXITS: usize = 1;

/// How often each of [`EVENTS`] happened to the monitor's threads during a boot, by
/// the kernel's own histograms.
fn counting_events(boot: fn() -> Result<Boot>) -> Result<[u64; EVENTS.len()]> {
    const HISTOGRAM: &str = "hist:keys=common_pid";
    let dirs = EVENTS.map(|(_, event)| Path::new("/sys/kernel/tracing/events").join(event));
    let trigger = |dir: &PathBuf, text: &str| {
        let path = dir.join("trigger");
        fs::write(&path, text).with_context(|| format!("Cannot write {}", path.display()))
    };
    for dir in &dirs {
        trigger(dir, HISTOGRAM)?;
    }
    let threads = boot()?.threads;
    let mut counts = [0; EVENTS.len()];
    for (dir, count) in dirs.iter().zip(&mut counts) {
        // Such as `{ common_pid:        447 } hitcount:         81`.
        for line in fs::read_to_string(dir.join("hist"))?.lines() {
            let counted = line
                .strip_prefix("{ common_pid:")
                .and_then(|line| line.split_once("} hitcount:"))
                .and_then(|(pid, hits)| Some((pid.trim().parse().ok()?, hits.trim())));
            if let Some((pid, hits)) = counted
                && threads.contains(&pid)
            {
                *count += hits.parse::<u64>()?;
            }
        }
        trigger(dir, &format!("!{HISTOGRAM}"))?;
    }
    Ok(counts)
}

fn boot_ours() -> Result<Boot> {
    let dir = StateDir::of(&Namespace::new("bench")?, &GroupId::new("boot")?);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let held = dir.take("bench-boot", None)?;
    let share = Share::mount(&dir.share())?;
    let config = Config::default();
    let first = Size {
        vcpus: 1,
        memory_mib: MEMORY_MIB,
    };
    // As on a host with processors enough.
    let host = Size {
        vcpus: 8,
        ..Size::of_this_host()
    };
    let before = kvm_counters()?;
    let start = Instant::now();
    let boot = runtime.block_on(async {
        let vm = Vm::boot(BootOf {
            config: &config,
            dir: &dir,
            shape: Shape::new(first, &config, host, Pod::Single, 0),
            oom_score_adj: 0,
            cgroup: None,
        })
        .await?;
        let boot = measured(start, &before, vm.process().pid.cast_unsigned());
        vm.kill();
        vm.gone().await;
        boot
    });
    drop(share);
    held.remove()?;
    boot
}

fn boot_qemu() -> Result<Boot> {
    // vhost-vsock is the peer's way to the same byte.
    let listener = socket(
        AddressFamily::Vsock,
        SockType::Stream,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    bind(
        listener.as_raw_fd(),
        &VsockAddr::new(libc::VMADDR_CID_ANY, bulkhead_agent_api::AGENT_PORT),
    )?;
    listen(&listener, Backlog::new(1)?)?;
    setsockopt(&listener, ReceiveTimeout, &DEADLINE)?;

    let before = kvm_counters()?;
    let start = Instant::now();
    let monitor = Running::start(
        Command::new("qemu-system-x86_64")
            .args([
                "-M",
                "microvm,accel=kvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=off",
            ])
            .args(["-cpu", "host", "-smp", "1", "-m", &MEMORY_MIB.to_string()])
            .args(["-nodefaults", "-no-user-config", "-nographic", "-no-reboot"])
            .arg("-kernel")
            .arg(asset("vmlinux"))
            .arg("-initrd")
            .arg(asset("guest-root.cpio"))
            .args(["-append", bulkhead_shim::vm::CMDLINE])
            .args(["-device", "vhost-vsock-device,guest-cid=3"]),
    )?;
    let connection = accept(listener.as_raw_fd()).context("The guest of QEMU does not connect")?;
    // SAFETY: accept has just returned the descriptor; nothing else owns it.
    let connection = unsafe { OwnedFd::from_raw_fd(connection) };
    read_greeting(connection)?;
    measured(start, &before, monitor.0.id())
}

fn asset(name: &str) -> PathBuf {
    Path::new(ASSETS).join(name)
}

fn read_greeting(connection: OwnedFd) -> Result<()> {
    let mut greeting = vec![0; bulkhead_agent_api::GREETING.len()];
    File::from(connection).read_exact(&mut greeting)?;
    ensure!(
        greeting == bulkhead_agent_api::GREETING.as_bytes(),
        "The agent greets with {:?}",
        String::from_utf8_lossy(&greeting)
    );
    Ok(())
}

fn measured(start: Instant, before: &BTreeMap<&'static str, u64>, monitor: u32) -> Result<Boot> {
    let virtual_ms = start.elapsed().as_secs_f64() * 1e3;
    let counters = kvm_counters()?
        .into_iter()
        .map(|(name, after)| (name, after.saturating_sub(before[name])))
        .collect();
    let (guest_kib, overhead_kib) = resident(monitor, u64::from(MEMORY_MIB) * 512)?;
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{monitor}/task"))? {
        threads.push(entry?.file_name().to_string_lossy().parse()?);
    }
    Ok(Boot {
        virtual_ms,
        counters,
        overhead_kib,
        guest_kib,
        threads,
    })
}
