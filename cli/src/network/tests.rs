use std::{
    net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket},
    os::fd::AsFd,
    process::Command,
    thread,
    time::Duration,
};

use nix::sched::{CloneFlags, setns};

use super::*;

/// A network with two containers.
pub(super) fn state() -> State {
    let subnets = Subnets::choose(&[], Some([1, 2, 3, 4, 5])).unwrap();
    let mut state = State::new(subnets);
    let wanted = Options {
        publish: ["127.0.0.1:8080:80", "53:53/udp"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        add_host: ["cache:192.0.2.7", "outer:host-gateway"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        ..Options::default()
    };
    for (id, hostname, wanted) in [("web", "front", wanted), ("db", "db", Options::default())] {
        let id = id.parse().unwrap();
        state.lease(&id, hostname, &wanted).unwrap();
    }
    state
}

#[test]
fn what_somebody_has_is_given_to_nobody_else() {
    let mut state = state();
    let mut refused = |wanted: Options| {
        let id = "new".parse().unwrap();
        state.lease(&id, "new", &wanted).unwrap_err().text()
    };
    let ip = |ip: &str| Options {
        ip: Some(ip.parse().unwrap()),
        ..Options::default()
    };
    let error = refused(ip("10.91.0.2"));
    assert!(
        error.contains("--ip") && error.contains("\"web\""),
        "{error}"
    );
    let error = refused(ip("192.0.2.1"));
    assert!(
        error.contains("--ip \"192.0.2.1\"") && error.contains("10.91.0.0/24"),
        "{error}"
    );
    let error = refused(Options {
        publish: vec!["8080:1".parse().unwrap()],
        ..Options::default()
    });
    assert!(
        error.contains("--publish \"8080:1/tcp\"") && error.contains("\"web\""),
        "{error}"
    );
    let id = "new".parse().unwrap();
    let lease = state.lease(&id, "new", &ip("10.91.0.77")).unwrap();
    assert_eq!(
        (lease.number, lease.interface()),
        (77, "bulkhead0-77".to_owned())
    );
}

#[test]
fn a_lease_holds_as_long_as_its_process_or_its_interface_is_there() {
    let dir = tempfile::tempdir().unwrap();
    let web = "web".parse().unwrap();
    let container = bulkhead_client::Container::make(dir.path(), &web).unwrap();
    let mut state = state();
    let none: [String; 0] = [];
    let all = ["lo".to_owned(), "bulkhead0-3".to_owned()];
    assert!(!state.forget_dead(dir.path(), &all));
    assert!(state.forget_dead(dir.path(), &none));
    assert_eq!(state.leases.len(), 1);
    drop(container);
    assert!(state.forget_dead(dir.path(), &none) && state.leases.is_empty());
}

#[test]
fn what_is_remembered_is_changed_by_one_at_a_time_and_goes_without_a_trace() {
    let world = tempfile::tempdir().unwrap();
    let dir = world.path().join("network");
    let changers = (2..=254).step_by(32).map(|number| {
        let dir = dir.clone();
        thread::spawn(move || {
            for more in 0..16 {
                let store = Store::lock(&dir).unwrap();
                let mut state = store.load().unwrap().unwrap_or_else(state);
                let mut lease = state.leases[0].clone();
                lease.id = format!("c{}", number + more);
                state.leases.push(lease);
                store.save(&state).unwrap();
            }
        })
    });
    let changers: Vec<_> = changers.collect();
    let count = changers.len() * 16;
    changers.into_iter().for_each(|it| it.join().unwrap());
    let store = Store::lock(&dir).unwrap();
    assert_eq!(store.load().unwrap().unwrap().leases.len(), count + 2);
    // Whoever waits for what is removed meanwhile gets a new one.
    let waiting = thread::spawn({
        let dir = dir.clone();
        move || Store::lock(&dir).unwrap().load().unwrap()
    });
    store.remove().unwrap();
    assert_eq!(waiting.join().unwrap(), None);
    std::fs::write(dir.join("state.json"), "{").unwrap();
    let error = Store::lock(&dir).unwrap().load().unwrap_err().text();
    assert!(
        error.contains("state.json") && error.contains("network prune"),
        "{error}"
    );
    Store::lock(&dir).unwrap().remove().unwrap();
    assert_eq!(std::fs::read_dir(world.path()).unwrap().count(), 0);
    assert!(Store::lock_if_there(&dir).unwrap().is_none());
}

#[test]
fn without_a_network_nothing_of_it_can_be_wanted() {
    let wanted = |change: fn(&mut Options)| {
        let mut wanted = Options::default();
        change(&mut wanted);
        needs_none(&wanted).map_err(|error| error.text())
    };
    assert_eq!(wanted(|_| {}), Ok(()));
    assert_eq!(
        wanted(|it| it.add_host = vec!["a:192.0.2.1".parse().unwrap()]),
        Ok(())
    );
    for (change, word) in [
        (
            (|it| it.dns = vec![[192, 0, 2, 1].into()]) as fn(&mut Options),
            "--dns",
        ),
        (|it| it.ip = Some([10, 91, 0, 9].into()), "--ip"),
        (
            |it| it.publish = vec!["80:80".parse().unwrap()],
            "--publish",
        ),
        (
            |it| it.add_host = vec!["a:host-gateway".parse().unwrap()],
            "--add-host",
        ),
    ] {
        let error = wanted(change).unwrap_err();
        assert!(
            error.contains(word) && error.contains("--network none"),
            "{error}"
        );
    }
    let twice = Options {
        dns: vec![[192, 0, 2, 1].into(); 2],
        ..Options::default()
    };
    assert!(distinct(&twice).unwrap_err().text().contains("twice"));
}

/// Does something in a namespace.
fn inside<T: Send + 'static>(namespace: &OwnedFd, what: impl FnOnce() -> T + Send + 'static) -> T {
    let namespace = namespace.try_clone().unwrap();
    let visitor = thread::spawn(move || {
        setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET).unwrap();
        what()
    });
    visitor.join().unwrap()
}

