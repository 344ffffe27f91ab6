//! The OCI specification of a container: what runc's users expect, plus what the
//! image and the command line say.
//!
//! Pure: everything it needs to know of the host is in [`Settings`].

use bulkhead_image::users::User;
use serde_json::{Value, json};

use crate::{args::Access, seccomp};

/// The 14 capabilities that Docker gives; as a bit set 00000000a80425fb.
const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SYS_CHROOT",
    "CAP_MKNOD",
    "CAP_AUDIT_WRITE",
    "CAP_SETFCAP",
];

/// Where programs are looked for unless the image says.
pub(crate) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Period of the processor quota in microseconds, the kernel's default.
const PERIOD_US: u32 = 100_000;

/// Open files of a process.
const OPEN_FILES: u64 = 1_048_576;

/// What differs between containers.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    /// Program and arguments.
    pub(crate) args: Vec<String>,
    /// `NAME=VALUE`.
    pub(crate) env: Vec<String>,
    /// Absolute.
    pub(crate) cwd: String,
    /// Who.
    pub(crate) user: User,
    /// With a terminal of this size.
    pub(crate) terminal: Option<Option<bulkhead_client::task::Size>>,
    /// Host name.
    pub(crate) hostname: String,
    /// Root file system read-only.
    pub(crate) read_only: bool,
    /// Source on the host (absolute), destination, access.
    pub(crate) volumes: Vec<(String, String, Access)>,
    /// Devices of the host.
    pub(crate) devices: Vec<Device>,
    /// Network namespace of the host whose interfaces the container has; none for a loopback
    /// interface only.
    pub(crate) network: Option<String>,
    /// Thousandths of a processor.
    pub(crate) cpus: Option<u32>,
    /// Bytes.
    pub(crate) memory: Option<u64>,
}

/// A device of the host.
#[derive(Clone, Debug)]
pub(crate) struct Device {
    /// `b` or `c`.
    pub(crate) kind: &'static str,
    /// Major and minor.
    pub(crate) numbers: (u32, u32),
    /// In the container.
    pub(crate) path: String,
    /// Writable or not.
    pub(crate) access: Access,
}

impl Device {
    /// For `linux.devices`.
    fn node(&self) -> Value {
        let (major, minor) = self.numbers;
        json!({"path": self.path, "type": self.kind, "major": major, "minor": minor})
    }

    /// For `linux.resources.devices`.
    fn rule(&self) -> Value {
        let access = match self.access {
            Access::ReadOnly => "rm",
            Access::ReadWrite => "rwm",
        };
        let (major, minor) = self.numbers;
        json!({
            "allow": true, "type": self.kind, "major": major, "minor": minor, "access": access,
        })
    }
}

impl Settings {
    /// `config.json`.
    pub(crate) fn spec(&self) -> Value {
        let mut namespaces = ["pid", "ipc", "uts", "mount", "cgroup"]
            .map(|kind| json!({"type": kind}))
            .to_vec();
        namespaces.push(match &self.network {
            Some(path) => json!({"type": "network", "path": path}),
            None => json!({"type": "network"}),
        });
        json!({
            "ociVersion": "1.2.0",
            "process": self.process(),
            "root": {"path": "rootfs", "readonly": self.read_only},
            "hostname": self.hostname,
            "mounts": self.mounts(),
            "linux": {
                "namespaces": namespaces,
                "devices": self.devices.iter().map(Device::node).collect::<Vec<_>>(),
                "resources": self.resources(),
                "seccomp": seccomp::default_profile(),
                "maskedPaths": [
                    "/proc/acpi",
                    "/proc/asound",
                    "/proc/interrupts",
                    "/proc/kcore",
                    "/proc/keys",
                    "/proc/latency_stats",
                    "/proc/sched_debug",
                    "/proc/scsi",
                    "/proc/timer_list",
                    "/proc/timer_stats",
                    "/sys/devices/virtual/powercap",
                    "/sys/firmware",
                ],
                "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
            },
        })
    }

