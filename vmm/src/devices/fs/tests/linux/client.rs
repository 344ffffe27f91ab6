//! The client: a mount, and two threads that carry its requests and their replies.

use std::{
    collections::BTreeMap,
    ffi::CString,
    fs::File,
    io::{Read, Write},
    os::fd::AsRawFd,
    process::{Child, Command, Stdio},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
};

use rustix::{
    mount::{MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_change, unmount},
    thread::UnshareFlags,
};

use super::super::*;

/// Requests that are under way at the same time.
const SLOTS: u16 = 16;

/// A share with one mount in it, `in` (an overlay over a directory with a file
/// `old`), seen through Linux.
pub(in super::super) struct Linux {
    pub(in super::super) guest: Guest,
    /// Where the client has mounted the share.
    pub(in super::super) place: Directory,
    /// The mount as the host sees it.
    pub(super) host: PathBuf,
    counts: Arc<Mutex<BTreeMap<u32, usize>>>,
    /// The file whose writing ends the mount.
    abort: PathBuf,
    stop: Arc<AtomicBool>,
    pumps: Vec<JoinHandle<()>>,
    _layers: Directory,
}

impl Linux {
    /// `None`, and a word about it, where that is not possible.
    pub(in super::super) fn new(policy: Policy) -> Option<Linux> {
        Linux::with(policy, 4096)
    }

    /// With so many descriptors.
    pub(super) fn with(policy: Policy, limit: u64) -> Option<Linux> {
        let fuse = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open("/dev/fuse");
        let (true, Ok(fuse)) = (is_root(), fuse) else {
            eprintln!("skipped: needs root and /dev/fuse");
            return None;
        };
        // The namespace is that of this test's threads: no mount stays behind.
        // SAFETY: only this thread's mounts and file system context change.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
        let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
        mount_change("/", private).unwrap();
        let (dir, place, layers) = (Directory::new(), Directory::new(), Directory::new());
        let host = dir.0.join("in");
        for dir in ["lower", "upper", "work"] {
            fs::create_dir(layers.0.join(dir)).unwrap();
        }
        fs::write(layers.0.join("lower/old"), "old").unwrap();
        fs::create_dir(&host).unwrap();
        let at = layers.0.display();
        let options =
            format!("lowerdir={at}/lower,upperdir={at}/upper,workdir={at}/work,index=off");
        let options = CString::new(options).unwrap();
        let none = MountFlags::empty();
        mount("overlay", &host, "overlay", none, options.as_c_str()).unwrap();
        let shared = dir.0.clone();
        let guest = Guest::of(dir, &shared, false, policy, limit);
        let mut linux = Linux {
            guest,
            host,
            counts: Arc::default(),
            abort: PathBuf::new(),
            stop: Arc::default(),
            pumps: Vec::new(),
            _layers: layers,
            place,
        };
        linux.connect(fuse);
        Some(linux)
    }

    pub(super) fn connect(&mut self, fuse: File) {
        let options = format!(
            "fd={},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other",
            fuse.as_raw_fd()
        );
        let options = CString::new(options).unwrap();
        let none = MountFlags::empty();
        mount("share", &self.place.0, "fuse", none, options.as_c_str()).unwrap();
        self.abort = abort_of(&self.place.0);
        let driver = Arc::new(Mutex::new(self.guest.rings.remove(1)));
        let (free, slots) = mpsc::channel();
        for slot in 0..SLOTS {
            free.send(slot).unwrap();
        }
        let (counts, there, from) = (
            Arc::clone(&self.counts),
            Arc::clone(&driver),
            fuse.try_clone().unwrap(),
        );
        self.pumps
            .push(thread::spawn(move || send(from, &there, &slots, &counts)));
        let (stop, irq) = (Arc::clone(&self.stop), Arc::clone(&self.guest.irq));
        self.pumps.push(thread::spawn(move || {
            receive(fuse, &driver, &irq, &free, &stop);
        }));
    }

    pub(super) fn start(&self, script: &str) -> Child {
        Command::new("sh")
            .args(["-e", "-c", script])
            .current_dir(self.place.0.join("in"))
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap()
    }

