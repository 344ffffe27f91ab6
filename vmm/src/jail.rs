//! Confinement of the process: what is left of the host once a guest runs.
//!
//! [`enter`] comes after everything is opened and before the first thread:
//!
//! 1. a mount namespace of its own, into which later mounts of the parent still
//!    come, but from which nothing goes out;
//! 2. one directory as the root, the rest of the host detached. No name can be made at
//!    its top. No device, no set-user-id program, no program at all can be used below it;
//! 3. no privilege but what a file server needs.
//!
//! Then each thread seals itself as the first thing it does ([`Confined::spawn`],
//! [`Seal::apply`]), the main thread last ([`Confined::close`]): identity,
//! capabilities and system calls of its kind, as `threads.rs` says in one table.
//! The guest runs after that. What is given up cannot be won back: a user
//! namespace, in which it could be, is behind system calls that no kind may make.
//!
//! `/proc/self/fd`, through which a file server opens what it has found, is a mount of
//! its own that is attached nowhere, so not even `..` leads to the rest of procfs:
//! through `/proc/self/mem` all of this could be undone. What the process holds it can
//! open anew by that way, as root and for writing, whatever it was given it for: so it
//! keeps nothing that is not the share's, the pod's own, or without content.
//!
//! The death of the parent is seen by the end of the control socket: PR_SET_PDEATHSIG
//! would also strike when the parent's *thread* that started this process ends, or
//! when the parent re-executes itself.

mod filter;
pub mod posture;
mod syscalls;
pub mod threads;

use std::{
    io,
    os::fd::{OwnedFd, RawFd},
    path::{Path, PathBuf},
    sync::{Arc, OnceLock, mpsc},
    thread,
};

use rustix::{
    fs::{CWD, Mode, OFlags},
    mount::{MountPropagationFlags, OpenTreeFlags, UnmountFlags, mount_change, open_tree, unmount},
    process::{
        DumpableBehavior, Gid, Resource, Rlimit, Uid, getpid, getrlimit, pivot_root,
        set_dumpable_behavior, setrlimit, umask,
    },
    thread::{
        CapabilitiesSecureBits, CapabilitySet, CapabilitySets, UnshareFlags,
        clear_ambient_capability_set, remove_capability_from_bounding_set, set_capabilities,
        set_capabilities_secure_bits, set_no_new_privs, set_thread_groups, set_thread_res_gid,
        set_thread_res_uid,
    },
};

use self::{
    filter::Filter,
    threads::{DESCRIPTORS, Identity, THREADS, ThreadKind},
};
use crate::config::Jail;

#[cfg(test)]
mod tests;

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
    /// procfs could not be used.
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
    /// The report of blocked system calls could not be prepared.
    #[error("Cannot prepare for blocked system calls")]
    Filters(#[source] io::Error),
    /// A thread could not be confined.
    #[error("Cannot confine a thread of the kind {kind:?}")]
    Thread {
        /// Which kind.
        kind: ThreadKind,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Proof that [`enter`] has run, and what is needed of the place.
#[derive(Debug)]
pub struct Confined {
    proc_self_fd: OwnedFd,
    rules: Option<Arc<Rules>>,
    sealed: mpsc::Sender<Result<(), Error>>,
    reports: mpsc::Receiver<Result<(), Error>>,
}

/// What threads seal themselves with.
#[derive(Debug)]
struct Rules {
    /// User and group of the pod.
    user: u32,
    /// In the order of [`ThreadKind::ALL`], made by the first thread of the kind.
    filters: [OnceLock<Filter>; ThreadKind::ALL.len()],
}

/// Lets a system call that a thread must not make be reported to `report`, which
/// stays open as long as the process, as a [`Report`](crate::exit::Report). Without
/// this such a call ends the process all the same, by SIGSYS.
pub fn report_violations(report: Option<RawFd>) -> Result<(), Error> {
    filter::report_violations(report).map_err(Error::Filters)
}

/// Confines the process, which has one thread; without a jail it stays as it is.
///
/// With a jail the process is root, the first of its PID namespace, and
/// `jail.root` is a mount point.
pub fn enter(jail: Option<&Jail>) -> Result<Confined, Error> {
    let (sealed, reports) = mpsc::channel();
    let Some(jail) = jail else {
        let proc_self_fd = open_directory("/proc/self/fd").map_err(Error::Proc)?;
        return Ok(Confined {
            proc_self_fd,
            rules: None,
            sealed,
            reports,
        });
    };
    let pid = getpid().as_raw_nonzero().get();
    if pid != 1 {
        return Err(Error::NotFirst { pid });
    }
    let rules = Rules {
        user: jail.user,
        filters: Default::default(),
    };
    leave_mount_namespace().map_err(Error::Namespace)?;
    let proc_self_fd = own_proc_self_fd().map_err(Error::Proc)?;
    change_root(&jail.root).map_err(|source| Error::Root {
        root: jail.root.clone(),
        source,
    })?;
    leave_keyring().map_err(Error::Privileges)?;
    set_limits().map_err(Error::Limits)?;
    give_up_privileges().map_err(Error::Privileges)?;
    Ok(Confined {
        proc_self_fd,
        rules: Some(Arc::new(rules)),
        sealed,
        reports,
    })
}

impl Confined {
    /// What a thread of this kind puts on before it serves the guest.
    #[must_use]
    pub fn seal(&self, kind: ThreadKind) -> Seal {
        Seal {
            kind,
            rules: self.rules.clone(),
        }
    }

    /// Starts a thread that seals itself as one of this kind and then runs `body`.
    /// [`Confined::close`] waits until it is sealed.
    pub fn spawn(
        &self,
        kind: ThreadKind,
        name: String,
        body: impl FnOnce() + Send + 'static,
    ) -> io::Result<thread::JoinHandle<()>> {
        let seal = self.seal(kind);
        let sealed = self.sealed.clone();
        thread::Builder::new().name(name).spawn(move || {
            let outcome = seal.apply();
            let go_on = outcome.is_ok();
            // Nobody listens if the machine does not come to run.
            let told = sealed.send(outcome.map_err(|source| Error::Thread { kind, source }));
            drop(sealed);
            if go_on && told.is_ok() {
                body();
            }
        })
    }

    /// Waits until every thread is sealed, and seals the calling one as
    /// [`ThreadKind::Main`].
    pub fn close(self) -> Result<(), Error> {
        let kind = ThreadKind::Main;
        let seal = self.seal(kind);
        drop(self.sealed);
        for outcome in self.reports {
            outcome?;
        }
        seal.apply()
            .map_err(|source| Error::Thread { kind, source })
    }

    /// Where a directory that was meant by its name outside is now: a jail has
    /// only the one.
    pub(crate) fn place_of<'a>(&self, dir: &'a Path) -> &'a Path {
        if self.rules.is_some() {
            Path::new("/")
        } else {
            dir
        }
    }

    /// Does something as the pod's user, to whom the host charges what it counts by
    /// users. The calling thread is not sealed yet; its capabilities stay.
    pub(crate) fn as_pod<T>(&self, what: impl FnOnce() -> T) -> io::Result<T> {
        let Some(rules) = &self.rules else {
            return Ok(what());
        };
        let user = Uid::from_raw(rules.user);
        set_thread_res_uid(Uid::ROOT, user, Uid::ROOT)?;
        let done = what();
        set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
        Ok(done)
    }

    /// The directory of this process's descriptors in procfs.
    pub(crate) fn proc_self_fd(&self) -> io::Result<OwnedFd> {
        self.proc_self_fd.try_clone()
    }
}

