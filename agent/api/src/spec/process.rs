//! Judges a `process` object: of a container, and of an exec.

use std::collections::HashSet;

use crate::spec::{
    Checked, Error, Note,
    check::absolute,
    oci,
    plan::{Capabilities, ProcessPlan, Rlimit, Scheduler, Seccomp},
};

/// Largest number of further groups, the kernel's `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65_536;
/// Most instructions of a filter (`BPF_MAXINSNS`).
const FILTER_INSTRUCTIONS_MAX: usize = 4_096;

/// Flags of seccomp(2) that make sense here (`linux/seccomp.h`): a notification
/// descriptor has nobody to read it in a guest.
pub const SECCOMP_FLAGS: [(&str, u32); 3] = [
    ("SECCOMP_FILTER_FLAG_TSYNC", 1 << 0),
    ("SECCOMP_FILTER_FLAG_LOG", 1 << 1),
    ("SECCOMP_FILTER_FLAG_SPEC_ALLOW", 1 << 2),
];

/// What every process has from its container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inherited {
    /// The filter of `linux.seccomp`.
    pub seccomp: Option<Seccomp>,
    /// `linux.personality`.
    pub personality: Option<u32>,
}

/// Judges the process of an exec.
pub fn process(
    process: oci::Process,
    inherited: &Inherited,
) -> Result<Checked<ProcessPlan>, Error> {
    let mut notes = Vec::new();
    let plan = process_into(process, inherited, &mut notes)?;
    Ok(Checked { plan, notes })
}

pub(crate) fn process_into(
    from: oci::Process,
    inherited: &Inherited,
    notes: &mut Vec<Note>,
) -> Result<ProcessPlan, Error> {
    for (field, label) in [
        ("process.apparmorProfile", &from.apparmor_profile),
        ("process.selinuxLabel", &from.selinux_label),
    ] {
        if !label.is_empty() {
            notes.push(Note::label(field));
        }
    }
    if from.exec_cpu_affinity.is_some() {
        let why = "the guest numbers its own processors";
        notes.push(Note::missing("process.execCPUAffinity", why));
    }
    if !from.command_line.is_empty() {
        let reason = "only Windows has it";
        return Err(Error::new("process.commandLine", from.command_line, reason));
    }
    if from.args.first().is_none_or(String::is_empty) {
        return Err(Error::new(
            "process.args",
            from.args,
            "there is no program to run",
        ));
    }
    no_nul("process.args", &from.args)?;
    no_nul("process.env", &from.env)?;
    user(&from.user)?;
    let cwd = if from.cwd.as_os_str().is_empty() {
        "/".into()
    } else {
        absolute("process.cwd", from.cwd)?
    };
    Ok(ProcessPlan {
        cwd,
        uid: from.user.uid,
        gid: from.user.gid,
        groups: from.user.additional_gids,
        umask: from.user.umask,
        capabilities: capabilities(&from.capabilities, notes)?,
        rlimits: rlimits(&from.rlimits)?,
        no_new_privileges: from.no_new_privileges,
        oom_score_adj: oom_score_adj(from.oom_score_adj)?,
        personality: inherited.personality,
        io_priority: from.io_priority.map(io_priority).transpose()?,
        scheduler: from.scheduler.map(scheduler).transpose()?,
        args: from.args,
        hook: None,
        env: last_of_each_name(from.env),
        seccomp: inherited.seccomp.clone(),
        terminal: from
            .terminal
            .then(|| console_size(from.console_size))
            .transpose()?,
    })
}

/// Takes a compiled filter, an array of `struct sock_filter`; `None` if empty. The
/// kernel verifies the instructions when it loads them.
pub fn seccomp(filter: &[u8], flags: u32) -> Result<Option<Seccomp>, Error> {
    let (instructions, rest) = filter.as_chunks::<8>();
    if !rest.is_empty() || instructions.len() > FILTER_INSTRUCTIONS_MAX {
        return Err(Error::new(
            "linux.seccomp",
            format!("{} bytes", filter.len()),
            "compiled it must be 1 to 4096 instructions of 8 bytes",
        ));
    }
    let allowed = SECCOMP_FLAGS.iter().fold(0, |all, (_, flag)| all | flag);
    if flags & !allowed != 0 {
        let reason = "only TSYNC, LOG and SPEC_ALLOW are supported";
        return Err(Error::new("linux.seccomp.flags", flags, reason));
    }
    Ok((!instructions.is_empty()).then(|| Seccomp {
        filter: instructions
            .iter()
            .map(|instruction| u64::from_ne_bytes(*instruction))
            .collect(),
        flags,
    }))
}

