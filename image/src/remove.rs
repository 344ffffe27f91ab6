//! Removes trees of any depth: what images and containers make may be deeper than a
//! process has descriptors or stack.

use std::{fs, io, path::Path};

/// Removes `path` with all in it, if it is there; a link is removed, not followed.
/// Nobody else may write to the tree meanwhile.
///
/// A directory in a directory is moved up to `path` before it is emptied, so that one
/// level is open at a time. What is left of a removal that was interrupted is still
/// below `path`.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match fs::symlink_metadata(path) {
        Ok(meta) if meta.is_dir() => {}
        Ok(_) => return fs::remove_file(path),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    }
    let mut count = 0;
    loop {
        let mut dirs = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                dirs.push(entry.path());
            } else {
                fs::remove_file(entry.path())?;
            }
        }
        if dirs.is_empty() {
            return fs::remove_dir(path);
        }
        for dir in dirs {
            for entry in fs::read_dir(&dir)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    move_up(&entry.path(), path, &mut count)?;
                } else {
                    fs::remove_file(entry.path())?;
                }
            }
            fs::remove_dir(&dir)?;
        }
    }
}

fn move_up(from: &Path, to: &Path, count: &mut u64) -> io::Result<()> {
    loop {
        *count += 1;
        // An empty directory of the name is replaced, which is as good.
        match fs::rename(from, to.join(format!("removed-{count}"))) {
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::DirectoryNotEmpty
                        | io::ErrorKind::AlreadyExists
                        | io::ErrorKind::NotADirectory
                ) => {}
            result => return result,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn a_tree_deeper_than_a_process_has_descriptors_is_removed_b36() {
        let outside = tempfile::tempdir().unwrap();
        fs::write(outside.path().join("canary"), "whole").unwrap();
        let world = tempfile::tempdir().unwrap();
        let tree = world.path().join("tree");
        fs::create_dir(&tree).unwrap();
        // From below: a path that long could not be named.
        let mut inner = world.path().join("0");
        fs::create_dir(&inner).unwrap();
        symlink(outside.path(), inner.join("out")).unwrap();
        for number in 1..3000 {
            let next = world.path().join(number.to_string());
            fs::create_dir(&next).unwrap();
            fs::rename(&inner, next.join("removed-2")).unwrap();
            inner = next;
        }
        fs::rename(&inner, tree.join("removed-1")).unwrap();
        fs::create_dir_all(tree.join("other/removed-3")).unwrap();
        remove_tree(&tree).unwrap();
        assert_eq!(fs::read_dir(world.path()).unwrap().count(), 0);
        assert_eq!(fs::read_dir(outside.path()).unwrap().count(), 1);
        remove_tree(&tree).unwrap();
    }
}
