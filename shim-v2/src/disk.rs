//! Disks of containers: block devices, or images in files.
//!
//! The host's kernel never reads what is in them: a disk is handed to the virtual
//! machine, where the guest mounts it as a root file system or the container has it as
//! a device. A lock says that nobody else of ours uses the disk, and a block device that
//! is mounted on the host is refused; both hold as long as the VMM has it open.

use std::{
    fs::{File, OpenOptions},
    io,
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use bulkhead_agent_api::agent::{self, RootDisk};
use bulkhead_agent_api::spec::devices::{HostDisk, Numbers};
use containerd_shim_protos::api::Mount;
use rustix::{
    fs::{FlockOperation, flock, major, minor},
    io::Errno,
};

use crate::{
    error::{Error, Result},
    guest::{Attached, Guest},
    rootfs::Source,
};

/// File systems that the guest's kernel has for disks.
const FILESYSTEMS: [&str; 3] = ["ext4", "ext2", "erofs"];

/// Options that the guest's kernel takes for any of these, beside `ro` and `rw`.
const PASSED: [&str; 4] = ["noatime", "nodiratime", "relatime", "discard"];

/// Options about how the host would have mounted it.
const OF_THE_HOST: [&str; 2] = ["loop", "nouuid"];

/// Where the kernel lists block devices by their numbers.
const BY_NUMBERS: &str = "/sys/dev/block";

/// How long a device may be locked by udev, which looks at each that is new or was
/// written to.
const LOOKED_AT: Duration = Duration::from_secs(2);
/// How often it is looked whether it still is: to wait for a lock has no limit of time.
const LOOK: Duration = Duration::from_millis(20);

/// A disk of the host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Disk {
    path: PathBuf,
    read_only: bool,
}

/// A root file system that is a disk, as the caller describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Root {
    disk: Disk,
    filesystem: String,
    options: Vec<String>,
}

impl Root {
    /// Whether a mount is to be made of a disk.
    #[must_use]
    pub fn is_meant(mount: &Mount) -> bool {
        FILESYSTEMS.contains(&mount.type_.as_str())
    }

    /// Reads the description; nothing is opened.
    pub fn new(mount: &Mount) -> Result<Self> {
        let mut root = Root {
            disk: Disk {
                path: PathBuf::from(&mount.source),
                // This one cannot be written to.
                read_only: mount.type_ == "erofs",
            },
            filesystem: mount.type_.clone(),
            options: Vec::new(),
        };
        if !root.disk.path.is_absolute() || mount.source.contains('\0') {
            return Err(refused(&root.disk.path, "its path is not absolute"));
        }
        for option in &mount.options {
            match option.as_str() {
                "ro" => root.disk.read_only = true,
                "rw" => {}
                option if PASSED.contains(&option) => root.options.push(option.to_owned()),
                option if OF_THE_HOST.contains(&option) => {}
                _ => {
                    return Err(Error::Argument {
                        what: "rootfs mount option",
                        value: option.chars().take(120).collect(),
                        reason: format!(
                            "a disk's can be ro, rw, loop, nouuid, {}",
                            PASSED.join(", ")
                        ),
                    });
                }
            }
        }
        Ok(root)
    }

    /// What the guest is told of it.
    fn message(&self, device: u8) -> RootDisk {
        RootDisk {
            device: device.into(),
            filesystem: self.filesystem.clone(),
            read_only: self.disk.read_only,
            options: self.options.join(","),
            ..RootDisk::default()
        }
    }
}

impl Disk {
    /// The block device with these numbers, under the name that the kernel gave it.
    fn of_the_host(disk: HostDisk) -> Result<Self> {
        let (major, minor) = disk.numbers;
        let failed = |source| Error::Path {
            action: "find a block device by",
            path: Path::new(BY_NUMBERS).join(format!("{major}:{minor}")),
            source,
        };
        let events = Path::new(BY_NUMBERS).join(format!("{major}:{minor}/uevent"));
        let events = std::fs::read_to_string(events).map_err(failed)?;
        let name = events
            .lines()
            .find_map(|line| line.strip_prefix("DEVNAME="));
        let name = name.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
        Ok(Disk {
            path: Path::new("/dev").join(name),
            read_only: disk.read_only,
        })
    }

    /// Opens it for this container alone; one that is only read may have several
    /// readers. A blocking function.
    fn open(&self) -> Result<File> {
        let failed = |source| Error::Path {
            action: "open the disk",
            path: self.path.clone(),
            source,
        };
        let meta = std::fs::metadata(&self.path).map_err(failed)?;
        let is_device = meta.file_type().is_block_device();
        if !is_device && !meta.is_file() {
            return Err(refused(
                &self.path,
                "it is neither a block device nor a file",
            ));
        }
        // Of a device only: refused while the host has it mounted.
        let exclusive = is_device && !self.read_only;
        let opened = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(libc::O_CLOEXEC | if exclusive { libc::O_EXCL } else { 0 })
            .open(&self.path);
        let file = match opened {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                let reason = "the host uses it (it is mounted, or part of another device), \
                              or another container writes to it";
                return Err(refused(&self.path, reason));
            }
            opened => opened.map_err(failed)?,
        };
        let lock = match self.read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        let end = Instant::now() + LOOKED_AT;
        loop {
            match flock(&file, lock) {
                Ok(()) => return Ok(file),
                Err(Errno::AGAIN) if is_device && Instant::now() < end => {
                    std::thread::sleep(LOOK);
                }
                Err(Errno::AGAIN) => {
                    let reason = "another container uses it, and one of them writes";
                    return Err(refused(&self.path, reason));
                }
                Err(error) => return Err(failed(error.into())),
            }
        }
    }

    /// Opens the device with these numbers, and no other.
    fn open_device(&self, numbers: Numbers) -> Result<File> {
        let file = self.open()?;
        let found = file.metadata().map_err(|source| Error::Path {
            action: "look at the disk",
            path: self.path.clone(),
            source,
        })?;
        let device = found.rdev();
        if !found.file_type().is_block_device() || (major(device), minor(device)) != numbers {
            return Err(refused(&self.path, "it is not the device that is meant"));
        }
        Ok(file)
    }
}

