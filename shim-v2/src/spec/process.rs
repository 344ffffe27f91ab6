//! The `process` object: of a container, and of an exec.

use super::field::{Error, Field};

/// Most supplementary groups (NGROUPS_MAX of Linux).
const MAX_GROUPS: usize = 65_536;

const RLIMITS: [&str; 16] = [
    "RLIMIT_AS",
    "RLIMIT_CORE",
    "RLIMIT_CPU",
    "RLIMIT_DATA",
    "RLIMIT_FSIZE",
    "RLIMIT_LOCKS",
    "RLIMIT_MEMLOCK",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_NOFILE",
    "RLIMIT_NPROC",
    "RLIMIT_RSS",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
    "RLIMIT_SIGPENDING",
    "RLIMIT_STACK",
];

const CAPABILITIES: [&str; 41] = [
    "CAP_AUDIT_CONTROL",
    "CAP_AUDIT_READ",
    "CAP_AUDIT_WRITE",
    "CAP_BLOCK_SUSPEND",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_KILL",
    "CAP_LEASE",
    "CAP_LINUX_IMMUTABLE",
    "CAP_MAC_ADMIN",
    "CAP_MAC_OVERRIDE",
    "CAP_MKNOD",
    "CAP_NET_ADMIN",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_RAW",
    "CAP_PERFMON",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYSLOG",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_CHROOT",
    "CAP_SYS_MODULE",
    "CAP_SYS_NICE",
    "CAP_SYS_PACCT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_WAKE_ALARM",
];

/// Checks a `process` object.
pub fn check_process(process: &Field<'_>) -> Result<(), Error> {
    if !process.value().is_object() {
        return Err(process.refuse("it must be an object"));
    }
    let args = process.required("args")?;
    let words = args.items()?;
    if words.is_empty() {
        return Err(args.refuse("there is no program to run"));
    }
    for word in words.iter().chain(&process.items_of("env")?) {
        word.string()?;
    }
    if let Some(cwd) = process.get("cwd")
        && !cwd.text()?.is_empty()
    {
        cwd.absolute()?;
    }
    if let Some(user) = process.get("user") {
        check_user(&user)?;
    }
    check_rlimits(process)?;
    if let Some(sets) = process.get("capabilities") {
        for (_, set) in sets.members()? {
            let names = set.items()?;
            if names.len() > CAPABILITIES.len() {
                return Err(set.refuse("it has more entries than there are capabilities"));
            }
            for name in names {
                if !CAPABILITIES.contains(&name.text()?) {
                    return Err(name.refuse("no such capability"));
                }
            }
        }
    }
    Ok(())
}

/// Takes out the labels of security modules: they belong to the host's kernel. A
/// note for each that says something.
pub fn without_labels(process: &mut serde_json::Map<String, serde_json::Value>) -> Vec<String> {
    ["apparmorProfile", "selinuxLabel"]
        .into_iter()
        .filter(|label| process.remove(*label).is_some_and(|value| value != ""))
        .map(|label| format!("process.{label} is ignored: it belongs to the host's kernel"))
        .collect()
}

fn check_user(user: &Field<'_>) -> Result<(), Error> {
    // 4,294,967,295 is -1: "no change" to the kernel.
    let most = i64::from(u32::MAX) - 1;
    for name in ["uid", "gid"] {
        if let Some(id) = user.get(name) {
            id.in_range(0, most)?;
        }
    }
    if let Some(umask) = user.get("umask") {
        umask.in_range(0, 0o7777)?;
    }
    let groups = user.items_of("additionalGids")?;
    if groups.len() > MAX_GROUPS {
        return Err(user.refuse_count("additionalGids", groups.len(), MAX_GROUPS));
    }
    for group in groups {
        group.in_range(0, most)?;
    }
    Ok(())
}

fn check_rlimits(process: &Field<'_>) -> Result<(), Error> {
    let mut seen = Vec::new();
    for limit in process.items_of("rlimits")? {
        let kind = limit.required("type")?;
        let name = kind.text()?;
        if !RLIMITS.contains(&name) {
            return Err(kind.refuse("no such resource limit"));
        }
        if seen.contains(&name) {
            return Err(kind.refuse("it appears twice"));
        }
        seen.push(name);
        let soft = limit.required("soft")?;
        if soft.unsigned()? > limit.required("hard")?.unsigned()? {
            return Err(soft.refuse(&format!("the soft limit of {name} exceeds the hard one")));
        }
    }
    Ok(())
}
