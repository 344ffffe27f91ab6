//! System calls that threads may make, by group; `threads.rs` says which kind has
//! which groups.
//!
//! What they are for was seen by `strace -f` over the devices' tests and a machine;
//! those of the file server beyond that are the calls that its operations stand for.
//! To add one: find who makes it (the report of the violation names number and
//! thread), put it into the narrowest group, with the arguments that are needed
//! if it can do more than that. None of these may give a name in another
//! namespace, another process, another program, or code that is not in the binary.

use libc::c_long;

/// A system call and when it is answered in another way than by the end of the process.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rule {
    /// Its number.
    pub(super) number: c_long,
    /// One of these must hold; with none it is answered so always.
    pub(super) when: &'static [When],
    /// How.
    pub(super) answer: Answer,
}

/// How a system call is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// It is made.
    Allowed,
    /// With ENOSYS, as by a kernel that does not know it.
    Unknown,
}

/// A condition on one argument, of which the lower 32 bits count.
#[derive(Clone, Copy, Debug)]
pub(super) enum When {
    /// The argument of this index has this value.
    Is(u8, u32),
    /// Those bits of it that the mask names have these values.
    Bits {
        /// Index of the argument.
        index: u8,
        /// The bits.
        mask: u32,
        /// Their values.
        value: u32,
    },
    /// It is this process.
    ThisProcess(u8),
}

const fn any(number: c_long) -> Rule {
    only(number, &[])
}

const fn only(number: c_long, when: &'static [When]) -> Rule {
    Rule {
        number,
        when,
        answer: Answer::Allowed,
    }
}

const fn unknown(number: c_long) -> Rule {
    Rule {
        number,
        when: &[],
        answer: Answer::Unknown,
    }
}

/// Memory may be mapped, but nothing that can be executed.
const NOT_EXECUTABLE: &[When] = &[When::Bits {
    index: 2,
    mask: libc::PROT_EXEC.cast_unsigned(),
    value: 0,
}];

/// Every thread: memory, locks, its own end, descriptors that it has.
pub(super) const EVERY: &[Rule] = &[
    any(libc::SYS_read),
    any(libc::SYS_write),
    any(libc::SYS_close),
    any(libc::SYS_dup),
    only(
        libc::SYS_fcntl,
        &[
            When::Is(1, libc::F_GETFD.cast_unsigned()),
            When::Is(1, libc::F_GETFL.cast_unsigned()),
            When::Is(1, libc::F_DUPFD_CLOEXEC.cast_unsigned()),
        ],
    ),
    any(libc::SYS_futex),
    only(libc::SYS_mmap, NOT_EXECUTABLE),
    only(libc::SYS_mprotect, NOT_EXECUTABLE),
    any(libc::SYS_munmap),
    any(libc::SYS_mremap),
    any(libc::SYS_madvise),
    any(libc::SYS_brk),
    any(libc::SYS_getrandom),
    any(libc::SYS_clock_gettime),
    any(libc::SYS_sched_yield),
    any(libc::SYS_restart_syscall),
    any(libc::SYS_rt_sigreturn),
    any(libc::SYS_rt_sigprocmask),
    any(libc::SYS_sigaltstack),
    any(libc::SYS_getpid),
    any(libc::SYS_gettid),
    only(libc::SYS_tgkill, &[When::ThisProcess(0)]),
    // How the report of a violation names the thread.
    only(
        libc::SYS_prctl,
        &[When::Is(0, libc::PR_GET_NAME.cast_unsigned())],
    ),
    any(libc::SYS_exit),
    any(libc::SYS_exit_group),
];

/// Threads that open nothing. The C library opens a file of procfs all the same before
/// it gives much memory back, to see how the host counts it, and does without: a guest
/// that makes a device give up what it holds must not end the process by it.
pub(super) const NO_FILES: &[Rule] = &[unknown(libc::SYS_openat)];

/// `_IO(KVMIO, 0x80)`.
const KVM_RUN: u32 = 0xae80;
/// `_IOR(KVMIO, 0x81, struct kvm_regs)`: where the guest was at an error.
const KVM_GET_REGS: u32 = 0x8090_ae81;
/// `_IOR(KVMIO, 0x98, struct kvm_mp_state)` and `_IOR(KVMIO, 0x8e, struct
/// kvm_lapic_state)`: what it does where it was stopped.
const KVM_GET_MP_STATE: u32 = 0x8004_ae98;
const KVM_GET_LAPIC: u32 = 0x8400_ae8e;
/// `_IO(KVMIO, 0xad)`: the guest was paused.
const KVM_KVMCLOCK_CTRL: u32 = 0xaead;

