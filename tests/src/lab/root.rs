//! The lab host's root disk, with kernel and initial file system.
//!
//! Made in a directory by debootstrap, without mounting anything, and packed by
//! `mke2fs -d`. Debian's signatures are checked.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use bulkhead_guest_kernel::Progress;
use bulkhead_guest_kernel::debian::{Apt, Mirror, keyring};

use super::packages::{BUSYBOX, LAB_HOST, LAB_KERNEL, MODULES, STABLE};
use bulkhead_guest_kernel::cache::{self, Cache, Entry};
use bulkhead_guest_kernel::command::{clean, limited, logged, output, output_bytes};

/// Changes whenever a step below does.
const RECIPE: &str = "2";

/// Largest size of the root file system in MiB; the disk file is sparse.
const SIZE_MIB: u32 = 24 * 1024;

/// The root disk, a qcow2 file.
pub(crate) const DISK: &str = "root.qcow2";
/// The kernel, a bzImage.
pub(crate) const KERNEL: &str = "vmlinuz";
/// The initial file system of the kernel.
pub(crate) const INITRD: &str = "initrd";

/// How long installing a system may take.
const DEBOOTSTRAP_DEADLINE: Duration = Duration::from_secs(2400);

/// In an entry made from Debian packages: their names and versions.
pub(crate) const PACKAGES: &str = "packages";

