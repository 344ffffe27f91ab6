//! Judges a whole specification and makes the plan.
//!
//! One function per object of the specification. Each either returns values that
//! can be used as they stand or names the field that is wrong.

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use crate::spec::{
    Checked, Error, Note, devices,
    hooks::hooks,
    mounts, oci,
    plan::{ContainerPlan, IdMap, Namespace, Namespaces, Seccomp, TimeOffset},
    process::{Inherited, process_into},
    resources,
    sysctl::sysctls,
};

/// Most bytes of a host or domain name (`__NEW_UTS_LEN`).
const HOSTNAME_BYTES_MAX: usize = 64;
/// Most lines of a user namespace's map.
const ID_MAPS_MAX: usize = 340;
/// Longest path, with the NUL at its end.
const PATH_MAX: usize = 4_096;
/// Most mounts of a container.
const MOUNTS_MAX: usize = 4_096;
/// Most masked or read-only paths.
const PATHS_MAX: usize = 16_384;

/// Judges a specification; `seccomp` is its filter, compiled by the caller.
pub fn container(
    spec: oci::Spec,
    seccomp: Option<Seccomp>,
) -> Result<Checked<ContainerPlan>, Error> {
    let mut notes = Vec::new();
    version(spec.oci_version)?;
    let process = spec.process.ok_or_else(|| Error::missing("process"))?;
    let root = spec.root.ok_or_else(|| Error::missing("root"))?;
    let linux = spec.linux.ok_or_else(|| Error::missing("linux"))?;
    if linux.seccomp.is_some() && seccomp.is_none() {
        let reason = "the request has no filter for it";
        return Err(Error::new("linux.seccomp", "set", reason));
    }
    left_to_the_host(&linux, &mut notes)?;
    let privileged = resources::allows_every_device(&linux.resources.devices);
    propagation(linux.rootfs_propagation)?;
    let namespaces = namespaces(linux.namespaces, linux.time_offsets, &mut notes)?;
    let uid_maps = user_maps("linux.uidMappings", &linux.uid_mappings, &namespaces)?;
    let gid_maps = user_maps("linux.gidMappings", &linux.gid_mappings, &namespaces)?;
    let inherited = Inherited {
        seccomp,
        personality: linux.personality.map(personality).transpose()?,
    };
    let process = process_into(process, &inherited, &mut notes)?;
    let plan = ContainerPlan {
        process,
        rootfs: absolute("root.path", root.path)?,
        readonly_rootfs: root.readonly,
        hostname: host_name("hostname", spec.hostname)?,
        domainname: host_name("domainname", spec.domainname)?,
        namespaces,
        uid_maps,
        gid_maps,
        mounts: list("mounts", spec.mounts, MOUNTS_MAX, |at, mount| {
            mounts::mount(at, mount, &mut notes)
        })?,
        devices: devices::nodes(linux.devices, privileged, &mut notes)?,
        sysctls: sysctls(linux.sysctl.into_iter())?,
        masked_paths: list("linux.maskedPaths", linux.masked_paths, PATHS_MAX, absolute)?,
        readonly_paths: list(
            "linux.readonlyPaths",
            linux.readonly_paths,
            PATHS_MAX,
            absolute,
        )?,
        resources: resources::resources(linux.resources, &mut notes)?,
        hooks: hooks(spec.hooks)?,
    };
    Ok(Checked { plan, notes })
}

/// Judges each of a list that may not be too long.
pub(crate) fn list<T, U>(
    field: &str,
    from: Vec<T>,
    most: usize,
    mut judge: impl FnMut(&str, T) -> Result<U, Error>,
) -> Result<Vec<U>, Error> {
    if from.len() > most {
        return Err(Error::too_many(field, from.len(), most));
    }
    from.into_iter()
        .enumerate()
        .map(|(n, item)| judge(&format!("{field}[{n}]"), item))
        .collect()
}

fn version(version: String) -> Result<(), Error> {
    if version.is_empty() {
        return Err(Error::missing("ociVersion"));
    }
    if !version.starts_with("1.") {
        let reason = "only versions 1.x are understood";
        return Err(Error::new("ociVersion", version, reason));
    }
    Ok(())
}

/// What the guest has no part in.
fn left_to_the_host(linux: &oci::Linux, notes: &mut Vec<Note>) -> Result<(), Error> {
    if let Some(name) = linux.net_devices.keys().next() {
        let reason = "network devices of the host cannot be moved into a virtual machine";
        return Err(Error::new("linux.netDevices", name, reason));
    }
    if !linux.mount_label.is_empty() {
        notes.push(Note::label("linux.mountLabel"));
    }
    Ok(())
}

