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

#[test]
fn the_hosts_own_interfaces_are_never_touched_nw_29() {
    let own = File::open("/proc/self/ns/net").unwrap();
    let (network, joined) = Network::join(own.into()).unwrap();
    assert!(joined.is_empty() && network.parts().1.is_empty());
}

#[test]
fn nothing_is_left_on_an_interface_that_is_let_go_of() {
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let joined = Network::join(namespace.try_clone().unwrap().into()).unwrap();
    assert_eq!(joined.1.len(), 1);
    let qdiscs = says(&namespace, "tc qdisc show dev eth0");
    assert!(qdiscs.contains("ingress"), "{qdiscs}");
    drop(joined);
    let left = says(&namespace, "tc qdisc show; ip -o link");
    assert!(
        !left.contains("ingress") && !left.contains("bulkhead"),
        "{left}"
    );
}

#[test]
fn an_interface_that_cannot_be_joined_leaves_nothing_on_those_before_it() {
    let bad = "ip tuntap add dev tun0 mode tun && ip addr add 10.9.1.2/24 dev tun0";
    let taken = "ip link add name eth1 index 2222 type veth peer name other1 \
        && ip addr add 10.9.1.2/24 dev eth1 && ip tuntap add dev bulkhead2222 mode tun";
    for (what, line) in [
        ("no address of Ethernet", bad),
        ("the name of the tap is taken", taken),
    ] {
        let Some(namespace) = namespace(&[ETH0, line]) else {
            return;
        };
        let error = Network::join(namespace.try_clone().unwrap().into()).unwrap_err();
        let left = says(&namespace, "tc qdisc show");
        assert!(!left.contains("ingress"), "{what}: {error}: {left}");
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
        let joined = Network::join(namespace.try_clone().unwrap().into()).unwrap();
        let while_joined = says(&namespace, show);
        assert!(while_joined.contains("Redirect"), "{kind}: {while_joined}");
        drop(joined);
        assert_eq!(says(&namespace, show), before, "{kind}");
    }
}