/// First size of the terminal: columns and rows, 0 if unknown.
fn console_size(size: oci::ConsoleSize) -> Result<(u16, u16), Error> {
    let side = |name: &str, cells: u64| {
        u16::try_from(cells).map_err(|_| {
            let field = format!("process.consoleSize.{name}");
            Error::new(field, cells, "it must lie between 0 and 65535")
        })
    };
    Ok((side("width", size.width)?, side("height", size.height)?))
}

pub(crate) fn no_nul(field: &str, texts: &[String]) -> Result<(), Error> {
    match texts.iter().position(|text| text.contains('\0')) {
        None => Ok(()),
        Some(n) => {
            let (field, text) = (format!("{field}[{n}]"), texts.get(n));
            Err(Error::new(field, text, "it must not contain NUL"))
        }
    }
}

/// The last word on a variable counts, at its own place.
fn last_of_each_name(env: Vec<String>) -> Vec<String> {
    let name = |entry: &str| match entry.split_once('=') {
        Some((name, _)) => name.to_owned(),
        None => entry.to_owned(),
    };
    let mut seen = HashSet::new();
    let mut kept: Vec<String> = env
        .into_iter()
        .rev()
        .filter(|entry| seen.insert(name(entry)))
        .collect();
    kept.reverse();
    kept
}

fn user(user: &oci::User) -> Result<(), Error> {
    // The kernel reads -1 as "leave it as it is".
    for (name, id) in [("uid", user.uid), ("gid", user.gid)] {
        if id == u32::MAX {
            return Err(Error::new(
                format!("process.user.{name}"),
                id,
                "it is not an id",
            ));
        }
    }
    let groups = &user.additional_gids;
    if groups.len() > GROUPS_MAX {
        let field = "process.user.additionalGids";
        return Err(Error::too_many(field, groups.len(), GROUPS_MAX));
    }
    if let Some(n) = groups.iter().position(|group| *group == u32::MAX) {
        let field = format!("process.user.additionalGids[{n}]");
        return Err(Error::new(field, u32::MAX, "it is not an id"));
    }
    match user.umask {
        Some(umask) if umask > 0o777 => Err(Error::new(
            "process.user.umask",
            umask,
            "it is more than 0777",
        )),
        _ => Ok(()),
    }
}

fn oom_score_adj(value: Option<i32>) -> Result<i32, Error> {
    let value = value.unwrap_or(0);
    if !(-1_000..=1_000).contains(&value) {
        let reason = "it must lie between -1000 and 1000";
        return Err(Error::new("process.oomScoreAdj", value, reason));
    }
    Ok(value)
}

fn io_priority(from: oci::IoPriority) -> Result<i32, Error> {
    let class = match from.class.as_str() {
        "IOPRIO_CLASS_RT" => 1,
        "IOPRIO_CLASS_BE" => 2,
        "IOPRIO_CLASS_IDLE" => 3,
        _ => {
            let reason = "it is not a class";
            return Err(Error::new("process.ioPriority.class", from.class, reason));
        }
    };
    if !(0..8).contains(&from.priority) {
        let field = "process.ioPriority.priority";
        return Err(Error::new(
            field,
            from.priority,
            "it must lie between 0 and 7",
        ));
    }
    Ok((class << 13) | from.priority)
}

/// Scheduling policies (`linux/sched.h`).
const POLICIES: [(&str, u32); 6] = [
    ("SCHED_OTHER", 0),
    ("SCHED_FIFO", 1),
    ("SCHED_RR", 2),
    ("SCHED_BATCH", 3),
    ("SCHED_IDLE", 5),
    ("SCHED_DEADLINE", Scheduler::DEADLINE),
];

/// Flags of sched_setattr(2) that need no further value (`linux/sched.h`).
const SCHEDULER_FLAGS: [(&str, u64); 5] = [
    ("SCHED_FLAG_RESET_ON_FORK", 0x01),
    ("SCHED_FLAG_RECLAIM", 0x02),
    ("SCHED_FLAG_DL_OVERRUN", 0x04),
    ("SCHED_FLAG_KEEP_POLICY", 0x08),
    ("SCHED_FLAG_KEEP_PARAMS", 0x10),
];

