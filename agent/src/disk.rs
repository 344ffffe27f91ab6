//! Disks of containers: found, mounted if they are root file systems, and let go of.
//!
//! The host puts a disk at a place whose device the kernel passed over at boot; here
//! the kernel's driver is told to look again. When the container is gone the file
//! system is unmounted and the driver is taken off before the host takes the disk away.

use std::{
    fs, io,
    os::unix::fs::{OpenOptionsExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bulkhead_agent_api::{
    DISKS_DIR,
    agent::{CreateRequest, HostDisk, RootDisk},
};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use tokio::{task::spawn_blocking, time::sleep};

use crate::{
    device::{self, Bound},
    error::{Doing, Error},
    spec::{
        devices::{Numbers, renumber},
        plan::{ContainerPlan, DeviceNode, NodeKind, guest_id},
    },
};

/// How long what still uses a disk may take to let go.
const LET_GO: Duration = Duration::from_secs(2);
/// How often that is looked at: of the end of a file system nothing tells.
const LOOK: Duration = Duration::from_millis(5);

/// The disks of a container.
#[derive(Debug, Default)]
pub(crate) struct Disks {
    root: Option<Root>,
    devices: Vec<Disk>,
}

impl Disks {
    /// Finds the disks of a request and mounts that of the root file system; those that
    /// the plan names as devices have the guest's numbers in it then.
    pub(crate) async fn take(
        request: &CreateRequest,
        plan: &mut ContainerPlan,
    ) -> Result<Self, Error> {
        let (id, root) = (request.container_id.clone(), request.root_disk.clone());
        let wanted = request.host_disks.clone();
        if root.is_none() && wanted.is_empty() {
            renumber(plan, &[])?;
            return Ok(Disks::default());
        }
        let find = move || -> Result<_, Error> {
            let root = root.0.map(|root| Root::mount(&id, &root)).transpose()?;
            let devices: Result<Vec<_>, _> = wanted.iter().map(Disk::of_the_host).collect();
            Ok((root, devices?))
        };
        let found = spawn_blocking(find).await.map_err(io::Error::other);
        let (root, found) = found.doing("find the container's disks")??;
        let (devices, known): (Vec<_>, Vec<_>) = found.into_iter().unzip();
        renumber(plan, &known)?;
        for (disk, (_, (major, minor))) in devices.iter().zip(&known) {
            let kind = NodeKind::Block(*major, *minor);
            for node in plan.devices.iter().filter(|node| node.kind == kind) {
                disk.give_to(plan, node).doing("give a disk to its user")?;
            }
        }
        Ok(Disks { root, devices })
    }

    /// What must be written back so that the disks have all: the directory of a file
    /// system, and nodes.
    pub(crate) fn places(&self) -> Vec<PathBuf> {
        let root = self.root.as_ref().map(|root| root.directory.clone());
        let nodes = self.devices.iter().map(|disk| disk.node.clone());
        root.into_iter().chain(nodes).collect()
    }

    /// Unmounts what is mounted, and lets go of all once nobody uses them.
    pub(crate) async fn let_go(self) -> Result<(), Error> {
        if self.root.is_none() && self.devices.is_empty() {
            return Ok(());
        }
        let unmounted = spawn_blocking(move || self.unmount().map(|()| self)).await;
        let disks = unmounted
            .map_err(io::Error::other)
            .and_then(|unmounted| unmounted)
            .doing("unmount the root file system")?;
        // Nearly always it is so already.
        let deadline = Instant::now() + LET_GO;
        // The kernel ends the mounts and files of a process after it has told of its end.
        while disks.are_used() && Instant::now() < deadline {
            sleep(LOOK).await;
        }
        // The driver may have to wait for the host.
        let gone = spawn_blocking(move || drop(disks)).await;
        gone.map_err(io::Error::other)
            .doing("let go of the container's disks")
    }

    fn unmount(&self) -> io::Result<()> {
        self.root.as_ref().map_or(Ok(()), Root::unmount)
    }

    fn are_used(&self) -> bool {
        let root = self.root.as_ref().map(|root| &root.disk);
        root.into_iter().chain(&self.devices).any(Disk::is_used)
    }
}

/// A disk that the driver has.
#[derive(Debug)]
struct Disk {
    device: u32,
    _bound: Bound,
    /// Its node in /dev.
    node: PathBuf,
}

impl Disk {
    /// Has the driver take it.
    fn take(device: u32) -> Result<Self, Error> {
        let bound = Bound::take(device).doing("find a disk")?;
        let block = device::find(device, "block").doing("find a disk")?;
        let node = Path::new("/dev").join(block.file_name().unwrap_or_default());
        Ok(Disk {
            device,
            _bound: bound,
            node,
        })
    }

    /// One that is a device of the container: with its numbers on the host and here.
    fn of_the_host(disk: &HostDisk) -> Result<(Self, (Numbers, Numbers)), Error> {
        let found = Disk::take(disk.device)?;
        let here = found.numbers().doing("read the numbers of a disk")?;
        Ok((found, ((disk.major, disk.minor), here)))
    }

    /// Major and minor number.
    fn numbers(&self) -> io::Result<Numbers> {
        let text = fs::read_to_string(device::find(self.device, "block")?.join("dev"))?;
        let numbers = text.trim_end().split_once(':');
        let numbers =
            numbers.and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
        numbers.ok_or_else(|| io::Error::other(format!("{text:?} are no numbers")))
    }

    /// Where a container cannot have a node of its own it sees this one.
    fn give_to(&self, plan: &ContainerPlan, node: &DeviceNode) -> io::Result<()> {
        let uid = guest_id(&plan.uid_maps, node.uid);
        let gid = guest_id(&plan.gid_maps, node.gid);
        chown(&self.node, uid, gid)?;
        fs::set_permissions(&self.node, fs::Permissions::from_mode(node.mode))
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

/// A root file system that is a disk. Dropped, it is unmounted.
#[derive(Debug)]
struct Root {
    // Unmounted before it is let go of: `drop` of the whole comes first.
    disk: Disk,
    directory: PathBuf,
}

impl Root {
    /// Finds the disk and mounts it for this container.
    fn mount(id: &str, disk: &RootDisk) -> Result<Self, Error> {
        let found = Disk::take(disk.device)?;
        let directory = Path::new(DISKS_DIR).join(id).join("rootfs");
        fs::create_dir_all(&directory).doing("make the root file system's directory")?;
        let root = Root {
            disk: found,
            directory,
        };
        let flags = match disk.read_only {
            true => MountFlags::RDONLY,
            false => MountFlags::empty(),
        };
        let (flags, options) = options(flags, &disk.options);
        let options = std::ffi::CString::new(options).map_err(io::Error::other);
        let options = options.doing("read the options of the root file system")?;
        mount(
            &root.disk.node,
            &root.directory,
            &*disk.filesystem,
            flags,
            &*options,
        )
        .doing("mount the root file system")?;
        Ok(root)
    }

    /// What was written is on the disk when this returns.
    fn unmount(&self) -> io::Result<()> {
        let opened = fs::File::open(&self.directory)?;
        let synced = rustix::fs::syncfs(&opened);
        drop(opened);
        unmount(&self.directory, UnmountFlags::DETACH)?;
        Ok(synced?)
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        // It is not mounted any more, or is only now.
        let _ = unmount(&self.directory, UnmountFlags::DETACH);
        let _ = fs::remove_dir(&self.directory);
        if let Some(parent) = self.directory.parent() {
            let _ = fs::remove_dir(parent);
        }
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