/// The disks that a container asks for, opened.
#[derive(Debug, Default)]
pub struct Opened {
    root: Option<(Root, File)>,
    devices: Vec<(HostDisk, File)>,
}

impl Opened {
    /// Opens the root file system, if it is a disk, and block devices of the host. A
    /// blocking function.
    pub fn new(root: &Source, devices: &[HostDisk]) -> Result<Self> {
        let mut opened = Opened::default();
        if let Source::Disk(root) = root {
            opened.root = Some((root.clone(), root.disk.open()?));
        }
        for device in devices {
            let file = Disk::of_the_host(*device)?.open_device(device.numbers)?;
            opened.devices.push((*device, file));
        }
        Ok(opened)
    }

    /// Hands them to a guest, one after the other into `attached`, for whatever becomes
    /// of those that follow. Answers what the guest is told of them.
    pub async fn attach(
        self,
        guest: &Arc<dyn Guest>,
        attached: &mut Vec<Attached>,
    ) -> Result<(Option<RootDisk>, Vec<agent::HostDisk>)> {
        let mut root = None;
        if let Some((found, file)) = self.root {
            let device = guest.attach(file, found.disk.read_only).await?;
            attached.push(Attached::new(device, guest));
            root = Some(found.message(device));
        }
        let mut devices = Vec::new();
        for (disk, file) in self.devices {
            let device = guest.attach(file, disk.read_only).await?;
            attached.push(Attached::new(device, guest));
            devices.push(agent::HostDisk {
                device: device.into(),
                major: disk.numbers.0,
                minor: disk.numbers.1,
                ..agent::HostDisk::default()
            });
        }
        Ok((root, devices))
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Argument {
        what: "Disk",
        value: path.display().to_string(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root(kind: &str, source: &str, options: &[&str]) -> Result<Root> {
        Root::new(&Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        })
    }

    #[test]
    fn a_description_says_how_the_guest_mounts_it_fs_03() {
        let found = root("ext4", "/dev/mapper/a", &["rw", "discard", "nouuid"]).unwrap();
        assert!(!found.disk.read_only);
        assert_eq!(found.options, ["discard"]);
        assert!(root("ext4", "/a", &["loop", "ro"]).unwrap().disk.read_only);
        assert!(root("erofs", "/a", &["loop"]).unwrap().disk.read_only);
        for (options, source) in [
            (&["context=\"x\""][..], "/a"),
            (&["errors=panic"], "/a"),
            (&["usrquota"], "/a"),
            (&[], "a"),
            (&[], ""),
        ] {
            let error = root("ext4", source, options).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{error}");
        }
    }

    #[test]
    fn a_disk_has_one_writer_or_any_number_of_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let (writes, reads) = (false, true);
        let open = |read_only| {
            let path = path.clone();
            Disk { path, read_only }.open()
        };
        let writer = open(writes).unwrap();
        assert!(open(writes).is_err());
        let error = open(reads).unwrap_err().text();
        assert!(error.contains("another container uses it"), "{error}");
        drop(writer);
        let readers = [open(reads).unwrap(), open(reads).unwrap()];
        assert!(open(writes).is_err());
        drop(readers);
        open(writes).unwrap();
    }

    #[test]
    fn what_is_no_disk_is_refused() {
        let open = |source| root("ext4", source, &[]).unwrap().disk.open();
        let error = open("/dev/null").unwrap_err().text();
        assert!(
            error.contains("/dev/null") && error.contains("neither"),
            "{error}"
        );
        let error = open("/none").unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::NOT_FOUND);
    }

    #[test]
    fn a_device_that_the_host_does_not_have_is_not_found_fs_36() {
        let numbers = (4_095, 77);
        let read_only = false;
        let error = Disk::of_the_host(HostDisk { numbers, read_only }).unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::NOT_FOUND);
        assert!(error.text().contains("4095:77"), "{}", error.text());
    }

    #[test]
    fn another_file_under_the_name_of_a_device_is_not_taken_for_it_fs_36() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("sda");
        std::fs::write(&path, [0; 4096]).unwrap();
        let read_only = true;
        let error = Disk { path, read_only }.open_device((8, 0)).unwrap_err();
        assert!(
            error.text().contains("not the device that is meant"),
            "{}",
            error.text()
        );
    }
}
