//! The devices of the guest that a container may have.
//!
//! One table: device nodes, the rules of the device controller and the judgement
//! of `linux.devices` all come from it.

use crate::{
    Error, check, oci,
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

/// Judges one of `linux.devices`.
pub(crate) fn node(at: &str, from: oci::Device) -> Result<DeviceNode, Error> {
    let path = check::absolute(&format!("{at}.path"), from.path)?;
    let known = DEVICES
        .iter()
        .find(|known| i64::from(known.major) == from.major && i64::from(known.minor) == from.minor);
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