/// Where a kernel's modules lie, in its package and in the lab host.
const MODULES_DIRECTORY: &str = "usr/lib/modules";

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
        "etc/systemd/system/containerd.service",
        0o644,
        include_str!("guest/containerd.service"),
    ),
    // A unit that fails at boot is seen on the console.
    (
        "etc/systemd/journald.conf.d/lab.conf",
        0o644,
        "[Journal]\nForwardToConsole=yes\nMaxLevelConsole=warning\n",
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

/// The kind of the entry, and the name of the one for the present lists and files.
fn name() -> (&'static str, String) {
    let size = SIZE_MIB.to_string();
    let mut parts = vec![
        RECIPE,
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
    ("lab-root", cache::key(parts))
}

/// The root disk, if it has been made.
pub(crate) fn find(cache: &Cache) -> Result<Option<Entry>> {
    let (kind, key) = name();
    cache.find(kind, &key)
}

/// The root disk for the present lists and files: out of the cache, or made
/// now, which takes minutes and root's rights.
pub(crate) fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Entry> {
    let (kind, key) = name();
    cache.entry(kind, &key, progress, |entry, work| {
        ensure!(
            rustix::process::geteuid().is_root(),
            "The lab host is made by debootstrap, which needs root: run this once as root"
        );
        make(cache, entry, work, progress)
    })
}

fn make(cache: &Cache, entry: &Path, work: &Path, progress: &dyn Progress) -> Result<()> {
    let root = work.join("root");
    let mirror = Mirror::of_this_machine()?;
    progress.step("Installing the lab host's system (debootstrap)");
    debootstrap(
        &mirror,
        STABLE,
        LAB_HOST,
        &root,
        &cache.path().join("lab-root.log"),
    )?;
    progress.step("Installing the lab host's kernel");
    let (package, version) = kernel(&mirror, work, &root, entry)?;
    list_packages(&root, &package, &entry.join(PACKAGES))?;
    settle(&root)?;
    initrd(&root, &version, work, &entry.join(INITRD))?;
    progress.step("Packing the lab host's disk");
    let raw = work.join("root.img");
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
        limited("debootstrap", DEBOOTSTRAP_DEADLINE)
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

/// Lists the packages that are installed in `root`, and `more`, in the file `out`:
/// a name and a version a line.
pub(crate) fn list_packages(root: &Path, more: &str, out: &Path) -> Result<()> {
    let mut list = output(
        clean("dpkg-query")
            .arg(format!(
                "--admindir={}",
                root.join("var/lib/dpkg").display()
            ))
            .args(["--show", "--showformat", "${Package} ${Version}\n"]),
    )?;
    list.push_str(more);
    fs::write(out, list).with_context(|| format!("Cannot write {}", out.display()))
}

/// Installs the kernel's modules in `root`, and its image in `entry`: the package with its
/// version, as a line, and the version that the kernel has itself.
fn kernel(mirror: &Mirror, work: &Path, root: &Path, entry: &Path) -> Result<(String, String)> {
    let apt = Apt::new(&work.join("apt"), mirror, STABLE)?;
    let line = format!("{LAB_KERNEL} {}\n", apt.candidate(LAB_KERNEL)?);
    let package = apt.download(&apt.stands_for(LAB_KERNEL)?)?;
    let unpacked = work.join("kernel");
    output(clean("dpkg-deb").arg("-x").arg(&package).arg(&unpacked))?;
    let modules = unpacked.join(MODULES_DIRECTORY);
    let version = fs::read_dir(&modules)
        .with_context(|| format!("The kernel package has no {MODULES_DIRECTORY}"))?
        .next()
        .context("The kernel package has no modules")??
        .file_name()
        .into_string()
        .map_err(|name| anyhow::anyhow!("{name:?} is not UTF-8"))?;
    fs::copy(
        unpacked.join(format!("boot/vmlinuz-{version}")),
        entry.join(KERNEL),
    )
    .context("The kernel package has no kernel")?;
    output(
        clean("cp")
            .arg("-a")
            .arg(&modules)
            .arg(root.join("usr/lib/")),
    )?;
    output(clean("chroot").arg(root).args(["depmod", &version]))?;
    Ok((line, version))
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
    for unit in ["containerd.service", "lab-wait.service"] {
        symlink(format!("../{unit}"), wants.join(unit))?;
    }
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
    fs::copy(root.join(BUSYBOX), tree.join("bin/busybox"))
        .with_context(|| format!("The lab host has no {BUSYBOX}"))?;
    let init = tree.join("init");
    fs::write(&init, include_str!("guest/init"))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;

    let modules = root.join(MODULES_DIRECTORY).join(version);
    let dependencies = fs::read_to_string(modules.join("modules.dep"))?;
    let built_in = fs::read_to_string(modules.join("modules.builtin"))?;
    let mut order: Vec<String> = Vec::new();
    for module in DISK_MODULES {
        if built_in.lines().any(|path| is_module(path, module)) {
            continue;
        }
        for path in with_dependencies(&dependencies, module)? {
            let plain = path.strip_suffix(".xz").unwrap_or(&path);
            let name = plain.replace('/', "-");
            if !order.contains(&name) {
                let to = tree.join("modules").join(&name);
                fs::write(&to, module_at(&modules.join(&path))?)?;
                order.push(name);
            }
        }
    }
    fs::write(tree.join("modules/order"), order.join("\n") + "\n")?;
    pack(&tree, out)
}

/// The module in the file `path`, which Debian may have compressed.
fn module_at(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        return output_bytes(clean("xz").args(["--decompress", "--stdout"]).arg(path));
    }
    fs::read(path).with_context(|| format!("Cannot read {}", path.display()))
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

/// Whether the file `path` is `module`.
fn is_module(path: &str, module: &str) -> bool {
    Path::new(path)
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.split_once(".ko"))
        .is_some_and(|(name, _)| name.replace('-', "_") == module)
}

/// The files of `module` and of all it needs, in the order of loading.
/// `dependencies` is depmod's list: `FILE: FILE…`, the nearest need first.
fn with_dependencies(dependencies: &str, module: &str) -> Result<Vec<String>> {
    let (path, needs) = dependencies
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(path, _)| is_module(path, module))
        .with_context(|| format!("The kernel has no module {module}"))?;
    let mut order: Vec<String> = needs.split_whitespace().rev().map(str::to_owned).collect();
    order.push(path.to_owned());
    Ok(order)
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
        assert!(is_module(
            "kernel/drivers/virtio/virtio_pci.ko",
            "virtio_pci"
        ));
        assert!(!is_module(
            "kernel/drivers/virtio/virtio_pci_modern_dev.ko",
            "virtio_pci"
        ));
    }
}
