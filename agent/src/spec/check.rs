//! Judges the values of a specification and makes the plan.
//!
//! One function per object of the specification. Each either returns values
//! that can be used as they stand or names the field that is wrong.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use super::{
    SpecError, mounts, oci,
    plan::{ContainerPlan, DeviceNode, IdMap, Namespace, Namespaces, NodeKind, Seccomp},
    process::process,
    resources,
};

/// Most bytes of a host or domain name (`__NEW_UTS_LEN`).
const HOSTNAME_BYTES_MAX: usize = 64;

/// Most lines of a user namespace's map.
const ID_MAPS_MAX: usize = 340;

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

pub(super) fn no_label(field: &str, label: Option<String>) -> Result<(), SpecError> {
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

pub(super) fn absolute(field: &str, path: PathBuf) -> Result<PathBuf, SpecError> {
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
    let harmless = HARMLESS_DEVICES.contains(&(from.major, from.minor));
    let numbers = (u32::try_from(from.major), u32::try_from(from.minor));
    let kind = match (from.kind.as_str(), harmless, numbers) {
        ("c" | "u", true, (Ok(major), Ok(minor))) => NodeKind::Char(major, minor),
        ("p", ..) => NodeKind::Fifo,
        _ => {
            let numbers = format!("{} {}:{}", from.kind, from.major, from.minor);
            let reason = "the guest has no such device for containers";
            return Err(SpecError::value(field("type"), numbers, reason));
        }
    };
    Ok(DeviceNode {
        path: absolute(&field("path"), from.path)?,
        kind,
        mode: from.file_mode.unwrap_or(0o666) & 0o7777,
        uid: from.uid.unwrap_or(0),
        gid: from.gid.unwrap_or(0),
    })
}
