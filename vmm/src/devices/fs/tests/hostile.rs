//! A guest that asks for what it must not get.

use super::*;

/// All names, types and contents below a directory.
fn picture(dir: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let status = fs::symlink_metadata(&path).unwrap();
        found.push(format!("{path:?} {:o} {}", status.mode(), status.size()));
        if status.is_dir() {
            found.extend(picture(&path));
        }
    }
    found.sort();
    found
}

#[test]
fn names_that_are_paths_or_nothing_reach_no_file_b59() {
    let outside = Directory::new();
    fs::write(outside.0.join("secret"), "secret").unwrap();
    let mut guest = Guest::new();
    let inner = Directory(guest.path("inner"));
    fs::create_dir(&inner.0).unwrap();
    fs::write(inner.0.join("file"), "x").unwrap();
    symlink(&outside.0, guest.path("way-out")).unwrap();
    let before = (picture(&outside.0), picture(&guest.dir.0));
    let (dir, file) = (guest.lookup(1, "inner").unwrap(), {
        let dir = guest.lookup(1, "inner").unwrap();
        guest.lookup(dir, "file").unwrap()
    });
    let way_out = guest.lookup(1, "way-out").unwrap();
    assert_eq!(guest.lookup(way_out, "secret"), Err(libc::ENOTDIR));
    let absolute = outside.0.join("secret").to_str().unwrap().to_owned();
    let long = "n".repeat(256);
    for (name, errno) in [
        ("", libc::EINVAL),
        (".", libc::EINVAL),
        ("..", libc::EINVAL),
        ("a/b", libc::EINVAL),
        ("../secret", libc::EINVAL),
        ("way-out/secret", libc::EINVAL),
        ("inner/", libc::EINVAL),
        (absolute.as_str(), libc::EINVAL),
        (long.as_str(), libc::ENAMETOOLONG),
    ] {
        for parent in [1, dir] {
            let mut requests = vec![
                (LOOKUP, named(&[], name)),
                (UNLINK, named(&[], name)),
                (RMDIR, named(&[], name)),
                (MKDIR, named(&[0; 8], name)),
                (CREATE, named(&[0; 16], name)),
                (
                    MKNOD,
                    named(&[0, 0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0], name),
                ),
                (LINK, named(&file.to_le_bytes(), name)),
                (SYMLINK, [named(&[], name), b"target\0".to_vec()].concat()),
            ];
            for (from, to) in [(name, "ok"), ("inner", name)] {
                let names = [named(&[], from), named(&[], to)].concat();
                requests.push((RENAME, [&1_u64.to_le_bytes()[..], &names].concat()));
                requests.push((
                    RENAME2,
                    [&1_u64.to_le_bytes()[..], &[0; 8], &names].concat(),
                ));
            }
            for (opcode, body) in requests {
                let outcome = guest.call(opcode, parent, &body);
                assert_eq!(outcome, Err(errno), "{opcode} {name:?}");
            }
        }
    }
    assert_eq!((picture(&outside.0), picture(&guest.dir.0)), before);
}

#[test]
fn forged_and_forgotten_numbers_lead_nowhere_b60() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "x").unwrap();
    let node = guest.lookup(1, "file").unwrap();
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    for forged in [0, node + 1, 1 << 40, u64::MAX] {
        assert_eq!(guest.call(GETATTR, forged, &[0; 16]), Err(libc::ESTALE));
        assert_eq!(guest.lookup(forged, "file"), Err(libc::ESTALE));
        assert_eq!(guest.read(node, forged, 0, 1), Err(libc::EBADF));
        assert_eq!(guest.read(forged, handle, 0, 1), Err(libc::EBADF));
    }
    assert_eq!(guest.read(1, handle, 0, 1), Err(libc::EBADF));
    let forget = guest.request(FORGET, node, &u64::MAX.to_le_bytes());
    assert_eq!(guest.exchange(0, &forget, 0), [0u8; 0]);
    assert_eq!(guest.call(GETATTR, node, &[0; 16]), Err(libc::ESTALE));
    // What is open stays open.
    assert_eq!(guest.read(node, handle, 0, 9), Ok(b"x".to_vec()));
    // A count that lies.
    let mut body = 1000_u32.to_le_bytes().to_vec();
    body.extend([0; 4 + 16]);
    let forget = guest.request(BATCH_FORGET, 0, &body);
    assert_eq!(guest.exchange(0, &forget, 0), [0u8; 0]);
    assert!(guest.lookup(1, "file").is_ok());
}

