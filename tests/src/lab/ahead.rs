//! What is installed from Debian packages, made before it is needed.

use std::thread;

use anyhow::Result;
use bulkhead_guest::Progress;
use bulkhead_guest::cache::Cache;

use super::{image, root, system};

/// Begins to make what is missing of the images and of the lab host's root disk. They
/// wait for network and disk for most of the time: compilers can run meanwhile. Whether
/// a lab host will be needed is known only when these have done their work.
///
/// Whoever needs one of them waits for it, and makes it again if that has failed: nothing
/// is lost by not looking after it.
///
/// # Errors
///
/// Something is missing, and this user cannot make it.
pub fn begin(cache: &Cache, progress: impl Progress + Send + 'static) -> Result<()> {
    let no_image = image::find(cache)?.iter().any(|(_, entry)| entry.is_none());
    if !no_image && root::find(cache)?.is_some() {
        return Ok(());
    }
    system::can_be_made()?;
    let cache = cache.clone();
    thread::spawn(move || -> Result<()> {
        image::images(&cache, &progress)?;
        root::ensure(&cache, &progress).map(drop)
    });
    Ok(())
}
