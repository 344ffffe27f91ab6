//! Malformed images and bundles: a sentence that names the culprit, an exit code
//! that is not 0, and nothing on the host has changed.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

use std::{
    fs,
    path::{Path, PathBuf},
};

use bulkhead_tests::{Command, LeakCheck, Outcome, bundle};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Runs `bulkhead run` with these arguments, which must be refused with these words.
#[track_caller]
fn refused(arguments: &[&str], words: &str) {
    let layers = || {
        fs::read_dir("/var/lib/bulkhead/layers").map_or(0, |entries| {
            let entries = entries.flatten();
            entries.filter(|entry| entry.file_name() != ".lock").count()
        })
    };
    let (leaks, before) = (LeakCheck::start(), layers());
    let outcome: Outcome = Command::bulkhead(["run", "--rm"].iter().chain(arguments)).run();
    assert!(outcome.code != 0, "{outcome}");
    assert!(
        outcome.stderr.starts_with("bulkhead: ")
            && outcome.stderr.contains(words)
            && outcome.stderr.lines().count() == 1,
        "{words}: {outcome}"
    );
    assert_eq!(layers(), before, "{outcome}");
    leaks.finish();
}

/// An image layout on the disk.
struct Layout(tempfile::TempDir);

impl Layout {
    /// Of one image with one layer, which is this archive.
    fn new(layer: &[u8]) -> Layout {
        let layout = Layout(tempfile::tempdir().unwrap());
        let version = json!({"imageLayoutVersion": "1.0.0"});
        fs::write(layout.path("oci-layout"), version.to_string()).unwrap();
        fs::create_dir_all(layout.path("blobs/sha256")).unwrap();
        let diff_id = layout.blob(layer)["digest"].clone();
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": {"Cmd": ["true"]},
            "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        });
        let manifest = json!({
            "schemaVersion": 2,
            "config": layout.typed("config.v1+json", config.to_string().as_bytes()),
            "layers": [layout.typed("layer.v1.tar", layer)],
        });
        let manifest = layout.typed("manifest.v1+json", manifest.to_string().as_bytes());
        let index = json!({"schemaVersion": 2, "manifests": [manifest]});
        fs::write(layout.path("index.json"), index.to_string()).unwrap();
        layout
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn place(&self) -> &str {
        self.0.path().to_str().unwrap()
    }

    /// Adds a blob; its descriptor without a type.
    fn blob(&self, bytes: &[u8]) -> Value {
        let digest = hex::encode(Sha256::digest(bytes));
        fs::write(self.path("blobs/sha256").join(&digest), bytes).unwrap();
        json!({"digest": format!("sha256:{digest}"), "size": bytes.len()})
    }

    fn typed(&self, kind: &str, bytes: &[u8]) -> Value {
        let mut descriptor = self.blob(bytes);
        descriptor["mediaType"] = format!("application/vnd.oci.image.{kind}").into();
        descriptor
    }
}

/// An archive of one entry, written without the checks of a builder.
fn layer(name: &str, kind: tar::EntryType, target: &str) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    let fields = header.as_old_mut();
    fields.name[..name.len()].copy_from_slice(name.as_bytes());
    fields.linkname[..target.len()].copy_from_slice(target.as_bytes());
    header.set_entry_type(kind);
    header.set_size(0);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let mut builder = tar::Builder::new(Vec::new());
    builder.append(&header, std::io::empty()).unwrap();
    builder.into_inner().unwrap()
}

fn good_layer() -> Vec<u8> {
    layer("f", tar::EntryType::Regular, "")
}

#[test]
fn a_layer_that_reaches_outside_is_refused_b36_b37() {
    use tar::EntryType::{Link, Regular, Symlink};
    for (name, kind, target, words) in [
        ("../../../../etc/evil", Regular, "", "\"..\""),
        ("evil", Link, "../../../../etc/passwd", "outside"),
        ("evil", Link, "/etc/passwd", "no file of the image"),
    ] {
        let layout = Layout::new(&layer(name, kind, target));
        refused(&[layout.place()], words);
        refused(&[layout.place()], &format!("{name:?}"));
    }
    // An absolute name counts from the root of the image.
    let layout = Layout::new(&layer("/etc/evil", Regular, ""));
    let outcome = Command::bulkhead(["run", "--rm", layout.place(), "--", "/etc/evil"]).run();
    assert_eq!(outcome.code, 126, "{outcome}");
    // A symbolic link may point anywhere: it is followed in the guest only, where
    // the host's file is not.
    let layout = Layout::new(&layer("evil", Symlink, "/etc/passwd"));
    let outcome = Command::bulkhead(["run", "--rm", layout.place(), "--", "/evil"]).run();
    assert_eq!(outcome.code, 127, "{outcome}");
    assert!(!Path::new("/etc/evil").exists());
}

