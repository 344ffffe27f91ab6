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

/// Directories, lowest first.
#[derive(Debug)]
pub(crate) struct Stack {
    /// Where their short names are, and the place of the mount.
    scratch: PathBuf,
    lower: Vec<PathBuf>,
}

impl Stack {
    /// An empty stack that may use `scratch`, an empty directory, which can be removed
    /// afterwards.
    pub(crate) fn new(scratch: PathBuf) -> io::Result<Self> {
        fs::create_dir(scratch.join("root"))?;
        Ok(Stack {
            scratch,
            lower: Vec::new(),
        })
    }

    /// Puts a directory on top.
    pub(crate) fn push(&mut self, dir: PathBuf) -> io::Result<()> {
        symlink(&dir, self.scratch.join(self.lower.len().to_string()))?;
        self.lower.push(dir);
        Ok(())
    }

    /// The uppermost directory.
    pub(crate) fn top(&self) -> Option<&Path> {
        self.lower.last().map(PathBuf::as_path)
    }

    /// Opens the root of the tree, under `upper`.
    pub(crate) fn open(&self, upper: Option<&Upper>) -> io::Result<OwnedFd> {
        match (self.lower.as_slice(), upper) {
            ([], Some(upper)) => return open_root(&upper.dir),
            ([only], None) => return open_root(only),
            _ => {}
        }
        let mut options = String::from("lowerdir=");
        for number in (0..self.lower.len()).rev() {
            // Writing to a String cannot fail.
            let _ = write!(options, "{number}:");
        }
        options.pop();
        if let Some(upper) = upper {
            let number = self.lower.len();
            let (dir, work) = (format!("upper{number}"), format!("work{number}"));
            symlink(&upper.dir, self.scratch.join(&dir))?;
            symlink(&upper.work, self.scratch.join(&work))?;
            // Whatever the host's defaults are: layers are plain directories, but for
            // directories that are moved to be removed.
            let _ = write!(
                options,
                ",upperdir={dir},workdir={work},volatile,redirect_dir=on,metacopy=off"
            );
        }
        // With an index a directory that a running container writes to could not be read.
        options.push_str(",index=off");
        let scratch = self.scratch.clone();
        let mounting = thread::spawn(move || mount(&scratch, &options));
        mounting
            .join()
            .map_err(|_| io::Error::other("the thread that mounts has failed"))?
    }
}

/// Opens the root of the tree of `dirs`, lowest first, by way of an empty directory.
pub(crate) fn open(dirs: &[PathBuf], scratch: &Path) -> io::Result<OwnedFd> {
    let mut stack = Stack::new(scratch.to_owned())?;
    for dir in dirs {
        stack.push(dir.clone())?;
    }
    stack.open(None)
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
    let root = open_root(Path::new("root"))?;
    // The namespace may end a little later than this thread; the mount ends with the
    // descriptor.
    nix::mount::umount2("root", nix::mount::MntFlags::MNT_DETACH)?;
    Ok(root)
}

fn open_root(dir: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(rustix::fs::open(dir, flags, Mode::empty())?)
}
