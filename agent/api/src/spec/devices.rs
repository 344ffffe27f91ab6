//! The devices of the guest that a container may have.
//!
//! One table: device nodes, the rules of the device controller and the judgement
//! of `linux.devices` all come from it. Block devices are the host's: each is a disk
//! that the virtual machine is given, and has numbers of its own there.

use crate::spec::{
    Error, Note, check, oci,
    plan::{ContainerPlan, DeviceKind, DeviceNode, DeviceRule, NodeKind},
};

/// Whether a container has a device without asking.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Given {
    /// Its node is made, and it may be used.
    Always,
    /// It may be used: something else makes the node.
    Usable,
    /// Only on demand.
    OnDemand,
}

/// A character device of the guest's kernel.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// Where its node is by default.
    pub path: &'static str,
    /// Major number.
    pub major: u32,
    /// Minor number.
    pub minor: u32,
    /// Who has it.
    pub given: Given,
}

const fn device(path: &'static str, major: u32, minor: u32, given: Given) -> Device {
    Device {
        path,
        major,
        minor,
        given,
    }
}

/// Character devices that are of use in a container and lead to nothing else in the
/// guest (OCI runtime specification, config-linux.md, "Default Devices", and two).
pub const DEVICES: [Device; 10] = [
    device("/dev/null", 1, 3, Given::Always),
    device("/dev/zero", 1, 5, Given::Always),
    device("/dev/full", 1, 7, Given::Always),
    device("/dev/random", 1, 8, Given::Always),
    device("/dev/urandom", 1, 9, Given::Always),
    device("/dev/tty", 5, 0, Given::Always),
    device("/dev/console", 5, 1, Given::Usable),
    device("/dev/ptmx", 5, 2, Given::Usable),
    device("/dev/net/tun", 10, 200, Given::OnDemand),
    device("/dev/fuse", 10, 229, Given::OnDemand),
];

/// Major number of the terminals in `/dev/pts`.
const PTS_MAJOR: u32 = 136;

/// The nodes that every container gets.
pub fn default_nodes() -> impl Iterator<Item = DeviceNode> {
    let given = DEVICES.iter().filter(|known| known.given == Given::Always);
    given.map(|known| DeviceNode {
        path: known.path.into(),
        kind: NodeKind::Char(known.major, known.minor),
        mode: 0o666,
        uid: 0,
        gid: 0,
    })
}

/// What every container may do, whatever its rules say: make any node, and use the
/// default devices and its terminals.
pub fn default_rules() -> impl Iterator<Item = DeviceRule> {
    const ALL: u32 = DeviceRule::MKNOD | DeviceRule::READ | DeviceRule::WRITE;
    let rule = |kind, major, minor, access| DeviceRule {
        allow: true,
        kind: Some(kind),
        major,
        minor,
        access,
    };
    let nodes = [DeviceKind::Char, DeviceKind::Block];
    let nodes = nodes.map(|kind| rule(kind, None, None, DeviceRule::MKNOD));
    let usable = DEVICES
        .iter()
        .filter(|known| known.given != Given::OnDemand)
        .map(move |known| rule(DeviceKind::Char, Some(known.major), Some(known.minor), ALL));
    let terminals = rule(DeviceKind::Char, Some(PTS_MAJOR), None, ALL);
    nodes.into_iter().chain(usable).chain([terminals])
}

/// Most device nodes.
const NODES_MAX: usize = 4_096;

/// Numbers of a device: major and minor.
pub type Numbers = (u32, u32);

/// A block device of the host that a container uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HostDisk {
    /// Its numbers on the host.
    pub numbers: Numbers,
    /// The container may not write to it.
    pub read_only: bool,
}

/// The block devices of the host that a container uses, each once. It writes to those
/// that the rules of its device controller let it write to.
#[must_use]
pub fn host_disks(plan: &ContainerPlan) -> Vec<HostDisk> {
    let mut disks: Vec<HostDisk> = Vec::new();
    for device in &plan.devices {
        if let NodeKind::Block(major, minor) = device.kind
            && !disks.iter().any(|disk| disk.numbers == (major, minor))
        {
            let rules = &plan.resources.devices;
            disks.push(HostDisk {
                numbers: (major, minor),
                read_only: !is_allowed(rules, (major, minor), DeviceRule::WRITE),
            });
        }
    }
    disks
}

/// Whether the rules let this access to a block device pass: the last one that matches
/// decides, and what none matches is denied.
fn is_allowed(rules: &[DeviceRule], numbers: Numbers, access: u32) -> bool {
    let decides = |rule: &&DeviceRule| rule.is_about(numbers) && rule.access & access != 0;
    let rule = rules.iter().rev().find(decides);
    rule.is_some_and(|rule| rule.allow)
}

