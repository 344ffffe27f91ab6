//! What will be done for a container or a process: checked values only.
//!
//! Owns the types that cross from the agent to the container's init (as JSON
//! in a memfd). Every number here is one that the kernel takes as it stands.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

/// A container to create.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ContainerPlan {
    /// The first process.
    pub process: ProcessPlan,
    /// Directory in the guest that becomes `/`; absolute.
    pub rootfs: PathBuf,
    /// Whether `/` itself is read-only.
    pub readonly_rootfs: bool,
    /// Host name for the container's own UTS namespace.
    pub hostname: Option<String>,
    /// Domain name for the container's own UTS namespace.
    pub domainname: Option<String>,
    /// Namespaces, own or shared.
    pub namespaces: Namespaces,
    /// User ids of the own user namespace; empty without one.
    pub uid_maps: Vec<IdMap>,
    /// Group ids of the own user namespace; empty without one.
    pub gid_maps: Vec<IdMap>,
    /// Mounts, in order.
    pub mounts: Vec<Mount>,
    /// Device nodes beyond the default ones.
    pub devices: Vec<DeviceNode>,
    /// Kernel parameters: path below `/proc/sys`, value.
    pub sysctls: Vec<(PathBuf, String)>,
    /// Paths to hide.
    pub masked_paths: Vec<PathBuf>,
    /// Paths to make read-only.
    pub readonly_paths: Vec<PathBuf>,
    /// Limits; the container's init never sees them.
    #[serde(skip)]
    pub resources: Resources,
    /// Programs to run at points of its life; its init never sees them.
    #[serde(skip)]
    pub hooks: Hooks,
}

/// Programs to run at points of a container's life, each list in order.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hooks {
    /// On the host, first of its creation.
    pub prestart: Vec<Hook>,
    /// On the host, next.
    pub create_runtime: Vec<Hook>,
    /// On the host, in the pod's network.
    pub create_container: Vec<Hook>,
    /// In the container, before its program.
    pub start_container: Vec<Hook>,
    /// On the host, after its program has started.
    pub poststart: Vec<Hook>,
    /// On the host, after it is gone.
    pub poststop: Vec<Hook>,
}

/// A program to run at a point of a container's life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hook {
    /// The program, absolute.
    pub path: PathBuf,
    /// Its arguments; never empty, without NUL.
    pub args: Vec<String>,
    /// All of its environment, `NAME=value`, without NUL.
    pub env: Vec<String>,
    /// Seconds after which it is killed, if it says so.
    pub timeout_s: Option<u32>,
}

impl Hook {
    /// Time after which a hook is killed that does not say so itself.
    pub const LIMIT: Duration = Duration::from_secs(120);

    /// Time after which it is killed.
    #[must_use]
    pub fn limit(&self) -> Duration {
        self.timeout_s
            .map_or(Hook::LIMIT, |seconds| Duration::from_secs(seconds.into()))
    }
}

/// A process to run in a container.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ProcessPlan {
    /// Program and arguments; never empty, without NUL.
    pub args: Vec<String>,
    /// Of a hook: the program, and that the environment is all of it.
    pub hook: Option<PathBuf>,
    /// Environment, `NAME=value`, no name twice; without NUL.
    pub env: Vec<String>,
    /// Working directory, absolute in the container.
    pub cwd: PathBuf,
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// Additional group ids.
    pub groups: Vec<u32>,
    /// File mode creation mask, if asked for.
    pub umask: Option<u32>,
    /// The five capability sets.
    pub capabilities: Capabilities,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// Whether `PR_SET_NO_NEW_PRIVS` is set.
    pub no_new_privileges: bool,
    /// `/proc/self/oom_score_adj`; 0 if not asked for.
    pub oom_score_adj: i32,
    /// Argument of `personality(2)`, if asked for.
    pub personality: Option<u32>,
    /// Value for `ioprio_set(2)`, if asked for.
    pub io_priority: Option<i32>,
    /// Scheduling, if asked for.
    pub scheduler: Option<Scheduler>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Whether a pseudo-terminal is made, and its first size (columns, rows).
    pub terminal: Option<(u16, u16)>,
}

