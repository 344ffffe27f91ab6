//! A container's root file system, as the caller describes it, on a directory of
//! the share.
//!
//! Only types of an allow-list: what would make the host's kernel read a disk image
//! of somebody else is left to the guest.

use std::{
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use rustix::mount::MountAttrFlags;

use crate::{
    disk,
    error::{Error, Result},
    mount::{self, Scope},
};

/// Where the files of a container come from.
#[derive(Clone, Debug, PartialEq)]
pub enum Source {
    /// Mounts of the request, in order; each covers the one before.
    Mounts(Vec<Mount>),
    /// A disk, which the guest mounts: nothing is done here.
    Disk(disk::Root),
    /// A directory that is mounted already: `root.path` of the specification.
    Directory {
        /// The bundle.
        bundle: PathBuf,
        /// Relative to the bundle, or absolute.
        path: PathBuf,
    },
}

/// Whether a root belongs to its container alone, so that nobody else changes it
/// while the container lives: mounts of the request were made for it by the caller,
/// a directory that is mounted already may be anybody's.
#[must_use]
pub fn is_private(mounts: &[Mount]) -> bool {
    !mounts.is_empty()
}

impl Source {
    /// Checks the request.
    pub fn new(mounts: &[Mount], bundle: &Path, root: &Path) -> Result<Self> {
        if mounts.is_empty() {
            return Ok(Source::Directory {
                bundle: bundle.to_owned(),
                path: root.to_owned(),
            });
        }
        if let [mount] = mounts
            && disk::Root::is_meant(mount)
        {
            check_target(mount)?;
            return disk::Root::new(mount).map(Source::Disk);
        }
        for mount in mounts {
            check(mount)?;
        }
        Ok(Source::Mounts(mounts.to_vec()))
    }

    /// Mounts the root on `target`, an empty directory of the share.
    pub fn mount_on(&self, target: &Path) -> Result<()> {
        match self {
            Source::Mounts(mounts) => {
                for mount in mounts {
                    attach(mount, target)?;
                }
                Ok(())
            }
            Source::Disk(_) => Ok(()),
            Source::Directory { bundle, path } => {
                let failed = |action| {
                    let path = bundle.join(path);
                    move |source| Error::Path {
                        action,
                        path,
                        source,
                    }
                };
                let place = open_root(bundle, path).map_err(failed("open the root file system"))?;
                let tree = mount::clone_tree(&place, Scope::Recursive, MountAttrFlags::empty())
                    .map_err(failed("clone the mount of the root file system"))?;
                on(&tree, target)
            }
        }
    }
}

fn open_root(bundle: &Path, path: &Path) -> io::Result<OwnedFd> {
    if path.is_absolute() {
        return mount::open_dir(path);
    }
    mount::open_beneath(&mount::open_dir(bundle)?, path.as_os_str())
}

fn check_target(mount: &Mount) -> Result<()> {
    if mount.target.is_empty() || mount.target == "/" {
        return Ok(());
    }
    Err(Error::Argument {
        what: "rootfs mount target",
        value: mount.target.chars().take(120).collect(),
        reason: "only the root can be mounted".to_owned(),
    })
}

fn check(mount: &Mount) -> Result<()> {
    let refuse = |what, value: &str, reason: &str| Error::Argument {
        what,
        value: value.chars().take(120).collect(),
        reason: reason.to_owned(),
    };
    match mount.type_.as_str() {
        "overlay" | "bind" => {}
        kind => {
            return Err(refuse(
                "rootfs mount type",
                kind,
                "only overlay and bind, or one disk with ext2, ext4 or erofs, are supported",
            ));
        }
    }
    check_target(mount)?;
    let prefixes = ["X-containerd.", "uidmap=", "gidmap=", "loop"];
    for text in mount.options.iter().chain([&mount.source]) {
        if text.contains('\0') {
            return Err(refuse("rootfs mount option", text, "it contains a NUL"));
        }
    }
    for option in &mount.options {
        if prefixes.iter().any(|prefix| option.starts_with(prefix)) || option.contains("{{") {
            return Err(refuse("rootfs mount option", option, "it is not supported"));
        }
        let label = option
            .split_once('=')
            .filter(|(key, _)| mount::is_label(key));
        match label {
            Some((_, value)) if value.trim_matches('"').contains('"') => {
                return Err(refuse("rootfs mount option", option, "it contains a quote"));
            }
            None if mount.type_ == "overlay" && option.contains(',') => {
                return Err(refuse("rootfs mount option", option, "it contains a comma"));
            }
            _ => {}
        }
    }
    Ok(())
}

fn attach(request: &Mount, target: &Path) -> Result<()> {
    let options: Vec<&str> = request.options.iter().map(String::as_str).collect();
    if request.type_ == "bind" {
        let failed = |action| {
            let path = PathBuf::from(&request.source);
            move |source| Error::Path {
                action,
                path,
                source,
            }
        };
        let place = mount::open_dir(Path::new(&request.source))
            .map_err(failed("open the root file system"))?;
        let scope = if options.contains(&"rbind") {
            Scope::Recursive
        } else {
            Scope::Top
        };
        let attributes = match options.contains(&"ro") {
            true => MountAttrFlags::MOUNT_ATTR_RDONLY,
            false => MountAttrFlags::empty(),
        };
        let tree = mount::clone_tree(&place, scope, attributes)
            .map_err(failed("clone the mount of the root file system"))?;
        return on(&tree, target);
    }
    let failed = |source| Error::Path {
        action: "mount an overlay on",
        path: target.to_owned(),
        source,
    };
    match mount::overlay(&options) {
        Ok(tree) => on(&tree, target),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            let place = mount::open_dir(target).map_err(failed)?;
            mount::overlay_classic(&options, &place).map_err(failed)
        }
        Err(error) => Err(failed(error)),
    }
}

