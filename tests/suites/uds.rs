//! Sockets of the host in a container: mounts of type `uds`, and bind mounts of sockets.
//!
//! Services are threads of the tests, clients are programs in the container.
#![expect(
    clippy::tests_outside_test_module,
    reason = "the whole crate is a suite"
)]

#[path = "uds/container.rs"]
mod container;

use std::{
    fs,
    io::Read,
    net::Shutdown,
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    thread,
    time::Duration,
};

use bulkhead_tests::{Command, DEBIAN};

use self::container::{Bundle, Container, PLACE, Service, pattern, rest, say};

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in("/var/tmp").expect("a directory")
}

#[test]
fn a_process_reaches_a_service_of_the_host_and_nobody_is_dialled_before_ss_21_ss_43() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let container = Container::start("reaches", &path);
    thread::sleep(Duration::from_secs(1));
    assert!(service.is_alone());
    let client = container.client("print(rest(connect()).decode())");
    let mut stream = service.accept();
    say(&mut stream, b"it is me\n");
    drop(stream);
    assert_eq!(client.wait().success(), "it is me\n\n");
    // Two at once, of which nobody hears anything but the end.
    let clients = [0, 1].map(|_| container.client("print(len(rest(connect())))"));
    for _ in 0..2 {
        drop(service.accept());
    }
    for client in clients {
        assert_eq!(client.wait().success(), "0\n");
    }
    assert!(service.is_alone());
    container.kill();
}

#[test]
fn bytes_pass_both_ways_at_once_and_the_end_of_either_way_is_its_own_ss_66() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let container = Container::start("both", &path);
    for size in [8, 4096, 4 << 20] {
        let client = container.client(&format!(
            "
s = connect()
if os.fork() == 0:
    s.sendall(pattern({size}, 7))
    s.shutdown(socket.SHUT_WR)
    os._exit(0)
data = rest(s)
print(len(data), data == pattern({size} + 9, 3))"
        ));
        let mut stream = service.accept();
        let mut other = stream.try_clone().expect("a copy");
        let answer = thread::spawn(move || say(&mut other, &pattern(size, 3)));
        let got = rest(&mut stream);
        assert!(got == pattern(size, 7), "{} of {size} bytes", got.len());
        answer.join().expect("it was taken");
        // After the end of the question there is still an answer.
        say(&mut stream, &pattern(size + 9, 3)[size..]);
        drop(stream);
        let said = client.wait().success();
        assert_eq!(said, format!("{} True\n", size + 9));
    }
    container.kill();
}

#[test]
fn sixteen_talk_at_once_and_none_hears_another_ss_66() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let container = Container::start("sixteen", &path);
    let client = container.client(
        "
for n in range(16):
    if os.fork() == 0:
        s = connect()
        data = pattern(100000, n + 1)
        s.sendall(bytes([n]) + data)
        s.shutdown(socket.SHUT_WR)
        os._exit(rest(s) != bytes([n]) + data)
print([os.wait()[1] for _ in range(16)] == [0] * 16)",
    );
    // All are there before any is answered.
    let streams: Vec<_> = (0..16).map(|_| service.accept()).collect();
    let answers = streams.into_iter().map(|mut stream| {
        thread::spawn(move || {
            let said = rest(&mut stream);
            say(&mut stream, &said);
        })
    });
    for answer in answers.collect::<Vec<_>>() {
        answer.join().expect("it was taken");
    }
    assert_eq!(client.wait().success(), "True\n");
    container.kill();
}

#[test]
fn a_service_that_closes_first_is_heard_to_the_end_ss_21() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let container = Container::start("closes", &path);
    let client = container.client(
        "
s = connect()
s.sendall(b'question')
data = rest(s)
print(len(data), data == pattern(200000, 5))
try:
    while True:
        s.sendall(b'x' * 65536)
except OSError as error:
    print(type(error).__name__)",
    );
    let mut stream = service.accept();
    let mut question = [0; 8];
    std::io::Read::read_exact(&mut stream, &mut question).expect("a question");
    say(&mut stream, &pattern(200_000, 5));
    drop(stream);
    let said = client.wait().success();
    assert!(
        said == "200000 True\nBrokenPipeError\n" || said == "200000 True\nConnectionResetError\n",
        "{said}"
    );
    // Who only stops to listen still speaks.
    let client = container.client(
        "
s = connect()
print(rest(s))
s.sendall(b'still here')",
    );
    let mut stream = service.accept();
    stream.shutdown(Shutdown::Write).expect("an end");
    assert_eq!(rest(&mut stream), b"still here");
    assert_eq!(client.wait().success(), "b''\n");
    container.kill();
}

#[test]
fn a_service_may_come_late_and_be_started_again_ss_21() {
    let dir = directory();
    let place = dir.path().join("run");
    fs::create_dir(&place).expect("a directory");
    let path = place.join("host.sock");
    let container = Container::start("late", &path);
    let hears = |expected: &str| {
        let client = container.client("print(rest(connect()))");
        assert_eq!(client.wait().success(), format!("{expected}\n"));
    };
    hears("b''");
    for name in ["first", "second"] {
        let service = Service::listen(&path);
        let client = container.client("print(rest(connect()))");
        say(&mut service.accept(), name.as_bytes());
        assert_eq!(client.wait().success(), format!("b'{name}'\n"));
        service.stop();
        hears("b''");
        // As a service manager does it.
        fs::remove_dir(&place).expect("it is empty");
        fs::create_dir(&place).expect("a directory");
    }
    container.kill();
}

