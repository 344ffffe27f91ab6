//! A container's specification: from the caller's `config.json` to the guest's.
//!
//! Pure. [`prepare`] refuses what a pod in a VM cannot do, names field and value
//! in every refusal, and returns the same document with each path turned into one
//! of the guest's. What is taken out without harm is said in
//! [`Prepared::notes`], never dropped silently.
//!
//! The guest never sees a host path: sources of bind mounts, the root, the cgroup
//! path, annotations and paths of namespaces are replaced or removed here.

mod field;
mod process;

use std::path::{Path, PathBuf};

use bulkhead_agent_api::SHARE_DIR;
use serde_json::{Map, Value, json};

pub use self::{
    field::{Error, Field},
    process::{check_process, without_labels},
};
use crate::names::ContainerId;

/// Most mounts of a container.
const MAX_MOUNTS: usize = 4096;
/// Most masked or read-only paths.
const MAX_PATHS: usize = 16_384;
/// Most sysctl entries.
const MAX_SYSCTLS: usize = 1024;
/// Smallest memory limit that lets any program start, in bytes.
const MIN_MEMORY: u64 = 1 << 20;

/// A directory or file of the host that the container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host.
    pub source: PathBuf,
    /// In the container, for messages.
    pub destination: String,
    /// With the mounts below the source.
    pub recursive: bool,
    /// The host's mount refuses writes.
    pub read_only: bool,
}

/// Limits that decide the size of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Limits {
    /// Processors, rounded up; `None` without a limit.
    pub cpus: Option<u64>,
    /// Memory in bytes; `None` without a limit.
    pub memory: Option<u64>,
}

/// A specification that was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// `config.json` for the guest.
    pub guest: Value,
    /// `root.path` as given: relative to the bundle, or absolute.
    pub root: PathBuf,
    /// Bind mounts, in the order of their directories in the share.
    pub volumes: Vec<Volume>,
    /// `linux.seccomp`, taken out.
    pub seccomp: Option<Value>,
    /// Limits of the container.
    pub limits: Limits,
    /// `process.oomScoreAdj`, 0 if absent.
    pub oom_score_adj: i32,
    /// First size of the terminal: columns and rows, 0 if unknown.
    pub console: (u32, u32),
    /// What was changed or left out, one sentence each.
    pub notes: Vec<String>,
}

/// Checks a specification and turns it into the guest's.
///
/// `tmpfs_size` answers the size in bytes of the file system of a host path if
/// that is a tmpfs.
pub fn prepare(
    id: &ContainerId,
    spec: &Value,
    terminal: Terminal,
    tmpfs_size: impl Fn(&Path) -> Option<u64>,
) -> Result<Prepared, Error> {
    let mut notes = Vec::new();
    let top = Field::top(spec);
    check_version(&top)?;
    check_hooks(&top)?;
    let Some(process) = top.get("process") else {
        return Err(top.missing("process"));
    };
    check_process(&process)?;
    let console = console_size(&process)?;
    let oom_score_adj = process
        .get("oomScoreAdj")
        .map(|field| field.in_range(-1000, 1000))
        .transpose()?;
    let Some(root) = top.get("root") else {
        return Err(top.missing("root"));
    };
    let root = PathBuf::from(root.required("path")?.path_text()?);
    check_hostname(&top)?;
    let Some(linux) = top.get("linux") else {
        return Err(top.missing("linux"));
    };
    check_linux(&linux)?;
    let limits = limits(&linux)?;
    let mut volumes = Vec::new();
    let mounts = mounts(id, &top, &mut volumes, &mut notes, tmpfs_size)?;

    let mut guest = spec.as_object().cloned().unwrap_or_default();
    // Names of host files and of the caller's objects end here.
    for key in [
        "annotations",
        "hooks",
        "vm",
        "windows",
        "solaris",
        "zos",
        "freebsd",
    ] {
        if guest.remove(key).is_some() && key == "vm" {
            notes.push("vm is ignored: kernel and image are the administrator's".to_owned());
        }
    }
    guest.insert("mounts".to_owned(), Value::Array(mounts));
    if let Some(root) = member(&mut guest, "root") {
        root.insert("path".to_owned(), format!("{SHARE_DIR}/{id}/rootfs").into());
    }
    if let Some(process) = member(&mut guest, "process") {
        notes.extend(without_labels(process));
        process.insert("terminal".to_owned(), (terminal == Terminal::Yes).into());
    }
    let seccomp = match member(&mut guest, "linux") {
        Some(linux) => linux_for_guest(id, linux, &mut notes),
        None => None,
    };
    Ok(Prepared {
        guest: Value::Object(guest),
        root,
        volumes,
        seccomp,
        limits,
        oom_score_adj: i32::try_from(oom_score_adj.unwrap_or(0)).unwrap_or(0),
        console,
        notes,
    })
}

