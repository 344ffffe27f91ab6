//! JSON of a caller, read strictly: bounded in size and depth, no key twice.
//!
//! Used for `config.json` and for the process of an exec. [`parse`] keeps unknown
//! members as they are; [`from_value`] makes a type of what it read.

use std::{
    fmt,
    io::{self, Read},
};

use serde::{
    Serialize,
    de::{
        DeserializeOwned, DeserializeSeed, Deserializer, Error as _, MapAccess, SeqAccess, Visitor,
    },
};
use serde_json::{Map, Number, Value};
use serde_path_to_error::Segment;

/// Largest text, in bytes.
pub const MAX_BYTES: usize = 8 << 20;
/// Deepest nesting of arrays and objects.
const MAX_DEPTH: u32 = 64;

/// What a message calls the whole of a specification.
const WHOLE: &str = "config.json";

/// JSON that is refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// More than [`MAX_BYTES`].
    #[error("It has more than {MAX_BYTES} bytes")]
    TooLong,
    /// Not JSON, too deep, or a key twice.
    #[error("It is not acceptable JSON")]
    Json(#[from] serde_json::Error),
}

/// Reads a text to its end, or to where [`parse`] will find it too long.
pub fn read(from: impl Read) -> io::Result<Vec<u8>> {
    let most = u64::try_from(MAX_BYTES).map_or(u64::MAX, |most| most.saturating_add(1));
    let mut text = Vec::new();
    from.take(most).read_to_end(&mut text)?;
    Ok(text)
}

/// Parses one JSON value that takes up all of `text`.
pub fn parse(text: &[u8]) -> Result<Value, Error> {
    if text.len() > MAX_BYTES {
        return Err(Error::TooLong);
    }
    let mut reader = serde_json::Deserializer::from_slice(text);
    let value = Strict { depth: 0 }.deserialize(&mut reader)?;
    reader.end()?;
    Ok(value)
}

/// Makes a type of a parsed value. `name` is the value's place in the whole, empty
/// for the whole itself. A member that is null counts as absent.
pub fn from_value<T>(name: &str, mut value: Value) -> Result<T, crate::spec::Error>
where
    T: DeserializeOwned + Serialize,
{
    remove_nulls(&mut value);
    let typed: T = serde_path_to_error::deserialize(&value).map_err(|error| {
        let mut field = name.to_owned();
        let mut at = Some(&value);
        for segment in error.path() {
            match segment {
                Segment::Seq { index } => {
                    field.push_str(&format!("[{index}]"));
                    at = at.and_then(|value| value.get(*index));
                }
                Segment::Map { key } | Segment::Enum { variant: key } => {
                    if !field.is_empty() {
                        field.push('.');
                    }
                    field.push_str(key);
                    at = at.and_then(|value| value.get(key));
                }
                Segment::Unknown => {}
            }
        }
        if field.is_empty() {
            field.push_str(WHOLE);
        }
        crate::spec::Error::new(field, at, error.inner().to_string())
    })?;
    match serde_json::to_value(&typed) {
        Ok(shape) => only_objects_for_objects(name, &value, &shape)?,
        Err(error) => return Err(crate::spec::Error::new(name, value, error.to_string())),
    }
    Ok(typed)
}

/// The parser takes an array for an object, its items for the members in their
/// order: nobody means that.
fn only_objects_for_objects(
    field: &str,
    given: &Value,
    shape: &Value,
) -> Result<(), crate::spec::Error> {
    match (given, shape) {
        (Value::Array(_), Value::Object(_)) => {
            let field = if field.is_empty() { WHOLE } else { field };
            Err(crate::spec::Error::new(
                field,
                given,
                "it must be an object",
            ))
        }
        (Value::Array(given), Value::Array(shape)) => {
            let mut pairs = given.iter().zip(shape).enumerate();
            pairs.try_for_each(|(n, (given, shape))| {
                only_objects_for_objects(&format!("{field}[{n}]"), given, shape)
            })
        }
        (Value::Object(given), Value::Object(shape)) => {
            given.iter().try_for_each(|(key, given)| {
                let dot = if field.is_empty() { "" } else { "." };
                let field = format!("{field}{dot}{key}");
                match shape.get(key) {
                    Some(shape) => only_objects_for_objects(&field, given, shape),
                    None => Ok(()),
                }
            })
        }
        _ => Ok(()),
    }
}

/// Parses a text and makes a type of it.
pub fn from_slice<T>(name: &str, text: &[u8]) -> Result<T, crate::spec::Error>
where
    T: DeserializeOwned + Serialize,
{
    let value = parse(text).map_err(|error| {
        let field = if name.is_empty() { WHOLE } else { name };
        let reason = match &error {
            Error::TooLong => error.to_string(),
            Error::Json(source) => source.to_string(),
        };
        crate::spec::Error::new(field, format!("{} bytes", text.len()), reason)
    })?;
    from_value(name, value)
}

fn remove_nulls(value: &mut Value) {
    match value {
        Value::Object(members) => {
            members.retain(|_, member| !member.is_null());
            members.values_mut().for_each(remove_nulls);
        }
        Value::Array(items) => items.iter_mut().for_each(remove_nulls),
        Value::Null | Value::Bool(_) | Value::Number(_) | Value::String(_) => {}
    }
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
            Err(Error::TooLong)
        ));
    }

    #[test]
    fn no_more_is_read_than_can_be_refused_b1() {
        let endless = read(io::repeat(b' ')).unwrap();
        assert_eq!(endless.len(), MAX_BYTES + 1);
        assert_eq!(read(&b"{}"[..]).unwrap(), b"{}");
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
