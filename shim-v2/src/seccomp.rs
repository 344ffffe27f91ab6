//! `linux.seccomp` of the OCI specification, compiled to a BPF program.
//!
//! The host compiles, so that the guest holds no compiler; the agent only calls
//! seccomp(2). Names of system calls that libseccomp does not know are skipped, as
//! OCI runtimes do; everything else that is not understood is refused. System calls
//! that are newer than the profile do not exist (`newer.rs`).

mod newer;

use std::{
    collections::BTreeSet,
    fs::File,
    io::{self, Read, Seek},
};

use bulkhead_agent_api::spec::{Error, SECCOMP_FLAGS, oci};
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};

/// Most rules of a profile, counting each name.
const MAX_RULES: usize = 16_384;

/// A compiled profile.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// An array of `struct sock_filter`; empty: no filter.
    pub program: Vec<u8>,
    /// Flags of seccomp(2).
    pub flags: u32,
}

/// Compiles `linux.seccomp`.
pub fn compile(profile: &oci::Seccomp) -> Result<Filter, Error> {
    for (name, text) in [
        ("listenerPath", &profile.listener_path),
        ("listenerMetadata", &profile.listener_metadata),
    ] {
        if !text.is_empty() {
            let reason = "a listener on the host cannot serve a virtual machine";
            return Err(Error::new(format!("linux.seccomp.{name}"), text, reason));
        }
    }
    let field = "linux.seccomp.defaultAction";
    let default_action = action(field, &profile.default_action, profile.default_errno_ret)?;
    let mut context = ScmpFilterContext::new(default_action)
        .map_err(|error| refused(field, &profile.default_action, &error))?;
    let mut architectures = Vec::new();
    for (n, name) in profile.architectures.iter().enumerate() {
        let field = format!("linux.seccomp.architectures[{n}]");
        let arch = architecture(&field, name)?;
        context
            .add_arch(arch)
            .map_err(|error| refused(&field, name, &error))?;
        architectures.push(arch);
    }
    let mut rules = 0_usize;
    for (n, rule) in profile.syscalls.iter().enumerate() {
        let field = format!("linux.seccomp.syscalls[{n}]");
        let action = action(&format!("{field}.action"), &rule.action, rule.errno_ret)?;
        let conditions = conditions(&field, &rule.args)?;
        for name in &rule.names {
            rules += 1;
            if rules > MAX_RULES {
                let reason = format!("at most {MAX_RULES} are allowed");
                return Err(Error::new("linux.seccomp.syscalls", "more names", reason));
            }
            // libseccomp takes a rule that repeats the default for a mistake.
            if action == default_action {
                continue;
            }
            if let Ok(syscall) = ScmpSyscall::from_name(name) {
                add(&mut context, action, syscall, &conditions)
                    .map_err(|error| refused(&field, name, &error))?;
            }
        }
    }
    let mut flags = 0;
    for (n, name) in profile.flags.iter().enumerate() {
        let Some((_, flag)) = SECCOMP_FLAGS.iter().find(|(known, _)| known == name) else {
            let field = format!("linux.seccomp.flags[{n}]");
            return Err(Error::new(field, name, "this flag is not supported"));
        };
        flags |= flag;
    }
    let mut program = newer::prefix(profile, default_action, &architectures);
    program.extend(export(&context).map_err(|error| {
        let reason = format!("it cannot be compiled: {error}");
        Error::new("linux.seccomp", "the profile", reason)
    })?);
    Ok(Filter { program, flags })
}

fn refused(field: &str, value: &str, error: &dyn std::fmt::Display) -> Error {
    Error::new(field, value, format!("libseccomp refuses it: {error}"))
}

/// Conditions on one argument are alternatives, on several they all must hold:
/// libseccomp accepts an index once in a rule, so alternatives become rules.
fn add(
    context: &mut ScmpFilterContext,
    action: ScmpAction,
    syscall: ScmpSyscall,
    conditions: &[(u32, ScmpArgCompare)],
) -> Result<(), libseccomp::error::SeccompError> {
    let indices: BTreeSet<u32> = conditions.iter().map(|(index, _)| *index).collect();
    if conditions.is_empty() {
        context.add_rule(action, syscall)?;
    } else if indices.len() == conditions.len() {
        let all: Vec<ScmpArgCompare> = conditions.iter().map(|(_, compare)| *compare).collect();
        context.add_rule_conditional(action, syscall, &all)?;
    } else {
        for (_, compare) in conditions {
            context.add_rule_conditional(action, syscall, &[*compare])?;
        }
    }
    Ok(())
}

