//! Ids of containers, execs, namespaces and groups; the name of a group's socket.
//!
//! Pure. An id that exists as a value of these types is safe as a single path
//! component; a socket's name is a hash, so that no id makes it too long.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde_json::Value;
use sha2::{Digest, Sha256};
use thiserror::Error;

/// Longest id, in bytes.
const MAX_ID: usize = 128;

/// Directory of the sockets unless the caller names another.
pub const SOCKET_DIR: &str = "/run/containerd/s";

/// An id that is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{what} {value:?} is not valid: {reason}")]
pub struct Error {
    /// What it should name.
    what: &'static str,
    /// The value, cut.
    value: String,
    /// Why.
    reason: &'static str,
}

fn check(what: &'static str, value: &str) -> Result<(), Error> {
    let plain = |byte: &u8| byte.is_ascii_alphanumeric();
    let reason = if value.is_empty() {
        "it is empty"
    } else if value.len() > MAX_ID {
        "it is longer than 128 bytes"
    } else if !value.as_bytes().first().is_some_and(plain) {
        "it does not begin with a letter or digit"
    } else if !value
        .bytes()
        .all(|byte| plain(&byte) || b"_.-".contains(&byte))
    {
        "only letters, digits, '_', '.' and '-' are allowed"
    } else {
        return Ok(());
    };
    Err(Error {
        what,
        value: value.chars().take(64).collect(),
        reason,
    })
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Accepts `[A-Za-z0-9][A-Za-z0-9_.-]{0,127}`.
            pub fn new(value: &str) -> Result<Self, Error> {
                check($what, value)?;
                Ok(Self(value.to_owned()))
            }

            /// The id as text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }
    };
}

id!(
    /// A container, as the caller named it.
    ContainerId,
    "Container id"
);
id!(
    /// A further process of a container.
    ExecId,
    "Exec id"
);
id!(
    /// A namespace of containerd.
    Namespace,
    "Namespace"
);
id!(
    /// A pod: the id of its sandbox, or of the container that is alone in it.
    GroupId,
    "Group id"
);

/// What a bundle is to its pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// A container of its own, or the sandbox: it may boot the VM.
    Owner,
    /// A container that joins the VM of its sandbox.
    Member,
}

/// Annotations that name the pod; the first one that is there counts.
const GROUPS: [&str; 4] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
    "io.kubernetes.cri-o.SandboxID",
    "io.kubernetes.sandbox.id",
];

/// Annotations that say what a container is to its pod.
const ROLES: [&str; 3] = [
    "io.kubernetes.cri.container-type",
    "io.kubernetes.cri-o.ContainerType",
    "io.kubernetes.docker.type",
];

/// Whether more containers will join the one with these annotations.
#[must_use]
pub fn expects_members(annotations: &BTreeMap<String, String>) -> bool {
    let role = ROLES.iter().find_map(|key| annotations.get(*key));
    role.is_some_and(|role| role == "sandbox" || role == "podsandbox")
}

/// The annotation, and the pod that it names, of a container that joins one.
#[must_use]
pub fn joins(annotations: &BTreeMap<String, String>) -> Option<(&'static str, &str)> {
    let role = ROLES.iter().find_map(|key| annotations.get(*key))?;
    let given = |key: &&'static str| Some((*key, annotations.get(*key)?.as_str()));
    GROUPS
        .iter()
        .find_map(given)
        .filter(|_| role == "container")
}

/// The pod that a bundle belongs to, and its role there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// The pod.
    pub id: GroupId,
    /// The role of the bundle.
    pub role: Role,
}

impl Group {
    /// Reads the group from the annotations of a `config.json`; the first key
    /// that is present wins. Without a specification the bundle is a sandbox.
    pub fn of(id: &ContainerId, spec: Option<&Value>) -> Result<Self, Error> {
        let annotation = |key: &&str| spec?.get("annotations")?.get(*key)?.as_str();
        let group = GROUPS.iter().find_map(annotation).unwrap_or(id.as_str());
        let member = ROLES.iter().find_map(annotation) == Some("container") && group != id.as_str();
        Ok(Group {
            id: GroupId::new(group)?,
            role: if member { Role::Member } else { Role::Owner },
        })
    }
}

/// Path of the socket of a group: `<dir>/<64 hexadecimal digits>`.
///
/// `address` is containerd's gRPC address exactly as it was given; `ctr shim`
/// computes the same.
#[must_use]
pub fn socket_path(dir: &str, address: &str, namespace: &Namespace, group: &GroupId) -> PathBuf {
    let key = join(&[address, namespace.as_str(), group.as_str()]);
    PathBuf::from(dir).join(hex::encode(Sha256::digest(key.as_bytes())))
}