/// A virtual processor; it also gives queues to devices and takes them back.
pub(super) const PROCESSOR: &[Rule] = &[
    only(
        libc::SYS_ioctl,
        &[
            When::Is(1, KVM_RUN),
            When::Is(1, KVM_GET_REGS),
            When::Is(1, KVM_GET_MP_STATE),
            When::Is(1, KVM_GET_LAPIC),
            When::Is(1, KVM_KVMCLOCK_CTRL),
        ],
    ),
    any(libc::SYS_epoll_ctl),
    // A reset drops what devices still hold: streams that drain, a timer.
    any(libc::SYS_recvfrom),
    any(libc::SYS_shutdown),
    any(libc::SYS_timerfd_settime),
];

/// The main thread once the guest runs: the control socket, the last output.
pub(super) const MAIN: &[Rule] = &[
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendto),
    // Other limits for a device wake up what waits.
    LIMITED,
];

/// An event loop.
pub(super) const EVENTS: &[Rule] = &[
    any(libc::SYS_epoll_wait),
    any(libc::SYS_epoll_pwait),
    any(libc::SYS_epoll_pwait2),
    any(libc::SYS_epoll_ctl),
    any(libc::SYS_poll),
    any(libc::SYS_ppoll),
    any(libc::SYS_readv),
    any(libc::SYS_writev),
];

/// vsock, console and entropy: sockets that exist, and pairs of Unix sockets.
pub(super) const DEVICES: &[Rule] = &[
    any(libc::SYS_recvmsg),
    any(libc::SYS_sendmsg),
    any(libc::SYS_recvfrom),
    any(libc::SYS_sendto),
    any(libc::SYS_accept4),
    any(libc::SYS_shutdown),
    any(libc::SYS_getsockopt),
    only(
        libc::SYS_socketpair,
        &[When::Is(0, libc::AF_UNIX.cast_unsigned())],
    ),
    only(libc::SYS_ioctl, &[When::Is(1, 0x5421 /* FIONBIO */)]),
    LIMITED,
];

/// The timer of who waits until a limit allows more. It exists since its device does.
const LIMITED: Rule = any(libc::SYS_timerfd_settime);

/// A network interface.
pub(super) const NETWORK: &[Rule] = &[LIMITED];

/// A disk.
pub(super) const DISK: &[Rule] = &[
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_fdatasync),
    LIMITED,
];

/// `_IOW(KVMIO, 0x46, struct kvm_userspace_memory_region)`: more memory for the guest.
const KVM_SET_USER_MEMORY_REGION: u32 = 0x4020_ae46;
/// `_IO(KVMIO, 0x41)`, and what makes a processor ready: `_IOW(KVMIO, 0x90, struct
/// kvm_cpuid2)`, `_IOW(KVMIO, 0x8d, struct kvm_fpu)`, `_IOW(KVMIO, 0x89, struct
/// kvm_msrs)`, `_IOW(KVMIO, 0x8f, struct kvm_lapic_state)`.
const KVM_CREATE_VCPU: u32 = 0xae41;
const KVM_SET_CPUID2: u32 = 0x4008_ae90;
const KVM_SET_FPU: u32 = 0x41a0_ae8d;
const KVM_SET_MSRS: u32 = 0x4008_ae89;
const KVM_SET_LAPIC: u32 = 0x4400_ae8f;

/// What comes: how large a disk is, the timers of devices, memory and processors.
pub(super) const HOTPLUG: &[Rule] = &[
    any(libc::SYS_lseek),
    any(libc::SYS_timerfd_create),
    // Less for a thread that it starts.
    only(
        libc::SYS_seccomp,
        &[When::Is(0, libc::SECCOMP_SET_MODE_FILTER)],
    ),
    only(
        libc::SYS_ioctl,
        &[
            When::Is(1, KVM_SET_USER_MEMORY_REGION),
            When::Is(1, KVM_CREATE_VCPU),
            When::Is(1, KVM_SET_CPUID2),
            When::Is(1, KVM_SET_FPU),
            When::Is(1, KVM_SET_MSRS),
            When::Is(1, KVM_GET_LAPIC),
            When::Is(1, KVM_SET_LAPIC),
        ],
    ),
];

