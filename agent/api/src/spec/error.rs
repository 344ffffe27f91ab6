//! A refusal: which field, what it is, why not.

use serde::Serialize;

/// Most characters of a value that are quoted.
const SHOWN_CHARS: usize = 120;

/// A specification that is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} = {value}: {reason}")]
pub struct Error {
    field: String,
    value: String,
    reason: String,
}

impl Error {
    /// Refuses `value` at `field`, which is a path such as `process.user.uid`.
    pub fn new(field: impl Into<String>, value: impl Serialize, reason: impl Into<String>) -> Self {
        // As JSON, so that control characters are escaped.
        let mut value = serde_json::to_string(&value).unwrap_or_default();
        if let Some((cut, _)) = value.char_indices().nth(SHOWN_CHARS) {
            value.truncate(cut);
            value.push('…');
        }
        Self {
            field: field.into(),
            value,
            reason: reason.into(),
        }
    }

    /// The field, as a path.
    #[must_use]
    pub fn field(&self) -> &str {
        &self.field
    }

    /// Why it is refused.
    #[must_use]
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Refuses the absence of `field`.
    pub fn missing(field: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            value: "nothing".to_owned(),
            reason: "it is required".to_owned(),
        }
    }

    /// Refuses more than `most` entries.
    pub(crate) fn too_many(field: impl Into<String>, count: usize, most: usize) -> Self {
        Self {
            field: field.into(),
            value: format!("{count} entries"),
            reason: format!("at most {most} are allowed"),
        }
    }
}
