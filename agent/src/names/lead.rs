//! Who asks 127.0.0.11 at port 53 is led to another port there: a container may listen at
//! port 53 of all addresses itself, as name servers do.
//!
//! Programs of the kernel's (eBPF) for the cgroup of all containers change the port where
//! one connects or sends to, and change it back in what it hears of whom that is from; but
//! only in the guest's own network namespace: a container may have made others, in which
//! somebody else has that address.

use std::{fs::File, io, os::fd::OwnedFd, path::Path};

use super::SERVER;
use crate::{
    bpf::{self, Hook, Instruction, constant, load, op, store},
    sys,
};

/// Leads there as long as what this answers is kept.
pub(super) fn lead(cgroup: &Path, port: u16) -> io::Result<Vec<OwnedFd>> {
    let cgroup = File::open(cgroup)?;
    let namespace = sys::network_namespace()?;
    let link = |(hook, from, to)| {
        let program = bpf::load_program(hook, &program(namespace, from, to))?;
        bpf::link(hook, &cgroup, program)
    };
    hooks(port).into_iter().map(link).collect()
}

/// Where, and which port becomes which.
fn hooks(port: u16) -> [(Hook, u16, u16); 4] {
    let asked = SERVER.port();
    [
        (Hook::Connect4, asked, port),
        (Hook::SendTo4, asked, port),
        (Hook::ReceiveFrom4, port, asked),
        (Hook::PeerName4, port, asked),
    ]
}

/// Changes the one port into the other if the address is the server's, and the network
/// namespace the one with this cookie.
fn program(namespace: u32, from: u16, to: u16) -> Vec<Instruction> {
    const NETNS_COOKIE: u32 = 122;
    // Places in `struct bpf_sock_addr`, whose numbers are in the order of the network.
    const ADDRESS: i16 = 4;
    const PORT: i16 = 24;
    let address = u32::from_le_bytes(SERVER.ip().octets());
    let mut program = vec![
        constant(op::MOVE_PLACE, 6, 0).from(1),
        constant(op::CALL, 0, NETNS_COOKIE),
        constant(op::JUMP_NOT_EQUAL_64, 0, namespace),
        constant(op::MOVE_PLACE, 1, 0).from(6),
        load(2, ADDRESS),
        constant(op::JUMP_NOT_EQUAL, 2, address),
        load(2, PORT),
        constant(op::JUMP_NOT_EQUAL, 2, from.to_be().into()),
        constant(op::MOVE_CONST, 2, to.to_be().into()),
        store(PORT, 2),
        // Whatever it is, it may go on.
        constant(op::MOVE_CONST, 0, 1),
        constant(op::EXIT, 0, 0),
    ];
    // To the last two.
    for (at, skipped) in [(2, 7), (5, 4), (7, 2)] {
        program[at].offset = skipped;
    }
    program
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_takes_the_programs() {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return;
        }
        let namespace = sys::network_namespace().unwrap();
        for (hook, from, to) in hooks(40_000) {
            bpf::load_program(hook, &program(namespace, from, to)).unwrap();
        }
    }
}
