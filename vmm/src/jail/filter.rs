//! Seccomp filters from the table of `threads.rs`, and what a violation does.
//!
//! A system call that is not allowed is not made: the kernel sends SIGSYS instead
//! (SECCOMP_RET_TRAP), whose handler reports number and thread and ends the
//! process. Whoever has taken a thread over could change what the handler finds,
//! but no kind of thread may install another one, and with or without it the
//! call has not been made. Where the signal is blocked, the kernel ends the process.

use std::{
    io::{self, Write},
    os::fd::RawFd,
    sync::atomic::{AtomicI32, Ordering},
};

use libc::{c_int, c_void, siginfo_t, sock_filter, sock_fprog};

use super::{
    syscalls::{Answer, Rule, When},
    threads::ThreadKind,
};
use crate::exit::End;

/// `AUDIT_ARCH_X86_64`: the only calling convention that is allowed.
const X86_64: u32 = 0xc000_003e;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// Calls that are compared one after the other at the end of a search: fewer
/// instructions than halves again.
const CHAIN: usize = 4;

/// The program of one kind of thread.
///
/// A search by halves: for each program that is installed, the kernel looks up every
/// system call there is, to know those that need no look later, and makes machine code of
/// it. With a chain of ninety comparisons that took longer than all else that a thread
/// does before the guest runs.
#[derive(Debug)]
pub(super) struct Filter(Vec<sock_filter>);

impl Filter {
    /// The filter of this kind in this process.
    pub(super) fn new(kind: ThreadKind) -> Filter {
        let mut calls: Vec<Call> = Vec::new();
        let mut rules = kind.system_calls();
        rules.sort_by_key(|rule| rule.number);
        for rule in rules {
            match calls.last_mut() {
                Some(last) if i64::from(last.number) == rule.number => last.rules.push(rule),
                _ => calls.push(Call {
                    number: u32::try_from(rule.number).unwrap_or(u32::MAX),
                    rules: vec![rule],
                }),
            }
        }
        let mut program = vec![
            load(ARCHITECTURE),
            jump(libc::BPF_JEQ, X86_64, 1, 0),
            answer(libc::SECCOMP_RET_KILL_PROCESS),
            load(NUMBER),
        ];
        program.extend(search(&calls));
        Filter(program)
    }

