//! Directories over each other, seen as one tree: an overlay that nobody else sees.
//!
//! It is mounted by a thread in a mount namespace of its own, which ends at once; the
//! descriptor keeps the mount, and with it, even if the process is killed, it goes.
//! Layers are named by short links relative to the thread's directory: the options of
//! one mount must fit into a page, and on kernels before 6.7 there is no other way to
//! give them.

use std::{
    fmt::Write as _,
    fs, io,
    os::fd::OwnedFd,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    thread,
};

use nix::{mount::MsFlags, sched::CloneFlags};
use rustix::fs::{Mode, OFlags};

/// Directories to write to.
#[derive(Clone, Debug)]
pub(crate) struct Upper {
    /// Takes what changes.
    pub(crate) dir: PathBuf,
    /// Empty, on the same file system.
    pub(crate) work: PathBuf,
}

/// Opens the root of the tree of `lower`, lowest first, under `upper`. `scratch` is an
/// empty directory, which can be removed afterwards.
pub(crate) fn open(
    lower: &[PathBuf],
    upper: Option<&Upper>,
    scratch: &Path,
) -> io::Result<OwnedFd> {
    let plain = match (lower, upper) {
        ([], Some(upper)) => Some(&upper.dir),
        ([only], None) => Some(only),
        _ => None,
    };
    if let Some(dir) = plain {
        return open_root(dir);
    }
    let mut options = String::from("lowerdir=");
    for (number, dir) in lower.iter().rev().enumerate() {
        symlink(dir, scratch.join(number.to_string()))?;
        let colon = if number == 0 { "" } else { ":" };
        // Writing to a String cannot fail.
        let _ = write!(options, "{colon}{number}");
    }
    if let Some(upper) = upper {
        symlink(&upper.dir, scratch.join("u"))?;
        symlink(&upper.work, scratch.join("w"))?;
        // Whatever the host's defaults are: layers are plain directories, but for
        // directories that are moved to be removed.
        options.push_str(",upperdir=u,workdir=w,volatile,redirect_dir=on,metacopy=off");
    }
    // With an index a directory that a running container writes to could not be read.
    options.push_str(",index=off");
    fs::create_dir(scratch.join("root"))?;
    let scratch = scratch.to_owned();
    let mounting = thread::spawn(move || mount(&scratch, &options));
    mounting
        .join()
        .map_err(|_| io::Error::other("the thread that mounts has failed"))?
}

fn mount(scratch: &Path, options: &str) -> io::Result<OwnedFd> {
    // Of this thread alone, with its working directory.
    nix::sched::unshare(CloneFlags::CLONE_NEWNS)?;
    let none = None::<&Path>;
    // What happens here stays here.
    nix::mount::mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SLAVE, none)?;
    std::env::set_current_dir(scratch)?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    nix::mount::mount(
        Some("overlay"),
        "root",
        Some("overlay"),
        flags,
        Some(options),
    )?;
    open_root(Path::new("root"))
}

fn open_root(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}
