//! `/etc/bulkhead/config.toml` and `/etc/bulkhead/config.d/*.toml`.
//!
//! Every key has a default and no file is needed. A file in `config.d` overrides
//! what comes before it, in the order of the names. A caller may name another file, or
//! bring its text, for one pod. A key that is not known is an
//! error: a typing mistake must not pass for a setting.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bulkhead_vmm::devices::limit::Limit;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::options::Source;

/// Directory of the configuration.
pub const DIR: &str = "/etc/bulkhead";

/// In messages, what stands for the file where there is none.
const OPTIONS: &str = "runtime options";

/// Where packages put the assets.
const ASSETS_DIR: &str = "/usr/share/bulkhead";

/// A configuration that is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// A file that cannot be read.
    #[error("Cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file that is not understood.
    #[error("{}: {reason}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// One line.
        reason: String,
    },
    /// A value out of range.
    #[error("{}: {key} = {value} must lie between {low} and {high}", path.display())]
    Range {
        /// The last file that was read.
        path: PathBuf,
        /// The key.
        key: &'static str,
        /// The value.
        value: u64,
        /// Smallest value.
        low: u64,
        /// Largest value.
        high: u64,
    },
}

/// What may pass each network interface of a pod.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interface {
    /// To the guest.
    pub receive: Limit,
    /// From it.
    pub transmit: Limit,
}

/// The administrator's settings.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Config {
    /// Directory of `vmlinux`, the root image and their manifest.
    pub assets_dir: PathBuf,
    /// Virtual processors of a container without a limit, 1 to 64.
    pub vcpus: u8,
    /// Memory in MiB of the guest of a container without a limit.
    pub memory_mib: u32,
    /// The most virtual processors that a pod can have. If nothing is said: those of the
    /// host, of which it gets no more than 4 while it runs, or 16 if others join it.
    pub most_vcpus: Option<u8>,
    /// The most memory in MiB that its guest can have; that of the host if nothing is
    /// said.
    pub most_memory_mib: Option<u32>,
    /// Memory in MiB that a guest has above its container's limit: for the
    /// kernel, the agent and page tables.
    pub guest_overhead_mib: u32,
    /// Seconds from the start of the VM to the agent's greeting, and for the
    /// creation of a container in it.
    pub boot_timeout_s: u64,
    /// Seconds for the agent's answer to any other request.
    pub rpc_timeout_s: u64,
    /// Give the guest a console and log what it says.
    pub guest_console: bool,
    /// Words added to the guest kernel's command line.
    pub kernel_cmdline: String,
    /// Drop what a guest sends in another name than its own, unless a container has
    /// CAP_NET_ADMIN.
    pub spoof_filter: bool,
    /// What may pass each network interface of a pod.
    pub interface: Interface,
    /// What may pass each disk of a pod.
    pub disk: Limit,
    /// Refuse fields of a specification that promise protection and would be ignored.
    pub strict: bool,
    /// Log debug messages.
    pub debug: bool,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            assets_dir: installed_assets(std::env::current_exe().ok().as_deref()),
            vcpus: 1,
            memory_mib: 512,
            most_vcpus: None,
            most_memory_mib: None,
            guest_overhead_mib: 128,
            boot_timeout_s: 30,
            rpc_timeout_s: 10,
            guest_console: false,
            kernel_cmdline: String::new(),
            spoof_filter: true,
            interface: Interface::default(),
            disk: Limit::default(),
            strict: false,
            debug: false,
        }
    }
}

/// The assets that were installed together with the program `own`, whatever the
/// prefix; else where packages put them.
fn installed_assets(own: Option<&Path>) -> PathBuf {
    own.and_then(|own| Some(own.parent()?.parent()?.join("share/bulkhead")))
        .filter(|dir| dir.join(bulkhead_vmm::assets::MANIFEST).is_file())
        .unwrap_or_else(|| PathBuf::from(ASSETS_DIR))
}

