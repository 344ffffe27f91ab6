//! The cache: artefacts that are made once, found again by the content of what
//! went into them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use bulkhead_tests::lab::cache::Cache;

/// `$XDG_CACHE_HOME/bulkhead`.
pub(crate) fn dir() -> Result<PathBuf> {
    Ok(Cache::of_this_user()?.path().to_owned())
}

#[expect(clippy::print_stdout, reason = "the list is what the command is for")]
pub(crate) fn show(clear: bool) -> Result<()> {
    let dir = dir()?;
    if clear {
        fs::remove_dir_all(&dir).with_context(|| format!("Cannot empty {}", dir.display()))?;
        println!("{} is empty", dir.display());
        return Ok(());
    }
    println!("{}", dir.display());
    let mut entries: Vec<PathBuf> = fs::read_dir(&dir)?
        .filter_map(|entry| Some(entry.ok()?.path()))
        .collect();
    entries.sort();
    for entry in entries {
        let name = entry
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        println!("{:>8} MiB  {name}", size(&entry) >> 20);
    }
    Ok(())
}

/// Bytes on disk of everything below `path`.
fn size(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(metadata) = path.symlink_metadata() else {
        return 0;
    };
    let own = metadata.blocks() * 512;
    if !metadata.is_dir() {
        return own;
    }
    let Ok(entries) = fs::read_dir(path) else {
        return own;
    };
    own + entries
        .filter_map(|entry| Some(size(&entry.ok()?.path())))
        .sum::<u64>()
}
