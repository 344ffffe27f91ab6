//! System calls that no library offers safely: one small function each.
//!
//! Owns every raw system call of the agent. Promises that a function here does
//! what its name says and nothing more, and that a safe one cannot break memory
//! or descriptor safety whatever its arguments are.

use std::{
    ffi::CStr,
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr,
};

use tokio::io::{Interest, unix::AsyncFd};

use crate::spec::plan::{Attributes, Scheduler, Seccomp};

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

/// Where [`clone_process`] returned.
#[derive(Debug)]
pub(crate) enum Cloned {
    /// In the new process.
    Child,
    /// In the caller: the new process's id in the caller's namespace.
    Parent(u32),
}

/// Makes a copy of the calling process, as a *sibling*: its parent is the
/// caller's parent. It starts in the given cgroup, or in the caller's.
///
/// # Safety
/// The process must have one thread only: another one could hold a lock (of
/// the allocator, say) that nobody would ever release in the copy.
pub(crate) unsafe fn clone_process(
    namespaces: i32,
    cgroup: Option<BorrowedFd<'_>>,
) -> io::Result<Cloned> {
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    let flags = namespaces | libc::CLONE_PARENT;
    // SAFETY: clone_args is plain integers, for which all zero is a value.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    // The exit signal stays 0: with CLONE_PARENT it is the caller's own.
    args.flags = u64::from(flags.cast_unsigned());
    if let Some(cgroup) = cgroup {
        args.flags |= CLONE_INTO_CGROUP;
        args.cgroup = u64::from(cgroup.as_raw_fd().cast_unsigned());
    }
    // SAFETY: `args` is a whole clone_args; without CLONE_VM the child has a
    // copy of this stack, and the caller promises that there is one thread.
    let result = unsafe {
        libc::syscall(
            libc::SYS_clone3,
            &raw mut args,
            size_of::<libc::clone_args>(),
        )
    };
    match u32::try_from(check(result)?) {
        Ok(0) => Ok(Cloned::Child),
        Ok(pid) => Ok(Cloned::Parent(pid)),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

/// `mount_setattr(2)` on the mount that `mount` refers to.
pub(crate) fn set_mount_attributes(
    mount: impl AsFd,
    recursive: bool,
    attributes: Attributes,
) -> io::Result<()> {
    mount_setattr(mount, recursive, attributes, 0)
}

/// Makes the mount that `mount` refers to and all below it private.
pub(crate) fn make_mounts_private(mount: impl AsFd) -> io::Result<()> {
    mount_setattr(mount, true, Attributes::default(), libc::MS_PRIVATE)
}

fn mount_setattr(
    mount: impl AsFd,
    recursive: bool,
    attributes: Attributes,
    propagation: libc::c_ulong,
) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attributes.set,
        attr_clr: attributes.clear,
        propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the path is an empty C string and `attr` a whole mount_attr; the
    // kernel only reads both.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// Loads a system call filter into the calling thread.
pub(crate) fn load_seccomp(seccomp: &Seccomp) -> io::Result<()> {
    let len = u16::try_from(seccomp.filter.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    let program = libc::sock_fprog {
        len,
        // An instruction is eight bytes; the kernel copies them unaligned.
        filter: seccomp.filter.as_ptr().cast_mut().cast(),
    };
    // SAFETY: `program` names `len` instructions of eight bytes each in
    // `seccomp.filter`, which outlives the call; the kernel only reads them.
    let result = unsafe {
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            seccomp.flags,
            &raw const program,
        )
    };
    check(result).map(drop)
}

/// Gives the calling process the session keyring of this name, which is made if
/// it is not there and which others of the same user can then join.
///
/// A kernel without keyrings is fine: there is nothing to share then.
pub(crate) fn join_session_keyring(name: &CStr) -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    const KEYCTL_SETPERM: libc::c_int = 5;
    /// Who holds it may do all, its user view, read, search and link.
    const PERMISSIONS: u32 = 0x3f1b_0000;
    // SAFETY: `name` is a C string, which the kernel only reads.
    let result =
        unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, name.as_ptr()) };
    let keyring = match check(result) {
        Err(e) if e.raw_os_error() == Some(libc::ENOSYS) => return Ok(()),
        result => result?,
    };
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_SETPERM, keyring, PERMISSIONS) })
        .map(drop)
}

/// `personality(2)`.
pub(crate) fn set_personality(persona: u32) -> io::Result<()> {
    // SAFETY: the call takes a number only.
    check(unsafe { libc::personality(persona.into()) }.into()).map(drop)
}

