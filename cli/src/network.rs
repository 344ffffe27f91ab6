//! The network of containers that `bulkhead run` starts: a bridge of the host with
//! translated addresses, published ports, and names.
//!
//! A container has a network namespace that nothing but descriptors keeps: that of its
//! `bulkhead run`, and those of its shim. An interface in it, `eth0`, is joined with the
//! bridge. When both processes are gone so is the namespace, and with it the interface and
//! its other end on the bridge, whatever killed them.
//!
//! All else follows from one file, the leases ([`store`]): rules, files of hosts, settings
//! of the kernel. It is made anew as a whole whenever a container comes or goes. A lease
//! without an owner is found by whoever looks next; with the last one goes the bridge.

mod addresses;
mod bridge;
pub(crate) mod check;
mod firewall;
mod forwarding;
mod list;
mod names;
mod ports;
mod store;

use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
};

use bulkhead_client::{ContainerId, at, host, paths};

use self::{
    addresses::Subnets,
    store::{Lease, State, Store},
};
use crate::{
    args::network::{Mode, Options, Verb},
    error::{Error, Result, refused},
    run::require_root,
};

/// The bridge, and the beginning of the names of what hangs on it.
const BRIDGE: &str = "bulkhead0";

/// What a container has of the network; dropped, it has nothing of it any more.
#[derive(Debug)]
pub(crate) struct Network {
    id: ContainerId,
    /// Keeps the interface that is in it.
    namespace: Option<OwnedFd>,
    /// Files of the host, and where the container has them.
    files: Vec<(PathBuf, &'static str)>,
}

impl Network {
    /// Gives a container whose directory is there the network that its caller wants.
    pub(crate) fn make(wanted: &Options, id: &ContainerId, hostname: &str) -> Result<Self> {
        let mut network = Network {
            id: id.clone(),
            namespace: None,
            files: Vec::new(),
        };
        let containers = Path::new(paths::CONTAINERS);
        let hosts = names::hosts_file(containers, id.as_str());
        distinct(wanted)?;
        if wanted.network == Some(Mode::None) {
            needs_none(wanted)?;
            let text = names::hosts_alone(hostname, &wanted.add_host);
            names::make(&hosts, &text).map_err(at("make", &hosts))?;
            network.files.push((hosts, "/etc/hosts"));
            return Ok(network);
        }
        ports::check(&wanted.publish)?;
        names::make(&hosts, "").map_err(at("make", &hosts))?;
        network.files.push((hosts, "/etc/hosts"));
        let (text, are_own) = names::resolvers(&wanted.dns);
        if are_own {
            let _ = writeln!(
                io::stderr(),
                "bulkhead: all servers for names of the host are its own, at addresses that a \
                 container cannot reach; name another one with --dns"
            );
        }
        let path = containers.join(id.as_str()).join("resolv.conf");
        names::make(&path, &text).map_err(at("make", &path))?;
        network.files.push((path, "/etc/resolv.conf"));
        let store = Store::lock(&directory())?;
        match join(&store, id, hostname, wanted) {
            Ok(namespace) => network.namespace = Some(namespace),
            Err(error) => {
                // The error is told, and what cannot be undone is found by the next one.
                let _ = part(store, id);
                return Err(error);
            }
        }
        Ok(network)
    }

    /// The namespace's file, as long as this process lives.
    pub(crate) fn namespace(&self) -> Option<String> {
        let fd = self.namespace.as_ref()?.as_raw_fd();
        Some(format!("/proc/{}/fd/{fd}", std::process::id()))
    }

