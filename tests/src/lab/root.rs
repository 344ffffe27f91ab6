//! The lab host's root disk, with kernel and initial file system.
//!
//! A Debian system and what is ours, laid over each other and packed by `mke2fs -d`:
//! nothing is mounted, and nobody has to be root.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_guest::Progress;
use bulkhead_guest::debian::{Apt, Mirror};

use super::packages::{BUSYBOX, LAB_HOST, LAB_KERNEL, MODULES, STABLE};
use super::system::{self, PACKAGES, as_root};
use bulkhead_guest::cache::{self, Cache, Entry};
use bulkhead_guest::command::{clean, output, output_bytes};
use bulkhead_guest::cpio::{Archive, Kind};

/// Changes whenever a step below does.
const RECIPE: &str = "5";

/// Largest size of the root file system in MiB; the disk file is sparse.
const SIZE_MIB: u32 = 24 * 1024;

/// The root disk, a qcow2 file.
pub(crate) const DISK: &str = "root.qcow2";
/// The kernel, a bzImage.
pub(crate) const KERNEL: &str = "vmlinuz";
/// The initial file system of the kernel.
pub(crate) const INITRD: &str = "initrd";

/// While it is made: the archive of Debian's system, and the tree of what is laid over it.
const BASE: &str = "base.tar";
const OURS: &str = "ours";

/// Lays one over the other, where owners are as they should be, and packs it. The first
/// argument is the size.
const PACK: &str = "
mkdir root
tar -C root --numeric-owner -xpf base.tar
tar -C ours --owner=0 --group=0 -cf ours.tar .
tar -C root --no-overwrite-dir -xpf ours.tar
mke2fs -q -t ext4 -O ^has_journal -d root root.img \"$1\"
";

/// How the names of attributes begin in an archive.
const ATTRIBUTE: &str = "SCHILY.xattr.";

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
    // Tests that want it write its settings first.
    (
        "etc/systemd/system/docker.service.d/lab.conf",
        0o644,
        "[Unit]\nConditionPathExists=/etc/docker/daemon.json\n",
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
    "systemd-tmpfiles-clean.timer",
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
/// now, which takes minutes.
pub(crate) fn ensure(cache: &Cache, progress: &dyn Progress) -> Result<Entry> {
    let (kind, key) = name();
    cache.entry(kind, &key, progress, |entry, work| {
        make(cache, entry, work, progress)
    })
}

fn make(cache: &Cache, entry: &Path, work: &Path, progress: &dyn Progress) -> Result<()> {
    let mirror = Mirror::of_this_machine()?;
    progress.step("Installing the lab host's system");
    let base = work.join(BASE);
    let log = cache.path().join("lab-root.log");
    system::install(&mirror, STABLE, LAB_HOST, &base, &log)?;
    progress.step("Installing the lab host's kernel");
    let ours = work.join(OURS);
    settle(&ours)?;
    let (package, version) = kernel(&mirror, work, &ours, entry)?;
    system::list_packages(&base, &package, work, &entry.join(PACKAGES))?;
    let modules = ours.join(MODULES_DIRECTORY).join(&version);
    initrd(&base, &modules, work, &entry.join(INITRD))?;
    progress.step("Packing the lab host's disk");
    let raw = pack(work, SIZE_MIB)?;
    set_attributes(work, &raw)?;
    output(
        clean("qemu-img")
            .args(["convert", "-O", "qcow2"])
            .arg(raw)
            .arg(entry.join(DISK)),
    )?;
    Ok(())
}

/// Installs the kernel's modules in `ours`, and its image in `entry`: the package with its
/// version, as a line, and the version that the kernel has itself.
fn kernel(mirror: &Mirror, work: &Path, ours: &Path, entry: &Path) -> Result<(String, String)> {
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
    // depmod looks in /lib, which is a part of /usr.
    let lib = unpacked.join("lib");
    if !lib.exists() {
        symlink("usr/lib", &lib)?;
    }
    output(clean("depmod").arg("-b").arg(&unpacked).arg(&version))?;
    let to = ours.join(MODULES_DIRECTORY);
    fs::create_dir_all(ours.join("usr/lib"))?;
    fs::rename(&modules, &to).with_context(|| format!("Cannot make {}", to.display()))?;
    Ok((line, version))
}

/// Writes our files in `ours` and says which units run.
fn settle(ours: &Path) -> Result<()> {
    let modules = MODULES.join("\n") + "\n";
    let lists = [
        ("etc/modules-load.d/lab.conf", 0o644, modules.as_str()),
        // An unset machine id would make the first boot a long one.
        (
            "etc/machine-id",
            0o444,
            "6c61620000000000000000000000a11b\n",
        ),
    ];
    for (path, mode, content) in FILES.iter().chain(&lists) {
        let path = ours.join(path);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        fs::write(&path, content).with_context(|| format!("Cannot write {}", path.display()))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
    }
    fs::create_dir_all(ours.join("lab"))?;
    let wants = ours.join("etc/systemd/system/multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    for unit in ["containerd.service", "lab-wait.service"] {
        symlink(format!("../{unit}"), wants.join(unit))?;
    }
    for unit in MASKED {
        symlink("/dev/null", ours.join("etc/systemd/system").join(unit))?;
    }
    Ok(())
}

/// Packs what lies in `work` as a disk of this size, and says where it is.
fn pack(work: &Path, size_mib: u32) -> Result<PathBuf> {
    output(
        as_root("sh")
            .current_dir(work)
            .args(["-euc", PACK, "sh", &format!("{size_mib}M")]),
    )?;
    Ok(work.join("root.img"))
}

/// Sets the attributes, capabilities among them, that files have in the archive in `work`
/// on the disk made from it: fakeroot takes a file that tar makes with some for no file.
fn set_attributes(work: &Path, disk: &Path) -> Result<()> {
    let mut commands = String::new();
    let mut values = 0;
    let mut archive = tar::Archive::new(fs::File::open(work.join(BASE))?);
    for entry in archive.entries_with_seek()? {
        let mut entry = entry?;
        let path = entry.path()?.into_owned();
        for extension in entry.pax_extensions()?.into_iter().flatten() {
            let extension = extension?;
            let Some(name) = extension.key()?.strip_prefix(ATTRIBUTE) else {
                continue;
            };
            values += 1;
            let value = format!("value-{values}");
            fs::write(work.join(&value), extension.value_bytes())?;
            let path = path.display();
            writeln!(commands, "ea_set -f {value} \"/{path}\" {name}")?;
        }
    }
    fs::write(work.join("commands"), commands)?;
    output(
        clean("debugfs")
            .current_dir(work)
            .args(["-w", "-f", "commands"])
            .arg(disk),
    )?;
    Ok(())
}

/// Packs busybox, of the system in `base`, and the disk's drivers among `modules`: the
/// kernel's initial file system.
fn initrd(base: &Path, modules: &Path, work: &Path, out: &Path) -> Result<()> {
    let mut archive = Archive::default();
    for folder in ["bin", "dev", "modules", "root"] {
        archive.add(folder, 0o755, Kind::Directory)?;
    }
    let busybox = work.join("busybox");
    system::unpack(base, &format!("./{BUSYBOX}"), &busybox)?;
    archive.add("bin/busybox", 0o755, Kind::File(&fs::read(busybox)?))?;
    archive.add("init", 0o755, Kind::File(include_bytes!("guest/init")))?;
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
                let module = module_at(&modules.join(&path))?;
                archive.add(&format!("modules/{name}"), 0o644, Kind::File(&module))?;
                order.push(name);
            }
        }
    }
    let order = order.join("\n") + "\n";
    archive.add("modules/order", 0o644, Kind::File(order.as_bytes()))?;
    fs::write(out, archive.finish()).with_context(|| format!("Cannot write {}", out.display()))
}

