//! The network of a pod: what is in the namespace that its caller made.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{Shutdown, TcpListener, TcpStream},
    os::fd::AsFd,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{Setting, netns::Namespace};
use serde_json::{Value, json};

use crate::{
    output::within,
    pod::Pod,
    process::Streams,
    root::{Root, config, forever, process},
};

/// Bytes in both directions.
const MUCH: usize = 8 << 20;

/// A namespace as a CNI plug-in leaves it: an interface whose other end, with the gateway's
/// address, is in the namespace of the test.
struct Net {
    outside: Namespace,
    inside: Namespace,
}

impl Net {
    fn new() -> Net {
        let net = Net {
            outside: Namespace::new("bh-out"),
            inside: Namespace::new("bh-in"),
        };
        net.outside.ip("link set lo up");
        net.inside.ip("link set lo up");
        let peer =
            "link add eth0 address 02:00:00:00:00:07 mtu 1450 type veth peer name gw netns bh-out";
        net.inside.ip(peer);
        net.outside.ip("addr add 10.9.0.1/24 dev gw");
        net.outside.ip("addr add fd09::1/64 dev gw nodad");
        net.outside.ip("addr add 10.99.0.1/32 dev lo");
        net.outside.ip("link set gw mtu 1450 up");
        net.inside.ip("addr add 10.9.0.2/24 dev eth0");
        net.inside.ip("addr add fd09::2/64 dev eth0 nodad");
        net.inside.ip("link set eth0 up");
        // As Calico does: the gateway is on no network of the interface's.
        net.inside.ip("route add 169.254.1.1 dev eth0 scope link");
        net.inside
            .ip("route add default via 169.254.1.1 dev eth0 mtu 1400");
        net.outside.ip("addr add 169.254.1.1/32 dev gw");
        net.inside
            .ip("neigh add 10.9.0.77 lladdr 02:00:00:00:00:77 dev eth0 nud permanent");
        net
    }
}

fn in_namespace(path: &str) -> Value {
    let mut config = config(&forever(&[]));
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    namespaces.push(json!({"type": "network", "path": path}));
    config
}

/// What a program in the container says.
fn says(pod: &Pod, words: &[&str]) -> String {
    let mut process = process(words);
    let rights = ["CAP_NET_RAW"];
    process["capabilities"] = json!({"bounding": rights, "effective": rights, "permitted": rights});
    let program = pod.exec(&process, Streams::Output);
    program.start().unwrap();
    let text = program.output(within(Duration::from_secs(60)));
    let text = String::from_utf8(text).unwrap();
    assert_eq!(program.wait(), 0, "{words:?}: {text}");
    program.delete().unwrap();
    text
}

#[test]
fn the_guest_has_the_interfaces_of_its_namespace_with_all_that_belongs_to_them_nw_10_nw_12_nw_13() {
    let net = Net::new();
    let pod = Pod::start("net", Root::new(), &in_namespace(net.inside.path()));
    pod.run(Streams::Nothing);
    let links = says(&pod, &["ip", "-o", "link"]);
    assert!(
        links.contains("eth0") && links.contains("02:00:00:00:00:07"),
        "{links}"
    );
    assert!(links.contains("mtu 1450"), "{links}");
    let addresses = says(&pod, &["ip", "-o", "addr", "show", "dev", "eth0"]);
    for address in ["10.9.0.2/24", "fd09::2/64"] {
        assert!(addresses.contains(address), "{addresses}");
    }
    let routes = says(&pod, &["ip", "route"]);
    assert!(routes.contains("default via 169.254.1.1"), "{routes}");
    let neighbours = says(&pod, &["cat", "/proc/net/arp"]);
    assert!(neighbours.contains("02:00:00:00:00:77"), "{neighbours}");
    for address in ["10.9.0.1", "10.99.0.1", "fd09::1"] {
        says(&pod, &["ping", "-c", "1", "-W", "20", address]);
    }
    pod.end();
    // The interface is as it was, and nothing of ours is left.
    let left = net.inside.ip("-o link");
    assert!(
        left.contains("eth0") && !left.contains("bulkhead"),
        "{left}"
    );
    let filters = net.inside.run(&["tc", "qdisc", "show", "dev", "eth0"]);
    assert!(!filters.contains("ingress"), "{filters}");
}