/// The file server: whatever acts on a descriptor or on a name relative to one.
pub(super) const FILES: &[Rule] = &[
    // Data.
    any(libc::SYS_preadv),
    any(libc::SYS_pwritev),
    any(libc::SYS_pwritev2),
    any(libc::SYS_copy_file_range),
    any(libc::SYS_fallocate),
    any(libc::SYS_ftruncate),
    any(libc::SYS_lseek),
    any(libc::SYS_fdatasync),
    any(libc::SYS_fsync),
    any(libc::SYS_syncfs),
    // Names.
    any(libc::SYS_openat),
    any(libc::SYS_getdents64),
    any(libc::SYS_mkdirat),
    any(libc::SYS_mknodat),
    any(libc::SYS_linkat),
    any(libc::SYS_symlinkat),
    any(libc::SYS_readlinkat),
    any(libc::SYS_unlinkat),
    any(libc::SYS_renameat2),
    // The directory of descriptors in procfs is the working directory.
    any(libc::SYS_fchdir),
    // Attributes.
    any(libc::SYS_statx),
    any(libc::SYS_fstatfs),
    any(libc::SYS_fchmod),
    any(libc::SYS_fchmodat),
    any(libc::SYS_fchownat),
    any(libc::SYS_utimensat),
    any(libc::SYS_getxattr),
    any(libc::SYS_setxattr),
    any(libc::SYS_listxattr),
    any(libc::SYS_removexattr),
    any(libc::SYS_fsetxattr),
    // Identity of whoever makes a file.
    any(libc::SYS_umask),
    any(libc::SYS_setfsuid),
    any(libc::SYS_setfsgid),
    any(libc::SYS_capget),
    any(libc::SYS_capset),
    // Locks, leases excluded: those send signals.
    any(libc::SYS_flock),
    only(
        libc::SYS_fcntl,
        &[
            When::Is(1, libc::F_OFD_GETLK.cast_unsigned()),
            When::Is(1, libc::F_OFD_SETLK.cast_unsigned()),
        ],
    ),
    // What changes on the host: marks of single files, in a group that can have no others.
    any(libc::SYS_name_to_handle_at),
    only(
        libc::SYS_fanotify_mark,
        &[When::Bits {
            index: 1,
            mask: libc::FAN_MARK_MOUNT | libc::FAN_MARK_FILESYSTEM,
            value: 0,
        }],
    ),
];

/// Threads that start threads of their own kind, which inherit all of this. The flags of
/// clone3 cannot be seen; without it the C library uses clone.
pub(super) const THREADS: &[Rule] = &[
    only(
        libc::SYS_clone,
        &[When::Bits {
            index: 0,
            mask: (libc::CLONE_THREAD
                | libc::CLONE_VM
                | libc::CLONE_SIGHAND
                | libc::CLONE_NEWNS
                | libc::CLONE_NEWCGROUP
                | libc::CLONE_NEWUTS
                | libc::CLONE_NEWIPC
                | libc::CLONE_NEWUSER
                | libc::CLONE_NEWPID
                | libc::CLONE_NEWNET
                | libc::CLONE_PTRACE)
                .cast_unsigned(),
            value: (libc::CLONE_THREAD | libc::CLONE_VM | libc::CLONE_SIGHAND).cast_unsigned(),
        }],
    ),
    unknown(libc::SYS_clone3),
    // A working directory and an umask of their own.
    only(
        libc::SYS_unshare,
        &[When::Is(0, libc::CLONE_FS.cast_unsigned())],
    ),
    any(libc::SYS_set_robust_list),
    any(libc::SYS_sched_getaffinity),
    any(libc::SYS_rseq),
    only(
        libc::SYS_prctl,
        &[
            When::Is(0, libc::PR_SET_NAME.cast_unsigned()),
            When::Is(0, libc::PR_GET_SECUREBITS.cast_unsigned()),
        ],
    ),
    any(libc::SYS_eventfd2),
    any(libc::SYS_epoll_create1),
    any(libc::SYS_clock_nanosleep),
];
