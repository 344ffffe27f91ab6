//! The shim's command line, in the syntax of Go's `flag` package.
//!
//! Accepts `-x v`, `-x=v`, `--x v` and `--x=v`. A flag that is not known is kept
//! for a log line and otherwise ignored: a later containerd may add some.

use thiserror::Error;

/// What the binary is asked to do.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Action {
    /// Make the daemon of a pod, or find it; print its address.
    Start,
    /// Remove what a dead pod left behind.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
    /// Print what can be taken over from a program that serves.
    Carries,
    /// Serve: what `start` runs in the background.
    #[default]
    Serve,
}

/// The parsed command line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// What to do.
    pub action: Action,
    /// `-namespace`: containerd's namespace.
    pub namespace: String,
    /// `-id`: the container, or in [`Action::Serve`] the group.
    pub id: String,
    /// `-address`: containerd's gRPC socket; empty under CRI-O.
    pub address: String,
    /// `-bundle`: given with `delete`.
    pub bundle: String,
    /// `-debug`: log more.
    pub debug: bool,
    /// Flags that are not known.
    pub ignored: Vec<String>,
}

/// A command line that cannot be understood.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
pub enum Error {
    /// A flag at the end lacks its value.
    #[error("Flag -{0} needs a value")]
    NoValue(String),
    /// A boolean flag with another value than Go's `strconv.ParseBool` takes.
    #[error("Flag -{flag} cannot be {value:?}: neither true nor false")]
    NotBoolean {
        /// The flag.
        flag: String,
        /// Its value.
        value: String,
    },
    /// The last word is no action.
    #[error("Action {0:?} is neither start nor delete")]
    NoAction(String),
}

impl Flags {
    /// Parses the arguments that follow the program's name.
    pub fn parse<I: IntoIterator<Item = String>>(arguments: I) -> Result<Self, Error> {
        let mut words: Vec<String> = arguments.into_iter().collect();
        let mut flags = Flags::default();
        // The action is the last word and has no dash; taking it first tells the
        // value of an unknown flag from the action.
        match words.last().map(String::as_str) {
            Some("start") => flags.action = Action::Start,
            Some("delete") => flags.action = Action::Delete,
            _ => {}
        }
        if flags.action != Action::Serve {
            words.pop();
        }
        let mut words = words.into_iter().peekable();
        while let Some(word) = words.next() {
            let Some(name) = word.strip_prefix("--").or_else(|| word.strip_prefix('-')) else {
                return Err(Error::NoAction(word));
            };
            let (name, inline) = match name.split_once('=') {
                Some((name, value)) => (name.to_owned(), Some(value.to_owned())),
                None => (name.to_owned(), None),
            };
            match name.as_str() {
                "debug" => flags.debug = boolean(&name, inline.as_deref())?,
                "v" | "version" => {
                    if boolean(&name, inline.as_deref())? {
                        flags.action = Action::Version;
                    }
                }
                "carries" => flags.action = Action::Carries,
                "info" => {
                    if boolean(&name, inline.as_deref())? {
                        flags.action = Action::Info;
                    }
                }
                "namespace" | "id" | "address" | "bundle" | "publish-binary" | "socket"
                | "debug-socket" => {
                    let value = match inline.or_else(|| words.next()) {
                        Some(value) => value,
                        None => return Err(Error::NoValue(name)),
                    };
                    match name.as_str() {
                        "namespace" => flags.namespace = value,
                        "id" => flags.id = value,
                        "address" => flags.address = value,
                        "bundle" => flags.bundle = value,
                        // Events go by ttrpc, and the socket is inherited.
                        _ => {}
                    }
                }
                _ => {
                    if inline.is_none() {
                        words.next_if(|next| !next.starts_with('-'));
                    }
                    flags.ignored.push(name);
                }
            }
        }
        Ok(flags)
    }
}

fn boolean(flag: &str, value: Option<&str>) -> Result<bool, Error> {
    match value {
        None | Some("1" | "t" | "T" | "true" | "TRUE" | "True") => Ok(true),
        Some("0" | "f" | "F" | "false" | "FALSE" | "False") => Ok(false),
        Some(value) => Err(Error::NotBoolean {
            flag: flag.to_owned(),
            value: value.to_owned(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, Error> {
        Flags::parse(line.split_whitespace().map(str::to_owned))
    }

    #[test]
    fn every_form_of_gos_flags_is_understood_lc_05() {
        let expected = Flags {
            action: Action::Start,
            namespace: "k8s.io".into(),
            id: "c1".into(),
            address: "/run/c.sock".into(),
            debug: true,
            ..Flags::default()
        };
        for line in [
            "-namespace k8s.io -address /run/c.sock -publish-binary /usr/bin/containerd -id c1 -debug start",
            "--namespace=k8s.io --address=/run/c.sock --id=c1 --debug=true start",
            "-debug=1 -id=c1 -namespace k8s.io -socket x -debug-socket y -address /run/c.sock start",
        ] {
            assert_eq!(parse(line), Ok(expected.clone()), "{line}");
        }
    }

    #[test]
    fn unknown_flags_are_ignored_with_their_values_lc_05() {
        let flags = parse("-future yes -id c1 -other=1 -last -namespace n delete").unwrap();
        assert_eq!(flags.action, Action::Delete);
        assert_eq!((flags.id.as_str(), flags.namespace.as_str()), ("c1", "n"));
        assert_eq!(flags.ignored, ["future", "other", "last"]);
    }

    #[test]
    fn actions_without_a_word_are_flags_or_serving_lc_06() {
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert_eq!(parse("-version").unwrap().action, Action::Version);
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-carries").unwrap().action, Action::Carries);
        assert_eq!(
            parse("-namespace=n -id=start").unwrap().action,
            Action::Serve
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse("-id"), Err(Error::NoValue("id".into())));
        assert_eq!(parse("stop"), Err(Error::NoAction("stop".into())));
        assert!(matches!(
            parse("-debug=maybe start"),
            Err(Error::NotBoolean { .. })
        ));
    }
}
