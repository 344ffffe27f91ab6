//! Does the host look as before?
//!
//! The harness asks around every test; a test of many rounds may ask in each.

use std::{
    collections::BTreeMap,
    fs,
    os::unix::process::ExitStatusExt,
    path::Path,
    process, thread,
    time::{Duration, Instant},
};

/// What may remain for a moment: processes that were killed and not yet reaped.
const GRACE: Duration = Duration::from_secs(5);

/// The exit code of [`around`] if something was left behind.
pub const LEFT_BEHIND: u8 = 121;

/// A picture of the host: mounts, processes, sockets, network devices and
/// namespaces, cgroups, keys, files where ours lie and who has them open; how many of
/// each there are.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Picture(BTreeMap<String, usize>);

/// Runs a program and looks at the host before and after it: the program's exit code,
/// or [`LEFT_BEHIND`], with a list on standard error.
#[must_use]
pub fn around(argv: &[String]) -> u8 {
    let leaks = LeakCheck::start();
    let [program, arguments @ ..] = argv else {
        eprintln!("No program");
        return 127;
    };
    let code = match process::Command::new(program).args(arguments).status() {
        Ok(status) => status
            .code()
            .or_else(|| Some(128 + status.signal()?))
            .and_then(|code| u8::try_from(code).ok())
            .unwrap_or(255),
        Err(error) => {
            eprintln!("Cannot start {program}: {error}");
            127
        }
    };
    let left = leaks.left_over();
    if left.is_empty() {
        return code;
    }
    eprintln!("Left behind:\n  {}", left.join("\n  "));
    if code == 0 { LEFT_BEHIND } else { code }
}

/// A picture taken before a test, to be compared with one taken after it.
#[derive(Debug)]
#[must_use = "call finish"]
pub struct LeakCheck {
    before: Picture,
}

impl LeakCheck {
    /// Takes the first picture.
    pub fn start() -> LeakCheck {
        LeakCheck {
            before: Picture::take(),
        }
    }

    /// Compares: nothing may be there that was not there before.
    ///
    /// # Panics
    /// If something is, and does not go away within five seconds.
    #[track_caller]
    pub fn finish(self) {
        let left = self.left_over();
        assert!(left.is_empty(), "Left behind:\n  {}", left.join("\n  "));
    }

