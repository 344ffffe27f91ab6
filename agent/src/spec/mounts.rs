//! The option strings of a mount.
//!
//! Owns the table from option to attribute bits (OCI runtime specification,
//! config.md, "Linux mount options") and the choice of what is mounted. An
//! option for a bind mount that is not in the table is refused; for another
//! file system it is that file system's own option and the kernel judges it.

use std::path::{Component, Path, PathBuf};

use super::{
    SpecError, oci,
    plan::{Attributes, Filesystem, Mount, MountKind},
};

/// `struct mount_attr` bits (`linux/mount.h`).
mod bit {
    pub(super) const RDONLY: u64 = 0x1;
    pub(super) const NOSUID: u64 = 0x2;
    pub(super) const NODEV: u64 = 0x4;
    pub(super) const NOEXEC: u64 = 0x8;
    pub(super) const ATIME_MASK: u64 = 0x70;
    pub(super) const RELATIME: u64 = 0;
    pub(super) const NOATIME: u64 = 0x10;
    pub(super) const STRICTATIME: u64 = 0x20;
    pub(super) const NODIRATIME: u64 = 0x80;
    pub(super) const NOSYMFOLLOW: u64 = 0x20_0000;
}

/// What an option does to attribute bits: set the first, clear the second.
type Bits = (u64, u64);

fn attribute(option: &str) -> Option<Bits> {
    let bits = match option {
        "ro" => (bit::RDONLY, 0),
        "rw" => (0, bit::RDONLY),
        "nosuid" => (bit::NOSUID, 0),
        "suid" => (0, bit::NOSUID),
        "nodev" => (bit::NODEV, 0),
        "dev" => (0, bit::NODEV),
        "noexec" => (bit::NOEXEC, 0),
        "exec" => (0, bit::NOEXEC),
        "nodiratime" => (bit::NODIRATIME, 0),
        "diratime" => (0, bit::NODIRATIME),
        "nosymfollow" => (bit::NOSYMFOLLOW, 0),
        "symfollow" => (0, bit::NOSYMFOLLOW),
        // The kernel wants the whole field cleared when a part of it is set.
        "relatime" | "atime" | "norelatime" | "nostrictatime" => (bit::RELATIME, bit::ATIME_MASK),
        "noatime" => (bit::NOATIME, bit::ATIME_MASK),
        "strictatime" => (bit::STRICTATIME, bit::ATIME_MASK),
        _ => return None,
    };
    Some(bits)
}

fn add(attributes: &mut Attributes, (set, clear): Bits) {
    // A later option overrides an earlier one.
    let field = set | clear;
    attributes.set = (attributes.set & !field) | set;
    attributes.clear = (attributes.clear & !set) | clear;
}

/// Checks one entry of `mounts`; `at` is its path in the specification.
pub(super) fn mount(at: &str, mount: oci::Mount) -> Result<Mount, SpecError> {
    let options = Options::read(at, &mount)?;
    let kind = options.kind(at, &mount)?;
    destination(at, &mount.destination, &kind)?;
    if !mount.uid_mappings.is_empty() || !mount.gid_mappings.is_empty() {
        return Err(SpecError::value(
            format!("{at}.uidMappings"),
            mount.destination.display(),
            "id-mapped mounts are not supported",
        ));
    }
    Ok(Mount {
        kind,
        destination: mount.destination,
        attributes: options.attributes,
        recursive_attributes: options.recursive_attributes,
    })
}

fn destination(at: &str, path: &Path, kind: &MountKind) -> Result<(), SpecError> {
    let refuse = |reason| SpecError::value(format!("{at}.destination"), path.display(), reason);
    if !path.is_absolute() {
        return Err(refuse("it must be absolute"));
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return Err(refuse("it must not contain NUL"));
    }
    let fs = match kind {
        MountKind::Filesystem { fs, .. } => Some(*fs),
        MountKind::Bind { .. } => None,
        MountKind::Remount => return Ok(()),
    };
    match plain(path).to_str() {
        Some("/") => Err(refuse("the root cannot be a mount's destination")),
        Some("/proc") if fs != Some(Filesystem::Proc) => Err(refuse("only proc goes there")),
        Some("/sys") if fs != Some(Filesystem::Sysfs) => Err(refuse("only sysfs goes there")),
        Some("/dev") if fs != Some(Filesystem::Tmpfs) => Err(refuse("only a tmpfs goes there")),
        Some(text) if text.starts_with("/proc/") && !allowed_in_proc(path) => {
            Err(refuse("nothing can be mounted inside /proc"))
        }
        _ => Ok(()),
    }
}

