//! Images of any shape, made by hand: OCI layouts and archives, and what `docker save`
//! writes, from layers in any compression.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::{Builder, EntryType, Header};

use crate::BUSYBOX;

/// How the bytes of a layer are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// As they are.
    Plain,
    /// By gzip.
    Gzip,
    /// By Zstandard.
    Zstd,
}

/// A layer: an archive that grows entry by entry.
pub struct Layer(Builder<Vec<u8>>);

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").finish_non_exhaustive()
    }
}

impl Default for Layer {
    fn default() -> Layer {
        Layer(Builder::new(Vec::new()))
    }
}

impl Layer {
    /// An empty one.
    #[must_use]
    pub fn new() -> Layer {
        Layer::default()
    }

    fn entry(mut self, kind: EntryType, path: &str, mode: u32, link: &str, data: &[u8]) -> Layer {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(mode);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        if !link.is_empty() {
            header.set_link_name_literal(link).expect("a short name");
        }
        // Not `set_path`, which refuses what others write.
        let name = path.as_bytes();
        header.as_old_mut().name[..name.len()].copy_from_slice(name);
        header.set_cksum();
        self.0.append(&header, data).expect("memory");
        self
    }

    /// Adds a directory.
    #[must_use]
    pub fn dir(self, path: &str, mode: u32) -> Layer {
        self.entry(EntryType::Directory, path, mode, "", &[])
    }

    /// Adds a file.
    #[must_use]
    pub fn file(self, path: &str, data: impl AsRef<[u8]>) -> Layer {
        self.entry(EntryType::Regular, path, 0o644, "", data.as_ref())
    }

    /// Adds a symbolic link.
    #[must_use]
    pub fn symlink(self, path: &str, target: &str) -> Layer {
        self.entry(EntryType::Symlink, path, 0o777, target, &[])
    }

    /// Adds another name of a file.
    #[must_use]
    pub fn link(self, path: &str, target: &str) -> Layer {
        self.entry(EntryType::Link, path, 0o644, target, &[])
    }

    /// Says that a name of the layers below is gone.
    #[must_use]
    pub fn whiteout(self, path: &str) -> Layer {
        let (parent, name) = path.rsplit_once('/').unwrap_or((".", path));
        self.file(&format!("{parent}/.wh.{name}"), "")
    }

    /// Says that a directory hides all that lies in it below.
    #[must_use]
    pub fn opaque(self, path: &str) -> Layer {
        self.file(&format!("{path}/.wh..wh..opq"), "")
    }

    fn bytes(self) -> Vec<u8> {
        self.0.into_inner().expect("memory")
    }
}

/// An image that is being put together.
#[derive(Clone, Debug)]
pub struct Image {
    /// The archive of each layer, and how it is packed.
    layers: Vec<(Vec<u8>, Form)>,
    process: Value,
}

impl Image {
    /// The busybox image, to which layers can be added.
    ///
    /// # Panics
    /// If the lab host has none.
    #[must_use]
    pub fn busybox() -> Image {
        let blobs = Path::new(BUSYBOX).join("blobs/sha256");
        let layer = fs::read_dir(blobs)
            .expect("the lab host has the image")
            .flatten()
            .max_by_key(|blob| blob.metadata().map_or(0, |meta| meta.len()))
            .expect("the image has a layer");
        let bytes = fs::read(layer.path()).expect("it can be read");
        Image {
            layers: vec![(bytes, Form::Plain)],
            process: json!({"Cmd": ["sh"], "Env": ["PATH=/bin"]}),
        }
    }

    /// Adds a layer.
    #[must_use]
    pub fn layer(mut self, layer: Layer, form: Form) -> Image {
        self.layers.push((layer.bytes(), form));
        self
    }

    /// Sets a field of the image's `config`.
    #[must_use]
    pub fn set(mut self, field: &str, value: Value) -> Image {
        self.process[field] = value;
        self
    }

    fn config(&self) -> Vec<u8> {
        let ids: Vec<String> = self.layers.iter().map(|(bytes, _)| digest(bytes)).collect();
        json!({
            "architecture": "amd64", "os": "linux", "config": self.process,
            "rootfs": {"type": "layers", "diff_ids": ids},
        })
        .to_string()
        .into_bytes()
    }