#[test]
fn a_malformed_image_is_refused_by_name() {
    let empty = tempfile::tempdir().unwrap();
    refused(&[empty.path().to_str().unwrap()], "index.json");
    refused(&["/nowhere"], "/nowhere");

    let layout = Layout::new(&good_layer());
    fs::write(layout.path("index.json"), "{]").unwrap();
    refused(&[layout.place()], "index.json");

    let layout = Layout::new(&good_layer());
    let digest = hex::encode(Sha256::digest(good_layer()));
    let blob = layout.path("blobs/sha256").join(&digest);
    fs::write(&blob, layer("g", tar::EntryType::Regular, "")).unwrap();
    refused(&[layout.place()], &digest);
    fs::remove_file(&blob).unwrap();
    refused(&[layout.place()], &digest);

    let cut = good_layer();
    let layout = Layout::new(&cut[..300]);
    let digest = hex::encode(Sha256::digest(&cut[..300]));
    refused(&[layout.place()], &digest);

    let noise: Vec<u8> = (0..100_000_u32)
        .map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8)
        .collect();
    let archive = empty.path().join("image.tar");
    fs::write(&archive, noise).unwrap();
    refused(&[archive.to_str().unwrap()], "image.tar");
}

#[test]
fn a_malformed_bundle_is_refused_by_the_field() {
    let device = json!([{"path": "/dev/mem", "type": "c", "major": 1, "minor": 1}]);
    let outside = json!([{"type": "pid", "path": "/proc/1/ns/pid"}]);
    let limit = json!([{"type": "RLIMIT_CORE", "soft": 2, "hard": 1}]);
    let shared =
        json!([{"destination": "/x", "type": "bind", "source": "/", "options": ["rshared"]}]);
    for (pointer, value, words) in [
        ("/ociVersion", json!("99.0.0"), "ociVersion"),
        ("/process/args", json!([]), "process.args"),
        ("/process/cwd", json!("relative"), "process.cwd"),
        (
            "/process/user/uid",
            json!(4_294_967_295_u32),
            "process.user.uid",
        ),
        ("/process/rlimits", limit, "process.rlimits[0].soft"),
        (
            "/process/capabilities",
            json!({"effective": ["CAP_KILL"], "permitted": []}),
            "CAP_KILL",
        ),
        ("/root/path", json!("nowhere"), "nowhere"),
        ("/hostname", json!("line\nline"), "hostname"),
        (
            "/hooks",
            json!({"prestart": [{"path": "bin/true"}]}),
            "hooks.prestart[0].path",
        ),
        ("/linux/namespaces", outside, "linux.namespaces[0]"),
        ("/linux/devices", device, "linux.devices[0]"),
        ("/linux/sysctl", json!({"../x": "1"}), "linux.sysctl"),
        (
            "/linux/sysctl",
            json!({"kernel.panic": "1"}),
            "linux.sysctl",
        ),
        (
            "/process/scheduler",
            json!({"policy": "SCHED_NONE"}),
            "process.scheduler.policy",
        ),
        (
            "/linux/resources",
            json!({"memory": {"limit": 1}}),
            "memory.limit",
        ),
        ("/mounts", shared, "mounts[0].options"),
    ] {
        let mut config = bundle::config("true");
        let (parent, key) = pointer.rsplit_once('/').unwrap();
        config.pointer_mut(parent).unwrap()[key] = value;
        let dir = tempfile::tempdir().unwrap();
        bundle::write(dir.path(), &config);
        refused(&["--bundle", dir.path().to_str().unwrap()], words);
    }
}

#[test]
fn a_bundle_that_is_none_is_refused_b1_b14_b19() {
    let dir = tempfile::tempdir().unwrap();
    let place = dir.path().to_str().unwrap();
    refused(&["--bundle", place], "config.json");
    bundle::write(dir.path(), &bundle::config("true"));
    for text in ["", "{", "[]", "\u{feff}{}", &"[".repeat(1 << 20)] {
        fs::write(dir.path().join("config.json"), text).unwrap();
        refused(&["--bundle", place], "config.json");
    }
    fs::write(
        dir.path().join("config.json"),
        bundle::config("true").to_string(),
    )
    .unwrap();
    fs::rename(dir.path().join("rootfs"), dir.path().join("real")).unwrap();
    refused(&["--bundle", place], "rootfs");
    std::os::unix::fs::symlink("real", dir.path().join("rootfs")).unwrap();
    refused(&["--bundle", place], "rootfs");
    refused(&["--bundle", "/etc/passwd"], "/etc/passwd");
}
