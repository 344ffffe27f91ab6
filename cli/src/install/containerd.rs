//! containerd's `config.toml`, and a drop-in beside it.
//!
//! From version 3 of the configuration on (containerd 2) tables of a drop-in are merged
//! with those of the file. Before, a drop-in replaced all that the file says of a plug-in:
//! there the runtime is named in the file itself.

use std::{path::Path, process::Command};

use toml_edit::{Array, DocumentMut, Item, Table, value};

use super::{Change, TYPE, read, unusable};
use crate::{
    args::Install,
    error::{Result, refused},
};

/// Where containerd looks unless it is told otherwise.
const CONFIG: &str = "/etc/containerd/config.toml";

/// Beside the file: what containerd from 2.2 on reads without being told.
const DROP_INS: &str = "conf.d";

pub(super) fn changes(args: &Install) -> Result<Vec<Change>> {
    let path = args.config.as_deref().unwrap_or_else(|| Path::new(CONFIG));
    let Some(directory) = path.parent().filter(|_| path.is_absolute()) else {
        return Err(unusable(
            path,
            "give the absolute path of containerd's config.toml",
        ));
    };
    let main = read(path)?;
    let drop_in = directory.join(DROP_INS).join(format!("{}.toml", args.name));
    let there = read(&drop_in)?;
    let installed = || match main {
        Some(_) => Ok(None),
        // Nobody needs to know for which it is taken away.
        None if args.remove => Ok(None),
        None => installed().map(Some),
    };
    let after = edit(path, main.as_deref(), installed()?, args)?;
    Ok(Change::new(path, main.as_deref(), after.main)
        .into_iter()
        .chain(Change::new(&drop_in, there.as_deref(), after.drop_in))
        .collect())
}

/// What is to stand there.
#[derive(Debug)]
struct After {
    main: Option<String>,
    drop_in: Option<String>,
}

/// `installed` is containerd's version, if there is no file to go by.
fn edit(
    path: &Path,
    before: Option<&str>,
    installed: Option<(u32, u32)>,
    args: &Install,
) -> Result<After> {
    let mut main: DocumentMut = before.unwrap_or_default().parse().map_err(|error| {
        let text = format!("it is not TOML ({error})");
        unusable(path, text.replace('\n', " ").trim())
    })?;
    let version = match (before, installed) {
        (Some(_), _) => main.get("version").map_or(Some(1), Item::as_integer),
        (None, Some((1, _))) => Some(2),
        (None, _) => Some(3),
    };
    match version {
        Some(2) => {
            let table = runtimes(&mut main, "io.containerd.grpc.v1.cri");
            let Some(table) = table else {
                return Err(unusable(path, "its \"plugins\" are no tables"));
            };
            if args.remove {
                table.remove(&args.name);
                return Ok(After {
                    main: before.map(|_| main.to_string()),
                    drop_in: None,
                });
            }
            table.insert(&args.name, Item::Table(runtime()));
            main.entry("version").or_insert_with(|| value(2));
            Ok(After {
                main: Some(main.to_string()),
                drop_in: None,
            })
        }
        // That the file imports the directory may serve others by now.
        Some(3..) if args.remove => Ok(After {
            main: before.map(str::to_owned),
            drop_in: None,
        }),
        Some(version @ 3..) => {
            // From 2.2 on what is built in imports the directory.
            let reads_drop_ins = before.is_none() && installed >= Some((2, 2));
            let directory = path.with_file_name(DROP_INS);
            let pattern = directory.join("*.toml").display().to_string();
            let main = if reads_drop_ins || imports(&main, &pattern) {
                before.map(str::to_owned)
            } else {
                main.entry("version").or_insert_with(|| value(version));
                let list = main
                    .entry("imports")
                    .or_insert_with(|| value(Array::new()))
                    .as_array_mut();
                let Some(list) = list else {
                    return Err(unusable(path, "its \"imports\" are no list"));
                };
                list.push(pattern);
                Some(main.to_string())
            };
            let mut drop_in = DocumentMut::new();
            drop_in.insert("version", value(version));
            if let Some(table) = runtimes(&mut drop_in, "io.containerd.cri.v1.runtime") {
                table.insert(&args.name, Item::Table(runtime()));
            }
            Ok(After {
                main,
                drop_in: Some(drop_in.to_string()),
            })
        }
        _ => Err(unusable(
            path,
            "its version is not 2, 3 or higher; let `containerd config migrate` make it anew first",
        )),
    }
}

fn imports(main: &DocumentMut, pattern: &str) -> bool {
    let list = main.get("imports").and_then(Item::as_array);
    list.is_some_and(|list| list.iter().any(|item| item.as_str() == Some(pattern)))
}

/// The table of runtimes of the CRI plug-in, made where it is not there.
fn runtimes<'a>(main: &'a mut DocumentMut, plugin: &str) -> Option<&'a mut Table> {
    let mut table = main.as_table_mut();
    for key in ["plugins", plugin, "containerd", "runtimes"] {
        let made = || {
            let mut table = Table::new();
            table.set_implicit(true);
            Item::Table(table)
        };
        table = table.entry(key).or_insert_with(made).as_table_mut()?;
    }
    Some(table)
}

