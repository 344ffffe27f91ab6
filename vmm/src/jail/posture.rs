//! What the kernel says of a thread, held against the table of `threads.rs`.
//!
//! For whoever looks at a machine's process from outside, such as the tests do with
//! a machine that runs.

use std::collections::{BTreeSet, HashMap};

use super::threads::{Identity, ThreadKind};

/// The numbers of the system calls that a thread of this kind may make, some of them
/// with certain arguments only.
#[must_use]
pub fn allowed(kind: ThreadKind) -> BTreeSet<i64> {
    let rules = kind.system_calls();
    rules.iter().map(|rule| rule.number).collect()
}

/// Compares a thread's `/proc/PID/task/TID/status` with what its kind has in a pod
/// of this user. An error names the first line that differs.
pub fn check(kind: ThreadKind, user: u32, status: &str) -> Result<(), String> {
    let lines: HashMap<&str, &str> = status
        .lines()
        .filter_map(|line| line.split_once(":\t"))
        .map(|(key, value)| (key, value.trim_end()))
        .collect();
    let id = match kind.identity() {
        Identity::Pod => user,
        Identity::Root => 0,
    };
    let ids = format!("{id}\t{id}\t{id}\t{id}");
    let name = lines.get("Name").copied().unwrap_or_default();
    let filters = if ThreadKind::came_later(name) {
        "2"
    } else {
        "1"
    };
    let set = |bits: u64| format!("{bits:016x}");
    let capabilities = set(kind.capabilities().bits());
    let expected = [
        ("Uid", ids.clone()),
        ("Gid", ids),
        ("Groups", String::new()),
        ("CapInh", set(0)),
        ("CapPrm", capabilities.clone()),
        ("CapEff", capabilities),
        ("CapBnd", set(0)),
        ("CapAmb", set(0)),
        ("NoNewPrivs", "1".into()),
        ("Seccomp", "2".into()),
        ("Seccomp_filters", filters.into()),
    ];
    for (key, expected) in expected {
        let found = lines.get(key).copied().unwrap_or_default();
        // A file server's thread is its caller for the length of one call.
        let acts = kind == ThreadKind::Files && (key == "Uid" || key == "Gid");
        let holds = if acts {
            found.rsplit_once('\t').map(|(own, _)| own)
                == expected.rsplit_once('\t').map(|(own, _)| own)
        } else {
            found == expected
        };
        if !holds {
            return Err(format!("{kind:?}: {key} is {found:?}, not {expected:?}"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_has_more_or_less_than_its_kind_is_found() {
        let good = "Name:\tvcpu0\nUid:\t7\t7\t7\t7\nGid:\t7\t7\t7\t7\nGroups:\t \n\
            CapInh:\t0000000000000000\nCapPrm:\t0000000000000000\n\
            CapEff:\t0000000000000000\nCapBnd:\t0000000000000000\n\
            CapAmb:\t0000000000000000\nNoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n";
        let kind = ThreadKind::Processor;
        assert_eq!(check(kind, 7, good), Ok(()));
        assert!(check(kind, 8, good).is_err());
        assert!(check(ThreadKind::Files, 7, good).is_err());
        for (from, to) in [
            ("Uid:\t7\t7\t7\t7", "Uid:\t7\t7\t7\t0"),
            ("Groups:\t", "Groups:\t0"),
            ("CapBnd:\t0000000000000000", "CapBnd:\t0000000000000400"),
            ("Seccomp:\t2", "Seccomp:\t0"),
            ("NoNewPrivs:\t1\n", ""),
        ] {
            let bad = good.replace(from, to);
            assert_ne!(bad, good);
            assert!(check(kind, 7, &bad).is_err(), "{to}");
        }
    }
}
