//! Runtime options: what the caller sets for one pod.
//!
//! They come with `start`, with Create, or with both. Our own are those of every runtime
//! that is not runc (`runtimeoptions.v1.Options`): a file of settings, or their text.
//! Those of runc are for runc, but for the shim's cgroup; those of others are let pass.
//! None of them is ever a reason to refuse: a file that cannot be read is one later.

use std::path::PathBuf;

use containerd_shim_protos::{
    bootstrap_api::{BootstrapParams, Extension},
    protobuf::{Message, MessageField, UnknownValueRef, well_known_types::any::Any},
    shim::oci::Options as RuncOptions,
};
use protobuf::well_known_types::empty::Empty;
use tracing::info;

/// Where the settings of a pod are, if not where those of the host are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// In this file.
    File(PathBuf),
    /// Here, as TOML.
    Text(String),
}

/// What the caller sets.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Where the settings are.
    pub source: Option<Source>,
    /// The cgroup in which the shim shall live; empty if it may stay.
    pub shim_cgroup: String,
    /// What was not understood, one sentence each.
    pub notes: Vec<String>,
}

impl Options {
    /// Reads options of any kind; the first that says something counts.
    pub fn read<'a>(all: impl IntoIterator<Item = &'a Any>) -> Self {
        let mut options = Options::default();
        for any in all {
            options.add(any);
        }
        options
    }

    /// Tells what was not understood.
    pub fn log(&self) {
        for note in &self.notes {
            info!("{note}");
        }
    }

    fn add(&mut self, any: &Any) {
        // Some write the host of a type before its name.
        let kind = any.type_url.rsplit('/').next().unwrap_or_default();
        match kind {
            "" if any.value.is_empty() => {}
            "runtimeoptions.v1.Options" | "cri.runtimeoptions.v1.Options" => {
                match source(&any.value) {
                    Ok(found) => self.source = self.source.take().or(found),
                    Err(why) => self.note(kind, &why),
                }
            }
            "containerd.runc.v1.Options" => match RuncOptions::parse_from_bytes(&any.value) {
                Ok(runc) => {
                    if self.shim_cgroup.is_empty() {
                        self.shim_cgroup = runc.shim_cgroup;
                    }
                    self.note(kind, "they are runc's: only shim_cgroup is heeded");
                }
                Err(error) => self.note(kind, &error.to_string()),
            },
            _ => self.note(kind, "nobody here knows this type"),
        }
    }

    fn note(&mut self, kind: &str, why: &str) {
        let kind: String = kind.chars().take(128).collect();
        self.notes.push(format!(
            "runtime options of type {kind:?} are ignored: {why}"
        ));
    }
}

/// The source of settings in a `runtimeoptions.v1.Options`: a type (1) that is not for
/// us, a path (2), a text (3).
fn source(value: &[u8]) -> Result<Option<Source>, String> {
    let message = Empty::parse_from_bytes(value).map_err(|error| error.to_string())?;
    let (mut path, mut body) = (String::new(), String::new());
    for (field, value) in message.special_fields.unknown_fields() {
        let place = match field {
            2 => &mut path,
            3 => &mut body,
            _ => continue,
        };
        let UnknownValueRef::LengthDelimited(bytes) = value else {
            return Err(format!("field {field} is no text"));
        };
        let text = std::str::from_utf8(bytes).map_err(|_| format!("field {field} is no text"))?;
        text.clone_into(place);
    }
    Ok(match (path.is_empty(), body.is_empty()) {
        (false, _) => Some(Source::File(path.into())),
        (true, false) => Some(Source::Text(body)),
        (true, true) => None,
    })
}

/// Options as a process hands them to another one.
#[must_use]
pub fn pack(all: Vec<Any>) -> Vec<u8> {
    let extension = |value| Extension {
        value: MessageField::some(value),
        ..Extension::default()
    };
    let params = BootstrapParams {
        extensions: all.into_iter().map(extension).collect(),
        ..BootstrapParams::default()
    };
    params.write_to_bytes().unwrap_or_default()
}

/// Takes them out again.
#[must_use]
pub fn unpack(params: BootstrapParams) -> Vec<Any> {
    let values = params.extensions.into_iter();
    values
        .filter_map(|extension| extension.value.into_option())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn any(kind: &str, value: impl Into<Vec<u8>>) -> Any {
        Any {
            type_url: kind.to_owned(),
            value: value.into(),
            ..Any::default()
        }
    }

    /// A `runtimeoptions.v1.Options` with texts in these fields.
    fn ours(fields: &[(u8, &str)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (field, text) in fields {
            bytes.extend([field << 3 | 2, u8::try_from(text.len()).unwrap()]);
            bytes.extend(text.as_bytes());
        }
        bytes
    }

    #[test]
    fn settings_come_by_path_or_by_text_under_both_names_ta_19() {
        let file = Some(Source::File("/etc/x.toml".into()));
        let text = Some(Source::Text("vcpus = 2".into()));
        for (fields, source) in [
            (&[(2, "/etc/x.toml")][..], &file),
            (&[(1, "x"), (2, "/etc/x.toml"), (3, "vcpus = 2")], &file),
            (&[(1, "x"), (2, ""), (3, "vcpus = 2"), (9, "later")], &text),
            (&[(1, "x")], &None),
            (&[], &None),
        ] {
            for kind in [
                "runtimeoptions.v1.Options",
                "cri.runtimeoptions.v1.Options",
                "type.googleapis.com/runtimeoptions.v1.Options",
            ] {
                let options = Options::read([&any(kind, ours(fields))]);
                assert_eq!(&options.source, source, "{fields:?}");
                assert!(options.notes.is_empty(), "{options:?}");
            }
        }
    }

    #[test]
    fn options_of_others_and_broken_ones_are_let_pass_with_one_note_ta_18() {
        let runc = RuncOptions {
            shim_cgroup: "/shims".into(),
            io_uid: 1000,
            ..RuncOptions::default()
        };
        let runc = runc.write_to_bytes().unwrap();
        for (kind, value, notes) in [
            ("", &b""[..], 0),
            ("containerd.runc.v1.Options", &runc, 1),
            ("containerd.runc.v1.Options", b"\xff\xff", 1),
            ("runtimeoptions.v1.Options", b"\xff\xff", 1),
            ("runtimeoptions.v1.Options", b"\x12\x01\xff", 1),
            ("runtimeoptions.v1.Options", b"\x10\x05", 1),
            ("some.other.v1.Options", b"x", 1),
            ("", b"x", 1),
        ] {
            let options = Options::read([&any(kind, value)]);
            assert_eq!(options.notes.len(), notes, "{kind}: {options:?}");
            assert_eq!(options.source, None);
            let expected = if value == runc { "/shims" } else { "" };
            assert_eq!(options.shim_cgroup, expected);
        }
    }

    #[test]
    fn the_first_that_says_something_counts_and_survives_its_way_ta_19() {
        let kind = "runtimeoptions.v1.Options";
        let all = vec![
            any(kind, ours(&[])),
            any(kind, ours(&[(2, "/first")])),
            any(kind, ours(&[(2, "/second")])),
        ];
        let packed = pack(all.clone());
        let params = BootstrapParams::parse_from_bytes(&packed).unwrap();
        assert_eq!(unpack(params), all);
        let options = Options::read(&all);
        assert_eq!(options.source, Some(Source::File("/first".into())));
    }
}
