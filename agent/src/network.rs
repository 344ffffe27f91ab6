//! The pod's interfaces: named, addressed and routed as the host's are.
//!
//! What an address or a route is the host's kernel has said, and this one is told in the
//! same words: here only the interface's number is put in.

use std::{fs, io, path::Path};

use bulkhead_agent_api::agent::NetworkInterface;
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
    },
};

use crate::{
    device::Bound,
    error::{Doing, Error},
};

/// Sets up interfaces that the host has attached: all of them, or none stays.
pub(crate) async fn set_up(interfaces: &[NetworkInterface]) -> Result<Vec<Bound>, Error> {
    let (connection, handle, _) = rtnetlink::new_connection().doing("reach the network")?;
    let connection = tokio::spawn(connection);
    let set_up = async {
        let mut all = Vec::new();
        for interface in interfaces {
            all.push(one(&handle, interface).await?);
        }
        Ok(all)
    };
    let done = set_up.await;
    connection.abort();
    done
}

async fn one(handle: &Handle, interface: &NetworkInterface) -> Result<Bound, Error> {
    let bound = Bound::take(interface.device).doing("find an interface")?;
    let (name, index) = known(&bound).doing("find an interface")?;
    if name != interface.name {
        let named = LinkUnspec::new_with_index(index).name(&*interface.name);
        let named = handle.link().set(named.build()).execute().await;
        named.map_err(error).doing("name an interface")?;
    }
    leave_to_the_host(&interface.name);
    let up = LinkUnspec::new_with_index(index).mtu(interface.mtu).up();
    let up = handle.link().set(up.build()).execute().await;
    up.map_err(error).doing("bring an interface up")?;
    for bytes in &interface.addresses {
        let address = address(bytes, index).doing("read an address")?;
        let told = tell(handle, RouteNetlinkMessage::NewAddress(address)).await;
        told.doing("give an interface an address")?;
    }
    for bytes in &interface.routes {
        let mut route = RouteMessage::parse(bytes).map_err(io::Error::other);
        if let Ok(route) = &mut route {
            route.attributes.push(RouteAttribute::Oif(index));
        }
        let route = route.doing("read a route")?;
        let told = tell(handle, RouteNetlinkMessage::NewRoute(route)).await;
        told.doing("make a route")?;
    }
    for bytes in &interface.neighbours {
        let neighbour = NeighbourMessage::parse(bytes).map_err(io::Error::other);
        let mut neighbour = neighbour.doing("read a neighbour")?;
        neighbour.header.ifindex = index;
        let told = tell(handle, RouteNetlinkMessage::NewNeighbour(neighbour)).await;
        told.doing("write a neighbour down")?;
    }
    Ok(bound)
}

/// Name and number of the interface that the driver has made of a device.
fn known(bound: &Bound) -> io::Result<(String, u32)> {
    let interface = bound.find("net")?;
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

/// Has the kernel make something, or change it to that.
async fn tell(handle: &Handle, what: RouteNetlinkMessage) -> io::Result<()> {
    let mut message = NetlinkMessage::from(what);
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE;
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

fn error(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
