//! A value of the specification with the name by which a person finds it.
//!
//! Every refusal names the field and quotes the value, cut and escaped.

use serde_json::Value;
use thiserror::Error;

/// A specification that is refused.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("config.json: {field} = {value}: {reason}")]
pub struct Error {
    field: String,
    value: String,
    reason: String,
}

/// A value and its name, such as `linux.namespaces[2].path`.
#[derive(Clone, Debug)]
pub struct Field<'a> {
    name: String,
    value: &'a Value,
}

impl<'a> Field<'a> {
    /// The whole document.
    #[must_use]
    pub fn top(value: &'a Value) -> Self {
        Field {
            name: String::new(),
            value,
        }
    }

    /// A document that stands alone, such as the process of an exec.
    #[must_use]
    pub fn named(name: &str, value: &'a Value) -> Self {
        Field {
            name: name.to_owned(),
            value,
        }
    }

    /// The value.
    #[must_use]
    pub fn value(&self) -> &'a Value {
        self.value
    }

    fn child(&self, name: &str, value: &'a Value) -> Self {
        let name = if self.name.is_empty() {
            name.to_owned()
        } else {
            format!("{}.{name}", self.name)
        };
        Field { name, value }
    }

    /// A member, unless it is absent or null.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<Self> {
        let value = self.value.get(name).filter(|value| !value.is_null())?;
        Some(self.child(name, value))
    }

    /// A member that must be there.
    pub fn required(&self, name: &str) -> Result<Self, Error> {
        self.get(name).ok_or_else(|| self.missing(name))
    }

    /// The members of an object.
    pub fn members(&self) -> Result<Vec<(&'a str, Self)>, Error> {
        let object = self
            .value
            .as_object()
            .ok_or_else(|| self.refuse("it must be an object"))?;
        Ok(object
            .iter()
            .map(|(name, value)| (name.as_str(), self.child(name, value)))
            .collect())
    }

    /// The items of an array.
    pub fn items(&self) -> Result<Vec<Self>, Error> {
        if self.value.is_null() {
            return Ok(Vec::new());
        }
        let array = self
            .value
            .as_array()
            .ok_or_else(|| self.refuse("it must be an array"))?;
        let item = |(index, value)| Field {
            name: format!("{}[{index}]", self.name),
            value,
        };
        Ok(array.iter().enumerate().map(item).collect())
    }

    /// The items of a member that is an array; none if it is absent.
    pub fn items_of(&self, name: &str) -> Result<Vec<Self>, Error> {
        if !self.value.is_object() {
            return Err(self.refuse("it must be an object"));
        }
        self.get(name).map_or(Ok(Vec::new()), |field| field.items())
    }

    /// A string.
    pub fn text(&self) -> Result<&'a str, Error> {
        self.value
            .as_str()
            .ok_or_else(|| self.refuse("it must be a string"))
    }

    /// A string that a system call can take.
    pub fn string(&self) -> Result<&'a str, Error> {
        let text = self.text()?;
        if text.contains('\0') {
            return Err(self.refuse("it contains a NUL"));
        }
        Ok(text)
    }

    /// A string that fits in PATH_MAX.
    pub fn path_text(&self) -> Result<&'a str, Error> {
        let text = self.string()?;
        if text.len() >= 4096 {
            return Err(self.refuse("it is longer than 4095 bytes"));
        }
        Ok(text)
    }

    /// An absolute path.
    pub fn absolute(&self) -> Result<&'a str, Error> {
        let text = self.path_text()?;
        if !text.starts_with('/') {
            return Err(self.refuse("it must be an absolute path"));
        }
        Ok(text)
    }

    /// A whole number.
    pub fn in_range(&self, low: i64, high: i64) -> Result<i64, Error> {
        let number = self
            .value
            .as_i64()
            .ok_or_else(|| self.refuse("it must be a whole number"))?;
        if !(low..=high).contains(&number) {
            return Err(self.refuse(&format!("it must lie between {low} and {high}")));
        }
        Ok(number)
    }

    /// A whole number without a sign.
    pub fn unsigned(&self) -> Result<u64, Error> {
        self.value
            .as_u64()
            .ok_or_else(|| self.refuse("it must be a whole number from 0 to 2^64 - 1"))
    }

    /// The error for this field.
    #[must_use]
    pub fn refuse(&self, reason: &str) -> Error {
        let mut value = self.value.to_string();
        if let Some((cut, _)) = value.char_indices().nth(120) {
            value.truncate(cut);
            value.push('…');
        }
        let field = if self.name.is_empty() {
            "document".to_owned()
        } else {
            self.name.clone()
        };
        Error {
            field,
            value,
            reason: reason.to_owned(),
        }
    }

    /// The error for a member with too many entries.
    #[must_use]
    pub fn refuse_count(&self, name: &str, count: usize, most: usize) -> Error {
        Error {
            field: self.child(name, self.value).name,
            value: format!("{count} entries"),
            reason: format!("at most {most} are allowed"),
        }
    }

    /// The error for a member that is absent.
    #[must_use]
    pub fn missing(&self, name: &str) -> Error {
        Error {
            field: self.child(name, self.value).name,
            value: "nothing".to_owned(),
            reason: "it is required".to_owned(),
        }
    }
}