    /// Runs a script in the mount; what it said.
    pub(in super::super) fn sh(&self, script: &str) -> String {
        let done = self.start(script).wait_with_output().unwrap();
        let error = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "{script}: {} {error}", done.status);
        String::from_utf8_lossy(&done.stdout).trim().to_owned()
    }

    /// A file of the mount as the client sees it.
    pub(super) fn seen(&self, name: &str) -> PathBuf {
        self.place.0.join("in").join(name)
    }

    pub(in super::super) fn counts(&self) -> MutexGuard<'_, BTreeMap<u32, usize>> {
        self.counts.lock().unwrap()
    }

    /// Requests that a script makes, but for the forgetting.
    pub(super) fn requests(&self, script: &str) -> BTreeMap<u32, usize> {
        self.sh("true");
        self.counts().clear();
        self.sh(script);
        let mut counts = self.counts().clone();
        counts.retain(|&opcode, _| opcode != FORGET && opcode != BATCH_FORGET);
        counts
    }
}

/// The file by which whoever waits for this FUSE mount is told that it has ended.
pub(in super::super) fn abort_of(place: &Path) -> PathBuf {
    let control = Path::new("/sys/fs/fuse/connections");
    // It is there already if this is the second mount of a test.
    let mounted = mount("fusectl", control, "fusectl", MountFlags::empty(), c"");
    assert!(
        matches!(mounted, Ok(()) | Err(rustix::io::Errno::BUSY)),
        "{mounted:?}"
    );
    // To ask for its attributes would be a request.
    let mounts = fs::read_to_string("/proc/thread-self/mountinfo").unwrap();
    let mut mounts = mounts.lines().map(|line| line.split(' '));
    let device = mounts.find_map(|mut words| {
        let device = words.nth(2)?;
        (Path::new(words.nth(1)?) == place).then_some(device)
    });
    let (_, minor) = device.unwrap().split_once(':').unwrap();
    control.join(minor).join("abort")
}

/// A process that another test has forked just now may have copies of all descriptors, of
/// files in the mount as well as of its server's, and is not to wait for that when it
/// closes the ones before the other.
impl Drop for Linux {
    fn drop(&mut self) {
        let _ = fs::write(&self.abort, "1");
        let _ = unmount(&self.place.0, UnmountFlags::DETACH);
        self.stop.store(true, Ordering::Release);
        let _ = self.guest.irq.write(1);
        for pump in self.pumps.drain(..) {
            if let Err(panic) = pump.join()
                && !thread::panicking()
            {
                std::panic::resume_unwind(panic);
            }
        }
        if let Some(worker) = self.guest.worker.take() {
            worker.stop();
        }
        let _ = unmount(&self.host, UnmountFlags::DETACH);
    }
}

/// From the client to the device, until the client is gone.
fn send(
    mut fuse: File,
    driver: &Mutex<Driver>,
    slots: &mpsc::Receiver<u16>,
    counts: &Mutex<BTreeMap<u32, usize>>,
) {
    let mut request = vec![0; BUFFER as usize];
    loop {
        let len = match fuse.read(&mut request) {
            Ok(len) => len,
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => continue,
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::ENODEV));
                return;
            }
        };
        let opcode = u32::from_le_bytes(request[4..8].try_into().unwrap());
        *counts.lock().unwrap().entry(opcode).or_default() += 1;
        let slot = slots.recv().unwrap();
        let mut driver = driver.lock().unwrap();
        driver.write(driver.buffer(2 * slot).0, &request[..len]);
        driver.describe(2 * slot, u32::try_from(len).unwrap(), NEXT);
        driver.describe(2 * slot + 1, BUFFER, WRITE);
        driver.make_available(2 * slot);
        driver.notify();
    }
}

/// From the device to the client.
fn receive(
    mut fuse: File,
    driver: &Mutex<Driver>,
    irq: &EventFd,
    free: &mpsc::Sender<u16>,
    stop: &AtomicBool,
) {
    while !stop.load(Ordering::Acquire) {
        let mut ready = [PollFd::from_borrowed_fd(event_fd(irq), PollFlags::IN)];
        poll(&mut ready, None).unwrap();
        let _ = irq.read();
        let mut driver = driver.lock().unwrap();
        for (head, used) in driver.all_used() {
            if used > 0 {
                let reply = driver.read(driver.buffer(head + 1).0, used as usize);
                // Fails if the client no longer waits for it.
                let _ = fuse.write(&reply);
            }
            // The sender is gone with the client.
            let _ = free.send(head / 2);
        }
    }
}
