//! Roots of containers: layers of the host under an overlay, as a snapshotter has them.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use bulkhead_tests::bundle;
use containerd_shim_protos::api::Mount;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::output;

/// Length of the large file, in bytes.
pub(crate) const LARGE: usize = 64 << 20;
/// Length of the file with the pattern, in bytes.
pub(crate) const PATTERN: usize = 1 << 20;

/// Layers, and room for what a container writes.
pub(crate) struct Root {
    dir: TempDir,
    /// From the base on.
    layers: Vec<PathBuf>,
}

impl Root {
    /// A base with busybox.
    pub(crate) fn new() -> Root {
        let dir = tempfile::tempdir_in("/var/tmp").expect("a directory on the disk");
        for name in ["upper", "work"] {
            fs::create_dir(dir.path().join(name)).unwrap();
        }
        let layers = Vec::new();
        let root = Root { dir, layers };
        root.layer(|base| {
            bundle::busybox_root(base);
            for name in ["bin", "dev", "etc", "proc", "run", "sys", "tmp"] {
                fs::create_dir_all(base.join(name)).unwrap();
            }
            fs::write(base.join("etc/resolv.conf"), "").unwrap();
        })
    }

    /// The same with a second layer: `/data/pattern`, and `/data/large` with [`LARGE`] bytes
    /// of which no two pages are the same.
    pub(crate) fn with_data() -> Root {
        Root::new().layer(|layer| {
            let data = layer.join("data");
            fs::create_dir(&data).unwrap();
            fs::write(data.join("pattern"), output::pattern(PATTERN)).unwrap();
            large_file(&data.join("large"));
        })
    }

    /// Adds a layer on top.
    pub(crate) fn layer(mut self, fill: impl FnOnce(&Path)) -> Root {
        let layer = self.dir.path().join(self.layers.len().to_string());
        fs::create_dir(&layer).unwrap();
        fill(&layer);
        self.layers.push(layer);
        self
    }

    /// Where a file of a layer lies on the host.
    pub(crate) fn on_host(&self, layer: usize, path: &str) -> PathBuf {
        self.layers[layer].join(path)
    }

    /// Where a file that a container wrote lies on the host.
    pub(crate) fn written(&self, path: &str) -> PathBuf {
        self.dir.path().join("upper").join(path)
    }

    /// What Create is told.
    pub(crate) fn mounts(&self) -> Vec<Mount> {
        let place = |name: &str| self.dir.path().join(name).display().to_string();
        let layers = self.layers.iter().rev().map(|path| path.to_str().unwrap());
        let layers: Vec<&str> = layers.collect();
        let options = vec![
            "index=off".to_owned(),
            format!("workdir={}", place("work")),
            format!("upperdir={}", place("upper")),
            format!("lowerdir={}", layers.join(":")),
        ];
        vec![Mount {
            type_: "overlay".into(),
            source: "overlay".into(),
            options,
            ..Mount::default()
        }]
    }

    /// Removes it, which fails if something is still mounted in it.
    pub(crate) fn remove(self) {
        self.dir.close().expect("nothing is mounted in it");
    }
}

/// A file with [`LARGE`] bytes.
pub(crate) fn large_file(path: &Path) {
    let mut file = File::create(path).unwrap();
    let mut block = output::pattern(1 << 20);
    for first in (0..LARGE).step_by(block.len()) {
        for page in (0..block.len()).step_by(4096) {
            block[page..][..8].copy_from_slice(&(first + page).to_le_bytes());
        }
        file.write_all(&block).unwrap();
    }
}

/// The barest specification: a mount namespace, no capabilities, no place for a cgroup.
pub(crate) fn config(args: &[&str]) -> Value {
    json!({
        "ociVersion": "1.3.0",
        "process": process(args),
        "root": {"path": "rootfs"},
        "mounts": [
            {"destination": "/proc", "type": "proc", "source": "proc"},
            {"destination": "/dev", "type": "tmpfs", "source": "tmpfs"},
        ],
        "linux": {"namespaces": [{"type": "mount"}]},
    })
}

/// A process.
pub(crate) fn process(args: &[&str]) -> Value {
    json!({
        "args": args,
        "cwd": "/",
        "env": ["PATH=/bin"],
        "user": {"uid": 0, "gid": 0},
    })
}

/// A program that prints its arguments and ends on any signal that can be caught.
pub(crate) fn forever<'a>(words: &[&'a str]) -> Vec<&'a str> {
    let script = "trap 'exit 0' HUP INT QUIT TERM USR1 USR2; echo \"$@\"
        while :; do sleep 1000 & wait $!; done";
    [&["sh", "-c", script, "forever"], words].concat()
}

/// A program that writes the pattern, so many times the length of its file, and exits with
/// this code.
pub(crate) fn write_pattern(times: usize, code: u8) -> String {
    format!("for i in $(seq {times}); do cat /data/pattern; done; exit {code}")
}
