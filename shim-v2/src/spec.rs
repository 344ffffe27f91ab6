//! A container's specification: from the caller's `config.json` to the guest's.
//!
//! [`prepare`] is pure: it refuses what a pod in a VM cannot do, before there is a VM, and
//! returns the same document with each path turned into one of the guest's. What a
//! value means is judged by [`bulkhead_agent_api::spec`], as the agent will judge it; here is
//! only what concerns the host. What becomes of each field is said in
//! [`Prepared::fields`]: nothing is dropped silently.
//!
//! The guest never sees a host path: sources of bind mounts, the root, the cgroup
//! path, annotations and paths of namespaces are replaced or removed here.

use std::{
    collections::BTreeMap,
    fs::File,
    path::{Component, Path, PathBuf},
};

pub use bulkhead_agent_api::spec::Error;
use bulkhead_agent_api::spec::{
    Inherited, Note,
    devices::{self, HostDisk},
    json, oci, plan,
};
use bulkhead_agent_api::{SHARE_DIR, SOCKETS_DIR};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    cgroup::Place,
    error,
    mount::{self, Kind},
    names::ContainerId,
    seccomp::{self, Filter},
};

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
    /// The ids of the files, if they are others than on disk.
    pub ids: Option<plan::MountIds>,
}

/// A socket of the host that the container reaches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// On the host.
    pub source: PathBuf,
    /// In the container, for messages.
    pub destination: String,
    /// It is meant as a socket, whether it is there yet or not.
    pub may_be_absent: bool,
}

/// Limits that decide the size of the VM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Microseconds of processors in a period; `None` without a limit.
    pub quota: Option<u64>,
    /// The period in microseconds; 0 if none was given.
    pub period: u64,
    /// Memory in bytes; `None` without a limit.
    pub memory: Option<u64>,
}

impl Limits {
    /// Thousandths of a processor, rounded up; `None` without a limit.
    #[must_use]
    pub fn thousandths(self) -> Option<u64> {
        /// In microseconds, unless one is given.
        const PERIOD: u64 = 100_000;
        let period = if self.period == 0 {
            PERIOD
        } else {
            self.period
        };
        let quota = self.quota?;
        Some(quota.saturating_mul(1_000).div_ceil(period))
    }

    /// As they are with these resources: what they do not name stays.
    #[must_use]
    fn with(self, resources: &oci::Resources) -> Self {
        let set = |value: i64, before| match u64::try_from(value) {
            Ok(0) => before,
            given => given.ok(),
        };
        let (cpu, memory) = (&resources.cpu, &resources.memory);
        Limits {
            quota: set(cpu.quota, self.quota),
            period: if cpu.period == 0 {
                self.period
            } else {
                cpu.period
            },
            memory: set(memory.limit, self.memory),
        }
    }

    /// The same of an update, `linux.resources` as JSON. One that is not understood
    /// changes nothing: it will be refused.
    #[must_use]
    pub fn updated(self, resources: &[u8]) -> Self {
        let resources = json::from_slice("linux.resources", resources);
        resources.map_or(self, |resources| self.with(&resources))
    }
}

/// A specification that was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Prepared {
    /// `config.json` for the guest.
    pub guest: Vec<u8>,
    /// `root.path` as given: relative to the bundle, or absolute.
    pub root: PathBuf,
    /// Bind mounts, in the order of their directories in the share.
    pub volumes: Vec<Volume>,
    /// Sockets of the host, by their numbers in the guest.
    pub sockets: Vec<Socket>,
    /// Block devices of the host among its devices.
    pub disks: Vec<HostDisk>,
    /// `linux.seccomp`, taken out and compiled.
    pub filter: Filter,
    /// Limits of the container.
    pub limits: Limits,
    /// `process.oomScoreAdj`, 0 if absent.
    pub oom_score_adj: i32,
    /// `linux.cgroupsPath`: where the cgroup of a VM for this container belongs.
    pub cgroup: Option<Place>,
    /// First size of the terminal: columns and rows, 0 if unknown.
    pub console: (u32, u32),
    /// The network namespace of the host that it names: the container's pid shall be there.
    pub network: Option<PathBuf>,
    /// It has a network namespace, with a name or without.
    pub has_network: bool,
    /// It may change its network, and so who it is there: CAP_NET_ADMIN.
    pub sends_as_others: bool,
    /// Programs to run at points of its life.
    pub hooks: plan::Hooks,
    /// What its caller remembers of it.
    pub annotations: BTreeMap<String, String>,
    /// What becomes of each of its fields.
    pub fields: Vec<Note>,
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

