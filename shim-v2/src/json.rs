//! JSON of a caller, read strictly: bounded in size and depth, no key twice.
//!
//! Pure. Used for `config.json` and for the process of an Exec; unknown members
//! are kept as they are.

use std::fmt;

use serde::de::{DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};
use thiserror::Error;

/// Largest text, in bytes.
pub const MAX_BYTES: usize = 8 << 20;
/// Deepest nesting of arrays and objects.
const MAX_DEPTH: u32 = 64;

/// JSON that is refused.
#[derive(Debug, Error)]
pub enum Error {
    /// More than [`MAX_BYTES`].
    #[error("It has {0} bytes: more than {MAX_BYTES}")]
    TooLong(usize),
    /// Not JSON, too deep, or a key twice.
    #[error("It is not acceptable JSON")]
    Json(#[from] serde_json::Error),
}

/// Parses one JSON value that takes up all of `text`.
pub fn parse(text: &[u8]) -> Result<Value, Error> {
    if text.len() > MAX_BYTES {
        return Err(Error::TooLong(text.len()));
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = Strict { depth: 0 }.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

#[derive(Clone, Copy)]
struct Strict {
    depth: u32,
}

impl Strict {
    fn deeper<E: serde::de::Error>(self) -> Result<Self, E> {
        if self.depth == MAX_DEPTH {
            return Err(E::custom(format_args!("nested deeper than {MAX_DEPTH}")));
        }
        Ok(Strict {
            depth: self.depth + 1,
        })
    }
}

impl<'de> DeserializeSeed<'de> for Strict {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("not a finite number"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(Value::String(value))
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut array = Vec::new();
        while let Some(item) = items.next_element_seed(inner)? {
            array.push(item);
        }
        Ok(Value::Array(array))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Value, A::Error> {
        let inner = self.deeper()?;
        let mut object = Map::new();
        while let Some(key) = entries.next_key::<String>()? {
            let value = entries.next_value_seed(inner)?;
            if object.contains_key(&key) {
                return Err(A::Error::custom(format_args!(
                    "member {key:?} appears twice"
                )));
            }
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_no_json_is_refused_b1() {
        let deep = "[".repeat(1 << 20);
        let bracketed = format!("{}{}", "[".repeat(65), "]".repeat(65));
        for bad in [
            "",
            "nonsense",
            "\u{feff}{}",
            "{}\0",
            "{} {}",
            "{\"a\":1,\"a\":2}",
            "{\"x\":{\"a\":1,\"a\":1}}",
            &deep,
            &bracketed,
        ] {
            assert!(
                parse(bad.as_bytes()).is_err(),
                "{}",
                &bad[..bad.len().min(40)]
            );
        }
        assert!(matches!(
            parse(&vec![b' '; MAX_BYTES + 1]),
            Err(Error::TooLong(_))
        ));
    }

    #[test]
    fn nesting_up_to_the_limit_passes() {
        let text = format!("{}{}", "[".repeat(64), "]".repeat(64));
        assert!(parse(text.as_bytes()).is_ok());
    }

    proptest! {
        #[test]
        fn it_reads_what_serde_json_reads(numbers: Vec<i64>, text: String, flag: bool) {
            let value = serde_json::json!({"n": numbers, "t": text, "f": flag, "o": {"x": null}});
            prop_assert_eq!(parse(value.to_string().as_bytes()).unwrap(), value);
        }

        #[test]
        fn it_never_panics(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
