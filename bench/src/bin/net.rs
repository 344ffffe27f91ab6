//! `bench-net`: a container's streams and messages to a server in another network
//! namespace, beside runc in the same namespace, and beside QEMU's `microvm` machine whose
//! tap is joined to the same interface as ours, without and with vhost-net. Runs in the lab
//! host; `/lab/inside` is the static program that measures.
//!
//! Also: how much later a container with a network ends than one without. Fails when a
//! goal is missed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{
    collections::BTreeMap,
    fs::File,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::Mutex,
    thread,
};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::{Goals, IMAGE, OURS, RUNC, Taken, head, kvm_counters, median, output, row};
use nix::sched::{CloneFlags, setns};

const INSIDE: &str = "/lab/inside";
const KERNEL: &str = "/usr/share/bulkhead/vmlinux";
const SERVER: &str = "10.9.0.1";
const OWN: &str = "10.9.0.2";
const MAC: &str = "02:00:00:00:00:07";
const PORT: u16 = 7000;

/// The step whose exits are counted.
const MESSAGES: &str = "messages, 1";

/// Exits of all guests for each message of a long exchange, as the server saw them.
static EXITS: Mutex<Vec<f64>> = Mutex::new(Vec::new());

/// Runs commands, a line each.
fn shell(lines: &str) -> Result<String> {
    output(&["sh", "-ec", lines])
}

/// The two namespaces; gone when dropped.
struct Namespaces;

impl Namespaces {
    fn new() -> Result<Namespaces> {
        let namespaces = Namespaces;
        shell(&format!(
            "ip netns add bench-out
            ip netns add bench-in
            ip -n bench-out link set lo up
            ip -n bench-in link set lo up
            ip -n bench-in link add eth0 address {MAC} type veth peer name gw netns bench-out
            ip -n bench-out addr add {SERVER}/24 dev gw
            ip -n bench-out link set gw up
            ip -n bench-in addr add {OWN}/24 dev eth0
            ip -n bench-in link set eth0 up"
        ))?;
        let namespace = File::open("/run/netns/bench-out")?;
        let (ready, listens) = std::sync::mpsc::channel();
        thread::spawn(move || {
            let listener = setns(namespace, CloneFlags::CLONE_NEWNET)
                .map_err(std::io::Error::from)
                .and_then(|()| TcpListener::bind((SERVER, PORT)));
            let listener = match listener {
                Ok(listener) => listener,
                Err(error) => return drop(ready.send(Err(error))),
            };
            let _ = ready.send(Ok(()));
            for stream in listener.incoming().flatten() {
                thread::spawn(move || serve(stream));
            }
        });
        listens.recv()??;
        Ok(namespaces)
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // The lab host ends with the benchmark, if this fails.
        let _ = shell("ip netns del bench-in; ip netns del bench-out");
    }
}

/// What `bench-net-inside` asks for.
fn serve(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut first = [0; 5];
    stream.read_exact(&mut first)?;
    let [letter, number @ ..] = first;
    let number = u32::from_le_bytes(number);
    let mut block = vec![b'x'; 64 << 10];
    match letter {
        b'u' => {
            let mut left = u64::from(number) << 10;
            while left > 0 {
                let count = stream.read(&mut block)?;
                ensure!(count > 0, "the client ended it");
                left = left.saturating_sub(u64::try_from(count)?);
            }
            stream.write_all(&[0])?;
        }
        b'd' => {
            for _ in 0..number / 64 {
                stream.write_all(&block)?;
            }
        }
        _ => {
            let before = kvm_counters()?["exits"];
            for _ in 0..number {
                stream.read_exact(&mut block[..64])?;
                stream.write_all(&block[..64])?;
            }
            if number > 1_000 {
                let exits = kvm_counters()?["exits"].saturating_sub(before);
                let exits = f64::from(u32::try_from(exits)?) / f64::from(number);
                EXITS.lock().expect("no thread panics").push(exits);
            }
        }
    }
    Ok(())
}

fn container(runtime: &str) -> Result<String> {
    let program = format!("type=bind,src={INSIDE},dst=/inside,options=rbind:ro");
    output(&[
        "ctr",
        "run",
        "--rm",
        "--runtime",
        runtime,
        "--with-ns",
        "network:/run/netns/bench-in",
        "--mount",
        &program,
        IMAGE,
        "bench-net",
        "/inside",
        SERVER,
    ])
}

