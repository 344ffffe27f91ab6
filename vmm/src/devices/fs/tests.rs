//! The device against a guest made of rings in ordinary memory, which speaks FUSE
//! by hand. What needs root is skipped for others.

mod costs;
mod hostile;
mod hung;
mod linux;

use std::{
    fs,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::{
    Fs,
    abi::{IN_HEADER, OUT_HEADER, opcode::*},
};
use crate::{
    config::{Policy, Share},
    devices::{
        Device, Io, Worker,
        testing::{Driver, NEXT, WRITE, interrupt, memory},
    },
    event_loop::event_fd,
    jail,
};

/// Request and reply buffers.
const BUFFER: u32 = 0x11_0000;
const ENTRY: usize = 128;

/// A directory of its own, gone with the test.
struct Directory(PathBuf);

impl Directory {
    fn new() -> Directory {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(0);
        let path = std::env::temp_dir().join(format!(
            "bulkhead-fs-{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
        ));
        fs::create_dir(&path).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        Directory(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

struct Guest {
    mem: Arc<GuestMemoryMmap>,
    rings: Vec<Driver>,
    irq: Arc<EventFd>,
    worker: Option<Box<dyn Worker>>,
    device: Fs,
    dir: Directory,
    /// As whom requests are sent.
    uid: u32,
    gid: u32,
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(worker) = self.worker.take() {
            worker.stop();
        }
    }
}

impl Guest {
    fn new() -> Guest {
        let mut guest = Guest::raw(false);
        guest.init();
        guest
    }

    fn read_only() -> Guest {
        let mut guest = Guest::raw(true);
        guest.init();
        guest
    }

    /// A guest that can read an existing directory.
    fn over(dir: &Path) -> Guest {
        let mut guest = Guest::with(Directory::new(), dir, true);
        guest.init();
        guest
    }

    /// A guest that has not said INIT.
    fn raw(read_only: bool) -> Guest {
        let dir = Directory::new();
        let path = dir.0.clone();
        Guest::with(dir, &path, read_only)
    }

    fn with(dir: Directory, shared: &Path, read_only: bool) -> Guest {
        Guest::of(dir, shared, read_only, Policy::Shared, 4096)
    }

    fn of(
        dir: Directory,
        shared: &Path,
        read_only: bool,
        policy: Policy,
        descriptors: u64,
    ) -> Guest {
        let share = Share {
            tag: "test".into(),
            dir: shared.into(),
            read_only,
            queues: 1,
            policy,
        };
        let confined = jail::enter(None).unwrap();
        let device = Fs::with_descriptors(&share, None, &confined, descriptors).unwrap();
        let mut guest = Guest {
            mem: memory(0x800_0000),
            rings: Vec::new(),
            irq: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            worker: None,
            device,
            dir,
            uid: 0,
            gid: 0,
        };
        guest.activate();
        guest
    }

    fn activate(&mut self) {
        self.try_activate().unwrap();
    }

    fn try_activate(&mut self) -> std::io::Result<()> {
        self.rings = vec![
            Driver::new(&self.mem, 0x1000, BUFFER),
            Driver::new(&self.mem, 0x400_0000, BUFFER),
        ];
        self.mem
            .write_slice(&[0; 0x4000], GuestAddress(0x1000))
            .unwrap();
        self.mem
            .write_slice(&[0; 0x4000], GuestAddress(0x400_0000))
            .unwrap();
        let io = Io {
            queues: self
                .rings
                .iter()
                .map(|ring| Some(ring.ring(interrupt(&self.irq))))
                .collect(),
            features: 0,
        };
        self.worker = Some(self.device.activate(io)?);
        Ok(())
    }

    fn init(&mut self) {
        let mut body = Vec::new();
        // Version 7.41, all flags.
        for word in [7_u32, 41, 0, 0x7fff_ffff, 0xffff_ffff] {
            body.extend(word.to_le_bytes());
        }
        body.extend([0; 44]);
        assert_eq!(self.call(INIT, 0, &body).unwrap().len(), 64);
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.0.join(name)
    }

    /// Sends bytes as they are.
    fn offer(&mut self, queue: usize, request: &[u8], room: u32) {
        self.offer_in_slot(0, queue, request, room);
    }

    /// Sends bytes in the buffers from that of this descriptor on.
    fn offer_in_slot(&mut self, slot: u16, queue: usize, request: &[u8], room: u32) {
        let ring = &mut self.rings[queue];
        self.mem.write_slice(request, ring.buffer(slot)).unwrap();
        let len = u32::try_from(request.len()).unwrap();
        if room > 0 {
            ring.describe(slot, len, NEXT);
            ring.describe(slot + 1, room, WRITE);
        } else {
            ring.describe(slot, len, 0);
        }
        ring.make_available(slot);
        ring.notify();
    }

    /// Sends bytes as they are; what the device wrote.
    fn exchange(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        self.offer(queue, request, room);
        self.answer(queue, 0)
    }

    /// What the device wrote.
    fn answer(&mut self, queue: usize, slot: u16) -> Vec<u8> {
        let ring = &mut self.rings[queue];
        let used = loop {
            if let Some((_, used)) = ring.used() {
                break used;
            }
            let deadline = Timespec {
                tv_sec: 20,
                tv_nsec: 0,
            };
            let mut ready = [PollFd::from_borrowed_fd(event_fd(&self.irq), PollFlags::IN)];
            assert_eq!(poll(&mut ready, Some(&deadline)).unwrap(), 1, "no answer");
            let _ = self.irq.read();
        };
        let mut reply = vec![0; used as usize];
        self.mem
            .read_slice(&mut reply, ring.buffer(slot + 1))
            .unwrap();
        reply
    }

    fn request(&self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        let mut request = Vec::new();
        let len = u32::try_from(IN_HEADER + body.len()).unwrap();
        request.extend(len.to_le_bytes());
        request.extend(opcode.to_le_bytes());
        request.extend(77_u64.to_le_bytes());
        request.extend(node.to_le_bytes());
        request.extend(self.uid.to_le_bytes());
        request.extend(self.gid.to_le_bytes());
        request.extend([0; 8]);
        request.extend(body);
        request
    }

    /// Calls the share; the body of the reply, or the errno.
    fn call(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let request = self.request(opcode, node, body);
        outcome(&self.exchange(1, &request, BUFFER))
    }

    fn lookup(&mut self, parent: u64, name: &str) -> Result<u64, i32> {
        self.call(LOOKUP, parent, &named(&[], name)).map(|reply| {
            assert_eq!(reply.len(), ENTRY);
            word(&reply, 0)
        })
    }

    /// While another request is under way.
    fn lookup_in_slot(&mut self, slot: u16, parent: u64, name: &str) -> Result<u64, i32> {
        let request = self.request(LOOKUP, parent, &named(&[], name));
        self.offer_in_slot(slot, 1, &request, BUFFER);
        outcome(&self.answer(1, slot)).map(|reply| word(&reply, 0))
    }

    fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        let mut body = flags.to_le_bytes().to_vec();
        body.extend([0; 4]);
        self.call(OPEN, node, &body).map(|reply| word(&reply, 0))
    }

    fn read(&mut self, node: u64, handle: u64, offset: u64, size: u32) -> Result<Vec<u8>, i32> {
        self.call(READ, node, &io(handle, offset, size))
    }

    fn write(&mut self, node: u64, handle: u64, offset: u64, data: &[u8]) -> Result<u64, i32> {
        let mut body = io(handle, offset, u32::try_from(data.len()).unwrap());
        body.extend(data);
        self.call(WRITE_, node, &body)
            .map(|reply| word(&reply, 0) & 0xffff_ffff)
    }

    fn create(&mut self, name: &str, flags: i32, mode: u32) -> Result<(u64, u64), i32> {
        let mut body = Vec::new();
        for value in [flags.cast_unsigned(), mode, 0o022, 0] {
            body.extend(value.to_le_bytes());
        }
        self.call(CREATE, 1, &named(&body, name))
            .map(|reply| (word(&reply, 0), word(&reply, ENTRY)))
    }

    fn mknod(&mut self, name: &str, mode: u32) -> Result<u64, i32> {
        let mut body = Vec::new();
        for value in [mode, 0x103, 0o022, 0] {
            body.extend(value.to_le_bytes());
        }
        self.call(MKNOD, 1, &named(&body, name))
            .map(|reply| word(&reply, 0))
    }
}

// `WRITE` is also the name of a descriptor's flag.
use super::abi::opcode::WRITE as WRITE_;

fn outcome(reply: &[u8]) -> Result<Vec<u8>, i32> {
    assert!(reply.len() >= OUT_HEADER, "a reply has a header");
    assert_eq!(word(reply, 0) & 0xffff_ffff, reply.len() as u64);
    assert_eq!(word(reply, 8), 77);
    match i32::from_le_bytes(reply[4..8].try_into().unwrap()) {
        0 => Ok(reply[OUT_HEADER..].to_vec()),
        errno => Err(-errno),
    }
}

fn word(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn named(body: &[u8], name: &str) -> Vec<u8> {
    [body, name.as_bytes(), &[0]].concat()
}

fn io(handle: u64, offset: u64, size: u32) -> Vec<u8> {
    let mut body = Vec::new();
    body.extend(handle.to_le_bytes());
    body.extend(offset.to_le_bytes());
    body.extend(size.to_le_bytes());
    body.extend([0; 20]);
    body
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

#[test]
fn a_file_is_created_written_read_and_belongs_to_its_maker() {
    let mut guest = Guest::new();
    if is_root() {
        (guest.uid, guest.gid) = (1234, 5678);
    }
    let (node, handle) = guest.create("file", libc::O_RDWR, 0o666).unwrap();
    let text = vec![7_u8; 1 << 20];
    assert_eq!(guest.write(node, handle, 3, &text), Ok(1 << 20));
    let back = guest.read(node, handle, 0, 1 << 20).unwrap();
    assert_eq!(back.len(), 1 << 20);
    assert!(back[..3] == [0; 3] && back[3..] == text[..text.len() - 3]);
    let status = fs::metadata(guest.path("file")).unwrap();
    assert_eq!(
        (status.len(), status.mode() & 0o7777),
        ((1 << 20) + 3, 0o644)
    );
    if is_root() {
        assert_eq!((status.uid(), status.gid()), (1234, 5678));
    }
    // Content changed by the host, at the same size, is there at once.
    fs::write(guest.path("file"), vec![8; (1 << 20) + 3]).unwrap();
    assert_eq!(guest.read(node, handle, 5, 2), Ok(vec![8, 8]));
    guest
        .call(
            RELEASE,
            node,
            &[&handle.to_le_bytes()[..], &[0; 16]].concat(),
        )
        .unwrap();
    assert_eq!(guest.read(node, handle, 0, 1), Err(libc::EBADF));
}

#[test]
fn directories_links_and_renames_work_as_on_the_host() {
    let mut guest = Guest::new();
    let mut mode = 0o755_u32.to_le_bytes().to_vec();
    mode.extend([0; 4]);
    let dir = word(&guest.call(MKDIR, 1, &named(&mode, "dir")).unwrap(), 0);
    let (file, _) = guest.create("a", libc::O_WRONLY, 0o600).unwrap();
    let link = named(&file.to_le_bytes(), "b");
    assert_eq!(word(&guest.call(LINK, dir, &link).unwrap(), 0), file);
    guest.call(SYMLINK, 1, b"sym\0../../etc/passwd\0").unwrap();
    let sym = guest.lookup(1, "sym").unwrap();
    assert_eq!(guest.call(READLINK, sym, &[]).unwrap(), b"../../etc/passwd");
    assert_eq!(guest.open(sym, libc::O_RDONLY), Err(libc::ENXIO));
    let link = named(&sym.to_le_bytes(), "sym2");
    assert_eq!(word(&guest.call(LINK, 1, &link).unwrap(), 0), sym);
    let rename = [&dir.to_le_bytes()[..], b"a\0c\0"].concat();
    guest.call(RENAME, 1, &rename).unwrap();
    assert!(guest.path("dir/c").exists() && !guest.path("a").exists());
    assert_eq!(guest.lookup(1, "a"), Err(libc::ENOENT));
    assert_eq!(guest.call(RMDIR, 1, b"dir\0"), Err(libc::ENOTEMPTY));
    guest.call(UNLINK, dir, b"b\0").unwrap();
    guest.call(UNLINK, dir, b"c\0").unwrap();
    guest.call(RMDIR, 1, b"dir\0").unwrap();
    assert_eq!(guest.call(STATFS, 1, &[]).unwrap().len(), 80);
}

#[test]
fn a_directory_is_listed_whole_in_pieces_of_any_size_b36() {
    let mut guest = Guest::new();
    let mut expected: Vec<String> = (0..300)
        .map(|index| format!("{index}-{}", "n".repeat(index % 200)))
        .collect();
    for name in &expected {
        fs::write(guest.path(name), "").unwrap();
    }
    let handle = word(&guest.call(OPENDIR, 1, &[0; 8]).unwrap(), 0);
    for size in [300, 4096, 1 << 20] {
        let (mut offset, mut names) = (0, Vec::new());
        loop {
            let part = guest.call(READDIR, 1, &io(handle, offset, size)).unwrap();
            if part.is_empty() {
                break;
            }
            let mut at = 0;
            while at < part.len() {
                offset = word(&part, at + 8);
                let len = usize::try_from(word(&part, at + 16) & 0xffff_ffff).unwrap();
                let name = &part[at + 24..at + 24 + len];
                names.push(String::from_utf8(name.to_vec()).unwrap());
                at += (24 + len).next_multiple_of(8);
            }
        }
        names.retain(|name| name != "." && name != "..");
        names.sort();
        expected.sort();
        assert_eq!(names, expected);
    }
}

#[test]
fn extended_attributes_of_containers_pass_and_others_do_not_exist_b37_fs_34() {
    let mut guest = Guest::new();
    let (node, _) = guest.create("file", libc::O_RDWR, 0o644).unwrap();
    let set = |name: &str, value: &[u8]| {
        let mut body = u32::try_from(value.len()).unwrap().to_le_bytes().to_vec();
        body.extend([0; 12]);
        [named(&body, name), value.to_vec()].concat()
    };
    let get = |name: &str, size: u32| named(&[size.to_le_bytes(), [0; 4]].concat(), name);
    guest
        .call(SETXATTR, node, &set("user.a", b"value"))
        .unwrap();
    assert_eq!(
        guest.call(GETXATTR, node, &get("user.a", 100)).unwrap(),
        b"value"
    );
    let size = guest.call(GETXATTR, node, &get("user.a", 0)).unwrap();
    assert_eq!(word(&size, 0), 5);
    assert_eq!(
        guest.call(GETXATTR, node, &get("user.a", 4)),
        Err(libc::ERANGE)
    );
    assert_eq!(
        guest.call(GETXATTR, node, &get("user.b", 9)),
        Err(libc::ENODATA)
    );
    let list = [100_u32.to_le_bytes(), [0; 4]].concat();
    assert_eq!(guest.call(LISTXATTR, node, &list).unwrap(), b"user.a\0");
    // What the guest's kernel trusts is a user's on the host.
    guest
        .call(SETXATTR, node, &set("trusted.x", b"guest"))
        .unwrap();
    assert_eq!(
        guest.call(GETXATTR, node, &get("trusted.x", 100)).unwrap(),
        b"guest"
    );
    let mut value = [0; 9];
    let path = guest.path("file");
    let len = rustix::fs::getxattr(&path, "user.bulkhead.trusted.x", &mut value[..]).unwrap();
    assert_eq!(&value[..len], b"guest");
    let both = guest.call(LISTXATTR, node, &list).unwrap();
    assert!(
        both == b"user.a\0trusted.x\0" || both == b"trusted.x\0user.a\0",
        "{both:?}"
    );
    guest
        .call(REMOVEXATTR, node, &named(&[], "trusted.x"))
        .unwrap();
    for name in [
        "user.bulkhead.trusted.x",
        "user.bulkhead.device",
        "security.selinux",
        "security.ima",
        "system.x",
        "x",
        "",
    ] {
        for body in [(SETXATTR, set(name, b"v")), (GETXATTR, get(name, 100))] {
            assert_eq!(guest.call(body.0, node, &body.1), Err(libc::EOPNOTSUPP));
        }
        let remove = guest.call(REMOVEXATTR, node, &named(&[], name));
        assert_eq!(remove, Err(libc::EOPNOTSUPP));
    }
    guest.call(REMOVEXATTR, node, b"user.a\0").unwrap();
    assert_eq!(guest.call(LISTXATTR, node, &list).unwrap(), b"");
}

/// A store through a mapping of the host shows in no time before it is written
/// back.
#[test]
fn pages_of_a_shared_file_are_never_kept_from_one_open_to_the_next() {
    let mut guest = Guest::over(Path::new(env!("CARGO_MANIFEST_DIR")));
    let node = guest.lookup(1, "Cargo.toml").unwrap();
    for _ in 0..2 {
        let reply = guest.call(OPEN, node, &[0; 8]).unwrap();
        let flags = u32::try_from(word(&reply, 8) & 0xffff_ffff).unwrap();
        assert_eq!(flags & super::abi::FOPEN_KEEP_CACHE, 0);
    }
}

#[test]
fn the_guest_believes_no_name_and_attributes_for_a_moment() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "text").unwrap();
    fs::create_dir(guest.path("dir")).unwrap();
    // The share's own mount is where containers come and go: no name is kept.
    for (name, seconds, nanoseconds) in [("file", 0, 10_000_000), ("dir", 1, 0)] {
        let reply = guest.call(LOOKUP, 1, &named(&[], name)).unwrap();
        assert_eq!(word(&reply, 16), 0, "{name}");
        assert_eq!(word(&reply, 24), seconds, "{name}");
        assert_eq!(word(&reply, 32), nanoseconds << 32, "{name}");
        let attr = guest.call(GETATTR, word(&reply, 0), &[0; 16]).unwrap();
        assert_eq!((word(&attr, 0), word(&attr, 8)), (seconds, nanoseconds));
    }
}

#[test]
fn a_reset_lets_go_of_everything_and_the_device_works_again() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "text").unwrap();
    for _ in 0..50 {
        let node = guest.lookup(1, "file").unwrap();
        guest.open(node, libc::O_RDONLY).unwrap();
        guest.worker.take().unwrap().stop();
        let held = fs::read_dir("/proc/self/fd")
            .unwrap()
            .filter_map(|entry| fs::read_link(entry.ok()?.path()).ok())
            .filter(|path| *path == guest.path("file"))
            .count();
        assert_eq!(held, 0);
        guest.activate();
        assert_eq!(guest.lookup(1, "file"), Err(libc::EIO));
        guest.init();
    }
}

