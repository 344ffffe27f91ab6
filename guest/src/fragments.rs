//! The configuration: fragments with a reason on each line.
//!
//! A line is `CONFIG_NAME=value # reason`. Everything not named is off
//! (`allnoconfig`), except what Kconfig itself selects; `=n` insists on that
//! for an option that could come back by a default.
//!
//! Within one series of the kernel an option may be renamed. A line names it by
//! all its names, the newest first: `CONFIG_NEW=y | CONFIG_OLD=y # reason`; one of
//! them is enough. A line that begins with `wish ` asks for what this kernel is
//! good without; every other one must be fulfilled.

use std::collections::BTreeMap;
use std::fmt;

use anyhow::{Result, bail, ensure};

/// Name and content of each fragment, in the order in which they are read.
pub(crate) const FRAGMENTS: &[(&str, &str)] = &[
    (
        "machine.config",
        include_str!("../fragments/machine.config"),
    ),
    (
        "containers.config",
        include_str!("../fragments/containers.config"),
    ),
    (
        "network.config",
        include_str!("../fragments/network.config"),
    ),
    (
        "hardening.config",
        include_str!("../fragments/hardening.config"),
    ),
];

/// One line of a fragment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// The fragment, and the line in it: `machine.config:12`.
    place: String,
    /// The option by each of its names, the newest first.
    names: Vec<Setting>,
    /// Whether a kernel without it will not do.
    required: bool,
    /// Why it is asked for.
    reason: String,
}

/// An option and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Setting {
    /// With its prefix: `CONFIG_SMP`.
    name: String,
    /// As `.config` writes it; `n` stands for "is not set".
    value: String,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// A line that a configuration does not fulfil.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lack {
    /// Whether a kernel without it will not do.
    pub(crate) required: bool,
    place: String,
    /// What is asked for, by all its names.
    wanted: String,
    /// What came out instead.
    got: String,
    reason: String,
}

impl fmt::Display for Lack {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Lack {
            place,
            wanted,
            got,
            reason,
            ..
        } = self;
        write!(f, "{place} asks for {wanted} ({reason}) and gets {got}")
    }
}

/// What all fragments ask for.
pub(crate) fn requests() -> Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    for (file, text) in FRAGMENTS {
        requests.extend(parse(file, text)?);
    }
    only_once(&requests)?;
    Ok(requests)
}

/// An option that two lines ask for is refused.
fn only_once(requests: &[Request]) -> Result<()> {
    let mut places: BTreeMap<&str, &str> = BTreeMap::new();
    for Request { place, names, .. } in requests {
        for Setting { name, .. } in names {
            if let Some(other) = places.insert(name, place) {
                bail!("{place}: {name} is asked for twice, first in {other}");
            }
        }
    }
    Ok(())
}

/// The requests in one fragment. `file` is its name, for errors.
pub(crate) fn parse(file: &str, text: &str) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let place = format!("{file}:{}", index + 1);
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((options, reason)) = line.split_once(" # ") else {
            bail!("{place}: No reason given: {line}");
        };
        let reason = reason.trim();
        ensure!(!reason.is_empty(), "{place}: No reason given: {line}");
        let (options, required) = match options.strip_prefix("wish ") {
            Some(options) => (options, false),
            None => (options, true),
        };
        let mut names = Vec::new();
        for option in options.split(" | ") {
            let setting = option
                .trim()
                .split_once('=')
                .filter(|(name, value)| name.starts_with("CONFIG_") && !value.is_empty());
            let Some((name, value)) = setting else {
                bail!("{place}: Not CONFIG_NAME=value: {line}");
            };
            names.push(Setting {
                name: name.to_owned(),
                value: value.to_owned(),
            });
        }
        let off = names.iter().filter(|setting| setting.value == "n").count();
        ensure!(
            off == 0 || off == names.len(),
            "{place}: Off by one name and on by another: {line}"
        );
        requests.push(Request {
            place,
            names,
            required,
            reason: reason.to_owned(),
        });
    }
    Ok(requests)
}

/// The text of the file that `KCONFIG_ALLCONFIG` names. Names that a version of
/// the kernel does not know do no harm in it.
pub(crate) fn allconfig(requests: &[Request]) -> String {
    let settings = requests.iter().flat_map(|request| &request.names);
    settings.fold(String::new(), |text, Setting { name, value }| {
        match value.as_str() {
            "n" => text + &format!("# {name} is not set\n"),
            _ => text + &format!("{name}={value}\n"),
        }
    })
}