/// Identity, capabilities and system calls of a kind of thread.
#[derive(Clone, Debug)]
pub struct Seal {
    kind: ThreadKind,
    rules: Option<Arc<Rules>>,
}

impl Seal {
    /// Confines the calling thread, and those that it will start, for good. Does
    /// nothing without a jail.
    ///
    /// The thread has the capabilities with which the process was confined.
    pub fn apply(&self) -> io::Result<()> {
        let Some(rules) = &self.rules else {
            return Ok(());
        };
        set_thread_groups(&[])?;
        if self.kind.identity() == Identity::Pod {
            let (user, group) = (Uid::from_raw(rules.user), Gid::from_raw(rules.user));
            set_thread_res_gid(group, group, group)?;
            set_thread_res_uid(user, user, user)?;
        }
        set_capabilities(None, only(self.kind.capabilities()))?;
        rules.filter(self.kind)?.install()
    }
}

impl Seal {
    /// Confines the calling thread, which was started by one that is sealed, further: to
    /// what its own kind may do of what that one may.
    pub fn narrow(&self) -> io::Result<()> {
        match &self.rules {
            Some(rules) => rules.filter(self.kind)?.install(),
            None => Ok(()),
        }
    }
}

impl Rules {
    fn filter(&self, kind: ThreadKind) -> io::Result<&Filter> {
        let mut filters = ThreadKind::ALL.iter().zip(&self.filters);
        let filter = filters.find(|(other, _)| **other == kind);
        let (_, filter) = filter.ok_or(io::ErrorKind::NotFound)?;
        Ok(filter.get_or_init(|| Filter::new(kind)))
    }
}

fn leave_mount_namespace() -> io::Result<()> {
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

/// A copy of the mount that begins at this directory. It is what the parent's procfs
/// calls this process, whose number there is not its own.
fn own_proc_self_fd() -> io::Result<OwnedFd> {
    Ok(open_tree(
        CWD,
        "/proc/self/fd",
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC,
    )?)
}

fn open_directory(path: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(
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
    // Devices, set-user-id bits and programs mean nothing in any mount that is here
    // now. Later ones come as the parent makes them.
    let inert = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NOEXEC;
    set_attributes_of_root(inert, libc::AT_RECURSIVE)?;
    // Containers come and go at the top: nobody here plants a name there.
    set_attributes_of_root(libc::MOUNT_ATTR_RDONLY, 0)
}

/// Sets attributes of the mount `/`, and with AT_RECURSIVE of those below it.
fn set_attributes_of_root(attributes: u64, flags: libc::c_int) -> io::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: attributes,
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
            flags,
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
    setrlimit(Resource::Nproc, limit(THREADS))?;
    // Guest memory must not end up in a file of the host, nor in a program that
    // collects such files. (No limit of file size: it would be the guest's.)
    setrlimit(Resource::Core, limit(0))?;
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    umask(Mode::empty());
    Ok(())
}

/// Root's keyrings, which every process of root possesses through its session,
/// stay behind.
fn leave_keyring() -> io::Result<()> {
    /// `KEYCTL_JOIN_SESSION_KEYRING`.
    const JOIN: libc::c_int = 1;
    let unnamed = std::ptr::null::<libc::c_char>();
    // SAFETY: takes a number and a null pointer, which asks for a new keyring.
    let serial = unsafe { libc::syscall(libc::SYS_keyctl, JOIN, unnamed) };
    let error = io::Error::last_os_error();
    // A kernel without keyrings has none to leave.
    if serial >= 0 || error.raw_os_error() == Some(libc::ENOSYS) {
        Ok(())
    } else {
        Err(error)
    }
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
    Ok(set_capabilities(
        None,
        only(ThreadKind::Files.capabilities()),
    )?)
}

fn only(set: CapabilitySet) -> CapabilitySets {
    CapabilitySets {
        effective: set,
        permitted: set,
        inheritable: CapabilitySet::empty(),
    }
}
