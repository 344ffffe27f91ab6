//! The parts of `config.json` that are acted on, as the caller wrote them.
//!
//! Owns the names and JSON types of the OCI runtime specification (1.3) and
//! nothing else: no value is judged here. Unknown properties are ignored, as the
//! specification demands, and what is absent or null has the value that a Go
//! program would see. Written out again, as the shim does for the guest, a
//! specification holds what the guest acts on: neither annotations nor hooks of the
//! host nor anything that belongs to the host's kernel.
//!
//! These are our own types, since the agent is PID 1 of every guest and the
//! general crates for this file bring a regular expression engine with them.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize, de::IgnoredAny};

/// `config.json`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Spec {
    /// Version of the specification.
    pub oci_version: String,
    /// The first process.
    pub process: Option<Process>,
    /// The root file system.
    pub root: Option<Root>,
    /// Host name.
    pub hostname: String,
    /// NIS domain name.
    pub domainname: String,
    /// Mounts in order.
    pub mounts: Vec<Mount>,
    /// What only Linux has.
    pub linux: Option<Linux>,
    /// Programs to run at points of the life cycle.
    pub hooks: Hooks,
    /// What callers remember of the container.
    #[serde(skip_serializing)]
    pub annotations: BTreeMap<String, String>,
}

/// `hooks`. Those of the host do not pass to the guest.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Hooks {
    /// On the host, while the container is created; the older name.
    #[serde(skip_serializing)]
    pub prestart: Vec<Hook>,
    /// On the host, while the container is created.
    #[serde(skip_serializing)]
    pub create_runtime: Vec<Hook>,
    /// A program of the host, in the container's namespaces.
    #[serde(skip_serializing)]
    pub create_container: Vec<Hook>,
    /// A program of the container, before its own.
    pub start_container: Vec<Hook>,
    /// On the host, when the program runs.
    #[serde(skip_serializing)]
    pub poststart: Vec<Hook>,
    /// On the host, when the container is gone.
    #[serde(skip_serializing)]
    pub poststop: Vec<Hook>,
}

/// One of `hooks`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Hook {
    /// The program.
    pub path: PathBuf,
    /// Its arguments, the first being its name.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Seconds.
    pub timeout: Option<i64>,
}

/// `root`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Root {
    /// Where it is.
    pub path: PathBuf,
    /// Whether writing is refused.
    pub readonly: bool,
}

/// `process`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Process {
    /// With a terminal.
    pub terminal: bool,
    /// First size of the terminal.
    pub console_size: ConsoleSize,
    /// Who.
    pub user: User,
    /// Program and arguments.
    pub args: Vec<String>,
    /// `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: PathBuf,
    /// Capability sets.
    pub capabilities: Capabilities,
    /// Resource limits.
    pub rlimits: Vec<Rlimit>,
    /// No privileges by `execve`.
    pub no_new_privileges: bool,
    /// A profile of the host's kernel.
    #[serde(skip_serializing)]
    pub apparmor_profile: String,
    /// A label of the host's kernel.
    #[serde(skip_serializing)]
    pub selinux_label: String,
    /// What the OOM killer thinks of it.
    pub oom_score_adj: Option<i32>,
    /// I/O scheduling.
    pub io_priority: Option<IoPriority>,
    /// Scheduling.
    pub scheduler: Option<Scheduler>,
    /// Processors of an exec.
    #[serde(rename = "execCPUAffinity", skip_serializing)]
    pub exec_cpu_affinity: Option<IgnoredAny>,
    /// Of Windows.
    #[serde(skip_serializing)]
    pub command_line: String,
}

/// `process.consoleSize`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct ConsoleSize {
    /// Rows.
    pub height: u64,
    /// Columns.
    pub width: u64,
}

/// `process.user`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct User {
    /// User id.
    pub uid: u32,
    /// Group id.
    pub gid: u32,
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// Further groups.
    pub additional_gids: Vec<u32>,
}

/// `process.capabilities`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Capabilities {
    /// What can ever be gained.
    pub bounding: Vec<String>,
    /// What is in force.
    pub effective: Vec<String>,
    /// What an `execve` can keep by file capabilities.
    pub inheritable: Vec<String>,
    /// What can be put in force.
    pub permitted: Vec<String>,
    /// What an `execve` keeps.
    pub ambient: Vec<String>,
}

/// One of `process.rlimits`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Rlimit {
    /// `RLIMIT_*`.
    #[serde(rename = "type")]
    pub kind: String,
    /// The most that can be asked for.
    pub hard: u64,
    /// What is in force.
    pub soft: u64,
}

