//! The images of tests and demonstration: OCI layouts made from Debian packages.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use bulkhead_guest::Progress;
use bulkhead_guest::debian::{Apt, Mirror};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::packages::{BUSYBOX, BUSYBOX_IMAGE, DEBIAN, STABLE};
use super::system::{self, PACKAGES};
use bulkhead_guest::cache::{self, Cache, Entry, sha256_of};
use bulkhead_guest::command::{clean, output};

/// Changes whenever a step below does.
const RECIPE: &str = "4";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An image in the cache.
#[derive(Debug)]
pub struct Image {
    /// Its name: the last part of its path in the lab host.
    pub name: &'static str,
    entry: Entry,
}

impl Image {
    /// The directory of its OCI layout.
    #[must_use]
    pub fn layout(&self) -> PathBuf {
        self.entry.file("layout")
    }

    /// Hash of all its files.
    #[must_use]
    pub fn content(&self) -> &str {
        self.entry.content()
    }
}

/// Kind and name of the entry of the busybox image.
fn busybox_name() -> (&'static str, String) {
    let key = cache::key([RECIPE, PATH, STABLE, BUSYBOX_IMAGE]);
    ("image-busybox", key)
}

/// Kind and name of the entry of the Debian image.
fn debian_name() -> (&'static str, String) {
    let parts = [RECIPE, PATH, STABLE].into_iter();
    (
        "image-debian",
        cache::key(parts.chain(DEBIAN.iter().copied())),
    )
}

/// The images' names, and their entries if they have been made.
pub(crate) fn find(cache: &Cache) -> Result<Vec<(&'static str, Option<Entry>)>> {
    [("busybox", busybox_name()), ("debian", debian_name())]
        .into_iter()
        .map(|(name, (kind, key))| Ok((name, cache.find(kind, &key)?)))
        .collect()
}

/// The images `busybox` and `debian`: out of the cache, or made now.
///
/// # Errors
///
/// A package cannot be fetched, or this user cannot install a Debian system.
pub fn images(cache: &Cache, progress: &dyn Progress) -> Result<Vec<Image>> {
    let (kind, key) = busybox_name();
    let busybox = cache.entry(kind, &key, progress, |entry, work| {
        progress.step("Making the busybox image");
        make_busybox(entry, work)
    })?;
    let (kind, key) = debian_name();
    let debian = cache.entry(kind, &key, progress, |entry, work| {
        progress.step("Making the Debian image");
        make_debian(entry, work, &cache.path().join("image-debian.log"))
    })?;
    Ok(vec![
        Image {
            name: "busybox",
            entry: busybox,
        },
        Image {
            name: "debian",
            entry: debian,
        },
    ])
}

fn make_busybox(entry: &Path, work: &Path) -> Result<()> {
    let tree = work.join("tree");
    for dir in [
        "bin", "dev", "etc", "mnt", "proc", "root", "run", "sys", "tmp", "var",
    ] {
        fs::create_dir_all(tree.join(dir))?;
    }
    fs::set_permissions(tree.join("tmp"), fs::Permissions::from_mode(0o1777))?;
    fs::write(
        tree.join("etc/passwd"),
        "root:x:0:0:root:/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n",
    )?;
    fs::write(tree.join("etc/group"), "root:x:0:\nuser:x:1000:\n")?;
    let program = tree.join("bin/busybox");
    let apt = Apt::new(&work.join("apt"), &Mirror::of_this_machine()?, STABLE)?;
    let version = apt.candidate(BUSYBOX_IMAGE)?;
    fs::write(entry.join(PACKAGES), format!("{BUSYBOX_IMAGE} {version}\n"))?;
    let unpacked = work.join("package");
    output(
        clean("dpkg-deb")
            .arg("-x")
            .arg(apt.download(BUSYBOX_IMAGE)?)
            .arg(&unpacked),
    )?;
    fs::copy(unpacked.join(BUSYBOX), &program)
        .with_context(|| format!("The package {BUSYBOX_IMAGE} has no {BUSYBOX}"))?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let applets = output(clean(&program.to_string_lossy()).arg("--list"))?;
    for applet in applets.lines().filter(|name| *name != "busybox") {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    let layer = work.join("layer.tar");
    output(
        clean("tar")
            .args(["--sort=name", "--mtime=@0"])
            .args(["--numeric-owner", "--owner=0", "--group=0", "-C"])
            .arg(tree)
            .arg("-cf")
            .arg(&layer)
            .arg("."),
    )?;
    write_layout(
        &layer,
        &entry.join("layout"),
        "busybox",
        &json!({"Env": [PATH], "Cmd": ["sh"]}),
    )
}

fn make_debian(entry: &Path, work: &Path, log: &Path) -> Result<()> {
    let layer = work.join("layer.tar");
    system::install(&Mirror::of_this_machine()?, STABLE, DEBIAN, &layer, log)?;
    system::list_packages(&layer, "", work, &entry.join(PACKAGES))?;
    write_layout(
        &layer,
        &entry.join("layout"),
        "debian",
        &json!({"Env": [PATH], "Cmd": ["bash"]}),
    )
}

/// Writes an image whose one layer is the file `layer`, which is moved into it.
fn write_layout(layer: &Path, layout: &Path, name: &str, process: &Value) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let digest = sha256_of(layer)?;
    let size = fs::metadata(layer)?.len();
    fs::rename(layer, blobs.join(&digest))?;
    let put = |value: &Value| -> Result<Value> {
        let bytes = serde_json::to_vec(value)?;
        let digest = hex::encode(Sha256::digest(&bytes));
        fs::write(blobs.join(&digest), &bytes)?;
        Ok(json!({"digest": format!("sha256:{digest}"), "size": bytes.len()}))
    };
    let with = |mut descriptor: Value, kind: &str| {
        descriptor["mediaType"] = json!(format!("application/vnd.oci.image.{kind}"));
        descriptor
    };
    let config = put(&json!({
        "architecture": "amd64", "os": "linux", "config": process,
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    }))?;
    let manifest = put(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": with(config, "config.v1+json"),
        "layers": [with(json!({"digest": format!("sha256:{digest}"), "size": size}), "layer.v1.tar")],
    }))?;
    let mut entry = with(manifest, "manifest.v1+json");
    entry["platform"] = json!({"architecture": "amd64", "os": "linux"});
    entry["annotations"] = json!({
        "io.containerd.image.name": format!("localhost/lab/{name}:latest"),
        "org.opencontainers.image.ref.name": "latest",
    });
    let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry]});
    fs::write(layout.join("index.json"), serde_json::to_vec(&index)?)?;
    fs::write(
        layout.join("oci-layout"),
        r#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    Ok(())
}
