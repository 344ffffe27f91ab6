//! The bridge, and what hangs on it: told to the kernel by rtnetlink.
//!
//! `host` is always the network namespace in which the bridge is: the host's, or in tests
//! one of their own.

use std::{
    fs::File,
    io,
    os::fd::{AsRawFd, OwnedFd},
    thread,
};

use bulkhead_shim::network::{error, visit};
use futures::TryStreamExt;
use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use rtnetlink::{
    AddressMessageBuilder, Handle, LinkBridge, LinkBridgePort, LinkUnspec, LinkVeth,
    RouteMessageBuilder,
    packet_route::{
        AddressFamily,
        address::{AddressAttribute, AddressHeaderFlags, AddressMessage, AddressScope},
        link::{InfoData, InfoVeth, LinkAttribute, LinkFlags, LinkMessage},
        route::{RouteAddress, RouteAttribute, RouteMessage},
    },
};

use super::{
    BRIDGE,
    addresses::{Addresses, Subnets},
};

/// The interface of a container, as everybody calls it.
const INSIDE: &str = "eth0";

/// An interface of the host.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) name: String,
    pub(super) index: u32,
    pub(super) is_loopback: bool,
    /// Networks that it is in, without those of one link.
    pub(super) addresses: Vec<IpNet>,
    /// Networks behind it.
    pub(super) routes: Vec<IpNet>,
}

/// The namespace of this process.
pub(super) fn host() -> io::Result<OwnedFd> {
    Ok(File::open("/proc/self/ns/net")?.into())
}

/// All interfaces of the host.
pub(super) fn interfaces(host: &OwnedFd) -> io::Result<Vec<Interface>> {
    visit(host.try_clone()?, async |handle| {
        let links = links(&handle).await?;
        let mut all: Vec<Interface> = links.iter().map(described).collect();
        let addresses: Vec<AddressMessage> = handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(error)?;
        for address in &addresses {
            let of = all.iter_mut().find(|of| of.index == address.header.index);
            if let (Some(of), Some(net)) = (of, net_of(address)) {
                of.addresses.push(net);
            }
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut asked = RouteMessage::default();
            asked.header.address_family = family;
            let routes: Vec<RouteMessage> = handle
                .route()
                .get(asked)
                .execute()
                .try_collect()
                .await
                .map_err(error)?;
            for route in &routes {
                let by =
                    |of: &&mut Interface| route.attributes.contains(&RouteAttribute::Oif(of.index));
                let of = all.iter_mut().find(by);
                if let (Some(of), Some(net)) = (of, behind(route)) {
                    of.routes.push(net);
                }
            }
        }
        Ok(all)
    })
}

/// Makes the bridge, unless it is there.
pub(super) fn raise(host: &OwnedFd, subnets: &Subnets) -> io::Result<()> {
    let own = subnets.gateway();
    let subnets = subnets.clone();
    visit(host.try_clone()?, async move |handle| {
        let all = links(&handle).await?;
        if index_of(&all, BRIDGE).is_none() {
            let message = LinkBridge::new(BRIDGE).address(own.mac.to_vec()).build();
            handle.link().add(message).execute().await.map_err(error)?;
        }
        let index = index(&handle, BRIDGE).await?;
        give(&handle, index, &subnets, own).await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        handle.link().set(up).execute().await.map_err(error)
    })
}

/// Removes an interface of the host, if it is there.
pub(super) fn remove(host: &OwnedFd, name: &str) -> io::Result<()> {
    let name = name.to_owned();
    visit(host.try_clone()?, async move |handle| {
        let Some(index) = index_of(&links(&handle).await?, &name) else {
            return Ok(());
        };
        match handle.link().del(index).execute().await.map_err(error) {
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
            done => done,
        }
    })
}

/// A network namespace with nothing but its loopback interface, which is up. It is there as
/// long as somebody has it open, or is in it.
pub(super) fn namespace() -> io::Result<OwnedFd> {
    let maker = thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET)?;
        File::open("/proc/thread-self/ns/net")
    });
    let made = maker
        .join()
        .unwrap_or_else(|_| Err(io::Error::other("the thread ended")))?;
    let made: OwnedFd = made.into();
    visit(made.try_clone()?, async |handle| {
        let index = index(&handle, "lo").await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        handle.link().set(up).execute().await.map_err(error)
    })?;
    Ok(made)
}