#[test]
fn a_connection_outlives_the_program_of_its_shim_and_further_ones_come_ss_21() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let container = Container::start("outlives", &path);
    let client = container.client(
        "
s = connect()
s.sendall(b'one')
print(s.recv(5).decode(), flush=True)
s.sendall(pattern(1 << 20, 7))
s.shutdown(socket.SHUT_WR)
print(len(rest(s)))",
    );
    let mut stream = service.accept();
    let mut heard = [0; 3];
    stream.read_exact(&mut heard).expect("it speaks");
    assert_eq!(&heard, b"one");
    let upgrade = || Command::bulkhead(["upgrade", "outlives"]).run().success();
    for _ in 0..2 {
        assert!(upgrade().contains("goes on as version"));
    }
    say(&mut stream, b"three");
    client.wait_for_output("three");
    // With a megabyte on its way that nobody reads.
    assert!(upgrade().contains("goes on as version"));
    let got = rest(&mut stream);
    assert!(got == pattern(1 << 20, 7), "{} bytes", got.len());
    say(&mut stream, b"the end");
    drop(stream);
    assert_eq!(client.wait().success(), "three\n7\n");
    // The guest had been asked for this one by an earlier program.
    let client = container.client("print(rest(connect()).decode())");
    let mut stream = service.accept();
    say(&mut stream, b"later");
    drop(stream);
    assert_eq!(client.wait().success(), "later\n");
    container.kill();
}

#[test]
fn the_mode_of_a_socket_says_who_may_connect_ss_21() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    chown(&path, Some(0), Some(2000)).expect("a group");
    fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).expect("a mode");
    let container = Container::start("mode", &path);
    let program = "
print(oct(os.stat('/run/made/test.sock').st_mode))
try:
    print(rest(connect()))
except PermissionError:
    print('refused')";
    let client = container.client_of("1000:1000", program);
    assert_eq!(client.wait().success(), "0o140660\nrefused\n");
    assert!(service.is_alone());
    // Root, without a capability, and the group.
    for user in ["0:0", "1000:2000"] {
        let client = container.client_of(user, program);
        drop(service.accept());
        assert_eq!(client.wait().success(), "0o140660\nb''\n", "{user}");
    }
    container.kill();
}

#[test]
fn a_container_that_ends_leaves_nothing_and_what_it_said_arrives_ss_21() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let bundle = Bundle::of_client("connect().sendall(pattern(100000, 9))").with(&path);
    let run = bundle.command("said").start();
    let mut stream = service.accept();
    let said = rest(&mut stream);
    assert!(said == pattern(100_000, 9), "{} bytes", said.len());
    run.wait().success();
    // One that is killed while it listens.
    let container = Container::start("listens", &path);
    let client = container.client("rest(connect())");
    let mut stream = service.accept();
    container.kill();
    assert_eq!(rest(&mut stream), b"");
    let _ = client.wait();
    // And one of whose connections the service never lets go.
    let container = Container::start("kept", &path);
    let client = container.client("rest(connect())");
    let kept = service.accept();
    container.kill();
    let _ = client.wait();
    drop(kept);
}

#[test]
fn a_volume_that_is_a_socket_is_carried_on_fs_31() {
    let dir = directory();
    let path = dir.path().join("host.sock");
    let service = Service::listen(&path);
    let volume = format!("{}:/s:ro", path.display());
    let program = "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/s')
s.sendall(b'question'); print(s.recv(100))";
    let run = Command::bulkhead([
        "run", "--rm", "--name", "volume", "--memory", "512M", "-v", &volume, DEBIAN, "--",
        "python3", "-c", program,
    ])
    .start();
    let mut stream = service.accept();
    let mut question = [0; 8];
    std::io::Read::read_exact(&mut stream, &mut question).expect("a question");
    let told = Command::bulkhead(["explain", "volume"]).run().success();
    assert!(told.contains("a socket"), "{told}");
    say(&mut stream, b"answer");
    assert_eq!(run.wait().success(), "b'answer'\n");
}

#[test]
fn what_cannot_be_a_socket_is_refused_ss_21() {
    let dir = directory();
    let file = dir.path().join("file");
    fs::write(&file, "").expect("a file");
    let refused = |source: &Path, options: &[&str], text: &str| {
        let mut bundle = Bundle::new(&["true"]);
        bundle.mount(PLACE, "uds", source, options);
        let out = bundle.command("refused").run().failure();
        assert!(out.contains(text), "{out}");
    };
    refused(&file, &[], "it is not a socket");
    refused(&file, &["ro"], "mounts[3].options");
    refused(Path::new("relative"), &[], "mounts[3].source");
    refused(&dir.path().join("no/s"), &[], "No such file");
}
