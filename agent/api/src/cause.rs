//! The cause of a failure, in the details of a ttrpc status.

use protobuf::Message;
use ttrpc::{Status, proto::Any};

use crate::agent::Cause;

/// Names the message among the details.
const TYPE_URL: &str = "bulkhead.agent.v1.Cause";

/// Adds a cause to a status.
pub fn add(status: &mut Status, cause: &Cause) {
    // A message without required fields can be written.
    let Ok(value) = cause.write_to_bytes() else {
        return;
    };
    status.details.push(Any {
        type_url: TYPE_URL.to_owned(),
        value,
        ..Any::default()
    });
}

/// The cause in a status; an empty one if there is none that can be read.
#[must_use]
pub fn of(status: &Status) -> Cause {
    let found = status.details.iter().find(|any| any.type_url == TYPE_URL);
    found
        .and_then(|any| Cause::parse_from_bytes(&any.value).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::cause::Kind;

    #[test]
    fn a_cause_is_found_among_other_details_or_is_empty() {
        let mut status = Status::new();
        assert_eq!(of(&status), Cause::default());
        let other = |type_url: &str| Any {
            type_url: type_url.to_owned(),
            value: vec![0xff; 9],
            ..Any::default()
        };
        status.details.push(other("another.Type"));
        let cause = Cause {
            kind: Kind::OUT_OF_MEMORY.into(),
            errno: 12,
            ..Cause::default()
        };
        add(&mut status, &cause);
        assert_eq!(of(&status), cause);
        status.details = vec![other(TYPE_URL)];
        assert_eq!(of(&status), Cause::default());
    }
}