    /// Files of the host, and where the container shall have them.
    pub(crate) fn files(&self) -> &[(PathBuf, &'static str)] {
        &self.files
    }

    /// Takes all away, and says what went wrong.
    pub(crate) fn leave(mut self) -> Result<()> {
        match self.namespace.take() {
            Some(_) => part(Store::lock(&directory())?, &self.id),
            None => Ok(()),
        }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        if self.namespace.take().is_some() {
            // Why there is an end is told elsewhere; what is left is found by the next one.
            let _ = Store::lock(&directory()).and_then(|store| part(store, &self.id));
        }
    }
}

/// Takes away what a container had whose processes are gone for certain.
pub(crate) fn forget(id: &ContainerId) -> Result<()> {
    match Store::lock_if_there(&directory())? {
        Some(store) => part(store, id),
        None => Ok(()),
    }
}

/// Takes away what killed ones left. A failure is nobody's who looks here on the way.
pub(crate) fn sweep() {
    let swept = || -> Result<()> {
        let Some(store) = Store::lock_if_there(&directory())? else {
            return Ok(());
        };
        let Some(mut state) = store.load()? else {
            return store.remove();
        };
        let interfaces = interface_names()?;
        if state.forget_dead(Path::new(paths::CONTAINERS), &interfaces) || state.leases.is_empty() {
            settle(store, &mut state)?;
        }
        Ok(())
    };
    let _ = swept();
}

/// `bulkhead network`.
pub(crate) fn run(verb: &Verb) -> Result<u8> {
    require_root()?;
    match verb {
        Verb::Ls { format } => list::list(*format),
        Verb::Prune => prune(),
    }
}

/// Makes all follow from the leases that hold.
fn prune() -> Result<u8> {
    let Some(store) = Store::lock_if_there(&directory())? else {
        return Ok(0);
    };
    let interfaces = interface_names()?;
    let own = format!("{BRIDGE}-");
    let loaded = match store.load() {
        // Nobody is in the network whose file cannot be read.
        Err(_) if !interfaces.iter().any(|name| name.starts_with(&own)) => None,
        loaded => loaded?,
    };
    let Some(mut state) = loaded else {
        take_down()?;
        store.remove()?;
        return Ok(0);
    };
    let before: Vec<String> = state.leases.iter().map(|lease| lease.id.clone()).collect();
    state.forget_dead(Path::new(paths::CONTAINERS), &interfaces);
    let mut text = String::new();
    for id in before {
        if state.leases.iter().all(|lease| lease.id != id) {
            text.push_str(&format!("{id}\n"));
        }
    }
    settle(store, &mut state)?;
    io::stdout()
        .write_all(text.as_bytes())
        .map_err(host("write the list"))?;
    Ok(0)
}

/// Where everything about the network is remembered.
fn directory() -> PathBuf {
    PathBuf::from(paths::NETWORK)
}

/// Names what failed.
fn failed(action: &'static str) -> impl FnOnce(io::Error) -> Error {
    move |source| Error::Network { action, source }
}

/// Without a network there is nothing that these could mean.
fn needs_none(wanted: &Options) -> Result<()> {
    const REASON: &str = "a container with --network none has none; leave one of both away";
    let dns = wanted.dns.first().map(|ip| ("--dns", ip.to_string()));
    let ip = wanted.ip.map(|ip| ("--ip", ip.to_string()));
    let port = wanted.publish.first();
    let port = port.map(|port| ("--publish", port.to_string()));
    let gateway = wanted.add_host.iter().find(|added| added.ip.is_none());
    let gateway = gateway.map(|added| ("--add-host", added.to_string()));
    match [port, dns, ip, gateway].into_iter().flatten().next() {
        Some((what, value)) => Err(refused(what, &value, REASON)),
        None => Ok(()),
    }
}

/// What is said twice is a mistake.
fn distinct(wanted: &Options) -> Result<()> {
    let dns: Vec<String> = wanted.dns.iter().map(ToString::to_string).collect();
    let hosts: Vec<String> = wanted.add_host.iter().map(ToString::to_string).collect();
    for (what, all) in [("--dns", dns), ("--add-host", hosts)] {
        for (n, value) in all.iter().enumerate() {
            if all.iter().take(n).any(|other| other == value) {
                return Err(refused(what, value, "it is given twice"));
            }
        }
    }
    Ok(())
}

fn interface_names() -> Result<Vec<String>> {
    let all = bridge::host().and_then(|host| bridge::interfaces(&host));
    let all = all.map_err(failed("list the interfaces of the host"))?;
    Ok(all.into_iter().map(|it| it.name).collect())
}

/// Takes a lease, and makes what it promises.
fn join(store: &Store, id: &ContainerId, hostname: &str, wanted: &Options) -> Result<OwnedFd> {
    let containers = Path::new(paths::CONTAINERS);
    let own = bridge::host().map_err(failed("open the namespace of the host"))?;
    let interfaces = bridge::interfaces(&own).map_err(failed("list the interfaces of the host"))?;
    let names: Vec<String> = interfaces.iter().map(|it| it.name.clone()).collect();
    let mut state = match store.load()? {
        Some(state) => state,
        None if names.iter().any(|name| name == BRIDGE) => {
            let reason = "it is there, and not ours; remove it with `ip link del bulkhead0`";
            let error = io::Error::new(io::ErrorKind::AlreadyExists, reason);
            return Err(failed("make the bridge bulkhead0")(error));
        }
        None => State::new(choose(&interfaces)?),
    };
    state.forget_dead(containers, &names);
    let lease = state.lease(id, hostname, wanted)?;
    // What is made is remembered first.
    store.save(&state)?;
    bridge::raise(&own, &state.subnets).map_err(failed("make the bridge bulkhead0"))?;
    let is_published = state.leases.iter().any(|lease| !lease.ports.is_empty());
    let subnets = state.subnets.clone();
    let on = forwarding::switch_on(&mut state.switched, &interfaces, &subnets, is_published);
    store.save(&state)?;
    on.map_err(failed("let the kernel pass packets on"))?;
    let opened = forwarding::opened(&state.switched);
    firewall::apply(&state, &opened).map_err(failed("set up the translation of addresses"))?;
    let namespace = connected(&own, &state, &lease).map_err(failed("join it with the bridge"))?;
    names::tell_all(containers, &state).map_err(failed("write the files of hosts"))?;
    Ok(namespace)
}

fn connected(host: &OwnedFd, state: &State, lease: &Lease) -> io::Result<OwnedFd> {
    let namespace = bridge::namespace()?;
    let own = state.subnets.of(lease.number);
    bridge::connect(host, &namespace, &lease.interface(), &state.subnets, own)?;
    Ok(namespace)
}

/// Networks that meet none of the host's.
fn choose(interfaces: &[bridge::Interface]) -> Result<Subnets> {
    let of = |it: &bridge::Interface| [it.addresses.clone(), it.routes.clone()].concat();
    let taken: Vec<_> = interfaces.iter().flat_map(of).collect();
    let mut id = [0; 5];
    let random = File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut id));
    random.map_err(host("get random bytes"))?;
    let id = forwarding::has_v6().then_some(id);
    Subnets::choose(&taken, id).ok_or_else(|| {
        let reason = "the host has routes to all networks that it could have; \
                      give --network none";
        refused("--network", "bridge", reason)
    })
}

