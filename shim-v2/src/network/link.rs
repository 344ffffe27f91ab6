//! What there is of an interface: as much as the guest's shall have.
//!
//! Addresses, routes and neighbours go to the guest as the kernel tells them, for its
//! kernel speaks the same language; what would mean nothing there is taken out.

use std::io;

use futures::{Stream, TryStreamExt};
use rtnetlink::{
    Handle, IpVersion, LinkUnspec,
    packet_core::Emitable,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressMessage, AddressScope},
        link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage},
        neighbour::{NeighbourAttribute, NeighbourMessage, NeighbourState},
        route::{RouteAttribute, RouteFlags, RouteMessage, RouteProtocol, RouteType},
        rule::{RuleAttribute, RuleMessage},
    },
};

use super::error;

/// An interface of the namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Its number there.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its address.
    pub mac: [u8; 6],
    /// Bytes of a packet.
    pub mtu: u16,
    /// Nothing passes.
    pub down: bool,
    /// Its addresses, each the body of an RTM_NEWADDR.
    pub addresses: Vec<Vec<u8>>,
    /// Its routes, each the body of an RTM_NEWROUTE, in the order in which they can be
    /// made.
    pub routes: Vec<Vec<u8>>,
    /// Those of its neighbours that are not asked for, each the body of an RTM_NEWNEIGH.
    pub neighbours: Vec<Vec<u8>>,
}

/// What is in a namespace.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// Interfaces that are no loopback and have an address, or are known.
    pub(super) links: Vec<Link>,
    /// The numbers of all.
    pub(super) there: Vec<u32>,
    /// Why others cannot be joined.
    pub(super) refused: Vec<io::Error>,
    /// Rules of policy routing, each the body of an RTM_NEWRULE.
    pub(super) rules: Vec<Vec<u8>>,
}

/// All that is to be found.
pub(super) async fn all(handle: &Handle, known: &[u32]) -> io::Result<Found> {
    let links: Vec<LinkMessage> = list(handle.link().get().execute()).await?;
    let is_loopback = |link: &LinkMessage| link.header.flags.contains(LinkFlags::Loopback);
    let mut found = Found {
        there: links.iter().map(|link| link.header.index).collect(),
        ..Found::default()
    };
    if links.iter().all(is_loopback) {
        return Ok(found);
    }
    let addresses: Vec<AddressMessage> = list(handle.address().get().execute()).await?;
    let mut routes: Vec<RouteMessage> = Vec::new();
    for family in [AddressFamily::Inet, AddressFamily::Inet6] {
        let mut asked = RouteMessage::default();
        asked.header.address_family = family;
        routes.extend(list(handle.route().get(asked).execute()).await?);
    }
    for version in [IpVersion::V4, IpVersion::V6] {
        let rules: Vec<RuleMessage> = list(handle.rule().get(version).execute()).await?;
        found.rules.extend(rules.iter().filter_map(of_rule));
    }
    let neighbours: Vec<NeighbourMessage> = list(handle.neighbours().get().execute()).await?;
    for link in links.iter().filter(|link| !is_loopback(link)) {
        let index = link.header.index;
        let own = addresses
            .iter()
            .filter(|address| address.header.index == index);
        let own: Vec<AddressMessage> = own.filter_map(of_address).collect();
        if own.is_empty() && !known.contains(&index) {
            continue;
        }
        let mut link = match described(link) {
            Ok(link) => link,
            Err(error) => {
                found.refused.push(error);
                continue;
            }
        };
        link.addresses = own.iter().map(body).collect();
        let own = routes.iter().filter_map(|route| of_route(route, index));
        let mut own: Vec<RouteMessage> = own.collect();
        // A gateway is reached by a route that is there before.
        own.sort_by_key(has_gateway);
        link.routes = own.iter().map(body).collect();
        let neighbours = neighbours
            .iter()
            .filter(|other| other.header.ifindex == index);
        link.neighbours = neighbours
            .filter_map(of_neighbour)
            .map(|it| body(&it))
            .collect();
        found.links.push(link);
    }
    Ok(found)
}

async fn list<T>(all: impl Stream<Item = Result<T, rtnetlink::Error>>) -> io::Result<Vec<T>> {
    all.try_collect().await.map_err(error)
}