/// The module in the file `path`, which Debian may have compressed.
fn module_at(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "xz") {
        return output_bytes(clean("xz").args(["--decompress", "--stdout"]).arg(path));
    }
    fs::read(path).with_context(|| format!("Cannot read {}", path.display()))
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
    use tar::{EntryType, Header};

    use super::*;

    #[test]
    fn whoever_packs_a_disk_its_files_are_as_in_the_archive() {
        let work = tempfile::tempdir().unwrap();
        let ours = work.path().join(OURS);
        fs::create_dir_all(ours.join("home")).unwrap();
        fs::write(ours.join("home/own"), "own").unwrap();
        let mut archive = tar::Builder::new(fs::File::create(work.path().join(BASE)).unwrap());
        let mut add = |name: &str, kind: EntryType, mode: u32, owner: u64| {
            let mut header = Header::new_ustar();
            header.set_entry_type(kind);
            header.set_mode(mode);
            header.set_uid(owner);
            header.set_gid(owner);
            header.set_size(0);
            header.set_device_major(1).unwrap();
            header.set_device_minor(3).unwrap();
            archive.append_data(&mut header, name, &[][..]).unwrap();
        };
        add("home", EntryType::Directory, 0o700, 7);
        add("su", EntryType::Regular, 0o4755, 0);
        add("null", EntryType::Char, 0o666, 0);
        let capability = b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0";
        archive
            .append_pax_extensions([("SCHILY.xattr.security.capability", &capability[..])])
            .unwrap();
        let mut header = Header::new_ustar();
        header.set_mode(0o755);
        header.set_uid(8);
        header.set_gid(9);
        header.set_size(0);
        archive.append_data(&mut header, "ping", &[][..]).unwrap();
        archive.into_inner().unwrap();

        let disk = match pack(work.path(), 16) {
            Ok(disk) => disk,
            Err(error) => {
                println!("skipped: this machine cannot pack disks: {error:#}");
                return;
            }
        };
        set_attributes(work.path(), &disk).unwrap();
        let told = |what: &str| {
            let told = output(clean("debugfs").args(["-R", what]).arg(&disk)).unwrap();
            told.split_whitespace().collect::<Vec<_>>().join(" ")
        };
        let check = |name: &str, expected: &[&str]| {
            let told = told(&format!("stat {name}"));
            for text in expected {
                assert!(told.contains(text), "{name}: no {text:?} in {told}");
            }
        };
        check("/", &["Mode: 0755", "User: 0 Group: 0"]);
        check("/home", &["Mode: 0700", "User: 7 Group: 7"]);
        check("/home/own", &["User: 0 Group: 0"]);
        check("/su", &["regular Mode: 04755", "User: 0 Group: 0"]);
        check(
            "/null",
            &["character special", "Device major/minor number: 01:03"],
        );
        check("/ping", &["regular Mode: 0755", "User: 8 Group: 9"]);
        assert!(told("ea_list /ping").contains("security.capability (20) = 01 00 00 02 00 20"));
    }

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
