//! Confinement of the process: what is left of the host once a guest runs.
//!
//! [`enter`] comes after everything is opened and before the first thread:
//!
//! 1. a mount namespace of its own, into which later mounts of the parent still
//!    come, but from which nothing goes out;
//! 2. one directory as the root, the rest of the host detached. No device, no
//!    set-user-id program, no program at all can be used below it;
//! 3. no privilege but what a file server needs, and no way to get one back.
//!
//! Then the file system's threads start, which keep those privileges, then
//! [`Confined::drop_capabilities`] takes them from the calling thread and so from
//! each thread that it starts afterwards.
//!
//! The capabilities of the file server are those by which root in a container
//! acts on its own files, and no more:
//!
//! | capability | for |
//! | --- | --- |
//! | CHOWN, FOWNER, FSETID | owners and modes as the guest says |
//! | DAC_OVERRIDE | the guest has checked permissions, the host must not again |
//! | SETUID, SETGID | a new file belongs to whoever made it |
//! | SETFCAP | capabilities of programs, as package managers set them |
//! | MKNOD | device nodes in an image being built; nobody can open them here |
//!
//! Not among them: DAC_READ_SEARCH, with which files can be opened by handle. It
//! would save descriptors, but reaches everything on the file system of which the
//! share is a part.
//!
//! `/proc/self/fd`, through which a file server opens what it has found, is the
//! one directory of an unnamed procfs that shows processes of this PID namespace
//! only, and nothing but processes. Nothing else of it can be named.
//!
//! The death of the parent is not watched here but through `config::alive`:
//! PR_SET_PDEATHSIG would also strike when the parent's *thread* that started
//! this process ends, or when the parent re-executes itself.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{
        FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, UnmountFlags,
        fsconfig_create, fsconfig_set_string, fsmount, fsopen, mount_change, unmount,
    },
    process::{
        DumpableBehavior, Resource, Rlimit, getpid, getrlimit, pivot_root, set_dumpable_behavior,
        setrlimit, umask,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_no_new_privs,
    },
};

use crate::config::Jail;

#[cfg(test)]
mod tests;

/// What the threads of the file system keep.
const FILE_SERVER: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::MKNOD);

/// Most descriptors, if the parent allows that many: each file that the guest
/// knows is one.
const DESCRIPTORS: u64 = 1 << 20;

/// Why the process could not be confined. It must not run a guest then.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The parent did not make a PID namespace.
    #[error("Process {pid} is not the first of a PID namespace")]
    NotFirst {
        /// Its number in the namespace in which it is.
        pid: i32,
    },
    /// The mount namespace could not be made.
    #[error("Cannot make a mount namespace")]
    Namespace(#[source] io::Error),
    /// procfs could not be made or used.
    #[error("Cannot open /proc/self/fd")]
    Proc(#[source] io::Error),
    /// The root could not be changed.
    #[error("Cannot make {root:?} the root: it must be a mount point")]
    Root {
        /// The directory.
        root: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A limit could not be set.
    #[error("Cannot set the limits of the process")]
    Limits(#[source] io::Error),
    /// A privilege could not be given up.
    #[error("Cannot give privileges up")]
    Privileges(#[source] io::Error),
}

/// Proof that [`enter`] has run, and what is needed of the place.
#[derive(Debug)]
pub struct Confined {
    jailed: bool,
    proc_self_fd: OwnedFd,
}

/// Confines the process, which has one thread; without a jail it stays as it is.
///
/// With a jail the process is root, the first of its PID namespace, and
/// `jail.root` is a mount point.
pub fn enter(jail: Option<&Jail>) -> Result<Confined, Error> {
    let Some(jail) = jail else {
        let proc_self_fd = open_directory(CWD, "/proc/self/fd").map_err(Error::Proc)?;
        return Ok(Confined {
            jailed: false,
            proc_self_fd,
        });
    };
    let pid = getpid().as_raw_nonzero().get();
    if pid != 1 {
        return Err(Error::NotFirst { pid });
    }
    leave_mount_namespace().map_err(Error::Namespace)?;
    let proc_self_fd = own_proc_self_fd().map_err(Error::Proc)?;
    change_root(&jail.root).map_err(|source| Error::Root {
        root: jail.root.clone(),
        source,
    })?;
    set_limits().map_err(Error::Limits)?;
    give_up_privileges().map_err(Error::Privileges)?;
    Ok(Confined {
        jailed: true,
        proc_self_fd,
    })
}

impl Confined {
    /// Takes all capabilities from the calling thread, and from those that it
    /// will start. Threads that run already keep theirs.
    ///
    /// Does nothing without a jail.
    pub fn drop_capabilities(&self) -> Result<(), Error> {
        if self.jailed {
            set_capabilities(None, only(CapabilitySet::empty()))
                .map_err(|errno| Error::Privileges(errno.into()))?;
        }
        Ok(())
    }

    /// Where a directory that was meant by its name outside is now: a jail has
    /// only the one.
    pub(crate) fn place_of<'a>(&self, dir: &'a Path) -> &'a Path {
        if self.jailed { Path::new("/") } else { dir }
    }

    /// The directory of this process's descriptors in procfs.
    pub(crate) fn proc_self_fd(&self) -> io::Result<OwnedFd> {
        self.proc_self_fd.try_clone()
    }
}

fn leave_mount_namespace() -> io::Result<()> {
    // The parent should have made one. Made here, a mistake there cannot change
    // the mounts of the host.
    // SAFETY: the process has one thread, so nothing else relies on the namespace
    // and the file system context that become its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }?;
    // Mounts still come in from the parent; none of ours go out.
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )?;
    Ok(())
}

fn own_proc_self_fd() -> io::Result<OwnedFd> {
    let context = fsopen("proc", FsOpenFlags::FSOPEN_CLOEXEC)?;
    // Without it the first process of the namespace could write to /proc/sys.
    fsconfig_set_string(context.as_fd(), "subset", "pid")?;
    fsconfig_create(context.as_fd())?;
    let proc = fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC,
    )?;
    open_directory(&proc, "self/fd")
}

