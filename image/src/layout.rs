//! The documents of an image: index, manifest and configuration of an OCI layout
//! (image-spec 1.1), or the `manifest.json` of `docker save`.
//!
//! Each document's digest is compared before it is parsed.

use std::collections::HashMap;

use serde::{Deserialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};

use crate::{Config, Digest, Error, Result, archive::Source};

/// Deepest nesting of indexes.
const MAX_DEPTH: usize = 4;
/// Most layers: overlayfs takes 500.
const MAX_LAYERS: usize = 500;

/// One layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Layer {
    /// Name of the file.
    pub(crate) file: String,
    /// Digest of the file; `docker save` gives none.
    pub(crate) digest: Option<Digest>,
    /// Digest of the tar in it.
    pub(crate) diff_id: Digest,
}

/// What an image consists of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Description {
    /// Lowest first.
    pub(crate) layers: Vec<Layer>,
    /// Of the process.
    pub(crate) config: Config,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    #[serde(default)]
    media_type: String,
    digest: Digest,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    platform: Option<Platform>,
    #[serde(default)]
    annotations: Option<HashMap<String, String>>,
}

/// What an image is for. What it does not say is taken to be ours: some builders
/// leave it empty.
#[derive(Clone, Debug, Default, Deserialize)]
struct Platform {
    #[serde(default)]
    architecture: Option<String>,
    #[serde(default)]
    os: Option<String>,
}

impl Platform {
    fn is_ours(&self) -> bool {
        let one_of = |value: &Option<String>, known: &[&str]| {
            let value = value.as_deref().unwrap_or_default().to_ascii_lowercase();
            known.contains(&value.as_str())
        };
        one_of(&self.architecture, &["", "amd64", "x86_64", "x86-64"])
            && one_of(&self.os, &["", "linux"])
    }
}

impl std::fmt::Display for Platform {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let word = |value: &Option<String>| value.clone().unwrap_or_else(|| "unknown".to_owned());
        write!(f, "{}/{}", word(&self.os), word(&self.architecture))
    }
}

#[derive(Debug, Deserialize)]
struct Index {
    manifests: Vec<Descriptor>,
}

#[derive(Debug, Deserialize)]
struct Manifest {
    config: Descriptor,
    #[serde(default)]
    layers: Option<Vec<Descriptor>>,
}

#[derive(Debug, Deserialize)]
struct Saved {
    #[serde(rename = "Config")]
    config: String,
    #[serde(rename = "Layers", default)]
    layers: Option<Vec<String>>,
}

#[derive(Debug, Deserialize)]
struct ImageConfig {
    #[serde(flatten)]
    platform: Platform,
    #[serde(default)]
    config: Option<ProcessConfig>,
    rootfs: RootFs,
}

#[derive(Debug, Deserialize)]
struct RootFs {
    #[serde(default)]
    diff_ids: Option<Vec<Digest>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase", default)]
struct ProcessConfig {
    env: Option<Vec<String>>,
    entrypoint: Option<Vec<String>>,
    cmd: Option<Vec<String>>,
    user: Option<String>,
    working_dir: Option<String>,
}

/// Reads the documents of an image.
pub(crate) fn describe(source: &Source) -> Result<Description> {
    if let Some(text) = source.document("index.json")? {
        let index: Index = parse("index.json", &text)?;
        let manifest = select(source, index.manifests, 0)?;
        return of_manifest(source, &manifest);
    }
    if let Some(text) = source.document("manifest.json")? {
        return of_saved(source, parse("manifest.json", &text)?);
    }
    let reason = "it has neither an index.json nor a manifest.json".to_owned();
    Err(Error::NoImage {
        path: source.path().to_owned(),
        reason,
    })
}

fn refuse(what: &str, reason: impl Into<String>) -> Error {
    Error::Document {
        what: what.to_owned(),
        reason: reason.into(),
    }
}

fn parse<T: DeserializeOwned>(what: &str, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|error| refuse(what, error.to_string()))
}

/// Finds the one image for linux/amd64.
fn select(source: &Source, descriptors: Vec<Descriptor>, depth: usize) -> Result<Descriptor> {
    let mut others = Vec::new();
    let mut found: Vec<Descriptor> = Vec::new();
    for descriptor in descriptors {
        match &descriptor.platform {
            Some(platform) if !platform.is_ours() => {
                others.push(platform.to_string());
            }
            // The same image under two names is one.
            _ if found.iter().any(|known| known.digest == descriptor.digest) => {}
            _ => found.push(descriptor),
        }
    }
    let descriptor = match found.len() {
        0 if others.is_empty() => return Err(refuse("index", "it names no image")),
        0 => {
            return Err(refuse(
                "index",
                format!(
                    "none of its images is for linux/amd64, only for {}",
                    others.join(", ")
                ),
            ));
        }
        1 => found.swap_remove(0),
        count => {
            let name = |descriptor: &Descriptor| {
                let name = descriptor
                    .annotations
                    .as_ref()?
                    .get("org.opencontainers.image.ref.name")?;
                Some(name.clone())
            };
            let names: Vec<String> = found.iter().filter_map(name).take(10).collect();
            let reason = format!(
                "it holds {count} images ({}); save one only",
                names.join(", ")
            );
            return Err(refuse("index", reason));
        }
    };
    let is_index = descriptor.media_type.ends_with(".image.index.v1+json")
        || descriptor.media_type.ends_with(".manifest.list.v2+json");
    if !is_index {
        return Ok(descriptor);
    }
    if depth == MAX_DEPTH {
        return Err(refuse(
            "index",
            format!("indexes are nested deeper than {MAX_DEPTH}"),
        ));
    }
    let text = blob(source, "index", &descriptor)?;
    let index: Index = parse("index", &text)?;
    select(source, index.manifests, depth + 1)
}