#[test]
fn megabytes_pass_both_ways_between_a_container_and_the_network_nw_11_nw_16() {
    let net = Net::new();
    let pod = Pod::start("net", Root::new(), &in_namespace(net.inside.path()));
    pod.run(Streams::Nothing);
    let outside = net.outside.fd().as_fd().try_clone_to_owned().unwrap();
    let sent: Vec<u8> = (0..=250).cycle().take(MUCH).collect();
    let expected = sent.clone();
    let (ready, listens) = std::sync::mpsc::channel();
    let server = thread::spawn(move || {
        nix::sched::setns(outside, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let from = TcpListener::bind("10.9.0.1:8000").unwrap();
        let to = TcpListener::bind("10.9.0.1:8001").unwrap();
        ready.send(()).unwrap();
        from.accept().unwrap().0.write_all(&sent).unwrap();
        let mut came = Vec::new();
        to.accept().unwrap().0.read_to_end(&mut came).unwrap();
        came
    });
    listens.recv().unwrap();
    let line = "nc 10.9.0.1 8000 < /dev/null > /tmp/much; nc 10.9.0.1 8001 < /tmp/much";
    says(&pod, &["sh", "-c", line]);
    let came = server.join().unwrap();
    assert!(came == expected, "{} bytes of {MUCH}", came.len());
    pod.end();
}

#[test]
fn an_interface_that_comes_between_create_and_start_is_there_nw_03_nw_05() {
    let mut config = config(&forever(&[]));
    let namespaces = config["linux"]["namespaces"].as_array_mut().unwrap();
    namespaces.retain(|namespace| namespace["type"] != "network");
    namespaces.push(json!({"type": "network"}));
    let pod = Pod::start("net", Root::new(), &config);
    let first = pod.create(Streams::Nothing);
    // As Docker does: into the namespace of the pid.
    let pid = first.pid().to_string();
    let ip = |line: &str| {
        let done = Command::new("nsenter")
            .args(["-t", &pid, "-n", "ip"])
            .args(line.split(' '))
            .output()
            .unwrap();
        assert!(done.status.success(), "{line}: {done:?}");
    };
    ip("link add eth0 type dummy");
    ip("link set eth0 address 02:00:00:00:00:08 up");
    ip("addr add 10.8.0.2/24 dev eth0");
    first.start().unwrap();
    let addresses = says(&pod, &["ip", "-o", "addr", "show", "dev", "eth0"]);
    assert!(addresses.contains("10.8.0.2/24"), "{addresses}");
    pod.end();
}

/// Until a program in the container says it so.
fn soon(pod: &Pod, words: &[&str], is_so: impl Fn(&str) -> bool) {
    let mut text = String::new();
    for _ in 0..100 {
        text = says(pod, words);
        if is_so(&text) {
            return;
        }
        thread::sleep(Duration::from_millis(100));
    }
    panic!("{words:?} never says so: {text}");
}

#[test]
fn what_changes_in_the_namespace_while_the_pod_runs_changes_in_the_guest_nw_37() {
    let net = Net::new();
    let pod = Pod::start("net", Root::new(), &in_namespace(net.inside.path()));
    pod.run(Streams::Nothing);
    let address = ["ip", "-o", "addr", "show", "dev", "eth0"];
    soon(&pod, &address, |it| it.contains("10.9.0.2/24"));
    // Another address and a longer way, smaller packets.
    net.inside.ip("addr add 10.9.5.2/24 dev eth0");
    net.inside.ip("addr del fd09::2/64 dev eth0");
    net.inside
        .ip("route add 10.98.0.0/16 via 10.9.5.1 dev eth0");
    net.inside.ip("rule add from 10.9.5.2 table 7");
    net.inside.ip("link set eth0 mtu 1400");
    soon(&pod, &address, |it| {
        it.contains("10.9.5.2/24") && it.contains("10.9.0.2/24") && !it.contains("fd09::2")
    });
    soon(&pod, &["ip", "route"], |it| {
        it.contains("10.98.0.0/16 via 10.9.5.1")
    });
    soon(&pod, &["ip", "rule"], |it| it.contains("from 10.9.5.2"));
    soon(&pod, &["ip", "-o", "link"], |it| it.contains("mtu 1400"));
    net.inside.ip("route del 10.98.0.0/16");
    soon(&pod, &["ip", "route"], |it| !it.contains("10.98.0.0"));
    // A second one, which is used at once.
    net.inside
        .ip("link add net1 type veth peer name gw1 netns bh-out");
    net.outside.ip("addr add 10.7.0.1/24 dev gw1");
    net.outside.ip("link set gw1 up");
    net.inside.ip("addr add 10.7.0.2/24 dev net1");
    net.inside.ip("link set net1 up");
    soon(&pod, &["ip", "-o", "addr"], |it| it.contains("10.7.0.2/24"));
    says(&pod, &["ping", "-c", "1", "-W", "20", "10.7.0.1"]);
    // It rests, and comes back with all that it had.
    net.inside.ip("link set eth0 down");
    soon(&pod, &["ip", "-o", "link"], |it| {
        it.lines()
            .any(|it| it.contains("eth0") && !it.contains("UP"))
    });
    net.inside.ip("link set eth0 up");
    net.inside.ip("addr add fd09::2/64 dev eth0 nodad");
    soon(&pod, &address, |it| it.contains("fd09::2"));
    says(&pod, &["ping", "-c", "1", "-W", "20", "10.9.0.1"]);
    says(&pod, &["ping", "-c", "1", "-W", "20", "fd09::1"]);
    // Whoever made them takes them away.
    net.inside.ip("link del net1");
    soon(&pod, &["ip", "-o", "link"], |it| !it.contains("net1"));
    net.inside.ip("link del eth0");
    soon(&pod, &["ip", "-o", "link"], |it| !it.contains("eth0"));
    assert!(!net.inside.ip("-o link").contains("bulkhead"));
    drop(net);
    assert_eq!(says(&pod, &["echo", "lives"]), "lives\n");
    pod.end();
}

/// Connects to an address in a namespace, and says something there; the answer.
fn asked(
    namespace: &Namespace,
    address: &'static str,
    question: &'static str,
) -> io::Result<String> {
    let namespace = namespace.fd().as_fd().try_clone_to_owned().unwrap();
    let asked = thread::spawn(move || {
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let mut stream = TcpStream::connect(address)?;
        stream.write_all(question.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    asked.join().unwrap()
}

#[test]
fn who_connects_to_the_namespaces_loopback_address_is_at_that_of_the_guest_nw_24_nw_26() {
    let net = Net::new();
    let pod = Pod::start("net", Root::new(), &in_namespace(net.inside.path()));
    pod.run(Streams::Nothing);
    let serve = "mkdir /tmp/www; printf 'and back' > /tmp/www/it;
        httpd -f -h /tmp/www -p 127.0.0.1:8080 & httpd -f -h /tmp/www -p [::1]:8081";
    let server = pod.exec(&process(&["sh", "-c", serve]), Streams::Nothing);
    server.start().unwrap();
    for address in ["127.0.0.1:8080", "[::1]:8080", "127.0.0.1:8081"] {
        let answers = || asked(&net.inside, address, "GET /it HTTP/1.0\r\n\r\n");
        // It takes a moment until somebody listens.
        let answers = (0..100).map(|_| {
            thread::sleep(Duration::from_millis(100));
            answers()
        });
        let answer = answers.into_iter().find_map(Result::ok);
        let answer = answer.unwrap_or_else(|| panic!("nobody at {address}"));
        assert!(answer.ends_with("and back"), "{address}: {answer}");
    }
    let nobody = asked(&net.inside, "127.0.0.1:8082", "hello").unwrap_err();
    let reset = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe];
    assert!(reset.contains(&nobody.kind()), "{nobody}");
    pod.end();
    let refused = asked(&net.inside, "127.0.0.1:8080", "hello").unwrap_err();
    assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
}

#[test]
fn no_more_passes_an_interface_than_the_configuration_says() {
    const RATE: usize = 1 << 20;
    let setting = format!("[interface.receive.bytes]\nper_second = {RATE}\nburst = 65536\n");
    let _setting = Setting::put(&setting);
    let net = Net::new();
    let pod = Pod::start("net", Root::new(), &in_namespace(net.inside.path()));
    pod.run(Streams::Nothing);
    let outside = net.outside.fd().as_fd().try_clone_to_owned().unwrap();
    let (ready, listens) = std::sync::mpsc::channel();
    let server = thread::spawn(move || {
        nix::sched::setns(outside, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        let listener = TcpListener::bind("10.9.0.1:8000").unwrap();
        ready.send(()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        let begin = Instant::now();
        stream.write_all(&vec![7; 3 * RATE]).unwrap();
        begin
    });
    listens.recv().unwrap();
    let line = "nc 10.9.0.1 8000 < /dev/null | wc -c";
    assert_eq!(
        says(&pod, &["sh", "-c", line]).trim(),
        (3 * RATE).to_string()
    );
    // Never less, however fast the machines are.
    let took = server.join().unwrap().elapsed();
    assert!(took > Duration::from_millis(2_800), "{took:?}");
    pod.end();
}

#[test]
fn a_container_that_may_change_its_network_sends_as_whom_it_likes_and_no_other_b51() {
    let net = Net::new();
    // Of an address that nobody gave it.
    let line = "ip addr add 10.9.0.3/24 dev eth0 && ping -c 1 -W 2 -I 10.9.0.3 10.9.0.1";
    for (trusted, expected) in [(true, 0), (false, 1)] {
        let mut config = in_namespace(net.inside.path());
        if trusted {
            config["process"]["capabilities"] = json!({"bounding": ["CAP_NET_ADMIN"]});
        }
        let pod = Pod::start("net", Root::new(), &config);
        pod.run(Streams::Nothing);
        says(&pod, &["ping", "-c", "1", "-W", "20", "10.9.0.1"]);
        let mut process = process(&["sh", "-c", line]);
        let rights = ["CAP_NET_RAW", "CAP_NET_ADMIN"];
        process["capabilities"] =
            json!({"bounding": rights, "effective": rights, "permitted": rights});
        let program = pod.exec(&process, Streams::Output);
        program.start().unwrap();
        let text = program.output(within(Duration::from_secs(60)));
        let text = String::from_utf8(text).unwrap();
        assert_eq!(program.wait(), expected, "{text}");
        pod.end();
    }
}
