//! The lab host's root image: Debian forky, made by debootstrap, never booted
//! with anything of this project in it but the test images.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail, ensure};
use bulkhead_guest_kernel::{
    Progress,
    debian::{Apt, Mirror},
};
use sha2::{Digest, Sha256};

use super::Images;

/// What the lab host has installed, and why.
const PACKAGES: &[(&str, &str)] = &[
    ("attr", "getfattr: what containers leave on the host"),
    ("ca-certificates", "containerd wants it"),
    ("containerd", "the container runtime above us"),
    ("dbus", "systemd wants it"),
    ("iproute2", "network namespaces, taps"),
    ("kmod", "modules of the cloud kernel"),
    ("procps", "ps, pgrep: leak checks and evidence"),
    (
        "qemu-system-x86",
        "the microvm machine: the peer of the boot benchmark",
    ),
    ("runc", "the reference runtime"),
    ("socat", "terminals over the command channel"),
    ("strace", "evidence"),
    (
        "systemd-sysv",
        "the init system that containerd is used with",
    ),
    ("udev", "device names"),
];

/// Modules of the cloud kernel that pods and their peers need.
const MODULES: &str = "kvm-amd\noverlay\ntun\nvhost_vsock\nbridge\nveth\nloop\n";

/// Runs as a service: says that the machine is ready, and waits to be wanted.
const SERVICE: &str = include_str!("lab-host.sh");

const UNIT: &str = "[Unit]
Description=Waits for a command from outside
After=containerd.service
Requires=containerd.service
[Service]
ExecStart=/usr/local/sbin/lab-host
StandardOutput=journal
KillMode=process
Delegate=yes
OOMScoreAdjust=-900
LimitNOFILE=1048576
[Install]
WantedBy=multi-user.target
";

/// Timers and services that would disturb measurements.
const MASKED: &[&str] = &[
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty@tty1.service",
    "man-db.timer",
    "serial-getty@ttyS0.service",
    "systemd-timesyncd.service",
];

/// A root image and the kernel that boots it.
#[derive(Debug)]
pub(super) struct Root {
    pub(super) key: String,
    pub(super) image: PathBuf,
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
}

/// Finds the image in `dir` or builds it there.
pub(super) fn ensure(dir: &Path, images: &Images, progress: &dyn Progress) -> Result<Root> {
    let version = cloud_kernel()?;
    let key = key(&version, images);
    let place = dir.join(format!("root-{key}"));
    let root = Root {
        key,
        image: place.join("root.img"),
        kernel: place.join("vmlinuz"),
        initrd: place.join("initrd.img"),
    };
    if place.is_dir() {
        return Ok(root);
    }
    let work = tempfile::Builder::new()
        .prefix("root-work-")
        .tempdir_in(dir)?;
    let tree = work.path().join("tree");
    progress.step("Fetching the lab host's packages");
    let mirror = Mirror::of_this_machine()?;
    let keyring = keyring(&mirror, work.path())?;
    debootstrap(&mirror, &keyring, &tree, progress)?;
    progress.step("Setting up the lab host");
    configure(&tree, &version, images)?;
    let done = work.path().join("done");
    fs::create_dir(&done)?;
    make_ext4(&tree, &done.join("root.img"), 12 * 1024)?;
    for (from, to) in [
        (format!("/boot/vmlinuz-{version}"), "vmlinuz"),
        (format!("/boot/initrd.img-{version}"), "initrd.img"),
    ] {
        fs::copy(&from, done.join(to)).with_context(|| format!("Cannot read {from}"))?;
    }
    fs::rename(&done, &place)?;
    Ok(root)
}

fn key(version: &str, images: &Images) -> String {
    let mut hash = Sha256::new();
    for (name, _) in PACKAGES {
        hash.update(name);
        hash.update(b"\0");
    }
    for text in [MODULES, SERVICE, UNIT, version, &images.key] {
        hash.update(text);
        hash.update(b"\0");
    }
    for unit in MASKED {
        hash.update(unit);
    }
    hex::encode(&hash.finalize()[..12])
}

/// The newest of Debian's cloud kernels on this machine.
fn cloud_kernel() -> Result<String> {
    let mut versions: Vec<String> = fs::read_dir("/lib/modules")
        .context("Cannot read /lib/modules")?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| {
            name.ends_with("-cloud-amd64")
                && Path::new("/boot").join(format!("vmlinuz-{name}")).exists()
        })
        .collect();
    versions.sort_by_key(|name| {
        name.split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u64>().ok())
            .collect::<Vec<_>>()
    });
    versions
        .pop()
        .context("No cloud kernel in /boot: install the package linux-image-cloud-amd64")
}

