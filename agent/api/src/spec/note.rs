//! What becomes of the fields of a specification, field by field.
//!
//! Owns the table of fields that take effect as they stand, and where. What a judgement
//! leaves out or does otherwise it says in a [`Note`]; [`report`] puts both together, so
//! that every field that somebody has set is told of once.

use std::fmt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Most rows of a report.
const ROWS_MAX: usize = 1_024;

/// What becomes of a field.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Fate {
    /// It is applied in the guest.
    Guest,
    /// It is applied on the host.
    Host,
    /// It has a part for either.
    Both,
    /// It is applied in another way than it says.
    Changed,
    /// It has no meaning for a virtual machine: nobody misses it.
    Ignored,
    /// It is not applied, which somebody may miss.
    Missing,
    /// There is no container because of it.
    Refused,
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Fate::Guest => "guest",
            Fate::Host => "host",
            Fate::Both => "host and guest",
            Fate::Changed => "changed",
            Fate::Ignored => "ignored by design",
            Fate::Missing => "not applied",
            Fate::Refused => "refused",
        })
    }
}

/// What becomes of one field.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// The field, as `process.user.uid`.
    pub field: String,
    /// What becomes of it.
    pub fate: Fate,
    /// Why, or how; empty where the fate says it all.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub why: String,
    /// Whoever set it wanted protection that it does not give.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub security: bool,
}

impl Note {
    fn new(field: impl Into<String>, fate: Fate, why: impl Into<String>) -> Self {
        Note {
            field: field.into(),
            fate,
            why: why.into(),
            security: false,
        }
    }

    /// A field that is applied in another way.
    pub fn changed(field: impl Into<String>, how: impl Into<String>) -> Self {
        Note::new(field, Fate::Changed, how)
    }

    /// A field that has no meaning here.
    pub fn ignored(field: impl Into<String>, why: impl Into<String>) -> Self {
        Note::new(field, Fate::Ignored, why)
    }

    /// A field whose effect somebody may miss.
    pub fn missing(field: impl Into<String>, why: impl Into<String>) -> Self {
        Note::new(field, Fate::Missing, why)
    }

    /// A block device of the host.
    pub(crate) fn disk(field: impl Into<String>) -> Self {
        Note::new(
            field,
            Fate::Both,
            "the virtual machine has it as a disk, under other numbers",
        )
    }

    /// A label: policies are the host's, and the guest's kernel has none.
    pub(crate) fn label(field: impl Into<String>) -> Self {
        Note {
            security: true,
            ..Note::ignored(field, "it belongs to the host's kernel")
        }
    }

    /// Whether it says anything else than that a field is applied as it stands.
    #[must_use]
    pub fn is_remark(&self) -> bool {
        match self.fate {
            Fate::Guest | Fate::Host | Fate::Both => false,
            Fate::Changed | Fate::Ignored | Fate::Missing | Fate::Refused => true,
        }
    }
}

impl From<&crate::spec::Error> for Note {
    fn from(error: &crate::spec::Error) -> Self {
        Note::new(error.field(), Fate::Refused, error.reason())
    }
}

impl fmt::Display for Note {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Note {
            field, fate, why, ..
        } = self;
        match fate {
            Fate::Ignored | Fate::Missing => write!(f, "{field} is ignored: {why}"),
            _ if why.is_empty() => write!(f, "{field}: {fate}"),
            _ => write!(f, "{field}: {why}"),
        }
    }
}

/// The fields that need no judgement beyond that of their values. What is not here is
/// not known, unless a judgement says something of it.
const FIELDS: [(&str, Fate, &str); 71] = {
    use Fate::{Both, Changed, Guest, Host, Ignored, Missing};
    const V1: &str = "cgroup v2 has no such thing";
    const PLATFORM: &str = "it is of another platform";
    [
        ("annotations", Host, ""),
        ("domainname", Guest, ""),
        ("freebsd", Ignored, PLATFORM),
        (
            "hooks.createContainer",
            Changed,
            "run on the host, in the network namespace of the pod and outside the container's mounts",
        ),
        ("hooks.createRuntime", Host, ""),
        ("hooks.poststart", Host, ""),
        ("hooks.poststop", Host, ""),
        ("hooks.prestart", Host, ""),
        ("hooks.startContainer", Guest, ""),
        ("hostname", Guest, ""),
        ("linux.cgroupsPath", Host, ""),
        ("linux.devices", Guest, ""),
        ("linux.gidMappings", Guest, ""),
        ("linux.intelRdt", Missing, "it belongs to the host"),
        ("linux.maskedPaths", Guest, ""),
        ("linux.memoryPolicy", Missing, "it belongs to the host"),
        ("linux.namespaces", Guest, ""),
        ("linux.personality", Guest, ""),
        ("linux.readonlyPaths", Guest, ""),
        ("linux.resources.blockIO.leafWeight", Missing, V1),
        ("linux.resources.blockIO.weight", Guest, ""),
        ("linux.resources.cpu.burst", Guest, ""),
        ("linux.resources.cpu.idle", Guest, ""),
        ("linux.resources.cpu.period", Both, ""),
        ("linux.resources.cpu.quota", Both, ""),
        ("linux.resources.cpu.shares", Guest, ""),
        ("linux.resources.devices", Guest, ""),
        ("linux.resources.hugepageLimits", Guest, ""),
        ("linux.resources.memory.checkBeforeUpdate", Ignored, V1),
        ("linux.resources.memory.kernel", Ignored, V1),
        ("linux.resources.memory.kernelTCP", Ignored, V1),
        ("linux.resources.memory.limit", Both, ""),
        ("linux.resources.memory.reservation", Guest, ""),
        ("linux.resources.memory.swap", Guest, ""),
        ("linux.resources.memory.swappiness", Missing, V1),
        ("linux.resources.memory.useHierarchy", Ignored, V1),
        ("linux.resources.pids", Guest, ""),
        ("linux.resources.unified", Guest, ""),
        ("linux.rootfsPropagation", Guest, ""),
        ("linux.seccomp", Guest, ""),
        ("linux.sysctl", Guest, ""),
        ("linux.timeOffsets", Guest, ""),
        ("linux.uidMappings", Guest, ""),
        ("mounts", Both, ""),
        ("ociVersion", Host, ""),
        ("process.args", Guest, ""),
        ("process.capabilities.ambient", Guest, ""),
        ("process.capabilities.bounding", Guest, ""),
        ("process.capabilities.effective", Guest, ""),
        ("process.capabilities.inheritable", Guest, ""),
        ("process.capabilities.permitted", Guest, ""),
        ("process.consoleSize", Guest, ""),
        ("process.cwd", Guest, ""),
        ("process.env", Guest, ""),
        ("process.ioPriority", Guest, ""),
        ("process.noNewPrivileges", Guest, ""),
        ("process.oomScoreAdj", Both, ""),
        ("process.rlimits", Guest, ""),
        ("process.scheduler", Guest, ""),
        ("process.terminal", Both, ""),
        ("process.user.additionalGids", Guest, ""),
        ("process.user.gid", Guest, ""),
        ("process.user.uid", Guest, ""),
        ("process.user.umask", Guest, ""),
        ("process.user.username", Ignored, PLATFORM),
        ("root.path", Both, ""),
        ("root.readonly", Guest, ""),
        ("solaris", Ignored, PLATFORM),
        ("vm", Missing, "kernel and image are the administrator's"),
        ("windows", Ignored, PLATFORM),
        ("zos", Ignored, PLATFORM),
    ]
};

