//! The guest's kernel and root image, and the manifest that names their hashes.
//!
//! Data only: who uses the files compares the hashes (the shim does so before
//! it hands them to the VMM).

use serde::{Deserialize, Serialize};

/// File name of the manifest in the directory of the assets.
pub const MANIFEST: &str = "manifest.json";

/// What the build of the guest assets produced.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The kernel, an uncompressed ELF file.
    pub kernel: Asset,
    /// The root image, an uncompressed cpio archive.
    pub root: Asset,
    /// SHA-256 of the kernel's complete configuration, in hexadecimal digits.
    pub kernel_config_sha256: String,
}

/// One file, beside the manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asset {
    /// Name without a directory.
    pub file: String,
    /// SHA-256 of the content, in hexadecimal digits.
    pub sha256: String,
    /// Version of what the file was built from, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
}
