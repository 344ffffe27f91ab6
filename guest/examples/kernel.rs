//! Builds the guest kernel into the cache directory given, or finds it there,
//! and says where it is: `cargo run --example kernel -- ~/.cache/bulkhead`.

use std::io::{Write, stderr, stdout};
use std::path::PathBuf;

use anyhow::{Context, Result};
use bulkhead_guest::cache::Cache;
use bulkhead_guest::{Progress, ensure};

/// Steps and counts on standard error.
struct Lines;

impl Progress for Lines {
    fn step(&self, text: &str) {
        // Nobody is served by an error about a progress line.
        let _ = writeln!(stderr(), "{text}");
    }

    fn advance(&self, done: u64, total: u64) {
        if done.is_multiple_of(100) {
            let _ = writeln!(stderr(), "{done} of about {total}");
        }
    }
}

fn main() -> Result<()> {
    let cache: PathBuf = std::env::args_os()
        .nth(1)
        .context("No cache directory given")?
        .into();
    let kernel = ensure(&Cache::at(&cache)?, &Lines)?;
    writeln!(stdout(), "{kernel:#?}")?;
    Ok(())
}
