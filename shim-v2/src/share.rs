//! The pod's share: the one directory of the host that the guest sees.
//!
//! ```text
//! <state directory>/share            tmpfs of the shim, mounted shared
//!   <container id>/rootfs            mounts of the root file system
//!   <container id>/volumes/<n>       one bind mount for each volume
//! ```
//!
//! The share exists in the shim's mount namespace only; the VMM's is a slave copy,
//! in which the top is read-only, so that no name at the top can be planted from
//! there. All mounts end with the shim. A [`ContainerShare`] takes back what it
//! put up when it is dropped.

use std::{
    fs::{self, DirBuilder, File},
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use rustix::{
    fs::FileType,
    mount::{MountAttrFlags, MountFlags, MountPropagationFlags, mount_change},
};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::{
    error::{Error, Result, host},
    idmap,
    mount::{self, Scope},
    names::ContainerId,
    rootfs::{self, Source},
    spec::Volume,
};

/// Gives the calling process a mount namespace of its own, which follows the
/// host's but shows it nothing.
///
/// Only the calling thread moves: call it before there is another one.
pub fn enter_private_namespace() -> Result<()> {
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS)
        .map_err(host("make a mount namespace"))?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(host("make the mount namespace private"))
}

/// The share of a pod.
#[derive(Debug)]
pub struct Share {
    dir: PathBuf,
}

impl Share {
    /// Mounts an empty share on `dir`, an existing directory.
    pub fn mount(dir: &Path) -> Result<Self> {
        let failed = |action| {
            let path = dir.to_owned();
            move |error: rustix::io::Errno| Error::Path {
                action,
                path,
                source: error.into(),
            }
        };
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        rustix::mount::mount("bulkhead", dir, "tmpfs", flags, c"mode=0755,size=4m")
            .map_err(failed("mount a tmpfs on"))?;
        let share = Share {
            dir: dir.to_owned(),
        };
        mount_change(dir, MountPropagationFlags::SHARED).map_err(failed("make shared"))?;
        Ok(share)
    }