/// Go's `path.Join`: empty elements are skipped, the result is cleaned lexically.
fn join(elements: &[&str]) -> String {
    let joined: Vec<&str> = elements
        .iter()
        .copied()
        .filter(|element| !element.is_empty())
        .collect();
    let joined = joined.join("/");
    let rooted = joined.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in joined.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => {
                parts.pop();
            }
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    let clean = parts.join("/");
    if rooted { format!("/{clean}") } else { clean }
}

/// Takes `unix://` off an address.
#[must_use]
pub fn plain_address(address: &str) -> &str {
    address.strip_prefix("unix://").unwrap_or(address)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn a_sandbox_expects_members() {
        let expects = |role: &str| {
            let key = "io.kubernetes.cri.container-type".to_owned();
            expects_members(&BTreeMap::from([(key, role.to_owned())]))
        };
        assert!(expects("sandbox") && !expects("container"));
        assert!(!expects_members(&BTreeMap::new()));
    }

    #[test]
    fn ids_that_could_leave_their_directory_are_refused_b18_lc_12() {
        let long = "a".repeat(129);
        for bad in [
            "", "../../x", ".", "..", "a/b", "-a", ".a", "a\0", "a b", "%n", "ä", "a\n", &long,
        ] {
            assert!(ContainerId::new(bad).is_err(), "{bad:?}");
        }
        for good in ["a", "A9", "redis_1.2-x", &"a".repeat(128)] {
            assert_eq!(ContainerId::new(good).unwrap().as_str(), good);
        }
    }

    #[test]
    fn the_error_names_the_value_but_not_all_of_it() {
        let text = ExecId::new(&"/".repeat(5000)).unwrap_err().to_string();
        assert!(text.starts_with("Exec id \"//"), "{text}");
        assert!(text.len() < 200);
    }

    #[test]
    fn the_group_is_the_first_annotation_that_is_present_lc_34_lc_35_lc_36() {
        let id = ContainerId::new("c1").unwrap();
        let check = |annotations: Value, group: &str, role: Role| {
            let spec = json!({ "annotations": annotations });
            let found = Group::of(&id, Some(&spec)).unwrap();
            assert_eq!(
                (found.id.as_str(), found.role),
                (group, role),
                "{annotations}"
            );
        };
        check(json!({}), "c1", Role::Owner);
        check(
            json!({"io.kubernetes.cri.sandbox-id": "s", "io.kubernetes.cri.container-type": "container"}),
            "s",
            Role::Member,
        );
        check(
            json!({"io.kubernetes.cri.sandbox-id": "c1", "io.kubernetes.cri.container-type": "sandbox"}),
            "c1",
            Role::Owner,
        );
        check(
            json!({"io.containerd.runc.v2.group": "g", "io.kubernetes.cri.sandbox-id": "s"}),
            "g",
            Role::Owner,
        );
        check(
            json!({"io.kubernetes.cri-o.SandboxID": "s", "io.kubernetes.cri-o.ContainerType": "container"}),
            "s",
            Role::Member,
        );
        assert_eq!(Group::of(&id, None).unwrap().id.as_str(), "c1");
        let bad = json!({"annotations": {"io.kubernetes.cri.sandbox-id": "../x"}});
        assert!(Group::of(&id, Some(&bad)).is_err());
    }

    #[test]
    fn the_socket_is_named_as_containerd_computes_it_lc_30() {
        let namespace = Namespace::new("default").unwrap();
        let group = GroupId::new("redis").unwrap();
        let path = socket_path(
            SOCKET_DIR,
            "/run/containerd/containerd.sock",
            &namespace,
            &group,
        );
        // printf %s /run/containerd/containerd.sock/default/redis | sha256sum
        let expected = "f6b99128c07bdbd0902363ba979c22f8ef053e683a7ce24dd016a1ab17092c33";
        assert_eq!(path, PathBuf::from(SOCKET_DIR).join(expected));
        // printf %s default/redis | sha256sum
        let expected = "cca61c73e111fd7b9d0f64d503bd2ce9b1acc3828e4dfd6969c394b994032e8a";
        let empty = socket_path(SOCKET_DIR, "", &namespace, &group);
        assert_eq!(empty, PathBuf::from(SOCKET_DIR).join(expected));
    }

    #[test]
    fn joining_cleans_as_go_does() {
        assert_eq!(join(&["/a//b/../c", "x"]), "/a/c/x");
        assert_eq!(join(&["", "n", "i"]), "n/i");
        assert_eq!(join(&["/..", "n"]), "/n");
        assert_eq!(join(&["unix:///run/c.sock", "n"]), "unix:/run/c.sock/n");
    }
}