/// `ioprio_set(2)` for the calling thread.
pub(crate) fn set_io_priority(priority: i32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    // SAFETY: the call takes numbers only.
    let result = unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, 0, priority) };
    check(result).map(drop)
}

/// `sched_setattr(2)` for the calling thread.
pub(crate) fn set_scheduler(scheduler: &Scheduler) -> io::Result<()> {
    /// `struct sched_attr` (`linux/sched/types.h`) in its first version.
    #[repr(C)]
    struct Attributes {
        size: u32,
        policy: u32,
        flags: u64,
        nice: i32,
        priority: u32,
        runtime: u64,
        deadline: u64,
        period: u64,
    }
    const SIZE: u32 = 48;
    const { assert!(size_of::<Attributes>() == SIZE as usize) };
    let attributes = Attributes {
        size: SIZE,
        policy: scheduler.policy,
        flags: scheduler.flags,
        nice: scheduler.nice,
        priority: scheduler.priority,
        runtime: scheduler.runtime,
        deadline: scheduler.deadline,
        period: scheduler.period,
    };
    // SAFETY: `attributes` is as long as it says, and the kernel only reads it.
    let result = unsafe { libc::syscall(libc::SYS_sched_setattr, 0, &raw const attributes, 0) };
    check(result).map(drop)
}

/// `prlimit(2)` on the calling process.
pub(crate) fn set_rlimit(resource: u32, soft: u64, hard: u64) -> io::Result<()> {
    let limit = libc::rlimit {
        rlim_cur: soft,
        rlim_max: hard,
    };
    // SAFETY: `limit` is a whole rlimit that the kernel only reads.
    check(unsafe { libc::setrlimit(resource, &raw const limit) }.into()).map(drop)
}

/// Raises the hard limit of the calling process to at least `hard`.
pub(crate) fn raise_hard_limit(resource: u32, hard: u64) -> io::Result<()> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: `limit` is a whole rlimit that the call may write.
    check(unsafe { libc::getrlimit(resource, &raw mut limit) }.into())?;
    if limit.rlim_max >= hard {
        return Ok(());
    }
    set_rlimit(resource, limit.rlim_cur, hard)
}

/// Moves the wall clock at once.
pub(crate) fn step_clock(seconds: i64, nanoseconds: u32) -> io::Result<()> {
    // SAFETY: timex is plain integers, for which all zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_SETOFFSET | libc::ADJ_NANO;
    change.time.tv_sec = seconds;
    // With ADJ_NANO it counts nanoseconds.
    change.time.tv_usec = nanoseconds.into();
    adjust_clock(&mut change)
}

/// Has the wall clock go faster or slower until it has gained so much; what is
/// left of an earlier call is dropped.
pub(crate) fn slew_clock(microseconds: i64) -> io::Result<()> {
    // SAFETY: timex is plain integers, for which all zero is a value.
    let mut change: libc::timex = unsafe { std::mem::zeroed() };
    change.modes = libc::ADJ_OFFSET_SINGLESHOT;
    change.offset = microseconds;
    adjust_clock(&mut change)
}

fn adjust_clock(change: &mut libc::timex) -> io::Result<()> {
    // SAFETY: `change` is a whole timex that the call reads and writes.
    check(unsafe { libc::adjtimex(change) }.into()).map(drop)
}

/// `pidfd_send_signal(2)`; signal 0 only asks whether the process lives.
pub(crate) fn send_signal(pidfd: impl AsFd, signal: i32) -> io::Result<()> {
    // SAFETY: a null siginfo asks the kernel to fill it in.
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            pidfd.as_fd().as_raw_fd(),
            signal,
            ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check(result).map(drop)
}

/// `kill(2)` on one process, for lists of processes that the kernel gives by id.
pub(crate) fn kill(pid: i32, signal: i32) -> io::Result<()> {
    // A number that is not one process would name a group, or all of them.
    if pid <= 1 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: the call takes numbers only.
    check(unsafe { libc::kill(pid, signal) }.into()).map(drop)
}

/// `setns(2)` with a pidfd or a namespace's descriptor.
pub(crate) fn join_namespaces(of: impl AsFd, namespaces: i32) -> io::Result<()> {
    // SAFETY: the call takes numbers only. Namespaces that would need a thread
    // of its own are refused by the kernel in a process with more than one.
    check(unsafe { libc::setns(of.as_fd().as_raw_fd(), namespaces) }.into()).map(drop)
}

