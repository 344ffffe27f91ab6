//! Judges a `process` object: of a container, and of an exec.

use std::collections::HashSet;

use super::{
    GROUPS_MAX, SpecError,
    check::{absolute, no_label},
    oci,
    plan::{Capabilities, ProcessPlan, Rlimit, Seccomp},
};

/// `BPF_MAXINSNS`.
const FILTER_INSTRUCTIONS_MAX: usize = 4_096;

pub(super) fn process(
    from: oci::Process,
    seccomp: Option<Seccomp>,
) -> Result<ProcessPlan, SpecError> {
    no_label("process.apparmorProfile", from.apparmor_profile)?;
    no_label("process.selinuxLabel", from.selinux_label)?;
    for (field, value) in [
        ("process.scheduler", from.scheduler),
        ("process.execCPUAffinity", from.exec_cpu_affinity),
    ] {
        if value.is_some() {
            return Err(SpecError::value(field, "set", "it is not supported"));
        }
    }
    if from.args.first().is_none_or(String::is_empty) {
        return Err(SpecError::value(
            "process.args",
            "[]",
            "there is no program to run",
        ));
    }
    no_nul("process.args", &from.args)?;
    no_nul("process.env", &from.env)?;
    let user = user(from.user)?;
    Ok(ProcessPlan {
        cwd: absolute("process.cwd", from.cwd)?,
        uid: user.uid,
        gid: user.gid,
        groups: user.additional_gids,
        umask: user.umask,
        capabilities: capabilities(&from.capabilities)?,
        rlimits: rlimits(&from.rlimits)?,
        no_new_privileges: from.no_new_privileges,
        oom_score_adj: oom_score_adj(from.oom_score_adj)?,
        personality: None,
        io_priority: from.io_priority.map(|p| io_priority(&p)).transpose()?,
        args: from.args,
        env: from.env,
        seccomp,
        terminal: None,
    })
}

/// Length 1…4096 instructions; the kernel verifies the rest when it loads it.
pub(super) fn seccomp(filter: &[u8], flags: u32) -> Result<Option<Seccomp>, SpecError> {
    let (instructions, rest) = filter.as_chunks::<8>();
    if !rest.is_empty() || instructions.len() > FILTER_INSTRUCTIONS_MAX {
        return Err(SpecError::value(
            "seccomp_filter",
            format!("{} bytes", filter.len()),
            "it must be 1 to 4096 instructions of 8 bytes",
        ));
    }
    // A notification descriptor has nobody to read it here.
    const FLAGS_ALLOWED: libc::c_ulong = libc::SECCOMP_FILTER_FLAG_TSYNC
        | libc::SECCOMP_FILTER_FLAG_LOG
        | libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW;
    if libc::c_ulong::from(flags) & !FLAGS_ALLOWED != 0 {
        return Err(SpecError::value(
            "seccomp_flags",
            flags,
            "only TSYNC, LOG and SPEC_ALLOW",
        ));
    }
    Ok((!instructions.is_empty()).then(|| Seccomp {
        filter: instructions
            .iter()
            .map(|bytes| u64::from_le_bytes(*bytes))
            .collect(),
        flags,
    }))
}

fn no_nul(field: &str, texts: &[String]) -> Result<(), SpecError> {
    match texts.iter().position(|text| text.contains('\0')) {
        None => Ok(()),
        Some(n) => Err(SpecError::value(
            format!("{field}[{n}]"),
            &texts[n],
            "it must not contain NUL",
        )),
    }
}