/// The number of an interface.
pub(super) async fn index_of(handle: &Handle, name: &str) -> io::Result<u32> {
    let found = handle.link().get().match_name(name).execute();
    let found: Vec<LinkMessage> = found.try_collect().await.map_err(error)?;
    let found = found.first().map(|link| link.header.index);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
}

/// Lets packets pass, of this length at most.
pub(super) async fn bring_up(handle: &Handle, index: u32, mtu: u16) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index)
        .mtu(mtu.into())
        .up()
        .build();
    handle.link().set(message).execute().await.map_err(error)
}

/// Name, address and length of packets.
fn described(link: &LinkMessage) -> io::Result<Link> {
    let mut found = Link {
        index: link.header.index,
        name: String::new(),
        mac: [0; 6],
        mtu: 1500,
        down: !link.header.flags.contains(LinkFlags::Up),
        addresses: Vec::new(),
        routes: Vec::new(),
        neighbours: Vec::new(),
    };
    let mut mac = None;
    let mut is_ipvlan = false;
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Address(address) => mac = <[u8; 6]>::try_from(address.as_slice()).ok(),
            LinkAttribute::Mtu(mtu) => found.mtu = u16::try_from(*mtu).unwrap_or(u16::MAX),
            LinkAttribute::LinkInfo(infos) => {
                is_ipvlan = infos.contains(&LinkInfo::Kind(InfoKind::IpVlan));
            }
            _ => {}
        }
    }
    let refused = |why: &str| {
        let text = format!("the interface {:?} cannot be joined: {why}", found.name);
        io::Error::new(io::ErrorKind::Unsupported, text)
    };
    if is_ipvlan {
        return Err(refused("an ipvlan shares its address with others"));
    }
    found.mac = mac
        .filter(|mac| *mac != [0; 6])
        .ok_or_else(|| refused("it has no address of Ethernet"))?;
    Ok(found)
}

/// An address for the guest; none if its kernel makes that itself.
fn of_address(address: &AddressMessage) -> Option<AddressMessage> {
    if address.header.scope == AddressScope::Link && address.header.family == AddressFamily::Inet6 {
        return None;
    }
    let mut address = address.clone();
    address.attributes.retain(|attribute| {
        !matches!(
            attribute,
            AddressAttribute::Label(_)
                | AddressAttribute::CacheInfo(_)
                | AddressAttribute::Protocol(_)
        )
    });
    Some(address)
}

/// A route by this interface; none that the guest's kernel makes itself.
fn of_route(route: &RouteMessage, index: u32) -> Option<RouteMessage> {
    let by_it = route.attributes.contains(&RouteAttribute::Oif(index));
    let made = route.header.protocol == RouteProtocol::Kernel
        || route.header.protocol == RouteProtocol::Ra;
    let local = route.header.table == libc::RT_TABLE_LOCAL;
    if !by_it || made || local || route.header.kind != RouteType::Unicast {
        return None;
    }
    let mut route = route.clone();
    route.header.flags &= RouteFlags::Onlink;
    route.attributes.retain(|attribute| {
        !matches!(
            attribute,
            RouteAttribute::Oif(_) | RouteAttribute::CacheInfo(_) | RouteAttribute::NhId(_)
        )
    });
    Some(route)
}

/// A rule that somebody has made.
fn of_rule(rule: &RuleMessage) -> Option<Vec<u8>> {
    let by_kernel = |attribute: &RuleAttribute| {
        matches!(attribute, RuleAttribute::Protocol(RouteProtocol::Kernel))
    };
    if rule.attributes.iter().any(by_kernel) {
        return None;
    }
    Some(body(rule))
}

fn has_gateway(route: &RouteMessage) -> bool {
    let is_gateway = |attribute: &RouteAttribute| {
        matches!(
            attribute,
            RouteAttribute::Gateway(_) | RouteAttribute::Via(_)
        )
    };
    route.attributes.iter().any(is_gateway)
}

/// A neighbour that somebody has written down.
fn of_neighbour(neighbour: &NeighbourMessage) -> Option<NeighbourMessage> {
    if neighbour.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut neighbour = neighbour.clone();
    neighbour.attributes.retain(|attribute| {
        matches!(
            attribute,
            NeighbourAttribute::Destination(_) | NeighbourAttribute::LinkLayerAddress(_)
        )
    });
    Some(neighbour)
}

fn body(message: &impl Emitable) -> Vec<u8> {
    let mut bytes = vec![0; message.buffer_len()];
    message.emit(&mut bytes);
    bytes
}
