//! Whole images, real file systems: what images and their trees are made and seen with.

mod documents;
mod hostile;
mod layers;
mod sparse;
mod store;

use std::{
    fs::{self, File},
    io::Write,
    os::{
        fd::AsRawFd,
        unix::{ffi::OsStrExt, fs::MetadataExt},
    },
    path::Path,
    sync::atomic::AtomicBool,
};

use sha2::{Digest as _, Sha256};

use super::*;

/// The time of all entries that give none.
pub(crate) const THEN: i64 = 1_000_000_000;

/// One entry of a tar, written without the checks of a builder.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) name: Vec<u8>,
    /// As in the header.
    pub(crate) letter: u8,
    pub(crate) link: Vec<u8>,
    pub(crate) content: Vec<u8>,
    pub(crate) mode: i64,
    pub(crate) owner: (i64, i64),
    pub(crate) mtime: i64,
    pub(crate) device: (i64, i64),
    /// `ustar\0` and its version, or what another tar writes there.
    pub(crate) magic: [u8; 8],
    /// Records of an extended header before it.
    pub(crate) pax: Vec<(String, Vec<u8>)>,
}

pub(crate) fn item(name: impl AsRef<[u8]>, letter: u8) -> Item {
    Item {
        name: name.as_ref().to_vec(),
        letter,
        link: vec![],
        content: vec![],
        mode: if letter == b'5' { 0o755 } else { 0o644 },
        owner: (0, 0),
        mtime: THEN,
        device: (0, 0),
        magic: *b"ustar\x0000",
        pax: vec![],
    }
}

pub(crate) fn file(name: &str, content: &str) -> Item {
    Item {
        content: content.into(),
        ..item(name, b'0')
    }
}

pub(crate) fn dir(name: &str) -> Item {
    item(name, b'5')
}

pub(crate) fn hard(name: &str, target: &str) -> Item {
    Item {
        link: target.into(),
        ..item(name, b'1')
    }
}

pub(crate) fn soft(name: &str, target: &str) -> Item {
    Item {
        link: target.into(),
        ..item(name, b'2')
    }
}

impl Item {
    pub(crate) fn mode(self, mode: i64) -> Self {
        Item { mode, ..self }
    }

    pub(crate) fn owner(self, uid: i64, gid: i64) -> Self {
        Item {
            owner: (uid, gid),
            ..self
        }
    }

    pub(crate) fn mtime(self, mtime: i64) -> Self {
        Item { mtime, ..self }
    }

    pub(crate) fn pax(mut self, key: &str, value: impl AsRef<[u8]>) -> Self {
        self.pax.push((key.to_owned(), value.as_ref().to_vec()));
        self
    }
}

/// A numeric field: octal if it fits, else base 256.
pub(crate) fn put(field: &mut [u8], value: i64) {
    let digits = field.len() - 1;
    if value >= 0 && (digits >= 21 || value < 1 << (3 * digits)) {
        let text = format!("{value:0digits$o}\0");
        field.copy_from_slice(text.as_bytes());
        return;
    }
    let bytes = i128::from(value).to_be_bytes();
    let start = bytes.len() - field.len();
    field.copy_from_slice(&bytes[start..]);
    field[0] = if value < 0 { 0xff } else { 0x80 };
}

/// Sets the sum of a header.
pub(crate) fn seal(header: &mut [u8; 512]) {
    header[148..156].fill(b' ');
    let sum: i64 = header.iter().map(|byte| i64::from(*byte)).sum();
    header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

/// The header of an entry, unsealed.
pub(crate) fn header(item: &Item) -> [u8; 512] {
    let mut header = [0; 512];
    let count = item.name.len().min(100);
    header[..count].copy_from_slice(&item.name[..count]);
    put(&mut header[100..108], item.mode);
    put(&mut header[108..116], item.owner.0);
    put(&mut header[116..124], item.owner.1);
    put(
        &mut header[124..136],
        i64::try_from(item.content.len()).unwrap(),
    );
    put(&mut header[136..148], item.mtime);
    header[156] = item.letter;
    let count = item.link.len().min(100);
    header[157..157 + count].copy_from_slice(&item.link[..count]);
    header[257..265].copy_from_slice(&item.magic);
    if item.magic != [0; 8] {
        put(&mut header[329..337], item.device.0);
        put(&mut header[337..345], item.device.1);
    }
    header
}

pub(crate) fn padded(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().next_multiple_of(512), 0);
    bytes
}

