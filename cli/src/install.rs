//! `bulkhead install`: names the runtime in the configuration of an engine.
//!
//! What is to be written is made up first, from what is there: [`Change`]s. They are
//! printed, or carried out. What else stands in a file stays as it is, to the comment.

mod containerd;
mod docker;

use std::{
    fs,
    io::{self, Write},
    os::unix::fs::{MetadataExt, fchown},
    path::{Path, PathBuf},
};

use bulkhead_client::shim::{SHIM, find_binary};

use crate::{
    args::{Engine, Install},
    error::{Result, at, host, refused},
    run::require_root,
};

/// The runtime's type, by which engines find the shim.
const TYPE: &str = "io.containerd.bulkhead.v2";

/// Where engines look for a shim, whatever the PATH of whoever installs it.
const PLACES: [&str; 2] = ["/usr/bin", "/usr/local/bin"];

/// One file to write.
#[derive(Debug, PartialEq, Eq)]
struct Change {
    path: PathBuf,
    /// None if there is no such file.
    before: Option<String>,
    /// None if it is to go.
    after: Option<String>,
}

impl Change {
    /// None if there is nothing to do.
    fn new(path: &Path, before: Option<&str>, after: Option<String>) -> Option<Change> {
        (before != after.as_deref()).then(|| Change {
            path: path.to_owned(),
            before: before.map(str::to_owned),
            after,
        })
    }

    /// What will be there, for people and for a pipe into a file.
    fn tell(&self, out: &mut impl Write) -> io::Result<()> {
        let path = self.path.display();
        match (&self.before, &self.after) {
            (_, None) => writeln!(out, "# {path}: removed"),
            (None, Some(after)) => write!(out, "# {path}: new\n{after}"),
            (Some(_), Some(after)) => write!(out, "# {path}: changed\n{after}"),
        }
    }

    /// Puts the new file into the old one's place at once, with its owner and mode.
    fn carry_out(&self) -> Result<()> {
        let Some(after) = &self.after else {
            return Ok(fs::remove_file(&self.path).map_err(at("remove", &self.path))?);
        };
        // Through a link: the file that it names is the configuration.
        let path = fs::canonicalize(&self.path).unwrap_or_else(|_| self.path.clone());
        let directory = path.parent().unwrap_or_else(|| Path::new("/"));
        fs::create_dir_all(directory).map_err(at("make", directory))?;
        let mut new = tempfile::NamedTempFile::new_in(directory).map_err(at("write", &path))?;
        let write = || -> io::Result<()> {
            let file = new.as_file_mut();
            file.write_all(after.as_bytes())?;
            let mut mode = 0o644;
            if let Ok(old) = fs::metadata(&path) {
                fchown(&*file, Some(old.uid()), Some(old.gid()))?;
                mode = old.mode() & 0o7777;
            }
            file.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(mode))?;
            file.sync_all()?;
            new.persist(&path).map_err(|error| error.error)?;
            Ok(())
        };
        Ok(write().map_err(at("write", &path))?)
    }
}

/// Names the runtime, or takes its name away again.
pub(crate) fn install(args: &Install) -> Result<u8> {
    if !args.dry_run {
        require_root()?;
    }
    let changes = match args.engine {
        Engine::Containerd => containerd::changes(args)?,
        Engine::Docker => docker::changes(args)?,
    };
    let mut out = io::stdout().lock();
    if args.dry_run {
        for change in &changes {
            change
                .tell(&mut out)
                .map_err(host("write what would change"))?;
        }
        return Ok(0);
    }
    for change in &changes {
        change.carry_out()?;
    }
    let told = match changes.as_slice() {
        [] => writeln!(out, "Nothing to change"),
        changes => tell(&mut out, changes, args),
    };
    told.map_err(host("write what was changed"))?;
    if let Some(warning) = not_found(find_binary(SHIM).ok().as_deref()).filter(|_| !args.remove) {
        writeln!(io::stderr(), "bulkhead: {warning}").map_err(host("write a warning"))?;
    }
    Ok(0)
}

fn tell(out: &mut impl Write, changes: &[Change], args: &Install) -> io::Result<()> {
    for change in changes {
        let verb = if change.after.is_some() {
            "Wrote"
        } else {
            "Removed"
        };
        writeln!(out, "{verb} {}", change.path.display())?;
    }
    let name = &args.name;
    match (args.engine, args.remove) {
        (Engine::Containerd, _) => writeln!(out, "Next: systemctl restart containerd"),
        (Engine::Docker, true) => writeln!(out, "Next: systemctl restart docker"),
        (Engine::Docker, false) => writeln!(
            out,
            "Next: systemctl restart docker, then: docker run --runtime {name} IMAGE"
        ),
    }
}

/// What to say if an engine would not find the shim, which lies there.
fn not_found(shim: Option<&Path>) -> Option<String> {
    let seen = |place: &&str| Path::new(*place).join(SHIM).exists();
    if PLACES.iter().any(seen) {
        return None;
    }
    let next = match shim {
        Some(shim) => format!("copy {} to one of them", shim.display()),
        None => "install it there".to_owned(),
    };
    let [one, two] = PLACES;
    Some(format!(
        "{SHIM} is neither in {one} nor in {two}, where engines look for it; {next}"
    ))
}

/// The text of a file, if there is one.
fn read(path: &Path) -> Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(at("read", path)(error).into()),
    }
}

/// A refusal of the file itself.
fn unusable(path: &Path, reason: &str) -> crate::error::Error {
    refused("Configuration", &path.display().to_string(), reason)
}

#[cfg(test)]
mod testing {
    use super::*;

    /// For the runtime `bulkhead` in whatever engine.
    pub(super) fn args(remove: bool) -> Install {
        Install {
            engine: Engine::Containerd,
            name: "bulkhead".to_owned(),
            config: None,
            dry_run: true,
            remove,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[test]
    fn a_file_keeps_its_mode_and_a_link_to_it_stays_one() {
        let dir = tempfile::tempdir().unwrap();
        let (real, link) = (dir.path().join("real"), dir.path().join("link"));
        fs::write(&real, "old").unwrap();
        fs::set_permissions(&real, fs::Permissions::from_mode(0o640)).unwrap();
        symlink("real", &link).unwrap();
        let change = Change::new(&link, Some("old"), Some("new".to_owned())).unwrap();
        change.carry_out().unwrap();
        assert_eq!(fs::read_to_string(&real).unwrap(), "new");
        assert_eq!(fs::metadata(&real).unwrap().mode() & 0o7777, 0o640);
        assert!(fs::symlink_metadata(&link).unwrap().is_symlink());
        let names = fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(names, 2, "nothing else is left");
    }

    #[test]
    fn a_new_file_gets_its_directory_and_one_that_is_the_same_is_no_change() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("conf.d/bulkhead.toml");
        let change = Change::new(&path, None, Some("new".to_owned())).unwrap();
        change.carry_out().unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert_eq!(
            Change::new(&path, Some("new"), Some("new".to_owned())),
            None
        );
        Change::new(&path, Some("new"), None)
            .unwrap()
            .carry_out()
            .unwrap();
        assert!(!path.exists());
    }
}
