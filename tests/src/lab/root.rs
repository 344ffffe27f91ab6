//! The lab host's root disk, with kernel and initial file system.
//!
//! Made in a directory by debootstrap, without mounting anything, and packed by
//! `mke2fs -d`. Debian's signatures are checked.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use bulkhead_guest_kernel::Progress;
use bulkhead_guest_kernel::debian::{Apt, Mirror, keyring};

use super::cache::{self, Cache, Entry};
use super::command::{clean, logged, output};
use super::packages::{LAB, LAB_HOST, LAB_KERNEL, MODULES, STABLE};

/// Changes whenever a step below does.
const RECIPE: &str = "1";

/// Largest size of the root file system in MiB; the disk file is sparse.
const SIZE_MIB: u32 = 24 * 1024;

/// The root disk, a qcow2 file.
pub(crate) const DISK: &str = "root.qcow2";
/// The kernel, a bzImage.
pub(crate) const KERNEL: &str = "vmlinuz";
/// The initial file system of the kernel.
pub(crate) const INITRD: &str = "initrd";

/// Modules that the kernel needs to reach its root disk.
const DISK_MODULES: [&str; 2] = ["virtio_pci", "virtio_blk"];

/// Files of ours in the lab host: path, mode, content.
const FILES: &[(&str, u32, &str)] = &[
    (
        "usr/local/sbin/lab-wait",
        0o755,
        include_str!("guest/lab-wait"),
    ),
    (
        "etc/systemd/system/lab-wait.service",
        0o644,
        include_str!("guest/lab-wait.service"),
    ),
    (
        "etc/containerd/config.toml",
        0o644,
        include_str!("guest/containerd.toml"),
    ),
    ("etc/hostname", 0o644, "lab\n"),
    (
        "etc/hosts",
        0o644,
        "127.0.0.1 localhost lab\n::1 localhost\n",
    ),
    (
        "etc/fstab",
        0o644,
        "debugfs /sys/kernel/debug debugfs defaults 0 0\n",
    ),
    ("root/.bashrc", 0o644, "PS1='lab:\\w# '\n"),
];

/// Units that would disturb tests: nothing may run by the clock.
const MASKED: &[&str] = &[
    "apt-daily-upgrade.timer",
    "apt-daily.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "fstrim.timer",
    "getty@tty1.service",
    "serial-getty@ttyS0.service",
    "systemd-timesyncd.service",
];

/// The root disk for the present lists and files: out of the cache, or made
/// now, which takes minutes and root's rights.
pub(crate) fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Entry> {
    let size = SIZE_MIB.to_string();
    let mut parts = vec![
        RECIPE,
        LAB,
        STABLE,
        LAB_KERNEL,
        &size,
        include_str!("guest/init"),
    ];
    parts.extend(LAB_HOST);
    parts.extend(MODULES);
    parts.extend(MASKED);
    parts.extend(DISK_MODULES);
    for (path, _, content) in FILES {
        parts.extend([path, content]);
    }
    cache.entry("lab-root", &cache::key(parts), |entry| {
        ensure!(
            rustix::process::geteuid().is_root(),
            "The lab host is made by debootstrap, which needs root: run this once as root"
        );
        make(cache, entry, progress)
    })
}

fn make(cache: &Cache, entry: &Path, progress: &dyn Progress) -> Result<()> {
    // Beside the entry: should this be interrupted, the next build removes it.
    let work = tempfile::Builder::new()
        .prefix("work-")
        .tempdir_in(entry.parent().context("An entry lies in a folder")?)?;
    let root = work.path().join("root");
    let mirror = Mirror::of_this_machine()?;
    progress.step("Installing the lab host's system (debootstrap)");
    debootstrap(
        &mirror,
        LAB,
        LAB_HOST,
        &root,
        &cache.path().join("lab-root.log"),
    )?;
    progress.step("Installing the lab host's kernel");
    let version = kernel(&mirror, work.path(), &root, entry)?;
    settle(&root)?;
    initrd(&root, &version, work.path(), &entry.join(INITRD))?;
    progress.step("Packing the lab host's disk");
    let raw = work.path().join("root.img");
    output(
        clean("mke2fs")
            .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
            .arg(&root)
            .arg(&raw)
            .arg(format!("{SIZE_MIB}M")),
    )?;
    output(
        clean("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .arg(&raw)
            .arg(entry.join(DISK)),
    )?;
    Ok(())
}

/// Installs the minimal system of `suite` and `packages` in the directory `root`.
pub(crate) fn debootstrap(
    mirror: &Mirror,
    suite: &str,
    packages: &[&str],
    root: &Path,
    log: &Path,
) -> Result<()> {
    // An older debootstrap knows no newer suite by name; all are made alike.
    logged(
        clean("debootstrap")
            .args(["--variant=minbase", "--force-check-gpg"])
            .arg(format!("--keyring={}", keyring()?))
            .arg(format!("--include={}", packages.join(",")))
            .arg(suite)
            .arg(root)
            .args([mirror.uri(), "/usr/share/debootstrap/scripts/sid"]),
        log,
    )?;
    // Nobody reads these here; they are a tenth of the size.
    for folder in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
        "var/lib/apt/lists",
        "var/cache/apt",
    ] {
        let path = root.join(folder);
        if path.exists() {
            fs::remove_dir_all(&path)?;
            fs::create_dir(&path)?;
        }
    }
    Ok(())
}