/// The root's mounts are private: whatever a slave would receive comes from the
/// guest's own mounts, which never change.
fn propagation(propagation: String) -> Result<(), Error> {
    match propagation.as_str() {
        "" | "private" | "rprivate" | "slave" | "rslave" => Ok(()),
        "shared" | "rshared" | "unbindable" | "runbindable" => Err(Error::new(
            "linux.rootfsPropagation",
            propagation,
            "mounts do not pass between host and virtual machine",
        )),
        _ => Err(Error::new(
            "linux.rootfsPropagation",
            propagation,
            "it is not a propagation",
        )),
    }
}

/// An absolute path that a system call can take.
pub(crate) fn absolute(field: &str, path: PathBuf) -> Result<PathBuf, Error> {
    let reason = if path.as_os_str().is_empty() {
        return Err(Error::missing(field));
    } else if !path.is_absolute() {
        "it must be an absolute path"
    } else if path.as_os_str().as_encoded_bytes().contains(&0) {
        "it must not contain NUL"
    } else if path.as_os_str().len() >= PATH_MAX {
        "it is longer than 4095 bytes"
    } else {
        return Ok(path);
    };
    Err(Error::new(field, path, reason))
}

fn personality(from: oci::Personality) -> Result<u32, Error> {
    if let Some(flag) = from.flags.first() {
        let reason = "no flags are defined";
        return Err(Error::new("linux.personality.flags", flag, reason));
    }
    match from.domain.as_str() {
        "LINUX" => Ok(0),
        "LINUX32" => Ok(8),
        _ => Err(Error::new(
            "linux.personality.domain",
            from.domain,
            "it must be LINUX or LINUX32",
        )),
    }
}

/// What a namespace can be for a container in a virtual machine.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Its own, or that of another container in the guest.
    Shareable,
    /// Its own.
    Own,
    /// Its own if it is named.
    Optional,
    /// The pod's, which is the guest's: the shim looks at the path.
    Pod,
}

/// The namespaces of Linux. Those that are not named are the container's own all the
/// same, but for the optional ones: there is no sense in sharing them with the guest.
const NAMESPACES: [(&str, Kind); 8] = [
    ("cgroup", Kind::Own),
    ("ipc", Kind::Shareable),
    ("mount", Kind::Own),
    ("network", Kind::Pod),
    ("pid", Kind::Shareable),
    ("time", Kind::Optional),
    ("user", Kind::Optional),
    ("uts", Kind::Shareable),
];

fn namespaces(
    from: Vec<oci::Namespace>,
    offsets: BTreeMap<String, oci::TimeOffset>,
    notes: &mut Vec<Note>,
) -> Result<Namespaces, Error> {
    let mut found = Namespaces {
        pid: Namespace::Own,
        ipc: Namespace::Own,
        uts: Namespace::Own,
        own_user: false,
        time: None,
    };
    let mut seen = HashSet::new();
    for (n, namespace) in from.into_iter().enumerate() {
        let field = |name: &str| format!("linux.namespaces[{n}].{name}");
        let known = NAMESPACES.iter().find(|(name, _)| *name == namespace.kind);
        let Some((name, kind)) = known else {
            let reason = "no such namespace";
            return Err(Error::new(field("type"), namespace.kind, reason));
        };
        if !seen.insert(*name) {
            return Err(Error::new(field("type"), name, "it is given twice"));
        }
        let path = Some(namespace.path).filter(|path| !path.as_os_str().is_empty());
        let place = match (kind, path) {
            (Kind::Shareable, Some(path)) => joined(&field("path"), name, path)?,
            (Kind::Own | Kind::Optional, Some(path)) => {
                return Err(Error::new(field("path"), path, "it cannot be shared"));
            }
            (Kind::Pod, _) => continue,
            (_, None) => Namespace::Own,
        };
        match *name {
            "pid" => found.pid = place,
            "ipc" => found.ipc = place,
            "uts" => found.uts = place,
            "user" => found.own_user = true,
            "time" => found.time = Some(Vec::new()),
            _ => {}
        }
    }
    let unnamed: Vec<&str> = NAMESPACES
        .iter()
        .filter(|(name, kind)| matches!(kind, Kind::Shareable | Kind::Pod) && !seen.contains(name))
        .map(|(name, _)| *name)
        .collect();
    if !unnamed.is_empty() {
        let names = unnamed.join(", ");
        notes.push(Note::changed(
            "linux.namespaces",
            format!("does not name {names}: a virtual machine shares none with the host"),
        ));
    }
    time_offsets(&mut found, offsets)?;
    Ok(found)
}