    /// Puts the calling thread under it, for good.
    pub(super) fn install(&self) -> io::Result<()> {
        let program = sock_fprog {
            len: u16::try_from(self.0.len()).map_err(io::Error::other)?,
            filter: self.0.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions from `filter`, which are there.
        let outcome = unsafe {
            libc::syscall(
                libc::SYS_seccomp,
                libc::SECCOMP_SET_MODE_FILTER,
                0,
                &raw const program,
            )
        };
        if outcome == 0 {
            Ok(())
        } else {
            Err(io::Error::last_os_error())
        }
    }
}

/// A system call with all that the groups of a kind say of it.
struct Call {
    number: u32,
    rules: Vec<Rule>,
}

impl Call {
    /// Whether it is allowed whatever its arguments.
    fn is_free(&self) -> bool {
        let free = |rule: &Rule| rule.when.is_empty() && rule.answer == Answer::Allowed;
        self.rules.iter().any(free) && self.rules.iter().all(|rule| rule.answer == Answer::Allowed)
    }
}

/// A search for the number among `calls`, which are in order.
fn search(calls: &[Call]) -> Vec<sock_filter> {
    const REFUSED: sock_filter = answer(libc::SECCOMP_RET_TRAP);
    if calls.len() <= CHAIN && calls.iter().all(Call::is_free) {
        let mut left = u8::try_from(calls.len()).unwrap_or(u8::MAX);
        let mut program = Vec::new();
        for call in calls {
            program.push(jump(libc::BPF_JEQ, call.number, left, 0));
            left = left.saturating_sub(1);
        }
        program.extend([REFUSED, answer(libc::SECCOMP_RET_ALLOW)]);
        return program;
    }
    if let [call] = calls {
        let mut program = vec![jump(libc::BPF_JEQ, call.number, 1, 0), REFUSED];
        judge(&call.rules, &mut program);
        return program;
    }
    let (low, high) = calls.split_at(calls.len() / 2);
    let middle = high.first().map_or(0, |call| call.number);
    let (low, high) = (search(low), search(high));
    let mut program = match u8::try_from(low.len()) {
        Ok(skip) => vec![jump(libc::BPF_JGE, middle, skip, 0)],
        Err(_) => vec![
            jump(libc::BPF_JGE, middle, 0, 1),
            always(u32::try_from(low.len()).unwrap_or(u32::MAX)),
        ],
    };
    program.extend(low);
    program.extend(high);
    program
}

/// Appends the answer to a call with these rules.
fn judge(rules: &[Rule], program: &mut Vec<sock_filter>) {
    let free = rules.iter().find(|rule| rule.when.is_empty());
    if let Some(rule) = free {
        return program.push(match rule.answer {
            Answer::Allowed => answer(libc::SECCOMP_RET_ALLOW),
            Answer::Unknown => answer(libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
        });
    }
    for when in rules.iter().flat_map(|rule| rule.when) {
        let (index, mask, value) = match *when {
            When::Is(index, value) => (index, u32::MAX, value),
            When::Bits { index, mask, value } => (index, mask, value),
            When::ThisProcess(index) => (index, u32::MAX, std::process::id()),
        };
        program.push(load(ARGUMENTS + 8 * u32::from(index)));
        program.push(instruction(libc::BPF_ALU | libc::BPF_AND, 0, 0, mask));
        program.push(jump(libc::BPF_JEQ, value, 0, 1));
        program.push(answer(libc::SECCOMP_RET_ALLOW));
    }
    program.push(answer(libc::SECCOMP_RET_TRAP));
}

const fn load(offset: u32) -> sock_filter {
    instruction(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset)
}

/// Skips so many instructions if the comparison with `value` holds, and so many if not.
const fn jump(comparison: u32, value: u32, holds: u8, fails: u8) -> sock_filter {
    instruction(libc::BPF_JMP | comparison, holds, fails, value)
}

const fn always(skip: u32) -> sock_filter {
    instruction(libc::BPF_JMP | libc::BPF_JA, 0, 0, skip)
}

const fn answer(action: u32) -> sock_filter {
    instruction(libc::BPF_RET, 0, 0, action)
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "codes are 16 bits by definition"
)]
const fn instruction(code: u32, jt: u8, jf: u8, k: u32) -> sock_filter {
    let code = code as u16;
    sock_filter { code, jt, jf, k }
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

    /// What the program says of a call, and in how many steps.
    fn run(program: &[sock_filter], number: u32, arguments: [u32; 6]) -> (u32, usize) {
        let (mut at, mut accumulator, mut steps) = (0, 0, 0);
        loop {
            steps += 1;
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            match u32::from(code) {
                c if c == libc::BPF_LD | libc::BPF_W | libc::BPF_ABS => {
                    accumulator = match k {
                        NUMBER => number,
                        ARCHITECTURE => X86_64,
                        // The lower half of each argument comes first.
                        _ => arguments[usize::try_from((k - ARGUMENTS) / 8).unwrap()],
                    }
                }
                c if c == libc::BPF_ALU | libc::BPF_AND => accumulator &= k,
                c if c == libc::BPF_JMP | libc::BPF_JA => at += k as usize,
                c if c == libc::BPF_JMP | libc::BPF_JEQ => {
                    at += usize::from(if accumulator == k { jt } else { jf });
                }
                c if c == libc::BPF_JMP | libc::BPF_JGE => {
                    at += usize::from(if accumulator >= k { jt } else { jf });
                }
                c if c == libc::BPF_RET => return (k, steps),
                other => panic!("the code {other:#x}"),
            }
        }
    }

    #[test]
    fn a_filter_allows_what_the_table_says_and_nothing_else() {
        // Each value that a rule names, and neighbours.
        let values = |rules: &[Rule]| -> Vec<u32> {
            let named = rules
                .iter()
                .flat_map(|rule| rule.when)
                .map(|when| match *when {
                    When::Is(_, value) | When::Bits { value, .. } => value,
                    When::ThisProcess(_) => std::process::id(),
                });
            let near = named.flat_map(|value| [value, value ^ 1, value | 1 << 31, !value]);
            near.chain([0]).collect()
        };
        for kind in ThreadKind::ALL {
            let program = Filter::new(kind).0;
            assert!(program.len() < 4096, "{kind:?}");
            let rules = kind.system_calls();
            for number in (0..600).chain([u32::MAX, 0x4000_0000]) {
                let its: Vec<Rule> = rules
                    .iter()
                    .filter(|rule| rule.number == i64::from(number))
                    .copied()
                    .collect();
                for value in values(&its) {
                    let arguments = [value; 6];
                    let holds = |when: &When| match *when {
                        When::Is(_, wanted) => value == wanted,
                        When::Bits {
                            mask,
                            value: wanted,
                            ..
                        } => value & mask == wanted,
                        When::ThisProcess(_) => value == std::process::id(),
                    };
                    let allowed = its
                        .iter()
                        .any(|rule| rule.when.is_empty() || rule.when.iter().any(holds));
                    let unknown = its.iter().any(|rule| rule.answer == Answer::Unknown);
                    let expected = match (allowed, unknown) {
                        (true, false) => libc::SECCOMP_RET_ALLOW,
                        (true, true) => libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned(),
                        (false, _) => libc::SECCOMP_RET_TRAP,
                    };
                    let (said, steps) = run(&program, number, arguments);
                    assert_eq!(said, expected, "{kind:?} {number} {value:#x}");
                    assert!(its.iter().any(|rule| !rule.when.is_empty()) || steps <= 24);
                }
            }
        }
    }

    #[test]
    fn another_calling_convention_ends_the_process() {
        for kind in ThreadKind::ALL {
            let program = Filter::new(kind).0;
            let [load, compare, end, ..] = program.as_slice() else {
                panic!("a program of {} instructions", program.len());
            };
            assert_eq!(load.k, ARCHITECTURE);
            assert_eq!((compare.k, compare.jt, compare.jf), (X86_64, 1, 0));
            assert_eq!(end.k, libc::SECCOMP_RET_KILL_PROCESS);
        }
    }
}