/// Debian's archive keys as of a suite that knows forky's.
fn keyring(mirror: &Mirror, work: &Path) -> Result<PathBuf> {
    const PACKAGE: &str = "debian-archive-keyring";
    let apt = Apt::new(&work.join("apt"), mirror, "trixie")?;
    apt.candidate(PACKAGE)?;
    let deb = apt.download(PACKAGE)?;
    let tree = work.join("keyring");
    run(Command::new("dpkg-deb").arg("-x").args([&deb, &tree]))?;
    let dir = tree.join("usr/share/keyrings");
    for name in ["debian-archive-keyring.gpg", "debian-archive-keyring.pgp"] {
        if let Ok(path) = dir.join(name).canonicalize() {
            return Ok(path);
        }
    }
    bail!("{PACKAGE} holds no keyring in {}", dir.display())
}

fn debootstrap(
    mirror: &Mirror,
    keyring: &Path,
    tree: &Path,
    progress: &dyn Progress,
) -> Result<()> {
    let include: Vec<&str> = PACKAGES.iter().map(|(name, _)| *name).collect();
    progress.step("Installing the lab host's packages");
    run(Command::new("debootstrap")
        .args(["--variant=minbase", "--merged-usr"])
        .arg(format!("--include={}", include.join(",")))
        .arg(format!("--keyring={}", keyring.display()))
        .arg("forky")
        .arg(tree)
        .arg(mirror.uri())
        // Older releases of debootstrap know no forky; the way is that of sid.
        .arg("/usr/share/debootstrap/scripts/sid"))
}

fn configure(tree: &Path, version: &str, images: &Images) -> Result<()> {
    let write = |path: &str, text: &str, mode: u32| -> Result<()> {
        let path = tree.join(path);
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(&path, text)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))?;
        Ok(())
    };
    write("etc/hostname", "lab\n", 0o644)?;
    write("etc/hosts", "127.0.0.1 localhost lab\n", 0o644)?;
    write("etc/fstab", "", 0o644)?;
    write("etc/modules-load.d/lab.conf", MODULES, 0o644)?;
    write("usr/local/sbin/lab-host", SERVICE, 0o755)?;
    write("etc/systemd/system/lab-host.service", UNIT, 0o644)?;
    fs::create_dir_all(tree.join("mnt/in"))?;
    let system = tree.join("etc/systemd/system");
    fs::create_dir_all(system.join("multi-user.target.wants"))?;
    symlink(
        "../lab-host.service",
        system.join("multi-user.target.wants/lab-host.service"),
    )?;
    for unit in MASKED {
        let _ = fs::remove_file(system.join(unit));
        symlink("/dev/null", system.join(unit))?;
    }
    let modules = tree.join("lib/modules");
    fs::create_dir_all(&modules)?;
    run(Command::new("cp")
        .arg("-a")
        .arg(format!("/lib/modules/{version}"))
        .arg(&modules))?;
    let shelf = tree.join("usr/share/lab/images");
    fs::create_dir_all(&shelf)?;
    for (name, path) in &images.layouts {
        run(Command::new("cp").arg("-a").arg(path).arg(shelf.join(name)))?;
    }
    for entry in fs::read_dir(tree.join("var/cache/apt/archives"))? {
        let path = entry?.path();
        if path.extension().is_some_and(|extension| extension == "deb") {
            fs::remove_file(path)?;
        }
    }
    Ok(())
}

/// Makes an ext4 image of `mib` MiB (sparse) with what is in `tree`.
pub(super) fn make_ext4(tree: &Path, image: &Path, mib: u64) -> Result<()> {
    run(Command::new("mke2fs")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1",
            "-d",
        ])
        .args([tree, image])
        .arg(format!("{mib}M")))
}

/// Runs a program of this machine, silent unless it fails.
pub(super) fn run(command: &mut Command) -> Result<()> {
    let output = command
        .env("LC_ALL", "C.UTF-8")
        .env("DEBIAN_FRONTEND", "noninteractive")
        .output()
        .with_context(|| format!("Cannot start {command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    let tail: Vec<&str> = text.lines().rev().take(15).collect();
    ensure!(
        output.status.success(),
        "{command:?} failed ({}):\n{}",
        output.status,
        tail.into_iter().rev().collect::<Vec<_>>().join("\n")
    );
    Ok(())
}
