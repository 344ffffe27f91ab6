//! Does this host have what the network of containers needs?
//!
//! It is tried rather than looked for, in network namespaces that end with it.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    thread,
};

use bulkhead_shim::network::try_to_join;
use nix::sched::{CloneFlags, setns};

use super::{
    addresses::Subnets,
    bridge, firewall,
    store::{Lease, State},
};

/// Something that is missing.
#[derive(Debug)]
pub(crate) struct Missing {
    /// What was tried, and what came of it.
    pub(crate) detail: String,
    /// What to do.
    pub(crate) next: &'static str,
}

/// Makes all that a container would get.
pub(crate) fn missing() -> Option<Missing> {
    let missing = |what: &'static str, next| {
        move |error: io::Error| Missing {
            detail: format!("{what}: {error}"),
            next,
        }
    };
    let tried = || -> Result<(), Missing> {
        let made = bridge::namespace();
        let host = made.map_err(missing(
            "network namespace",
            "use a kernel with CONFIG_NET_NS",
        ))?;
        let subnets = Subnets::choose(&[], super::forwarding::has_v6().then_some([0; 5]));
        let subnets = subnets.ok_or_else(|| Missing {
            detail: "no network is free".to_owned(),
            next: "report this",
        })?;
        bridge::raise(&host, &subnets).map_err(missing(
            "bridge",
            "load or install its module: `modprobe bridge`",
        ))?;
        let mut state = State::new(subnets);
        let lease = example();
        state.leases.push(lease.clone());
        let namespace = super::connected(&host, &state, &lease).map_err(missing(
            "veth",
            "load or install its module: `modprobe veth`",
        ))?;
        let next = "load or install tun, sch_ingress, cls_u32 and act_mirred (`modprobe tun`)";
        try_to_join(namespace).map_err(missing("tun and tc redirection", next))?;
        let next = "install the package nftables, and nf_tables with its parts for NAT";
        table(host, state).map_err(missing("nf_tables", next))
    };
    tried().err()
}

/// One that uses everything.
fn example() -> Lease {
    Lease {
        id: "check".to_owned(),
        number: 2,
        hostname: "check".to_owned(),
        hosts: Vec::new(),
        ports: "1:1".parse().into_iter().collect(),
    }
}

/// Puts the table into that namespace: a program is started in that of its thread.
fn table(namespace: OwnedFd, state: State) -> io::Result<()> {
    let visitor = thread::spawn(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET)?;
        firewall::apply(&state, &(Vec::new(), true))?;
        firewall::remove()
    });
    let done = visitor.join();
    done.unwrap_or_else(|_| Err(io::Error::other("the thread ended")))
}
