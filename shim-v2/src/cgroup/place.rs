//! Where a cgroup lies: `linux.cgroupsPath` as a path below the root of a hierarchy.
//!
//! Pure. The form decides who made the path: `slice:prefix:name` is systemd's and is
//! spelled out as systemd would place that unit, anything else is a path of
//! cgroupfs. A relative path is below `bulkhead`.

use std::path::{Component, Path, PathBuf};

use bulkhead_agent_api::spec::Error;

/// The field, for messages.
const FIELD: &str = "linux.cgroupsPath";
/// Where a path begins that nobody else has placed.
const OWN: &str = "bulkhead";
/// The slice that a unit without one is in.
const DEFAULT_SLICE: &str = "system.slice";
/// Longest name of a directory, in bytes.
const NAME_MAX: usize = 255;
/// Longest path, with room for the mount point and the name of a file.
const LONGEST: usize = 3_072;

/// A place below the root: relative, of one plain component at least.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place(PathBuf);

impl Place {
    /// The place that a specification asks for; `None` if it asks for none.
    pub fn new(text: &str) -> Result<Option<Self>, Error> {
        if text.is_empty() {
            return Ok(None);
        }
        let refused = |reason: &str| Error::new(FIELD, text, reason);
        let parts: Vec<&str> = text.split(':').collect();
        let (base, path) = match parts.as_slice() {
            [slice, prefix, name] if !text.contains('/') => {
                ("", unit(slice, prefix, name).map_err(refused)?)
            }
            _ if text.starts_with('/') => ("", PathBuf::from(text)),
            _ => (OWN, PathBuf::from(text)),
        };
        let path = plain(&path).map_err(refused)?;
        Ok(Some(Place(Path::new(base).join(path))))
    }

    /// The place of a pod that nobody has placed: named as its state directory,
    /// `/run/bulkhead/<namespace>/<id>`, is.
    #[must_use]
    pub fn like(state: &Path) -> Self {
        let names = state.iter().rev().take(2);
        let names: Vec<_> = names.collect();
        Place(Path::new(OWN).join(names.into_iter().rev().collect::<PathBuf>()))
    }

    /// The path, relative to the root of a hierarchy.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }
}

/// The components of a path that are names.
fn plain(path: &Path) -> Result<PathBuf, &'static str> {
    let mut plain = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) if name.len() > NAME_MAX => {
                return Err("a part of it is longer than 255 bytes");
            }
            Component::Normal(name) => plain.push(name),
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => return Err("it leads upwards"),
        }
    }
    let text = plain.as_os_str().as_encoded_bytes();
    if text.is_empty() {
        Err("the root is no place for a container")
    } else if text.len() > LONGEST {
        Err("it is longer than 3072 bytes")
    } else if text.contains(&0) || text.contains(&b'\n') {
        Err("neither NUL nor a line's end can be in a name")
    } else {
        Ok(plain)
    }
}

/// Where systemd puts a unit (systemd.slice(5), systemd.scope(5)).
fn unit(slice: &str, prefix: &str, name: &str) -> Result<PathBuf, &'static str> {
    let slice = if slice.is_empty() {
        DEFAULT_SLICE
    } else {
        slice
    };
    let mut path = slices(slice)?;
    if name.is_empty() {
        return Err("a unit needs a name");
    }
    if name.ends_with(".slice") {
        path.push(name);
    } else {
        path.push(format!("{prefix}-{name}.scope"));
    }
    Ok(path)
}

/// `a-b.slice` is in `a.slice`.
fn slices(slice: &str) -> Result<PathBuf, &'static str> {
    const WRONG: &str = "its first part is no name of a slice";
    let stem = slice.strip_suffix(".slice").ok_or(WRONG)?;
    let mut path = PathBuf::new();
    if stem == "-" {
        return Ok(path);
    }
    let mut name = String::new();
    for part in stem.split('-') {
        if part.is_empty() {
            return Err(WRONG);
        }
        if !name.is_empty() {
            name.push('-');
        }
        name.push_str(part);
        path.push(format!("{name}.slice"));
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_below_the_root_and_a_unit_where_systemd_would_put_it() {
        for (text, place) in [
            ("/default/c1", "default/c1"),
            (
                "/kubepods/burstable/pod0-1/c1",
                "kubepods/burstable/pod0-1/c1",
            ),
            ("//a/./b//c/", "a/b/c"),
            ("/a:b:c", "a:b:c"),
            ("/a.slice:b:c", "a.slice:b:c"),
            ("a/b", "bulkhead/a/b"),
            ("a:b", "bulkhead/a:b"),
            ("a/b:c:d", "bulkhead/a/b:c:d"),
            ("system.slice:docker:0123", "system.slice/docker-0123.scope"),
            (":docker:0123", "system.slice/docker-0123.scope"),
            ("-.slice:cri:0", "cri-0.scope"),
            ("-.slice::0", "-0.scope"),
            ("a.slice:x:b.slice", "a.slice/b.slice"),
            (
                "kubepods-burstable-pod0_1.slice:cri-containerd:0123",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0_1.slice/cri-containerd-0123.scope",
            ),
        ] {
            let found = Place::new(text).unwrap().unwrap();
            assert_eq!(found.path(), Path::new(place), "{text}");
        }
        assert_eq!(Place::new("").unwrap(), None);
    }

    #[test]
    fn a_path_that_is_no_place_is_refused() {
        let long = format!("/{}", "x".repeat(256));
        let deep = "/x".repeat(2000);
        for text in [
            "/",
            ".",
            "/..",
            "/a/../b",
            "../a",
            "/a\n/b",
            "/a\0",
            "a.slice:b:",
            "a:b:c",
            ".slice:b:c",
            "-a.slice:b:c",
            "a-.slice:b:c",
            "a--b.slice:b:c",
            "a.slice:..:\n",
            &long,
            &deep,
        ] {
            let error = Place::new(text).unwrap_err().to_string();
            assert!(error.starts_with("linux.cgroupsPath = "), "{error}");
        }
    }

    #[test]
    fn a_pod_that_nobody_has_placed_is_named_as_its_state_directory() {
        let place = Place::like(Path::new("/run/bulkhead/k8s.io/c1"));
        assert_eq!(place.path(), Path::new("bulkhead/k8s.io/c1"));
    }
}