/// CAP_NET_ADMIN among sets of capabilities.
const NET_ADMIN: u64 = 1 << 12;

/// Checks a specification and turns it into the guest's.
///
/// `look` answers what a path of the host is. `root_share` is where the guest has the
/// share with the root file system.
pub fn prepare(
    id: &ContainerId,
    spec: Value,
    terminal: Terminal,
    root_share: &str,
    look: impl Fn(&Path) -> Kind,
) -> Result<Prepared, Error> {
    let mut notes = Vec::new();
    let (given, mut spec) = (spec.clone(), json::from_value::<oci::Spec>("", spec)?);
    let root = match &mut spec.root {
        Some(root) => {
            host_path("root.path", &root.path)?;
            let in_guest = format!("{root_share}/{id}/rootfs").into();
            std::mem::replace(&mut root.path, in_guest)
        }
        None => return Err(Error::missing("root")),
    };
    if let Some(process) = &mut spec.process {
        process.terminal = terminal == Terminal::Yes;
    }
    let mut filter = Filter::default();
    let (mut cgroup, mut network) = (None, None);
    let mut has_network = false;
    if let Some(linux) = &mut spec.linux {
        let names = |kind: &str| linux.namespaces.iter().any(|it| it.kind == kind);
        has_network = names("network");
        // Who names all that is usual and leaves it out means the host's; a specification
        // that says next to nothing means nothing by it.
        if !has_network && names("pid") && names("ipc") {
            let reason = "the container is to have the network of the host, which a virtual \
                machine cannot be in: choose another network, or none";
            return Err(Error::new("linux.namespaces", "without network", reason));
        }
        cgroup = Place::new(&linux.cgroups_path)?;
        network = leave_host_namespaces(&mut linux.namespaces)?;
        if let Some(profile) = linux.seccomp.take() {
            filter = seccomp::compile(&profile)?;
        }
    }
    let taken = take_sources(id, &mut spec, &mut notes, look)?;

    // From here on as the agent will do it.
    let compiled = bulkhead_agent_api::spec::seccomp(&filter.program, filter.flags)?;
    let checked = bulkhead_agent_api::spec::container(spec.clone(), compiled)?;
    notes.extend(checked.notes);
    let limits = spec
        .linux
        .as_ref()
        .map(|linux| Limits::default().with(&linux.resources));
    let guest = serde_json::to_vec(&spec)
        .map_err(|error| Error::new("config.json", "as the guest gets it", error.to_string()))?;
    fits("config.json", guest.len(), filter.program.len())?;
    Ok(Prepared {
        guest,
        root,
        volumes: volumes(taken.volumes, &checked.plan.mounts),
        sockets: taken.sockets,
        disks: devices::host_disks(&checked.plan),
        filter,
        limits: limits.unwrap_or_default(),
        oom_score_adj: checked.plan.process.oom_score_adj,
        cgroup,
        console: console(&checked.plan.process),
        network,
        has_network,
        sends_as_others: checked.plan.process.capabilities.bounding & NET_ADMIN != 0,
        hooks: checked.plan.hooks,
        annotations: spec.annotations,
        fields: bulkhead_agent_api::spec::report(&given, &notes),
    })
}

/// Reads the specification of a bundle.
pub fn read(bundle: &Path) -> error::Result<Value> {
    let path = bundle.join("config.json");
    let failed = |source| error::Error::Path {
        action: "read",
        path: path.clone(),
        source,
    };
    let text = File::open(&path).and_then(json::read).map_err(failed)?;
    json::parse(&text).map_err(|source| error::Error::Json {
        what: path.display().to_string(),
        source,
    })
}

/// What would become of each field of a specification; one that is refused, too.
#[must_use]
pub fn explain(spec: &Value) -> Vec<Note> {
    let id = ContainerId::new("explained");
    let prepared = id.map_err(|error| Error::new("id", "explained", error.to_string()));
    let prepared = prepared.and_then(|id| {
        let terminal = spec["process"]["terminal"] == true;
        prepare(&id, spec.clone(), terminal.into(), SHARE_DIR, mount::look)
    });
    match prepared {
        Ok(prepared) => prepared.fields,
        Err(error) => bulkhead_agent_api::spec::report(spec, &[Note::from(&error)]),
    }
}