#[test]
fn what_comes_at_the_wrong_time_or_place_is_refused_b61() {
    let mut guest = Guest::raw(false);
    assert_eq!(guest.lookup(1, "x"), Err(libc::EIO), "before INIT");
    let init = guest.request(INIT, 0, &[7, 0, 0, 0, 38, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(outcome(&guest.exchange(0, &init, 4096)), Err(libc::EINVAL));
    let old = guest.call(INIT, 0, &[6, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(old, Err(libc::EPROTO));
    guest.init();
    assert_eq!(outcome(&guest.exchange(1, &init, 4096)), Err(libc::EINVAL));
    let lookup = guest.request(LOOKUP, 1, b"x\0");
    assert_eq!(
        outcome(&guest.exchange(0, &lookup, 4096)),
        Err(libc::EINVAL)
    );
    for opcode in [0, 7, 19, 34, 37, 39, 40, 41, 48, 49, 53, 99, 65_535] {
        assert_eq!(
            guest.call(opcode, 1, &[0; 48]),
            Err(libc::ENOSYS),
            "{opcode}"
        );
    }
    // A length that is not that of the descriptors.
    for wrong in [0_u32, 39, 41, 43, u32::MAX] {
        let mut request = guest.request(LOOKUP, 1, b"x\0");
        request[..4].copy_from_slice(&wrong.to_le_bytes());
        assert_eq!(
            outcome(&guest.exchange(1, &request, 4096)),
            Err(libc::EINVAL)
        );
    }
    // No header at all, and no room for a reply.
    for len in [0, 1, 39] {
        assert_eq!(guest.exchange(1, &vec![0xff; len], 4096), [0u8; 0]);
    }
    let getattr = guest.request(GETATTR, 1, &[0; 16]);
    for room in [0, 1, 15] {
        assert_eq!(guest.exchange(1, &getattr, room), [0u8; 0]);
    }
    guest.call(DESTROY, 0, &[]).unwrap();
    assert_eq!(guest.lookup(1, "x"), Err(libc::EIO));
    guest.init();
    assert_eq!(guest.lookup(1, "x"), Err(libc::ENOENT));
}

#[test]
fn sizes_and_offsets_beyond_all_bounds_stay_within_the_buffers_b62() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", libc::O_RDWR, 0o644).unwrap();
    guest.write(node, handle, 0, &[1; 5000]).unwrap();
    assert_eq!(guest.read(node, handle, 0, u32::MAX).unwrap().len(), 5000);
    assert_eq!(guest.read(node, handle, u64::MAX, 10), Err(libc::EINVAL));
    assert_eq!(guest.write(node, handle, u64::MAX, b"x"), Err(libc::EINVAL));
    let request = guest.request(READ, node, &io(handle, 0, 5000));
    let short = guest.exchange(1, &request, 16 + 4999);
    assert_eq!(outcome(&short).unwrap().len(), 4999);
    let mut huge = io(handle, 0, u32::MAX);
    huge.extend([0; 10]);
    assert_eq!(guest.call(WRITE_, node, &huge), Err(libc::EINVAL));
    let getattr = guest.request(GETATTR, 1, &[0; 16]);
    assert_eq!(
        outcome(&guest.exchange(1, &getattr, 16 + 103)),
        Err(libc::EINVAL)
    );
    let size = named(&[u32::MAX.to_le_bytes(), [0; 4]].concat(), "user.x");
    assert_eq!(guest.call(GETXATTR, node, &size), Err(libc::ENODATA));
}

#[test]
fn nodes_of_other_kinds_are_made_but_never_opened_b63() {
    let mut guest = Guest::new();
    for (name, kind) in [
        ("fifo", libc::S_IFIFO),
        ("socket", libc::S_IFSOCK),
        ("char", libc::S_IFCHR),
        ("block", libc::S_IFBLK),
    ] {
        let made = guest.mknod(name, kind | 0o666);
        if !is_root() && matches!(kind, libc::S_IFCHR | libc::S_IFBLK) {
            assert_eq!(made, Err(libc::EPERM));
            continue;
        }
        let node = made.unwrap();
        let flags = [
            libc::O_RDONLY,
            libc::O_RDWR,
            libc::O_WRONLY | libc::O_TRUNC,
            libc::O_PATH,
            libc::O_TMPFILE | libc::O_RDWR,
            -1,
        ];
        for flags in flags {
            assert_eq!(guest.open(node, flags), Err(libc::ENXIO), "{name}");
            let create = guest.create(name, flags & !libc::O_EXCL, 0o666);
            assert_eq!(create, Err(libc::ENXIO), "{name}");
        }
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&8_u32.to_le_bytes());
        assert_eq!(guest.call(SETATTR, node, &body), Err(libc::ENXIO));
    }
    let kind = fs::symlink_metadata(guest.path("fifo"))
        .unwrap()
        .file_type();
    assert!(kind.is_fifo());
    for kind in [libc::S_IFDIR, libc::S_IFLNK, 0o050_000] {
        assert_eq!(guest.mknod("x", kind), Err(libc::EINVAL));
    }
    // All bits at once, on a regular file.
    let (node, _) = guest.create("file", libc::O_RDWR, 0o644).unwrap();
    assert!(guest.open(node, !libc::O_ACCMODE | libc::O_RDWR).is_ok());
}

#[test]
fn a_read_only_share_changes_for_no_request_b64() {
    let mut guest = Guest::read_only();
    fs::write(guest.path("file"), "text").unwrap();
    fs::create_dir(guest.path("dir")).unwrap();
    let before = picture(&guest.dir.0);
    let node = guest.lookup(1, "file").unwrap();
    for flags in [
        libc::O_WRONLY,
        libc::O_RDWR,
        libc::O_RDONLY | libc::O_TRUNC,
        libc::O_ACCMODE,
    ] {
        assert_eq!(guest.open(node, flags), Err(libc::EROFS));
        assert_eq!(guest.create("file", flags, 0o644), Err(libc::EROFS));
    }
    let handle = guest.open(node, libc::O_RDONLY | libc::O_APPEND).unwrap();
    assert_eq!(guest.read(node, handle, 0, 10), Ok(b"text".to_vec()));
    let write = [io(handle, 0, 1), vec![0]].concat();
    for valid in 0..16_u32 {
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&(1_u32 << valid).to_le_bytes());
        assert_eq!(guest.call(SETATTR, node, &body), Err(libc::EROFS));
    }
    for (opcode, node, body) in [
        (CREATE, 1, named(&[0; 16], "new")),
        (MKNOD, 1, named(&[0; 16], "new")),
        (MKDIR, 1, named(&[0; 8], "new")),
        (SYMLINK, 1, b"new\0target\0".to_vec()),
        (LINK, 1, named(&node.to_le_bytes(), "new")),
        (UNLINK, 1, b"file\0".to_vec()),
        (RMDIR, 1, b"dir\0".to_vec()),
        (
            RENAME,
            1,
            [&1_u64.to_le_bytes()[..], b"file\0new\0"].concat(),
        ),
        (
            RENAME2,
            1,
            [
                &[1, 0, 0, 0, 0, 0, 0, 0][..],
                &[2, 0, 0, 0, 0, 0, 0, 0],
                b"file\0dir\0",
            ]
            .concat(),
        ),
        (WRITE_, node, write),
        (
            SETXATTR,
            node,
            [&[1, 0, 0, 0][..], &[0; 12], b"user.x\0v"].concat(),
        ),
        (REMOVEXATTR, node, b"user.x\0".to_vec()),
        (
            FALLOCATE,
            node,
            [&handle.to_le_bytes()[..], &[0; 24]].concat(),
        ),
    ] {
        assert_eq!(
            guest.call(opcode, node, &body),
            Err(libc::EROFS),
            "{opcode}"
        );
    }
    assert_eq!(picture(&guest.dir.0), before);
}

#[test]
fn set_id_bits_go_when_the_guest_asks_for_that_b68() {
    let mut guest = Guest::new();
    if !is_root() {
        return;
    }
    fs::write(guest.path("file"), "text").unwrap();
    let mode = |guest: &Guest, mode| {
        let path = guest.path("file");
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
    };
    let now = |guest: &Guest| fs::metadata(guest.path("file")).unwrap().mode() & 0o7777;
    let node = guest.lookup(1, "file").unwrap();
    let handle = guest.open(node, libc::O_RDWR).unwrap();
    for (kill, expected) in [(0_u32, 0o6755), (4, 0o755)] {
        mode(&guest, 0o6755);
        let mut body = io(handle, 0, 1);
        body[20..24].copy_from_slice(&kill.to_le_bytes());
        body.push(b'x');
        guest.call(WRITE_, node, &body).unwrap();
        assert_eq!(now(&guest), expected);
    }
    for (kill, expected) in [(0, 0o6755), (1 << 11, 0o755)] {
        mode(&guest, 0o6755);
        let mut body = vec![0; 88];
        body[..4].copy_from_slice(&(8_u32 | kill).to_le_bytes());
        guest.call(SETATTR, node, &body).unwrap();
        assert_eq!(now(&guest), expected);
    }
    for (kill, expected) in [(0_u32, 0o6755), (1, 0o755)] {
        mode(&guest, 0o6755);
        let mut body = (libc::O_WRONLY | libc::O_TRUNC).to_le_bytes().to_vec();
        body.extend(kill.to_le_bytes());
        guest.call(OPEN, node, &body).unwrap();
        assert_eq!(now(&guest), expected);
    }
}