    /// What is there now and was not before.
    #[must_use]
    pub fn left_over(&self) -> Vec<String> {
        let end = Instant::now() + GRACE;
        loop {
            let now = Picture::take();
            let left = now.beyond(&self.before);
            if left.is_empty() || Instant::now() > end {
                return left;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Picture {
    fn take() -> Picture {
        let mut all = Picture::default();
        all.mounts();
        all.sockets();
        for name in names("/sys/class/net") {
            all.add(format!("network device {name}"));
        }
        for name in names("/sys/block") {
            let backing = format!("/sys/block/{name}/loop/backing_file");
            if let Ok(file) = fs::read_to_string(backing) {
                all.add(format!("loop device of {}", file.trim()));
            }
        }
        for line in lines("/proc/keys") {
            // Serial number, flags, uses, expiry, permissions, owner, group, what it is.
            let what: Vec<&str> = line.split_whitespace().skip(7).collect();
            all.add(format!("key {}", what.join(" ")));
        }
        for kind in ["shm", "sem", "msg"] {
            for line in lines(&format!("/proc/sysvipc/{kind}")).iter().skip(1) {
                all.add(format!("System V {kind} {}", line.trim()));
            }
        }
        for pid in names("/proc")
            .into_iter()
            .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        {
            all.process(&pid);
        }
        for (dir, depth, directories_only) in PLACES {
            all.walk(Path::new(dir), *depth, *directories_only);
        }
        all
    }

    fn add(&mut self, what: String) {
        *self.0.entry(what).or_default() += 1;
    }

    /// What is here more often than in `before`.
    fn beyond(&self, before: &Picture) -> Vec<String> {
        self.0
            .iter()
            .filter_map(|(what, count)| {
                let known = before.0.get(what).copied().unwrap_or(0);
                match count.checked_sub(known) {
                    None | Some(0) => None,
                    Some(1) => Some(what.clone()),
                    Some(more) => Some(format!("{what} ({more} times)")),
                }
            })
            .collect()
    }

    /// Several mounts may lie on one place.
    fn mounts(&mut self) {
        for line in lines("/proc/self/mountinfo") {
            let place = line.split(' ').nth(4).unwrap_or_default();
            self.add(format!("mount {place}"));
        }
    }

    fn sockets(&mut self) {
        for line in lines("/proc/net/unix") {
            if let Some(path) = line.split_whitespace().nth(7)
                && !path.starts_with("/run/systemd")
                && !path.starts_with("/run/user")
            {
                self.add(format!("socket {path}"));
            }
        }
    }

    fn process(&mut self, pid: &str) {
        let read = |name: &str| fs::read_to_string(format!("/proc/{pid}/{name}"));
        let name = read("comm").unwrap_or_default();
        let name = name.trim();
        let stat = read("stat").unwrap_or_default();
        // Behind the name: state, parent, group, session, terminal, its group, flags.
        let flags = stat.rsplit(") ").next().unwrap_or_default();
        let flags = flags.split(' ').nth(6).and_then(|flags| flags.parse().ok());
        // Threads of the kernel come and go.
        let kernels = flags.unwrap_or(0_u32) & PF_KTHREAD != 0;
        let known = ["systemd-udevd", "(udev-worker)", "udev-worker"].contains(&name);
        if known || kernels || stat.is_empty() {
            return;
        }
        // A daemon that a test starts anew is the same one.
        match name {
            "containerd" => self.add("process containerd".to_owned()),
            _ => self.add(format!("process {pid} {name}")),
        }
        let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else {
            return;
        };
        for file in files.flatten() {
            if let Ok(target) = fs::read_link(file.path())
                && let Some(target) = target.to_str()
                && OPEN.iter().any(|begin| target.starts_with(begin))
            {
                self.add(format!("open file {target} in {name}"));
            }
        }
    }

    /// Adds what is below `dir`, so many levels deep.
    fn walk(&mut self, dir: &Path, depth: usize, directories_only: bool) {
        let Ok(entries) = fs::read_dir(dir) else {
            return;
        };
        for entry in entries.flatten() {
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let path = entry.path();
            let text = path.to_string_lossy();
            if (is_dir || !directories_only) && !is_kept(&text) {
                self.add(format!("path {text}"));
            }
            if is_dir && depth > 1 {
                self.walk(&path, depth - 1, directories_only);
            }
        }
    }
}

/// The kernel's flag of its own threads.
const PF_KTHREAD: u32 = 0x0020_0000;

/// Where something could be left: how deep to look, and whether at directories only.
const PLACES: &[(&str, usize, bool)] = &[
    ("/sys/fs/cgroup", usize::MAX, true),
    ("/run/bulkhead", usize::MAX, false),
    ("/var/lib/bulkhead", 2, false),
    ("/var/lib/bulkhead/containers", usize::MAX, false),
    ("/run/netns", 1, false),
    ("/dev/shm", usize::MAX, false),
    ("/tmp", 1, false),
    ("/var/tmp", 1, false),
    ("/run/containerd/s", usize::MAX, false),
    (
        "/run/containerd/io.containerd.runtime.v2.task",
        usize::MAX,
        false,
    ),
];

/// What an open file is called that some process could have kept of a pod.
const OPEN: &[&str] = &[
    "/run/bulkhead",
    "/var/lib/bulkhead",
    "/usr/share/bulkhead",
    "/dev/kvm",
    "/dev/net/tun",
    "/dev/vhost",
    "anon_inode:kvm",
    "net:[",
    "mnt:[",
    "pid:[",
];

/// Is it there on purpose from some first run on: proof that the assets were checked,
/// the folders of the product, layers that are unpacked, what systemd makes?
fn is_kept(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let layer = name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
    match path.strip_suffix(name).unwrap_or_default() {
        "/run/bulkhead/" => {
            name.starts_with("verified-") || ["bundles", "bulkhead"].contains(&name)
        }
        "/var/lib/bulkhead/" => ["layers", "containers", "images"].contains(&name),
        "/var/lib/bulkhead/layers/" => layer || name == ".lock",
        "/tmp/" | "/var/tmp/" => name.starts_with("systemd-private-"),
        _ => false,
    }
}

fn lines(path: &str) -> Vec<String> {
    fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

fn names(dir: &str) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .collect()
}
