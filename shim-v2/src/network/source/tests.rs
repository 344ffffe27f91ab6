use std::os::fd::OwnedFd;

use super::{
    super::bpf::{Kind, answer},
    *,
};

const MAC: [u8; 6] = [2, 0xfe, 0, 0, 0xff, 7];
const OTHER: [u8; 6] = [2, 0xfe, 0, 0, 0xff, 8];
/// With bytes whose highest bit is set: a comparison of signs would be seen.
const IPV4: [[u8; 4]; 2] = [[10, 9, 0, 2], [192, 168, 255, 254]];
const IPV6: [u8; 16] = [0xfd, 9, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0xfe];
const ON_LINK: [u8; 16] = [0xfe, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1];

/// The program; none for a user who may not load it.
fn guard() -> Option<OwnedFd> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    let mut other = IPV6;
    other[15] = 0xfd;
    let own = Own {
        mac: MAC,
        ipv4: IPV4.to_vec(),
        ipv6: vec![other, IPV6],
    };
    Some(program(&own).load_as(Kind::Classifier).unwrap())
}

fn frame(from: [u8; 6], kind: u16, payload: &[u8]) -> Vec<u8> {
    [&[0xff; 6], &from[..], &kind.to_be_bytes(), payload].concat()
}

fn ipv4(from: [u8; 4], protocol: u8, payload: &[u8]) -> Vec<u8> {
    let header = [0x45, 0, 0, 40, 0, 0, 0, 0, 64, protocol, 0, 0];
    let payload = [&header[..], &from, &[10, 9, 0, 1], payload].concat();
    frame(MAC, 0x0800, &payload)
}

fn arp(hardware: [u8; 6], from: [u8; 4]) -> Vec<u8> {
    let header = [0, 1, 8, 0, 6, 4, 0, 2];
    let rest = [0; 10];
    frame(
        MAC,
        0x0806,
        &[&header[..], &hardware, &from, &rest].concat(),
    )
}

fn ipv6(from: [u8; 16], next: u8, payload: &[u8]) -> Vec<u8> {
    let header = [0x60, 0, 0, 0, 0, 24, next, 255];
    frame(MAC, 0x86dd, &[&header[..], &from, &IPV6, payload].concat())
}

/// A neighbour's advertisement of an address.
fn claim(target: [u8; 16]) -> Vec<u8> {
    [&[136, 0, 0, 0, 0, 0, 0, 0], &target[..]].concat()
}

#[test]
fn only_what_has_its_own_addresses_passes() {
    let Some(program) = guard() else {
        return;
    };
    let none = [0; 16];
    let dhcp = [0, 68, 0, 67, 0, 8, 0, 0];
    let dns = [0, 68, 0, 53, 0, 8, 0, 0];
    let stranger = {
        let mut it = IPV6;
        it[8] = 0xfe;
        it
    };
    let behind = |next: u8, kind: u8| {
        let options = [next, 0, 5, 2, 0, 0, 1, 0];
        [&options[..], &[kind, 0, 0, 0], &[0; 20]].concat()
    };
    let icmp = |kind: u8| [&[kind, 0, 0, 0], &[0; 20][..]].concat();
    let mut cases = vec![
        ("its IPv4", true, ipv4(IPV4[0], 6, &[0; 20])),
        ("its second IPv4", true, ipv4(IPV4[1], 47, &[0; 20])),
        ("another IPv4", false, ipv4([10, 9, 0, 3], 6, &[0; 20])),
        (
            "another end of IPv4",
            false,
            ipv4([192, 168, 255, 253], 6, &[0; 20]),
        ),
        ("a question for an address", true, ipv4([0; 4], 17, &dhcp)),
        (
            "another question from nobody",
            false,
            ipv4([0; 4], 17, &dns),
        ),
        ("TCP from nobody", false, ipv4([0; 4], 6, &dhcp)),
        (
            "another MAC",
            false,
            frame(OTHER, 0x0800, &ipv4(IPV4[0], 6, &[0; 20])[14..]),
        ),
        ("its ARP", true, arp(MAC, IPV4[1])),
        ("ARP of who has no address yet", true, arp(MAC, [0; 4])),
        ("ARP for another address", false, arp(MAC, [10, 9, 0, 1])),
        ("ARP for another MAC", false, arp(OTHER, IPV4[0])),
        ("its IPv6", true, ipv6(IPV6, 6, &[0; 24])),
        ("an IPv6 of the link", true, ipv6(ON_LINK, 17, &[0; 24])),
        ("another IPv6", false, ipv6(stranger, 6, &[0; 24])),
        (
            "whether an address is free",
            true,
            ipv6(none, 58, &icmp(135)),
        ),
        ("UDP from nobody", false, ipv6(none, 17, &[0; 24])),
        (
            "a neighbour that it is",
            true,
            ipv6(ON_LINK, 58, &claim(IPV6)),
        ),
        (
            "a neighbour of the link",
            true,
            ipv6(ON_LINK, 58, &claim(ON_LINK)),
        ),
        (
            "a neighbour that it is not",
            false,
            ipv6(IPV6, 58, &claim(stranger)),
        ),
        ("a router", false, ipv6(ON_LINK, 58, &icmp(134))),
        ("a better router", false, ipv6(ON_LINK, 58, &icmp(137))),
        ("a ping", true, ipv6(IPV6, 58, &icmp(128))),
        (
            "a group that it is in",
            true,
            ipv6(none, 0, &behind(58, 143)),
        ),
        (
            "a neighbour behind options",
            false,
            ipv6(IPV6, 0, &behind(58, 136)),
        ),
        (
            "a neighbour behind others",
            false,
            ipv6(IPV6, 60, &behind(58, 136)),
        ),
        (
            "a neighbour behind a route",
            false,
            ipv6(IPV6, 43, &behind(58, 136)),
        ),
        (
            "options behind options",
            false,
            ipv6(IPV6, 60, &behind(0, 0)),
        ),
        (
            "a fragment behind options",
            false,
            ipv6(IPV6, 0, &behind(44, 0)),
        ),
        ("TCP behind options", true, ipv6(IPV6, 60, &behind(6, 0))),
        ("a tag of a VLAN", false, frame(MAC, 0x8100, &[0; 46])),
        ("LLDP", false, frame(MAC, 0x88cc, &[0; 46])),
    ];
    // Half of a header is none.
    cases.push(("half of ARP", false, frame(MAC, 0x0806, &[0; 27])));
    for (kind, least) in [(0x0800, 20), (0x86dd, 40)] {
        let half = frame(MAC, kind, &vec![0; least - 1]);
        let answer = answer(&program, &half).unwrap_or(2);
        assert_eq!(answer, 2, "less than a header of {kind:#x}");
    }
    for (next, whole) in [(58, claim(IPV6)), (0, behind(58, 143))] {
        let mut half = ipv6(IPV6, next, &whole);
        half.truncate(14 + 40 + 8);
        cases.push(("less than its content", false, half));
    }
    for (what, passes, frame) in cases {
        let expected = if passes { -1 } else { 2 };
        assert_eq!(answer(&program, &frame).unwrap(), expected, "{what}");
    }
}