    /// Writes an OCI image layout into the directory `to`. Its name in containerd is
    /// `name`.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_layout(&self, to: &Path, name: &str) {
        let blobs = to.join("blobs/sha256");
        fs::create_dir_all(&blobs).expect("a directory");
        let put = |bytes: &[u8], kind: &str| {
            let digest = digest(bytes);
            fs::write(blobs.join(&digest["sha256:".len()..]), bytes).expect("a blob");
            json!({
                "mediaType": format!("application/vnd.oci.image.{kind}"),
                "digest": digest, "size": bytes.len(),
            })
        };
        let layers: Vec<Value> = self
            .layers
            .iter()
            .map(|(bytes, form)| match form {
                Form::Plain => put(bytes, "layer.v1.tar"),
                Form::Gzip => put(&pack(bytes, *form), "layer.v1.tar+gzip"),
                Form::Zstd => put(&pack(bytes, *form), "layer.v1.tar+zstd"),
            })
            .collect();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": put(&self.config(), "config.v1+json"), "layers": layers,
        });
        let mut entry = put(manifest.to_string().as_bytes(), "manifest.v1+json");
        entry["annotations"] = json!({"io.containerd.image.name": name});
        let index = json!({"schemaVersion": 2, "manifests": [entry]});
        let version = json!({"imageLayoutVersion": "1.0.0"});
        fs::write(to.join("index.json"), index.to_string()).expect("the index");
        fs::write(to.join("oci-layout"), version.to_string()).expect("the version");
    }

    /// Writes an archive of the OCI image layout.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_archive(&self, to: &Path, name: &str) {
        let layout = tempfile::tempdir().expect("a directory");
        self.write_layout(layout.path(), name);
        let mut archive = Builder::new(File::create(to).expect("a file"));
        archive
            .append_dir_all(".", layout.path())
            .and_then(|()| archive.finish())
            .expect("an archive");
    }

    /// Writes what `docker save` wrote before it wrote OCI layouts.
    ///
    /// # Panics
    /// If it cannot be written.
    pub fn write_docker_save(&self, to: &Path, name: &str) {
        let mut archive = Builder::new(File::create(to).expect("a file"));
        let mut put = |path: &str, bytes: &[u8]| {
            let mut header = Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            archive
                .append_data(&mut header, path, bytes)
                .expect("an entry");
        };
        let hex = |bytes: &[u8]| digest(bytes)["sha256:".len()..].to_owned();
        let mut places = Vec::new();
        for (bytes, _) in &self.layers {
            let place = format!("{}/layer.tar", hex(bytes));
            put(&place, bytes);
            places.push(place);
        }
        let config = self.config();
        let config_place = format!("{}.json", hex(&config));
        put(&config_place, &config);
        let manifest = json!([{"Config": config_place, "RepoTags": [name], "Layers": places}]);
        put("manifest.json", manifest.to_string().as_bytes());
        archive.finish().expect("an archive");
    }

    /// Makes it known to containerd under `name`, until this is dropped.
    ///
    /// # Panics
    /// If containerd refuses it.
    #[must_use]
    pub fn import(&self, name: &str) -> Imported {
        let folder = tempfile::tempdir().expect("a directory");
        let archive = folder.path().join("image.tar");
        self.write_archive(&archive, name);
        let archive = archive.to_str().expect("a plain name");
        super::command::Command::new("ctr", ["images", "import", archive])
            .run()
            .success();
        Imported(name.to_owned())
    }
}

/// An image in containerd; removed when dropped.
#[derive(Debug)]
pub struct Imported(String);

impl Imported {
    /// Its name there.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.0
    }
}

impl Drop for Imported {
    fn drop(&mut self) {
        let remove = ["images", "rm", "--sync", &self.0];
        let _ = super::command::Command::new("ctr", remove).run();
    }
}

/// Places for images of a test; they go with it.
#[derive(Debug)]
pub struct Folder(tempfile::TempDir);

impl Folder {
    /// A new one.
    ///
    /// # Panics
    /// If there is no room.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> Folder {
        Folder(tempfile::tempdir().expect("a directory"))
    }

    /// A path in it, as text.
    ///
    /// # Panics
    /// If the path is not UTF-8.
    #[must_use]
    pub fn place(&self, name: &str) -> String {
        let path: PathBuf = self.0.path().join(name);
        path.to_str().expect("a plain name").to_owned()
    }
}

fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex::encode(Sha256::digest(bytes)))
}

fn pack(bytes: &[u8], form: Form) -> Vec<u8> {
    match form {
        Form::Plain => bytes.to_vec(),
        Form::Gzip => {
            let mut packed = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            packed.write_all(bytes).expect("memory");
            packed.finish().expect("memory")
        }
        Form::Zstd => zstd::encode_all(bytes, 1).expect("memory"),
    }
}