/// Capability sets, bit n standing for capability number n.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// What can ever be gained.
    pub bounding: u64,
    /// What is in force.
    pub effective: u64,
    /// What an execve can keep by file capabilities.
    pub inheritable: u64,
    /// What can be put in force.
    pub permitted: u64,
    /// What an execve keeps.
    pub ambient: u64,
}

/// One limit for `setrlimit(2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rlimit {
    /// `RLIMIT_*` number.
    pub resource: u32,
    /// Soft limit; `u64::MAX` is no limit.
    pub soft: u64,
    /// Hard limit.
    pub hard: u64,
}

/// Scheduling, as `struct sched_attr` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scheduler {
    /// `SCHED_*` number.
    pub policy: u32,
    /// `SCHED_FLAG_*` bits.
    pub flags: u64,
    /// Nice value, −20 to 19.
    pub nice: i32,
    /// Real-time priority, 0 to 99.
    pub priority: u32,
    /// Nanoseconds, for deadlines.
    pub runtime: u64,
    /// Nanoseconds, for deadlines.
    pub deadline: u64,
    /// Nanoseconds, for deadlines.
    pub period: u64,
}

impl Scheduler {
    /// `SCHED_DEADLINE`.
    pub const DEADLINE: u32 = 6;
}

/// A compiled filter for `seccomp(2)`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seccomp {
    /// Instructions, each the eight bytes of a `struct sock_filter`.
    pub filter: Vec<u64>,
    /// Flags of `SECCOMP_SET_MODE_FILTER`.
    pub flags: u32,
}

/// The namespaces of a container.
///
/// Absent here: mount and cgroup namespaces, which are always the container's
/// own, and the network namespace, which is always the guest's: the network of
/// the pod is the network of its virtual machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespaces {
    /// Process ids.
    pub pid: Namespace,
    /// System V IPC and POSIX message queues.
    pub ipc: Namespace,
    /// Host and domain name.
    pub uts: Namespace,
    /// Whether the container has a user namespace of its own.
    pub own_user: bool,
    /// Offsets of the clocks in a time namespace of its own; `None` without one.
    pub time: Option<Vec<TimeOffset>>,
}

/// Where a namespace comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Namespace {
    /// Made for this container.
    Own,
    /// Another container's, as `/proc/PID/ns/KIND` of the guest.
    Join(PathBuf),
}

/// One line of `/proc/PID/timens_offsets`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TimeOffset {
    /// `monotonic` or `boottime`.
    pub clock: String,
    /// Seconds.
    pub secs: i64,
    /// And nanoseconds, less than a second.
    pub nanosecs: u32,
}

/// One line of `/proc/PID/uid_map` or `gid_map`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdMap {
    /// First id in the container.
    pub container_id: u32,
    /// First id in the guest.
    pub guest_id: u32,
    /// Number of ids.
    pub size: u32,
}

/// The id in the guest of a user of a container with these maps, or with none.
#[must_use]
pub fn guest_id(maps: &[IdMap], id: u32) -> Option<u32> {
    if maps.is_empty() {
        return Some(id);
    }
    maps.iter().find_map(|map| {
        let offset = id.checked_sub(map.container_id)?;
        (offset < map.size).then(|| map.guest_id + offset)
    })
}

/// The ids of the files of a mount.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountIds {
    /// Users: on disk `container_id`, seen as `guest_id`.
    pub uids: Vec<IdMap>,
    /// Groups.
    pub gids: Vec<IdMap>,
    /// For the mounts below it too.
    pub recursive: bool,
}

/// One mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mount {
    /// Where, absolute in the container.
    pub destination: PathBuf,
    /// What.
    pub kind: MountKind,
    /// Attributes of the mount itself.
    pub attributes: Attributes,
    /// Attributes of the mount and all below it.
    pub recursive_attributes: Attributes,
}

impl Mount {
    /// Whether the mount itself refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        (self.attributes.set | self.recursive_attributes.set) & Attributes::RDONLY != 0
    }
}

