//! Linux's own client on the share: its requests go from `/dev/fuse` into the
//! rings, as many at a time as it likes, and the replies back. Needs root and
//! `/dev/fuse`.

mod client;

use std::{collections::BTreeMap, fs::File, io::Write, os::fd::AsRawFd, process::Command, thread};

pub(super) use self::client::{Linux, abort_of};
use super::*;

const BOTH: [Policy; 2] = [Policy::Shared, Policy::Private];

#[test]
fn linux_itself_works_on_the_share_under_both_policies() {
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        linux.sh("
            test \"$(cat old)\" = old
            mkdir -p a/b/c; echo one > a/b/c/f; ln a/b/c/f hard; ln -s a/b soft
            test \"$(cat soft/c/f)\" = one; test \"$(stat -c %h hard)\" = 2
            mv hard a/moved; test ! -e hard; echo two >> a/moved
            test \"$(wc -l < a/b/c/f)\" = 2
            mkfifo p; (echo through > p &); test \"$(cat p)\" = through
            (umask 077; touch private); test \"$(stat -c %a private)\" = 600
            chmod 4755 private; chown 12:34 private; test \"$(stat -c %a-%u-%g private)\" = 755-12-34
            dd if=/dev/urandom of=big bs=64k count=30 2> /dev/null; cp big copy; cmp big copy
            truncate -s 100 copy; test \"$(stat -c %s copy)\" = 100
            echo short > copy; test \"$(stat -c %s copy)\" = 6; test \"$(cat copy)\" = short
            exec 3<> open; rm open; echo data >&3; test \"$(cat /proc/self/fd/3)\" = data; exec 3>&-
            mkdir many; for i in $(seq 100); do echo $i > many/$i; done
            test \"$(ls many | wc -l)\" = 100; test \"$(cat many/* | sort -n | tail -n 1)\" = 100
            rm -r many a; test ! -e many; ls -la > /dev/null; df . > /dev/null
            echo new >> old; test \"$(cat old)\" = oldnew; sync
        ");
        let owner = fs::metadata(linux.host.join("private")).unwrap().uid();
        assert_eq!(owner, 12);
        let old = fs::read_to_string(linux.host.join("old")).unwrap();
        assert_eq!(old, "oldnew\n");
    }
}

#[test]
fn what_a_private_mount_was_told_once_is_not_asked_again() {
    let Some(linux) = Linux::new(Policy::Private) else {
        return;
    };
    linux.sh("for d in a b c; do mkdir $d; for i in $(seq 20); do echo $i > $d/$i; done; done");
    for script in [
        "find . > /dev/null",
        "ls -lR > /dev/null",
        "stat -c %s a/* > /dev/null",
        "cat a/* b/* > /dev/null",
        "test ! -e a/absent",
    ] {
        // Reading a directory changes the time of its last access: Linux asks for
        // that once more.
        linux.sh(script);
        linux.sh(script);
        let mut again = linux.requests(script);
        // The script's way to the mount: of the share's own names none is kept, nor
        // is the access control list of what has it.
        assert_eq!(again.remove(&LOOKUP), Some(1), "{script}");
        assert!(again.remove(&GETXATTR).unwrap_or(0) <= 1, "{script}");
        // The attributes of that name's directory, which are believed for a second.
        assert!(again.remove(&GETATTR).unwrap_or(0) <= 1, "{script}");
        // From coreutils 9.5 on, ls asks for each file's attributes, which FUSE keeps only in
        // the guest's kernel.
        if script.starts_with("ls") {
            again.remove(&LISTXATTR);
        }
        // GNU find and ls ask once which kind of file system it is.
        let statfs = again.remove(&STATFS);
        assert!(statfs.unwrap_or(0) <= 1, "{script}: {statfs:?}");
        assert_eq!(again, BTreeMap::new(), "{script}");
    }
}

#[test]
fn making_and_removing_files_in_a_private_mount_costs_less_than_in_a_shared_one() {
    let mut totals = Vec::new();
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        let total = |script| linux.requests(script).values().sum::<usize>();
        let create = linux.requests("for i in $(seq 50); do : > $i; done");
        let made: usize = create.values().sum();
        let write = linux.requests("for i in $(seq 50); do echo $i > w$i; done");
        let written = write.values().sum::<usize>();
        let listed = total("ls -l > /dev/null");
        let remove = linux.requests("rm [0-9]*");
        eprintln!("{policy:?}: {create:?}, {write:?}, listed {listed}, {remove:?}");
        totals.push((made, written, remove.values().sum::<usize>()));
    }
    let [
        (made, written, removed),
        (less_made, less_written, less_removed),
    ] = totals[..]
    else {
        panic!("both policies")
    };
    assert!(less_made * 4 <= made * 3, "{less_made} of {made}");
    assert!(
        less_written * 3 <= written * 2,
        "{less_written} of {written}"
    );
    assert!(less_removed * 2 <= removed, "{less_removed} of {removed}");
}

