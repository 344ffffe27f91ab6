//! The devices of the guest that a container may have.
//!
//! One table: device nodes, the rules of the device controller and the judgement
//! of `linux.devices` all come from it.

use crate::{
    Error, Note, check, oci,
    plan::{DeviceKind, DeviceNode, DeviceRule, NodeKind},
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

/// Judges `linux.devices`. An engine gives a privileged container each device of the
/// host: there those that the guest does not have are left out, elsewhere refused.
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
        node(at, device).map(Some)
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
    let kind = match (from.kind.as_str(), known) {
        // "u" is an unbuffered character device: the same node.
        ("c" | "u", Some(known)) => NodeKind::Char(known.major, known.minor),
        ("p", _) => NodeKind::Fifo,
        ("c" | "u" | "b", _) => {
            let numbers = format!("{} {}:{}", from.kind, from.major, from.minor);
            return Err(Error::new(
                at,
                numbers,
                "devices of the host are not passed to a virtual machine",
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