/// Reads a document by its digest.
fn blob(source: &Source, what: &str, descriptor: &Descriptor) -> Result<Vec<u8>> {
    let file = file_of(&descriptor.digest);
    let Some(text) = source.document(&file)? else {
        return Err(refuse(what, format!("{file} is missing from the image")));
    };
    if let Some(size) = descriptor.size
        && u64::try_from(text.len()) != Ok(size)
    {
        return Err(refuse(
            what,
            format!("{file} has {} bytes, but should have {size}", text.len()),
        ));
    }
    verify(what, &text, &descriptor.digest)?;
    Ok(text)
}

fn file_of(digest: &Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn verify(what: &str, text: &[u8], expected: &Digest) -> Result<()> {
    let found = hex::encode(Sha256::digest(text));
    if found == expected.hex() {
        return Ok(());
    }
    Err(Error::Digest {
        what: what.to_owned(),
        found: format!("sha256:{found}"),
        expected: expected.to_string(),
    })
}

fn of_manifest(source: &Source, descriptor: &Descriptor) -> Result<Description> {
    let manifest: Manifest = parse("manifest", &blob(source, "manifest", descriptor)?)?;
    let config = blob(source, "configuration", &manifest.config)?;
    let files = manifest.layers.unwrap_or_default();
    let files = files
        .into_iter()
        .map(|layer| (file_of(&layer.digest), Some(layer.digest)))
        .collect();
    join(&config, files)
}

fn of_saved(source: &Source, mut saved: Vec<Saved>) -> Result<Description> {
    let image = match saved.len() {
        1 => saved.swap_remove(0),
        count => {
            return Err(refuse(
                "manifest.json",
                format!("it holds {count} images; save one only"),
            ));
        }
    };
    let Some(config) = source.document(&image.config)? else {
        return Err(refuse(
            "manifest.json",
            format!("{:?} is missing from the image", image.config),
        ));
    };
    // The name of the configuration is its digest.
    let stem = image.config.rsplit('/').next().unwrap_or_default();
    if let Ok(digest) = Digest::try_from(format!(
        "sha256:{}",
        stem.strip_suffix(".json").unwrap_or(stem)
    )) {
        verify("configuration", &config, &digest)?;
    }
    join(
        &config,
        image
            .layers
            .unwrap_or_default()
            .into_iter()
            .map(|file| (file, None))
            .collect(),
    )
}

/// Joins the layers' files with what the configuration says of them.
fn join(config: &[u8], files: Vec<(String, Option<Digest>)>) -> Result<Description> {
    let config: ImageConfig = parse("configuration", config)?;
    if !config.platform.is_ours() {
        let platform = &config.platform;
        let reason = format!("it is for {platform}, but this host runs linux/amd64");
        return Err(refuse("configuration", reason));
    }
    let diff_ids = config.rootfs.diff_ids.unwrap_or_default();
    if diff_ids.len() != files.len() {
        let reason = format!(
            "it names {} layers, the manifest {}",
            diff_ids.len(),
            files.len()
        );
        return Err(refuse("configuration", reason));
    }
    if files.len() > MAX_LAYERS {
        return Err(refuse(
            "manifest",
            format!("{} layers are more than {MAX_LAYERS}", files.len()),
        ));
    }
    let layers = files.into_iter().zip(diff_ids);
    let layers = layers
        .map(|((file, digest), diff_id)| Layer {
            file,
            digest,
            diff_id,
        })
        .collect();
    let process = config.config.unwrap_or_default();
    let env = process.env.unwrap_or_default();
    let words = env
        .iter()
        .chain(process.entrypoint.iter().flatten())
        .chain(process.cmd.iter().flatten());
    if words.into_iter().any(|word| word.contains('\0')) {
        return Err(refuse(
            "configuration",
            "a word of its process contains NUL",
        ));
    }
    Ok(Description {
        layers,
        config: Config {
            env: env
                .into_iter()
                .filter(|entry| entry.contains('='))
                .collect(),
            entrypoint: process.entrypoint.unwrap_or_default(),
            cmd: process.cmd.unwrap_or_default(),
            user: process.user.unwrap_or_default(),
            working_dir: process.working_dir.unwrap_or_default(),
        },
    })
}