/// Does the process have a pseudo-terminal? The request of the caller decides,
/// whatever the specification says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terminal {
    /// Yes.
    Yes,
    /// No: pipes.
    No,
}

impl From<bool> for Terminal {
    fn from(terminal: bool) -> Self {
        if terminal {
            Terminal::Yes
        } else {
            Terminal::No
        }
    }
}

/// First size of a process's terminal: columns and rows, 0 if unknown.
pub fn console_size(process: &Field<'_>) -> Result<(u32, u32), Error> {
    let Some(size) = process.get("consoleSize") else {
        return Ok((0, 0));
    };
    let side = |name| -> Result<u32, Error> {
        let cells = size
            .get(name)
            .map(|field| field.in_range(0, 65_535))
            .transpose()?;
        Ok(u32::try_from(cells.unwrap_or(0)).unwrap_or(0))
    };
    Ok((side("width")?, side("height")?))
}

fn member<'a>(
    object: &'a mut Map<String, Value>,
    name: &str,
) -> Option<&'a mut Map<String, Value>> {
    object.get_mut(name)?.as_object_mut()
}

fn check_version(top: &Field<'_>) -> Result<(), Error> {
    let version = top.required("ociVersion")?;
    let text = version.text()?;
    if text.split('.').next() != Some("1") || text.split('.').count() < 2 {
        return Err(version.refuse("only versions 1.x are understood"));
    }
    Ok(())
}

fn check_hooks(top: &Field<'_>) -> Result<(), Error> {
    let Some(hooks) = top.get("hooks") else {
        return Ok(());
    };
    for (name, list) in hooks.members()? {
        if !list.items()?.is_empty() {
            return Err(list.refuse(match name {
                "startContainer" => "hooks in the guest are not supported",
                _ => "hooks on the host are not supported",
            }));
        }
    }
    Ok(())
}

fn check_hostname(top: &Field<'_>) -> Result<(), Error> {
    for name in ["hostname", "domainname"] {
        let Some(field) = top.get(name) else { continue };
        let text = field.text()?;
        if text.len() > 64 {
            return Err(field.refuse("it is longer than 64 bytes"));
        }
        if text.chars().any(char::is_control) {
            return Err(field.refuse("it contains a control character"));
        }
    }
    Ok(())
}

fn check_linux(linux: &Field<'_>) -> Result<(), Error> {
    for namespace in linux.items_of("namespaces")? {
        let kind = namespace.required("type")?;
        let name = kind.text()?;
        if ![
            "pid", "network", "mount", "ipc", "uts", "user", "cgroup", "time",
        ]
        .contains(&name)
        {
            return Err(kind.refuse("no such namespace"));
        }
        if let Some(path) = namespace.get("path")
            && !path.text()?.is_empty()
            && name != "network"
        {
            return Err(
                path.refuse("a namespace of the host cannot be joined from a virtual machine")
            );
        }
    }
    for device in linux.items_of("devices")? {
        check_device(&device)?;
    }
    if let Some(sysctl) = linux.get("sysctl") {
        let entries = sysctl.members()?;
        if entries.len() > MAX_SYSCTLS {
            return Err(linux.refuse_count("sysctl", entries.len(), MAX_SYSCTLS));
        }
        for (name, value) in entries {
            let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
            if name.is_empty() || !name.bytes().all(plain) || name.contains("..") {
                return Err(value.refuse("a sysctl is named by letters, digits, '.', '_' and '-'"));
            }
            value.string()?;
        }
    }
    for name in ["maskedPaths", "readonlyPaths"] {
        let paths = linux.items_of(name)?;
        if paths.len() > MAX_PATHS {
            return Err(linux.refuse_count(name, paths.len(), MAX_PATHS));
        }
        for path in paths {
            path.absolute()?;
        }
    }
    if let Some(devices) = linux.get("netDevices")
        && !devices.members()?.is_empty()
    {
        return Err(
            devices.refuse("network devices of the host cannot be moved into a virtual machine")
        );
    }
    Ok(())
}