#[test]
fn what_the_host_does_to_a_shared_mount_is_seen_at_once() {
    let Some(linux) = Linux::new(Policy::Shared) else {
        return;
    };
    let host = |name: &str| linux.host.join(name);
    for round in 0..5 {
        assert_eq!(linux.sh("cat new 2> /dev/null || echo absent"), "absent");
        fs::write(host("new"), format!("round {round}")).unwrap();
        assert_eq!(linux.sh("cat new"), format!("round {round}"));
        fs::write(host("new"), format!("ROUND {round}")).unwrap();
        assert_eq!(linux.sh("cat new"), format!("ROUND {round}"));
        fs::set_permissions(host("new"), fs::Permissions::from_mode(0o611)).unwrap();
        assert_eq!(linux.sh("stat -c %a new"), "611");
        fs::rename(host("new"), host("other")).unwrap();
        assert_eq!(linux.sh("ls"), "old\nother");
        fs::remove_file(host("other")).unwrap();
    }
}

#[test]
fn a_private_mount_is_coherent_with_itself() {
    let Some(linux) = Linux::new(Policy::Private) else {
        return;
    };
    linux.sh("
        test ! -e x; echo 1 > x; test \"$(cat x)\" = 1; echo 2 >> x; test \"$(tail -n 1 x)\" = 2
        ln x y; test \"$(stat -c %h x)\" = 2; rm x; test ! -e x; test \"$(stat -c %h y)\" = 1
        mkdir d; mv y d/z; test ! -e y; test \"$(cat d/z)\" = '1
2'
        ls d > /dev/null; touch d/more; test \"$(ls d | wc -l)\" = 2; rm d/more
        test \"$(ls d)\" = z; mv d e; test ! -e d; test \"$(ls e)\" = z
        chmod 640 e/z; test \"$(stat -c %a e/z)\" = 640
        echo before > old; test \"$(cat old)\" = before
    ");
    assert_eq!(
        fs::read_to_string(linux.host.join("old")).unwrap(),
        "before\n"
    );
    assert_eq!(
        fs::read_to_string(linux.host.join("e/z")).unwrap(),
        "1\n2\n"
    );
}

#[test]
fn a_file_without_a_name_gets_one_later() {
    use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, open};
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mut file =
            File::from(open(linux.seen("."), flags, Mode::from_raw_mode(0o640)).unwrap());
        file.write_all(b"hello").unwrap();
        let named = format!("/proc/self/fd/{}", file.as_raw_fd());
        linkat(CWD, named, CWD, linux.seen("new"), AtFlags::SYMLINK_FOLLOW).unwrap();
        drop(file);
        assert_eq!(fs::read_to_string(linux.seen("new")).unwrap(), "hello");
        assert_eq!(fs::read_to_string(linux.host.join("new")).unwrap(), "hello");
        let status = fs::metadata(linux.host.join("new")).unwrap();
        assert_eq!(status.mode() & 0o777, 0o640, "{policy:?}");
    }
}

/// Not a test of its own: what another user does in one.
#[test]
#[ignore = "the inner half of a test of access control lists"]
fn sets_a_list() {
    let path = std::env::var_os("BULKHEAD_LIST").unwrap();
    let list = list(5, 4);
    let flags = rustix::fs::XattrFlags::empty();
    rustix::fs::setxattr(path, "system.posix_acl_access", &list, flags).unwrap();
}

