use std::{
    io::{Read, Write},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, symlink},
        net::UnixListener,
    },
    time::Instant,
};

use super::*;

fn wanted(source: &Path, may_be_absent: bool) -> Socket {
    Socket {
        source: source.to_owned(),
        destination: "/run/x".into(),
        may_be_absent,
    }
}

fn find(source: &Path) -> HostSocket {
    HostSocket::find(&wanted(source, false)).unwrap().0
}

fn refused(source: &Path, may_be_absent: bool, reason: &str) {
    let error = HostSocket::find(&wanted(source, may_be_absent)).map(drop);
    let text = error.unwrap_err().text();
    assert!(text.contains(reason), "{text}");
    assert!(text.contains(source.to_str().unwrap()), "{text}");
}

/// A service that says its name to whoever connects.
fn service(path: &Path, name: &'static str) -> std::thread::JoinHandle<()> {
    let listener = UnixListener::bind(path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(name.as_bytes()).unwrap();
    })
}

/// Which service it is that one gets to.
fn reached(socket: &HostSocket) -> io::Result<String> {
    let stream = dial(&socket.path)?;
    stream.set_nonblocking(false)?;
    let mut name = String::new();
    (&stream).read_to_string(&mut name)?;
    Ok(name)
}

#[test]
fn the_guest_is_told_who_may_connect_and_no_path_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let _listener = UnixListener::bind(&path).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o4620)).unwrap();
    let file = fs::metadata(&path).unwrap();
    let (_, told) = HostSocket::find(&wanted(&path, false)).unwrap();
    assert_eq!(told.mode, 0o620);
    assert_eq!((told.uid, told.gid), (file.uid(), file.gid()));
    // Nobody said who: root, who needs no capability for that.
    let (_, told) = HostSocket::find(&wanted(&dir.path().join("later"), true)).unwrap();
    assert_eq!((told.mode, told.uid, told.gid), (0o600, 0, 0));
}

#[test]
fn what_is_no_socket_is_refused_by_its_name_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let nowhere = dir.path().join("nowhere");
    symlink("gone", &nowhere).unwrap();
    for may_be_absent in [false, true] {
        refused(
            &file,
            may_be_absent,
            "it is not a socket (mounted on /run/x)",
        );
        refused(dir.path(), may_be_absent, "it is not a socket");
        refused(&file.join("s"), may_be_absent, "Not a directory");
        refused(&dir.path().join("no/s"), may_be_absent, "No such file");
    }
    refused(&dir.path().join("s"), false, "No such file");
    refused(&nowhere, true, "a link that leads to nothing");
}

#[test]
fn a_service_that_is_started_again_is_reached_in_a_new_directory_too_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().join("run");
    fs::create_dir(&place).unwrap();
    let path = place.join("s");
    let (socket, _) = HostSocket::find(&wanted(&path, true)).unwrap();
    assert_eq!(
        reached(&socket).unwrap_err().kind(),
        io::ErrorKind::NotFound
    );
    let first = service(&path, "first");
    assert_eq!(reached(&socket).unwrap(), "first");
    first.join().unwrap();
    // Its socket is still there, and nobody listens.
    let refused = reached(&socket).unwrap_err();
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    fs::remove_dir_all(&place).unwrap();
    fs::create_dir(&place).unwrap();
    let second = service(&path, "second");
    assert_eq!(reached(&socket).unwrap(), "second");
    second.join().unwrap();
    fs::remove_file(&path).unwrap();
    fs::write(&path, "").unwrap();
    let other = reached(&socket).unwrap_err().to_string();
    assert_eq!(other, "it is not a socket any more");
}

#[test]
fn links_are_followed_when_it_is_found_and_never_again_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    for place in ["a", "b"] {
        fs::create_dir(dir.path().join(place)).unwrap();
    }
    let (a, b) = (dir.path().join("a/s"), dir.path().join("b/s"));
    symlink("a", dir.path().join("current")).unwrap();
    symlink("s", dir.path().join("a/link")).unwrap();
    let first = service(&a, "a");
    let socket = find(&dir.path().join("current/link"));
    // The way to it leads somewhere else now, which it does not take.
    fs::remove_file(dir.path().join("current")).unwrap();
    symlink("b", dir.path().join("current")).unwrap();
    let other = service(&b, "b");
    assert_eq!(reached(&socket).unwrap(), "a");
    first.join().unwrap();
    // Nor does it follow one that takes the place of the socket or of its directory.
    fs::remove_file(&a).unwrap();
    symlink("../b/s", &a).unwrap();
    assert_eq!(
        reached(&socket).unwrap_err().raw_os_error(),
        Some(libc::ELOOP)
    );
    fs::remove_dir_all(dir.path().join("a")).unwrap();
    symlink("b", dir.path().join("a")).unwrap();
    assert_eq!(
        reached(&socket).unwrap_err().raw_os_error(),
        Some(libc::ELOOP)
    );
    assert_eq!(reached(&find(&b)).unwrap(), "b");
    other.join().unwrap();
}

#[test]
fn a_path_that_is_too_long_for_an_address_is_none_for_a_socket_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    let deep = dir.path().join("long".repeat(40));
    fs::create_dir(&deep).unwrap();
    let (short, long) = (dir.path().join("s"), deep.join("s"));
    let service = service(&short, "it");
    fs::rename(&short, &long).unwrap();
    assert!(long.as_os_str().len() > 108);
    assert_eq!(reached(&find(&long)).unwrap(), "it");
    service.join().unwrap();
}

#[test]
fn a_service_that_lets_nobody_in_is_given_up_ss_21() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    let flags = SocketFlags::CLOEXEC;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
    rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
    rustix::net::listen(&listener, 0).unwrap();
    let _first = dial(&path).unwrap();
    let begun = Instant::now();
    let error = dial(&path).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::WouldBlock, "{error}");
    assert!(begun.elapsed() >= DIAL);
}