/// The path is one of the guest's, and only of another container's process.
fn joined(field: &str, kind: &str, path: PathBuf) -> Result<Namespace, Error> {
    let pid = path
        .to_str()
        .and_then(|text| text.strip_prefix("/proc/"))
        .and_then(|text| text.strip_suffix(kind))
        .and_then(|text| text.strip_suffix("/ns/"))
        .filter(|pid| !pid.is_empty() && *pid != "1" && pid.bytes().all(|b| b.is_ascii_digit()));
    if pid.is_none() {
        let reason = "it must be that of a process in the guest";
        return Err(Error::new(field, path, reason));
    }
    Ok(Namespace::Join(path))
}

fn time_offsets(
    namespaces: &mut Namespaces,
    offsets: BTreeMap<String, oci::TimeOffset>,
) -> Result<(), Error> {
    let entries = format!("{} entries", offsets.len());
    let Some(own) = &mut namespaces.time else {
        if offsets.is_empty() {
            return Ok(());
        }
        let reason = "there is no time namespace";
        return Err(Error::new("linux.timeOffsets", entries, reason));
    };
    for (clock, offset) in offsets {
        let field = format!("linux.timeOffsets.{clock}");
        if !matches!(clock.as_str(), "monotonic" | "boottime") {
            let reason = "only monotonic and boottime have offsets";
            return Err(Error::new("linux.timeOffsets", clock, reason));
        }
        if offset.nanosecs >= 1_000_000_000 {
            let reason = "it must be less than a second";
            return Err(Error::new(
                format!("{field}.nanosecs"),
                offset.nanosecs,
                reason,
            ));
        }
        // The kernel takes no offset that could overflow (KTIME_SEC_MAX / 2).
        if offset.secs.unsigned_abs() > i64::MAX.unsigned_abs() / 2_000_000_000 {
            let reason = "it is more than 146 years";
            return Err(Error::new(format!("{field}.secs"), offset.secs, reason));
        }
        own.push(TimeOffset {
            clock,
            secs: offset.secs,
            nanosecs: offset.nanosecs,
        });
    }
    Ok(())
}

fn user_maps(
    field: &str,
    from: &[oci::IdMapping],
    namespaces: &Namespaces,
) -> Result<Vec<IdMap>, Error> {
    match (namespaces.own_user, from.len()) {
        (false, 0) => Ok(Vec::new()),
        (true, _) => id_maps(field, from),
        (false, count) => {
            let reason = "there is no user namespace";
            Err(Error::new(field, format!("{count} entries"), reason))
        }
    }
}

/// Checks the map of a user namespace.
pub(crate) fn id_maps(field: &str, from: &[oci::IdMapping]) -> Result<Vec<IdMap>, Error> {
    if !(1..=ID_MAPS_MAX).contains(&from.len()) {
        let reason = "a user namespace needs 1 to 340";
        return Err(Error::new(field, format!("{} entries", from.len()), reason));
    }
    from.iter()
        .enumerate()
        .map(|(n, map)| {
            let in_range = |first: u32| map.size > 0 && first.checked_add(map.size).is_some();
            if !in_range(map.container_id) || !in_range(map.host_id) {
                let field = format!("{field}[{n}].size");
                return Err(Error::new(field, map.size, "the range is not one of ids"));
            }
            Ok(IdMap {
                container_id: map.container_id,
                guest_id: map.host_id,
                size: map.size,
            })
        })
        .collect()
}

fn host_name(field: &str, name: String) -> Result<Option<String>, Error> {
    if name.is_empty() {
        return Ok(None);
    }
    if name.len() > HOSTNAME_BYTES_MAX {
        return Err(Error::new(field, name, "it is longer than 64 bytes"));
    }
    if name
        .bytes()
        .any(|byte| byte.is_ascii_control() || byte == b' ')
    {
        let reason = "it contains a control character or a space";
        return Err(Error::new(field, name, reason));
    }
    Ok(Some(name))
}

/// The path with its links unresolved, but without `.` and `..`.
pub(crate) fn plain(path: &Path) -> PathBuf {
    use std::path::Component;
    let mut plain = PathBuf::from("/");
    for part in path.components() {
        match part {
            Component::Normal(name) => plain.push(name),
            Component::ParentDir => drop(plain.pop()),
            Component::RootDir | Component::CurDir | Component::Prefix(_) => {}
        }
    }
    plain
}