fn conditions(rule: &str, args: &[oci::SyscallArg]) -> Result<Vec<(u32, ScmpArgCompare)>, Error> {
    /// A system call has six arguments.
    const LAST_INDEX: u32 = 5;
    let mut conditions = Vec::new();
    for (n, arg) in args.iter().enumerate() {
        let field = |name: &str| format!("{rule}.args[{n}].{name}");
        if arg.index > LAST_INDEX {
            let reason = "it must lie between 0 and 5";
            return Err(Error::new(field("index"), arg.index, reason));
        }
        let (op, datum) = match arg.op.as_str() {
            "SCMP_CMP_NE" => (ScmpCompareOp::NotEqual, arg.value),
            "SCMP_CMP_LT" => (ScmpCompareOp::Less, arg.value),
            "SCMP_CMP_LE" => (ScmpCompareOp::LessOrEqual, arg.value),
            "SCMP_CMP_EQ" => (ScmpCompareOp::Equal, arg.value),
            "SCMP_CMP_GE" => (ScmpCompareOp::GreaterEqual, arg.value),
            "SCMP_CMP_GT" => (ScmpCompareOp::Greater, arg.value),
            "SCMP_CMP_MASKED_EQ" => (ScmpCompareOp::MaskedEqual(arg.value), arg.value_two),
            _ => return Err(Error::new(field("op"), &arg.op, "no such comparison")),
        };
        conditions.push((arg.index, ScmpArgCompare::new(arg.index, op, datum)));
    }
    Ok(conditions)
}

fn action(field: &str, name: &str, errno: Option<u32>) -> Result<ScmpAction, Error> {
    /// Greatest error number of the kernel.
    const MAX_ERRNO: u16 = 4_095;
    let number = errno.unwrap_or(libc::EPERM.unsigned_abs());
    let number = match u16::try_from(number) {
        Ok(number @ ..=MAX_ERRNO) => number,
        _ => {
            return Err(Error::new(
                field,
                number,
                "its errno must lie between 0 and 4095",
            ));
        }
    };
    Ok(match name {
        "SCMP_ACT_ALLOW" => ScmpAction::Allow,
        "SCMP_ACT_ERRNO" => ScmpAction::Errno(i32::from(number)),
        "SCMP_ACT_KILL" | "SCMP_ACT_KILL_THREAD" => ScmpAction::KillThread,
        "SCMP_ACT_KILL_PROCESS" => ScmpAction::KillProcess,
        "SCMP_ACT_TRAP" => ScmpAction::Trap,
        "SCMP_ACT_LOG" => ScmpAction::Log,
        "SCMP_ACT_TRACE" => ScmpAction::Trace(number),
        "SCMP_ACT_NOTIFY" => {
            return Err(Error::new(
                field,
                name,
                "no listener can serve a virtual machine",
            ));
        }
        "" => return Err(Error::missing(field)),
        _ => return Err(Error::new(field, name, "no such action")),
    })
}

fn architecture(field: &str, name: &str) -> Result<ScmpArch, Error> {
    Ok(match name {
        "SCMP_ARCH_NATIVE" => ScmpArch::Native,
        "SCMP_ARCH_X86" => ScmpArch::X86,
        "SCMP_ARCH_X86_64" => ScmpArch::X8664,
        "SCMP_ARCH_X32" => ScmpArch::X32,
        "SCMP_ARCH_ARM" => ScmpArch::Arm,
        "SCMP_ARCH_AARCH64" => ScmpArch::Aarch64,
        _ => {
            return Err(Error::new(
                field,
                name,
                "the guest has no such architecture",
            ));
        }
    })
}

fn export(context: &ScmpFilterContext) -> io::Result<Vec<u8>> {
    let memory = rustix::fs::memfd_create("seccomp", rustix::fs::MemfdFlags::CLOEXEC)?;
    context.export_bpf(&memory).map_err(io::Error::other)?;
    let mut file = File::from(memory);
    file.rewind()?;
    let mut program = Vec::new();
    file.read_to_end(&mut program)?;
    Ok(program)
}

#[cfg(test)]
mod tests;
