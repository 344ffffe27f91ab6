//! `bulkhead explain`: what became of a specification, field by field.

use bulkhead_shim::{explain::Explanation, names};

use crate::{
    args::Explain,
    error::{Error, Result, refused},
    output,
    run::require_root,
};

/// Prints what became of the specification of a container or bundle.
pub(crate) fn explain(args: &Explain) -> Result<u8> {
    require_root()?;
    let explanation = match (&args.id, &args.bundle) {
        (_, Some(bundle)) => Explanation::of_bundle(bundle).map_err(shim)?,
        (Some(id), None) => of_container(id.as_str(), args.namespace.as_deref())?,
        (None, None) => return Err(refused("Container", "", "name one, or a bundle")),
    };
    output::print(args.format, &explanation, table)?;
    Ok(0)
}

#[expect(clippy::needless_pass_by_value, reason = "an argument of map_err")]
fn shim(error: bulkhead_shim::error::Error) -> Error {
    Error::Shim(error.text())
}

fn of_container(id: &str, namespace: Option<&str>) -> Result<Explanation> {
    let name = names::ContainerId::new(id).map_err(|error| shim(error.into()))?;
    let mut found = Explanation::find(&name).map_err(shim)?;
    found.retain(|one| namespace.is_none() || one.namespace.as_deref() == namespace);
    match (found.pop(), found.is_empty()) {
        (Some(one), true) => Ok(one),
        (None, _) => {
            let reason = "there is no such container in a virtual machine of bulkhead";
            Err(refused("Container", id, reason))
        }
        (Some(one), false) => {
            found.push(one);
            let names: Vec<_> = found
                .iter()
                .filter_map(|one| one.namespace.clone())
                .collect();
            let reason = format!(
                "there are several; choose one by --namespace: {}",
                names.join(", ")
            );
            Err(refused("Container", id, &reason))
        }
    }
}

fn table(explanation: &Explanation) -> String {
    let mut table = output::columns(["FIELD", "APPLIED", "NOTE"]);
    for note in &explanation.fields {
        table.add_row([plain(&note.field), note.fate.to_string(), plain(&note.why)]);
    }
    output::text(&table)
}

/// Without what a terminal could take for a command.
fn plain(text: &str) -> String {
    text.chars().filter(|c| !c.is_control()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_has_a_line_for_each_field_and_no_control_characters() {
        let explanation: Explanation = serde_json::from_value(serde_json::json!({
            "bundle": "/b",
            "fields": [
                {"field": "process.args", "fate": "guest"},
                {"field": "\u{1b}[2Jx", "fate": "ignored", "why": "no such field\u{7} is known"},
            ],
        }))
        .unwrap();
        let text = table(&explanation);
        let lines: Vec<&str> = text.lines().map(str::trim).collect();
        assert_eq!(lines.len(), 3, "{text}");
        assert!(lines[1].starts_with("process.args") && lines[1].ends_with("guest"));
        assert!(lines[2].contains("ignored by design") && lines[2].contains("is known"));
        assert!(!text.contains(['\u{1b}', '\u{7}']));
    }
}
