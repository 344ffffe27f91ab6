//! Whose name a guest may speak in: its own.
//!
//! A program of the kernel's (BPF, a classifier of tc) stands before what comes from the
//! tap. It drops frames with another address of Ethernet as their source, and with another
//! address of IPv4, IPv6 or ARP than those of the interface; claims to be somebody else's
//! neighbour, or a router; and all that is neither IP nor ARP. The guest cannot reach it.
//!
//! An address of IPv6 that is good on the link only is not asked after: nobody gave it.

use std::io;

use rtnetlink::{
    Handle,
    packet_core::Parseable,
    packet_route::address::{AddressAttribute, AddressMessage},
};

use super::{
    Link,
    answers::BEFORE,
    bpf::{Kind, Program, Width},
    classify, forget,
};

/// The addresses of a guest's interface.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Own {
    mac: [u8; 6],
    ipv4: Vec<[u8; 4]>,
    ipv6: Vec<[u8; 16]>,
}

impl Own {
    pub(super) fn of(link: &Link) -> Own {
        let mut own = Own {
            mac: link.mac,
            ipv4: Vec::new(),
            ipv6: Vec::new(),
        };
        for address in &link.addresses {
            let Ok(address) = AddressMessage::parse(address) else {
                continue;
            };
            // Of two sides of a wire, that of the interface.
            let local = |it: &AddressAttribute| match it {
                AddressAttribute::Local(ip) => Some((0, *ip)),
                AddressAttribute::Address(ip) => Some((1, *ip)),
                _ => None,
            };
            let ip = address.attributes.iter().filter_map(local).min();
            match ip.map(|(_, ip)| ip) {
                Some(std::net::IpAddr::V4(ip)) => own.ipv4.push(ip.octets()),
                Some(std::net::IpAddr::V6(ip)) => own.ipv6.push(ip.octets()),
                None => {}
            }
        }
        own
    }
}

/// Has nothing pass from a tap that speaks in another name. What was so before for other
/// addresses is so no more.
pub(super) async fn only(handle: &Handle, tap: u32, own: &Own) -> io::Result<()> {
    let program = program(own).load_as(Kind::Classifier)?;
    classify(handle, tap, BEFORE, &program).await
}

/// Has everything pass again.
pub(super) async fn any(handle: &Handle, tap: u32) -> io::Result<()> {
    forget(handle, tap, BEFORE).await
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Arp,
    Dhcp,
    Ipv6,
    /// Not this address of IPv6, as the source of a packet or the target of a claim.
    Next(bool, usize),
    Unspecified,
    Payload,
    Icmp,
    Claim,
    Options,
    Pass,
    Drop,
}

/// A number as a machine with the low byte first reads it.
fn word(bytes: &[u8]) -> i32 {
    let mut word = [0; 4];
    word[..bytes.len()].copy_from_slice(bytes);
    i32::from_le_bytes(word)
}

/// Places in a frame, behind the header of Ethernet.
const IP: i16 = 14;
const IPV6_PAYLOAD: i16 = IP + 40;

/// Headers that may stand before others (RFC 8200, 4).
const HOP_BY_HOP: i32 = libc::IPPROTO_HOPOPTS;
const ROUTING: i32 = libc::IPPROTO_ROUTING;
const FRAGMENT: i32 = libc::IPPROTO_FRAGMENT;
const DESTINATION: i32 = libc::IPPROTO_DSTOPTS;