/// Devices that every guest kernel has by itself, as the kernel numbers them.
const GUEST_DEVICES: [(&str, i64, i64); 10] = [
    ("c", 1, 3),    // null
    ("c", 1, 5),    // zero
    ("c", 1, 7),    // full
    ("c", 1, 8),    // random
    ("c", 1, 9),    // urandom
    ("c", 5, 0),    // tty
    ("c", 5, 1),    // console
    ("c", 5, 2),    // ptmx
    ("c", 10, 200), // net/tun
    ("c", 10, 229), // fuse
];

fn check_device(device: &Field<'_>) -> Result<(), Error> {
    let path = device.required("path")?;
    path.absolute()?;
    let kind = device.required("type")?.text()?;
    if kind == "p" {
        return Ok(());
    }
    let major = device.required("major")?.in_range(0, i64::from(u32::MAX))?;
    let minor = device.required("minor")?.in_range(0, i64::from(u32::MAX))?;
    // "u" is an unbuffered character device: the same node.
    let kind = if kind == "u" { "c" } else { kind };
    if GUEST_DEVICES.contains(&(kind, major, minor)) {
        return Ok(());
    }
    Err(path.refuse("devices of the host are not passed to a virtual machine"))
}

fn limits(linux: &Field<'_>) -> Result<Limits, Error> {
    let mut limits = Limits::default();
    let Some(resources) = linux.get("resources") else {
        return Ok(limits);
    };
    if let Some(memory) = resources.get("memory") {
        for name in ["limit", "reservation", "swap"] {
            let Some(field) = memory.get(name) else {
                continue;
            };
            // -1: no limit; 0: not set.
            let bytes = field.in_range(-1, i64::MAX)?;
            if name == "limit"
                && let Ok(bytes @ 1..) = u64::try_from(bytes)
            {
                if bytes < MIN_MEMORY {
                    return Err(field.refuse("less than 1 MiB cannot hold a program"));
                }
                limits.memory = Some(bytes);
            }
        }
    }
    if let Some(cpu) = resources.get("cpu") {
        let period = match cpu
            .get("period")
            .map(|field| field.in_range(0, 1_000_000))
            .transpose()?
        {
            None | Some(0) => 100_000,
            Some(period @ 1000..) => period,
            Some(_) => return Err(cpu.required("period")?.refuse("it is shorter than 1000 µs")),
        };
        if let Some(field) = cpu.get("quota") {
            match field.in_range(-1, i64::MAX)? {
                -1 | 0 => {}
                1..1000 => return Err(field.refuse("it is shorter than 1000 µs")),
                quota => {
                    let cpus = quota.unsigned_abs().div_ceil(period.unsigned_abs());
                    limits.cpus = Some(cpus);
                }
            }
        }
    }
    Ok(limits)
}

fn linux_for_guest(
    id: &ContainerId,
    linux: &mut Map<String, Value>,
    notes: &mut Vec<String>,
) -> Option<Value> {
    linux.insert("cgroupsPath".to_owned(), format!("/bulkhead/{id}").into());
    // The container shares the network namespace of the guest, where the pod's
    // interfaces are.
    if let Some(Value::Array(namespaces)) = linux.get_mut("namespaces") {
        namespaces.retain(|namespace| namespace.get("type").is_none_or(|kind| kind != "network"));
    }
    linux.remove("netDevices");
    linux.remove("mountLabel");
    for name in ["intelRdt", "memoryPolicy"] {
        if linux.remove(name).is_some() {
            notes.push(format!("linux.{name} is ignored: it belongs to the host"));
        }
    }
    if let Some(resources) = member(linux, "resources") {
        for name in ["rdma", "network"] {
            if resources
                .remove(name)
                .is_some_and(|value| value.as_object().is_none_or(|map| !map.is_empty()))
            {
                notes.push(format!(
                    "linux.resources.{name} is ignored: it belongs to the host"
                ));
            }
        }
        if let Some(cpu) = member(resources, "cpu") {
            for name in ["cpus", "mems"] {
                if cpu.remove(name).is_some_and(|value| value != "") {
                    notes.push(format!(
                        "linux.resources.cpu.{name} is ignored: the guest numbers its own"
                    ));
                }
            }
        }
        if let Some(block) = member(resources, "blockIO") {
            for name in [
                "weightDevice",
                "throttleReadBpsDevice",
                "throttleWriteBpsDevice",
                "throttleReadIOPSDevice",
                "throttleWriteIOPSDevice",
            ] {
                if block.remove(name).is_some_and(|value| value != json!([])) {
                    notes.push(format!(
                        "linux.resources.blockIO.{name} is ignored: the guest has other devices"
                    ));
                }
            }
        }
    }
    linux.remove("seccomp").filter(|value| !value.is_null())
}

