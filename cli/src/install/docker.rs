//! Docker's `daemon.json`: a runtime among its `runtimes`. Docker reads no drop-ins.

use std::path::Path;

use jsonc_parser::{
    ParseOptions,
    cst::{CstObjectProp, CstRootNode},
    json,
};
use serde_json::Value;

use super::{Change, TYPE, read, unusable};
use crate::{args::Install, error::Result};

/// Where Docker's daemon looks unless it is told otherwise.
const CONFIG: &str = "/etc/docker/daemon.json";

pub(super) fn changes(args: &Install) -> Result<Vec<Change>> {
    let path = args.config.as_deref().unwrap_or_else(|| Path::new(CONFIG));
    let before = read(path)?;
    let after = edit(path, before.as_deref(), args)?;
    Ok(Change::new(path, before.as_deref(), after)
        .into_iter()
        .collect())
}

fn edit(path: &Path, before: Option<&str>, args: &Install) -> Result<Option<String>> {
    // Docker takes an empty file for an empty object.
    let text = before
        .filter(|text| !text.trim().is_empty())
        .unwrap_or("{}\n");
    let unusable = |reason: &str| unusable(path, reason);
    let not_json = |error: &dyn std::fmt::Display| unusable(&format!("it is not JSON ({error})"));
    // The parser that edits would take more than Docker does.
    let config: Value = serde_json::from_str(text).map_err(|error| not_json(&error))?;
    let there = config.get("runtimes").and_then(|all| all.get(&args.name));
    let wanted = (!args.remove).then(|| serde_json::json!({"runtimeType": TYPE}));
    // It must be kept: what it gives points into it.
    let whole = CstRootNode::parse(text, &ParseOptions::default()).map_err(|e| not_json(&e))?;
    let root = whole
        .object_value()
        .ok_or_else(|| unusable("it is not a JSON object"))?;
    let runtimes = root.object_value("runtimes");
    if root.get("runtimes").is_some() && runtimes.is_none() {
        return Err(unusable("its \"runtimes\" are not a JSON object"));
    }
    if there == wanted.as_ref() {
        return Ok(before.map(str::to_owned));
    }
    let runtimes = runtimes.unwrap_or_else(|| root.object_value_or_set("runtimes"));
    let old = runtimes.get(&args.name);
    match (old, args.remove) {
        (old, true) => {
            let _ = old.map(CstObjectProp::remove);
        }
        (Some(old), false) => old.set_value(json!({"runtimeType": TYPE})),
        (None, false) => drop(runtimes.append(&args.name, json!({"runtimeType": TYPE}))),
    }
    if runtimes.properties().is_empty() {
        let _ = root.get("runtimes").map(CstObjectProp::remove);
    }
    Ok(Some(whole.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::testing::args;

    const PATH: &str = "/etc/docker/daemon.json";

    fn edited(before: Option<&str>, remove: bool) -> Result<Option<String>> {
        edit(Path::new(PATH), before, &args(remove))
    }

    #[test]
    fn the_runtime_is_added_and_all_else_stays_in_its_order_cl_01() {
        let before = r#"{
    "log-driver": "journald",
    "runtimes": {
        "crun": {"path": "crun"}
    },
    "bip": "1"
}
"#;
        let after = edited(Some(before), false).unwrap().unwrap();
        let wanted = before.replace(
            "\"crun\"}",
            "\"crun\"},\n        \"bulkhead\": {\n            \
             \"runtimeType\": \"io.containerd.bulkhead.v2\"\n        }",
        );
        assert_eq!(after, wanted);
        // Once more changes nothing, and what was added can be taken away.
        assert_eq!(edited(Some(&after), false).unwrap().as_ref(), Some(&after));
        let removed = edited(Some(&after), true).unwrap();
        assert_eq!(removed.as_deref(), Some(before));
    }

    #[test]
    fn without_a_file_one_is_made_and_nothing_to_remove_makes_none() {
        for before in [None, Some(""), Some("{}")] {
            let after = edited(before, false).unwrap().unwrap();
            assert!(after.contains("\"bulkhead\""), "{after}");
            let removed = edited(Some(&after), true).unwrap().unwrap();
            assert_eq!(removed.trim(), "{}");
        }
        assert_eq!(edited(None, true).unwrap(), None);
    }

    #[test]
    fn a_file_that_docker_could_not_read_is_refused_by_its_name() {
        for (before, words) in [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            (r#"{"runtimes": 1}"#, "\"runtimes\""),
        ] {
            let text = edited(Some(before), false).unwrap_err().text();
            assert!(text.contains(words) && text.contains(PATH), "{text}");
        }
    }
}