/// Takes away what a container has.
fn part(store: Store, id: &ContainerId) -> Result<()> {
    let Some(mut state) = store.load()? else {
        return store.remove();
    };
    let is_its = |lease: &Lease| lease.id == id.as_str();
    let interface = state.leases.iter().find(|lease| is_its(lease));
    let interface = interface.map(Lease::interface);
    state.leases.retain(|lease| !is_its(lease));
    // The kernel would do it, but not now.
    let removed = match interface {
        Some(name) => bridge::host().and_then(|host| bridge::remove(&host, &name)),
        None => Ok(()),
    };
    state.forget_dead(Path::new(paths::CONTAINERS), &interface_names()?);
    settle(store, &mut state)?;
    removed.map_err(failed("remove an interface"))
}

/// Makes all follow from the leases, or go with the last.
fn settle(store: Store, state: &mut State) -> Result<()> {
    if state.leases.is_empty() {
        let back = forwarding::switch_back(&state.switched);
        if let Err(error) = take_down() {
            // What is not forgotten is tried again.
            store.save(state)?;
            return Err(error);
        }
        store.remove()?;
        return back.map_err(failed("set the kernel back"));
    }
    store.save(state)?;
    let opened = forwarding::opened(&state.switched);
    let applied = firewall::apply(state, &opened);
    let told = names::tell_all(Path::new(paths::CONTAINERS), state);
    applied.map_err(failed("set up the translation of addresses"))?;
    told.map_err(failed("write the files of hosts"))
}

/// Removes the bridge and the table.
fn take_down() -> Result<()> {
    let bridge = bridge::host().and_then(|host| bridge::remove(&host, BRIDGE));
    let table = firewall::remove();
    bridge.map_err(failed("remove the bridge bulkhead0"))?;
    table.map_err(failed("remove the translation of addresses"))
}

#[cfg(test)]
mod tests;
