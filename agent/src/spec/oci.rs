//! The parts of `config.json` that the agent acts on, as the caller wrote them.
//!
//! Owns the names and JSON types of the OCI runtime specification and nothing
//! else: no value is judged here (`check.rs` does that). Unknown properties are
//! ignored, as the specification demands. Properties that the host settles
//! alone (hooks, annotations, `linux.seccomp`'s rules) are absent.
//!
//! These are our own types, since the agent is PID 1 of every guest and the
//! general crates for this file bring a regular expression engine with them.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Deserializer, de::IgnoredAny};

/// `null` is what Go writes for an empty list or map.
fn null_is_empty<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: Deserializer<'de>,
    T: Default + Deserialize<'de>,
{
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Spec {
    pub(super) oci_version: String,
    pub(super) process: Process,
    pub(super) root: Root,
    #[serde(default)]
    pub(super) hostname: Option<String>,
    #[serde(default)]
    pub(super) domainname: Option<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) mounts: Vec<Mount>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) linux: Linux,
}

#[derive(Debug, Deserialize)]
pub(super) struct Root {
    pub(super) path: PathBuf,
    #[serde(default)]
    pub(super) readonly: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Process {
    #[serde(default)]
    pub(super) user: User,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) args: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) env: Vec<String>,
    pub(super) cwd: PathBuf,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) capabilities: Capabilities,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) rlimits: Vec<Rlimit>,
    #[serde(default)]
    pub(super) no_new_privileges: bool,
    #[serde(default)]
    pub(super) apparmor_profile: Option<String>,
    #[serde(default)]
    pub(super) selinux_label: Option<String>,
    #[serde(default)]
    pub(super) oom_score_adj: Option<i32>,
    #[serde(default, rename = "ioPriority")]
    pub(super) io_priority: Option<IoPriority>,
    #[serde(default)]
    pub(super) scheduler: Option<IgnoredAny>,
    #[serde(default, rename = "execCPUAffinity")]
    pub(super) exec_cpu_affinity: Option<IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct User {
    #[serde(default)]
    pub(super) uid: u32,
    #[serde(default)]
    pub(super) gid: u32,
    #[serde(default)]
    pub(super) umask: Option<u32>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) additional_gids: Vec<u32>,
}

#[derive(Debug, Default, Deserialize)]
pub(super) struct Capabilities {
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) bounding: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) effective: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) inheritable: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) permitted: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) ambient: Vec<String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Rlimit {
    #[serde(rename = "type")]
    pub(super) name: String,
    pub(super) hard: u64,
    pub(super) soft: u64,
}

#[derive(Debug, Deserialize)]
pub(super) struct IoPriority {
    pub(super) class: String,
    #[serde(default)]
    pub(super) priority: i32,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Mount {
    pub(super) destination: PathBuf,
    #[serde(default, rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) source: Option<PathBuf>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) options: Vec<String>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) uid_mappings: Vec<IdMapping>,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) gid_mappings: Vec<IdMapping>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Linux {
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) uid_mappings: Vec<IdMapping>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) gid_mappings: Vec<IdMapping>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) sysctl: BTreeMap<String, String>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) resources: Resources,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) namespaces: Vec<Namespace>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) devices: Vec<Device>,
    pub(super) seccomp: Option<IgnoredAny>,
    pub(super) rootfs_propagation: Option<String>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) masked_paths: Vec<PathBuf>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) readonly_paths: Vec<PathBuf>,
    pub(super) mount_label: Option<String>,
    pub(super) intel_rdt: Option<IgnoredAny>,
    pub(super) memory_policy: Option<IgnoredAny>,
    pub(super) personality: Option<Personality>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) time_offsets: BTreeMap<String, IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) net_devices: BTreeMap<String, IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct IdMapping {
    #[serde(rename = "containerID")]
    pub(super) container_id: u32,
    #[serde(rename = "hostID")]
    pub(super) host_id: u32,
    pub(super) size: u32,
}

#[derive(Debug, Deserialize)]
pub(super) struct Namespace {
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) path: Option<PathBuf>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Device {
    pub(super) path: PathBuf,
    #[serde(rename = "type")]
    pub(super) kind: String,
    #[serde(default)]
    pub(super) major: i64,
    #[serde(default)]
    pub(super) minor: i64,
    #[serde(default)]
    pub(super) file_mode: Option<u32>,
    #[serde(default)]
    pub(super) uid: Option<u32>,
    #[serde(default)]
    pub(super) gid: Option<u32>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Personality {
    pub(super) domain: String,
    #[serde(default, deserialize_with = "null_is_empty")]
    pub(super) flags: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Resources {
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) devices: Vec<DeviceRule>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) memory: Memory,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) cpu: Cpu,
    pub(super) pids: Option<Pids>,
    #[serde(rename = "blockIO", deserialize_with = "null_is_empty")]
    pub(super) block_io: BlockIo,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) hugepage_limits: Vec<HugepageLimit>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) network: Network,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) rdma: BTreeMap<String, IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) unified: BTreeMap<String, String>,
}

#[derive(Debug, Deserialize)]
pub(super) struct DeviceRule {
    pub(super) allow: bool,
    #[serde(default, rename = "type")]
    pub(super) kind: Option<String>,
    #[serde(default)]
    pub(super) major: Option<i64>,
    #[serde(default)]
    pub(super) minor: Option<i64>,
    #[serde(default)]
    pub(super) access: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Memory {
    pub(super) limit: Option<i64>,
    pub(super) reservation: Option<i64>,
    pub(super) swap: Option<i64>,
    #[serde(rename = "disableOOMKiller")]
    pub(super) disable_oom_killer: Option<bool>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct Cpu {
    pub(super) shares: Option<u64>,
    pub(super) quota: Option<i64>,
    pub(super) burst: Option<u64>,
    pub(super) period: Option<u64>,
    pub(super) realtime_runtime: Option<i64>,
    pub(super) realtime_period: Option<u64>,
    pub(super) cpus: Option<String>,
    pub(super) mems: Option<String>,
    pub(super) idle: Option<i64>,
}

#[derive(Debug, Deserialize)]
pub(super) struct Pids {
    #[serde(default)]
    pub(super) limit: Option<i64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub(super) struct BlockIo {
    pub(super) weight: Option<u16>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) weight_device: Vec<IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) throttle_read_bps_device: Vec<IgnoredAny>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) throttle_write_bps_device: Vec<IgnoredAny>,
    #[serde(rename = "throttleReadIOPSDevice", deserialize_with = "null_is_empty")]
    pub(super) throttle_read_iops_device: Vec<IgnoredAny>,
    #[serde(rename = "throttleWriteIOPSDevice", deserialize_with = "null_is_empty")]
    pub(super) throttle_write_iops_device: Vec<IgnoredAny>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct HugepageLimit {
    pub(super) page_size: String,
    pub(super) limit: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Network {
    #[serde(rename = "classID")]
    pub(super) class_id: Option<u32>,
    #[serde(deserialize_with = "null_is_empty")]
    pub(super) priorities: Vec<IgnoredAny>,
}
