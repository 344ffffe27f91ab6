//! The network of containers that `bulkhead run` starts, without containerd.

use std::{
    io::{Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use bulkhead_tests::{BUSYBOX, Command, DEBIAN, Outcome, Running};

const PATIENCE: Duration = Duration::from_secs(60);

/// Starts a container of this name that says "ready" and then stays.
fn start(name: &str, options: &[&str], line: &str) -> Running {
    let line = format!("{line}\necho ready; exec sleep 1000");
    let run = ["run", "--rm", "--name", name];
    let image = [BUSYBOX, "--", "sh", "-c", &line];
    let all = run.iter().chain(options).chain(&image);
    let run = Command::bulkhead(all.copied()).start();
    run.wait_for_output("ready");
    run
}

/// Runs a shell line in a running container.
fn exec(name: &str, line: &str) -> Outcome {
    Command::bulkhead(["exec", name, "sh", "-c", line]).run()
}

/// Runs a shell line in a container with these options.
fn sh(options: &[&str], line: &str) -> Outcome {
    let image = [BUSYBOX, "--", "sh", "-c", line];
    let all = ["run", "--rm"].iter().chain(options).chain(&image);
    Command::bulkhead(all.copied()).run()
}

fn end(name: &str, run: Running) {
    Command::bulkhead(["kill", name, "KILL"]).run().success();
    assert_eq!(run.wait().code, 137);
}

/// What the harness does not count.
#[track_caller]
fn assert_nothing_is_left() {
    assert_eq!(Command::new("nft", ["list", "tables"]).run().success(), "");
    assert!(!Path::new("/run/bulkhead/network").exists());
    assert!(!Path::new("/sys/class/net/bulkhead0").exists());
}

/// The addresses that a container with this name has.
fn addresses(name: &str) -> (String, String) {
    let list = Command::bulkhead(["network", "ls", "--format", "json"]).run();
    let list: serde_json::Value = serde_json::from_str(&list.success()).expect("JSON");
    let all = list[0]["containers"].as_array().expect("a list");
    let its = all.iter().find(|it| it["id"] == name).expect("it is there");
    let text = |field: &str| its[field].as_str().expect("a text").to_owned();
    (text("ipv4"), text("ipv6"))
}

fn get(at: &str) -> Option<String> {
    let mut stream = TcpStream::connect(at).ok()?;
    stream.set_read_timeout(Some(PATIENCE)).ok()?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.rsplit("\r\n").next().map(str::to_owned)
}

/// A server of files in the container.
const SERVER: &str = "mkdir /www; echo served > /www/index.html; httpd -p 80 -h /www";

#[test]
fn a_container_has_addresses_of_both_families_and_reaches_a_server_of_the_host() {
    let server = TcpListener::bind("[::]:0").unwrap();
    let port = server.local_addr().unwrap().port();
    let serve = thread::spawn(move || {
        let peers: Vec<String> = (0..2)
            .map(|_| {
                let (mut stream, peer) = server.accept().unwrap();
                stream.write_all(b"from the host\n").unwrap();
                peer.ip().to_canonical().to_string()
            })
            .collect();
        peers
    });
    let line = format!(
        "ip -o addr show eth0 | grep -c inet; ip route | head -n 1
         nc host.containers.internal {port} < /dev/null
         nc $(ip -6 route | sed -n 's/^default via \\([^ ]*\\).*/\\1/p') {port} < /dev/null
         cat /etc/hosts; hostname"
    );
    let out = sh(&["--name", "web", "--hostname", "front"], &line).success();
    let peers = serve.join().unwrap();
    assert!(
        peers[0].starts_with("10.91.") && peers[1].starts_with("fd"),
        "{peers:?}"
    );
    assert!(out.starts_with("3\ndefault via 10.91."), "{out}");
    assert_eq!(out.matches("from the host\n").count(), 2, "{out}");
    assert!(out.contains(&format!("{}\tfront web\n", peers[0])), "{out}");
    assert!(out.contains(&format!("{}\tfront web\n", peers[1])), "{out}");
    assert!(out.ends_with("\nfront\n"), "{out}");
    assert_nothing_is_left();
}

#[test]
fn a_published_port_is_reached_by_the_addresses_of_the_host() {
    let options = ["-p", "8080:80", "-p", "127.0.0.1:8081:80/tcp"];
    let run = start("web", &options, SERVER);
    let (v4, _) = addresses("web");
    let gateway = v4.rsplit_once('.').unwrap().0.to_owned() + ".1";
    for at in [
        "127.0.0.1:8080",
        "127.0.0.1:8081",
        &format!("{gateway}:8080"),
    ] {
        assert_eq!(get(at).as_deref(), Some("served\n"), "{at}");
    }
    assert_eq!(get(&format!("{gateway}:8081")), None);
    // By the way that others take, though it is its own.
    let own = exec("web", "wget -qO- http://host.containers.internal:8080/");
    assert_eq!(own.success(), "served\n");
    // Nobody is there, and that is told at once.
    let begin = Instant::now();
    assert!(TcpStream::connect("[::1]:8080").is_err());
    assert!(begin.elapsed() < Duration::from_secs(5));
    // It is taken, though no program of the host has it.
    let error = sh(&["-p", "127.0.0.1:8080:1"], "true").failure();
    assert!(
        error.contains("\"127.0.0.1:8080:1/tcp\"") && error.contains("\"web\""),
        "{error}"
    );
    end("web", run);
    assert_eq!(get("127.0.0.1:8080"), None);
    assert_nothing_is_left();
}

#[test]
fn datagrams_to_a_published_port_are_answered() {
    let server = "import socket\ns = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)\n\
                  s.bind((\"\", 53))\nprint(\"ready\", flush=True)\n\
                  while True: s.sendto(*s.recvfrom(99))";
    let run = Command::bulkhead([
        "run",
        "--rm",
        "--name",
        "echo",
        "--memory",
        "512M",
        "-p",
        "5353:53/udp",
        DEBIAN,
        "--",
        "python3",
        "-c",
        server,
    ]);
    let run = run.start();
    run.wait_for_output("ready");
    let (v4, _) = addresses("echo");
    let gateway = v4.rsplit_once('.').unwrap().0.to_owned() + ".1:5353";
    for at in ["127.0.0.1:5353", &gateway] {
        let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
        socket.connect(at).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.send(b"echoed").unwrap();
        let mut bytes = [0; 16];
        let count = socket.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[..count], b"echoed", "{at}");
    }
    end("echo", run);
    assert_nothing_is_left();
}

#[test]
fn containers_reach_each_other_by_name_as_long_as_they_run() {
    let first = start("first", &[], SERVER);
    assert!(
        exec("first", "ping -c 1 second")
            .failure()
            .contains("second")
    );
    let second = start("second", &["--add-host", "cache:192.0.2.7"], SERVER);
    let (v4, v6) = addresses("second");
    for (from, to) in [("first", "second"), ("second", "first")] {
        assert_eq!(
            exec(from, &format!("wget -qO- http://{to}/")).success(),
            "served\n"
        );
    }
    exec("first", "ping -c 1 -4 second && ping -c 1 -6 second").success();
    let at = format!("wget -qO- http://{v4}/ && wget -qO- http://[{v6}]/");
    assert_eq!(exec("first", &at).success(), "served\nserved\n");
    assert!(
        exec("second", "cat /etc/hosts")
            .success()
            .contains("192.0.2.7\tcache\n")
    );
    end("second", second);
    let hosts = exec("first", "cat /etc/hosts").success();
    assert!(
        !hosts.contains("second") && hosts.contains("first"),
        "{hosts}"
    );
    end("first", first);
    assert_nothing_is_left();
}

#[test]
fn without_a_network_there_is_a_loopback_interface_only() {
    let line = "ls /sys/class/net; cat /etc/hosts; ping -c 1 $(hostname)";
    let options = [
        "--network",
        "none",
        "--hostname",
        "own",
        "--add-host",
        "a:192.0.2.1",
    ];
    let out = sh(&options, line).success();
    assert!(out.starts_with("lo\n") && !out.contains("eth0"), "{out}");
    assert!(out.contains("192.0.2.1\ta\n127.0.1.1\town\n"), "{out}");
    assert_nothing_is_left();
}

#[test]
fn a_killed_shim_leaves_nothing_of_the_network_f1() {
    let run = start("web", &["-p", "8080:80"], SERVER);
    Command::new("pkill", ["-KILL", "-f", "containerd-shim-bulkhead-v2"])
        .run()
        .success();
    assert!(run.wait().code != 0);
    assert_nothing_is_left();
}

#[test]
fn a_killed_run_leaves_its_container_connected_until_it_is_removed() {
    let run = start("web", &["-p", "8080:80", "--ip", "10.91.0.9"], SERVER);
    run.signal(libc::SIGKILL);
    assert_eq!(run.wait().code, 137);
    // It runs on, and nobody gets what it has.
    let error = sh(&["--ip", "10.91.0.9"], "true").failure();
    assert!(
        error.contains("--ip \"10.91.0.9\"") && error.contains("\"web\""),
        "{error}"
    );
    assert_eq!(get("127.0.0.1:8080").as_deref(), Some("served\n"));
    assert_eq!(Command::bulkhead(["network", "prune"]).run().success(), "");
    assert_eq!(get("127.0.0.1:8080").as_deref(), Some("served\n"));
    Command::bulkhead(["rm", "-f", "web"]).run().success();
    assert_nothing_is_left();
}

#[test]
fn what_killed_ones_leave_is_cleared_by_prune_and_by_the_next_run() {
    for prune in [true, false] {
        let run = start("web", &["-p", "8080:80"], SERVER);
        run.signal(libc::SIGKILL);
        Command::new("pkill", ["-KILL", "-f", "containerd-shim-bulkhead-v2"])
            .run()
            .success();
        assert_eq!(run.wait().code, 137);
        let end = Instant::now() + PATIENCE;
        while Path::new("/sys/class/net/bulkhead0-2").exists() {
            assert!(Instant::now() < end, "the interface stays");
            thread::sleep(Duration::from_millis(50));
        }
        if prune {
            let pruned = Command::bulkhead(["network", "prune"]).run();
            assert_eq!(pruned.success(), "web\n");
        } else {
            sh(&["-p", "8080:80", "--ip", "10.91.0.2"], "true").success();
        }
        assert_nothing_is_left();
        Command::bulkhead(["rm", "-f", "web"]).run().success();
    }
}

#[test]
fn what_cannot_be_is_refused_by_option_and_value_and_leaves_nothing() {
    let taken = TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = format!("{}:80", taken.local_addr().unwrap().port());
    for (options, words) in [
        (
            &["--network", "host"][..],
            &["'host'", "--network", "give bridge or none"][..],
        ),
        (
            &["--network", "container:x"],
            &["'container:x'", "give bridge or none"],
        ),
        (&["-p", "0:80"], &["'0:80'", "--publish", "1 to 65535"]),
        (&["-p", "1-2:80"], &["'1-2:80'", "is a range"]),
        (
            &["-p", &taken],
            &["--publish", &taken, "a program of the host"],
        ),
        (
            &["-p", "192.0.2.1:80:80"],
            &["--publish", "does not have this address"],
        ),
        (
            &["-p", "80:1", "-p", "80:2"],
            &["--publish \"80:2/tcp\"", "another --publish"],
        ),
        (
            &["--ip", "192.0.2.1"],
            &["--ip \"192.0.2.1\"", "the network is 10.91.0.0/24"],
        ),
        (
            &["--ip", "10.91.0.1"],
            &["--ip \"10.91.0.1\"", "the host's"],
        ),
        (&["--ip", "fd00::1"], &["'fd00::1'", "--ip", "IPv4"]),
        (&["--dns", "x"], &["'x'", "--dns"]),
        (&["--hostname", "a b"], &["'a b'", "--hostname"]),
        (&["--add-host", "a\nb:192.0.2.1"], &["--add-host"]),
        (
            &["--network", "none", "-p", "1:1"],
            &["--publish", "--network none"],
        ),
    ] {
        let outcome = sh(options, "true");
        assert_eq!(outcome.code, 125, "{outcome}");
        for word in words {
            assert!(outcome.stderr.contains(word), "{word:?}: {outcome}");
        }
        assert_nothing_is_left();
    }
}

#[test]
fn a_host_without_nft_says_so_and_what_works_then() {
    let path = "PATH=/nowhere";
    let run = ["run", "--rm", BUSYBOX, "--", "true"];
    let env = |rest: &[&str]| {
        let all = [path, "/usr/bin/bulkhead"]
            .into_iter()
            .chain(rest.iter().copied());
        Command::new("env", all.collect::<Vec<_>>()).run()
    };
    let error = env(&run).failure();
    assert!(
        error.contains("no program nft") && error.contains("--network none"),
        "{error}"
    );
    assert!(!Path::new("/sys/class/net/bulkhead0").exists());
    let found = env(&["check"]).success();
    assert!(
        found.contains("note  network") && found.contains("package nftables"),
        "{found}"
    );
    env(&["run", "--rm", "--network", "none", BUSYBOX, "--", "true"]).success();
    let found = Command::bulkhead(["check"]).run().success();
    assert!(found.contains("ok    network"), "{found}");
}
