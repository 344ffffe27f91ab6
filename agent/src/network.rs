//! The pod's interfaces: named, addressed and routed as the host's are; and connections
//! from the host to the guest's own loopback address.
//!
//! What an address or a route is the host's kernel has said, and this one is told in the
//! same words: here only the interface's number is put in.

use std::{
    collections::BTreeMap,
    fs, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
    sync::Arc,
    time::Duration,
};

use bulkhead_agent_api::{
    agent::{NetworkInterface, NetworkRequest},
    relay,
};
use futures::StreamExt;
use rtnetlink::{
    Handle, LinkUnspec,
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
        Parseable,
    },
    packet_route::{
        AddressFamily, RouteNetlinkMessage,
        address::{AddressAttribute, AddressFlags, AddressMessage},
        neighbour::NeighbourMessage,
        route::{RouteAttribute, RouteMessage},
        rule::RuleMessage,
    },
};
use tokio::{net::TcpStream, time::timeout};

use crate::{
    device::{self, Bound},
    error::{Doing, Error},
    streams::Streams,
};

/// How long a program of the guest may take to let somebody in.
const DIAL: Duration = Duration::from_secs(1);

/// The guest's network as the host has told it.
#[derive(Debug, Default)]
pub(crate) struct Network {
    /// By the numbers of their devices.
    interfaces: BTreeMap<u32, Interface>,
    rules: Vec<Vec<u8>>,
}

/// An interface that the host has attached.
#[derive(Debug)]
struct Interface {
    told: NetworkInterface,
    _bound: Bound,
}

impl Network {
    /// Has it be this from now on. What is not named any more is let go of; a new
    /// interface that cannot be set up does not stay, and the others are as they are then.
    pub(crate) async fn become_this(&mut self, wanted: &NetworkRequest) -> Result<(), Error> {
        let (connection, handle, _) = rtnetlink::new_connection().doing("reach the network")?;
        let connection = tokio::spawn(connection);
        let done = self.change(&handle, wanted).await;
        connection.abort();
        done
    }

    async fn change(&mut self, handle: &Handle, wanted: &NetworkRequest) -> Result<(), Error> {
        let is_wanted = |device: u32| wanted.interfaces.iter().any(|it| it.device == device);
        self.interfaces.retain(|device, _| is_wanted(*device));
        let mut fresh = Vec::new();
        let mut all = async || {
            for interface in &wanted.interfaces {
                match self.interfaces.get_mut(&interface.device) {
                    Some(known) if known.told == *interface => {}
                    Some(known) => {
                        set_up(handle, interface, &known.told).await?;
                        known.told.clone_from(interface);
                    }
                    None => {
                        let bound = Bound::take(interface.device).doing("find an interface")?;
                        set_up(handle, interface, &NetworkInterface::default()).await?;
                        fresh.push(interface.device);
                        let known = Interface {
                            told: interface.clone(),
                            _bound: bound,
                        };
                        self.interfaces.insert(interface.device, known);
                    }
                }
            }
            Ok(())
        };
        let done = all().await;
        if done.is_err() {
            self.interfaces.retain(|device, _| !fresh.contains(device));
            return done;
        }
        for rule in without(&self.rules, &wanted.rules) {
            let rule = RuleMessage::parse(rule).map_err(io::Error::other);
            let rule = RouteNetlinkMessage::DelRule(rule.doing("read a rule")?);
            tell(handle, rule, 0)
                .await
                .or_else(is_gone)
                .doing("take a rule away")?;
        }
        for rule in without(&wanted.rules, &self.rules) {
            let rule = RuleMessage::parse(rule).map_err(io::Error::other);
            let rule = RouteNetlinkMessage::NewRule(rule.doing("read a rule")?);
            tell(handle, rule, NLM_F_CREATE)
                .await
                .doing("make a rule")?;
        }
        self.rules.clone_from(&wanted.rules);
        Ok(())
    }
}

/// Connects to what listens on this port of the loopback address, of either family, and
/// relays the connection by the stream with this id, when that comes.
pub(crate) async fn dial(streams: &Arc<Streams>, stream: u64, port: u32) -> Result<(), Error> {
    let claim = streams.claim(stream)?;
    let port = u16::try_from(port).map_err(io::Error::other);
    let port = port.doing("dial a port of the guest")?;
    let of = |address: IpAddr| SocketAddr::from((address, port));
    let addresses = [
        of(Ipv4Addr::LOCALHOST.into()),
        of(Ipv6Addr::LOCALHOST.into()),
    ];
    // Who listens and lets nobody in must not keep a stream's place.
    let connected = timeout(DIAL, TcpStream::connect(&addresses[..])).await;
    let connected = connected.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
    let connection = connected.doing("dial a port of the guest")?;
    tokio::spawn(async move {
        if let Ok(stream) = claim.stream().await {
            relay(connection, stream).await;
        }
    });
    Ok(())
}

/// Those of the one that the other has not.
fn without<'a>(all: &'a [Vec<u8>], others: &'a [Vec<u8>]) -> impl Iterator<Item = &'a Vec<u8>> {
    all.iter().filter(|it| !others.contains(it))
}