/// One file: every key is optional.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Layer {
    assets_dir: Option<PathBuf>,
    vcpus: Option<u8>,
    memory_mib: Option<u32>,
    most_vcpus: Option<u8>,
    most_memory_mib: Option<u32>,
    guest_overhead_mib: Option<u32>,
    boot_timeout_s: Option<u64>,
    rpc_timeout_s: Option<u64>,
    guest_console: Option<bool>,
    kernel_cmdline: Option<String>,
    spoof_filter: Option<bool>,
    interface: Option<Interface>,
    disk: Option<Limit>,
    strict: Option<bool>,
    debug: Option<bool>,
}

impl Config {
    /// Reads the configuration of the host.
    pub fn load() -> Result<Self, Error> {
        Self::load_from(Path::new(DIR))
    }

    /// Reads the configuration that a caller names for one pod, instead of the host's
    /// if there is one.
    pub fn load_for(source: Option<&Source>) -> Result<Self, Error> {
        let mut config = Config::default();
        match source {
            None => return Self::load(),
            Some(Source::File(path)) => {
                let text = fs::read_to_string(path).map_err(|source| Error::Read {
                    path: path.clone(),
                    source,
                })?;
                config.apply(path, &text)?;
            }
            Some(Source::Text(text)) => config.apply(Path::new(OPTIONS), text)?,
        }
        Ok(config)
    }