fn mounts(
    id: &ContainerId,
    top: &Field<'_>,
    volumes: &mut Vec<Volume>,
    notes: &mut Vec<String>,
    tmpfs_size: impl Fn(&Path) -> Option<u64>,
) -> Result<Vec<Value>, Error> {
    const GUEST_TYPES: [&str; 8] = [
        "proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "tmpfs", "ramfs",
    ];
    let list = top.items_of("mounts")?;
    if list.len() > MAX_MOUNTS {
        return Err(top.refuse_count("mounts", list.len(), MAX_MOUNTS));
    }
    let mut guest = Vec::new();
    for mount in list {
        let destination = mount.required("destination")?;
        destination.absolute()?;
        let options: Vec<&str> = mount
            .items_of("options")?
            .iter()
            .map(Field::string)
            .collect::<Result<_, _>>()?;
        let kind = mount.get("type").map_or(Ok(""), |field| field.text())?;
        let bind = kind == "bind"
            || options
                .iter()
                .any(|option| ["bind", "rbind"].contains(option));
        let mut entry = mount.value().as_object().cloned().unwrap_or_default();
        if !bind {
            if !GUEST_TYPES.contains(&kind) {
                return Err(mount
                    .required("type")?
                    .refuse("this type of mount is not supported"));
            }
            guest.push(Value::Object(entry));
            continue;
        }
        for key in ["uidMappings", "gidMappings"] {
            if let Some(mapping) = mount.get(key)
                && !mapping.items()?.is_empty()
            {
                return Err(mapping.refuse("id-mapped mounts are not supported"));
            }
        }
        for option in &options {
            match *option {
                "shared" | "rshared" | "slave" | "rslave" => {
                    return Err(mount.required("options")?.refuse(&format!(
                        "mounts do not pass between host and virtual machine ({option})"
                    )));
                }
                "idmap" | "ridmap" => {
                    return Err(mount
                        .required("options")?
                        .refuse("id-mapped mounts are not supported"));
                }
                _ => {}
            }
        }
        let source = mount.required("source")?;
        let path = PathBuf::from(source.path_text()?);
        if path.as_os_str().is_empty() {
            return Err(source.refuse("it is empty"));
        }
        if destination.text()? == "/dev/shm"
            && let Some(size) = tmpfs_size(&path)
        {
            // Memory shared through a file server would not be coherent.
            notes.push(format!("/dev/shm is a tmpfs of {size} bytes in the guest"));
            guest.push(json!({
                "destination": "/dev/shm",
                "type": "tmpfs",
                "source": "shm",
                "options": ["nosuid", "noexec", "nodev", "mode=1777", format!("size={size}")],
            }));
            continue;
        }
        entry.insert("type".to_owned(), "bind".into());
        entry.insert(
            "source".to_owned(),
            format!("{SHARE_DIR}/{id}/volumes/{}", volumes.len()).into(),
        );
        guest.push(Value::Object(entry));
        volumes.push(Volume {
            source: path,
            destination: destination.text()?.to_owned(),
            recursive: options.contains(&"rbind"),
            read_only: options.iter().any(|option| ["ro", "rro"].contains(option)),
        });
    }
    Ok(guest)
}

#[cfg(test)]
mod tests;
