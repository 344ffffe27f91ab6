//! What the caller's strings name.

use std::{borrow::Cow, ffi::OsStr, os::unix::ffi::OsStrExt, path::PathBuf};

use percent_encoding::percent_decode_str;

use super::{logger::Command, streaming::Address};
use crate::error::{Error, Result};

/// What a string names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Target {
    Fifo(PathBuf),
    /// A file of the host that output is appended to.
    File(PathBuf),
    /// A program of the host that reads output.
    Program(Command),
    /// A stream of containerd's streaming service.
    Stream(Address),
}

impl Target {
    /// `None` for "nothing".
    pub(super) fn named(name: &str) -> Result<Option<Self>> {
        if name.is_empty() {
            return Ok(None);
        }
        let (scheme, rest) = match name.split_once("://") {
            Some((scheme, rest)) if !scheme.contains('/') => (scheme, rest),
            _ => ("", name),
        };
        let target = match scheme {
            "" | "fifo" => Target::Fifo(absolute(name, rest.as_bytes())?),
            "file" => Target::File(absolute(name, &Url::parse(rest).path)?),
            "binary" | "binary-v2" => {
                let url = Url::parse(rest);
                Target::Program(Command {
                    path: absolute(name, &url.path)?,
                    arguments: arguments(name, url.query)?,
                    must_say_ready: scheme == "binary-v2",
                })
            }
            "ttrpc+unix" => {
                let url = Url::parse(rest);
                let id = url.value("streaming_id").unwrap_or_default();
                if id.is_empty() {
                    return Err(refused(name, "it has no streaming_id"));
                }
                Target::Stream(Address {
                    // containerd puts a slash before a path that has one.
                    socket: absolute(name, &url.path)?.components().collect(),
                    id: id.into_owned(),
                })
            }
            _ if scheme.contains('+') => {
                let reason = "streams are served over ttrpc on Unix sockets only (ttrpc+unix)";
                return Err(refused(name, reason));
            }
            _ => {
                let reason = "the scheme is none of fifo, file, binary, binary-v2, ttrpc+unix";
                return Err(refused(name, reason));
            }
        };
        Ok(Some(target))
    }
}

/// The parts of a URL without a host that matter here.
struct Url<'a> {
    path: Cow<'a, [u8]>,
    query: &'a str,
}

impl<'a> Url<'a> {
    /// `rest` is what follows the scheme.
    fn parse(rest: &'a str) -> Self {
        let (rest, _fragment) = rest.split_once('#').unwrap_or((rest, ""));
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        Url {
            path: percent_decode_str(path).into(),
            query,
        }
    }

    /// The first value of a key.
    fn value(&self, key: &str) -> Option<Cow<'a, str>> {
        let mut pairs = form_urlencoded::parse(self.query.as_bytes());
        pairs.find_map(|(name, value)| (name == key).then_some(value))
    }
}

/// Each key of a query and its first value, one behind the other.
fn arguments(name: &str, query: &str) -> Result<Vec<String>> {
    let mut arguments: Vec<(Cow<'_, str>, Cow<'_, str>)> = Vec::new();
    for (key, value) in form_urlencoded::parse(query.as_bytes()) {
        if key.contains('\0') || value.contains('\0') {
            return Err(refused(name, "an argument has a zero byte"));
        }
        if arguments.iter().all(|(known, _)| *known != key) {
            arguments.push((key, value));
        }
    }
    let words = arguments.into_iter().flat_map(<[Cow<'_, str>; 2]>::from);
    Ok(words.map(Cow::into_owned).collect())
}

fn absolute(name: &str, path: &[u8]) -> Result<PathBuf> {
    if !path.starts_with(b"/") || path.contains(&0) {
        return Err(refused(name, "it is not an absolute path"));
    }
    Ok(PathBuf::from(OsStr::from_bytes(path)))
}

pub(super) fn refused(name: &str, reason: &str) -> Error {
    Error::Argument {
        what: "Standard stream",
        value: name.chars().take(120).collect(),
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn named(name: &str) -> Target {
        Target::named(name).unwrap().unwrap()
    }

    #[test]
    fn names_of_streams_follow_containerd_io_02() {
        assert_eq!(Target::named("").unwrap(), None);
        assert_eq!(named("/run/a"), Target::Fifo("/run/a".into()));
        assert_eq!(named("fifo:///run/a"), Target::Fifo("/run/a".into()));
        assert_eq!(named("/run/a://b"), Target::Fifo("/run/a://b".into()));
        assert_eq!(named("file:///a/log"), Target::File("/a/log".into()));
        assert_eq!(named("file:///a%20b?x#y"), Target::File("/a b".into()));
        for bad in [
            "file://log",
            "npipe://x",
            "binary://x",
            "binary:///x?a=%00",
            "ttrpc+unix:///x",
            "ttrpc+unix:///x?streaming_id=",
            "ttrpc+vsock://3:4?streaming_id=a",
            "grpc+unix:///x?streaming_id=a",
            "relative",
            "/a\0",
            "file:///a%00",
            "fifo://x",
        ] {
            let error = Target::named(bad).unwrap_err();
            assert_eq!(error.code(), ttrpc::Code::INVALID_ARGUMENT, "{bad:?}");
            assert!(error.text().contains(&format!("{bad:?}")), "{error}");
        }
    }

    #[test]
    fn the_arguments_of_a_logging_program_are_keys_and_their_first_values_io_18() {
        let name = "binary:///usr/bin/log%20it?dir=%2Fvar%2Flog&b=two+words&dir=twice&empty";
        let command = Command {
            path: "/usr/bin/log it".into(),
            arguments: ["dir", "/var/log", "b", "two words", "empty", ""]
                .map(str::to_owned)
                .to_vec(),
            must_say_ready: false,
        };
        assert_eq!(named(name), Target::Program(command));
        let strict = Command {
            path: "/x".into(),
            arguments: Vec::new(),
            must_say_ready: true,
        };
        assert_eq!(named("binary-v2:///x"), Target::Program(strict));
    }

    #[test]
    fn a_stream_is_named_by_a_socket_and_an_id_io_21() {
        for name in [
            "ttrpc+unix:///run/containerd/s/ab?streaming_id=c-stdout",
            "ttrpc+unix:////run/containerd/s/ab?x=y&streaming_id=c-stdout",
        ] {
            let address = Address {
                socket: "/run/containerd/s/ab".into(),
                id: "c-stdout".to_owned(),
            };
            assert_eq!(named(name), Target::Stream(address));
        }
    }

    proptest! {
        #[test]
        fn any_name_is_answered(name in ".{0,40}", scheme in "(file|binary|ttrpc\\+unix)://") {
            let _ = Target::named(&name);
            let _ = Target::named(&format!("{scheme}/{name}"));
        }
    }
}