/// Joins a namespace with the bridge: `name` is the host's end.
pub(super) fn connect(
    host: &OwnedFd,
    namespace: &OwnedFd,
    name: &str,
    subnets: &Subnets,
    own: Addresses,
) -> io::Result<()> {
    let (name, gateway) = (name.to_owned(), subnets.gateway());
    let (inside, subnets) = (namespace.try_clone()?, subnets.clone());
    visit(host.try_clone()?, async move |handle| {
        let bridge = index(&handle, BRIDGE).await?;
        // In its namespace from the first moment: nobody ever sees it elsewhere.
        let peer = LinkUnspec::new_with_name(INSIDE)
            .address(own.mac.to_vec())
            .setns_by_fd(inside.as_raw_fd())
            .build();
        let pair = LinkVeth::new(&name, INSIDE)
            .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
            .controller(bridge)
            .up()
            .build();
        handle.link().add(pair).execute().await.map_err(error)?;
        // A container may reach itself by a port that it published.
        let port = index(&handle, &name).await?;
        let hairpin = LinkBridgePort::new(port).hairpin(true).build();
        handle
            .link()
            .set_port(hairpin)
            .execute()
            .await
            .map_err(error)
    })?;
    visit(namespace.try_clone()?, async move |handle| {
        let index = index(&handle, INSIDE).await?;
        give(&handle, index, &subnets, own).await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        handle.link().set(up).execute().await.map_err(error)?;
        let route = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .gateway(gateway.v4)
            .output_interface(index)
            .build();
        handle.route().add(route).execute().await.map_err(error)?;
        if let Some(gateway) = gateway.v6 {
            let route = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .gateway(gateway)
                .output_interface(index)
                .build();
            handle.route().add(route).execute().await.map_err(error)?;
        }
        Ok(())
    })
}

/// Gives an interface its addresses; those that it has it keeps.
async fn give(handle: &Handle, index: u32, subnets: &Subnets, own: Addresses) -> io::Result<()> {
    let v4 = AddressMessageBuilder::<std::net::Ipv4Addr>::new()
        .index(index)
        .address(own.v4, subnets.v4.prefix_len())
        .build();
    let mut all = vec![v4];
    if let (Some(net), Some(own)) = (subnets.v6, own.v6) {
        let mut v6 = AddressMessageBuilder::<std::net::Ipv6Addr>::new()
            .index(index)
            .address(own, net.prefix_len())
            .build();
        // Numbers are given once: nobody has to be asked whether it is free.
        v6.header.flags |= AddressHeaderFlags::Nodad;
        all.push(v6);
    }
    for address in all {
        let mut request = handle.address().add(index, own.v4.into(), 32);
        *request.message_mut() = address;
        match request.execute().await.map_err(error) {
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            done => done?,
        }
    }
    Ok(())
}

async fn links(handle: &Handle) -> io::Result<Vec<LinkMessage>> {
    let all = handle.link().get().execute();
    all.try_collect().await.map_err(error)
}

fn described(link: &LinkMessage) -> Interface {
    Interface {
        name: name_of(link).unwrap_or_default().to_owned(),
        index: link.header.index,
        is_loopback: link.header.flags.contains(LinkFlags::Loopback),
        ..Interface::default()
    }
}

fn name_of(link: &LinkMessage) -> Option<&str> {
    link.attributes
        .iter()
        .find_map(|attribute| match attribute {
            LinkAttribute::IfName(name) => Some(name.as_str()),
            _ => None,
        })
}

fn index_of(all: &[LinkMessage], name: &str) -> Option<u32> {
    let found = all.iter().find(|link| name_of(link) == Some(name));
    found.map(|link| link.header.index)
}

async fn index(handle: &Handle, name: &str) -> io::Result<u32> {
    let found = index_of(&links(handle).await?, name);
    found.ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("no interface {name}")))
}

/// The network that an address is in.
fn net_of(address: &AddressMessage) -> Option<IpNet> {
    if address.header.scope == AddressScope::Link {
        return None;
    }
    let ip = address
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            AddressAttribute::Address(ip) => Some(*ip),
            _ => None,
        })?;
    Some(IpNet::new(ip, address.header.prefix_len).ok()?.trunc())
}

/// The network that a route leads to.
fn behind(route: &RouteMessage) -> Option<IpNet> {
    let length = route.header.destination_prefix_length;
    let to = route
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some((*ip).into()),
            RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some((*ip).into()),
            _ => None,
        });
    let everywhere = || match route.header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        _ => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    IpNet::new(to.unwrap_or_else(everywhere), length).ok()
}