/// An access control list: of the owner, one user, the group, the mask, others.
fn list(user: u32, permissions: u16) -> Vec<u8> {
    let mut bytes = 2_u32.to_le_bytes().to_vec();
    let none = u32::MAX;
    for (tag, permissions, id) in [
        (1_u16, 6, none),
        (2, permissions, user),
        (4, 0, none),
        (16, 7, none),
        (32, 0, none),
    ] {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

#[test]
fn access_control_lists_are_kept_and_obeyed() {
    use rustix::fs::{XattrFlags, getxattr, setxattr};
    const ACCESS: &str = "system.posix_acl_access";
    const DEFAULT: &str = "system.posix_acl_default";
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        linux.sh("chmod 755 .; echo text > f; chmod 600 f; mkdir d");
        let set = |name: &str, which, list: &[u8]| {
            setxattr(linux.seen(name), which, list, XattrFlags::empty())
        };
        set("f", ACCESS, &list(1000, 4)).unwrap();
        set("d", DEFAULT, &list(1000, 7)).unwrap();
        let cat = |user: u32| {
            let cat =
                format!("setpriv --reuid {user} --clear-groups cat f 2> /dev/null || echo refused");
            linux.sh(&cat)
        };
        // The way to the mount is open to all.
        for dir in [&linux.place.0, &linux.guest.dir.0] {
            fs::set_permissions(dir, fs::Permissions::from_mode(0o755)).unwrap();
        }
        assert_eq!(
            (cat(1000), cat(1001)),
            ("text".into(), "refused".into()),
            "{policy:?}"
        );
        linux.sh("umask 077; : > d/inherits");
        let mut value = [0; 100];
        let len = getxattr(linux.seen("d/inherits"), ACCESS, &mut value[..]).unwrap();
        assert_eq!(
            value[12..20],
            [2, 0, 7, 0, 232, 3, 0, 0],
            "{:?}",
            &value[..len]
        );
        // Who is not in the group takes the bit away with the list.
        linux.sh("chown 1000:77 f; chmod 2770 f");
        linux.sh("cat f > /dev/null");
        let script = "exec setpriv --reuid 1000 --regid 5 --clear-groups --inh-caps=-all \
            \"$0\" --exact devices::fs::tests::linux::sets_a_list --ignored --nocapture";
        let done = Command::new("sh")
            .args(["-c", script])
            .arg(std::env::current_exe().unwrap())
            .env("BULKHEAD_LIST", linux.seen("f"))
            .output()
            .unwrap();
        assert!(done.status.success(), "{done:?}");
        let mode = fs::metadata(linux.host.join("f")).unwrap().mode();
        assert_eq!(mode & 0o2000, 0, "{policy:?}");
    }
}

#[test]
fn locks_exclude_the_host_and_who_waits_for_one_can_be_interrupted() {
    let Some(linux) = Linux::new(Policy::Shared) else {
        return;
    };
    fs::write(linux.host.join("lock"), "").unwrap();
    let host = File::options()
        .read(true)
        .write(true)
        .open(linux.host.join("lock"))
        .unwrap();
    rustix::fs::flock(&host, rustix::fs::FlockOperation::LockExclusive).unwrap();
    assert_eq!(linux.sh("flock -n lock true || echo refused"), "refused");
    // Two wait, and other requests are answered meanwhile.
    let waits = linux.start("exec flock lock echo got-it");
    let mut killed = linux.start("exec flock lock echo never");
    wait_for(|| linux.counts().get(&SETLKW).copied() == Some(2));
    assert_eq!(linux.sh("cat old"), "old");
    killed.kill().unwrap();
    assert!(
        !killed.wait().unwrap().success(),
        "it leaves though the lock is held"
    );
    rustix::fs::flock(&host, rustix::fs::FlockOperation::Unlock).unwrap();
    let got = waits.wait_with_output().unwrap();
    assert_eq!(String::from_utf8_lossy(&got.stdout).trim(), "got-it");
    // The other way round, and for byte ranges of processes.
    let open = |path: PathBuf| File::options().read(true).write(true).open(path).unwrap();
    let lock = |file: &File, command, start, len| {
        let mut range = libc::flock {
            l_type: i16::try_from(libc::F_WRLCK).unwrap(),
            l_whence: 0,
            l_start: start,
            l_len: len,
            l_pid: 0,
        };
        // SAFETY: the file is open and `range` outlives the call.
        unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut range) }
    };
    let (process, other) = (open(linux.seen("lock")), open(linux.seen("lock")));
    assert_eq!(lock(&process, libc::F_SETLK, 5, 10), 0);
    assert_eq!(
        lock(&host, libc::F_OFD_SETLK, 14, 1),
        -1,
        "the container has it"
    );
    assert_eq!(
        lock(&host, libc::F_OFD_SETLK, 15, 1),
        0,
        "but not this byte"
    );
    assert_eq!(
        lock(&other, libc::F_OFD_SETLK, 14, 1),
        -1,
        "nor has another owner"
    );
    assert_eq!(
        lock(&other, libc::F_OFD_SETLK, 15, 1),
        -1,
        "this is the host's"
    );
    drop(process);
    assert_eq!(
        lock(&host, libc::F_OFD_SETLK, 5, 10),
        0,
        "it is closed: no lock"
    );
}

