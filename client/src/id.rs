//! The id of a container.

use std::{fmt, str::FromStr};

/// The id of a container: `[A-Za-z0-9][A-Za-z0-9_.-]{0,127}`, a safe name of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContainerId(String);

impl ContainerId {
    /// The id as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for ContainerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ContainerId {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |byte: &u8| byte.is_ascii_alphanumeric();
        if text.len() > 128 {
            return Err("an id has at most 128 characters".to_owned());
        }
        if !text.as_bytes().first().is_some_and(plain) {
            return Err("an id begins with a letter or digit".to_owned());
        }
        if !text
            .bytes()
            .all(|byte| plain(&byte) || b"_.-".contains(&byte))
        {
            return Err("an id has only letters, digits, '_', '.' and '-'".to_owned());
        }
        Ok(ContainerId(text.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_a_safe_file_name_b18() {
        for id in ["a", "web-1.x_2", &"a".repeat(128)] {
            assert!(id.parse::<ContainerId>().is_ok(), "{id}");
        }
        for id in [
            "",
            "../../x",
            "-x",
            ".",
            "a/b",
            "a\0",
            "%n",
            "ä",
            &"a".repeat(129),
        ] {
            assert!(id.parse::<ContainerId>().is_err(), "{id}");
        }
    }
}