/// QEMU with a tap that is joined as ours is.
fn qemu(vhost: &str) -> Result<String> {
    shell(
        "ip -n bench-in tuntap add dev tap0 mode tap vnet_hdr
        ip -n bench-in link set tap0 up
        for ends in 'eth0 tap0' 'tap0 eth0'; do
            set -- $ends
            ip netns exec bench-in tc qdisc add dev $1 ingress
            ip netns exec bench-in tc filter add dev $1 ingress matchall \
                action mirred egress redirect dev $2
        done",
    )?;
    let folder = tempfile::tempdir()?;
    let initramfs = folder.path().join("initramfs");
    bulkhead_guest::root::build(Path::new(INSIDE), &initramfs)
        .context("Cannot make the initial file system")?;
    let result = output(&[
        "ip",
        "netns",
        "exec",
        "bench-in",
        "qemu-system-x86_64",
        "-M",
        "microvm,accel=kvm,acpi=off,pic=off,pit=off,rtc=off,isa-serial=off",
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
        &initramfs.to_string_lossy(),
        "-append",
        &format!("quiet console=hvc0 panic=-1 reboot=t -- {SERVER} {OWN}"),
        "-netdev",
        &format!("tap,id=net,ifname=tap0,script=no,downscript=no,vhost={vhost}"),
        "-device",
        &format!("virtio-net-device,netdev=net,mac={MAC}"),
        "-chardev",
        "stdio,id=console,signal=off",
        "-device",
        "virtio-serial-device",
        "-device",
        "virtconsole,chardev=console",
    ]);
    shell(
        "ip netns exec bench-in tc qdisc del dev eth0 ingress
        ip -n bench-in link del tap0",
    )?;
    result
}

/// What a run printed: milliseconds, by step.
fn steps(text: &str) -> Result<Vec<(String, f64)>> {
    let mut steps = Vec::new();
    for line in text.lines() {
        ensure!(!line.starts_with("failed"), "{line}");
        if let Some((name, ns)) = line.trim().rsplit_once(' ')
            && let Ok(ns) = ns.parse::<f64>()
        {
            steps.push((name.to_owned(), ns / 1e6));
        }
    }
    ensure!(!steps.is_empty(), "Nothing was measured:\n{text}");
    Ok(steps)
}

/// One of those who are compared.
type Way = (&'static str, fn() -> Result<String>);

const WAYS: [Way; 4] = [
    ("bulkhead", || container(OURS)),
    ("runc", || container(RUNC)),
    ("qemu", || qemu("off")),
    ("qemu vhost", || qemu("on")),
];

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(1), |n| n.parse())
        .context("Usage: bench-net [ROUNDS]")?;
    shell("modprobe vhost_net")?;
    let _namespaces = Namespaces::new()?;
    let mut runs: BTreeMap<&str, Vec<Vec<(String, f64)>>> = BTreeMap::new();
    let mut exits: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    for round in 0..rounds {
        for (name, way) in &WAYS {
            EXITS.lock().expect("no thread panics").clear();
            let steps = way().and_then(|text| steps(&text)).context(*name)?;
            runs.entry(name).or_default().push(steps);
            let counted = std::mem::take(&mut *EXITS.lock().expect("no thread panics"));
            exits.entry(name).or_default().extend(counted);
            eprintln!("{name}: round {} of {rounds}", round + 1);
        }
    }
    let [ours, peers @ ..] = WAYS.map(|(name, _)| name);
    let names: Vec<&str> = runs[ours][0].iter().map(|(name, _)| &**name).collect();
    let mut goals = Goals::default();
    println!("net: virtual ms, {rounds} rounds, medians");
    head(ours, &peers);
    for (index, name) in names.iter().enumerate() {
        let of = |who: &str| median(runs[who].iter().map(|steps| steps[index].1));
        row(name, of(ours), &peers.map(of));
        if name.starts_with("stream") {
            let beside = |who| of(ours) / of(who);
            goals.at_most(&format!("{name:?} beside QEMU"), beside("qemu"), 0.667);
            goals.at_most(
                &format!("{name:?} beside vhost-net"),
                beside("qemu vhost"),
                1.0,
            );
        }
    }
    let of = |who: &str| median(exits[who].iter().copied());
    row(&format!("exits, {MESSAGES}"), of(ours), &peers.map(of));
    goals.at_most("exits of a message", of(ours), 4.0);

    let run = |id, options: &[&'static str]| {
        let ctr = ["ctr", "run", "--rm", "--runtime", OURS];
        [&ctr[..], options, &[IMAGE, id, "true"]].concat()
    };
    let (with, without) = ("with a network", "without");
    let network = ["--with-ns", "network:/run/netns/bench-in"];
    let ways = [
        (without, run("bench-without", &[])),
        (with, run("bench-with", &network)),
    ];
    let taken = Taken::measure(&ways, rounds.max(5))?;
    println!("net: a container that does nothing, virtual ms");
    head(with, &[without]);
    row(
        "from its start to its end",
        taken.ms(with),
        &[taken.ms(without)],
    );
    goals.at_most(
        "what a network costs",
        taken.ms(with) - taken.ms(without),
        15.0,
    );
    goals.kept()
}