/// `process.ioPriority`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IoPriority {
    /// `IOPRIO_CLASS_*`.
    pub class: String,
    /// Within the class.
    pub priority: i32,
}

/// `process.scheduler`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Scheduler {
    /// `SCHED_*`.
    pub policy: String,
    /// Nice value.
    pub nice: i32,
    /// Real-time priority.
    pub priority: i32,
    /// `SCHED_FLAG_*`.
    pub flags: Vec<String>,
    /// Of a deadline, in nanoseconds.
    pub runtime: u64,
    /// Of a deadline, in nanoseconds.
    pub deadline: u64,
    /// Of a deadline, in nanoseconds.
    pub period: u64,
}

/// One of `mounts`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Mount {
    /// Where.
    pub destination: PathBuf,
    /// Type of the file system, or `bind`.
    #[serde(rename = "type")]
    pub kind: String,
    /// What.
    pub source: PathBuf,
    /// Options of mount(8).
    pub options: Vec<String>,
    /// Ids of an id-mapped mount.
    pub uid_mappings: Vec<IdMapping>,
    /// Ids of an id-mapped mount.
    pub gid_mappings: Vec<IdMapping>,
}

/// `linux`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Linux {
    /// Of a user namespace.
    pub uid_mappings: Vec<IdMapping>,
    /// Of a user namespace.
    pub gid_mappings: Vec<IdMapping>,
    /// Kernel parameters.
    pub sysctl: BTreeMap<String, String>,
    /// Limits.
    pub resources: Resources,
    /// A place in the host's hierarchy of cgroups.
    #[serde(skip_serializing)]
    pub cgroups_path: String,
    /// Namespaces.
    pub namespaces: Vec<Namespace>,
    /// Device nodes beyond the usual ones.
    pub devices: Vec<Device>,
    /// System call filter.
    pub seccomp: Option<Seccomp>,
    /// Propagation of the root mount.
    pub rootfs_propagation: String,
    /// Paths to hide.
    pub masked_paths: Vec<PathBuf>,
    /// Paths to make read-only.
    pub readonly_paths: Vec<PathBuf>,
    /// A label of the host's kernel.
    #[serde(skip_serializing)]
    pub mount_label: String,
    /// Execution domain.
    pub personality: Option<Personality>,
    /// Offsets of clocks in a time namespace.
    pub time_offsets: BTreeMap<String, TimeOffset>,
    /// Network devices of the host to move.
    #[serde(skip_serializing)]
    pub net_devices: BTreeMap<String, IgnoredAny>,
}

/// One line of an id map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct IdMapping {
    /// First id inside.
    #[serde(rename = "containerID")]
    pub container_id: u32,
    /// First id outside.
    #[serde(rename = "hostID")]
    pub host_id: u32,
    /// How many.
    pub size: u32,
}

/// One of `linux.namespaces`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Namespace {
    /// Which.
    #[serde(rename = "type")]
    pub kind: String,
    /// An existing one; empty: a new one.
    pub path: PathBuf,
}

/// One of `linux.devices`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Device {
    /// Where.
    pub path: PathBuf,
    /// `c`, `b`, `u` or `p`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number.
    pub major: i64,
    /// Minor number.
    pub minor: i64,
    /// Permission bits.
    pub file_mode: Option<u32>,
    /// Owner.
    pub uid: Option<u32>,
    /// Group.
    pub gid: Option<u32>,
}

/// `linux.personality`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Personality {
    /// `LINUX` or `LINUX32`.
    pub domain: String,
    /// None are defined.
    pub flags: Vec<String>,
}

/// One of `linux.timeOffsets`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct TimeOffset {
    /// Seconds.
    pub secs: i64,
    /// And nanoseconds.
    pub nanosecs: u32,
}

/// `linux.seccomp`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Seccomp {
    /// For system calls without a rule.
    pub default_action: String,
    /// Error number of the default action.
    pub default_errno_ret: Option<u32>,
    /// `SCMP_ARCH_*`, beside the native one.
    pub architectures: Vec<String>,
    /// `SECCOMP_FILTER_FLAG_*`.
    pub flags: Vec<String>,
    /// Socket of a program that decides.
    pub listener_path: String,
    /// For that program.
    pub listener_metadata: String,
    /// Rules.
    pub syscalls: Vec<Syscall>,
}