/// Entries without the end of an archive.
pub(crate) fn entries(items: &[Item]) -> Vec<u8> {
    let mut tar = Vec::new();
    for item in items {
        let mut pax = item.pax.clone();
        if item.name.len() > 100 {
            pax.push(("path".to_owned(), item.name.clone()));
        }
        if item.link.len() > 100 {
            pax.push(("linkpath".to_owned(), item.link.clone()));
        }
        if !pax.is_empty() {
            let records: Vec<u8> = pax
                .iter()
                .flat_map(|(key, value)| record(key, value))
                .collect();
            let before = Item {
                content: records,
                ..self::item("pax", b'x')
            };
            tar.extend(entries(&[before]));
        }
        let mut header = header(item);
        seal(&mut header);
        tar.extend(header);
        tar.extend(padded(&item.content));
    }
    tar
}

/// A record of an extended header: its length counts its own digits.
fn record(key: &str, value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    [format!("{length} {key}=").as_bytes(), value, b"\n"].concat()
}

pub(crate) fn tar_of(items: &[Item]) -> Vec<u8> {
    let mut tar = entries(items);
    tar.resize(tar.len() + 1024, 0);
    tar
}

pub(crate) fn hex(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

/// Owners, devices and overlays are root's.
pub(crate) fn is_root() -> bool {
    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        eprintln!("skipped: needs root");
    }
    is_root
}

/// A directory for what is unpacked: on a file system that keeps attributes of root
/// and can be under an overlay, which in a container the root's often is not.
pub(crate) fn scratch() -> tempfile::TempDir {
    let made = ["/var/tmp", "/tmp", "/dev/shm"].map(tempfile::tempdir_in);
    let mut fit = made.into_iter().flatten().filter(|dir| {
        let is_overlay = rustix::fs::statfs(dir.path()).unwrap().f_type == crate::OVERLAYFS;
        let name = match rustix::process::geteuid().is_root() {
            true => c"trusted.test",
            false => c"user.test",
        };
        let flags = rustix::fs::XattrFlags::empty();
        !is_overlay && rustix::fs::setxattr(dir.path(), name, b"1", flags).is_ok()
    });
    fit.next()
        .expect("/var/tmp, /tmp or /dev/shm with extended attributes and no overlay")
}

/// An image layout in the making.
pub(crate) struct Layout {
    pub(crate) dir: tempfile::TempDir,
}

impl Layout {
    pub(crate) fn new() -> Self {
        let dir = scratch();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        Layout { dir }
    }

