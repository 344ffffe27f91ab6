use std::process::Command;

use nix::sched::unshare;

use super::*;

/// A network namespace of the test's own, with what these lines of commands make there;
/// none for a user who may not make one.
pub(crate) fn namespace(lines: &[&str]) -> Option<File> {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: needs root");
        return None;
    }
    let lines = lines.join(" && ");
    let made = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        said(&lines);
        File::open("/proc/thread-self/ns/net").unwrap()
    });
    Some(made.join().unwrap())
}

/// What commands say there.
pub(crate) fn says(namespace: &File, line: &'static str) -> String {
    let namespace = namespace.try_clone().unwrap();
    let said = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        said(line)
    });
    said.join().unwrap()
}

fn said(lines: &str) -> String {
    let output = Command::new("sh").args(["-c", lines]).output().unwrap();
    assert!(output.status.success(), "{lines}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// An interface with an address, whose other end is beside it.
pub(crate) const ETH0: &str = "ip link add name eth0 type veth peer name other0 \
    && ip addr add 10.9.0.2/24 dev eth0 && ip link set eth0 up";

fn of(namespace: &File) -> Network {
    Network::new(namespace.try_clone().unwrap().into())
}

fn look(network: &mut Network) -> Seen {
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(network.look()).unwrap()
}

/// The names of what was seen.
fn names(seen: &Seen) -> Vec<&str> {
    seen.links.iter().map(|link| link.name.as_str()).collect()
}

#[test]
fn the_hosts_own_interfaces_are_never_touched_nw_29() {
    let own = File::open("/proc/self/ns/net").unwrap();
    assert!(of(&own).is_the_hosts().unwrap());
    let Some(other) = namespace(&["true"]) else {
        return;
    };
    assert!(!of(&other).is_the_hosts().unwrap());
}

#[test]
fn nothing_is_left_on_an_interface_that_is_let_go_of() {
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let mut network = of(&namespace);
    let seen = look(&mut network);
    assert_eq!((names(&seen), seen.taps.len()), (vec!["eth0"], 1));
    let qdiscs = says(&namespace, "tc qdisc show dev eth0");
    assert!(qdiscs.contains("ingress"), "{qdiscs}");
    drop((seen, network));
    let left = says(&namespace, "tc qdisc show; ip -o link");
    assert!(
        !left.contains("ingress") && !left.contains("bulkhead"),
        "{left}"
    );
}

#[test]
fn an_interface_that_cannot_be_joined_is_named_and_has_nothing_of_ours() {
    let bad = "ip tuntap add dev eth1 mode tun && ip addr add 10.9.1.2/24 dev eth1";
    let taken = "ip link add name eth1 index 2222 type veth peer name other1 \
        && ip addr add 10.9.1.2/24 dev eth1 && ip tuntap add dev bulkhead2222 mode tun";
    for (what, line) in [
        ("no address of Ethernet", bad),
        ("the name of the tap is taken", taken),
    ] {
        let Some(namespace) = namespace(&[ETH0, line]) else {
            return;
        };
        let mut network = of(&namespace);
        let seen = look(&mut network);
        assert_eq!(names(&seen), ["eth0"], "{what}");
        let [refused] = &seen.refused[..] else {
            panic!("{what}: {seen:?}");
        };
        assert!(refused.to_string().contains("eth1"), "{what}: {refused}");
        let left = says(&namespace, "tc qdisc show dev eth1");
        assert!(!left.contains("ingress"), "{what}: {left}");
        drop((seen, network));
        let left = says(&namespace, "tc qdisc show");
        assert!(!left.contains("ingress"), "{what}: {left}");
    }
}

#[test]
fn what_somebody_else_put_on_an_interface_is_there_afterwards() {
    let theirs = "tc filter add dev eth0 ingress protocol ip pref 7 u32 match u8 0 0 flowid 1:1";
    for kind in [
        "tc qdisc add dev eth0 ingress",
        "tc qdisc add dev eth0 clsact",
    ] {
        let Some(namespace) = namespace(&[ETH0, kind, theirs]) else {
            return;
        };
        let show = "tc qdisc show dev eth0; tc filter show dev eth0 ingress";
        let before = says(&namespace, show);
        let mut network = of(&namespace);
        let seen = look(&mut network);
        let while_joined = says(&namespace, show);
        assert!(while_joined.contains("Redirect"), "{kind}: {while_joined}");
        drop((seen, network));
        assert_eq!(says(&namespace, show), before, "{kind}");
    }
}

#[test]
fn each_look_tells_what_there_is_and_hands_over_what_is_new_nw_37() {
    let Some(namespace) = namespace(&["ip link set lo up"]) else {
        return;
    };
    let mut network = of(&namespace);
    let seen = look(&mut network);
    assert!(seen.links.is_empty() && seen.watch.is_some());
    says(&namespace, ETH0);
    let first = look(&mut network);
    assert_eq!((names(&first), first.taps.len()), (vec!["eth0"], 1));
    assert!(first.watch.is_none() && !first.links[0].down);
    let again = look(&mut network);
    assert_eq!((&again.links, again.taps.len()), (&first.links, 0));
    let changes = "ip addr add 10.9.7.3/24 dev eth0; ip addr del 10.9.0.2/24 dev eth0; \
        ip link set eth0 mtu 1400; ip route add default via 10.9.7.1 dev eth0 table 7; \
        ip rule add from 10.9.7.3 table 7";
    says(&namespace, changes);
    let changed = look(&mut network);
    let link = &changed.links[0];
    assert_eq!(
        (link.mtu, link.addresses.len(), link.routes.len()),
        (1400, 1, 1)
    );
    assert_ne!(link.addresses, first.links[0].addresses);
    assert_eq!((first.rules.len(), changed.rules.len()), (0, 1));
    // Without an address it stays what it is.
    says(&namespace, "ip addr flush dev eth0; ip link set eth0 down");
    let down = look(&mut network);
    assert!(down.links[0].down && down.links[0].addresses.is_empty());
    says(&namespace, "ip link del eth0");
    assert!(look(&mut network).links.is_empty() && network.parts().1.is_empty());
}

#[test]
fn a_look_that_is_given_up_leaves_nothing() {
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let (visitor, answer) = of(&namespace).begin_look().unwrap();
    drop(answer);
    visitor.join().unwrap();
    let left = says(&namespace, "tc qdisc show; ip -o link");
    assert!(
        !left.contains("ingress") && !left.contains("bulkhead"),
        "{left}"
    );
}

#[test]
fn a_change_is_heard_of_once_it_was_made_nw_37() {
    let Some(namespace) = namespace(&["ip link set lo up"]) else {
        return;
    };
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(async {
        let seen = of(&namespace).look().await.unwrap();
        let mut changes = seen.watch.unwrap().listen().unwrap();
        for line in [
            ETH0,
            "ip addr add fd09::2/64 dev eth0 nodad",
            "ip route add 10.8.0.0/16 dev eth0",
            "ip rule add from 10.9.0.3 table 7",
            "ip -6 rule add from fd09::2 table 7",
            "ip neigh add 10.9.0.7 lladdr 02:00:00:00:00:77 dev eth0",
            "ip link set eth0 down",
            "ip link del eth0",
        ] {
            let limit = std::time::Duration::from_secs(30);
            says(&namespace, line);
            let heard = tokio::time::timeout(limit, changes.next()).await;
            heard.expect(line).unwrap();
        }
    });
}

#[test]
fn who_connects_to_a_loopback_address_is_led_to_our_listener_nw_24_nw_25_nw_27() {
    use std::net::{SocketAddr, TcpListener, TcpStream};
    let Some(namespace) = namespace(&["ip link set lo up && ip addr add 10.9.0.2/24 dev lo"])
    else {
        return;
    };
    let led = thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        let docker = TcpListener::bind("127.0.0.11:53").unwrap();
        let other = TcpListener::bind("10.9.0.2:80").unwrap();
        let loopback = Loopback::new().unwrap();
        for (number, address) in ["127.0.0.1:80", "[::1]:8080"].iter().enumerate() {
            let address: SocketAddr = address.parse().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let (served, from) = loopback.listeners[number].accept().unwrap();
            assert_eq!(served.local_addr().unwrap(), address);
            assert_eq!(from, client.local_addr().unwrap());
        }
        TcpStream::connect("127.9.9.9:1").unwrap();
        for listener in [docker, other] {
            let address = listener.local_addr().unwrap();
            let client = TcpStream::connect(address).unwrap();
            let from = listener.accept().unwrap().1;
            assert_eq!(from, client.local_addr().unwrap());
        }
        drop(loopback);
        let refused = TcpStream::connect("127.0.0.1:80").unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    });
    led.join().unwrap();
}