#[test]
fn a_tag_or_a_number_of_queues_out_of_range_is_refused() {
    let confined = jail::enter(None).unwrap();
    for (tag, queues) in [("", 1), (&"t".repeat(37)[..], 1), ("t", 0), ("t", 9)] {
        let share = Share {
            tag: tag.into(),
            dir: "/".into(),
            read_only: true,
            queues,
            policy: Policy::Shared,
        };
        assert!(Fs::new(&share, None, &confined).is_err());
    }
}

#[test]
fn a_sync_reaches_every_mount_that_the_guest_knows() {
    let mut guest = Guest::new();
    fs::write(guest.path("file"), "text").unwrap();
    guest.lookup(1, "file").unwrap();
    assert_eq!(guest.call(SYNCFS, 1, &[0; 8]), Ok(Vec::new()));
}

#[test]
fn the_time_of_birth_and_copies_within_the_host_are_there_for_who_asks() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("file", libc::O_RDWR, 0o644).unwrap();
    guest.write(node, handle, 0, b"0123456789").unwrap();
    let status = guest.call(STATX, node, &[0; 24]).unwrap();
    let birth = fs::metadata(guest.path("file")).unwrap().created().unwrap();
    let birth = birth.duration_since(std::time::UNIX_EPOCH).unwrap();
    // Behind validity, flags and spare: mask … times of access, then of birth.
    assert_eq!(word(&status, 32 + 64 + 16), birth.as_secs());
    let (to, to_handle) = guest.create("copy", libc::O_RDWR, 0o644).unwrap();
    let mut body = Vec::new();
    for value in [handle, 2, to, to_handle, 1, 5, 0] {
        body.extend(value.to_le_bytes());
    }
    let copied = guest.call(COPY_FILE_RANGE, node, &body).unwrap();
    assert_eq!(word(&copied, 0), 5);
    assert_eq!(fs::read(guest.path("copy")).unwrap(), b"\x0023456");
}

#[test]
fn appending_writes_land_one_behind_the_other_whatever_their_offsets_say() {
    let mut guest = Guest::new();
    let (node, handle) = guest.create("log", libc::O_WRONLY, 0o644).unwrap();
    for text in ["one", "two"] {
        let mut body = io(handle, 0, 3);
        body[32..36].copy_from_slice(&libc::O_APPEND.to_le_bytes());
        body.extend(text.as_bytes());
        guest.call(WRITE_, node, &body).unwrap();
    }
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"onetwo");
    guest.write(node, handle, 0, b"O").unwrap();
    assert_eq!(fs::read(guest.path("log")).unwrap(), b"Onetwo");
}
