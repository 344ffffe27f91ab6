//! Judges the values of a specification and makes the plan.
//!
//! One function per object of the specification. Each either returns values
//! that can be used as they stand or names the field that is wrong.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use super::{
    GROUPS_MAX, SpecError, mounts, oci,
    plan::{
        Capabilities, ContainerPlan, DeviceNode, IdMap, Namespace, Namespaces, ProcessPlan, Rlimit,
        Seccomp,
    },
    resources,
};

/// Most bytes of a host or domain name (`__NEW_UTS_LEN`).
const HOSTNAME_BYTES_MAX: usize = 64;

/// Most lines of a user namespace's map.
const ID_MAPS_MAX: usize = 340;

/// `BPF_MAXINSNS`.
const FILTER_INSTRUCTIONS_MAX: usize = 4_096;

pub(super) fn container(
    spec: oci::Spec,
    seccomp: Option<Seccomp>,
) -> Result<ContainerPlan, SpecError> {
    if !spec.oci_version.starts_with("1.") {
        return Err(SpecError::value(
            "ociVersion",
            spec.oci_version,
            "only 1.x is supported",
        ));
    }
    let linux = spec.linux;
    if linux.seccomp.is_some() && seccomp.is_none() {
        return Err(SpecError::value(
            "linux.seccomp",
            "set",
            "the request has no filter for it",
        ));
    }
    refuse_unsupported(&linux)?;
    let namespaces = namespaces(&linux.namespaces)?;
    let uid_maps = id_maps(
        "linux.uidMappings",
        &linux.uid_mappings,
        namespaces.own_user,
    )?;
    let gid_maps = id_maps(
        "linux.gidMappings",
        &linux.gid_mappings,
        namespaces.own_user,
    )?;
    let mut process = process(spec.process, seccomp)?;
    process.personality = linux.personality.map(|p| personality(&p)).transpose()?;
    Ok(ContainerPlan {
        process,
        rootfs: absolute("root.path", spec.root.path)?,
        readonly_rootfs: spec.root.readonly,
        hostname: host_name("hostname", spec.hostname, &namespaces)?,
        domainname: host_name("domainname", spec.domainname, &namespaces)?,
        uid_maps,
        gid_maps,
        mounts: spec
            .mounts
            .into_iter()
            .enumerate()
            .map(|(n, entry)| mounts::mount(&format!("mounts[{n}]"), entry))
            .collect::<Result<_, _>>()?,
        devices: linux
            .devices
            .into_iter()
            .enumerate()
            .map(|(n, device)| device_node(n, device))
            .collect::<Result<_, _>>()?,
        sysctls: sysctls(linux.sysctl, &namespaces)?,
        masked_paths: paths("linux.maskedPaths", linux.masked_paths)?,
        readonly_paths: paths("linux.readonlyPaths", linux.readonly_paths)?,
        resources: resources::resources(linux.resources)?,
        namespaces,
    })
}

pub(super) fn process(
    from: oci::Process,
    seccomp: Option<Seccomp>,
) -> Result<ProcessPlan, SpecError> {
    no_label("process.apparmorProfile", from.apparmor_profile)?;
    no_label("process.selinuxLabel", from.selinux_label)?;
    for (field, value) in [
        ("process.scheduler", from.scheduler),
        ("process.execCPUAffinity", from.exec_cpu_affinity),
    ] {
        if value.is_some() {
            return Err(SpecError::value(field, "set", "it is not supported"));
        }
    }
    if from.args.first().is_none_or(String::is_empty) {
        return Err(SpecError::value(
            "process.args",
            "[]",
            "there is no program to run",
        ));
    }
    no_nul("process.args", &from.args)?;
    no_nul("process.env", &from.env)?;
    let user = user(from.user)?;
    Ok(ProcessPlan {
        cwd: absolute("process.cwd", from.cwd)?,
        uid: user.uid,
        gid: user.gid,
        groups: user.additional_gids,
        umask: user.umask,
        capabilities: capabilities(&from.capabilities)?,
        rlimits: rlimits(&from.rlimits)?,
        no_new_privileges: from.no_new_privileges,
        oom_score_adj: oom_score_adj(from.oom_score_adj)?,
        personality: None,
        io_priority: from.io_priority.map(|p| io_priority(&p)).transpose()?,
        args: from.args,
        env: from.env,
        seccomp,
        terminal: None,
    })
}

