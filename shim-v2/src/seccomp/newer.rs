//! System calls that are newer than a profile do not exist in its container.
//!
//! A program that gets EPERM for a system call it tries first does not fall back to
//! the older one; after ENOSYS it does. So numbers above every one that the profile
//! names are answered with ENOSYS, as other runtimes do, before the compiled profile
//! is asked. What the profile names, allowed or not, it answers itself.

use bulkhead_agent_api::spec::oci;
use libseccomp::{ScmpAction, ScmpArch, ScmpSyscall};

/// `AUDIT_ARCH_X86_64` and `AUDIT_ARCH_I386` (`linux/audit.h`).
const AUDIT_X86_64: u32 = 0xc000_003e;
const AUDIT_I386: u32 = 0x4000_0003;

/// Set in the numbers of x32, which has the architecture of x86-64.
const X32_BIT: u32 = 0x4000_0000;

/// Instructions of classic BPF (`linux/filter.h`).
mod op {
    /// Load a word of `struct seccomp_data`.
    pub(super) const LOAD: u16 = 0x20;
    /// Jump if equal, greater, or not less.
    pub(super) const EQUAL: u16 = 0x15;
    pub(super) const GREATER: u16 = 0x25;
    pub(super) const NOT_LESS: u16 = 0x35;
    pub(super) const RETURN: u16 = 0x06;
}

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// `SECCOMP_RET_ERRNO`.
const RETURN_ERRNO: u32 = 0x0005_0000;

#[derive(Clone, Copy)]
struct Instruction {
    code: u16,
    /// How many instructions to skip if a comparison holds, and if not.
    skip: (u8, u8),
    value: u32,
}

impl Instruction {
    const fn new(code: u16, value: u32) -> Self {
        Self::compare(code, value, (0, 0))
    }

    const fn compare(code: u16, value: u32, skip: (u8, u8)) -> Self {
        Self { code, skip, value }
    }

    fn bytes(self) -> [u8; 8] {
        let [c0, c1] = self.code.to_ne_bytes();
        let [v0, v1, v2, v3] = self.value.to_ne_bytes();
        [c0, c1, self.skip.0, self.skip.1, v0, v1, v2, v3]
    }
}

/// The program to run before the compiled profile: it answers, or runs on into it.
pub(super) fn prefix(
    profile: &oci::Seccomp,
    default: ScmpAction,
    architectures: &[ScmpArch],
) -> Vec<u8> {
    let refuses = match default {
        // Whoever traces answers new calls himself.
        ScmpAction::Allow | ScmpAction::Log | ScmpAction::Trace(_) => false,
        ScmpAction::Errno(number) => number != libc::ENOSYS,
        _ => true,
    };
    let mut program = Vec::new();
    // The profile is for the native architecture too.
    let mut all = vec![ScmpArch::X8664];
    for arch in architectures {
        if !all.contains(arch) {
            all.push(*arch);
        }
    }
    for arch in all.into_iter().filter(|_| refuses) {
        if let Some(last) = last_named(profile, arch) {
            program.extend(block(arch, last));
        }
    }
    program.into_iter().flat_map(Instruction::bytes).collect()
}

/// The greatest number that the profile names.
fn last_named(profile: &oci::Seccomp, arch: ScmpArch) -> Option<u32> {
    let names = profile.syscalls.iter().flat_map(|rule| &rule.names);
    names
        .filter_map(|name| ScmpSyscall::from_name_by_arch(name, arch).ok())
        // Calls that the architecture does not have are negative.
        .filter_map(|syscall| u32::try_from(i32::from(syscall)).ok())
        .max()
}

fn block(arch: ScmpArch, last: u32) -> Vec<Instruction> {
    let return_enosys = Instruction::new(op::RETURN, RETURN_ERRNO | libc::ENOSYS.unsigned_abs());
    let load = |offset| Instruction::new(op::LOAD, offset);
    match arch {
        // Numbers from the bit on are x32's.
        ScmpArch::X8664 => vec![
            load(ARCHITECTURE),
            Instruction::compare(op::EQUAL, AUDIT_X86_64, (0, 4)),
            load(NUMBER),
            Instruction::compare(op::GREATER, last, (0, 2)),
            Instruction::compare(op::NOT_LESS, X32_BIT, (1, 0)),
            return_enosys,
        ],
        ScmpArch::X32 | ScmpArch::X86 => {
            let audit = if arch == ScmpArch::X86 {
                AUDIT_I386
            } else {
                AUDIT_X86_64
            };
            vec![
                load(ARCHITECTURE),
                Instruction::compare(op::EQUAL, audit, (0, 3)),
                load(NUMBER),
                Instruction::compare(op::GREATER, last, (0, 1)),
                return_enosys,
            ]
        }
        // No process of the guest has another.
        _ => Vec::new(),
    }
}
