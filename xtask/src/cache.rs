//! `cargo xtask cache`: what is kept, and how it is forgotten.

use std::{
    fmt::Write as _,
    fs,
    io::{Write as _, stdout},
    path::{Path, PathBuf},
};

use anyhow::Result;
use bulkhead_guest::cache::Cache;

/// Removes entries if that is wanted, and lists what there is.
pub(crate) fn show(kept: Option<usize>) -> Result<()> {
    let cache = Cache::of_this_user()?;
    if let Some(kept) = kept {
        cache.prune(kept)?;
    }
    stdout().write_all(list(cache.path())?.as_bytes())?;
    Ok(())
}

/// Each kind, with its size and the number of its entries.
fn list(dir: &Path) -> Result<String> {
    let mut text = format!("{}\n", dir.display());
    let mut kinds = children(dir)?;
    kinds.sort();
    for kind in kinds {
        let name = kind.file_name().unwrap_or_default().to_string_lossy();
        let entries = children(&kind).unwrap_or_default();
        let entries = entries.iter().filter(|path| path.is_dir()).count();
        // Writing to a text cannot fail.
        let _ = writeln!(text, "{:>8} MiB {entries:>3}  {name}", size(&kind) >> 20);
    }
    Ok(text)
}

fn children(dir: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(dir)?.map(|entry| Ok(entry?.path())).collect()
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
    let below = children(path).unwrap_or_default();
    own + below.iter().map(|path| size(path)).sum::<u64>()
}