    /// Reads the configuration below `dir`.
    pub fn load_from(dir: &Path) -> Result<Self, Error> {
        let mut config = Config::default();
        let mut files = vec![dir.join("config.toml")];
        let drop_ins = dir.join("config.d");
        match fs::read_dir(&drop_ins) {
            Ok(entries) => {
                let mut names: Vec<PathBuf> = entries
                    .filter_map(|entry| Some(entry.ok()?.path()))
                    .collect();
                names.retain(|path| {
                    path.extension()
                        .is_some_and(|extension| extension == "toml")
                });
                names.sort();
                files.extend(names);
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(source) => {
                return Err(Error::Read {
                    path: drop_ins,
                    source,
                });
            }
        }
        for path in files {
            match fs::read_to_string(&path) {
                Ok(text) => config.apply(&path, &text)?,
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(source) => return Err(Error::Read { path, source }),
            }
        }
        Ok(config)
    }

    fn apply(&mut self, path: &Path, text: &str) -> Result<(), Error> {
        let layer: Layer = toml::from_str(text).map_err(|error| Error::Syntax {
            path: path.to_owned(),
            reason: error
                .to_string()
                .split_whitespace()
                .collect::<Vec<_>>()
                .join(" "),
        })?;
        set(&mut self.assets_dir, layer.assets_dir);
        set(&mut self.vcpus, layer.vcpus);
        set(&mut self.memory_mib, layer.memory_mib);
        self.most_vcpus = layer.most_vcpus.or(self.most_vcpus);
        self.most_memory_mib = layer.most_memory_mib.or(self.most_memory_mib);
        set(&mut self.guest_overhead_mib, layer.guest_overhead_mib);
        set(&mut self.boot_timeout_s, layer.boot_timeout_s);
        set(&mut self.rpc_timeout_s, layer.rpc_timeout_s);
        set(&mut self.guest_console, layer.guest_console);
        set(&mut self.kernel_cmdline, layer.kernel_cmdline);
        set(&mut self.spoof_filter, layer.spoof_filter);
        set(&mut self.interface, layer.interface);
        set(&mut self.disk, layer.disk);
        set(&mut self.strict, layer.strict);
        set(&mut self.debug, layer.debug);
        for (key, value, low, high) in [
            ("vcpus", u64::from(self.vcpus), 1, 64),
            ("memory_mib", u64::from(self.memory_mib), 64, 1_048_576),
            ("most_vcpus", self.most_vcpus.map_or(1, u64::from), 1, 64),
            (
                "most_memory_mib",
                self.most_memory_mib.map_or(64, u64::from),
                64,
                1_048_576,
            ),
            (
                "guest_overhead_mib",
                u64::from(self.guest_overhead_mib),
                32,
                65_536,
            ),
            ("boot_timeout_s", self.boot_timeout_s, 1, 600),
            ("rpc_timeout_s", self.rpc_timeout_s, 1, 600),
        ] {
            if !(low..=high).contains(&value) {
                return Err(Error::Range {
                    path: path.to_owned(),
                    key,
                    value,
                    low,
                    high,
                });
            }
        }
        for (key, limit) in [
            ("interface.receive", self.interface.receive),
            ("interface.transmit", self.interface.transmit),
            ("disk", self.disk),
        ] {
            if let Some(fault) = limit.fault() {
                return Err(Error::Syntax {
                    path: path.to_owned(),
                    reason: format!("{key} {fault}"),
                });
            }
        }
        Ok(())
    }

    /// Time for the boot.
    #[must_use]
    pub fn boot_timeout(&self) -> Duration {
        Duration::from_secs(self.boot_timeout_s)
    }

    /// Time for an answer of the agent.
    #[must_use]
    pub fn rpc_timeout(&self) -> Duration {
        Duration::from_secs(self.rpc_timeout_s)
    }
}

fn set<T>(setting: &mut T, value: Option<T>) {
    if let Some(value) = value {
        *setting = value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_is_needed() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(Config::load_from(dir.path()).unwrap(), Config::default());
    }

    #[test]
    fn later_files_override_earlier_ones() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("config.d")).unwrap();
        fs::write(
            dir.path().join("config.toml"),
            "vcpus = 2\nmemory_mib = 1024\n",
        )
        .unwrap();
        fs::write(dir.path().join("config.d/20.toml"), "vcpus = 4\n").unwrap();
        fs::write(dir.path().join("config.d/10.toml"), "vcpus = 3\n").unwrap();
        fs::write(dir.path().join("config.d/note"), "not toml").unwrap();
        let config = Config::load_from(dir.path()).unwrap();
        assert_eq!((config.vcpus, config.memory_mib), (4, 1024));
    }

    #[test]
    fn limits_of_devices_are_tables() {
        let mut config = Config::default();
        let text = "[interface]\nreceive = { bytes = { per_second = 5 } }\n[disk.operations]\n\
            per_second = 7\nburst = 9";
        config.apply(Path::new("a"), text).unwrap();
        assert_eq!(config.interface.receive.bytes.per_second, 5);
        assert_eq!(config.interface.transmit, Limit::default());
        assert_eq!(config.disk.operations.burst, 9);
    }

    #[test]
    fn assets_are_those_of_the_same_prefix_if_there_are_any() {
        let prefix = tempfile::tempdir().unwrap();
        let own = prefix.path().join("bin/program");
        assert_eq!(installed_assets(Some(&own)), Path::new(ASSETS_DIR));
        assert_eq!(installed_assets(None), Path::new(ASSETS_DIR));
        let assets = prefix.path().join("share/bulkhead");
        fs::create_dir_all(&assets).unwrap();
        fs::write(assets.join(bulkhead_vmm::assets::MANIFEST), "{}").unwrap();
        assert_eq!(installed_assets(Some(&own)), assets);
    }

    #[test]
    fn mistakes_are_named_with_their_file() {
        for (text, words) in [
            ("vcpu = 1", "unknown field"),
            ("vcpus = 0", "vcpus = 0 must lie between 1 and 64"),
            ("vcpus = \"2\"", "invalid type"),
            ("[", "config.toml"),
            (
                "[disk]\nbytes = { burst = 7 }",
                "disk cannot have a burst of 7 bytes without a rate",
            ),
            (
                "[interface.transmit.operations]\nburst = 7",
                "interface.transmit cannot have a burst of 7 operations",
            ),
            ("[interface]\nsend = {}", "unknown field"),
        ] {
            let dir = tempfile::tempdir().unwrap();
            fs::write(dir.path().join("config.toml"), text).unwrap();
            let message = Config::load_from(dir.path()).unwrap_err().to_string();
            assert!(message.contains(words), "{message}");
            assert!(
                message.contains("config.toml") && !message.contains('\n'),
                "{message}"
            );
        }
    }
}
