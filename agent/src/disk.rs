//! A root file system that is a disk: found, mounted, and let go of.
//!
//! The host puts a disk at a place whose device the kernel passed over at boot; here
//! the kernel's driver is told to look again. When the container is gone the file
//! system is unmounted and the driver is taken off before the host takes the disk away.

use std::{
    fs, io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_agent_api::{DISKS_DIR, agent::RootDisk};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::{task::spawn_blocking, time::sleep};

use crate::error::{Doing, Error};

/// Where the driver is told to take and to leave devices.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Where the kernel lists them.
const DEVICES: &str = "/sys/bus/platform/devices";

/// How long what still uses a file system that is unmounted may take to let go.
const LET_GO: Duration = Duration::from_secs(2);
/// How often that is looked at: of the end of a file system nothing tells.
const LOOK: Duration = Duration::from_millis(5);

/// A mounted disk. Dropped, it is unmounted and let go of, whoever still uses it.
#[derive(Debug)]
pub(crate) struct Disk {
    /// `virtio-mmio.N`.
    device: String,
    /// Its node in /dev.
    node: PathBuf,
    /// Where it is mounted, if it is.
    directory: Option<PathBuf>,
}

impl Disk {
    /// Finds the disk and mounts it for this container.
    pub(crate) async fn mount(id: &str, disk: RootDisk) -> Result<Self, Error> {
        let id = id.to_owned();
        let mounted = spawn_blocking(move || Self::mount_now(&id, &disk)).await;
        mounted
            .map_err(io::Error::other)
            .doing("mount the root file system's disk")?
    }

    fn mount_now(id: &str, disk: &RootDisk) -> Result<Self, Error> {
        let device = format!("virtio-mmio.{}", disk.device);
        fs::write(format!("{DRIVER}/bind"), &device).doing("find the root file system's disk")?;
        let mut found = Disk {
            node: PathBuf::new(),
            device,
            directory: None,
        };
        found.node = found.block().doing("find the root file system's disk")?;
        let directory = Path::new(DISKS_DIR).join(id).join("rootfs");
        fs::create_dir_all(&directory).doing("make the root file system's directory")?;
        let directory = found.directory.insert(directory);
        let flags = match disk.read_only {
            true => MountFlags::RDONLY,
            false => MountFlags::empty(),
        };
        let (flags, options) = options(flags, &disk.options);
        let options = std::ffi::CString::new(options).map_err(io::Error::other);
        let options = options.doing("read the options of the root file system")?;
        mount(
            &found.node,
            &*directory,
            &*disk.filesystem,
            flags,
            &*options,
        )
        .doing("mount the root file system")?;
        Ok(found)
    }

    /// The node of the block device that the driver has made of it.
    fn block(&self) -> io::Result<PathBuf> {
        for device in fs::read_dir(Path::new(DEVICES).join(&self.device))? {
            let Ok(mut blocks) = fs::read_dir(device?.path().join("block")) else {
                continue;
            };
            if let Some(block) = blocks.next() {
                return Ok(Path::new("/dev").join(block?.file_name()));
            }
        }
        Err(io::Error::new(
            io::ErrorKind::NotFound,
            "the device is no disk",
        ))
    }

    /// Where it is mounted.
    pub(crate) fn directory(&self) -> Option<&Path> {
        self.directory.as_deref()
    }

    /// Unmounts it once nobody uses it, and lets go of it.
    pub(crate) async fn let_go(self) -> Result<(), Error> {
        let unmounted = spawn_blocking(move || self.unmount().map(|()| self)).await;
        let disk = unmounted
            .map_err(io::Error::other)
            .and_then(|unmounted| unmounted)
            .doing("unmount the root file system")?;
        // Nearly always it is so already.
        let deadline = Instant::now() + LET_GO;
        // The kernel ends the mounts of a process after it has told of its end.
        while disk.is_used() && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        // The driver may have to wait for the host.
        let gone = spawn_blocking(move || drop(disk)).await;
        gone.map_err(io::Error::other)
            .doing("let go of the root file system's disk")
    }

    /// What was written is on the disk when this returns.
    fn unmount(&self) -> io::Result<()> {
        let Some(directory) = &self.directory else {
            return Ok(());
        };
        let opened = fs::File::open(directory)?;
        let synced = rustix::fs::syncfs(&opened);
        drop(opened);
        unmount(directory, UnmountFlags::DETACH)?;
        Ok(synced?)
    }

    /// A mounted file system has its disk for itself.
    fn is_used(&self) -> bool {
        let exclusive = fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_EXCL | libc::O_CLOEXEC)
            .open(&self.node);
        exclusive.is_err_and(|error| error.raw_os_error() == Some(libc::EBUSY))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if let Some(directory) = &self.directory {
            // It is not mounted any more, or is only now.
            let _ = unmount(directory, UnmountFlags::DETACH);
            let _ = fs::remove_dir(directory);
            if let Some(parent) = directory.parent() {
                let _ = fs::remove_dir(parent);
            }
        }
        // Nobody is left to be told of a failure.
        let _ = fs::write(format!("{DRIVER}/unbind"), &self.device);
    }
}

/// Those that are flags of the mount, and the others.
fn options(mut flags: MountFlags, options: &str) -> (MountFlags, String) {
    let mut others = Vec::new();
    for option in options.split(',').filter(|option| !option.is_empty()) {
        match option {
            "noatime" => flags |= MountFlags::NOATIME,
            "nodiratime" => flags |= MountFlags::NODIRATIME,
            "relatime" => flags |= MountFlags::RELATIME,
            other => others.push(other),
        }
    }
    (flags, others.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_the_mount_are_no_options_of_the_file_system() {
        let (flags, others) = options(MountFlags::RDONLY, "noatime,discard,relatime,");
        assert_eq!(
            flags,
            MountFlags::RDONLY | MountFlags::NOATIME | MountFlags::RELATIME
        );
        assert_eq!(others, "discard");
    }
}