/// What containerd is to know of us. The devices of a privileged pod's host are not its
/// guest's (K8-03).
fn runtime() -> Table {
    let mut table = Table::new();
    table.insert("runtime_type", value(TYPE));
    table.insert("privileged_without_host_devices", value(true));
    table
}

/// The major and minor version of the installed containerd.
fn installed() -> Result<(u32, u32)> {
    let unknown = |reason: &str| {
        let reason = format!("{reason}; name its configuration by --config FILE");
        refused("Engine", "containerd", &reason)
    };
    let output = Command::new("containerd")
        .arg("--version")
        .output()
        .map_err(|_| unknown("there is neither its configuration nor the program"))?;
    let text = String::from_utf8_lossy(&output.stdout);
    version(&text).ok_or_else(|| unknown("it does not tell its version"))
}

/// From `containerd github.com/containerd/containerd/v2 v2.4.2 REVISION`; distributions
/// leave the `v` out.
fn version(text: &str) -> Option<(u32, u32)> {
    let word = text.split_whitespace().nth(2)?;
    let mut parts = word.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::install::testing::args;

    const PATH: &str = "/etc/containerd/config.toml";
    const DROP_IN: &str = r#"version = 3

[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.bulkhead]
runtime_type = "io.containerd.bulkhead.v2"
privileged_without_host_devices = true
"#;

    fn edited(before: Option<&str>, installed: Option<(u32, u32)>, remove: bool) -> Result<After> {
        edit(Path::new(PATH), before, installed, &args(remove))
    }

    #[test]
    fn without_a_file_only_what_this_containerd_needs_is_written_k8_03() {
        let after = edited(None, Some((2, 4)), false).unwrap();
        assert_eq!(after.main, None);
        assert_eq!(after.drop_in.as_deref(), Some(DROP_IN));
        let after = edited(None, Some((2, 1)), false).unwrap();
        let main = "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n";
        assert_eq!(after.main.as_deref(), Some(main));
        assert_eq!(after.drop_in.as_deref(), Some(DROP_IN));
        let after = edited(None, Some((1, 7)), false).unwrap();
        assert_eq!(after.drop_in, None);
        let main = DROP_IN
            .replace("version = 3", "version = 2")
            .replace("cri.v1.runtime", "grpc.v1.cri");
        assert_eq!(after.main.unwrap(), main);
    }

    #[test]
    fn what_stands_in_a_file_stays_to_the_comment_k8_03() {
        let before = "# ours\nversion = 2\n\n[plugins.\"io.containerd.grpc.v1.cri\"]\n  \
            sandbox_image = \"pause\" # pinned\n\n[plugins.\"io.containerd.grpc.v1.cri\".containerd.runtimes.runc]\n  \
            runtime_type = \"io.containerd.runc.v2\"\n";
        let main = edited(Some(before), None, false).unwrap().main.unwrap();
        assert!(main.starts_with(before), "{main}");
        assert!(main.contains(".runtimes.bulkhead]\nruntime_type"), "{main}");
        let again = edited(Some(&main), None, false).unwrap().main.unwrap();
        assert_eq!(again, main);
        let removed = edited(Some(&main), None, true).unwrap().main.unwrap();
        assert_eq!(removed, before);
        let other = edited(Some(before), None, true).unwrap().main.unwrap();
        assert_eq!(other, before);
    }

    #[test]
    fn a_file_of_containerd_2_imports_the_drop_in_once() {
        let before = "version = 3\nimports = [\"/etc/other.toml\"] # kept\n";
        let after = edited(Some(before), None, false).unwrap();
        let main = after.main.unwrap();
        let wanted = "version = 3\nimports = [\"/etc/other.toml\", \"/etc/containerd/conf.d/*.toml\"] # kept\n";
        assert_eq!(main, wanted);
        let again = edited(Some(&main), None, false).unwrap();
        assert_eq!(again.main.as_ref(), Some(&main));
        assert_eq!(again.drop_in.as_deref(), Some(DROP_IN));
        let removed = edited(Some(&main), None, true).unwrap();
        assert_eq!((removed.main, removed.drop_in), (Some(main), None));
    }

    #[test]
    fn a_file_that_cannot_be_understood_is_refused_by_its_name() {
        for before in [
            "",
            "version = 1",
            "version = \"3\"",
            "= 1",
            "version = 2\nplugins = 1",
        ] {
            let text = edited(Some(before), None, false).unwrap_err().text();
            assert!(text.contains(PATH), "{text}");
            assert_eq!(text.lines().count(), 1, "{text}");
        }
    }

    #[test]
    fn versions_are_read_as_releases_and_distributions_write_them() {
        for (text, wanted) in [
            (
                "containerd github.com/containerd/containerd/v2 v2.4.2 abc",
                Some((2, 4)),
            ),
            (
                "containerd github.com/containerd/containerd 1.7.24~ds1 1.7.24~ds1-6",
                Some((1, 7)),
            ),
            ("something else", None),
        ] {
            assert_eq!(version(text), wanted, "{text}");
        }
    }
}
