//! The configuration: fragments with a reason on each line.
//!
//! A line is `CONFIG_NAME=value # reason`. Everything not named is off
//! (`allnoconfig`), except what Kconfig itself selects; `=n` insists on that
//! for an option that could come back by a default.

use std::collections::BTreeMap;

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

/// One requested option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Request {
    /// With its prefix: `CONFIG_SMP`.
    name: String,
    /// As `.config` writes it; `n` stands for "is not set".
    value: String,
}

/// What all fragments ask for.
pub(crate) fn requests() -> Result<Vec<Request>> {
    let mut requests: Vec<Request> = Vec::new();
    for (file, text) in FRAGMENTS {
        for request in parse(file, text)? {
            ensure!(
                requests.iter().all(|other| other.name != request.name),
                "{file}: {} is asked for twice",
                request.name
            );
            requests.push(request);
        }
    }
    Ok(requests)
}

/// The requests in one fragment. `file` is its name, for errors.
fn parse(file: &str, text: &str) -> Result<Vec<Request>> {
    let mut requests = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let number = index + 1;
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let Some((option, reason)) = line.split_once(" # ") else {
            bail!("{file}:{number}: No reason given: {line}");
        };
        ensure!(
            !reason.trim().is_empty(),
            "{file}:{number}: No reason given: {line}"
        );
        let Some((name, value)) = option.trim().split_once('=') else {
            bail!("{file}:{number}: Not CONFIG_NAME=value: {line}");
        };
        ensure!(
            name.starts_with("CONFIG_") && !value.is_empty(),
            "{file}:{number}: Not CONFIG_NAME=value: {line}"
        );
        requests.push(Request {
            name: name.to_owned(),
            value: value.to_owned(),
        });
    }
    Ok(requests)
}

/// The text of the file that `KCONFIG_ALLCONFIG` names.
pub(crate) fn allconfig(requests: &[Request]) -> String {
    requests
        .iter()
        .fold(String::new(), |text, Request { name, value }| {
            match value.as_str() {
                "n" => text + &format!("# {name} is not set\n"),
                _ => text + &format!("{name}={value}\n"),
            }
        })
}

/// Compares the requests with the `.config` that came out; the error names
/// every option that is not as asked for.
pub(crate) fn check(requests: &[Request], config: &str) -> Result<()> {
    let got: BTreeMap<&str, &str> = config
        .lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.split_once('='))
        .collect();
    let lost: Vec<String> = requests
        .iter()
        .filter_map(|Request { name, value }| {
            let got = got.get(name.as_str()).copied().unwrap_or("n");
            (got != value).then(|| format!("{name} is {got}, not {value}"))
        })
        .collect();
    ensure!(
        lost.is_empty(),
        "The kernel's configuration is not as the fragments ask: {}",
        lost.join("; ")
    );
    Ok(())
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
    fn an_option_that_did_not_survive_is_named() {
        let requests = parse(
            "f",
            "CONFIG_A=y # a\nCONFIG_B=n # b\nCONFIG_C=0x10 # c\nCONFIG_D=\"x\" # d\n",
        )
        .unwrap();
        assert_eq!(
            allconfig(&requests),
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x10\nCONFIG_D=\"x\"\n"
        );
        check(
            &requests,
            "CONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=0x10\nCONFIG_D=\"x\"\n",
        )
        .unwrap();
        let error = check(
            &requests,
            "# CONFIG_A is not set\nCONFIG_B=y\nCONFIG_C=0x10\n",
        )
        .unwrap_err();
        assert_eq!(
            error.to_string(),
            "The kernel's configuration is not as the fragments ask: CONFIG_A is n, not y; \
             CONFIG_B is y, not n; CONFIG_D is n, not \"x\""
        );
    }
}