fn open_directory(at: impl AsFd, path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::openat(
        at,
        path,
        OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )?)
}

fn change_root(root: &Path) -> io::Result<()> {
    rustix::process::chdir(root)?;
    // The old root ends up on top of the new one and is taken away from there.
    pivot_root(".", ".")?;
    unmount(".", UnmountFlags::DETACH)?;
    rustix::process::chdir("/")?;
    harden_mounts()
}

/// Devices, set-user-id bits and programs mean nothing in any mount that is here
/// now. Later ones come as the parent makes them.
fn harden_mounts() -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    // SAFETY: the path is a string with its end, `attributes` has the size given
    // and is only read.
    let outcome = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            libc::AT_FDCWD,
            c"/".as_ptr(),
            libc::AT_RECURSIVE,
            &raw const attributes,
            size_of_val(&attributes),
        )
    };
    if outcome == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

fn set_limits() -> io::Result<()> {
    let maximum = getrlimit(Resource::Nofile)
        .maximum
        .map_or(DESCRIPTORS, |maximum| maximum.min(DESCRIPTORS));
    let limit = |value| Rlimit {
        current: Some(value),
        maximum: Some(value),
    };
    setrlimit(Resource::Nofile, limit(maximum))?;
    // Guest memory must not end up in a file of the host, nor in a program that
    // collects such files. (No limit of file size: it would be the guest's.)
    setrlimit(Resource::Core, limit(0))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    umask(Mode::empty());
    Ok(())
}

fn give_up_privileges() -> io::Result<()> {
    set_no_new_privs(true)?;
    clear_ambient_capability_set()?;
    // To be root means nothing any more, for whatever is executed, and a change
    // of identity neither takes nor gives capabilities. Nobody can undo it.
    set_capabilities_secure_bits(
        CapabilitiesSecureBits::NO_ROOT
            | CapabilitiesSecureBits::NO_ROOT_LOCKED
            | CapabilitiesSecureBits::NO_SETUID_FIXUP
            | CapabilitiesSecureBits::NO_SETUID_FIXUP_LOCKED
            | CapabilitiesSecureBits::KEEP_CAPS_LOCKED
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE
            | CapabilitiesSecureBits::NO_CAP_AMBIENT_RAISE_LOCKED,
    )?;
    for number in 0..64 {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << number)) {
            Ok(()) => {}
            // The kernel knows fewer.
            Err(rustix::io::Errno::INVAL) if number > 0 => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(set_capabilities(None, only(FILE_SERVER))?)
}

fn only(set: CapabilitySet) -> CapabilitySets {
    CapabilitySets {
        effective: set,
        permitted: set,
        inheritable: CapabilitySet::empty(),
    }
}