/// What becomes of each field of `spec` that is set, in the order of their names.
/// `notes` are the judgement's: where it says something of a field it has the last word.
#[must_use]
pub fn report(spec: &Value, notes: &[Note]) -> Vec<Note> {
    let mut rows = Vec::new();
    walk(String::new(), spec, &mut rows);
    rows.retain(|row| !notes.iter().any(|note| note.field == row.field));
    rows.extend_from_slice(notes);
    rows.sort_by(|a, b| a.field.cmp(&b.field));
    rows.truncate(ROWS_MAX);
    rows
}

fn walk(field: String, value: &Value, rows: &mut Vec<Note>) {
    if !is_set(value) || rows.len() >= ROWS_MAX {
        return;
    }
    if let Some((_, fate, why)) = FIELDS.iter().find(|(known, ..)| *known == field) {
        rows.push(Note::new(field, *fate, *why));
        return;
    }
    let below = |known: &str| {
        let rest = known.strip_prefix(field.as_str());
        field.is_empty() || rest.is_some_and(|rest| rest.starts_with('.'))
    };
    match value {
        Value::Object(members) if FIELDS.iter().any(|(known, ..)| below(known)) => {
            for (name, member) in members {
                let dot = if field.is_empty() { "" } else { "." };
                walk(format!("{field}{dot}{}", short(name)), member, rows);
            }
        }
        _ => rows.push(Note::ignored(field, "no such field is known")),
    }
}

/// A name for a table.
fn short(name: &str) -> String {
    const SHOWN_CHARS: usize = 80;
    name.chars()
        .take(SHOWN_CHARS)
        .collect::<String>()
        .escape_debug()
        .to_string()
}

/// What a Go program leaves out where nobody has set it.
fn is_set(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::Bool(true) | Value::Number(_) => true,
        Value::String(text) => !text.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(members) => members.values().any(is_set),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn no_field_is_in_the_table_twice_and_none_hides_another() {
        for (n, (field, ..)) in FIELDS.iter().enumerate() {
            for (other, ..) in FIELDS.iter().skip(n + 1) {
                assert_ne!(field, other);
                for (a, b) in [(field, other), (other, field)] {
                    let rest = a.strip_prefix(b).unwrap_or_default();
                    assert!(!rest.starts_with('.'), "{b} hides {a}");
                }
            }
        }
    }

    #[test]
    fn every_field_that_is_set_is_told_of_once_oc_01() {
        let spec = json!({
            "ociVersion": "1.2.0",
            "process": {"args": ["a"], "user": {"uid": 0, "username": "x"}, "cwd": "", "terminal": false},
            "linux": {"resources": {"memory": {"limit": 0, "swappiness": 1}, "unheardOf": {"a": 1, "b": 2}}},
            "other": [1],
            "mounts": null,
            "annotations": {"a": ""},
        });
        let note = Note::missing("process.args", "a judgement");
        let rows = report(&spec, std::slice::from_ref(&note));
        let rows: Vec<_> = rows
            .iter()
            .map(|row| (row.field.as_str(), row.fate))
            .collect();
        assert_eq!(
            rows,
            [
                ("linux.resources.memory.limit", Fate::Both),
                ("linux.resources.memory.swappiness", Fate::Missing),
                ("linux.resources.unheardOf", Fate::Ignored),
                ("ociVersion", Fate::Host),
                ("other", Fate::Ignored),
                ("process.args", Fate::Missing),
                ("process.user.uid", Fate::Guest),
                ("process.user.username", Fate::Ignored),
            ]
        );
    }

    #[test]
    fn a_report_has_an_end_whatever_the_specification_holds() {
        let many: serde_json::Map<String, Value> =
            (0..100_000).map(|n| (format!("x{n}"), json!(1))).collect();
        assert_eq!(report(&Value::Object(many), &[]).len(), ROWS_MAX);
    }
}