/// Gives the block devices of a plan the numbers that they have in the guest, in its
/// nodes and in its rules; `known` are pairs of the host's numbers and the guest's. A rule
/// about other numbers of block devices is about none that is there.
pub fn renumber(plan: &mut ContainerPlan, known: &[(Numbers, Numbers)]) -> Result<(), Error> {
    for (n, device) in plan.devices.iter_mut().enumerate() {
        if let NodeKind::Block(major, minor) = device.kind {
            let pair = known.iter().find(|(host, _)| *host == (major, minor));
            let (_, guest) = pair.ok_or_else(|| {
                let numbers = format!("b {major}:{minor}");
                let reason = "the virtual machine was not given it";
                Error::new(format!("linux.devices[{n}]"), numbers, reason)
            })?;
            device.kind = NodeKind::Block(guest.0, guest.1);
        }
    }
    let rules = std::mem::take(&mut plan.resources.devices).into_iter();
    plan.resources.devices = rules.flat_map(|rule| in_guest(rule, known)).collect();
    Ok(())
}

/// A rule by the numbers of the guest. Those of character devices are the same.
fn in_guest(rule: DeviceRule, known: &[(Numbers, Numbers)]) -> Vec<DeviceRule> {
    let is_about_all = rule.major.is_none() && rule.minor.is_none();
    if is_about_all || rule.kind == Some(DeviceKind::Char) {
        return vec![rule];
    }
    let meant = known.iter().filter(|(host, _)| rule.is_about(*host));
    let block = meant.map(|(_, (major, minor))| DeviceRule {
        kind: Some(DeviceKind::Block),
        major: Some(*major),
        minor: Some(*minor),
        ..rule
    });
    let character = DeviceRule {
        kind: Some(DeviceKind::Char),
        ..rule
    };
    let character = rule.kind.is_none().then_some(character);
    character.into_iter().chain(block).collect()
}

/// Judges `linux.devices`. An engine gives a privileged container each device of the
/// host: there those that the guest does not have are left out.
pub(crate) fn nodes(
    from: Vec<oci::Device>,
    privileged: bool,
    notes: &mut Vec<Note>,
) -> Result<Vec<DeviceNode>, Error> {
    let mut left_out: Option<(String, usize)> = None;
    let nodes = check::list("linux.devices", from, NODES_MAX, |at, device| {
        let is_absent = matches!(device.kind.as_str(), "c" | "u" | "b") && known(&device).is_none();
        if privileged && is_absent {
            let (_, count) = left_out.get_or_insert_with(|| (at.to_owned(), 0));
            *count += 1;
            return Ok(None);
        }
        let node = node(at, device)?;
        if let NodeKind::Block(..) = node.kind {
            notes.push(Note::disk(at));
        }
        Ok(Some(node))
    })?;
    if let Some((first, count)) = left_out {
        let how = match count {
            1 => format!("{first} is left out: it is the host's"),
            _ => format!(
                "{first} and {} more are left out: they are the host's",
                count - 1
            ),
        };
        notes.push(Note::changed("linux.devices", how));
    }
    Ok(nodes.into_iter().flatten().collect())
}

/// The guest's device with the same numbers; a block device of it there is none.
fn known(device: &oci::Device) -> Option<&'static Device> {
    DEVICES.iter().find(|known| {
        device.kind != "b"
            && i64::from(known.major) == device.major
            && i64::from(known.minor) == device.minor
    })
}

fn node(at: &str, from: oci::Device) -> Result<DeviceNode, Error> {
    let known = known(&from);
    let path = check::absolute(&format!("{at}.path"), from.path)?;
    let number = |name, value: i64| {
        let refuse = |_| Error::new(format!("{at}.{name}"), value, "it is not a device number");
        u32::try_from(value).map_err(refuse)
    };
    let kind = match (from.kind.as_str(), known) {
        // "u" is an unbuffered character device: the same node.
        ("c" | "u", Some(known)) => NodeKind::Char(known.major, known.minor),
        ("p", _) => NodeKind::Fifo,
        ("b", _) => NodeKind::Block(number("major", from.major)?, number("minor", from.minor)?),
        ("c" | "u", None) => {
            let numbers = format!("{} {}:{}", from.kind, from.major, from.minor);
            return Err(Error::new(
                at,
                numbers,
                "character devices of the host are not passed to a virtual machine",
            ));
        }
        (other, _) => {
            return Err(Error::new(
                format!("{at}.type"),
                other,
                "it must be c, b, u or p",
            ));
        }
    };
    Ok(DeviceNode {
        path,
        kind,
        mode: from.file_mode.unwrap_or(0o666) & 0o7777,
        uid: from.uid.unwrap_or(0),
        gid: from.gid.unwrap_or(0),
    })
}
