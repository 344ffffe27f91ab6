//! Users and groups by name, from an image's own `/etc/passwd` and `/etc/group`.
//!
//! Files are opened below the image's root by openat2(2), which keeps symbolic
//! links from leading out of it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::OwnedFd,
    path::PathBuf,
};

use rustix::{
    fs::{FileType, Mode, OFlags, ResolveFlags, openat2},
    io::Errno,
};

use crate::{Error, Result, stack};

/// Largest passwd or group file.
const MAX_BYTES: u64 = 16 << 20;

/// The ids of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct User {
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

/// Who a process is, and where that user is at home.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Ids.
    pub user: User,
    /// Absolute path.
    pub home: String,
}

/// Looks up `USER[:GROUP]`, names or numbers, in the tree of the directories `roots`,
/// lowest first. Empty means root.
pub fn look_up(roots: &[PathBuf], text: &str) -> Result<Identity> {
    let failed = |source| Error::Store {
        action: "look up a user in",
        path: roots.last().cloned().unwrap_or_default(),
        source,
    };
    let (user, group) = match text.split_once(':') {
        Some((user, group)) => (user, Some(group)),
        None => (text, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let (passwd, groups) = if roots.is_empty() {
        (String::new(), String::new())
    } else {
        let scratch = tempfile::tempdir().map_err(failed)?;
        let tree = stack::open(roots, scratch.path()).map_err(failed)?;
        (
            read(&tree, "etc/passwd").map_err(failed)?,
            read(&tree, "etc/group").map_err(failed)?,
        )
    };
    resolve(user, group, &passwd, &groups).map_err(|reason| Error::User {
        user: text.to_owned(),
        reason,
    })
}

fn resolve(
    user: &str,
    group: Option<&str>,
    passwd: &str,
    groups: &str,
) -> Result<Identity, String> {
    let number = user.parse::<u32>().ok();
    let entry = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let (name, uid) = (*fields.first()?, fields.get(2)?.parse::<u32>().ok()?);
        let gid = fields.get(3)?.parse::<u32>().ok()?;
        let home = fields.get(5).copied().unwrap_or_default();
        // A name may consist of digits.
        (name == user || number == Some(uid)).then_some((name, uid, gid, home))
    });
    let (name, uid, mut gid, home) = match (entry, number) {
        (Some((name, uid, gid, home)), _) => (Some(name), uid, gid, home),
        (None, Some(uid)) if uid != u32::MAX => (None, uid, 0, ""),
        (None, Some(_)) => return Err("4294967295 is no user".to_owned()),
        (None, None) => {
            return Err(format!(
                "{user:?} is not in the image's /etc/passwd; give a number"
            ));
        }
    };
    let entries = groups.lines().filter_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let gid = fields.get(2)?.parse::<u32>().ok()?;
        Some((
            *fields.first()?,
            gid,
            fields.get(3).copied().unwrap_or_default(),
        ))
    });
    let mut further = Vec::new();
    if let Some(group) = group {
        let number = group.parse::<u32>().ok();
        let known = entries
            .clone()
            .find_map(|(name, gid, _)| (name == group || number == Some(gid)).then_some(gid));
        gid = match (known, number) {
            (Some(gid), _) => gid,
            (None, Some(u32::MAX)) => return Err("4294967295 is no group".to_owned()),
            (None, Some(gid)) => gid,
            (None, None) if group.is_empty() => gid,
            (None, None) => {
                return Err(format!(
                    "{group:?} is not in the image's /etc/group; give a number"
                ));
            }
        };
    } else if let Some(name) = name {
        // A group that was asked for stands alone, as with Docker.
        further = entries
            .filter(|(_, other, members)| {
                *other != gid && members.split(',').any(|member| member == name)
            })
            .map(|(_, gid, _)| gid)
            .collect();
        further.sort_unstable();
        further.dedup();
    }
    let home = if home.starts_with('/') { home } else { "/" };
    Ok(Identity {
        user: User {
            uid,
            gid,
            groups: further,
        },
        home: home.to_owned(),
    })
}

/// The text of `name` in a tree; empty if there is no such file.
fn read(tree: &OwnedFd, name: &str) -> io::Result<String> {
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let open = |flags| openat2(tree, name, flags | OFlags::CLOEXEC, Mode::empty(), resolve);
    // What is opened for good is known to be a regular file: a device node of an image
    // is not touched.
    let place = match open(OFlags::PATH) {
        Ok(place) => place,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
        Err(error) => return Err(error.into()),
    };
    let stat = rustix::fs::fstat(&place)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
        return Ok(String::new());
    }
    let mut bytes = Vec::new();
    File::from(open(OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY)?)
        .take(MAX_BYTES)
        .read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::symlink};

    use super::*;

    const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nbroken\nweb:x:33:34::/var/www:/bin/sh\n";
    const GROUP: &str = "root:x:0:\nwww:x:34:web\nlog:x:4:root,web\nmail:x:8:webmaster\n";

    fn who(user: &str, group: Option<&str>) -> Result<(u32, u32, Vec<u32>, String), String> {
        let Identity { user, home } = resolve(user, group, PASSWD, GROUP)?;
        Ok((user.uid, user.gid, user.groups, home))
    }

    #[test]
    fn names_and_numbers_are_looked_up() {
        assert_eq!(
            who("web", None),
            Ok((33, 34, vec![4], "/var/www".to_owned()))
        );
        assert_eq!(
            who("33", None),
            Ok((33, 34, vec![4], "/var/www".to_owned()))
        );
        assert_eq!(
            who("web", Some("mail")),
            Ok((33, 8, vec![], "/var/www".to_owned()))
        );
        assert_eq!(who("1000", None), Ok((1000, 0, vec![], "/".to_owned())));
        assert_eq!(
            who("1000", Some("7")),
            Ok((1000, 7, vec![], "/".to_owned()))
        );
    }

    #[test]
    fn who_is_not_known_is_named() {
        assert!(who("nobody", None).unwrap_err().contains("nobody"));
        assert!(who("web", Some("wheel")).unwrap_err().contains("wheel"));
        assert!(who("4294967295", None).is_err());
        assert!(who("-1", None).is_err());
    }

    #[test]
    fn a_link_out_of_the_image_reads_nothing_of_the_host_b35() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("etc")).unwrap();
        symlink("/etc/passwd", dir.path().join("etc/group")).unwrap();
        symlink(
            "../../../../../../etc/passwd",
            dir.path().join("etc/passwd"),
        )
        .unwrap();
        let root = File::open(dir.path()).unwrap().into();
        assert_eq!(read(&root, "etc/passwd").unwrap(), "");
        assert_eq!(read(&root, "etc/group").unwrap(), "");
    }
}