    /// That of the program before this one, which is mounted.
    pub(crate) fn unpack(dir: &Path) -> Self {
        Share {
            dir: dir.to_owned(),
        }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Puts up the files of a container.
    pub fn add(
        &self,
        id: &ContainerId,
        root: &Source,
        volumes: &[Volume],
    ) -> Result<ContainerShare> {
        let dir = self.dir.join(id.as_str());
        make_dir(&dir)?;
        let mut files = ContainerShare {
            dir,
            mounts: Vec::new(),
            leaves: Vec::new(),
        };
        if !matches!(root, Source::Disk(_)) {
            let target = files.dir.join("rootfs");
            make_dir(&target)?;
            files.leaves.push((target.clone(), Leaf::Directory));
            files.mounts.push(target.clone());
            root.mount_on(&target)?;
        }
        let parent = files.dir.join("volumes");
        make_dir(&parent)?;
        files.leaves.insert(0, (parent.clone(), Leaf::Directory));
        for (number, volume) in volumes.iter().enumerate() {
            files.add_volume(volume, parent.join(number.to_string()))?;
        }
        Ok(files)
    }
}

impl Share {
    /// Takes the share down, with all that is mounted in it.
    pub fn unmount(&self) {
        if let Err(error) = mount::detach(&self.dir) {
            warn!(%error, dir = %self.dir.display(), "cannot unmount the share");
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.unmount();
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Leaf {
    Directory,
    File,
}

/// What goes along of the files of one container when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    dir: PathBuf,
    mounts: Vec<PathBuf>,
    leaves: Vec<(PathBuf, Leaf)>,
}

/// The files of one container in the share.
#[derive(Debug)]
pub struct ContainerShare {
    dir: PathBuf,
    /// Mount points, in the order of mounting.
    mounts: Vec<PathBuf>,
    /// What mounts were put on, in the order of making.
    leaves: Vec<(PathBuf, Leaf)>,
}

impl ContainerShare {
    /// Those of the program before this one.
    pub(crate) fn unpack(carried: Carried) -> Self {
        ContainerShare {
            dir: carried.dir,
            mounts: carried.mounts,
            leaves: carried.leaves,
        }
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self) -> Carried {
        Carried {
            dir: self.dir.clone(),
            mounts: self.mounts.clone(),
            leaves: self.leaves.clone(),
        }
    }

    fn add_volume(&mut self, volume: &Volume, target: PathBuf) -> Result<()> {
        let failed = |action| {
            let path = volume.source.clone();
            move |source| Error::Path {
                action,
                path,
                source,
            }
        };
        let refuse = |reason: &str| Error::Argument {
            what: "Source of a mount",
            value: volume.source.display().to_string(),
            reason: format!("{reason} (mounted on {})", volume.destination),
        };
        let place =
            mount::open_source(&volume.source).map_err(failed("open the source of a mount"))?;
        let stat = rustix::fs::fstat(&place)
            .map_err(|error| failed("look at the source of a mount")(error.into()))?;
        let leaf = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Leaf::Directory,
            FileType::RegularFile => Leaf::File,
            FileType::Socket => {
                return Err(refuse("it has become a socket just now: try again"));
            }
            FileType::Fifo => return Err(refuse("a FIFO does not work across a virtual machine")),
            _ => {
                return Err(refuse(
                    "a device of the host is not passed to a virtual machine",
                ));
            }
        };
        if mount::is_kernel_interface(&place).map_err(failed("look at the source of a mount"))? {
            return Err(refuse("it belongs to the kernel of the host"));
        }
        let scope = if volume.recursive {
            Scope::Recursive
        } else {
            Scope::Top
        };
        let attributes = match volume.read_only {
            true => MountAttrFlags::MOUNT_ATTR_RDONLY,
            false => MountAttrFlags::empty(),
        };
        let tree =
            mount::clone_tree(&place, scope, attributes).map_err(failed("clone the mount of"))?;
        if let Some(ids) = &volume.ids {
            let users = idmap::namespace(&ids.uids, &ids.gids)
                .map_err(failed("make the map of ids for"))?;
            let scope = match ids.recursive {
                true => Scope::Recursive,
                false => Scope::Top,
            };
            mount::map_ids(&tree, &users, scope).map_err(|error| match error.raw_os_error() {
                Some(libc::EINVAL | libc::EPERM) => {
                    refuse("its file system on the host allows no map of ids")
                }
                _ => failed("map the ids of")(error),
            })?;
        }
        match leaf {
            Leaf::Directory => make_dir(&target)?,
            Leaf::File => {
                File::options()
                    .write(true)
                    .create_new(true)
                    .open(&target)
                    .map_err(|source| Error::Path {
                        action: "make",
                        path: target.clone(),
                        source,
                    })?;
            }
        }
        self.leaves.push((target.clone(), leaf));
        rootfs::on(&tree, &target)?;
        self.mounts.push(target);
        Ok(())
    }
}

impl Drop for ContainerShare {
    fn drop(&mut self) {
        for path in self.mounts.iter().rev() {
            // Several mounts may lie on one directory; the attempt after the last
            // one finds none.
            while mount::detach(path).is_ok() && is_mounted(path) {}
        }
        for (path, leaf) in self.leaves.iter().rev() {
            let removed = match leaf {
                Leaf::Directory => fs::remove_dir(path),
                Leaf::File => fs::remove_file(path),
            };
            if let Err(error) = removed {
                warn!(%error, path = %path.display(), "cannot remove a mount point");
            }
        }
        if let Err(error) = fs::remove_dir(&self.dir) {
            warn!(%error, path = %self.dir.display(), "cannot remove a container's share");
        }
    }
}

/// Is something mounted on this directory of the share's tmpfs?
fn is_mounted(path: &Path) -> bool {
    let device = |path: &Path| rustix::fs::lstat(path).map(|stat| stat.st_dev);
    match (device(path), path.parent().map(device)) {
        (Ok(here), Some(Ok(above))) => here != above,
        _ => false,
    }
}

fn make_dir(path: &Path) -> Result<()> {
    DirBuilder::new()
        .mode(0o755)
        .create(path)
        .map_err(|source| Error::Path {
            action: "make",
            path: path.to_owned(),
            source,
        })
}

#[cfg(test)]
mod tests;
