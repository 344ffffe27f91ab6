//! The kernel's mount interface by descriptors, as far as a pod needs it.
//!
//! A mount is made detached, configured, and only then attached below the share:
//! nothing half-made is ever visible. Never resolves a path below a directory that
//! a guest can write.

use std::{
    ffi::{CString, OsStr},
    io,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::ffi::OsStrExt,
    },
    path::Path,
};

use rustix::{
    fs::{CWD, FileType, FsWord, Mode, OFlags},
    io::Errno,
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
        OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
        fsmount, fsopen, move_mount, open_tree, unmount,
    },
};

/// Longest value that fsconfig(2) takes, in bytes.
const MAX_VALUE: usize = 255;

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
#[derive(Debug, Default)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Which mounts of a tree are meant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The one at the top.
    Top,
    /// All.
    Recursive,
}

/// Opens a directory or file without following a symlink at the end, as a place
/// only.
pub fn open_place(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Opens a place, following symlinks as bind mounts do.
pub fn open_source(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
        path,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

/// Makes a detached copy of the mount at `place`, inert, with further attributes.
///
/// The copy is private: what the host mounts below the original from now on would
/// come without these attributes, and does not come at all. What came while this
/// works has them too.
pub fn clone_tree(
    place: &OwnedFd,
    scope: Scope,
    attributes: MountAttrFlags,
) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    if scope == Scope::Recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    let tree = open_tree(place, c"", flags)?;
    let attr = MountAttr {
        attr_set: u64::from((attributes | INERT).bits()),
        propagation: u64::from(MountPropagationFlags::PRIVATE.bits()),
        ..MountAttr::default()
    };
    set(&tree, &attr, Scope::Recursive)?;
    Ok(tree)
}

/// Sets attributes of a mount, or of a tree of mounts.
pub fn set_attributes<Fd: AsFd>(
    mount: Fd,
    attributes: MountAttrFlags,
    scope: Scope,
) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: u64::from(attributes.bits()),
        ..MountAttr::default()
    };
    set(mount, &attr, scope)
}

/// Gives a detached mount, or a tree of them, the map of ids of a user namespace.
pub fn map_ids<Fd: AsFd>(mount: Fd, users: &OwnedFd, scope: Scope) -> io::Result<()> {
    let attr = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        userns_fd: u64::from(users.as_raw_fd().unsigned_abs()),
        ..MountAttr::default()
    };
    set(mount, &attr, scope)
}

fn set<Fd: AsFd>(mount: Fd, attr: &MountAttr, scope: Scope) -> io::Result<()> {
    let flags = libc::AT_EMPTY_PATH
        | if scope == Scope::Recursive {
            libc::AT_RECURSIVE
        } else {
            0
        };
    let fd = mount.as_fd().as_raw_fd();
    let size = size_of::<MountAttr>();
    // SAFETY: the path is an empty C string, `attr` is a `struct mount_attr` of the
    // first version and `size` bytes long; the kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            fd,
            c"".as_ptr(),
            flags,
            std::ptr::from_ref(attr),
            size,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// What every mount of a share is given: a device node, a set-user-id bit or a
/// program in it means something in the guest, nothing on the host.
const INERT: MountAttrFlags = MountAttrFlags::MOUNT_ATTR_NODEV
    .union(MountAttrFlags::MOUNT_ATTR_NOSUID)
    .union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// Attaches a detached mount at `target`.
pub fn attach(mount: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    Ok(move_mount(mount, c"", target, c"", flags)?)
}

/// Detaches what is mounted at `path`, now or when its last user is gone.
pub fn detach(path: &Path) -> io::Result<()> {
    match unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// What is at a path, as far as that decides how a container gets it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A socket, whatever file system it is on.
    Socket,
    /// A file or directory of a tmpfs with so many bytes.
    Tmpfs(u64),
    /// Anything else, or nothing.
    Other,
}

/// Looks at a path, following symlinks as bind mounts do.
#[must_use]
pub fn look(path: &Path) -> Kind {
    let file_type = |stat: rustix::fs::Stat| FileType::from_raw_mode(stat.st_mode);
    match rustix::fs::stat(path).map(file_type) {
        Ok(FileType::Socket) => Kind::Socket,
        Ok(_) => tmpfs_size(path).map_or(Kind::Other, Kind::Tmpfs),
        Err(_) => Kind::Other,
    }
}

fn tmpfs_size(path: &Path) -> Option<u64> {
    let stat = rustix::fs::statfs(path).ok()?;
    let block = u64::try_from(stat.f_bsize).ok()?;
    (stat.f_type == FsWord::from(libc::TMPFS_MAGIC)).then(|| stat.f_blocks.saturating_mul(block))
}

/// Is the place on a file system whose files are objects of the host's kernel?
pub fn is_kernel_interface(place: &OwnedFd) -> io::Result<bool> {
    const KINDS: [libc::c_long; 8] = [
        libc::PROC_SUPER_MAGIC,
        libc::SYSFS_MAGIC,
        libc::CGROUP_SUPER_MAGIC,
        libc::CGROUP2_SUPER_MAGIC,
        libc::DEBUGFS_MAGIC,
        libc::TRACEFS_MAGIC,
        libc::SECURITYFS_MAGIC,
        libc::DEVPTS_SUPER_MAGIC,
    ];
    let kind = rustix::fs::fstatfs(place)?.f_type;
    Ok(KINDS.iter().any(|magic| kind == FsWord::from(*magic)))
}

/// Mount attributes among the options; the rest is for the file system.
#[must_use]
pub fn split_options<'a>(options: &[&'a str]) -> (MountAttrFlags, Vec<&'a str>) {
    let mut flags = MountAttrFlags::empty();
    let mut rest = Vec::new();
    for option in options {
        flags |= match *option {
            "ro" => MountAttrFlags::MOUNT_ATTR_RDONLY,
            "nosuid" => MountAttrFlags::MOUNT_ATTR_NOSUID,
            "nodev" => MountAttrFlags::MOUNT_ATTR_NODEV,
            "noexec" => MountAttrFlags::MOUNT_ATTR_NOEXEC,
            "noatime" => MountAttrFlags::MOUNT_ATTR_NOATIME,
            "nodiratime" => MountAttrFlags::MOUNT_ATTR_NODIRATIME,
            "rw" | "suid" | "dev" | "exec" | "relatime" | "defaults" => MountAttrFlags::empty(),
            option => {
                rest.push(option);
                MountAttrFlags::empty()
            }
        };
    }
    (flags, rest)
}