/// Length 1…4096 instructions; the kernel verifies the rest when it loads it.
pub(super) fn seccomp(filter: &[u8], flags: u32) -> Result<Option<Seccomp>, SpecError> {
    let (instructions, rest) = filter.as_chunks::<8>();
    if !rest.is_empty() || instructions.len() > FILTER_INSTRUCTIONS_MAX {
        return Err(SpecError::value(
            "seccomp_filter",
            format!("{} bytes", filter.len()),
            "it must be 1 to 4096 instructions of 8 bytes",
        ));
    }
    // A notification descriptor has nobody to read it here.
    const FLAGS_ALLOWED: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_TSYNC
        | libc::SECCOMP_FILTER_FLAG_LOG
        | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if libc::c_ulong::from(flags) & !FLAGS_ALLOWED != 0 {
        return Err(SpecError::value(
            "seccomp_flags",
            flags,
            "only TSYNC, LOG and SPEC_ALLOW",
        ));
    }
    Ok((!instructions.is_empty()).then(|| Seccomp {
        filter: instructions
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect(),
        flags,
    }))
}

fn refuse_unsupported(linux: &oci::Linux) -> Result<(), SpecError> {
    no_label("linux.mountLabel", linux.mount_label.clone())?;
    let fields = [
        ("linux.intelRdt", linux.intel_rdt.is_some()),
        ("linux.memoryPolicy", linux.memory_policy.is_some()),
        ("linux.timeOffsets", !linux.time_offsets.is_empty()),
        ("linux.netDevices", !linux.net_devices.is_empty()),
    ];
    for (field, set) in fields {
        if set {
            return Err(SpecError::value(field, "set", "it is not supported"));
        }
    }
    match linux.rootfs_propagation.as_deref() {
        None | Some("" | "private" | "rprivate") => Ok(()),
        Some(other) => Err(SpecError::value(
            "linux.rootfsPropagation",
            other,
            "a container in a virtual machine has private mounts only",
        )),
    }
}

fn no_label(field: &str, label: Option<String>) -> Result<(), SpecError> {
    match label {
        None => Ok(()),
        Some(label) if label.is_empty() => Ok(()),
        Some(label) => Err(SpecError::value(
            field,
            label,
            "the guest has no such security module",
        )),
    }
}

fn no_nul(field: &str, texts: &[String]) -> Result<(), SpecError> {
    match texts.iter().position(|text| text.contains('\0')) {
        None => Ok(()),
        Some(n) => Err(SpecError::value(
            format!("{field}[{n}]"),
            &texts[n],
            "it must not contain NUL",
        )),
    }
}

fn absolute(field: &str, path: PathBuf) -> Result<PathBuf, SpecError> {
    let refuse = |reason| Err(SpecError::value(field, path.display(), reason));
    if !path.is_absolute() {
        return refuse("it must be absolute");
    }
    if path.as_os_str().as_encoded_bytes().contains(&0) {
        return refuse("it must not contain NUL");
    }
    Ok(path)
}

fn paths(field: &str, paths: Vec<PathBuf>) -> Result<Vec<PathBuf>, SpecError> {
    let each = |(n, path)| absolute(&format!("{field}[{n}]"), path);
    paths.into_iter().enumerate().map(each).collect()
}

fn user(user: oci::User) -> Result<oci::User, SpecError> {
    // The kernel reads -1 as "leave it as it is".
    for (field, id) in [
        ("process.user.uid", user.uid),
        ("process.user.gid", user.gid),
    ] {
        if id == u32::MAX {
            return Err(SpecError::value(field, id, "it is not an id"));
        }
    }
    let groups = user.additional_gids.len();
    if groups > GROUPS_MAX {
        let text = format!("{groups} groups");
        return Err(SpecError::value(
            "process.user.additionalGids",
            text,
            "65536 is the most",
        ));
    }
    if user.additional_gids.contains(&u32::MAX) {
        return Err(SpecError::value(
            "process.user.additionalGids",
            u32::MAX,
            "it is not an id",
        ));
    }
    if let Some(umask) = user.umask.filter(|umask| *umask > 0o777) {
        return Err(SpecError::value(
            "process.user.umask",
            umask,
            "it is more than 0777",
        ));
    }
    Ok(user)
}

fn oom_score_adj(value: Option<i32>) -> Result<i32, SpecError> {
    let value = value.unwrap_or(0);
    if !(-1_000..=1_000).contains(&value) {
        let reason = "it must be between -1000 and 1000";
        return Err(SpecError::value("process.oomScoreAdj", value, reason));
    }
    Ok(value)
}

fn io_priority(from: &oci::IoPriority) -> Result<i32, SpecError> {
    let class = match from.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => {
            return Err(SpecError::value(
                "process.ioPriority.class",
                other,
                "it is not a class",
            ));
        }
    };
    if !(0..8).contains(&from.priority) {
        let reason = "it must be between 0 and 7";
        return Err(SpecError::value(
            "process.ioPriority.priority",
            from.priority,
            reason,
        ));
    }
    Ok((class << 13) | from.priority)
}

