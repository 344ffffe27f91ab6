use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{fd::AsRawFd, unix::net::UnixStream},
    process::Command,
    time::Duration,
};

use bulkhead_agent_api::names::Message;
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
pub(crate) fn says(namespace: &File, line: &str) -> String {
    let line = line.to_owned();
    there(namespace, move || said(&line)).join().unwrap()
}

/// Waits until nothing of ours is in the namespace: of what was closed another process may
/// have a copy until it is executed.
#[track_caller]
pub(crate) fn assert_nothing_of_ours(namespace: &File) {
    let mut left = String::new();
    for _ in 0..500 {
        left = says(namespace, "tc qdisc show; ip -o link");
        if !left.contains("ingress") && !left.contains("bulkhead") {
            return;
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("{left}");
}

/// Does something there.
fn there<T: Send + 'static>(
    namespace: &File,
    what: impl FnOnce() -> T + Send + 'static,
) -> JoinHandle<T> {
    let namespace = namespace.try_clone().unwrap();
    thread::spawn(move || {
        setns(namespace, CloneFlags::CLONE_NEWNET).unwrap();
        what()
    })
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
    Network::new(namespace.try_clone().unwrap().into(), false)
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
    assert!(is_the_hosts(&own).unwrap());
    let Some(other) = namespace(&["true"]) else {
        return;
    };
    assert!(!is_the_hosts(&other).unwrap());
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
    assert_nothing_of_ours(&namespace);
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
    assert_nothing_of_ours(&namespace);
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
            let limit = Duration::from_secs(30);
            says(&namespace, line);
            let heard = tokio::time::timeout(limit, changes.next()).await;
            heard.expect(line).unwrap();
        }
    });
}

