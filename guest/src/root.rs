//! The guest's root image, and the manifest of the guest's assets.
//!
//! The image is the agent as `/init` and the few directories and nodes that a
//! kernel needs before the agent has mounted anything: an uncompressed cpio
//! archive (unpacking it is a copy). The same agent gives the same bytes.
//!
//! The manifest names kernel and image with their hashes; the shim compares
//! them before a pod starts.
//!
//! Never reads anything of the building machine but the files it is given.

mod manifest;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use sha2::{Digest, Sha256};

pub use self::manifest::write_manifest;

use crate::cpio::{Archive, Kind};

/// A guest root image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// The archive.
    pub path: PathBuf,
    /// SHA-256 of the file, in hexadecimal digits.
    pub sha256: String,
    /// Length of the file in bytes.
    pub len: u64,
}

/// Makes the image `out` with the program `agent` as `/init`.
///
/// # Errors
///
/// `agent` cannot be read or is not a program that runs without an interpreter
/// and libraries, or `out` cannot be written.
pub fn build(agent: &Path, out: &Path) -> Result<Image> {
    let program = fs::read(agent).with_context(|| format!("Cannot read {}", agent.display()))?;
    ensure_static(&program).with_context(|| format!("{} cannot be PID 1", agent.display()))?;
    let bytes = contents(&program)?;
    fs::write(out, &bytes).with_context(|| format!("Cannot write {}", out.display()))?;
    Ok(Image {
        path: out.to_owned(),
        sha256: sha256(&bytes),
        len: bytes.len() as u64,
    })
}

/// The archive with `agent` as its one program.
fn contents(agent: &[u8]) -> Result<Vec<u8>> {
    let mut archive = Archive::default();
    for (name, mode) in [
        ("dev", 0o755),
        ("proc", 0o555),
        ("run", 0o755),
        ("sys", 0o555),
        ("tmp", 0o1777),
    ] {
        archive.add(name, mode, Kind::Directory)?;
    }
    // The kernel opens /dev/console for PID 1; whatever runs before devtmpfs is
    // mounted finds /dev/null.
    archive.add(
        "dev/console",
        0o600,
        Kind::CharacterDevice { major: 5, minor: 1 },
    )?;
    archive.add(
        "dev/null",
        0o666,
        Kind::CharacterDevice { major: 1, minor: 3 },
    )?;
    archive.add("init", 0o755, Kind::File(agent))?;
    Ok(archive.finish())
}

/// Refuses a program that the kernel alone cannot run: there is no dynamic
/// loader in the image.
fn ensure_static(program: &[u8]) -> Result<()> {
    // System V ABI, ELF-64: e_phoff at 32, e_phentsize at 54, e_phnum at 56.
    const PT_INTERP: u32 = 3;
    ensure!(
        program.starts_with(b"\x7fELF\x02\x01"),
        "Not an ELF-64 little-endian program"
    );
    let number = |at: usize, len: usize| -> Result<u64> {
        let bytes = program
            .get(at..at + len)
            .context("The ELF headers are cut off")?;
        Ok(bytes
            .iter()
            .rev()
            .fold(0, |value, byte| value << 8 | u64::from(*byte)))
    };
    let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    for n in 0..count {
        let at = table
            .checked_add(n * size)
            .context("The ELF headers are cut off")?;
        let kind = number(usize::try_from(at)?, 4)?;
        ensure!(
            kind != u64::from(PT_INTERP),
            "It is linked dynamically; build it with a static C library"
        );
    }
    Ok(())
}

/// SHA-256 of `bytes`, in hexadecimal digits.
fn sha256(bytes: &[u8]) -> String {
    hex::encode(Sha256::digest(bytes))
}

#[cfg(test)]
mod tests;