/// The requests that the `.config` that came out does not fulfil.
pub(crate) fn lacks(requests: &[Request], config: &str) -> Vec<Lack> {
    let got: BTreeMap<&str, &str> = config
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    let value = |setting: &Setting| got.get(setting.name.as_str()).copied().unwrap_or("n");
    let join = |texts: Vec<String>| texts.join(" | ");
    let mut lacks = Vec::new();
    for request in requests {
        let names = &request.names;
        let as_wanted = |setting: &Setting| value(setting) == setting.value;
        // What is to be off is off only if it is so by every name.
        let off = names.iter().any(|setting| setting.value == "n");
        let fulfilled = if off {
            names.iter().all(as_wanted)
        } else {
            names.iter().any(as_wanted)
        };
        if !fulfilled {
            lacks.push(Lack {
                required: request.required,
                place: request.place.clone(),
                wanted: join(names.iter().map(ToString::to_string).collect()),
                got: join(names.iter().map(|name| value(name).to_owned()).collect()),
                reason: request.reason.clone(),
            });
        }
    }
    lacks
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_fragment_in_the_folder_is_read_and_every_line_has_a_reason() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("fragments");
        let mut names: Vec<String> = std::fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        let mut read: Vec<&str> = FRAGMENTS.iter().map(|(name, _)| *name).collect();
        read.sort_unstable();
        assert_eq!(names, read);
        assert!(requests().unwrap().len() > 200);
    }

    #[test]
    fn an_option_without_a_reason_is_refused() {
        let error = parse("f", "CONFIG_A=y # why\nCONFIG_B=y\n").unwrap_err();
        assert_eq!(error.to_string(), "f:2: No reason given: CONFIG_B=y");
        assert!(parse("f", "CONFIG_B=y # \n").is_err());
        assert!(parse("f", "B=y # why\n").is_err());
    }

    #[test]
    fn an_option_that_did_not_survive_is_named_with_its_line() {
        let requests = parse(
            "f",
            "CONFIG_A=y # a\nCONFIG_B=n # b\n\nCONFIG_C=0x10 # c\nCONFIG_D=\"x\" # d\n",
        )
        .unwrap();
        assert_eq!(
            allconfig(&requests),
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x10\nCONFIG_D=\"x\"\n"
        );
        let good = "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x10\nCONFIG_D=\"x\"\n";
        assert_eq!(lacks(&requests, good), []);
        let bad = "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=0x10\n";
        let said: Vec<String> = lacks(&requests, bad)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(
            said,
            [
                "f:1 asks for CONFIG_A=y (a) and gets n",
                "f:2 asks for CONFIG_B=n (b) and gets y",
                "f:5 asks for CONFIG_D=\"x\" (d) and gets n",
            ]
        );
    }

    #[test]
    fn one_of_several_names_is_enough() {
        let requests = parse("f", "CONFIG_NEW=y | CONFIG_OLD=y # why\n").unwrap();
        assert_eq!(allconfig(&requests), "CONFIG_NEW=y\nCONFIG_OLD=y\n");
        assert_eq!(lacks(&requests, "CONFIG_NEW=y\n"), []);
        assert_eq!(lacks(&requests, "CONFIG_OLD=y\n"), []);
        let lacks = lacks(&requests, "CONFIG_OTHER=y\n");
        assert!(lacks[0].required);
        assert_eq!(
            lacks[0].to_string(),
            "f:1 asks for CONFIG_NEW=y | CONFIG_OLD=y (why) and gets n | n"
        );
    }

    #[test]
    fn what_is_to_be_off_is_off_by_every_name() {
        let requests = parse("f", "CONFIG_NEW=n | CONFIG_OLD=n # why\n").unwrap();
        assert_eq!(lacks(&requests, "# CONFIG_NEW is not set\n"), []);
        assert_eq!(lacks(&requests, "CONFIG_OLD=y\n").len(), 1);
        assert!(parse("f", "CONFIG_NEW=n | CONFIG_OLD=y # why\n").is_err());
    }

    #[test]
    fn a_wish_is_not_required() {
        let requests = parse("f", "wish CONFIG_A=y # nice\nCONFIG_B=y # b\n").unwrap();
        assert_eq!(allconfig(&requests), "CONFIG_A=y\nCONFIG_B=y\n");
        let required: Vec<bool> = lacks(&requests, "")
            .iter()
            .map(|lack| lack.required)
            .collect();
        assert_eq!(required, [false, true]);
    }

    #[test]
    fn an_option_that_two_lines_ask_for_is_refused() {
        let twice = parse("f", "CONFIG_A=y # a\nCONFIG_B=y | CONFIG_A=y # b\n").unwrap();
        let error = only_once(&twice).unwrap_err();
        assert_eq!(
            error.to_string(),
            "f:2: CONFIG_A is asked for twice, first in f:1"
        );
    }
}
