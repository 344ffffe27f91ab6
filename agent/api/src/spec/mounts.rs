//! The mounts of a container.
//!
//! Owns the tables from option strings to attribute bits (OCI runtime
//! specification, config.md, "Linux mount options") and of the options that each
//! file system has of its own, and the choice of what is mounted.

use std::path::{Path, PathBuf};

use crate::spec::{
    Error, Note,
    check::{absolute, id_maps, plain},
    oci,
    plan::{Attributes, Filesystem, Mount, MountIds, MountKind},
};

/// `struct mount_attr` bits (`linux/mount.h`).
mod bit {
    pub(super) const RDONLY: u64 = crate::spec::plan::Attributes::RDONLY;
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

/// Attribute options: the bits that each sets and clears. With an `r` before it an
/// option counts for the whole tree.
const ATTRIBUTES: [(&str, u64, u64); 18] = [
    ("ro", bit::RDONLY, 0),
    ("rw", 0, bit::RDONLY),
    ("nosuid", bit::NOSUID, 0),
    ("suid", 0, bit::NOSUID),
    ("nodev", bit::NODEV, 0),
    ("dev", 0, bit::NODEV),
    ("noexec", bit::NOEXEC, 0),
    ("exec", 0, bit::NOEXEC),
    ("nodiratime", bit::NODIRATIME, 0),
    ("diratime", 0, bit::NODIRATIME),
    ("nosymfollow", bit::NOSYMFOLLOW, 0),
    ("symfollow", 0, bit::NOSYMFOLLOW),
    // The kernel wants the whole field cleared when a part of it is set.
    ("relatime", bit::RELATIME, bit::ATIME_MASK),
    ("atime", bit::RELATIME, bit::ATIME_MASK),
    ("norelatime", bit::RELATIME, bit::ATIME_MASK),
    ("nostrictatime", bit::RELATIME, bit::ATIME_MASK),
    ("noatime", bit::NOATIME, bit::ATIME_MASK),
    ("strictatime", bit::STRICTATIME, bit::ATIME_MASK),
];

/// Options that say what is the case anyway, or that have no meaning in Linux.
const WITHOUT_EFFECT: [&str; 13] = [
    "private",
    "rprivate",
    "defaults",
    "async",
    "loud",
    "silent",
    "nomand",
    "mand",
    "nolazytime",
    "noiversion",
    "iversion",
    "acl",
    "noacl",
];

/// Options of any file system of its own.
const OF_ANY: [&str; 3] = ["sync", "dirsync", "lazytime"];

/// Labels of the host's SELinux.
const LABELS: [&str; 4] = ["context", "fscontext", "defcontext", "rootcontext"];

/// The options that a file system has of its own.
fn options_of(fs: Filesystem) -> &'static [&'static str] {
    match fs {
        Filesystem::Proc => &["gid", "hidepid", "subset"],
        Filesystem::Tmpfs => &[
            "gid",
            "grpquota",
            "grpquota_block_hardlimit",
            "grpquota_inode_hardlimit",
            "huge",
            "inode32",
            "inode64",
            "mode",
            "mpol",
            "noswap",
            "nr_blocks",
            "nr_inodes",
            "quota",
            "size",
            "uid",
            "usrquota",
            "usrquota_block_hardlimit",
            "usrquota_inode_hardlimit",
        ],
        Filesystem::Ramfs => &["mode"],
        Filesystem::Devpts => &["gid", "max", "mode", "newinstance", "ptmxmode", "uid"],
        Filesystem::Cgroup => &[
            "favordynmods",
            "memory_hugetlb_accounting",
            "memory_localevents",
            "memory_recursiveprot",
            "nsdelegate",
            "pids_localevents",
        ],
        Filesystem::Sysfs | Filesystem::Mqueue => &[],
    }
}

/// The file systems that a container can mount, by their names in a specification.
const FILESYSTEMS: [(&str, Filesystem); 8] = [
    ("proc", Filesystem::Proc),
    ("sysfs", Filesystem::Sysfs),
    ("tmpfs", Filesystem::Tmpfs),
    ("ramfs", Filesystem::Ramfs),
    ("devpts", Filesystem::Devpts),
    ("mqueue", Filesystem::Mqueue),
    ("cgroup", Filesystem::Cgroup),
    ("cgroup2", Filesystem::Cgroup),
];

impl oci::Mount {
    /// Whether it shows a file or directory of the host.
    #[must_use]
    pub fn is_bind(&self) -> bool {
        let has = |name| self.options.iter().any(|option| option == name);
        !has("remount") && (self.kind == "bind" || has("bind") || has("rbind"))
    }

