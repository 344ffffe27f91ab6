//! Does the host look as before?

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    thread,
    time::{Duration, Instant},
};

/// What may remain for a moment: processes that were killed and not yet reaped.
const GRACE: Duration = Duration::from_secs(5);

/// A picture of the host: mounts, processes, sockets, network devices and
/// namespaces, cgroups, files where ours lie.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Picture(BTreeSet<String>);

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
            let left: Vec<String> = now.0.difference(&self.before.0).cloned().collect();
            if left.is_empty() || Instant::now() > end {
                return left;
            }
            thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Picture {
    fn take() -> Picture {
        let mut all = BTreeSet::new();
        for line in lines("/proc/self/mountinfo") {
            let place = line.split(' ').nth(4).unwrap_or_default();
            all.insert(format!("mount {place}"));
        }
        for line in lines("/proc/net/unix") {
            if let Some(path) = line.split_whitespace().nth(7)
                && !path.starts_with("/run/systemd")
                && !path.starts_with("/run/user")
            {
                all.insert(format!("socket {path}"));
            }
        }
        for name in names("/sys/class/net") {
            all.insert(format!("network device {name}"));
        }
        for pid in names("/proc")
            .into_iter()
            .filter(|name| name.bytes().all(|b| b.is_ascii_digit()))
        {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            // Threads of the kernel have no command line; they come and go.
            let command = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            let zombie = stat
                .rsplit(") ")
                .next()
                .is_some_and(|rest| rest.starts_with('Z'));
            let known = ["systemd-udevd", "(udev-worker)", "udev-worker"].contains(&name.trim());
            if !known && (!command.is_empty() || zombie) {
                all.insert(format!("process {pid} {}", name.trim()));
            }
        }
        for dir in [
            "/sys/fs/cgroup",
            "/run/bulkhead",
            "/var/lib/bulkhead/containers",
            "/run/netns",
            "/dev/shm",
        ] {
            walk(Path::new(dir), dir == "/sys/fs/cgroup", &mut all);
        }
        walk(Path::new("/run/containerd/s"), false, &mut all);
        walk(
            Path::new("/run/containerd/io.containerd.runtime.v2.task"),
            false,
            &mut all,
        );
        Picture(all)
    }
}

/// Adds what is below `dir`: directories only, or everything.
fn walk(dir: &Path, directories_only: bool, all: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
        let path = entry.path();
        // Kept on purpose from the first run on: proof that the assets were checked.
        let kept = [
            "/run/bulkhead/verified-",
            "/run/bulkhead/bundles",
            "/run/bulkhead/bulkhead",
        ];
        if (is_dir || !directories_only)
            && !kept.iter().any(|name| {
                path.to_string_lossy().starts_with(name) && path.components().count() == 4
            })
        {
            all.insert(format!("path {}", path.display()));
        }
        if is_dir {
            walk(&path, directories_only, all);
        }
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
