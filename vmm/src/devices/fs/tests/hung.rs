//! A volume of which the server is dead: who uses it waits, nobody else does.

use std::{
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    process::{Command, Stdio},
    thread,
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::UnshareFlags,
};

use super::{
    linux::{Linux, abort_of},
    *,
};

/// A mount whose directory is there, and of which each name is waited for.
struct Dead {
    at: PathBuf,
    /// The file whose writing ends it.
    abort: PathBuf,
}

impl Dead {
    /// The caller's thread has a mount namespace of its own.
    fn mount(at: PathBuf) -> Dead {
        fs::create_dir(&at).unwrap();
        let fuse = File::options()
            .read(true)
            .write(true)
            .open("/dev/fuse")
            .unwrap();
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,allow_other",
            fuse.as_raw_fd()
        );
        let options = std::ffi::CString::new(options).unwrap();
        let none = MountFlags::empty();
        mount("dead", &at, "fuse", none, options.as_c_str()).unwrap();
        let abort = abort_of(&at);
        let mut server = fuse;
        thread::spawn(move || {
            let mut request = vec![0; 0x2_1000];
            // Until the mount is aborted.
            while server.read(&mut request).is_ok() {
                let mut reply = super::super::abi::Body::default();
                let mut errno = 0_i32;
                match u32::from_le_bytes(request[4..8].try_into().unwrap()) {
                    INIT => reply.u32(7).u32(31).zeroes(56),
                    // A directory, and good for long.
                    GETATTR => reply
                        .u64(1000)
                        .zeroes(8)
                        .u64(1)
                        .zeroes(52)
                        .u32(0o040_755)
                        .u32(2)
                        .zeroes(20),
                    STATFS => reply.zeroes(80),
                    // Linux asks for that first, and then never again.
                    STATX => {
                        errno = -libc::ENOSYS;
                        &mut reply
                    }
                    _ => continue,
                };
                let mut header = super::super::abi::Body::default();
                let unique = u64::from_le_bytes(request[8..16].try_into().unwrap());
                let len = u32::try_from(16 + reply.0.len()).unwrap();
                header.u32(len).u32(errno.cast_unsigned()).u64(unique);
                header.0.extend(reply.0);
                let _ = server.write(&header.0);
            }
        });
        Dead { at, abort }
    }

    /// Nobody waits any more: all fails.
    fn abort(&self) {
        fs::write(&self.abort, "1").unwrap();
    }
}

/// Aborts first of all, so that a test that fails ends.
impl Drop for Dead {
    fn drop(&mut self) {
        self.abort();
        let _ = unmount(&self.at, UnmountFlags::DETACH);
    }
}

#[test]
fn a_volume_whose_server_is_dead_stops_those_who_use_it_and_nobody_else() {
    let Some(linux) = Linux::new(Policy::Shared) else {
        return;
    };
    let dead = Dead::mount(linux.guest.dir.0.join("dead"));
    let place = linux.place.0.join("dead");
    // More of them than there are threads.
    let stuck: Vec<_> = (0..12)
        .map(|number| {
            Command::new("cat")
                .arg(place.join(number.to_string()))
                .stderr(Stdio::null())
                .spawn()
                .unwrap()
        })
        .collect();
    linux::wait_for(|| linux.counts().get(&LOOKUP).copied() >= Some(20));
    assert_eq!(
        linux.sh("cat old; echo more > new; cat new; ls"),
        "oldmore\nnew\nold"
    );
    dead.abort();
    for mut stuck in stuck {
        assert!(!stuck.wait().unwrap().success());
    }
    assert_eq!(linux.sh("cat new"), "more");
}

#[test]
fn a_reset_does_not_wait_for_a_host_that_never_answers() {
    if !is_root() || !Path::new("/dev/fuse").exists() {
        eprintln!("skipped: needs root and /dev/fuse");
        return;
    }
    // SAFETY: only this thread's mounts and file system context change.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).unwrap();
    let dir = Directory::new();
    let path = dir.0.clone();
    let mut guest = Guest::with(dir, &path, false);
    guest.init();
    // Declared last, so that it ends first.
    let dead = Dead::mount(path.join("dead"));
    let node = guest.lookup(1, "dead").unwrap();
    let request = guest.request(LOOKUP, node, b"name\0");
    guest.offer(1, &request, BUFFER);
    // Taken, and waiting: others are answered.
    assert_eq!(guest.lookup_in_slot(4, 1, "absent"), Err(libc::ENOENT));
    let before = std::time::Instant::now();
    guest.worker.take().unwrap().stop();
    assert!(before.elapsed() < std::time::Duration::from_secs(10));
    assert!(guest.try_activate().is_err(), "a thread is still at work");
    dead.abort();
    linux::wait_for(|| guest.try_activate().is_ok());
    guest.init();
    assert_eq!(guest.lookup(1, "absent"), Err(libc::ENOENT));
}