    /// Whether it shows a socket of the host, and says so itself.
    #[must_use]
    pub fn is_socket(&self) -> bool {
        self.kind == "uds"
    }

    /// Where it is, seen from the container's root.
    #[must_use]
    pub fn place(&self) -> PathBuf {
        Path::new("/").join(&self.destination)
    }
}

/// Takes the map of ids out of a bind mount; whoever has the files applies it. Where the
/// mount has none of its own, its options mean that of the container, `users`.
pub fn take_id_map(
    at: &str,
    mount: &mut oci::Mount,
    users: (&[oci::IdMapping], &[oci::IdMapping]),
) -> Result<Option<MountIds>, Error> {
    let asked = |option: &String| matches!(option.as_str(), "idmap" | "ridmap");
    let option = mount.options.iter().rfind(|option| asked(option)).cloned();
    mount.options.retain(|option| !asked(option));
    let own = (
        std::mem::take(&mut mount.uid_mappings),
        std::mem::take(&mut mount.gid_mappings),
    );
    let (uids, gids) = match (own.0.is_empty() && own.1.is_empty(), &option) {
        (true, None) => return Ok(None),
        (true, Some(option)) if users.0.is_empty() || users.1.is_empty() => {
            let reason = "neither the mount nor the container has a map of ids";
            return Err(Error::new(format!("{at}.options"), option, reason));
        }
        (true, Some(_)) => users,
        (false, _) => (own.0.as_slice(), own.1.as_slice()),
    };
    Ok(Some(MountIds {
        uids: id_maps(&format!("{at}.uidMappings"), uids)?,
        gids: id_maps(&format!("{at}.gidMappings"), gids)?,
        recursive: option.is_some_and(|option| option == "ridmap"),
    }))
}

/// Judges a mount of type `uds`, which whoever has the sockets turns into one of the
/// guest's.
pub fn socket(at: &str, mount: &oci::Mount) -> Result<(), Error> {
    if !mount.options.is_empty() {
        let reason = "a mount of type uds has none";
        return Err(Error::new(format!("{at}.options"), &mount.options, reason));
    }
    absolute(&format!("{at}.source"), mount.source.clone()).map(drop)
}

/// Judges one of `mounts`; `at` is its place in the specification.
pub(crate) fn mount(at: &str, mount: oci::Mount, notes: &mut Vec<Note>) -> Result<Mount, Error> {
    for (name, mappings) in [
        ("uidMappings", &mount.uid_mappings),
        ("gidMappings", &mount.gid_mappings),
    ] {
        if !mappings.is_empty() {
            let reason = "only files of the host have a map of ids";
            return Err(Error::new(format!("{at}.{name}"), mappings, reason));
        }
    }
    let place = mount.place();
    let is_bind = mount.is_bind();
    let mut options = Options::default();
    for (n, option) in mount.options.into_iter().enumerate() {
        let at = format!("{at}.options[{n}]");
        match options.take(&option) {
            Ok(None) => {}
            Ok(Some(remark)) => notes.push(remark.of(at)),
            Err(reason) => return Err(Error::new(at, option, reason)),
        }
    }
    let kind = if options.remount {
        MountKind::Remount
    } else if is_bind {
        options.bind(at, mount.source)?
    } else {
        options.filesystem(at, mount.kind)?
    };
    if mount.destination.as_os_str().is_empty() {
        return Err(Error::missing(format!("{at}.destination")));
    }
    let destination = absolute(&format!("{at}.destination"), place)?;
    if let Some(reason) = refused_place(&destination, &kind) {
        return Err(Error::new(format!("{at}.destination"), destination, reason));
    }
    Ok(Mount {
        destination,
        kind,
        attributes: options.attributes,
        recursive_attributes: options.recursive_attributes,
    })
}

fn refused_place(path: &Path, kind: &MountKind) -> Option<&'static str> {
    let fs = match kind {
        MountKind::Filesystem { fs, .. } => Some(*fs),
        MountKind::Bind { .. } => None,
        MountKind::Remount => return None,
    };
    match plain(path).to_str()? {
        "/" => Some("the root cannot be a mount's destination"),
        "/proc" if fs != Some(Filesystem::Proc) => Some("only proc goes there"),
        "/sys" if fs != Some(Filesystem::Sysfs) => Some("only sysfs goes there"),
        "/dev" if fs != Some(Filesystem::Tmpfs) => Some("only a tmpfs goes there"),
        text if text.starts_with("/proc/") && !allowed_in_proc(path) => {
            Some("nothing can be mounted inside /proc")
        }
        _ => None,
    }
}

