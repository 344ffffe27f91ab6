//! Seccomp filters from the table of `threads.rs`, and what a violation does.
//!
//! A system call that is not allowed is not made: the kernel sends SIGSYS instead
//! (SECCOMP_RET_TRAP), whose handler reports number and thread and ends the
//! process. Whoever has taken a thread over could change what the handler finds,
//! but no kind of thread may install another one, and with or without it the
//! call has not been made. Where the signal is blocked, the kernel ends the process.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    os::fd::RawFd,
    sync::atomic::{AtomicI32, Ordering},
};

use libc::{c_int, c_void, siginfo_t};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule, TargetArch, apply_filter,
};

use super::{
    syscalls::{Rule, When},
    threads::ThreadKind,
};
use crate::exit::End;

/// The programs of one kind of thread.
#[derive(Debug)]
pub(super) struct Filter {
    /// Answers clone3 with ENOSYS, for a kind that may start threads.
    old_clone: Option<BpfProgram>,
    /// Allows the table.
    table: BpfProgram,
}

impl Filter {
    /// The filter of this kind in this process.
    pub(super) fn new(kind: ThreadKind) -> io::Result<Filter> {
        let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
        for Rule { number, when } in kind.system_calls() {
            let alternatives = rules.entry(number).or_default();
            for when in when {
                alternatives.push(rule(*when).map_err(io::Error::other)?);
            }
        }
        let enosys = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let old_clone = kind
            .starts_threads()
            .then(|| BTreeMap::from([(libc::SYS_clone3, Vec::new())]))
            .map(|clone3| compile(clone3, SeccompAction::Allow, enosys))
            .transpose()?;
        Ok(Filter {
            old_clone,
            table: compile(rules, SeccompAction::Trap, SeccompAction::Allow)?,
        })
    }

    /// Puts the calling thread under it, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        if let Some(old_clone) = &self.old_clone {
            apply_filter(old_clone).map_err(io::Error::other)?;
        }
        apply_filter(&self.table).map_err(io::Error::other)
    }
}

fn compile(
    rules: BTreeMap<i64, Vec<SeccompRule>>,
    otherwise: SeccompAction,
    matching: SeccompAction,
) -> io::Result<BpfProgram> {
    SeccompFilter::new(rules, otherwise, matching, TargetArch::x86_64)
        .and_then(BpfProgram::try_from)
        .map_err(io::Error::other)
}

fn rule(when: When) -> Result<SeccompRule, seccompiler::BackendError> {
    let (index, operator, value) = match when {
        When::Is(index, value) => (index, SeccompCmpOp::Eq, value),
        When::Bits { index, mask, value } => (index, SeccompCmpOp::MaskedEq(mask.into()), value),
        When::ThisProcess(index) => (index, SeccompCmpOp::Eq, std::process::id()),
    };
    let condition = SeccompCondition::new(index, SeccompCmpArgLen::Dword, operator, value.into())?;
    SeccompRule::new(vec![condition])
}

/// Where a violation is reported.
static REPORT: AtomicI32 = AtomicI32::new(-1);

/// `si_code` of a SIGSYS that a filter caused.
const SYS_SECCOMP: c_int = 1;

/// The part of `siginfo_t` that tells of a blocked system call.
#[repr(C)]
struct Blocked {
    signo: c_int,
    errno: c_int,
    code: c_int,
    address: *const c_void,
    number: c_int,
}

/// Lets violations be reported to `report`, which stays open as long as the
/// process.
pub(super) fn report_violations(report: Option<RawFd>) -> io::Result<()> {
    REPORT.store(report.unwrap_or(-1), Ordering::Relaxed);
    vmm_sys_util::signal::register_signal_handler(libc::SIGSYS, violation)
        .map_err(|errno| io::Error::from_raw_os_error(errno.errno()))
}

/// The system call that a filter blocked; -1 if the signal has another cause.
///
/// # Safety
/// `info` points to the whole `siginfo_t` of a SIGSYS.
pub(super) unsafe fn blocked_call(info: *const siginfo_t) -> c_int {
    // SAFETY: as the caller vouches; it is larger than this part of it, which has
    // this layout for SIGSYS on x86-64.
    let Blocked { code, number, .. } = unsafe { info.cast::<Blocked>().read() };
    if code == SYS_SECCOMP { number } else { -1 }
}

/// Reports and ends the process, by calls that are safe in a handler of signals.
extern "C" fn violation(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the kernel passes the `siginfo_t` of a SIGSYS.
    let number = unsafe { blocked_call(info) };
    let mut name = [0_u8; 16];
    // SAFETY: the kernel writes at most 16 bytes, its end included.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let mut line = [0; 256];
    let length = report_line(&mut line, number, &name);
    for fd in [REPORT.load(Ordering::Relaxed), libc::STDERR_FILENO] {
        // SAFETY: `length` bytes of `line` are initialised; a descriptor that is
        // closed or -1 only makes it fail.
        unsafe { libc::write(fd, line.as_ptr().cast(), length) };
    }
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(End::Blocked.status().into()) }
}

/// Writes an [`exit::Report`](crate::exit::Report) as a line and returns its length.
fn report_line(mut line: &mut [u8], number: c_int, name: &[u8; 16]) -> usize {
    let all = line.len();
    let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
    let name = std::str::from_utf8(name)
        .ok()
        .filter(|name| {
            name.bytes()
                .all(|byte| byte.is_ascii_graphic() && byte != b'"')
        })
        .unwrap_or("unnamed");
    // The buffer is large enough; a line that is cut is no JSON and no report.
    let _ = writeln!(
        line,
        "{{\"end\":\"blocked\",\"reason\":\"The VMM's thread {name} made the blocked \
         system call {number}\"}}"
    );
    all - line.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Report;

    #[test]
    fn a_violation_is_told_as_a_report_with_call_and_thread_f24() {
        let mut line = [0; 256];
        let length = report_line(&mut line, 272, b"vcpu63\0\0\0\0\0\0\0\0\0\0");
        let report: Report = serde_json::from_slice(&line[..length]).unwrap();
        assert_eq!(report.end, End::Blocked);
        assert_eq!(
            report.reason,
            "The VMM's thread vcpu63 made the blocked system call 272"
        );
        // Whoever has taken a thread over may have named it.
        let length = report_line(&mut line, -1, &[b'"'; 16]);
        assert!(serde_json::from_slice::<Report>(&line[..length]).is_ok());
    }

    #[test]
    fn every_kind_has_a_filter_that_compiles() {
        for kind in ThreadKind::ALL {
            let filter = Filter::new(kind).unwrap();
            assert!(filter.table.len() < 4096, "{kind:?}");
        }
    }
}
