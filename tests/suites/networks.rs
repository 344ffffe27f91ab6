//! Networks that others make for their containers: Docker's.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    net::UdpSocket,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{Command, Outcome, docker::Daemon};
use serde_json::json;

const PATIENCE: Duration = Duration::from_secs(60);

/// A server of files in a container.
const SERVER: &str = "mkdir -p /tmp/www; echo from $(hostname) > /tmp/www/it;
    exec httpd -f -h /tmp/www -p 80";

/// A name server of the world, and an address that it has for every name.
const NAMES: &str = "10.97.0.1";
const KNOWN: &str = "192.0.2.7";

fn docker(words: &[&str]) -> Outcome {
    Command::new("docker", words).deadline(PATIENCE * 2).run()
}

/// Starts a container with our runtime.
fn run(name: &str, options: &[&str], line: &str) {
    let ours = ["--runtime", "io.containerd.bulkhead.v2", "--name", name];
    let words = [&["run", "-d", "-h", name], &ours[..], options].concat();
    docker(&[&words[..], &["busybox", "sh", "-c", line]].concat()).success();
}

/// Runs a shell line in a container until it succeeds; what it prints.
fn soon(name: &str, line: &str) -> String {
    let begin = Instant::now();
    loop {
        let out = docker(&["exec", name, "sh", "-c", line]);
        if out.code == 0 {
            return out.stdout;
        }
        assert!(begin.elapsed() < PATIENCE, "{name}: {line}: {out}");
        thread::sleep(Duration::from_millis(200));
    }
}

/// A daemon that makes networks; what it made of the host's goes with it.
struct Networks {
    daemon: Option<Daemon>,
}

impl Networks {
    fn new() -> Networks {
        let address = format!("addr add {NAMES}/32 dev lo");
        Command::new("ip", address.split(' ')).run().success();
        let server = UdpSocket::bind((NAMES, 53)).unwrap();
        thread::spawn(move || {
            let mut question = [0; 1500];
            while let Ok((count, from)) = server.recv_from(&mut question) {
                let _ = server.send_to(&answer(&question[..count]), from);
            }
        });
        let settings = json!({"dns": [NAMES], "userland-proxy": true});
        let daemon = Some(Daemon::start(&settings));
        Networks { daemon }
    }
}

impl Drop for Networks {
    fn drop(&mut self) {
        let all = "docker rm -f $(docker ps -aq); docker network prune -f";
        let _ = Command::new("sh", ["-c", all]).run();
        self.daemon = None;
        let rest = format!(
            "umount /run/docker/netns/default; nft flush ruleset; ip link del docker0; ip addr del {NAMES}/32 dev lo; \
            sysctl -w net.ipv4.ip_forward=0"
        );
        let _ = Command::new("sh", ["-c", &rest]).run();
    }
}

/// An answer to a question after an address of IPv4; to others an empty one (RFC 1035, 4).
fn answer(question: &[u8]) -> Vec<u8> {
    let mut end = 12;
    while question[end] != 0 {
        end += usize::from(question[end]) + 1;
    }
    let is_for_ipv4 = question[end + 2] == 1;
    let mut answer = question[..2].to_vec();
    answer.extend([0x81, 0x80, 0, 1, 0, u8::from(is_for_ipv4), 0, 0, 0, 0]);
    answer.extend(&question[12..end + 5]);
    if is_for_ipv4 {
        answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend(KNOWN.parse::<std::net::Ipv4Addr>().unwrap().octets());
    }
    answer
}

fn get(at: &str) -> String {
    let fetch = [
        "-sS",
        "--max-time",
        "20",
        "--retry",
        "5",
        "--retry-all-errors",
    ];
    let at = [at];
    let words = fetch.iter().chain(&at);
    Command::new("curl", words).run().success()
}

#[test]
fn containers_of_a_network_of_dockers_know_each_other_by_name_and_the_world_nw_34() {
    let _networks = Networks::new();
    for name in ["first", "second"] {
        docker(&["network", "create", name]).success();
    }
    let ports = ["-p", "127.0.0.1:8080:80", "-p", "8081:80"];
    run(
        "server",
        &[&["--network", "first"], &ports[..]].concat(),
        SERVER,
    );
    run("client", &["--network", "first"], "exec sleep 1000");
    let other = ["--network", "second", "--network-alias", "cache"];
    run("other", &other, SERVER);

    // By its name, its published ports and its address.
    let by_name = soon("client", "wget -T 5 -qO- http://server/it");
    assert_eq!(by_name, "from server\n");
    let server = [
        "inspect",
        "-f",
        "{{.NetworkSettings.Networks.first.IPAddress}}",
    ];
    let server = docker(&[&server[..], &["server"]].concat()).success();
    let server = server.trim();
    for at in [server, "127.0.0.1:8080", &format!("{NAMES}:8081")] {
        assert_eq!(get(&format!("http://{at}/it")), "from server\n", "{at}");
    }
    // A server of a container's own at the port of name servers is in nobody's way.
    docker(&[
        "exec", "-d", "client", "httpd", "-f", "-h", "/etc", "-p", "53",
    ])
    .success();
    let hosts = soon("client", "wget -T 5 -qO- http://127.0.0.1:53/hostname");
    assert_eq!(hosts, "client\n");
    soon("client", "wget -T 5 -qO- http://server/it");
    // Of the world Docker asks others, from within the namespace.
    let world = soon("client", "nslookup world.example");
    assert!(world.contains(KNOWN), "{world}");
    // Names of other networks are not known, until one is joined.
    let strange = docker(&[
        "exec",
        "client",
        "wget",
        "-T",
        "5",
        "-qO-",
        "http://other/it",
    ]);
    assert_ne!(strange.code, 0, "{strange}");
    docker(&["network", "connect", "second", "client"]).success();
    for name in ["other", "cache"] {
        let joined = soon("client", &format!("wget -T 5 -qO- http://{name}/it"));
        assert_eq!(joined, "from other\n");
    }
    docker(&["network", "disconnect", "first", "client"]).success();
    soon("client", "! ip -o link | grep eth0");
    let joined = soon("client", "wget -T 5 -qO- http://other/it");
    assert_eq!(joined, "from other\n");
}

#[test]
fn the_network_of_the_host_is_refused_with_another_way_named_nw_30() {
    let _networks = Networks::new();
    let ours = ["run", "--rm", "--runtime", "io.containerd.bulkhead.v2"];
    let refused = docker(&[&ours[..], &["--network", "host", "busybox", "true"]].concat());
    let text = refused.failure();
    assert!(text.contains("choose another network"), "{text}");
    let none = docker(
        &[
            &ours[..],
            &["--network", "none", "busybox", "ls", "/sys/class/net"],
        ]
        .concat(),
    );
    assert_eq!(none.success(), "lo\n");
}

#[test]
fn the_bridge_that_docker_has_by_default_connects_a_container_nw_03() {
    let _networks = Networks::new();
    run("server", &["-p", "8080:80"], SERVER);
    run("client", &[], "exec sleep 1000");
    let address = ["inspect", "-f", "{{.NetworkSettings.IPAddress}}", "server"];
    let address = docker(&address).success();
    let line = format!("wget -T 5 -qO- http://{}/it", address.trim());
    assert_eq!(soon("client", &line), "from server\n");
    assert_eq!(get("http://127.0.0.1:8080/it"), "from server\n");
    let world = soon("client", "nslookup world.example");
    assert!(world.contains(KNOWN), "{world}");
    // What it was is so again after it was started anew.
    docker(&["restart", "-t", "1", "server"]).success();
    assert_eq!(get("http://127.0.0.1:8080/it"), "from server\n");
}