/// What is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum MountKind {
    /// A file or directory of the guest.
    Bind {
        /// Absolute path in the guest.
        source: PathBuf,
        /// With the mounts below it.
        recursive: bool,
    },
    /// A new file system.
    Filesystem {
        /// Its type.
        fs: Filesystem,
        /// Its own options: name and, if any, value.
        data: Vec<(String, Option<String>)>,
        /// Begins with a copy of what the directory holds that it covers.
        copy_up: bool,
    },
    /// Only attributes: of the mount that is at the destination already.
    Remount,
}

/// The file systems that a container can mount at its creation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Filesystem {
    /// Processes and kernel parameters.
    Proc,
    /// Kernel objects.
    Sysfs,
    /// Memory, with a size.
    Tmpfs,
    /// Memory, without.
    Ramfs,
    /// Pseudo-terminals.
    Devpts,
    /// POSIX message queues.
    Mqueue,
    /// The container's own subtree of cgroup v2.
    Cgroup,
}

impl Filesystem {
    /// The kernel's name of the type.
    pub fn name(self) -> &'static str {
        match self {
            Self::Proc => "proc",
            Self::Sysfs => "sysfs",
            Self::Tmpfs => "tmpfs",
            Self::Ramfs => "ramfs",
            Self::Devpts => "devpts",
            Self::Mqueue => "mqueue",
            Self::Cgroup => "cgroup2",
        }
    }
}

/// `MOUNT_ATTR_*` bits to set and to clear.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attributes {
    /// Bits to set.
    pub set: u64,
    /// Bits to clear.
    pub clear: u64,
}

impl Attributes {
    /// `MOUNT_ATTR_RDONLY`.
    pub const RDONLY: u64 = 0x1;

    /// Whether there is nothing to do.
    pub fn is_empty(self) -> bool {
        self == Self::default()
    }
}

/// A special file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceNode {
    /// Where, absolute in the container.
    pub path: PathBuf,
    /// What.
    pub kind: NodeKind,
    /// Permission bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// What a special file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeKind {
    /// A character device: major and minor number.
    Char(u32, u32),
    /// A block device: major and minor number, the host's until
    /// [`renumber`](crate::spec::devices::renumber) has given it the guest's.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Limits of a container's cgroup.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Files to write in order.
    pub settings: Vec<Setting>,
    /// Device rules in order; the last one that matches decides.
    pub devices: Vec<DeviceRule>,
}

/// One file of a cgroup and its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Setting {
    /// File name, as `memory.max`.
    pub file: String,
    /// What is written.
    pub value: String,
    /// What it means if the guest's kernel has no such file.
    pub absent: Absent,
}

/// What a missing cgroup file means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Absent {
    /// The limit cannot be kept: refuse the container.
    Refused,
    /// The guest has none of what would be limited (no swap, no huge pages of
    /// that size): the limit is kept by itself.
    Kept,
}

/// A rule of the device controller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceRule {
    /// Whether it allows or denies.
    pub allow: bool,
    /// Block, character or (`None`) both.
    pub kind: Option<DeviceKind>,
    /// Major number; `None` is any.
    pub major: Option<u32>,
    /// Minor number; `None` is any.
    pub minor: Option<u32>,
    /// Sum of [`DeviceRule::MKNOD`], [`DeviceRule::READ`], [`DeviceRule::WRITE`].
    pub access: u32,
}

impl DeviceRule {
    /// `BPF_DEVCG_ACC_MKNOD`.
    pub const MKNOD: u32 = 1;
    /// `BPF_DEVCG_ACC_READ`.
    pub const READ: u32 = 2;
    /// `BPF_DEVCG_ACC_WRITE`.
    pub const WRITE: u32 = 4;

    /// Whether it says anything of the block device with these numbers.
    #[must_use]
    pub fn is_about(&self, (major, minor): (u32, u32)) -> bool {
        self.kind.is_none_or(|kind| kind == DeviceKind::Block)
            && self.major.is_none_or(|number| number == major)
            && self.minor.is_none_or(|number| number == minor)
    }
}

/// Kind of a device; the values are those of `BPF_DEVCG_DEV_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceKind {
    /// Block device.
    Block = 1,
    /// Character device.
    Char = 2,
}
