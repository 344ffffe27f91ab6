//! Finds the program and the home directory inside the container.
//!
//! Runs with the ids and capabilities of the process, so that permission is
//! what it will be. Speaks as Go's `os/exec` does, since callers look for those
//! words to tell exit code 127 from 126.

use std::{
    ffi::{CString, OsStr},
    fs::File,
    io::{self, Read},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Access, AtFlags, CWD, FileType, OFlags};

use super::{Error, Result, paths::Root};
use crate::channel::FailureKind;

/// The path to execute for `name`, found by the `PATH` of `env`.
pub(super) fn executable(name: &str, env: &[String]) -> Result<CString> {
    let found = if name.contains('/') {
        let path = PathBuf::from(name);
        check(&path).map_err(|e| error(name, &e))?;
        path
    } else {
        search(name, env).ok_or_else(|| Error::Executable {
            name: name.to_owned(),
            reason: "executable file not found in $PATH".into(),
            kind: FailureKind::NotFound,
            errno: None,
        })?
    };
    CString::new(found.as_os_str().as_bytes()).map_err(|e| error(name, &e.into()))
}

/// Why `name` cannot be executed, in the words that callers know.
pub(super) fn error(name: &str, source: &io::Error) -> Error {
    let reason = match source.raw_os_error() {
        Some(libc::ENOENT) => "no such file or directory".into(),
        Some(libc::EACCES | libc::EISDIR) => "permission denied".into(),
        Some(libc::ENOEXEC) => "exec format error".into(),
        _ => source.to_string(),
    };
    let errno = source.raw_os_error();
    Error::Executable {
        name: name.to_owned(),
        reason,
        kind: match errno {
            Some(libc::ENOENT) => FailureKind::NotFound,
            _ => FailureKind::NotExecutable,
        },
        errno,
    }
}

fn search(name: &str, env: &[String]) -> Option<PathBuf> {
    // As in a shell, the last of several counts.
    let path = env
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix("PATH="))?;
    std::env::split_paths(OsStr::new(path))
        .map(|directory| match directory.as_os_str().is_empty() {
            true => Path::new(".").join(name),
            false => directory.join(name),
        })
        .find(|candidate| check(candidate).is_ok())
}

fn check(path: &Path) -> io::Result<()> {
    let stat = rustix::fs::stat(path)?;
    if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
        return Err(io::Error::from_raw_os_error(libc::EISDIR));
    }
    rustix::fs::accessat(CWD, path, Access::EXEC_OK, AtFlags::EACCESS)?;
    Ok(())
}

/// The home directory of `uid` by the container's `/etc/passwd`, else `/`.
pub(super) fn home(root: &Root, uid: u32) -> String {
    const PASSWD_BYTES_MAX: u64 = 1 << 20;
    let mut text = Vec::new();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK;
    let read = root.open(Path::new("/etc/passwd"), flags).and_then(|file| {
        File::from(file)
            .take(PASSWD_BYTES_MAX)
            .read_to_end(&mut text)
    });
    let found = read
        .ok()
        .and_then(|_| home_in(&String::from_utf8_lossy(&text), uid));
    found.unwrap_or_else(|| "/".to_owned())
}

fn home_in(passwd: &str, uid: u32) -> Option<String> {
    passwd.lines().find_map(|line| {
        let fields: Vec<_> = line.split(':').collect();
        let of_user = fields.get(2)?.parse() == Ok(uid);
        let home = fields.get(5)?;
        (of_user && home.starts_with('/') && !home.contains('\0')).then(|| (*home).to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_home_is_that_of_the_first_line_with_the_uid() {
        let check = |passwd, uid, expected: Option<&str>| {
            assert_eq!(
                home_in(passwd, uid).as_deref(),
                expected,
                "{passwd:?} {uid}"
            );
        };
        check("root:x:0:0:root:/root:/bin/sh\n", 0, Some("/root"));
        check("a:x:5:5::/a:\nb:x:5:5::/b:\n", 5, Some("/a"));
        check("root:x:0:0:root:/root:/bin/sh\n", 1, None);
        check("root:x:0\n", 0, None);
        check("r:x:0:0::relative:\n", 0, None);
        check("not a passwd file", 0, None);
    }

    #[test]
    fn a_missing_program_is_told_from_one_that_may_not_be_executed() {
        let check = |name: &str, path: &str, expected: &str| {
            let env = [format!("PATH={path}")];
            let error = executable(name, &env).unwrap_err();
            assert_eq!(error.to_string(), expected);
            let kind = match expected.contains("permission denied") {
                true => FailureKind::NotExecutable,
                false => FailureKind::NotFound,
            };
            assert_eq!(error.failure().kind, kind, "{name}");
        };
        check(
            "nope",
            "/usr/bin",
            r#"exec: "nope": executable file not found in $PATH"#,
        );
        check(
            "passwd",
            "/etc",
            r#"exec: "passwd": executable file not found in $PATH"#,
        );
        check(
            "/nope/a",
            "",
            r#"exec: "/nope/a": no such file or directory"#,
        );
        check(
            "/etc/passwd",
            "",
            r#"exec: "/etc/passwd": permission denied"#,
        );
        check("/etc", "", r#"exec: "/etc": permission denied"#);
        let no_path = executable("sh", &[]).unwrap_err().to_string();
        assert_eq!(no_path, r#"exec: "sh": executable file not found in $PATH"#);
    }

    #[test]
    fn the_last_path_counts_and_a_name_with_a_slash_needs_none() {
        let env = [
            "PATH=/nowhere".to_owned(),
            "PATH=/nowhere:/bin:/usr/bin".to_owned(),
        ];
        assert_eq!(executable("sh", &env).unwrap(), c"/bin/sh".to_owned());
        assert_eq!(executable("/bin/sh", &[]).unwrap(), c"/bin/sh".to_owned());
    }
}