#[test]
fn a_device_node_that_a_container_makes_is_the_containers_device() {
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        let out = linux.sh("
            umask 022; mknod null c 1 3; echo x > null; stat -c '%F %t %T %a' null
            chmod 600 null; chown 5:6 null; stat -c '%a %u %g' null
            mv null other; ln other third; stat -c '%F %h' third; mknod b b 8 300; stat -c '%F %t %T' b
            rm other third b; ls; : > fake
        ");
        let forged = rustix::fs::setxattr(
            linux.seen("fake"),
            "user.bulkhead.device",
            b"20666 0 0 1 3",
            rustix::fs::XattrFlags::empty(),
        );
        assert_eq!(forged, Err(rustix::io::Errno::OPNOTSUPP));
        let expected = "character special file 1 3 644\n600 5 6\ncharacter special file 2\n\
            block special file 8 12c\nold";
        assert_eq!(out, expected, "{policy:?}");
    }
}

#[test]
fn an_overlay_may_have_its_upper_directory_on_the_share() {
    // Where it is a module; it fails where there are none.
    let _ = Command::new("modprobe").args(["-q", "overlay"]).status();
    let known = fs::read_to_string("/proc/filesystems").unwrap();
    if !known.contains("\toverlay\n") {
        eprintln!("skipped: this kernel has no overlays");
        return;
    }
    for policy in BOTH {
        let Some(linux) = Linux::new(policy) else {
            return;
        };
        let out = linux.sh("
            mkdir -p lower/d lower/e upper work merged
            echo one > lower/d/one; echo two > lower/d/two; echo three > lower/e/three
            mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
            cd merged
            rm d/one; ls d; mv d/two d/moved; ls d; cat d/moved
            rm -r e; mkdir e; ls e; echo new > e/new; ls e
            echo more >> d/moved; cat d/moved; cat ../lower/d/two
            cd ..; umount merged
            stat -c '%F %t %T' upper/d/one upper/d/two
            mount -t overlay overlay -o lowerdir=lower,upperdir=upper,workdir=work merged
            ls merged/d merged/e; umount merged
        ");
        let expected = "two\nmoved\ntwo\nnew\ntwo\nmore\ntwo\n\
            character special file 0 0\ncharacter special file 0 0\n\
            merged/d:\nmoved\n\nmerged/e:\nnew";
        assert_eq!(out, expected, "{policy:?}");
        let mut opaque = [0; 9];
        let upper = linux.seen("upper/e");
        let len = rustix::fs::getxattr(&upper, "trusted.overlay.opaque", &mut opaque[..]);
        assert_eq!((len, opaque[0]), (Ok(1), b'y'));
    }
}

#[test]
fn a_tree_of_many_files_needs_few_descriptors_f44() {
    for policy in BOTH {
        let Some(linux) = Linux::with(policy, 200) else {
            return;
        };
        let before = descriptors(&linux.host);
        for dir in 0..10 {
            fs::create_dir(linux.host.join(dir.to_string())).unwrap();
            for file in 0..50 {
                fs::write(linux.host.join(format!("{dir}/{file}")), file.to_string()).unwrap();
            }
        }
        let script =
            "find . -type f | xargs cat | wc -c; find . | xargs stat -c %i | sort -u | wc -l";
        let first = linux.sh(script);
        let now = descriptors(&linux.host);
        assert!(now < before + 150, "{now} descriptors");
        assert_eq!(linux.sh(script), first);
        // Open, without a name, and pushed out by others.
        linux.sh(
            "exec 3< 7/7; rm 7/7; mv 8 eight; find . -type f | xargs cat > /dev/null
            test \"$(cat /proc/self/fd/3)\" = 7; test \"$(cat eight/9)\" = 9",
        );
        if policy == Policy::Shared {
            fs::rename(linux.host.join("3/3"), linux.host.join("3/moved")).unwrap();
            fs::write(linux.host.join("3/3"), "another").unwrap();
            assert_eq!(linux.sh("cat 3/3 3/moved"), "another3");
        }
    }
}

/// Descriptors of this process that lead below a directory.
fn descriptors(dir: &Path) -> usize {
    fs::read_dir("/proc/self/fd")
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
        .filter(|path| path.starts_with(dir))
        .count()
}

pub(super) fn wait_for(mut condition: impl FnMut() -> bool) {
    let until = std::time::Instant::now() + std::time::Duration::from_secs(20);
    while !condition() {
        assert!(std::time::Instant::now() < until, "it does not come");
        thread::yield_now();
    }
}

#[test]
fn a_file_that_outlives_its_mount_keeps_nobody_waiting() {
    let Some(linux) = Linux::new(Policy::Private) else {
        return;
    };
    let file = fs::File::open(linux.seen("old")).unwrap();
    let (told, ended) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(linux);
        drop(file);
        told.send(()).unwrap();
    });
    let limit = std::time::Duration::from_secs(60);
    ended.recv_timeout(limit).expect("it waits for ever");
}