fn personality(from: &oci::Personality) -> Result<u32, SpecError> {
    if let Some(flag) = from.flags.first() {
        return Err(SpecError::value(
            "linux.personality.flags",
            flag,
            "it is not supported",
        ));
    }
    match from.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        other => Err(SpecError::value(
            "linux.personality.domain",
            other,
            "it is not a domain",
        )),
    }
}

/// Capability numbers are places in this list (`linux/capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

fn capabilities(from: &oci::Capabilities) -> Result<Capabilities, SpecError> {
    let set = |field: &str, names: &[String]| {
        names.iter().try_fold(0u64, |bits, name| {
            let number = CAPABILITIES
                .iter()
                .position(|known| known == name)
                .ok_or_else(|| {
                    let field = format!("process.capabilities.{field}");
                    SpecError::value(field, name, "it is not a capability")
                })?;
            Ok(bits | 1 << number)
        })
    };
    Ok(Capabilities {
        bounding: set("bounding", &from.bounding)?,
        effective: set("effective", &from.effective)?,
        inheritable: set("inheritable", &from.inheritable)?,
        permitted: set("permitted", &from.permitted)?,
        ambient: set("ambient", &from.ambient)?,
    })
}

/// Limit numbers are places in this list (`asm-generic/resource.h`).
const RLIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

fn rlimits(from: &[oci::Rlimit]) -> Result<Vec<Rlimit>, SpecError> {
    let mut seen = HashSet::new();
    let mut limits = Vec::with_capacity(from.len());
    for limit in from {
        let field = format!("process.rlimits.{}", limit.name);
        let number = RLIMITS.iter().position(|known| *known == limit.name);
        let Some(resource) = number.and_then(|n| u32::try_from(n).ok()) else {
            return Err(SpecError::value(
                "process.rlimits",
                &limit.name,
                "it is not a limit",
            ));
        };
        if !seen.insert(resource) {
            return Err(SpecError::value(field, limit.soft, "it is given twice"));
        }
        if limit.soft > limit.hard {
            return Err(SpecError::value(
                field,
                limit.soft,
                "the soft limit is above the hard",
            ));
        }
        limits.push(Rlimit {
            resource,
            soft: limit.soft,
            hard: limit.hard,
        });
    }
    Ok(limits)
}

fn namespaces(from: &[oci::Namespace]) -> Result<Namespaces, SpecError> {
    let mut found = Namespaces {
        pid: Namespace::Guest,
        ipc: Namespace::Guest,
        uts: Namespace::Guest,
        own_user: false,
    };
    let mut seen = HashSet::new();
    for namespace in from {
        let kind = namespace.kind.as_str();
        let path = namespace
            .path
            .as_deref()
            .filter(|path| !path.as_os_str().is_empty());
        if !seen.insert(kind) {
            return Err(SpecError::value(
                "linux.namespaces",
                kind,
                "it is given twice",
            ));
        }
        match (kind, path) {
            ("pid", path) => found.pid = own_or_joined(kind, path)?,
            ("ipc", path) => found.ipc = own_or_joined(kind, path)?,
            ("uts", path) => found.uts = own_or_joined(kind, path)?,
            ("user", None) => found.own_user = true,
            // The pod's network is the network of its virtual machine.
            ("mount" | "cgroup", None) | ("network", _) => {}
            ("mount" | "cgroup" | "user", Some(path)) => {
                let field = format!("linux.namespaces.{kind}");
                return Err(SpecError::value(
                    field,
                    path.display(),
                    "it cannot be shared",
                ));
            }
            _ => {
                return Err(SpecError::value(
                    "linux.namespaces",
                    kind,
                    "it is not supported",
                ));
            }
        }
    }
    if !seen.contains("mount") {
        return Err(SpecError::value(
            "linux.namespaces",
            "no mount",
            "it must be the container's",
        ));
    }
    if found.pid == Namespace::Guest {
        return Err(SpecError::value(
            "linux.namespaces",
            "no pid",
            "it cannot be the guest's",
        ));
    }
    Ok(found)
}

/// The path is one of the guest's, and only of another container's process.
fn own_or_joined(kind: &str, path: Option<&Path>) -> Result<Namespace, SpecError> {
    let Some(path) = path else {
        return Ok(Namespace::Own);
    };
    let pid = path
        .to_str()
        .and_then(|text| text.strip_prefix("/proc/"))
        .and_then(|text| text.strip_suffix(kind))
        .and_then(|text| text.strip_suffix("/ns/"))
        .filter(|pid| !pid.is_empty() && *pid != "1" && pid.bytes().all(|b| b.is_ascii_digit()));
    match pid {
        Some(_) => Ok(Namespace::Join(path.to_owned())),
        None => Err(SpecError::value(
            format!("linux.namespaces.{kind}"),
            path.display(),
            "it must be that of a process in the guest",
        )),
    }
}