fn user(user: oci::User) -> Result<oci::User, SpecError> {
    // The kernel reads -1 as "leave it as it is".
    for (field, id) in [
        ("process.user.uid", user.uid),
        ("process.user.gid", user.gid),
    ] {
        if id == u32::MAX {
            return Err(SpecError::value(field, id, "it is not an id"));
        }
    }
    let groups = user.additional_gids.len();
    if groups > GROUPS_MAX {
        let text = format!("{groups} groups");
        return Err(SpecError::value(
            "process.user.additionalGids",
            text,
            "65536 is the most",
        ));
    }
    if user.additional_gids.contains(&u32::MAX) {
        return Err(SpecError::value(
            "process.user.additionalGids",
            u32::MAX,
            "it is not an id",
        ));
    }
    if let Some(umask) = user.umask.filter(|umask| *umask > 0o777) {
        return Err(SpecError::value(
            "process.user.umask",
            umask,
            "it is more than 0777",
        ));
    }
    Ok(user)
}

fn oom_score_adj(value: Option<i32>) -> Result<i32, SpecError> {
    let value = value.unwrap_or(0);
    if !(-1_000..=1_000).contains(&value) {
        let reason = "it must be between -1000 and 1000";
        return Err(SpecError::value("process.oomScoreAdj", value, reason));
    }
    Ok(value)
}

fn io_priority(from: &oci::IoPriority) -> Result<i32, SpecError> {
    let class = match from.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        other => {
            return Err(SpecError::value(
                "process.ioPriority.class",
                other,
                "it is not a class",
            ));
        }
    };
    if !(0..8).contains(&from.priority) {
        let reason = "it must be between 0 and 7";
        return Err(SpecError::value(
            "process.ioPriority.priority",
            from.priority,
            reason,
        ));
    }
    Ok((class << 13) | from.priority)
}

/// Capability numbers are places in this list (`linux/capability.h`).
const CAPABILITIES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

fn capabilities(from: &oci::Capabilities) -> Result<Capabilities, SpecError> {
    let set = |field: &str, names: &[String]| {
        names.iter().try_fold(0u64, |bits, name| {
            let number = CAPABILITIES
                .iter()
                .position(|known| known == name)
                .ok_or_else(|| {
                    let field = format!("process.capabilities.{field}");
                    SpecError::value(field, name, "it is not a capability")
                })?;
            Ok(bits | 1 << number)
        })
    };
    Ok(Capabilities {
        bounding: set("bounding", &from.bounding)?,
        effective: set("effective", &from.effective)?,
        inheritable: set("inheritable", &from.inheritable)?,
        permitted: set("permitted", &from.permitted)?,
        ambient: set("ambient", &from.ambient)?,
    })
}

/// Limit numbers are places in this list (`asm-generic/resource.h`).
const RLIMITS: [&str; 16] = [
    "RLIMIT_CPU",
    "RLIMIT_FSIZE",
    "RLIMIT_DATA",
    "RLIMIT_STACK",
    "RLIMIT_CORE",
    "RLIMIT_RSS",
    "RLIMIT_NPROC",
    "RLIMIT_NOFILE",
    "RLIMIT_MEMLOCK",
    "RLIMIT_AS",
    "RLIMIT_LOCKS",
    "RLIMIT_SIGPENDING",
    "RLIMIT_MSGQUEUE",
    "RLIMIT_NICE",
    "RLIMIT_RTPRIO",
    "RLIMIT_RTTIME",
];

fn rlimits(from: &[oci::Rlimit]) -> Result<Vec<Rlimit>, SpecError> {
    let mut seen = HashSet::new();
    let mut limits = Vec::with_capacity(from.len());
    for limit in from {
        let field = format!("process.rlimits.{}", limit.name);
        let number = RLIMITS.iter().position(|known| *known == limit.name);
        let Some(resource) = number.and_then(|n| u32::try_from(n).ok()) else {
            return Err(SpecError::value(
                "process.rlimits",
                &limit.name,
                "it is not a limit",
            ));
        };
        if !seen.insert(resource) {
            return Err(SpecError::value(field, limit.soft, "it is given twice"));
        }
        if limit.soft > limit.hard {
            return Err(SpecError::value(
                field,
                limit.soft,
                "the soft limit is above the hard",
            ));
        }
        limits.push(Rlimit {
            resource,
            soft: limit.soft,
            hard: limit.hard,
        });
    }
    Ok(limits)
}