/// Installs the kernel's modules in `root`, and its image in `entry`: the version.
fn kernel(mirror: &Mirror, work: &Path, root: &Path, entry: &Path) -> Result<String> {
    let apt = Apt::new(&work.join("apt"), mirror, STABLE)?;
    apt.candidate(LAB_KERNEL)?;
    let package = apt.download(&apt.stands_for(LAB_KERNEL)?)?;
    let unpacked = work.join("kernel");
    output(clean("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
    let modules = unpacked.join("lib/modules");
    let version = fs::read_dir(&modules)?
        .next()
        .context("The kernel package has no modules")??
        .file_name()
        .into_string()
        .map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?;
    fs::copy(
        unpacked.join(format!("boot/vmlinuz-{version}")),
        entry.join(KERNEL),
    )?;
    output(
        clean("cp")
            .arg("-a")
            .arg(&modules)
            .arg(root.join("usr/lib/")),
    )?;
    output(clean("chroot").arg(root).args(["depmod", &version]))?;
    Ok(version)
}

/// Writes our files and says which units run.
fn settle(root: &Path) -> Result<()> {
    for (path, mode, content) in FILES {
        let path = root.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    fs::write(
        root.join("etc/modules-load.d/lab.conf"),
        MODULES.join("\n") + "\n",
    )?;
    fs::create_dir_all(root.join("lab"))?;
    let wants = root.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    symlink("../lab-wait.service", wants.join("lab-wait.service"))?;
    for unit in MASKED {
        let path = root.join("etc/systemd/system").join(unit);
        if path.is_symlink() {
            fs::remove_file(&path)?;
        }
        symlink("/dev/null", path)?;
    }
    // An unset machine id would make the first boot a long one.
    fs::write(
        root.join("etc/machine-id"),
        "6c61620000000000000000000000a11b\n",
    )?;
    Ok(())
}

/// Packs busybox and the modules of the disk: the kernel's initial file system.
fn initrd(root: &Path, version: &str, work: &Path, out: &Path) -> Result<()> {
    let tree = work.join("initrd");
    for folder in ["bin", "dev", "modules", "root"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::copy(root.join("usr/bin/busybox"), tree.join("bin/busybox"))?;
    let init = tree.join("init");
    fs::write(&init, include_str!("guest/init"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

    let modules = root.join("usr/lib/modules").join(version);
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let mut order: Vec<String> = Vec::new();
    for module in DISK_MODULES {
        for path in with_dependencies(&dependencies, module)? {
            let name = path.replace('/', "-");
            if !order.contains(&name) {
                fs::copy(modules.join(&path), tree.join("modules").join(&name))?;
                order.push(name);
            }
        }
    }
    fs::write(tree.join("modules/order"), order.join("\n") + "\n")?;
    pack(&tree, out)
}

/// Packs the directory `tree` as a cpio archive.
fn pack(tree: &Path, out: &Path) -> Result<()> {
    let mut command = clean("sh");
    command
        .current_dir(tree)
        .args([
            "-c",
            "find . | LC_ALL=C sort | cpio --quiet -o -H newc -R 0:0 > \"$1\"",
            "sh",
        ])
        .arg(out);
    output(&mut command)?;
    Ok(())
}

/// The files of `module` and of all it needs, in the order of loading.
/// `dependencies` is depmod's list: `FILE: FILE…`, the nearest need first.
fn with_dependencies(dependencies: &str, module: &str) -> Result<Vec<String>> {
    let is_it = |path: &str| {
        Path::new(path)
            .file_name()
            .and_then(|name| name.to_str())
            .and_then(|name| name.split_once(".ko"))
            .is_some_and(|(name, _)| name.replace('-', "_") == module)
    };
    let (path, needs) = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| is_it(path))
        .with_context(|| format!("The kernel has no module {module}"))?;
    let mut order: Vec<String> = needs.split_whitespace().rev().map(str::to_owned).collect();
    order.push(path.to_owned());
    Ok(order)
}

/// Where the second disk's files for the preparation lie in the source.
pub(crate) fn prepare_script() -> (&'static str, &'static str) {
    ("prepare", include_str!("guest/prepare"))
}

/// Paths of kernel, initial file system and disk in an entry.
pub(crate) fn paths(entry: &Entry) -> [PathBuf; 3] {
    [KERNEL, INITRD, DISK].map(|name| entry.file(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_are_loaded_after_what_they_need() {
        let dependencies = "kernel/drivers/virtio/virtio.ko:\n\
             kernel/drivers/virtio/virtio_pci.ko: kernel/virtio_ring.ko kernel/virtio.ko\n\
             kernel/kvm-amd.ko.xz: kernel/kvm.ko.xz\n";
        assert_eq!(
            with_dependencies(dependencies, "virtio_pci").unwrap(),
            [
                "kernel/virtio.ko",
                "kernel/virtio_ring.ko",
                "kernel/drivers/virtio/virtio_pci.ko"
            ]
        );
        assert_eq!(
            with_dependencies(dependencies, "kvm_amd").unwrap(),
            ["kernel/kvm.ko.xz", "kernel/kvm-amd.ko.xz"]
        );
        assert!(with_dependencies(dependencies, "pci").is_err());
    }
}
