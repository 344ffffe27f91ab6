//! `bench-files`: operations on files, in a container's own root and on a volume of the
//! host, beside runc on the same mounts, and beside virtiofsd in QEMU's `microvm` machine
//! with the same guest kernel. Runs in the lab host; `/lab/inside` is the static program
//! that measures.
//!
//! Roots are overlays, volumes are directories of the lab host's ext4; virtiofsd is given
//! the one or the other. Fails when a goal is missed.

#![expect(clippy::print_stdout, reason = "the table is the program's purpose")]

use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use bulkhead_bench::{Goals, Running, head, median, output, row};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

const IMAGE: &str = "localhost/lab/busybox:latest";
const INSIDE: &str = "/lab/inside";
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";
const KERNEL: &str = "/usr/share/bulkhead/vmlinux";

const OURS: &str = "io.containerd.bulkhead.v2";
const RUNC: &str = "io.containerd.runc.v2";

/// Steps that cost a private root no request at all, but for a few about directories.
const WARM: [&str; 4] = [
    "find, warm",
    "ls -lR, warm",
    "stat 1000 files, warm",
    "read 1000 files, warm",
];

/// Where the files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// The root of a container.
    Root,
    /// A volume.
    Volume,
}

/// What one operation cost.
struct Step {
    name: String,
    ms: f64,
    /// Interrupts of the guest's file systems: its requests that were answered.
    interrupts: f64,
}

fn run(text: &str) -> Result<Vec<Step>> {
    let mut steps = Vec::new();
    for line in text.lines() {
        ensure!(!line.starts_with("failed"), "{line}");
        let mut words = line.trim().rsplitn(3, ' ');
        let mut number = || words.next()?.parse::<f64>().ok();
        let (Some(interrupts), Some(ns)) = (number(), number()) else {
            continue;
        };
        let name = words.next().unwrap_or_default().to_owned();
        steps.push(Step {
            name,
            ms: ns / 1e6,
            interrupts,
        });
    }
    ensure!(!steps.is_empty(), "Nothing was measured:\n{text}");
    Ok(steps)
}

/// A directory of the lab host's root disk that is removed when dropped.
fn on_disk() -> Result<tempfile::TempDir> {
    let dir = tempfile::tempdir_in("/var/tmp")?;
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o755))?;
    Ok(dir)
}

fn container(runtime: &str, place: Place) -> Result<String> {
    let volume = on_disk()?;
    let program = format!("type=bind,src={INSIDE},dst=/inside,options=rbind:ro");
    let data = format!(
        "type=bind,src={},dst=/volume,options=rbind:rw",
        volume.path().display()
    );
    // Interrupts are hidden from other containers.
    let mut argv = vec!["ctr", "run", "--rm", "--privileged", "--runtime", runtime];
    argv.extend(["--mount", &program]);
    let dir = match place {
        Place::Root => "/",
        Place::Volume => {
            argv.extend(["--mount", &data]);
            "/volume"
        }
    };
    argv.extend([IMAGE, "bench-files", "/inside", dir]);
    output(&argv)
}

/// What virtiofsd shares: a directory of the root disk, or an overlay over such.
struct Shared {
    _dir: tempfile::TempDir,
    path: PathBuf,
    mounted: bool,
}

impl Shared {
    fn new(place: Place) -> Result<Shared> {
        let dir = on_disk()?;
        let at = |name: &str| dir.path().join(name);
        for name in ["lower", "upper", "work", "share"] {
            fs::create_dir(at(name))?;
        }
        let path = at("share");
        let mounted = place == Place::Root;
        if mounted {
            let dir = dir.path().display();
            let options =
                format!("lowerdir={dir}/lower,upperdir={dir}/upper,workdir={dir}/work,index=off");
            let options = std::ffi::CString::new(options)?;
            let flags = MountFlags::empty();
            mount("overlay", &path, "overlay", flags, options.as_c_str())?;
        }
        Ok(Shared {
            _dir: dir,
            path,
            mounted,
        })
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        if self.mounted {
            // The lab host ends with the benchmark, if this fails.
            let _ = unmount(&self.path, UnmountFlags::DETACH);
        }
    }
}

/// QEMU with virtiofsd, which knows access control lists as ours does.
fn virtiofsd(cache: &str, place: Place) -> Result<String> {
    let shared = Shared::new(place)?;
    let folder = tempfile::tempdir()?;
    let socket = folder.path().join("socket");
    let initramfs = folder.path().join("initramfs");
    bulkhead_guest::root::build(Path::new(INSIDE), &initramfs)
        .context("Cannot make the initial file system")?;
    let _server = Running::start(
        Command::new(VIRTIOFSD)
            .arg("--socket-path")
            .arg(&socket)
            .arg("--shared-dir")
            .arg(&shared.path)
            .args(["--cache", cache, "--posix-acl", "--sandbox", "none"])
            .args(["--log-level", "error"]),
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

/// One of those who are compared.
type Way = (&'static str, fn(Place) -> Result<String>);

const WAYS: [Way; 4] = [
    ("bulkhead", |place| container(OURS, place)),
    ("runc", |place| container(RUNC, place)),
    ("vfsd always", |place| virtiofsd("always", place)),
    ("vfsd auto", |place| virtiofsd("auto", place)),
];

/// The figures of one place, as tables; what our private root is asked for is judged.
fn compare(place: Place, title: &str, rounds: usize, goals: &mut Goals) -> Result<()> {
    let mut runs: BTreeMap<&str, Vec<Vec<Step>>> = BTreeMap::new();
    for round in 0..rounds {
        for (name, way) in &WAYS {
            let steps = way(place).and_then(|text| run(&text)).context(*name)?;
            runs.entry(name).or_default().push(steps);
            eprintln!("{title}, {name}: round {} of {rounds}", round + 1);
        }
    }
    let [ours, peers @ ..] = WAYS.map(|(name, _)| name);
    let names: Vec<&str> = runs[ours][0].iter().map(|step| &*step.name).collect();
    let of = |who: &str, index: usize, value: &dyn Fn(&Step) -> f64| {
        median(runs[who].iter().map(|steps| value(&steps[index])))
    };
    println!("files: {title}, virtual ms, {rounds} rounds, medians");
    head(ours, &peers);
    for (index, name) in names.iter().enumerate() {
        let of = |who| of(who, index, &|step| step.ms);
        row(name, of(ours), &peers.map(of));
    }
    println!("files: {title}, interrupts of the guest's file systems");
    head(ours, &peers);
    for (index, name) in names.iter().enumerate() {
        let of = |who| of(who, index, &|step| step.interrupts);
        row(name, of(ours), &peers.map(of));
        if place == Place::Root && WARM.contains(name) {
            goals.at_most(&format!("interrupts of {name:?}"), of(ours), 0.0);
        }
    }
    Ok(())
}

fn main() -> Result<()> {
    let rounds: usize = std::env::args()
        .nth(1)
        .map_or(Ok(1), |n| n.parse())
        .context("Usage: bench-files [ROUNDS]")?;
    let mut goals = Goals::default();
    compare(Place::Root, "a container's own root", rounds, &mut goals)?;
    compare(Place::Volume, "a volume", rounds, &mut goals)?;
    goals.kept()
}