/// Whether a file in `/proc` may be covered: those that show the machine and
/// that nothing trusts (lxcfs covers them).
#[must_use]
pub fn allowed_in_proc(path: &Path) -> bool {
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

/// What is to be said of an option.
#[derive(Clone, Copy, Debug)]
enum Remark {
    /// A slave is private.
    Private,
    /// It is a label.
    Label,
}

impl Remark {
    fn of(self, field: String) -> Note {
        match self {
            Remark::Private => {
                Note::changed(field, "private: later mounts of the host do not pass")
            }
            Remark::Label => Note::label(field),
        }
    }
}

/// The options of one mount, sorted by what they are for.
#[derive(Debug, Default)]
struct Options {
    attributes: Attributes,
    recursive_attributes: Attributes,
    recursive: bool,
    remount: bool,
    copy_up: bool,
    /// What only a file system itself can know.
    own: Vec<(String, Option<String>)>,
}

fn attribute(option: &str) -> Option<(u64, u64)> {
    let found = ATTRIBUTES.iter().find(|(name, ..)| *name == option);
    found.map(|(_, set, clear)| (*set, *clear))
}

fn add(attributes: &mut Attributes, (set, clear): (u64, u64)) {
    // A later option overrides an earlier one.
    let field = set | clear;
    attributes.set = (attributes.set & !field) | set;
    attributes.clear = (attributes.clear & !set) | clear;
}

impl Options {
    fn take(&mut self, option: &str) -> Result<Option<Remark>, &'static str> {
        if option.contains('\0') {
            return Err("it must not contain NUL");
        }
        if let Some(bits) = attribute(option) {
            add(&mut self.attributes, bits);
            return Ok(None);
        }
        if let Some(bits) = option.strip_prefix('r').and_then(attribute) {
            add(&mut self.recursive_attributes, bits);
            return Ok(None);
        }
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match option {
            "bind" => self.recursive = false,
            "rbind" => self.recursive = true,
            "remount" => self.remount = true,
            "tmpcopyup" => self.copy_up = true,
            "slave" | "rslave" => return Ok(Some(Remark::Private)),
            "shared" | "rshared" => {
                return Err("mounts do not pass between host and virtual machine");
            }
            "unbindable" | "runbindable" => return Err("unbindable mounts are not supported"),
            "idmap" | "ridmap" => return Err("only files of the host have a map of ids"),
            "" => return Err("an option must not be empty"),
            _ if WITHOUT_EFFECT.contains(&option) => {}
            _ if LABELS.contains(&name) => return Ok(Some(Remark::Label)),
            _ => self.own.push((name.to_owned(), value.map(str::to_owned))),
        }
        Ok(None)
    }

    fn filesystem(&mut self, at: &str, kind: String) -> Result<MountKind, Error> {
        let Some((_, fs)) = FILESYSTEMS.iter().find(|(name, _)| *name == kind) else {
            let reason = "only bind, uds, proc, sysfs, tmpfs, ramfs, devpts, mqueue and cgroup are supported";
            return Err(Error::new(format!("{at}.type"), kind, reason));
        };
        let known = |name: &str| OF_ANY.contains(&name) || options_of(*fs).contains(&name);
        if let Some((name, _)) = self.own.iter().find(|(name, _)| !known(name)) {
            let reason = format!("it is not an option of {kind}");
            return Err(Error::new(format!("{at}.options"), name, reason));
        }
        if self.copy_up && *fs != Filesystem::Tmpfs {
            let reason = "only a tmpfs can begin with a copy";
            return Err(Error::new(format!("{at}.options"), "tmpcopyup", reason));
        }
        Ok(MountKind::Filesystem {
            fs: *fs,
            data: std::mem::take(&mut self.own),
            copy_up: self.copy_up,
        })
    }

    fn bind(&self, at: &str, source: PathBuf) -> Result<MountKind, Error> {
        // Of the file system that is shown there, which has them already.
        let known = |name: &str| OF_ANY.contains(&name);
        if let Some((name, _)) = self.own.iter().find(|(name, _)| !known(name)) {
            let reason = "it is not an option of a bind mount";
            return Err(Error::new(format!("{at}.options"), name, reason));
        }
        if self.copy_up {
            let reason = "only a tmpfs can begin with a copy";
            return Err(Error::new(format!("{at}.options"), "tmpcopyup", reason));
        }
        Ok(MountKind::Bind {
            source: absolute(&format!("{at}.source"), source)?,
            recursive: self.recursive,
        })
    }
}