/// Refuses what promises protection and would be ignored.
pub fn strictly(fields: &[Note]) -> Result<(), Error> {
    match fields.iter().find(|note| note.security) {
        None => Ok(()),
        Some(note) => {
            let reason = format!(
                "it would be ignored, which the configuration (strict) forbids: {}",
                note.why
            );
            Err(Error::new(&note.field, "set", reason))
        }
    }
}

/// The process of an exec that was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct PreparedProcess {
    /// The `process` object for the guest.
    pub guest: Value,
    /// First size of the terminal: columns and rows, 0 if unknown.
    pub console: (u32, u32),
    /// What becomes of each of its fields.
    pub fields: Vec<Note>,
}

/// Checks the process of an exec.
pub fn prepare_process(process: Value, terminal: Terminal) -> Result<PreparedProcess, Error> {
    let (given, mut process) = (
        process.clone(),
        json::from_value::<oci::Process>("process", process)?,
    );
    process.terminal = terminal == Terminal::Yes;
    // What it has from its container is no matter for a refusal.
    let checked = bulkhead_agent_api::spec::process(process.clone(), &Inherited::default())?;
    let guest = serde_json::to_value(&process)
        .map_err(|error| Error::new("process", "as the guest gets it", error.to_string()))?;
    fits("process", guest.to_string().len(), 0)?;
    Ok(PreparedProcess {
        guest,
        console: console(&checked.plan),
        fields: bulkhead_agent_api::spec::report(&json!({ "process": given }), &checked.notes),
    })
}

/// The guest takes messages up to a length, with some room for ids and streams.
fn fits(field: &str, specification: usize, filter: usize) -> Result<(), Error> {
    const ROOM: usize = 4_096;
    const MOST: usize = ttrpc::proto::MESSAGE_LENGTH_MAX - ROOM;
    if specification.saturating_add(filter) > MOST {
        let reason = format!("the guest takes at most {MOST} bytes");
        return Err(Error::new(field, format!("{specification} bytes"), reason));
    }
    Ok(())
}

fn console(process: &plan::ProcessPlan) -> (u32, u32) {
    let (columns, rows) = process.terminal.unwrap_or_default();
    (columns.into(), rows.into())
}

/// A path of the host, which a system call must be able to take.
fn host_path(field: &str, path: &Path) -> Result<(), Error> {
    /// Longest path, with the NUL at its end.
    const PATH_MAX: usize = 4_096;
    let bytes = path.as_os_str().as_encoded_bytes();
    if bytes.is_empty() {
        return Err(Error::missing(field));
    }
    if bytes.contains(&0) {
        return Err(Error::new(field, path, "it must not contain NUL"));
    }
    if bytes.len() >= PATH_MAX {
        return Err(Error::new(field, path, "it is longer than 4095 bytes"));
    }
    Ok(())
}

/// The container shares the network namespace of the guest, where the pod's
/// interfaces are; that of the host is for its pid. Any other namespace with a path is
/// one of the host's.
fn leave_host_namespaces(namespaces: &mut [oci::Namespace]) -> Result<Option<PathBuf>, Error> {
    let mut network = None;
    for (n, namespace) in namespaces.iter_mut().enumerate() {
        if namespace.kind == "network" {
            let path = std::mem::take(&mut namespace.path);
            if !path.as_os_str().is_empty() {
                host_path(&format!("linux.namespaces[{n}].path"), &path)?;
                network = Some(path);
            }
        } else if !namespace.path.as_os_str().is_empty() {
            let reason = "a namespace of the host cannot be joined from a virtual machine";
            let field = format!("linux.namespaces[{n}].path");
            return Err(Error::new(field, &namespace.path, reason));
        }
    }
    Ok(network)
}