/// Attaches a detached mount at a path of the share.
pub(crate) fn on(tree: &OwnedFd, target: &Path) -> Result<()> {
    let failed = |source| Error::Path {
        action: "attach a mount at",
        path: target.to_owned(),
        source,
    };
    let place = mount::open_place(target).map_err(failed)?;
    mount::attach(tree, &place).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(kind: &str, source: &str, options: &[&str]) -> Mount {
        Mount {
            type_: kind.into(),
            source: source.into(),
            options: options.iter().map(ToString::to_string).collect(),
            ..Mount::default()
        }
    }

    #[test]
    fn only_listed_types_and_plain_options_are_mounted_b22() {
        let bundle = Path::new("/b");
        let refused = |mount: Mount| {
            let error = Source::new(&[mount], bundle, Path::new("rootfs")).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{error}");
        };
        refused(request("xfs", "/dev/sda", &[]));
        refused(request("erofs", "/x", &["device=/y"]));
        refused(request("format/mkdir/overlay", "overlay", &[]));
        refused(request("overlay", "overlay", &["lowerdir={{ mount 0 }}"]));
        refused(request("overlay", "overlay", &["lowerdir=/a\0b"]));
        refused(request(
            "overlay",
            "overlay",
            &["lowerdir=/a,upperdir=/etc"],
        ));
        refused(request("bind", "/x", &["uidmap=0:1000:1"]));
        refused(request(
            "overlay",
            "overlay",
            &["context=\"u:r:t:s0\",upperdir=\"/etc\""],
        ));
        refused(Mount {
            target: "sub".into(),
            ..request("bind", "/x", &[])
        });
        let good = request(
            "overlay",
            "overlay",
            &["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"],
        );
        assert!(matches!(
            Source::new(&[good], bundle, Path::new("rootfs")),
            Ok(Source::Mounts(_))
        ));
    }

    #[test]
    fn a_label_of_selinux_may_contain_commas() {
        for label in [
            "context=\"system_u:object_r:container_file_t:s0:c1,c2\"",
            "context=system_u:object_r:container_file_t:s0:c1,c2",
        ] {
            let mount = request("overlay", "overlay", &[label, "lowerdir=/a"]);
            Source::new(&[mount], Path::new("/b"), Path::new("rootfs")).unwrap();
        }
    }

    #[test]
    fn a_root_is_private_if_it_was_mounted_for_its_container() {
        assert!(is_private(&[request(
            "overlay",
            "overlay",
            &["lowerdir=/a:/b"]
        )]));
        assert!(is_private(&[request("bind", "/snapshot", &["rbind"])]));
        assert!(
            !is_private(&[]),
            "whoever named the directory may change it"
        );
    }

    #[test]
    fn a_root_outside_or_behind_a_symlink_of_the_bundle_is_refused_b14() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("rootfs")).unwrap();
        std::os::unix::fs::symlink("/etc", dir.path().join("link")).unwrap();
        assert!(open_root(dir.path(), Path::new("rootfs")).is_ok());
        for bad in ["link", "../..", "missing", "rootfs/../.."] {
            assert!(open_root(dir.path(), Path::new(bad)).is_err(), "{bad}");
        }
        assert!(open_root(dir.path(), &dir.path().join("link")).is_err());
        assert!(open_root(dir.path(), &dir.path().join("rootfs")).is_ok());
    }
}
