//! The test images: OCI image layouts made from Debian packages.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use bulkhead_guest_kernel::{Progress, debian::Mirror};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::root::run;

/// Counted up when the way the images are made changes.
const RECIPE: &str = "1";

/// The suite of the Debian image: the building machine knows its keys.
const SUITE: &str = "bookworm";

/// What the Debian image holds beside the essential packages.
const PACKAGES: &str = "acl,attr,gcc,libc6-dev,procps,python3-minimal,redis-server,redis-tools";

const PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Test images in the cache.
#[derive(Debug)]
pub struct Images {
    /// Names and directories of the layouts.
    pub layouts: Vec<(&'static str, PathBuf)>,
    pub(super) key: String,
}

impl Images {
    /// Finds the images below `cache` or makes them.
    ///
    /// # Errors
    /// A package is missing or cannot be fetched.
    pub fn ensure(cache: &Path, progress: &dyn Progress) -> Result<Images> {
        let busybox = fs::read("/bin/busybox")
            .context("Cannot read /bin/busybox: install the package busybox-static")?;
        let mut hash = Sha256::new();
        for part in [RECIPE, SUITE, PACKAGES, PATH] {
            hash.update(part);
            hash.update(b"\0");
        }
        hash.update(&busybox);
        let key = hex::encode(&hash.finalize()[..12]);
        let parent = cache.join("images");
        fs::create_dir_all(&parent)?;
        let lock = File::create(parent.join("lock"))?;
        lock.lock()?;
        let place = parent.join(&key);
        if !place.is_dir() {
            let work = tempfile::Builder::new()
                .prefix("work-")
                .tempdir_in(&parent)?;
            let done = work.path().join("done");
            progress.step("Making the busybox image");
            make_busybox(&busybox, work.path(), &done.join("busybox"))?;
            progress.step("Making the Debian image");
            make_debian(work.path(), &done.join("debian"))?;
            fs::rename(&done, &place)?;
        }
        Ok(Images {
            layouts: ["busybox", "debian"]
                .into_iter()
                .map(|name| (name, place.join(name)))
                .collect(),
            key,
        })
    }
}

fn make_busybox(busybox: &[u8], work: &Path, layout: &Path) -> Result<()> {
    let tree = work.join("busybox-tree");
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
    fs::write(&program, busybox)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let applets = Command::new("/bin/busybox").arg("--list").output()?;
    for applet in String::from_utf8(applets.stdout)?
        .lines()
        .filter(|name| *name != "busybox")
    {
        symlink("busybox", tree.join("bin").join(applet))?;
    }
    write_layout(
        &tree,
        layout,
        "busybox",
        &json!({"Env": [PATH], "Cmd": ["sh"]}),
    )
}

fn make_debian(work: &Path, layout: &Path) -> Result<()> {
    let tree = work.join("debian-tree");
    let mirror = Mirror::of_this_machine()?;
    run(Command::new("debootstrap")
        .args(["--variant=minbase", &format!("--include={PACKAGES}"), SUITE])
        .arg(&tree)
        .arg(mirror.uri()))?;
    for dir in [
        "usr/share/doc",
        "usr/share/man",
        "usr/share/locale",
        "usr/share/info",
        "var/cache/apt",
        "var/lib/apt/lists",
        "var/log",
    ] {
        let path = tree.join(dir);
        fs::remove_dir_all(&path)?;
        fs::create_dir(&path)?;
    }
    write_layout(
        &tree,
        layout,
        "debian",
        &json!({"Env": [PATH], "Cmd": ["bash"]}),
    )
}

/// Writes an image of one uncompressed layer.
fn write_layout(tree: &Path, layout: &Path, name: &str, process: &Value) -> Result<()> {
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let layer = blobs.join("layer");
    run(Command::new("tar")
        .args([
            "--sort=name",
            "--mtime=@0",
            "--numeric-owner",
            "--xattrs",
            "--xattrs-include=*",
            "-C",
        ])
        .arg(tree)
        .arg("-cf")
        .arg(&layer)
        .arg("."))?;
    let digest = digest_of(&layer)?;
    let size = fs::metadata(&layer)?.len();
    fs::rename(&layer, blobs.join(&digest))?;
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

fn digest_of(path: &Path) -> Result<String> {
    let mut file = File::open(path)?;
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 20];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(hex::encode(hash.finalize())),
            n => hash.update(&buffer[..n]),
        }
    }
}