/// Takes the sources of bind mounts and sockets out, and puts in where the guest has
/// them: in directories of the share, and where its agent listens.
fn take_sources(
    id: &ContainerId,
    spec: &mut oci::Spec,
    notes: &mut Vec<Note>,
    look: impl Fn(&Path) -> Kind,
) -> Result<Taken, Error> {
    let mut taken = Taken::default();
    let users = spec.linux.as_ref().map_or_else(Default::default, |linux| {
        (linux.uid_mappings.as_slice(), linux.gid_mappings.as_slice())
    });
    for (n, mount) in spec.mounts.iter_mut().enumerate() {
        let at = format!("mounts[{n}]");
        if mount.is_socket() {
            bulkhead_agent_api::spec::socket(&at, mount)?;
            taken.socket(id, &at, mount)?;
            continue;
        }
        if !mount.is_bind() {
            continue;
        }
        host_path(&format!("{at}.source"), &mount.source)?;
        let kind = look(&mount.source);
        if mount.place() == Path::new("/dev/shm")
            && let Kind::Tmpfs(size) = kind
        {
            // Memory shared through a file server would not be coherent.
            let how = format!("/dev/shm is a tmpfs of {size} bytes in the guest");
            notes.push(Note::changed(at, how));
            let size = format!("size={size}");
            let options = ["nosuid", "noexec", "nodev", "mode=1777", size.as_str()];
            *mount = oci::Mount {
                destination: "/dev/shm".into(),
                kind: "tmpfs".to_owned(),
                source: "shm".into(),
                options: options.map(str::to_owned).to_vec(),
                ..oci::Mount::default()
            };
            continue;
        }
        let ids = bulkhead_agent_api::spec::take_id_map(&at, mount, users)?;
        if kind == Kind::Socket {
            if ids.is_some() {
                let reason = "a socket has no map of ids";
                return Err(Error::new(format!("{at}.source"), &mount.source, reason));
            }
            taken.socket(id, &at, mount)?;
            let how = "a socket: each connection is carried on to it on the host";
            notes.push(Note::changed(at, how));
            continue;
        }
        if is_of_the_kernel(&mount.source) && ids.is_none() {
            let how = "that of the guest: it belongs to the kernel of the host";
            notes.push(Note::changed(format!("{at}.source"), how));
            continue;
        }
        let in_guest = format!("{SHARE_DIR}/{id}/volumes/{}", taken.volumes.len()).into();
        taken.volumes.push(Source {
            mount: n,
            ids,
            path: std::mem::replace(&mut mount.source, in_guest),
        });
    }
    Ok(taken)
}

/// Whether a path names what is a part of a kernel rather than a file of somebody's. The
/// guest has its own under the same name. What is below a process in `/proc` may lead to
/// files.
fn is_of_the_kernel(path: &Path) -> bool {
    let Ok(below) = path.strip_prefix("/") else {
        return false;
    };
    let names: Option<Vec<&str>> = below
        .components()
        .map(|part| match part {
            Component::Normal(name) => name.to_str(),
            _ => None,
        })
        .collect();
    match names.as_deref() {
        Some(["sys", ..] | ["proc"] | ["dev"]) => true,
        Some(["proc", name, ..]) => {
            !matches!(*name, "self" | "thread-self") && name.parse::<u32>().is_err()
        }
        Some(["dev", ..]) => devices::DEVICES
            .iter()
            .any(|device| path == Path::new(device.path)),
        _ => false,
    }
}

/// What was taken out.
#[derive(Default)]
struct Taken {
    volumes: Vec<Source>,
    sockets: Vec<Socket>,
}

impl Taken {
    /// Takes a socket: what is left is a bind mount in the guest.
    fn socket(&mut self, id: &ContainerId, at: &str, mount: &mut oci::Mount) -> Result<(), Error> {
        /// Most sockets of a container.
        const MOST: usize = 64;
        if self.sockets.len() == MOST {
            let reason = format!("at most {MOST} sockets are carried on");
            return Err(Error::new(format!("{at}.source"), &mount.source, reason));
        }
        let in_guest = format!("{SOCKETS_DIR}/{id}/{}", self.sockets.len()).into();
        self.sockets.push(Socket {
            source: std::mem::replace(&mut mount.source, in_guest),
            destination: mount.place().display().to_string(),
            may_be_absent: mount.is_socket(),
        });
        "bind".clone_into(&mut mount.kind);
        Ok(())
    }
}

/// The source of a volume.
struct Source {
    /// The place of its mount in the list.
    mount: usize,
    path: PathBuf,
    ids: Option<plan::MountIds>,
}

fn volumes(sources: Vec<Source>, mounts: &[plan::Mount]) -> Vec<Volume> {
    sources
        .into_iter()
        .filter_map(|taken| {
            let mount = mounts.get(taken.mount)?;
            Some(Volume {
                source: taken.path,
                ids: taken.ids,
                destination: mount.destination.display().to_string(),
                recursive: matches!(
                    mount.kind,
                    plan::MountKind::Bind {
                        recursive: true,
                        ..
                    }
                ),
                read_only: mount.is_read_only(),
            })
        })
        .collect()
}

#[cfg(test)]
mod tests;
