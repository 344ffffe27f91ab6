//! Bundles of the busybox image, made by hand.

use std::{fs, path::Path};

use serde_json::{Value, json};

use super::command::Command;
use crate::BUSYBOX;

/// Unpacks the busybox image into the directory `root`, as plain files: not an
/// overlay, which refuses some of what a file system can do.
///
/// # Panics
/// If it cannot.
pub fn busybox_root(root: &Path) {
    let blobs = Path::new(BUSYBOX).join("blobs/sha256");
    let blobs = fs::read_dir(&blobs).expect("the lab host has the image");
    let layer = blobs
        .flatten()
        .max_by_key(|blob| blob.metadata().map_or(0, |meta| meta.len()))
        .expect("the image has a layer");
    let arguments = ["-C".as_ref(), root, "-xf".as_ref(), &layer.path()];
    Command::new("tar", arguments).run().success();
}

/// A `config.json` that passes: a shell that runs `script` as root.
#[must_use]
pub fn config(script: &str) -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {
            "args": ["sh", "-c", script],
            "cwd": "/",
            "env": ["PATH=/bin"],
            "user": {"uid": 0, "gid": 0},
        },
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {
            "namespaces": [
                {"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"},
                {"type": "network"},
            ],
        },
    })
}

/// The same for a process that may do everything in its guest.
#[must_use]
pub fn privileged_config(script: &str) -> Value {
    let every = [
        "CAP_DAC_OVERRIDE",
        "CAP_SYS_ADMIN",
        "CAP_SYS_PTRACE",
        "CAP_SYS_RESOURCE",
    ];
    let mut config = config(script);
    config["process"]["capabilities"] =
        json!({"bounding": every, "effective": every, "permitted": every});
    config
}

/// Makes a bundle with this configuration in the directory `dir`.
///
/// # Panics
/// If it cannot.
pub fn write(dir: &Path, config: &Value) {
    let root = dir.join("rootfs");
    fs::create_dir(&root).expect("the directory is empty");
    busybox_root(&root);
    fs::write(dir.join("config.json"), config.to_string()).expect("the directory can be written");
}
