//! Who connects to the namespace's own 127.0.0.1 or ::1 means the guest's: port
//! forwarding of Kubernetes does so, from the host.
//!
//! A program of the kernel's (BPF, of the kind `sk_lookup`) leads such connections to
//! listeners of ours, whatever their port. It goes when its descriptor is closed, so
//! nothing of it outlives the shim, and no rule of anybody's is touched. What is meant for
//! 127.0.0.11 is left alone: there Docker's name server listens.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, OwnedFd, RawFd},
};

use super::bpf::{self, Function, Kind, Program, Width};

/// Connections to the loopback addresses of a network namespace, until it is dropped.
#[derive(Debug)]
pub struct Loopback {
    /// One for each family that the namespace has.
    pub listeners: Vec<TcpListener>,
    /// What leads to them, as long as it is open.
    pub steering: OwnedFd,
}

impl Loopback {
    /// In the network namespace of the calling thread.
    pub(super) fn new() -> io::Result<Loopback> {
        let map = bpf::new_map()?;
        let mut listeners = Vec::new();
        for (key, address) in [
            (0_u32, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            (1, SocketAddr::from((Ipv6Addr::LOCALHOST, 0))),
        ] {
            // A namespace may be without the one or the other.
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            listener.set_nonblocking(true)?;
            bpf::insert(&map, key, listener.as_raw_fd())?;
            listeners.push(listener);
        }
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let program = program(map.as_raw_fd()).load_as(Kind::SocketLookup)?;
        let steering = bpf::attach(&program, namespace.as_raw_fd())?;
        Ok(Loopback {
            listeners,
            steering,
        })
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Ipv6,
    Found,
    Pass,
}

/// The program: finds the listener for a connection to a loopback address.
fn program(map: RawFd) -> Program<Place> {
    // Places in `struct bpf_sk_lookup`.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;
    // Addresses as the kernel has them, read by a machine with the low byte first.
    let docker = i32::from_le_bytes([127, 0, 0, 11]);
    let last_of_ipv6 = i32::from_le_bytes([0, 0, 0, 1]);

    let mut it = Program::new();
    it.copy(6, 1);
    it.load(Width::Word, 2, 6, PROTOCOL);
    it.if_not(2, libc::IPPROTO_TCP, Place::Pass);
    it.load(Width::Word, 2, 6, FAMILY);
    it.if_is(2, libc::AF_INET6, Place::Ipv6);
    it.if_not(2, libc::AF_INET, Place::Pass);
    it.load(Width::Word, 2, 6, LOCAL_IP4);
    it.if_is(2, docker, Place::Pass);
    it.and(2, 0xff);
    it.if_not(2, 127, Place::Pass);
    it.set(3, 0);
    it.go(Place::Found);

    it.here(Place::Ipv6);
    for (word, wanted) in [(0, 0), (4, 0), (8, 0), (12, last_of_ipv6)] {
        it.load(Width::Word, 2, 6, LOCAL_IP6 + word);
        it.if_not(2, wanted, Place::Pass);
    }
    it.set(3, 1);

    // The listener of the family.
    it.here(Place::Found);
    it.store(10, -4, 3);
    it.map(1, map);
    it.copy(2, 10);
    it.add(2, -4);
    it.call(Function::MapLookup);
    it.if_nothing(0, Place::Pass);
    it.copy(7, 0);
    it.copy(1, 6);
    it.copy(2, 7);
    it.set(3, 0);
    it.call(Function::Assign);
    it.copy(1, 7);
    it.call(Function::Release);

    // To whomever it finds otherwise.
    it.here(Place::Pass);
    it.answer(1);
    it
}
