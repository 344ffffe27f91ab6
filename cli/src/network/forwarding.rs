//! What the kernel must be told before it passes packets on between the bridge and the
//! world, and is told back with the end of the last container.
//!
//! As little as does: IPv4 is passed on from an interface (`net.ipv4.conf.NAME.forwarding`),
//! so only those get it that lead to the world, or, once a port is published, have an
//! address. IPv6 knows all or nothing, and an interface of such a host no longer listens to
//! routers unless told to: those that do are.

use std::{fs, io, path::PathBuf};

use serde::{Deserialize, Serialize};

use super::{BRIDGE, addresses::Subnets, bridge::Interface};

const SYS: &str = "/proc/sys/net";

/// A setting of the kernel that was another one before.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Switched {
    /// Below `/proc/sys/net`.
    name: String,
    before: String,
    now: String,
}

/// The settings that are needed: a name and a value.
fn wanted(
    interfaces: &[Interface],
    subnets: &Subnets,
    is_published: bool,
    read: impl Fn(&str) -> Option<String>,
) -> Vec<(String, &'static str)> {
    let mut all = Vec::new();
    let others = || {
        let others = interfaces.iter();
        others.filter(|it| !it.is_loopback && !it.name.starts_with(BRIDGE))
    };
    let leads_out = |it: &Interface, v4: bool| {
        let mut routes = it.routes.iter();
        let has_default = routes.any(|net| net.prefix_len() == 0 && net.addr().is_ipv4() == v4);
        let mut addresses = it.addresses.iter();
        has_default || is_published && addresses.any(|net| net.addr().is_ipv4() == v4)
    };
    for it in others().filter(|it| leads_out(it, true)) {
        all.push((format!("ipv4/conf/{}/forwarding", it.name), "1"));
    }
    if subnets.v6.is_some() && others().any(|it| leads_out(it, false)) {
        for it in others() {
            let name = format!("ipv6/conf/{}/accept_ra", it.name);
            if read(&name).as_deref() == Some("1") {
                all.push((name, "2"));
            }
        }
        all.push(("ipv6/conf/all/forwarding".to_owned(), "1"));
    }
    all
}

/// Sets what is needed, and writes down what was otherwise.
pub(super) fn switch_on(
    switched: &mut Vec<Switched>,
    interfaces: &[Interface],
    subnets: &Subnets,
    is_published: bool,
) -> io::Result<()> {
    for (name, now) in wanted(interfaces, subnets, is_published, read) {
        // An interface may be gone.
        let Some(before) = read(&name).filter(|before| before != now) else {
            continue;
        };
        write(&name, now)?;
        if !switched.iter().any(|known| known.name == name) {
            let now = now.to_owned();
            switched.push(Switched { name, before, now });
        }
    }
    // Those of the bridge go with it.
    write(&format!("ipv4/conf/{BRIDGE}/forwarding"), "1")?;
    if is_published {
        // For connections of the host to its own 127.0.0.1.
        write(&format!("ipv4/conf/{BRIDGE}/route_localnet"), "1")?;
    }
    if subnets.v6.is_some() {
        // No container is a router of the host.
        write(&format!("ipv6/conf/{BRIDGE}/accept_ra"), "0")?;
    }
    Ok(())
}

/// Sets back what nobody else has changed meanwhile.
pub(super) fn switch_back(switched: &[Switched]) -> io::Result<()> {
    let mut done = Ok(());
    for Switched { name, before, now } in switched.iter().rev() {
        // An interface may be gone.
        if read(name).as_ref() == Some(now) {
            let written = write(name, before);
            done = done.and(written);
        }
    }
    done
}

/// What would not be passed on without us, as far as nobody has allowed all: interfaces for
/// IPv4, and whether it is so with IPv6.
pub(super) fn opened(switched: &[Switched]) -> (Vec<String>, bool) {
    opened_by(
        switched,
        read("ipv4/conf/all/forwarding").as_deref() == Some("1"),
    )
}

fn opened_by(switched: &[Switched], all: bool) -> (Vec<String>, bool) {
    let interface = |it: &Switched| {
        let name = it.name.strip_prefix("ipv4/conf/")?;
        name.strip_suffix("/forwarding").map(str::to_owned)
    };
    let v4 = switched.iter().filter_map(interface).filter(|_| !all);
    let v6 = switched
        .iter()
        .any(|it| it.name == "ipv6/conf/all/forwarding");
    (v4.collect(), v6)
}

/// Whether new interfaces of the host have IPv6.
pub(super) fn has_v6() -> bool {
    read("ipv6/conf/default/disable_ipv6").as_deref() == Some("0")
}

fn read(name: &str) -> Option<String> {
    let text = fs::read_to_string(PathBuf::from(SYS).join(name)).ok()?;
    Some(text.trim().to_owned())
}

fn write(name: &str, value: &str) -> io::Result<()> {
    let path = PathBuf::from(SYS).join(name);
    fs::write(&path, value)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn interface(name: &str, addresses: &[&str], routes: &[&str]) -> Interface {
        let nets = |all: &[&str]| all.iter().map(|net| net.parse().unwrap()).collect();
        Interface {
            name: name.to_owned(),
            addresses: nets(addresses),
            routes: nets(routes),
            is_loopback: name == "lo",
            ..Interface::default()
        }
    }

    fn names(all: &[Interface], is_published: bool) -> Vec<String> {
        let subnets = Subnets::choose(&[], Some([1; 5])).unwrap();
        let read = |name: &str| {
            let value = if name.contains("eth0") { "1" } else { "0" };
            Some(value.to_owned())
        };
        let wanted = wanted(all, &subnets, is_published, read);
        let shown = |(name, value)| format!("{name} {value}");
        wanted.into_iter().map(shown).collect()
    }

    #[test]
    fn only_what_leads_out_is_switched_and_what_has_addresses_for_ports() {
        let lo = interface("lo", &["127.0.0.1/8", "::1/128"], &[]);
        let eth0 = interface("eth0", &["192.0.2.1/24"], &["0.0.0.0/0"]);
        let eth1 = interface("eth1", &["198.51.100.1/24"], &[]);
        let own = interface(BRIDGE, &["10.91.0.1/24", "fd01::1/64"], &[]);
        let all = [lo, eth0, eth1, own];
        assert_eq!(names(&all, false), ["ipv4/conf/eth0/forwarding 1"]);
        assert_eq!(
            names(&all, true),
            ["ipv4/conf/eth0/forwarding 1", "ipv4/conf/eth1/forwarding 1"]
        );
        assert!(names(&all[2..3], false).is_empty());
    }

    #[test]
    fn who_listens_to_routers_goes_on_to_do_so_when_ipv6_is_passed_on() {
        let eth0 = interface("eth0", &["2001:db8::1/64"], &["::/0"]);
        let eth1 = interface("eth1", &[], &[]);
        let all = [eth0, eth1];
        let expected = ["ipv6/conf/eth0/accept_ra 2", "ipv6/conf/all/forwarding 1"];
        assert_eq!(names(&all, false), expected);
    }

    #[test]
    fn what_we_opened_is_known_until_somebody_opens_all() {
        let switched = |name: &str| Switched {
            name: name.to_owned(),
            before: "0".to_owned(),
            now: "1".to_owned(),
        };
        let all = [
            switched("ipv4/conf/eth0/forwarding"),
            switched("ipv6/conf/eth0/accept_ra"),
            switched("ipv6/conf/all/forwarding"),
        ];
        assert_eq!(opened_by(&all, false), (vec!["eth0".to_owned()], true));
        assert_eq!(opened_by(&all[..2], true), (vec![], false));
    }
}