/// The path without `.` and `..`, as it is where there are no links.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}

/// Whether a file in `/proc` may be covered: those that show the machine and
/// that nothing trusts (lxcfs covers them).
pub(crate) fn allowed_in_proc(path: &Path) -> bool {
    const ALLOWED: [&str; 9] = [
        "cpuinfo",
        "diskstats",
        "loadavg",
        "meminfo",
        "net/dev",
        "slabinfo",
        "stat",
        "swaps",
        "uptime",
    ];
    plain(path)
        .strip_prefix("/proc")
        .is_ok_and(|rest| ALLOWED.iter().any(|file| rest == *file))
}

/// The options of one mount, sorted by what they are for.
#[derive(Debug, Default)]
struct Options {
    attributes: Attributes,
    recursive_attributes: Attributes,
    bind: Option<BindOption>,
    remount: bool,
    data: Vec<(String, Option<String>)>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum BindOption {
    Bind,
    Rbind,
}

impl Options {
    fn read(at: &str, mount: &oci::Mount) -> Result<Self, SpecError> {
        let mut options = Self::default();
        for (n, option) in mount.options.iter().enumerate() {
            options
                .take(option)
                .map_err(|reason| SpecError::value(format!("{at}.options[{n}]"), option, reason))?;
        }
        Ok(options)
    }

    fn take(&mut self, option: &str) -> Result<(), &'static str> {
        if option.contains('\0') {
            return Err("it must not contain NUL");
        }
        if let Some(bits) = attribute(option) {
            add(&mut self.attributes, bits);
            return Ok(());
        }
        if let Some(bits) = option.strip_prefix('r').and_then(attribute) {
            add(&mut self.recursive_attributes, bits);
            return Ok(());
        }
        match option {
            "bind" => self.bind = Some(BindOption::Bind),
            "rbind" => self.bind = Some(BindOption::Rbind),
            "remount" => self.remount = true,
            // Every mount of a container is private already.
            "private" | "rprivate" | "defaults" | "async" | "loud" | "nomand" | "nolazytime"
            | "noiversion" => {}
            "shared" | "rshared" | "slave" | "rslave" => {
                return Err("a container in a virtual machine has private mounts only");
            }
            "unbindable" | "runbindable" => return Err("unbindable mounts are not supported"),
            "idmap" | "ridmap" => return Err("id-mapped mounts are not supported"),
            "tmpcopyup" => return Err("copying up into a tmpfs is not supported"),
            "mand" | "iversion" => return Err("it is not supported"),
            "" => return Err("an option must not be empty"),
            _ => self.data.push(match option.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (option.to_owned(), None),
            }),
        }
        Ok(())
    }

    fn kind(&self, at: &str, mount: &oci::Mount) -> Result<MountKind, SpecError> {
        if self.remount {
            return Ok(MountKind::Remount);
        }
        let kind = mount.kind.as_deref().unwrap_or("");
        let bind = self
            .bind
            .or_else(|| (kind == "bind").then_some(BindOption::Bind));
        if let Some(bind) = bind {
            return self.bind(at, mount, bind);
        }
        let fs = match kind {
            "proc" => Filesystem::Proc,
            "sysfs" => Filesystem::Sysfs,
            "tmpfs" => Filesystem::Tmpfs,
            "ramfs" => Filesystem::Ramfs,
            "devpts" => Filesystem::Devpts,
            "mqueue" => Filesystem::Mqueue,
            "cgroup" | "cgroup2" => Filesystem::Cgroup,
            _ => {
                return Err(SpecError::value(
                    format!("{at}.type"),
                    kind,
                    "only bind, proc, sysfs, tmpfs, ramfs, devpts, mqueue and cgroup are supported",
                ));
            }
        };
        Ok(MountKind::Filesystem {
            fs,
            data: self.data.clone(),
        })
    }

    fn bind(&self, at: &str, mount: &oci::Mount, bind: BindOption) -> Result<MountKind, SpecError> {
        let source = mount.source.clone().unwrap_or_default();
        if !source.is_absolute() {
            return Err(SpecError::value(
                format!("{at}.source"),
                source.display(),
                "the source of a bind mount must be absolute",
            ));
        }
        if let Some((name, _)) = self.data.first() {
            return Err(SpecError::value(
                format!("{at}.options"),
                name,
                "it is not an option of a bind mount",
            ));
        }
        Ok(MountKind::Bind {
            source,
            recursive: bind == BindOption::Rbind,
        })
    }
}