/// Sets an interface up that was so before. What is told again does no harm.
async fn set_up(
    handle: &Handle,
    interface: &NetworkInterface,
    before: &NetworkInterface,
) -> Result<(), Error> {
    let (name, index) = known(interface.device).doing("find an interface")?;
    if name != interface.name {
        let named = LinkUnspec::new_with_index(index).name(&*interface.name);
        let named = handle.link().set(named.build()).execute().await;
        named.map_err(error).doing("name an interface")?;
    }
    leave_to_the_host(&interface.name);
    let link = LinkUnspec::new_with_index(index).mtu(interface.mtu);
    let link = match interface.down {
        true => link.down(),
        false => link.up(),
    };
    let link = match !before.mac.is_empty() && before.mac != interface.mac {
        true => link.address(interface.mac.clone()),
        false => link,
    };
    let set = handle.link().set(link.build()).execute().await;
    set.map_err(error).doing("set an interface up")?;

    for bytes in without(&before.neighbours, &interface.neighbours) {
        let neighbour = neighbour(bytes, index).doing("read a neighbour")?;
        let told = tell(handle, RouteNetlinkMessage::DelNeighbour(neighbour), 0).await;
        told.or_else(is_gone).doing("forget a neighbour")?;
    }
    for bytes in without(&before.routes, &interface.routes) {
        let route = route(bytes, index).doing("read a route")?;
        let told = tell(handle, RouteNetlinkMessage::DelRoute(route), 0).await;
        told.or_else(is_gone).doing("take a route away")?;
    }
    for bytes in without(&before.addresses, &interface.addresses) {
        let address = address(bytes, index).doing("read an address")?;
        let told = tell(handle, RouteNetlinkMessage::DelAddress(address), 0).await;
        told.or_else(is_gone).doing("take an address away")?;
    }
    for bytes in &interface.addresses {
        let address = address(bytes, index).doing("read an address")?;
        let told = tell(handle, RouteNetlinkMessage::NewAddress(address), MAKE).await;
        told.doing("give an interface an address")?;
    }
    for bytes in &interface.routes {
        let route = route(bytes, index).doing("read a route")?;
        let told = tell(handle, RouteNetlinkMessage::NewRoute(route), MAKE).await;
        told.doing("make a route")?;
    }
    for bytes in &interface.neighbours {
        let neighbour = neighbour(bytes, index).doing("read a neighbour")?;
        let told = tell(handle, RouteNetlinkMessage::NewNeighbour(neighbour), MAKE).await;
        told.doing("write a neighbour down")?;
    }
    Ok(())
}

/// Name and number of the interface that the driver has made of a device.
fn known(device: u32) -> io::Result<(String, u32)> {
    let interface = device::find(device, "net")?;
    let index = fs::read_to_string(interface.join("ifindex"))?;
    let index = index.trim_end().parse().map_err(io::Error::other)?;
    let name = interface.file_name().unwrap_or_default();
    Ok((name.to_string_lossy().into_owned(), index))
}

/// Addresses and routes are those of the host, and none that somebody on the wire offers.
fn leave_to_the_host(name: &str) {
    for key in ["accept_ra", "autoconf"] {
        let path = Path::new("/proc/sys/net/ipv6/conf").join(name).join(key);
        // A kernel without IPv6 has no such thing.
        let _ = fs::write(path, "0");
    }
}

/// An address for the interface of this number. That nobody else has it was found out
/// where it comes from.
fn address(bytes: &[u8], index: u32) -> io::Result<AddressMessage> {
    let mut address = AddressMessage::parse(bytes).map_err(io::Error::other)?;
    address.header.index = index;
    if address.header.family == AddressFamily::Inet6 {
        let flags = |attribute: &AddressAttribute| matches!(attribute, AddressAttribute::Flags(_));
        address.attributes.retain(|attribute| !flags(attribute));
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        address.attributes.push(flags);
    }
    Ok(address)
}

fn route(bytes: &[u8], index: u32) -> io::Result<RouteMessage> {
    let mut route = RouteMessage::parse(bytes).map_err(io::Error::other)?;
    route.attributes.push(RouteAttribute::Oif(index));
    Ok(route)
}

fn neighbour(bytes: &[u8], index: u32) -> io::Result<NeighbourMessage> {
    let mut neighbour = NeighbourMessage::parse(bytes).map_err(io::Error::other)?;
    neighbour.header.ifindex = index;
    Ok(neighbour)
}

/// To make something, or to change it to that.
const MAKE: u16 = NLM_F_CREATE | NLM_F_REPLACE;

/// Tells the kernel something.
async fn tell(handle: &Handle, what: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    let mut message = NetlinkMessage::from(what);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut answers = handle.clone().request(message).map_err(error)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(refusal) = answer.payload
            && refusal.code.is_some()
        {
            return Err(refusal.to_io());
        }
    }
    Ok(())
}

/// What was to go has gone already: with an address go its routes.
fn is_gone(error: io::Error) -> io::Result<()> {
    match error.raw_os_error() {
        Some(libc::ENOENT | libc::ESRCH | libc::EADDRNOTAVAIL | libc::ENODEV) => Ok(()),
        _ => Err(error),
    }
}

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