/// One of `linux.seccomp.syscalls`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Syscall {
    /// Names of system calls.
    pub names: Vec<String>,
    /// `SCMP_ACT_*`.
    pub action: String,
    /// Error number of the action.
    pub errno_ret: Option<u32>,
    /// Conditions.
    pub args: Vec<SyscallArg>,
}

/// A condition on an argument of a system call.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct SyscallArg {
    /// Which argument, from 0.
    pub index: u32,
    /// What it is compared with.
    pub value: u64,
    /// What it is compared with after a mask.
    pub value_two: u64,
    /// `SCMP_CMP_*`.
    pub op: String,
}

/// `linux.resources`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Resources {
    /// Rules of the device controller.
    pub devices: Vec<DeviceRule>,
    /// Memory.
    pub memory: Memory,
    /// Processors.
    pub cpu: Cpu,
    /// Number of processes.
    pub pids: Pids,
    /// Block devices.
    #[serde(rename = "blockIO")]
    pub block_io: BlockIo,
    /// Huge pages.
    pub hugepage_limits: Vec<HugepageLimit>,
    /// Network classes of cgroup v1.
    #[serde(skip_serializing)]
    pub network: Network,
    /// RDMA devices.
    #[serde(skip_serializing)]
    pub rdma: BTreeMap<String, IgnoredAny>,
    /// Files of cgroup v2.
    pub unified: BTreeMap<String, String>,
}

/// One of `linux.resources.devices`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct DeviceRule {
    /// Allows or denies.
    pub allow: bool,
    /// `a`, `b` or `c`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Major number, −1 for any.
    pub major: Option<i64>,
    /// Minor number, −1 for any.
    pub minor: Option<i64>,
    /// Letters of `rwm`.
    pub access: String,
}

/// `linux.resources.memory`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Memory {
    /// Bytes of memory; −1 for no limit, 0 for not set.
    pub limit: i64,
    /// Bytes that are reclaimed last.
    pub reservation: i64,
    /// Bytes of memory and swap together.
    pub swap: i64,
    /// Of cgroup v1.
    #[serde(rename = "disableOOMKiller", skip_serializing)]
    pub disable_oom_killer: bool,
    /// Of an update: refuses a limit below what is in use.
    #[serde(skip_serializing)]
    pub check_before_update: bool,
}

/// `linux.resources.cpu`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Cpu {
    /// Relative weight, in terms of cgroup v1.
    pub shares: u64,
    /// Microseconds in a period; none or less for no limit.
    pub quota: i64,
    /// Microseconds that may be saved up.
    pub burst: Option<u64>,
    /// Microseconds; 0 for not set.
    pub period: u64,
    /// Of cgroup v1.
    #[serde(skip_serializing)]
    pub realtime_runtime: i64,
    /// Of cgroup v1.
    #[serde(skip_serializing)]
    pub realtime_period: u64,
    /// Processors of the host.
    #[serde(skip_serializing)]
    pub cpus: String,
    /// Memory nodes of the host.
    #[serde(skip_serializing)]
    pub mems: String,
    /// Runs only when nothing else does.
    pub idle: Option<i64>,
}

/// `linux.resources.pids`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Pids {
    /// Most processes; negative for no limit.
    pub limit: Option<i64>,
}

/// `linux.resources.blockIO`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct BlockIo {
    /// Relative weight, in terms of cgroup v1.
    pub weight: u16,
    /// Of devices of the host.
    #[serde(skip_serializing)]
    pub weight_device: Vec<IgnoredAny>,
    /// Of devices of the host.
    #[serde(skip_serializing)]
    pub throttle_read_bps_device: Vec<IgnoredAny>,
    /// Of devices of the host.
    #[serde(skip_serializing)]
    pub throttle_write_bps_device: Vec<IgnoredAny>,
    /// Of devices of the host.
    #[serde(rename = "throttleReadIOPSDevice", skip_serializing)]
    pub throttle_read_iops_device: Vec<IgnoredAny>,
    /// Of devices of the host.
    #[serde(rename = "throttleWriteIOPSDevice", skip_serializing)]
    pub throttle_write_iops_device: Vec<IgnoredAny>,
}

/// One of `linux.resources.hugepageLimits`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct HugepageLimit {
    /// As `2MB`.
    pub page_size: String,
    /// Bytes.
    pub limit: u64,
}

/// `linux.resources.network`.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct Network {
    /// Of cgroup v1.
    #[serde(rename = "classID")]
    pub class_id: u32,
    /// Of cgroup v1.
    pub priorities: Vec<IgnoredAny>,
}
