//! Opening what callers name: FIFOs and log files.

use std::{
    fs::{DirBuilder, File},
    io,
    os::{
        fd::OwnedFd,
        unix::fs::{DirBuilderExt, OpenOptionsExt},
    },
    path::Path,
};

use rustix::fs::{FileType, Mode, OFlags};

use super::target::refused;
use crate::error::{Error, Result};

/// Opens a FIFO in one direction, without waiting for the other end.
pub(super) fn open_fifo(path: &Path, direction: OFlags) -> Result<OwnedFd> {
    let failed = |error: io::Error| Error::Path {
        action: "open the FIFO",
        path: path.to_owned(),
        source: error,
    };
    let flags = direction | OFlags::NONBLOCK | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NOCTTY;
    let fd = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| failed(error.into()))?;
    let mode = rustix::fs::fstat(&fd)
        .map_err(|error| failed(error.into()))?
        .st_mode;
    if FileType::from_raw_mode(mode) != FileType::Fifo {
        return Err(refused(&path.display().to_string(), "it is not a FIFO"));
    }
    Ok(fd)
}

/// Opens a log file, which is made if it is not there; a blocking function.
pub(super) fn open_file(path: &Path) -> Result<File> {
    let failed = |source| Error::Path {
        action: "open the log file",
        path: path.to_owned(),
        source,
    };
    if let Some(parent) = path.parent() {
        DirBuilder::new()
            .recursive(true)
            .mode(0o755)
            .create(parent)
            .map_err(failed)?;
    }
    // Without waiting for the reader of what turns out to be a FIFO.
    let flags = OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    let file = File::options()
        .append(true)
        .create(true)
        .mode(0o644)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .map_err(failed)?;
    if !file.metadata().map_err(failed)?.is_file() {
        return Err(refused(&path.display().to_string(), "it is not a file"));
    }
    Ok(file)
}
