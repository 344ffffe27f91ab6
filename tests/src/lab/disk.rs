//! The second disk: what is fresh in each call.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::system::as_root;
use bulkhead_guest::command::{clean, output};

/// Size in MiB. It must be the same when the machine is saved and when it is
/// restored; the file is sparse.
const SIZE_MIB: u32 = 4096;

/// What lies on the second disk, at `/lab` in the lab host.
///
/// ```text
/// labd             the program that runs jobs
/// root/            copied over the lab host's root before the first job
/// tests/           test executables
/// with/            whatever a person added
/// ```
#[derive(Clone, Debug, Default)]
pub struct Contents {
    /// Path on the disk, and the file or directory of this machine.
    files: Vec<(PathBuf, PathBuf)>,
    /// Path on the disk, and a directory of this machine whose files it gets.
    merged: Vec<(PathBuf, PathBuf)>,
    /// Path on the disk, text and mode.
    texts: Vec<(PathBuf, String, u32)>,
}

impl Contents {
    /// Adds the file or directory `from` of this machine as `path`.
    #[must_use]
    pub fn with(mut self, path: impl Into<PathBuf>, from: impl Into<PathBuf>) -> Contents {
        self.files.push((path.into(), from.into()));
        self
    }

    /// Adds what is in the directory `from` of this machine to the directory `path`.
    #[must_use]
    pub(crate) fn with_content(mut self, path: &str, from: PathBuf) -> Contents {
        self.merged.push((path.into(), from));
        self
    }

    /// Adds a file with this text and mode as `path`.
    #[must_use]
    pub(crate) fn with_file(mut self, path: &str, text: &str, mode: u32) -> Contents {
        self.texts.push((path.into(), text.to_owned(), mode));
        self
    }

    /// Writes the disk to the file `out`.
    pub(crate) fn write(&self, out: &Path) -> Result<()> {
        let tree = tempfile::Builder::new()
            .prefix("disk-")
            .tempdir_in(out.parent().context("A disk lies in a directory")?)?;
        fs::set_permissions(tree.path(), fs::Permissions::from_mode(0o755))?;
        let place = |path: &Path| -> Result<PathBuf> {
            let path = tree.path().join(path);
            if let Some(folder) = path.parent() {
                fs::create_dir_all(folder)?;
            }
            Ok(path)
        };
        // Files are linked where they can be: nothing is copied twice.
        let copy = |from: &Path, to: &Path| {
            output(clean("cp").args(["-RLlf"]).arg(from).arg(to))
                .or_else(|_| output(clean("cp").args(["-RL"]).arg(from).arg(to)))
                .map(drop)
        };
        for (path, from) in &self.files {
            copy(from, &place(path)?)?;
        }
        for (path, from) in &self.merged {
            let to = place(path)?;
            fs::create_dir_all(&to)?;
            copy(&from.join("."), &to)?;
        }
        for (path, text, mode) in &self.texts {
            let path = place(path)?;
            File::create(&path)?.write_all(text.as_bytes())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode))?;
        }
        output(
            as_root("mke2fs")
                .args(["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-m", "0"])
                .args(["-E", "root_owner=0:0,lazy_itable_init=1"])
                .arg("-d")
                .arg(tree.path())
                .arg(out)
                .arg(format!("{SIZE_MIB}M")),
        )?;
        Ok(())
    }
}