fn id_maps(field: &str, from: &[oci::IdMapping], own_user: bool) -> Result<Vec<IdMap>, SpecError> {
    let entries = format!("{} entries", from.len());
    match (own_user, from.len()) {
        (true, 1..=ID_MAPS_MAX) | (false, 0) => {}
        (true, _) => {
            return Err(SpecError::value(
                field,
                entries,
                "a user namespace needs 1 to 340",
            ));
        }
        (false, _) => {
            return Err(SpecError::value(
                field,
                entries,
                "there is no user namespace",
            ));
        }
    }
    from.iter()
        .map(|map| {
            let in_range = |first: u32| map.size > 0 && first.checked_add(map.size).is_some();
            if !in_range(map.container_id) || !in_range(map.host_id) {
                return Err(SpecError::value(
                    field,
                    map.size,
                    "the range is not one of ids",
                ));
            }
            Ok(IdMap {
                container_id: map.container_id,
                guest_id: map.host_id,
                size: map.size,
            })
        })
        .collect()
}

fn host_name(
    field: &str,
    name: Option<String>,
    namespaces: &Namespaces,
) -> Result<Option<String>, SpecError> {
    let Some(name) = name.filter(|name| !name.is_empty()) else {
        return Ok(None);
    };
    if name.len() > HOSTNAME_BYTES_MAX {
        return Err(SpecError::value(field, name, "64 bytes is the most"));
    }
    if name
        .bytes()
        .any(|byte| byte.is_ascii_control() || byte == b' ')
    {
        return Err(SpecError::value(
            field,
            name,
            "it contains a control character or a space",
        ));
    }
    if namespaces.uts == Namespace::Guest {
        return Err(SpecError::value(
            field,
            name,
            "there is no UTS namespace to set it in",
        ));
    }
    Ok(Some(name))
}

fn sysctls(
    from: BTreeMap<String, String>,
    namespaces: &Namespaces,
) -> Result<Vec<(PathBuf, String)>, SpecError> {
    from.into_iter()
        .map(|(name, value)| {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-');
            let parts: Vec<_> = name.split('.').collect();
            if parts.len() < 2 || parts.iter().any(|p| p.is_empty() || !p.bytes().all(plain)) {
                return Err(SpecError::value(
                    "linux.sysctl",
                    name,
                    "it is not a parameter's name",
                ));
            }
            let of_ipc = name.starts_with("fs.mqueue.")
                || ["kernel.msg", "kernel.sem", "kernel.shm"]
                    .iter()
                    .any(|p| name.starts_with(p));
            if of_ipc && namespaces.ipc == Namespace::Guest {
                let reason = "there is no IPC namespace to set it in";
                return Err(SpecError::value("linux.sysctl", name, reason));
            }
            Ok((parts.iter().collect(), value))
        })
        .collect()
}

/// Character devices of the guest that are of use in a container and lead to
/// nothing else in the guest: (major, minor).
const HARMLESS_DEVICES: [(i64, i64); 10] = [
    (1, 3),    // null
    (1, 5),    // zero
    (1, 7),    // full
    (1, 8),    // random
    (1, 9),    // urandom
    (5, 0),    // tty
    (5, 1),    // console
    (5, 2),    // ptmx
    (10, 200), // net/tun
    (10, 229), // fuse
];

fn device_node(n: usize, from: oci::Device) -> Result<DeviceNode, SpecError> {
    let field = |name| format!("linux.devices[{n}].{name}");
    let numbers = format!("{} {}:{}", from.kind, from.major, from.minor);
    let harmless = matches!(from.kind.as_str(), "c" | "u")
        && HARMLESS_DEVICES.contains(&(from.major, from.minor));
    let (true, Ok(major), Ok(minor)) = (
        harmless,
        u32::try_from(from.major),
        u32::try_from(from.minor),
    ) else {
        let reason = "the guest has no such device for containers";
        return Err(SpecError::value(field("type"), numbers, reason));
    };
    let path = absolute(&field("path"), from.path)?;
    Ok(DeviceNode {
        path,
        major,
        minor,
        mode: from.file_mode.unwrap_or(0o666) & 0o7777,
        uid: from.uid.unwrap_or(0),
        gid: from.gid.unwrap_or(0),
    })
}