fn scheduler(from: oci::Scheduler) -> Result<Scheduler, Error> {
    let field = |name: &str| format!("process.scheduler.{name}");
    let Some((_, policy)) = POLICIES.iter().find(|(name, _)| *name == from.policy) else {
        let reason = "the guest has no such policy";
        return Err(Error::new(field("policy"), from.policy, reason));
    };
    if !(-20..=19).contains(&from.nice) {
        let reason = "it must lie between -20 and 19";
        return Err(Error::new(field("nice"), from.nice, reason));
    }
    let is_realtime = matches!(from.policy.as_str(), "SCHED_FIFO" | "SCHED_RR");
    let allowed = if is_realtime { 1..=99 } else { 0..=0 };
    let priority = match u32::try_from(from.priority) {
        Ok(priority) if allowed.contains(&priority) => priority,
        _ => {
            let reason = "it must lie between 1 and 99 for SCHED_FIFO and SCHED_RR, else be 0";
            return Err(Error::new(field("priority"), from.priority, reason));
        }
    };
    for (name, ns) in [
        ("runtime", from.runtime),
        ("deadline", from.deadline),
        ("period", from.period),
    ] {
        if ns != 0 && *policy != Scheduler::DEADLINE {
            return Err(Error::new(field(name), ns, "only SCHED_DEADLINE has it"));
        }
    }
    let mut flags = 0;
    for (n, name) in from.flags.into_iter().enumerate() {
        let Some((_, flag)) = SCHEDULER_FLAGS.iter().find(|(known, _)| *known == name) else {
            let reason = "this flag is not supported";
            return Err(Error::new(field(&format!("flags[{n}]")), name, reason));
        };
        flags |= flag;
    }
    Ok(Scheduler {
        policy: *policy,
        flags,
        nice: from.nice,
        priority,
        runtime: from.runtime,
        deadline: from.deadline,
        period: from.period,
    })
}

/// Capability numbers are places in this list (`linux/capability.h`).
pub const CAPABILITIES: [&str; 41] = [
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

fn capabilities(from: &oci::Capabilities, notes: &mut Vec<Note>) -> Result<Capabilities, Error> {
    let mut set = |name: &str, list: &[String]| capability_set(name, list, notes);
    let mut sets = Capabilities {
        bounding: set("bounding", &from.bounding),
        effective: set("effective", &from.effective),
        inheritable: set("inheritable", &from.inheritable),
        permitted: set("permitted", &from.permitted),
        ambient: set("ambient", &from.ambient),
    };
    // What capset(2) would refuse.
    for (name, has, must_have, other) in [
        ("effective", sets.effective, sets.permitted, "permitted"),
        ("inheritable", sets.inheritable, sets.bounding, "bounding"),
    ] {
        if let Some(missing) = first(has & !must_have) {
            let field = format!("process.capabilities.{name}");
            let reason = format!("it is not in the {other} set");
            return Err(Error::new(field, missing, reason));
        }
    }
    let ambient = sets.ambient & sets.permitted & sets.inheritable;
    if let Some(missing) = first(sets.ambient & !ambient) {
        notes.push(Note::changed(
            "process.capabilities.ambient",
            format!("{missing} is left out: it is not permitted and inheritable"),
        ));
    }
    sets.ambient = ambient;
    Ok(sets)
}

fn first(set: u64) -> Option<&'static str> {
    let number = usize::try_from(set.trailing_zeros()).ok()?;
    CAPABILITIES.get(number).copied()
}

/// Names of capabilities that came after this list, or of none, grant nothing.
fn capability_set(name: &str, list: &[String], notes: &mut Vec<Note>) -> u64 {
    const SHOWN_CHARS: usize = 40;
    let mut set = 0;
    let mut unknown: Vec<&str> = Vec::new();
    for capability in list {
        match CAPABILITIES.iter().position(|known| known == capability) {
            Some(number) => set |= 1 << number,
            None => unknown.push(capability),
        }
    }
    if let Some(capability) = unknown.first() {
        let shown: String = capability.chars().take(SHOWN_CHARS).collect();
        let more = match unknown.len() {
            1 => String::new(),
            count => format!(" (and {} more)", count - 1),
        };
        notes.push(Note::changed(
            format!("process.capabilities.{name}"),
            format!("{shown:?} is left out: no such capability{more}"),
        ));
    }
    set
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

fn rlimits(from: &[oci::Rlimit]) -> Result<Vec<Rlimit>, Error> {
    let mut seen = HashSet::new();
    let mut limits = Vec::new();
    for (n, limit) in from.iter().enumerate() {
        let field = |name: &str| format!("process.rlimits[{n}].{name}");
        let number = RLIMITS.iter().position(|known| *known == limit.kind);
        let Some(resource) = number.and_then(|n| u32::try_from(n).ok()) else {
            let reason = "no such resource limit";
            return Err(Error::new(field("type"), &limit.kind, reason));
        };
        if !seen.insert(resource) {
            return Err(Error::new(field("type"), &limit.kind, "it is given twice"));
        }
        if limit.soft > limit.hard {
            let reason = format!("the soft limit of {} exceeds the hard one", limit.kind);
            return Err(Error::new(field("soft"), limit.soft, reason));
        }
        limits.push(Rlimit {
            resource,
            soft: limit.soft,
            hard: limit.hard,
        });
    }
    Ok(limits)
}
