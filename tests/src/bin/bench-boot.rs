//! `bench-boot`: how long a virtual machine takes from the exec of its monitor to
//! the agent's greeting, beside QEMU's `microvm` machine with the same kernel,
//! root image, memory and processor count. Runs in the lab host.
//!
//! Both sides stop the clock at the same byte: the first one that the agent sends
//! over vsock. Runs are interleaved (ours, QEMU, QEMU, ours, …). The clock is the
//! lab host's; under `-icount` it counts instructions, not seconds.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::{IoSliceMut, Read, Seek, Write},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_vmm::config::{Config, Fd, Share, Vsock};
use nix::{
    cmsg_space,
    fcntl::{FcntlArg, FdFlag, fcntl},
    sys::{
        memfd::{MFdFlags, memfd_create},
        socket::{
            AddressFamily, Backlog, ControlMessageOwned, MsgFlags, SockFlag, SockType, VsockAddr,
            accept, bind, listen, recvmsg, setsockopt, socket, socketpair, sockopt::ReceiveTimeout,
        },
        time::TimeVal,
    },
};

const MEMORY_MIB: u32 = 256;
/// When a guest that has not connected will not.
const DEADLINE: TimeVal = TimeVal::new(60, 0);
const ASSETS: &str = "/usr/share/bulkhead";
/// Counters of KVM in debugfs, summed over all VMs, that say what a boot cost.
const KVM_COUNTERS: [&str; 8] = [
    "exits",
    "io_exits",
    "mmio_exits",
    "halt_exits",
    "irq_window",
    "insn_emulation",
    "pf_taken",
    "tlb_flush",
];

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

#[expect(clippy::print_stdout, reason = "the table is the program's purpose")]
fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(5), |n| n.parse())
        .context("Usage: bench-boot [ROUNDS]")?;
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
    }
    println!("boot: exec of the monitor to the agent's greeting, {rounds} rounds, medians");
    println!(
        "{:<24}{:>14}{:>14}{:>9}",
        "", "bulkhead-vmm", "qemu microvm", "ratio"
    );
    row("virtual ms", &ours, &qemu, |b| b.virtual_ms);
    for name in KVM_COUNTERS {
        row(&format!("kvm {name}"), &ours, &qemu, |b| {
            count(b.counters[name])
        });
    }
    for (event, (name, _)) in EVENTS.iter().enumerate() {
        line(name, events.map(|counts| count(counts[event])));
    }
    row("monitor RSS KiB", &ours, &qemu, |b| count(b.overhead_kib));
    row("guest RSS KiB", &ours, &qemu, |b| count(b.guest_kib));
    for file in [
        "/usr/bin/bulkhead-vmm",
        "/usr/bin/containerd-shim-bulkhead-v2",
        "/usr/bin/bulkhead",
        "/usr/share/bulkhead/vmlinux",
        "/usr/share/bulkhead/guest-root.cpio",
    ] {
        println!("{:<40}{:>12} bytes", file, fs::metadata(file)?.len());
    }
    Ok(())
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of one boot are far below 2^52"
)]
fn count(n: u64) -> f64 {
    n as f64
}

fn row(name: &str, ours: &[Boot], qemu: &[Boot], value: impl Fn(&Boot) -> f64) {
    line(
        name,
        [ours, qemu].map(|boots| median(boots.iter().map(&value))),
    );
}