#[test]
fn who_connects_to_a_loopback_address_is_led_to_our_listener_nw_24_nw_25_nw_27() {
    use std::net::SocketAddr;
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

/// A namespace where the other end of [`ETH0`] is from now on.
fn world(namespace: &File) -> File {
    let world = super::tests::namespace(&["ip link set lo up"]).unwrap();
    let path = format!("/proc/{}/fd/{}", std::process::id(), world.as_raw_fd());
    let lines = format!(
        "ip link set other0 netns {path} && ip addr add fd09::2/64 dev eth0 nodad && ip link set lo up"
    );
    says(namespace, &lines);
    let lines = "ip addr add 10.9.0.1/24 dev other0 && ip addr add fd09::1/64 dev other0 nodad \
        && ip link set other0 up";
    says(&world, lines);
    world
}

#[test]
fn who_asks_from_within_the_namespace_is_answered_and_all_else_is_the_guests_nw_34() {
    const LIMIT: Duration = Duration::from_secs(20);
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let world = world(&namespace);
    let mut network = of(&namespace);
    let mut seen = look(&mut network);
    for (address, any) in [("10.9.0.1:7", "0.0.0.0:0"), ("[fd09::1]:7", "[::]:0")] {
        let bound = there(&world, move || {
            let udp = UdpSocket::bind(address).unwrap();
            udp.set_read_timeout(Some(LIMIT)).unwrap();
            (udp, TcpListener::bind(address).unwrap())
        });
        let (udp, tcp) = bound.join().unwrap();
        let asked = there(&namespace, move || {
            let client = UdpSocket::bind(any).unwrap();
            client.connect(address).unwrap();
            client.set_read_timeout(Some(LIMIT)).unwrap();
            client.send(b"question").unwrap();
            let mut answer = [0; 9];
            let count = client.recv(&mut answer).unwrap();
            assert_eq!(&answer[..count], b"answer", "{address}");
            let address = address.parse().unwrap();
            let mut client = TcpStream::connect_timeout(&address, LIMIT).unwrap();
            client.set_read_timeout(Some(LIMIT)).unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert_eq!(answer, "answer", "{address}");
        });
        let from = udp.recv_from(&mut [0; 9]).unwrap().1;
        udp.send_to(b"answer", from).unwrap();
        tcp.accept().unwrap().0.write_all(b"answer").unwrap();
        asked.join().unwrap();
    }
    // Who merely listens there hears nothing: the address is the guest's.
    let listens = there(&namespace, || {
        let udp = UdpSocket::bind("10.9.0.2:7").unwrap();
        let moment = Duration::from_millis(300);
        udp.set_read_timeout(Some(moment)).unwrap();
        (udp, TcpListener::bind("10.9.0.2:8").unwrap())
    });
    let (udp, _tcp) = listens.join().unwrap();
    let knocked = there(&world, || {
        let client = UdpSocket::bind("10.9.0.1:9").unwrap();
        client.send_to(b"for the guest", "10.9.0.2:7").unwrap();
        let address = "10.9.0.2:8".parse().unwrap();
        TcpStream::connect_timeout(&address, Duration::from_millis(300)).map(drop)
    });
    let knocked = knocked.join().unwrap().unwrap_err();
    assert_eq!(knocked.kind(), io::ErrorKind::TimedOut);
    let heard = udp.recv(&mut [0; 99]).unwrap_err();
    assert_eq!(heard.kind(), io::ErrorKind::WouldBlock);
    let (_, tap) = &mut seen.taps[0];
    let mut frame = [0; 2000];
    let came = std::iter::from_fn(|| {
        let count = tap.read(&mut frame).ok()?;
        Some(frame[..count].ends_with(b"for the guest"))
    });
    assert!(came.into_iter().any(|it| it), "the guest gets it");
}

#[test]
fn what_the_guest_asks_is_asked_of_the_name_server_in_the_namespace_nw_34() {
    let Some(namespace) = namespace(&["ip link set lo up"]) else {
        return;
    };
    let mut network = of(&namespace);
    assert!(look(&mut network).names.is_none());
    let docker = there(&namespace, || {
        let server = "127.0.0.11:53";
        let udp = UdpSocket::bind(server).unwrap();
        (udp, TcpListener::bind(server).unwrap())
    });
    let (udp, tcp) = docker.join().unwrap();
    let names = look(&mut network).names.unwrap();
    assert!(look(&mut network).names.is_none());
    let (ours, guests) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    let asked = names.serve(ours).unwrap();
    let answering = thread::spawn(move || {
        let mut space = [0; 99];
        for _ in 0..2 {
            let (count, from) = udp.recv_from(&mut space).unwrap();
            space[..count].reverse();
            udp.send_to(&space[..count], from).unwrap();
        }
        let mut asked = tcp.accept().unwrap().0;
        asked.read_exact(&mut space[..5]).unwrap();
        asked.write_all(b"\0\x02ok").unwrap();
        // Nobody listens any more.
    });
    let runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = { runtime }.enable_all().build().unwrap();
    runtime.block_on(async {
        guests.set_nonblocking(true).unwrap();
        let mut guest = tokio::net::UnixStream::from_std(guests).unwrap();
        for (number, tcp, body, expected) in [
            (1, false, "abc", "cba"),
            (9, false, "xyz", "zyx"),
            (2, true, "abc", "ok"),
            (3, true, "abc", ""),
        ] {
            let body = body.as_bytes().to_vec();
            let question = Message { number, tcp, body };
            question.write(&mut guest).await.unwrap();
            let body = expected.as_bytes().to_vec();
            let expected = Message { number, tcp, body };
            assert_eq!(Message::read(&mut guest).await.unwrap(), expected);
        }
        drop(asked);
        Message::read(&mut guest).await.unwrap_err();
    });
    answering.join().unwrap();
}

/// A datagram of IPv4 from this address to port 7 of the world, as a tap takes it.
fn datagram(link: &Link, to: [u8; 6], from: [u8; 4]) -> Vec<u8> {
    let mut header = [
        &[0x45, 0, 0, 29, 0, 0, 0, 0, 64, 17, 0, 0],
        &from[..],
        &[10, 9, 0, 1],
    ]
    .concat();
    let words = header
        .chunks(2)
        .map(|it| u32::from(it[0]) << 8 | u32::from(it[1]));
    let sum: u32 = words.sum();
    let sum = !u16::try_from((sum & 0xffff) + (sum >> 16)).unwrap();
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let udp = [0, 9, 0, 7, 0, 9, 0, 0, from[3]];
    [&[0; 12], &to[..], &link.mac, &[8, 0], &header, &udp].concat()
}

#[test]
fn frames_in_another_name_do_not_leave_the_machine_b51() {
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let world = world(&namespace);
    let mac = says(&world, "ip -o link show other0");
    let mac = mac.split_once("link/ether ").unwrap().1;
    let mac: Vec<u8> = { mac[..17].split(':') }
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    let mac: [u8; 6] = mac.try_into().unwrap();
    let hears = there(&world, || UdpSocket::bind("10.9.0.1:7").unwrap());
    let hears = hears.join().unwrap();
    hears
        .set_read_timeout(Some(Duration::from_millis(300)))
        .unwrap();
    let mut network = of(&namespace);
    let mut seen = look(&mut network);
    let (_, mut tap) = seen.taps.pop().unwrap();
    // Which of three addresses are heard.
    let mut heard = |link: &Link| {
        for last in [2, 3, 4] {
            tap.write_all(&datagram(link, mac, [10, 9, 0, last]))
                .unwrap();
        }
        let mut heard = Vec::new();
        let mut from = [0];
        while hears.recv(&mut from).is_ok() {
            heard.push(from[0]);
        }
        heard
    };
    assert_eq!(heard(&seen.links[0]), [2]);
    // Its addresses are those that it has at present.
    says(
        &namespace,
        "ip addr del 10.9.0.2/24 dev eth0; ip addr add 10.9.0.3/24 dev eth0",
    );
    let seen = look(&mut network);
    assert_eq!(heard(&seen.links[0]), [3]);
    assert!(network.trust() && !network.trust());
    let seen = look(&mut network);
    assert_eq!(heard(&seen.links[0]), [2, 3, 4]);
    drop((seen, network));
}

#[test]
fn a_namespace_that_another_machine_has_is_refused_cl_07_nw_33() {
    let Some(namespace) = namespace(&[ETH0]) else {
        return;
    };
    let mut first = of(&namespace);
    let taps = look(&mut first).taps;
    let refused = look(&mut of(&namespace)).refused.pop().unwrap().to_string();
    assert!(
        refused.contains("eth0") && refused.contains("another virtual machine"),
        "{refused}"
    );
    // Of the first nothing is taken away.
    let filters = says(&namespace, "tc filter show dev eth0 ingress");
    assert!(filters.contains("Redirect"), "{filters}");
    drop(taps);
}
