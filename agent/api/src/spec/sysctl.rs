//! Kernel parameters: their names, and the table of those that belong to a
//! container's namespaces.

use std::path::PathBuf;

use crate::spec::Error;

/// Most entries of `linux.sysctl`.
const SYSCTLS_MAX: usize = 1_024;

/// What belongs to a namespace of the container, or to the pod's network; an
/// asterisk stands for any rest.
const NAMESPACED: [&str; 11] = [
    "fs.mqueue.*",
    "kernel.domainname",
    "kernel.msgmax",
    "kernel.msgmnb",
    "kernel.msgmni",
    "kernel.sem",
    "kernel.shm_rmid_forced",
    "kernel.shmall",
    "kernel.shmmax",
    "kernel.shmmni",
    "net.*",
];

/// Checks `linux.sysctl`: paths below `/proc/sys` with their values.
pub(crate) fn sysctls(
    from: impl ExactSizeIterator<Item = (String, String)>,
) -> Result<Vec<(PathBuf, String)>, Error> {
    if from.len() > SYSCTLS_MAX {
        return Err(Error::too_many("linux.sysctl", from.len(), SYSCTLS_MAX));
    }
    from.map(|(name, value)| {
        let refuse =
            |reason: &str| Error::new(format!("linux.sysctl.{}", short(&name)), &value, reason);
        let parts = parts(&name).ok_or_else(|| {
            refuse("a parameter is named by letters, digits, '_' and '-' between dots")
        })?;
        let dotted = parts.join(".");
        if dotted == "kernel.hostname" {
            return Err(refuse("the specification has a field for it: hostname"));
        }
        let namespaced = NAMESPACED
            .iter()
            .any(|known| match known.strip_suffix('*') {
                Some(start) => dotted.starts_with(start),
                None => dotted == *known,
            });
        if !namespaced {
            return Err(refuse("it belongs to no namespace of the container"));
        }
        if value.contains('\0') {
            return Err(refuse("it must not contain NUL"));
        }
        Ok((parts.iter().collect(), value))
    })
    .collect()
}

/// The names of the directories and of the file. The first separator, dot or slash,
/// is the one between them; the other one then stands for a dot in a name, as
/// sysctl(8) has it for interfaces such as `eth0.100`.
fn parts(name: &str) -> Option<Vec<String>> {
    let separator = name.chars().find(|c| matches!(c, '.' | '/'))?;
    let parts: Vec<String> = name
        .split(separator)
        .map(|part| part.replace('/', "."))
        .collect();
    let plain = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'-' | b'.');
    let sane = |part: &String| !matches!(part.as_str(), "" | "." | "..") && part.bytes().all(plain);
    parts.iter().all(sane).then_some(parts)
}

/// A name for a message.
fn short(name: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    name.chars()
        .take(SHOWN_CHARS)
        .collect::<String>()
        .escape_debug()
        .to_string()
}