    /// The `process` object, of a container or an exec.
    pub(crate) fn process(&self) -> Value {
        // A program that leaves its primary group must still belong to it.
        let others = self.user.groups.iter().filter(|gid| **gid != self.user.gid);
        let groups: Vec<u32> = std::iter::once(self.user.gid)
            .chain(others.copied())
            .collect();
        let mut process = json!({
            "terminal": self.terminal.is_some(),
            "user": {
                "uid": self.user.uid,
                "gid": self.user.gid,
                "additionalGids": groups,
            },
            "args": self.args,
            "env": self.env,
            "cwd": self.cwd,
            "capabilities": {
                "bounding": CAPABILITIES,
                "effective": CAPABILITIES,
                "permitted": CAPABILITIES,
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": OPEN_FILES, "soft": OPEN_FILES}],
            "noNewPrivileges": false,
        });
        if let Some(Some(size)) = self.terminal
            && let Some(process) = process.as_object_mut()
        {
            process.insert(
                "consoleSize".to_owned(),
                json!({"width": size.width, "height": size.height}),
            );
        }
        process
    }

    fn mounts(&self) -> Vec<Value> {
        let mount = |destination: &str, kind: &str, options: &[&str]| json!({"destination": destination, "type": kind, "source": kind, "options": options});
        let mut mounts = vec![
            mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev",
                "tmpfs",
                &["nosuid", "strictatime", "mode=755", "size=65536k"],
            ),
            mount(
                "/dev/pts",
                "devpts",
                &[
                    "nosuid",
                    "noexec",
                    "newinstance",
                    "ptmxmode=0666",
                    "mode=0620",
                    "gid=5",
                ],
            ),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount(
                "/sys/fs/cgroup",
                "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", "ro"],
            ),
            mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount(
                "/dev/shm",
                "tmpfs",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
            ),
        ];
        for (source, destination, access) in &self.volumes {
            let access = if *access == Access::ReadOnly {
                "ro"
            } else {
                "rw"
            };
            mounts.push(json!({
                "destination": destination,
                "type": "bind",
                "source": source,
                "options": ["rbind", "rprivate", access],
            }));
        }
        mounts
    }

    fn resources(&self) -> Value {
        let mut resources = serde_json::Map::new();
        if let Some(bytes) = self.memory {
            resources.insert("memory".to_owned(), json!({"limit": bytes}));
        }
        if let Some(thousandths) = self.cpus {
            resources.insert("cpu".to_owned(), cpu_limit(thousandths));
        }
        if !self.devices.is_empty() {
            let rules: Vec<_> = self.devices.iter().map(Device::rule).collect();
            resources.insert("devices".to_owned(), json!(rules));
        }
        Value::Object(resources)
    }
}

/// `linux.resources.cpu` for so many thousandths of a processor.
pub(crate) fn cpu_limit(thousandths: u32) -> Value {
    let quota_us = u64::from(thousandths) * u64::from(PERIOD_US) / 1000;
    json!({"quota": quota_us, "period": PERIOD_US})
}

/// Adds `add` to `env`: the last word on each name wins, its place is kept. A name
/// without a value is taken from `own`, and left out if it is not there.
pub(crate) fn merge_env(
    env: &mut Vec<String>,
    add: &[String],
    own: impl Fn(&str) -> Option<String>,
) {
    for entry in add {
        let name = entry
            .split_once('=')
            .map_or(entry.as_str(), |(name, _)| name);
        let entry = if entry.contains('=') {
            entry.clone()
        } else {
            match own(name) {
                Some(value) => format!("{name}={value}"),
                None => continue,
            }
        };
        let same = |known: &&mut String| {
            known
                .split_once('=')
                .is_some_and(|(known, _)| known == name)
        };
        match env.iter_mut().find(same) {
            Some(known) => *known = entry,
            None => env.push(entry),
        }
    }
}

/// Adds `NAME=VALUE` unless the name is set.
pub(crate) fn default_env(env: &mut Vec<String>, name: &str, value: &str) {
    if !env.iter().any(|known| {
        known
            .split_once('=')
            .is_some_and(|(known, _)| known == name)
    }) {
        env.push(format!("{name}={value}"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_word_on_a_variable_wins() {
        let mut env = vec!["A=1".to_owned(), "B=2".to_owned()];
        let add = ["A=3", "C", "D", "E=", "B=a=b"].map(str::to_owned);
        merge_env(&mut env, &add, |name| {
            (name == "C").then(|| "own".to_owned())
        });
        assert_eq!(env, ["A=3", "B=a=b", "C=own", "E="]);
        default_env(&mut env, "A", "x");
        default_env(&mut env, "Z", "x");
        assert_eq!(env.last().map(String::as_str), Some("Z=x"));
        assert_eq!(env.len(), 5);
    }

    #[test]
    fn limits_become_cgroup_values() {
        let settings = Settings {
            cpus: Some(1500),
            memory: Some(1 << 29),
            ..Settings::default()
        };
        let spec = settings.spec();
        let resources = &spec["linux"]["resources"];
        assert_eq!(
            resources["cpu"],
            json!({"quota": 150_000, "period": 100_000})
        );
        assert_eq!(resources["memory"]["limit"], 1 << 29);
        assert_eq!(Settings::default().spec()["linux"]["resources"], json!({}));
    }

    #[test]
    fn a_device_has_a_node_and_a_rule() {
        let device = Device {
            kind: "b",
            numbers: (8, 1),
            path: "/dev/data".to_owned(),
            access: Access::ReadOnly,
        };
        let settings = Settings {
            devices: vec![device],
            ..Settings::default()
        };
        let linux = &settings.spec()["linux"];
        assert_eq!(
            linux["devices"],
            json!([{"path": "/dev/data", "type": "b", "major": 8, "minor": 1}])
        );
        assert_eq!(
            linux["resources"]["devices"],
            json!([{"allow": true, "type": "b", "major": 8, "minor": 1, "access": "rm"}])
        );
    }

    #[test]
    fn volumes_come_last_with_their_access() {
        let volume = ("/a".to_owned(), "/b".to_owned(), Access::ReadOnly);
        let settings = Settings {
            volumes: vec![volume],
            ..Settings::default()
        };
        let spec = settings.spec();
        let last = spec["mounts"].as_array().unwrap().last().unwrap();
        assert_eq!(last["options"], json!(["rbind", "rprivate", "ro"]));
    }
}
