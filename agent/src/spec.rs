//! From the bytes of `config.json` to what the agent will do.
//!
//! Owns the one entry to each form: [`container`] for a whole specification,
//! [`process`] for the `process` object of an exec. Promises that a [`plan`]
//! is complete and sane: whatever this code does not support or does not
//! understand is refused with the field and the value in the text, before
//! anything in the guest changes. Touches no file and makes no system call.

mod check;
mod mounts;
mod oci;
pub mod plan;
mod process;
mod resources;

pub(crate) use self::mounts::allowed_in_proc;
use self::plan::{ContainerPlan, ProcessPlan, Seccomp};

/// Largest number of additional groups, the kernel's `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65_536;

/// Why a specification is refused.
#[derive(Debug, thiserror::Error)]
pub enum SpecError {
    /// Not JSON, or a value of the wrong JSON type.
    #[error("Bad specification at {path}: {text}")]
    Json {
        /// Path of the value, as `process.user.uid`.
        path: String,
        /// What the parser says.
        text: String,
    },
    /// A value that the specification or the agent does not allow.
    #[error("{field} is {value:?}: {reason}")]
    Value {
        /// Path of the value, as `process.cwd`.
        field: String,
        /// The value, cut to a readable length.
        value: String,
        /// What is wrong with it.
        reason: &'static str,
    },
}

impl SpecError {
    #[expect(
        clippy::needless_pass_by_value,
        reason = "numbers and texts that were just made"
    )]
    fn value(field: impl Into<String>, value: impl ToString, reason: &'static str) -> Self {
        const SHOWN_CHARS: usize = 128;
        let value = value.to_string();
        let cut: String = value.chars().take(SHOWN_CHARS).collect();
        Self::Value {
            field: field.into(),
            value: cut,
            reason,
        }
    }
}

/// Reads a whole `config.json`; `seccomp` is its filter, compiled by the caller.
pub fn container(json: &[u8], seccomp: Option<Seccomp>) -> Result<ContainerPlan, SpecError> {
    check::container(parse(json)?, seccomp)
}

/// Reads a `process` object; `seccomp` is the filter of its container.
pub fn process(json: &[u8], seccomp: Option<Seccomp>) -> Result<ProcessPlan, SpecError> {
    process::process(parse(json)?, seccomp)
}

/// Takes a compiled filter (array of `struct sock_filter`); `None` if empty.
pub fn seccomp(filter: &[u8], flags: u32) -> Result<Option<Seccomp>, SpecError> {
    process::seccomp(filter, flags)
}

fn parse<T: serde::de::DeserializeOwned>(json: &[u8]) -> Result<T, SpecError> {
    let mut deserializer = serde_json::Deserializer::from_slice(json);
    let value =
        serde_path_to_error::deserialize(&mut deserializer).map_err(|e| SpecError::Json {
            path: e.path().to_string(),
            text: e.inner().to_string(),
        })?;
    deserializer.end().map_err(|e| SpecError::Json {
        path: ".".into(),
        text: e.to_string(),
    })?;
    Ok(value)
}

#[cfg(test)]
mod tests;