    pub(crate) fn path(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn store(&self) -> PathBuf {
        self.path().join("store")
    }

    pub(crate) fn blob(&self, bytes: &[u8]) -> String {
        fs::write(self.path().join("blobs/sha256").join(hex(bytes)), bytes).unwrap();
        format!("sha256:{}", hex(bytes))
    }

    /// Adds an image; `layers` are files with the digests of their tars.
    pub(crate) fn image(
        &self,
        layers: &[(Vec<u8>, String)],
        architecture: Option<&str>,
    ) -> serde_json::Value {
        let diff_ids: Vec<&String> = layers.iter().map(|(_, diff_id)| diff_id).collect();
        let mut config = serde_json::json!({
            "config": {"Env": ["A=1"], "Cmd": ["sh"], "Entrypoint": null, "WorkingDir": "/w", "User": "7"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        if let Some(architecture) = architecture {
            config["architecture"] = architecture.into();
            config["os"] = "linux".into();
        }
        let config = self.blob(config.to_string().as_bytes());
        let layers: Vec<_> = layers
            .iter()
            .map(|(bytes, _)| serde_json::json!({"digest": self.blob(bytes), "size": bytes.len()}))
            .collect();
        let manifest =
            serde_json::json!({"schemaVersion": 2, "config": {"digest": config}, "layers": layers});
        serde_json::json!({"digest": self.blob(manifest.to_string().as_bytes())})
    }

    pub(crate) fn index(&self, manifests: &[serde_json::Value]) {
        let index = serde_json::json!({"schemaVersion": 2, "manifests": manifests});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// A layout of one image with these tars as layers.
    pub(crate) fn of(tars: &[Vec<u8>]) -> Self {
        let layout = Layout::new();
        let layers: Vec<_> = tars
            .iter()
            .map(|tar| (tar.clone(), format!("sha256:{}", hex(tar))))
            .collect();
        layout.index(&[layout.image(&layers, Some("amd64"))]);
        layout
    }

    pub(crate) fn open(&self) -> Result<Image> {
        open(self.path(), &self.store(), &(), &AtomicBool::new(false))
    }
}

/// The merged tree of an image with these layers, one line each file.
pub(crate) fn tree_of(tars: &[Vec<u8>]) -> Result<String> {
    let image = Layout::of(tars);
    let layers = image.open()?.layers;
    Ok(picture(&layers))
}

/// `PATH KINDMODE UID:GID`, followed by content or target, further names, attributes,
/// and the time if it is not [`THEN`]: `@SECONDS`, `@now` if the test made it.
pub(crate) fn picture(layers: &[PathBuf]) -> String {
    let scratch = tempfile::tempdir().unwrap();
    let tree = stack::open(layers, scratch.path()).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}/.", tree.as_raw_fd()));
    let mut lines = Vec::new();
    let mut rest = vec![root.clone()];
    while let Some(path) = rest.pop() {
        let meta = fs::symlink_metadata(&path).unwrap();
        let name =
            String::from_utf8_lossy(path.strip_prefix(&root).unwrap().as_os_str().as_bytes())
                .into_owned();
        let kind = meta.file_type();
        let (letter, detail) = if kind.is_dir() {
            rest.extend(
                fs::read_dir(&path)
                    .unwrap()
                    .map(|entry| entry.unwrap().path()),
            );
            ('d', String::new())
        } else if kind.is_symlink() {
            (
                'l',
                format!(" -> {}", fs::read_link(&path).unwrap().display()),
            )
        } else if kind.is_file() {
            let text = fs::read(&path).unwrap();
            ('-', format!(" {:?}", String::from_utf8_lossy(&text)))
        } else {
            let device = meta.rdev();
            let letter = match rustix::fs::FileType::from_raw_mode(meta.mode()) {
                rustix::fs::FileType::Fifo => 'p',
                rustix::fs::FileType::BlockDevice => 'b',
                _ => 'c',
            };
            let (major, minor) = (rustix::fs::major(device), rustix::fs::minor(device));
            (letter, format!(" {major},{minor}"))
        };
        let mut line = format!(
            "/{name} {letter}{:o} {}:{}{detail}",
            meta.mode() & 0o7777,
            meta.uid(),
            meta.gid()
        );
        if !kind.is_dir() && meta.nlink() > 1 {
            line.push_str(&format!(" x{}", meta.nlink()));
        }
        let mut list = Vec::with_capacity(4096);
        let _ = rustix::fs::llistxattr(&path, rustix::buffer::spare_capacity(&mut list));
        for name in list
            .split(|byte| *byte == 0)
            .filter(|name| !name.is_empty())
        {
            line.push_str(&format!(" [{}]", String::from_utf8_lossy(name)));
        }
        match (meta.mtime(), meta.mtime_nsec()) {
            (THEN, 0) => {}
            (seconds, _) if seconds > 1_750_000_000 => line.push_str(" @now"),
            (seconds, 0) => line.push_str(&format!(" @{seconds}")),
            (seconds, nanoseconds) => line.push_str(&format!(" @{seconds}.{nanoseconds:09}")),
        }
        lines.push(line);
    }
    lines.sort();
    lines.join("\n")
}

/// Compares the merged tree of layers with what it should be, without the root.
#[track_caller]
pub(crate) fn check(layers: &[&[Item]], expected: &str) {
    let tars: Vec<_> = layers.iter().map(|items| tar_of(items)).collect();
    let seen = tree_of(&tars).unwrap();
    let seen: Vec<&str> = seen
        .lines()
        .filter(|line| !line.starts_with("/ "))
        .collect();
    let expected: Vec<&str> = expected
        .lines()
        .map(str::trim)
        .filter(|line| !line.is_empty())
        .collect();
    assert_eq!(seen, expected);
}

/// Unpacks one layer onto a directory.
pub(crate) fn unpack_on(tar: &[u8], root: &Path) -> Result<unpack::Rest> {
    unpack::unpack(tar, File::open(root).unwrap().into(), "sha256:test")
}