#[expect(clippy::print_stdout, reason = "the table is the program's purpose")]
fn line(name: &str, [a, b]: [f64; 2]) {
    let ratio = if b == 0.0 {
        "-".to_owned()
    } else {
        format!("{:.2}", a / b)
    };
    println!("{name:<24}{a:>14.1}{b:>14.1}{ratio:>9}");
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Events of the host's kernel that are counted: system calls, and exits that KVM
/// leaves to the monitor.
const EVENTS: [(&str, &str); 2] = [
    ("system calls", "raw_syscalls/sys_enter"),
    ("exits to user space", "kvm/kvm_userspace_exit"),
];

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

/// A started monitor; killed when the measurement is done with it.
struct Monitor(Child);

impl Drop for Monitor {
    fn drop(&mut self) {
        // Both fail only if it has ended by itself.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn boot_ours() -> Result<Boot> {
    let share = tempfile::tempdir()?;
    let kvm = inheritable(
        File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")?
            .into(),
    )?;
    let kernel = inheritable(File::open(asset("vmlinux"))?.into())?;
    let root = inheritable(File::open(asset("guest-root.cpio"))?.into())?;
    let (acceptor, peer) = socketpair(
        AddressFamily::Unix,
        SockType::SeqPacket,
        None,
        SockFlag::SOCK_CLOEXEC,
    )?;
    setsockopt(&acceptor, ReceiveTimeout, &DEADLINE)?;
    let peer = inheritable(peer)?;
    let config = Config {
        kvm: Fd(kvm.as_raw_fd()),
        kernel: Fd(kernel.as_raw_fd()),
        initramfs: Some(Fd(root.as_raw_fd())),
        cmdline: bulkhead_shim::vm::CMDLINE.to_owned(),
        vcpus: 1,
        memory_mib: MEMORY_MIB,
        shares: vec![Share {
            tag: bulkhead_agent_api::SHARE_TAG.to_owned(),
            dir: share.path().to_owned(),
            read_only: false,
            queues: 1,
        }],
        vsock: Some(Vsock {
            guest_cid: bulkhead_agent_api::GUEST_CID,
            listener: None,
            acceptor: Some(Fd(peer.as_raw_fd())),
            ports: vec![bulkhead_agent_api::AGENT_PORT],
        }),
        disks: Vec::new(),
        console: None,
        rng: false,
        jail: None,
        alive: None,
        report: None,
    };
    let mut config_file = File::from(memfd_create("config", MFdFlags::empty())?);
    config_file.write_all(&serde_json::to_vec(&config)?)?;
    config_file.rewind()?;

    let before = kvm_counters()?;
    let start = Instant::now();
    let monitor = Monitor(
        Command::new("bulkhead-vmm")
            .arg("--config-fd")
            .arg(config_file.as_raw_fd().to_string())
            .stdin(Stdio::null())
            .spawn()
            .context("Cannot start bulkhead-vmm")?,
    );
    drop(peer);
    let connection =
        receive_fd(&acceptor).context("bulkhead-vmm does not hand over a connection")?;
    read_greeting(connection)?;
    measured(start, &before, &monitor)
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
    let monitor = Monitor(
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
            .args(["-device", "vhost-vsock-device,guest-cid=3"])
            .stdin(Stdio::null())
            .spawn()
            .context("Cannot start qemu-system-x86_64")?,
    );
    let connection = accept(listener.as_raw_fd()).context("The guest of QEMU does not connect")?;
    // SAFETY: accept has just returned the descriptor; nothing else owns it.
    let connection = unsafe { OwnedFd::from_raw_fd(connection) };
    read_greeting(connection)?;
    measured(start, &before, &monitor)
}

fn asset(name: &str) -> PathBuf {
    Path::new(ASSETS).join(name)
}

fn inheritable(fd: OwnedFd) -> Result<OwnedFd> {
    fcntl(&fd, FcntlArg::F_SETFD(FdFlag::empty()))?;
    Ok(fd)
}

fn receive_fd(socket: &OwnedFd) -> Result<OwnedFd> {
    let mut port = [0; 4];
    let mut space = cmsg_space!(RawFd);
    let mut buffers = [IoSliceMut::new(&mut port)];
    let message = recvmsg::<()>(
        socket.as_raw_fd(),
        &mut buffers,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for part in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = part
            && let [fd] = fds[..]
        {
            // SAFETY: the kernel has just installed the descriptor for us.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    bail!("The monitor ended before the agent had connected")
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

fn measured(
    start: Instant,
    before: &BTreeMap<&'static str, u64>,
    monitor: &Monitor,
) -> Result<Boot> {
    let virtual_ms = start.elapsed().as_secs_f64() * 1e3;
    let counters = kvm_counters()?
        .into_iter()
        .map(|(name, after)| (name, after.saturating_sub(before[name])))
        .collect();
    let (guest_kib, overhead_kib) = resident(monitor.0.id())?;
    let mut threads = Vec::new();
    for entry in fs::read_dir(format!("/proc/{}/task", monitor.0.id()))? {
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

/// KVM's counters over all virtual machines; 0 where this kernel has none.
fn kvm_counters() -> Result<BTreeMap<&'static str, u64>> {
    let dir = Path::new("/sys/kernel/debug/kvm");
    ensure!(dir.is_dir(), "{} is missing: mount debugfs", dir.display());
    KVM_COUNTERS
        .into_iter()
        .map(|name| match fs::read_to_string(dir.join(name)) {
            Ok(text) => Ok((name, text.trim().parse()?)),
            Err(_) => Ok((name, 0)),
        })
        .collect()
}

/// Resident KiB of a process: (guest memory, everything else). Guest memory is
/// every mapping of at least half the guest's size.
fn resident(pid: u32) -> Result<(u64, u64)> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let (mut guest, mut rest, mut size) = (0, 0, 0);
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(value)) = (words.next(), words.next()) else {
            continue;
        };
        match key {
            "Size:" => size = value.parse::<u64>()?,
            "Rss:" if size >= u64::from(MEMORY_MIB) * 512 => guest += value.parse::<u64>()?,
            "Rss:" => rest += value.parse::<u64>()?,
            _ => {}
        }
    }
    Ok((guest, rest))
}
