//! What comes for programs of the host that are in the namespace themselves.
//!
//! All that an interface receives is the guest's. But Docker's name server asks other
//! servers from within the namespace, and `nsenter` takes anybody there: the answers would
//! go to the guest, which knows nothing of the question. So a program of the kernel's (BPF,
//! a classifier of tc) stands before the redirection. What belongs to a connection of the
//! host's stack goes to that; where neighbours are, both are told; all else goes on.
//!
//! A socket that merely listens gets nothing: the address is the guest's.

use std::io;

use rtnetlink::Handle;

use super::{
    PRIORITY,
    bpf::{DATA, DATA_END, Function, Kind, Program, Width},
    classify, number,
};

/// Before the redirection.
pub(super) const BEFORE: u16 = PRIORITY - 1;

/// Has answers to the host's own connections by this interface not go to this tap.
pub(super) async fn stay(handle: &Handle, interface: u32, tap: u32) -> io::Result<()> {
    let program = program(number(tap)?).load_as(Kind::Classifier)?;
    classify(handle, interface, BEFORE, &program).await
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Arp,
    Ipv6,
    Neighbour,
    LookUp,
    Udp,
    Both,
    Host,
    On,
}

/// The program, before a redirection to the tap of this number.
fn program(tap: i32) -> Program<Place> {
    // Places in `struct __sk_buff` and `struct bpf_sock`.
    const PROTOCOL: i16 = 16;
    const STATE: i16 = 72;
    // As the kernel has them, read by a machine with the low byte first.
    let net = |number: u16| i32::from(number.to_be());
    let (ipv4, arp, ipv6) = (net(0x0800), net(0x0806), net(0x86dd));
    // Behind the header of Ethernet.
    const IP: i16 = 14;
    // States of sockets: TCP_ESTABLISHED, which one of UDP has if it is connected, and
    // TCP_LISTEN.
    const CONNECTED: i32 = 1;
    const LISTENS: i32 = 10;
    const TCP: i32 = libc::IPPROTO_TCP;
    const UDP: i32 = libc::IPPROTO_UDP;
    const ADVERTISEMENT: i32 = 136;

    let mut it = Program::new();
    it.copy(6, 1);
    it.load(Width::Word, 7, 6, DATA);
    it.load(Width::Word, 8, 6, DATA_END);
    it.load(Width::Word, 2, 6, PROTOCOL);
    it.if_is(2, arp, Place::Arp);
    it.if_is(2, ipv6, Place::Ipv6);
    it.if_not(2, ipv4, Place::On);

    // A header without options, and the ports; no fragment.
    it.copy(2, 7);
    it.add(2, i32::from(IP) + 20 + 4);
    it.if_greater(2, 8, Place::On);
    it.load(Width::Byte, 2, 7, IP);
    it.if_not(2, 0x45, Place::On);
    it.load(Width::Half, 2, 7, IP + 6);
    it.and(2, net(0x3fff));
    it.if_not(2, 0, Place::On);
    it.load(Width::Byte, 9, 7, IP + 9);
    // Addresses and ports lie as `struct bpf_sock_tuple` has them.
    it.copy(2, 7);
    it.add(2, i32::from(IP) + 12);
    it.set(3, 12);
    it.go(Place::LookUp);

    it.here(Place::Ipv6);
    it.copy(2, 7);
    it.add(2, i32::from(IP) + 40 + 4);
    it.if_greater(2, 8, Place::On);
    it.load(Width::Byte, 9, 7, IP + 6);
    it.if_is(9, libc::IPPROTO_ICMPV6, Place::Neighbour);
    it.copy(2, 7);
    it.add(2, i32::from(IP) + 8);
    it.set(3, 36);

    it.here(Place::LookUp);
    it.copy(1, 6);
    // In the namespace of the interface.
    it.set(4, -1);
    it.set(5, 0);
    it.if_is(9, UDP, Place::Udp);
    it.if_not(9, TCP, Place::On);
    it.call(Function::LookUpTcp);
    it.if_nothing(0, Place::On);
    it.load(Width::Word, 7, 0, STATE);
    it.copy(1, 0);
    it.call(Function::Release);
    it.if_is(7, LISTENS, Place::On);
    it.go(Place::Host);

    it.here(Place::Udp);
    it.call(Function::LookUpUdp);
    it.if_nothing(0, Place::On);
    it.load(Width::Word, 7, 0, STATE);
    it.copy(1, 0);
    it.call(Function::Release);
    it.if_is(7, CONNECTED, Place::Host);
    it.go(Place::On);

    it.here(Place::Arp);
    it.copy(2, 7);
    it.add(2, i32::from(IP) + 8);
    it.if_greater(2, 8, Place::On);
    it.load(Width::Half, 2, 7, IP + 6);
    // An answer, and no question: questions are the guest's to answer.
    it.if_is(2, net(2), Place::Both);
    it.go(Place::On);

    it.here(Place::Neighbour);
    it.load(Width::Byte, 2, 7, IP + 40);
    it.if_not(2, ADVERTISEMENT, Place::On);

    it.here(Place::Both);
    it.copy(1, 6);
    it.set(2, tap);
    it.set(3, 0);
    it.call(Function::CloneRedirect);

    // TC_ACT_OK: up the host's stack.
    it.here(Place::Host);
    it.answer(0);

    // TC_ACT_UNSPEC: to the next filter.
    it.here(Place::On);
    it.answer(-1);
    it
}