/// Makes a detached overlay from the options of mount(8).
pub fn overlay(options: &[&str]) -> io::Result<OwnedFd> {
    let (attributes, rest) = split_options(options);
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_string(&context, "source", "overlay")?;
    for option in rest {
        match option.split_once('=') {
            Some(("lowerdir", layers)) if layers.len() > MAX_VALUE => {
                for layer in split_layers(layers) {
                    fsconfig_set_string(&context, "lowerdir+", layer)?;
                }
            }
            // The quotes are mount(8)'s.
            Some((key, value)) if is_label(key) => {
                fsconfig_set_string(&context, key, value.trim_matches('"'))?;
            }
            Some((key, value)) => fsconfig_set_string(&context, key, value)?,
            None => fsconfig_set_flag(&context, option)?,
        }
    }
    fsconfig_create(&context)?;
    Ok(fsmount(
        &context,
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes | INERT,
    )?)
}

/// Is this the name of an option whose value is an SELinux label? Labels contain
/// commas.
#[must_use]
pub fn is_label(key: &str) -> bool {
    matches!(key, "context" | "fscontext" | "defcontext" | "rootcontext")
}

/// The options as one text of mount(2), in which commas separate them.
fn joined(options: &[&str]) -> String {
    let quoted = options.iter().map(|option| match option.split_once('=') {
        Some((key, value)) if is_label(key) => format!("{key}=\"{}\"", value.trim_matches('"')),
        _ => (*option).to_owned(),
    });
    quoted.collect::<Vec<_>>().join(",")
}

/// Splits `lowerdir=`: layers are separated by colons; a backslash escapes.
fn split_layers(layers: &str) -> Vec<String> {
    let mut list = vec![String::new()];
    let mut chars = layers.chars();
    while let Some(c) = chars.next() {
        let next = match c {
            ':' => {
                list.push(String::new());
                continue;
            }
            '\\' => chars.next().unwrap_or(c),
            c => c,
        };
        if let Some(last) = list.last_mut() {
            last.push(next);
        }
    }
    list
}

/// Mounts an overlay by mount(2), for kernels before 6.7 that take many layers in
/// no other way. Attaches at `target` at once.
pub fn overlay_classic(options: &[&str], target: &OwnedFd) -> io::Result<()> {
    let (attributes, rest) = split_options(options);
    let data = CString::new(joined(&rest))?;
    // The target is reached by its descriptor, not by name.
    let path = format!("/proc/self/fd/{}", target.as_raw_fd());
    rustix::mount::mount(
        "overlay",
        path.as_str(),
        "overlay",
        rustix::mount::MountFlags::empty(),
        data.as_c_str(),
    )?;
    // What is mounted on the target, not the target.
    let mounted = rustix::fs::open(path.as_str(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    set_attributes(&mounted, attributes | INERT, Scope::Top)
}

/// Opens a path that must stay below `dir` and pass no symlink.
pub fn open_beneath(dir: &OwnedFd, path: &OsStr) -> io::Result<OwnedFd> {
    let how = rustix::fs::ResolveFlags::BENEATH
        | rustix::fs::ResolveFlags::NO_SYMLINKS
        | rustix::fs::ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    Ok(rustix::fs::openat2(
        dir,
        path.as_bytes(),
        flags,
        Mode::empty(),
        how,
    )?)
}

/// Opens a directory for looking up names in it.
pub fn open_dir(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::openat(CWD, path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_are_split_at_colons_that_are_not_escaped() {
        assert_eq!(split_layers("/a:/b"), ["/a", "/b"]);
        assert_eq!(split_layers(r"/a\:b:/c\\d"), ["/a:b", r"/c\d"]);
    }

    #[test]
    fn a_label_keeps_its_commas_and_nothing_else_is_quoted() {
        let options = ["index=off", "context=\"u:r:t:s0:c1,c2\"", "lowerdir=/a"];
        assert_eq!(
            joined(&options),
            "index=off,context=\"u:r:t:s0:c1,c2\",lowerdir=/a"
        );
        assert_eq!(
            joined(&["context=u:r:t:s0:c1,c2"]),
            "context=\"u:r:t:s0:c1,c2\""
        );
    }

    #[test]
    fn options_of_the_mount_are_told_from_those_of_the_file_system() {
        let (flags, rest) = split_options(&["ro", "lowerdir=/a", "nosuid", "index=off", "rw"]);
        assert_eq!(
            flags,
            MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID
        );
        assert_eq!(rest, ["lowerdir=/a", "index=off"]);
    }
}
