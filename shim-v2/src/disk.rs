//! A root file system that is a disk: a block device, or an image in a file.
//!
//! The host's kernel never reads what is in it: the disk is handed to the virtual
//! machine, and the guest mounts it. A lock says that nobody else of ours uses the
//! disk, and a block device that is mounted on the host is refused; both hold as
//! long as the VMM has it open.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::{FileTypeExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use bulkhead_agent_api::agent::RootDisk;
use containerd_shim_protos::api::Mount;
use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    error::{Error, Result},
    guest::Guest,
};

/// File systems that the guest's kernel has for disks.
const FILESYSTEMS: [&str; 3] = ["ext4", "ext2", "erofs"];

/// Options that the guest's kernel takes for any of these, beside `ro` and `rw`.
const PASSED: [&str; 4] = ["noatime", "nodiratime", "relatime", "discard"];

/// Options about how the host would have mounted it.
const OF_THE_HOST: [&str; 2] = ["loop", "nouuid"];

/// A disk as the caller describes it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    path: PathBuf,
    filesystem: String,
    read_only: bool,
    options: Vec<String>,
}

impl Disk {
    /// Whether a mount is to be made of a disk.
    #[must_use]
    pub fn is_meant(mount: &Mount) -> bool {
        FILESYSTEMS.contains(&mount.type_.as_str())
    }

    /// Reads the description; nothing is opened.
    pub fn new(mount: &Mount) -> Result<Self> {
        let mut disk = Disk {
            path: PathBuf::from(&mount.source),
            filesystem: mount.type_.clone(),
            // It cannot be written to.
            read_only: mount.type_ == "erofs",
            options: Vec::new(),
        };
        if !disk.path.is_absolute() || mount.source.contains('\0') {
            return Err(refused(&disk.path, "its path is not absolute"));
        }
        for option in &mount.options {
            match option.as_str() {
                "ro" => disk.read_only = true,
                "rw" => {}
                option if PASSED.contains(&option) => disk.options.push(option.to_owned()),
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
        Ok(disk)
    }

    /// Opens it for this container alone; one that is only read may have several
    /// readers. A blocking function.
    pub fn open(&self) -> Result<File> {
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
        let file = OpenOptions::new()
            .read(true)
            .write(!self.read_only)
            .custom_flags(libc::O_CLOEXEC | if exclusive { libc::O_EXCL } else { 0 })
            .open(&self.path)
            .map_err(failed)?;
        let lock = match self.read_only {
            true => FlockOperation::NonBlockingLockShared,
            false => FlockOperation::NonBlockingLockExclusive,
        };
        match flock(&file, lock) {
            Ok(()) => Ok(file),
            Err(rustix::io::Errno::AGAIN) => Err(refused(
                &self.path,
                "another container uses it, and one of them writes",
            )),
            Err(error) => Err(failed(error.into())),
        }
    }

    /// Hands it to a guest.
    pub async fn attach(self, file: File, guest: &Arc<dyn Guest>) -> Result<Attached> {
        let device = guest.attach(file, self.read_only).await?;
        Ok(Attached {
            device,
            disk: self,
            guest: Some(Arc::clone(guest)),
        })
    }
}

fn refused(path: &Path, reason: &str) -> Error {
    Error::Argument {
        what: "Disk of the root file system",
        value: path.display().to_string(),
        reason: reason.to_owned(),
    }
}

/// What goes along of a disk when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    device: u8,
    disk: Disk,
}

/// A disk that a guest has. Dropped, it is taken away, without waiting for that.
#[derive(Debug)]
pub struct Attached {
    device: u8,
    disk: Disk,
    guest: Option<Arc<dyn Guest>>,
}

impl Attached {
    /// One that the guest has from the program before this one.
    pub(crate) fn unpack(carried: Carried, guest: &Arc<dyn Guest>) -> Self {
        Attached {
            device: carried.device,
            disk: carried.disk,
            guest: Some(Arc::clone(guest)),
        }
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self) -> Carried {
        Carried {
            device: self.device,
            disk: self.disk.clone(),
        }
    }

    /// What the guest is told of it.
    #[must_use]
    pub fn message(&self) -> RootDisk {
        RootDisk {
            device: self.device.into(),
            filesystem: self.disk.filesystem.clone(),
            read_only: self.disk.read_only,
            options: self.disk.options.join(","),
            ..RootDisk::default()
        }
    }

    /// Takes it away; the guest has let go of it, or never will.
    pub async fn detach(mut self) {
        if let Some(guest) = self.guest.take() {
            take_away(&*guest, self.device).await;
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Some(guest) = self.guest.take() else {
            return;
        };
        let device = self.device;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { take_away(&*guest, device).await });
        }
    }
}

async fn take_away(guest: &dyn Guest, device: u8) {
    // With the virtual machine the disk is gone too.
    if guest.has_ended().is_none()
        && let Err(error) = guest.detach(device).await
    {
        warn!(
            device,
            error = error.text(),
            "a disk cannot be taken from the VMM"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(kind: &str, source: &str, options: &[&str]) -> Result<Disk> {
        Disk::new(&Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        })
    }

    #[test]
    fn a_description_says_how_the_guest_mounts_it_fs_03() {
        let found = disk("ext4", "/dev/mapper/a", &["rw", "discard", "nouuid"]).unwrap();
        assert!(!found.read_only);
        assert_eq!(found.options, ["discard"]);
        assert!(disk("ext4", "/a", &["loop", "ro"]).unwrap().read_only);
        assert!(disk("erofs", "/a", &["loop"]).unwrap().read_only);
        for (options, source) in [
            (&["context=\"x\""][..], "/a"),
            (&["errors=panic"], "/a"),
            (&["usrquota"], "/a"),
            (&[], "a"),
            (&[], ""),
        ] {
            let error = disk("ext4", source, options).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{error}");
        }
    }

    #[test]
    fn a_disk_has_one_writer_or_any_number_of_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        std::fs::write(&path, [0; 4096]).unwrap();
        let (writes, reads) = ("rw", "ro");
        let open = |option| {
            let disk = disk("ext4", path.to_str().unwrap(), &[option]).unwrap();
            disk.open()
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
        let error = disk("ext4", "/dev/null", &[])
            .unwrap()
            .open()
            .unwrap_err()
            .text();
        assert!(
            error.contains("/dev/null") && error.contains("neither"),
            "{error}"
        );
        let error = disk("ext4", "/none", &[]).unwrap().open().unwrap_err();
        assert_eq!(error.code(), ttrpc::Code::NOT_FOUND);
    }
}