fn program(own: &Own) -> Program<Place> {
    // Places in `struct __sk_buff`.
    const PROTOCOL: i16 = 16;
    const TAGGED: i16 = 20;
    let net = |number: u16| word(&number.to_be_bytes());

    let mut it = Program::new();
    it.copy(6, 1);
    it.load(Width::Word, 7, 6, super::bpf::DATA);
    it.load(Width::Word, 8, 6, super::bpf::DATA_END);
    reaches(&mut it, IP);
    is_own_mac(&mut it, own, 6);
    it.load(Width::Word, 2, 6, TAGGED);
    it.if_not(2, 0, Place::Drop);
    it.load(Width::Word, 2, 6, PROTOCOL);
    it.if_is(2, net(0x0806), Place::Arp);
    it.if_is(2, net(0x86dd), Place::Ipv6);
    it.if_not(2, net(0x0800), Place::Drop);

    reaches(&mut it, IP + 20);
    it.load(Width::Word, 2, 7, IP + 12);
    for address in &own.ipv4 {
        it.if_is(2, word(address), Place::Pass);
    }
    it.if_is(2, 0, Place::Dhcp);
    it.go(Place::Drop);

    // Who has no address yet may ask for one.
    it.here(Place::Dhcp);
    reaches(&mut it, IP + 24);
    it.load(Width::Byte, 2, 7, IP);
    it.if_not(2, 0x45, Place::Drop);
    it.load(Width::Byte, 2, 7, IP + 9);
    it.if_not(2, libc::IPPROTO_UDP, Place::Drop);
    it.load(Width::Half, 2, 7, IP + 22);
    it.if_is(2, net(67), Place::Pass);
    it.go(Place::Drop);

    it.here(Place::Arp);
    reaches(&mut it, IP + 28);
    is_own_mac(&mut it, own, IP + 8);
    it.load(Width::Word, 2, 7, IP + 14);
    for address in &own.ipv4 {
        it.if_is(2, word(address), Place::Pass);
    }
    // Who has no address yet asks whether one is free.
    it.if_is(2, 0, Place::Pass);
    it.go(Place::Drop);

    it.here(Place::Ipv6);
    reaches(&mut it, IPV6_PAYLOAD);
    is_own_ipv6(&mut it, own, IP + 8, Place::Payload);
    it.here(Place::Next(true, own.ipv6.len()));
    for at in [8, 12, 16, 20] {
        it.load(Width::Word, 2, 7, IP + at);
        it.if_not(2, 0, Place::Drop);
    }
    it.go(Place::Unspecified);

    it.here(Place::Unspecified);
    it.load(Width::Byte, 2, 7, IP + 6);
    it.if_is(2, libc::IPPROTO_ICMPV6, Place::Icmp);
    it.if_not(2, HOP_BY_HOP, Place::Drop);

    // What says who neighbours are stands behind no other header, but for what is told to
    // routers of multicast.
    it.here(Place::Payload);
    it.load(Width::Byte, 9, 7, IP + 6);
    it.if_is(9, libc::IPPROTO_ICMPV6, Place::Icmp);
    for header in [HOP_BY_HOP, ROUTING, DESTINATION] {
        it.if_is(9, header, Place::Options);
    }
    it.go(Place::Pass);

    it.here(Place::Options);
    reaches(&mut it, IPV6_PAYLOAD + 9);
    it.load(Width::Byte, 2, 7, IPV6_PAYLOAD);
    for header in [HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION] {
        it.if_is(2, header, Place::Drop);
    }
    it.if_not(2, libc::IPPROTO_ICMPV6, Place::Pass);
    it.if_not(9, HOP_BY_HOP, Place::Drop);
    it.load(Width::Byte, 2, 7, IPV6_PAYLOAD + 1);
    it.if_not(2, 0, Place::Drop);
    it.load(Width::Byte, 2, 7, IPV6_PAYLOAD + 8);
    for report in [131, 132, 143] {
        it.if_is(2, report, Place::Pass);
    }
    it.go(Place::Drop);

    it.here(Place::Icmp);
    reaches(&mut it, IPV6_PAYLOAD + 1);
    it.load(Width::Byte, 2, 7, IPV6_PAYLOAD);
    // A router's advertisement, and its word of a better one.
    it.if_is(2, 134, Place::Drop);
    it.if_is(2, 137, Place::Drop);
    it.if_is(2, 136, Place::Claim);
    it.go(Place::Pass);

    it.here(Place::Claim);
    reaches(&mut it, IPV6_PAYLOAD + 24);
    is_own_ipv6(&mut it, own, IPV6_PAYLOAD + 8, Place::Pass);
    it.here(Place::Next(false, own.ipv6.len()));

    // TC_ACT_SHOT.
    it.here(Place::Drop);
    it.answer(2);

    // TC_ACT_UNSPEC: to the next filter.
    it.here(Place::Pass);
    it.answer(-1);
    it
}

/// Drops a frame that has not so many bytes.
fn reaches(it: &mut Program<Place>, bytes: i16) {
    it.copy(2, 7);
    it.add(2, bytes.into());
    it.if_greater(2, 8, Place::Drop);
}

/// Drops one in which another address of Ethernet is here.
fn is_own_mac(it: &mut Program<Place>, own: &Own, at: i16) {
    it.load(Width::Half, 2, 7, at);
    it.if_not(2, word(&own.mac[..2]), Place::Drop);
    it.load(Width::Word, 2, 7, at + 2);
    it.if_not(2, word(&own.mac[2..]), Place::Drop);
}

/// Goes there if one of the own addresses is here, or one that is good on the link only;
/// else to the last of its labels.
fn is_own_ipv6(it: &mut Program<Place>, own: &Own, at: i16, found: Place) {
    let is_source = found == Place::Payload;
    // fe80::/10.
    it.load(Width::Half, 2, 7, at);
    it.and(2, word(&[0xff, 0xc0]));
    it.if_is(2, word(&[0xfe, 0x80]), found);
    for (number, address) in own.ipv6.iter().enumerate() {
        it.here(Place::Next(is_source, number));
        let next = Place::Next(is_source, number + 1);
        for (offset, part) in (at..).step_by(4).zip(address.chunks(4)) {
            it.load(Width::Word, 2, 7, offset);
            it.if_not(2, word(part), next);
        }
        it.go(found);
    }
}

#[cfg(test)]
mod tests;