fn sh(namespace: &OwnedFd, lines: impl Into<String>) -> String {
    let lines = lines.into();
    inside(namespace, move || {
        let output = Command::new("sh").args(["-ec", &lines]).output().unwrap();
        assert!(output.status.success(), "{lines}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    })
}

/// A host with a neighbour, `203.0.113.9` and `2001:db8::9`, and two containers, the first of
/// which has published what comes with it. None where this cannot be tried.
struct World {
    host: OwnedFd,
    neighbour: OwnedFd,
    containers: Vec<OwnedFd>,
    state: State,
}

impl World {
    fn new(ports: &[&str]) -> Option<World> {
        if !rustix::process::geteuid().is_root() {
            println!("skipped: needs root");
            return None;
        }
        if let Some(missing) = check::missing() {
            println!("skipped: {}", missing.detail);
            return None;
        }
        let [host, neighbour] = [(), ()].map(|()| bridge::namespace().unwrap());
        let fd = neighbour.as_raw_fd();
        let pair = format!(
            "ip link add eth0 type veth peer name eth0 netns /proc/{}/fd/{fd}",
            std::process::id()
        );
        sh(&host, pair);
        sh(
            &host,
            "ip addr add 203.0.113.1/24 dev eth0; ip addr add 2001:db8::1/64 dev eth0 nodad
             ip link set eth0 up; ip route add default via 203.0.113.9
             ip route add default via 2001:db8::9",
        );
        // Somebody who knows of the containers' network and wants to get there.
        sh(
            &neighbour,
            "ip addr add 203.0.113.9/24 dev eth0; ip addr add 2001:db8::9/64 dev eth0 nodad
             ip link set eth0 up; ip route add 10.91.0.0/24 via 203.0.113.1
             ip route add fd01::/16 via 2001:db8::1",
        );
        let mut state = State::new(Subnets::choose(&[], Some([1, 2, 3, 4, 5])).unwrap());
        let wanted = Options {
            publish: ports.iter().map(|text| text.parse().unwrap()).collect(),
            ..Options::default()
        };
        let first = state.lease(&"a".parse().unwrap(), "a", &wanted).unwrap();
        let other = Options::default();
        let second = state.lease(&"b".parse().unwrap(), "b", &other).unwrap();
        bridge::raise(&host, &state.subnets).unwrap();
        let interfaces = bridge::interfaces(&host).unwrap();
        let (is_published, mut before) = (!ports.is_empty(), state.clone());
        let state = inside(&host, move || {
            let subnets = before.subnets.clone();
            let switched = &mut before.switched;
            forwarding::switch_on(switched, &interfaces, &subnets, is_published).unwrap();
            let opened = forwarding::opened(&before.switched);
            firewall::apply(&before, &opened).unwrap();
            before
        });
        let connect = |lease: &Lease| connected(&host, &state, lease).unwrap();
        let containers = vec![connect(&first), connect(&second)];
        Some(World {
            host,
            neighbour,
            containers,
            state,
        })
    }
}

const PATIENCE: Duration = Duration::from_secs(3);

/// A server of `server`, asked by `client` at `at`: whom the server takes the client for.
fn asked(server: &OwnedFd, port: u16, client: &OwnedFd, at: &str) -> Option<IpAddr> {
    let listener = inside(server, move || TcpListener::bind(("::", port)).unwrap());
    let at: SocketAddr = at.parse().unwrap();
    let stream = inside(client, move || TcpStream::connect_timeout(&at, PATIENCE));
    let _stream = stream.ok()?;
    let (_, peer) = listener.accept().unwrap();
    Some(peer.ip().to_canonical())
}

#[test]
fn containers_reach_the_world_as_the_host_and_each_other_as_themselves() {
    let Some(world) = World::new(&[]) else { return };
    let (a, b) = (&world.containers[0], &world.containers[1]);
    let ip = |text: &str| Some(text.parse().unwrap());
    let (host, out) = (&world.host, &world.neighbour);
    assert_eq!(asked(out, 80, a, "203.0.113.9:80"), ip("203.0.113.1"));
    assert_eq!(asked(out, 80, a, "[2001:db8::9]:80"), ip("2001:db8::1"));
    assert_eq!(asked(host, 80, a, "10.91.0.1:80"), ip("10.91.0.2"));
    assert_eq!(asked(b, 80, a, "10.91.0.3:80"), ip("10.91.0.2"));
    assert_eq!(
        asked(b, 80, a, "[fd01:203:405::3]:80"),
        ip("fd01:203:405::2")
    );
    assert_eq!(asked(a, 80, host, "10.91.0.2:80"), ip("10.91.0.1"));
    // What was not published is not reached from outside, though packets are passed on.
    assert_eq!(asked(a, 80, out, "10.91.0.2:80"), None);
    assert_eq!(asked(a, 80, out, "[fd01:203:405::2]:80"), None);
}

#[test]
fn published_ports_are_reached_from_everywhere_by_every_address_of_the_host() {
    let Some(world) = World::new(&["8080:80", "127.0.0.1:8081:80"]) else {
        return;
    };
    let (a, b) = (&world.containers[0], &world.containers[1]);
    let ip = |text: &str| Some(text.parse().unwrap());
    let (host, out) = (&world.host, &world.neighbour);
    assert_eq!(asked(a, 80, out, "203.0.113.1:8080"), ip("203.0.113.9"));
    assert_eq!(asked(a, 80, out, "[2001:db8::1]:8080"), ip("2001:db8::9"));
    assert_eq!(asked(a, 80, host, "127.0.0.1:8080"), ip("10.91.0.1"));
    assert_eq!(asked(a, 80, host, "203.0.113.1:8080"), ip("203.0.113.1"));
    assert!(asked(a, 80, host, "[2001:db8::1]:8080").is_some());
    assert!(asked(a, 80, b, "203.0.113.1:8080").is_some());
    assert!(asked(a, 80, b, "[2001:db8::1]:8080").is_some());
    // A container asks for itself.
    assert!(asked(a, 80, a, "203.0.113.1:8080").is_some());
    // One that is published for the host alone.
    assert_eq!(asked(a, 80, host, "127.0.0.1:8081"), ip("10.91.0.1"));
    assert_eq!(asked(a, 80, out, "203.0.113.1:8081"), None);
    // Whoever sends to the host what is for its own 127.0.0.1.
    sh(
        out,
        "ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via 203.0.113.1
         echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet",
    );
    sh(
        a,
        "ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via 10.91.0.1
         echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet",
    );
    let seen = || {
        let by_port = asked(a, 80, out, "127.0.0.1:8081");
        [by_port, asked(host, 22, a, "127.0.0.1:22")].map(|it| it.is_some())
    };
    assert_eq!(seen(), [false; 2]);
    // It is that chain which keeps them out.
    sh(host, "nft flush chain inet bulkhead raw");
    assert_eq!(seen(), [true; 2]);
}

#[test]
fn datagrams_to_published_ports_are_answered() {
    let Some(world) = World::new(&["5353:53/udp"]) else {
        return;
    };
    let a = &world.containers[0];
    let server = inside(a, || UdpSocket::bind("[::]:53").unwrap());
    for (client, at) in [
        (&world.neighbour, "203.0.113.1:5353"),
        (&world.neighbour, "[2001:db8::1]:5353"),
        (&world.host, "127.0.0.1:5353"),
        (&world.containers[1], "203.0.113.1:5353"),
    ] {
        let client = inside(client, move || {
            let any = if at.starts_with('[') {
                "[::]:0"
            } else {
                "0.0.0.0:0"
            };
            let socket = UdpSocket::bind(any).unwrap();
            socket.connect(at).unwrap();
            socket.send(b"question").unwrap();
            socket
        });
        let mut bytes = [0; 16];
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let (_, from) = server.recv_from(&mut bytes).expect(at);
        server.send_to(b"answer", from).unwrap();
        client.set_read_timeout(Some(PATIENCE)).unwrap();
        assert_eq!(client.recv(&mut bytes).expect(at), 6);
    }
}

#[test]
fn the_host_is_no_router_for_others_and_is_as_before_afterwards() {
    let Some(world) = World::new(&["8080:80"]) else {
        return;
    };
    let host = &world.host;
    let settings = "cd /proc/sys/net; cat ipv4/conf/eth0/forwarding ipv4/conf/all/forwarding \
                    ipv6/conf/all/forwarding ipv6/conf/eth0/accept_ra";
    assert_eq!(sh(host, settings), "1\n0\n1\n2\n");
    // Behind another interface of the host.
    let other = bridge::namespace().unwrap();
    let pair = format!(
        "ip link add eth1 type veth peer name eth0 netns /proc/{}/fd/{}",
        std::process::id(),
        other.as_raw_fd()
    );
    sh(host, pair);
    sh(
        host,
        "ip addr add 198.51.100.1/24 dev eth1; ip link set eth1 up",
    );
    sh(
        &other,
        "ip addr add 198.51.100.9/24 dev eth0; ip link set eth0 up
                ip route add default via 198.51.100.1",
    );
    sh(
        &world.neighbour,
        "ip route add 198.51.100.0/24 via 203.0.113.1",
    );
    assert_eq!(asked(&other, 80, &world.neighbour, "198.51.100.9:80"), None);
    let switched = world.state.switched.clone();
    inside(host, move || {
        forwarding::switch_back(&switched).unwrap();
        firewall::remove().unwrap();
    });
    bridge::remove(host, "bulkhead0-2").unwrap();
    bridge::remove(host, BRIDGE).unwrap();
    bridge::remove(host, BRIDGE).unwrap();
    assert_eq!(sh(host, settings), "0\n0\n0\n1\n");
    assert_eq!(sh(host, "nft list tables"), "");
    assert!(!sh(host, "ip -o link").contains("bulkhead0:"));
}

#[test]
fn an_interface_goes_with_the_last_who_has_its_namespace_open() {
    let Some(mut world) = World::new(&[]) else {
        return;
    };
    let names = |world: &World| -> Vec<String> {
        let all = bridge::interfaces(&world.host).unwrap();
        all.into_iter().map(|it| it.name).collect()
    };
    assert!(names(&world).contains(&"bulkhead0-2".to_owned()));
    world.containers.clear();
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while names(&world)
        .iter()
        .any(|name| name.starts_with("bulkhead0-"))
    {
        assert!(std::time::Instant::now() < end, "{:?}", names(&world));
        thread::sleep(Duration::from_millis(10));
    }
}