/// `unshare(2)` of the cgroup namespace.
pub(crate) fn unshare_cgroup_namespace() -> io::Result<()> {
    // SAFETY: the flag concerns no memory and no descriptor.
    check(unsafe { libc::unshare(libc::CLONE_NEWCGROUP) }.into()).map(drop)
}

/// `unshare(2)` of the time namespace of the children.
pub(crate) fn unshare_time_namespace() -> io::Result<()> {
    // SAFETY: the flag concerns no memory and no descriptor.
    check(unsafe { libc::unshare(libc::CLONE_NEWTIME) }.into()).map(drop)
}

/// Makes a write to a pipe without a reader an error of that write.
pub(crate) fn ignore_sigpipe() {
    // SAFETY: SIG_IGN is no handler of ours, and the signal's number is right.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
}

/// Has the signals that end a program end this process, also as the first one of its
/// namespace, which the kernel keeps from those that nobody handles. The next program
/// does not inherit it.
pub(crate) fn end_on_signals() {
    extern "C" fn end(signal: libc::c_int) {
        // SAFETY: it may be called at any moment, and runs nothing else of this process.
        unsafe { libc::_exit(128 + signal) }
    }
    const FATAL: [libc::c_int; 15] = [
        libc::SIGHUP,
        libc::SIGINT,
        libc::SIGQUIT,
        libc::SIGABRT,
        libc::SIGUSR1,
        libc::SIGUSR2,
        libc::SIGALRM,
        libc::SIGTERM,
        libc::SIGSTKFLT,
        libc::SIGXCPU,
        libc::SIGXFSZ,
        libc::SIGVTALRM,
        libc::SIGPROF,
        libc::SIGIO,
        libc::SIGPWR,
    ];
    for signal in FATAL {
        // SAFETY: the handler calls nothing but _exit, which a handler may.
        unsafe { libc::signal(signal, end as *const () as libc::sighandler_t) };
    }
}

/// Gives SIGPIPE and the signal mask back what a program expects to find.
pub(crate) fn reset_signals() -> io::Result<()> {
    // SAFETY: SIG_DFL is no handler of ours, and the signal's number is right.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    // SAFETY: sigset_t is plain integers, for which all zero is a value.
    let mut none: libc::sigset_t = unsafe { std::mem::zeroed() };
    // SAFETY: `none` is a sigset_t that the call may write.
    unsafe { libc::sigemptyset(&raw mut none) };
    // SAFETY: `none` is an initialised sigset_t, and the old set is not wanted.
    check(unsafe { libc::sigprocmask(libc::SIG_SETMASK, &raw const none, ptr::null_mut()) }.into())
        .map(drop)
}

/// Sets close-on-exec on every descriptor from `first` on.
pub(crate) fn close_on_exec_from(first: u32) -> io::Result<()> {
    // SAFETY: with this flag the call closes nothing now.
    let result = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            first,
            u32::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    check(result).map(drop)
}

/// Registers a descriptor with the runtime of the caller.
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd is open and stays the same descriptor until its end,
    // which is that of the AsyncFd.
    Ok(unsafe { AsyncFd::register_with_interest(fd, interest) }?)
}

/// Brings a network interface up.
pub(crate) fn bring_up_interface(name: &CStr) -> io::Result<()> {
    let socket = rustix::net::socket(
        rustix::net::AddressFamily::INET,
        rustix::net::SocketType::DGRAM,
        None,
    )?;
    // SAFETY: ifreq is plain integers and bytes, for which all zero is a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    let name = name.to_bytes();
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = UP;
    // SAFETY: `request` is a whole ifreq that the kernel only reads.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, &raw const request) };
    check(result.into()).map(drop)
}

/// `IFF_UP | IFF_RUNNING`.
const UP: libc::c_short = 0x41;

/// The number by which programs of the kernel's know the network namespace of the calling
/// thread.
pub(crate) fn network_namespace() -> io::Result<u32> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let socket = std::net::UdpSocket::bind((std::net::Ipv4Addr::UNSPECIFIED, 0))?;
    let mut cookie = 0_u64;
    let mut length = libc::socklen_t::try_from(size_of::<u64>()).map_err(io::Error::other)?;
    // SAFETY: the kernel writes a number of 64 bits, and reads and writes its length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    check(result.into())?;
    // They are counted.
    let cookie = i32::try_from(cookie).map_err(io::Error::other)?;
    Ok(cookie.cast_unsigned())
}
