//! Filters in force, and filters interpreted.

use bulkhead_agent_api::spec::json;
use serde_json::{Value, json};

use super::*;

fn compile(profile: Value) -> Result<Filter, Error> {
    super::compile(&json::from_value("linux.seccomp", profile)?)
}

fn last_errno() -> i32 {
    io::Error::last_os_error().raw_os_error().unwrap_or(-1)
}

/// Runs system calls under a filter in a forked child; answers their errno,
/// 0 for success.
fn under(filter: &Filter, calls: &[(i64, [i64; 2])]) -> Vec<i32> {
    let (mut reader, writer) = io::pipe().unwrap();
    let length = u16::try_from(filter.program.len() / 8).unwrap();
    let program = libc::sock_fprog {
        len: length,
        filter: filter.program.as_ptr().cast_mut().cast(),
    };
    let mut results = vec![0_i32; calls.len()];
    // SAFETY: the child makes system calls on memory prepared before the fork
    // and ends by _exit; it allocates nothing.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: a plain prctl of the child itself.
        unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
        // SAFETY: `program` points to `filter.program`, alive until _exit.
        let loaded =
            unsafe { libc::syscall(libc::SYS_seccomp, 1, filter.flags, &raw const program) };
        for (result, (number, args)) in results.iter_mut().zip(calls) {
            // SAFETY: the tests pass calls that touch no memory of this process.
            let value = unsafe { libc::syscall(*number, args[0], args[1], 0, 0) };
            *result = if value < 0 { last_errno() } else { 0 };
        }
        if loaded != 0 {
            results.fill(-1);
        }
        let bytes = results.len() * 4;
        // SAFETY: `results` is that long, the pipe is open.
        unsafe {
            libc::write(
                std::os::fd::AsRawFd::as_raw_fd(&writer),
                results.as_ptr().cast(),
                bytes,
            )
        };
        // SAFETY: ends the child without running destructors of the parent.
        unsafe { libc::_exit(0) };
    }
    assert!(child > 0);
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).unwrap();
    // SAFETY: reaps the child made above.
    unsafe { libc::waitpid(child, std::ptr::null_mut(), 0) };
    bytes
        .chunks_exact(4)
        .map(|chunk| i32::from_ne_bytes(chunk.try_into().unwrap()))
        .collect()
}

#[test]
fn rules_errno_and_arguments_act_as_the_profile_says() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["getpriority", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
            {"names": ["getpgid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
            {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 7,
             "args": [{"index": 1, "value": 10, "op": "SCMP_CMP_EQ"},
                      {"index": 1, "value": 12, "op": "SCMP_CMP_EQ"}]},
            {"names": ["setpgid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 9,
             "args": [{"index": 0, "value": 255, "valueTwo": 3, "op": "SCMP_CMP_MASKED_EQ"}]},
        ],
    });
    let filter = compile(profile).unwrap();
    assert_eq!(filter.flags, 0);
    let results = under(
        &filter,
        &[
            (libc::SYS_getpid, [0, 0]),
            (libc::SYS_getpriority, [0, 0]),
            (libc::SYS_getpgid, [0, 0]),
            (libc::SYS_kill, [0, 0]),
            (libc::SYS_kill, [0, 10]),
            (libc::SYS_kill, [0, 12]),
            (libc::SYS_setpgid, [0x103, 0]),
        ],
    );
    assert_eq!(results, [0, libc::EPERM, 38, 0, 7, 7, 9]);
}

#[test]
fn an_allow_list_refuses_the_rest_with_its_errno() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": 38,
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "syscalls": [
            {"names": ["getpid", "write", "exit_group"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["getppid"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38},
        ],
    });
    let filter = compile(profile).unwrap();
    assert_eq!(filter.flags, 2);
    let results = under(
        &filter,
        &[(libc::SYS_getpid, [0, 0]), (libc::SYS_getuid, [0, 0])],
    );
    assert_eq!(results, [0, 38]);
}

#[test]
fn profiles_that_are_not_understood_are_refused_b9() {
    let check = |profile: Value, field: &str| {
        let text = compile(profile).unwrap_err().to_string();
        assert!(text.contains(field), "{text}");
    };
    check(json!({}), "linux.seccomp.defaultAction");
    check(json!({"defaultAction": "SCMP_ACT_X"}), "defaultAction");
    check(json!({"defaultAction": "SCMP_ACT_NOTIFY"}), "defaultAction");
    let base = |key: &str, value: Value| json!({"defaultAction": "SCMP_ACT_ALLOW", key: value});
    check(
        base("architectures", json!(["SCMP_ARCH_PDP11"])),
        "architectures[0]",
    );
    check(base("listenerPath", json!("/run/x.sock")), "listenerPath");
    check(
        base("flags", json!(["SECCOMP_FILTER_FLAG_NEW_LISTENER"])),
        "flags[0]",
    );
    let names: Vec<&str> = vec!["read"; 100_000];
    check(
        base(
            "syscalls",
            json!([{"names": names, "action": "SCMP_ACT_LOG"}]),
        ),
        "syscalls",
    );
    let args = json!([{"index": 6, "value": 0, "op": "SCMP_CMP_EQ"}]);
    check(
        base(
            "syscalls",
            json!([{"names": ["read"], "action": "SCMP_ACT_LOG", "args": args}]),
        ),
        "index",
    );
}

/// What the kernel answers for a system call without looking at its arguments, all
/// of which are 0.
fn answer(filter: &Filter, arch: u32, number: u32) -> u32 {
    let (instructions, rest) = filter.program.as_chunks::<8>();
    assert!(rest.is_empty() && instructions.len() <= 4_096);
    let (mut a, mut next) = (0_u32, 0_usize);
    loop {
        let [c0, c1, jt, jf, k @ ..] = instructions[next];
        let (code, k) = (u16::from_ne_bytes([c0, c1]), u32::from_ne_bytes(k));
        next += 1;
        let holds = match code {
            0x20 => {
                a = match k {
                    0 => number,
                    4 => arch,
                    _ => 0,
                };
                continue;
            }
            0x54 => {
                a &= k;
                continue;
            }
            0x05 => {
                next += usize::try_from(k).unwrap();
                continue;
            }
            0x06 => return k,
            0x15 => a == k,
            0x25 => a > k,
            0x35 => a >= k,
            0x45 => a & k != 0,
            other => panic!("operation {other:#x}"),
        };
        next += usize::from(if holds { jt } else { jf });
    }
}

const X86_64: u32 = 0xc000_003e;
const I386: u32 = 0x4000_0003;
const AARCH64: u32 = 0xc000_00b7;
const X32_BIT: u32 = 0x4000_0000;
const ALLOW: u32 = 0x7fff_0000;
const ERRNO: u32 = 0x0005_0000;
const EPERM: u32 = ERRNO + 1;
const ENOSYS: u32 = ERRNO + 38;
const KILL_THREAD: u32 = 0;

fn profile(default: &Value, architectures: &[&str]) -> Value {
    let mut profile = json!({
        "architectures": architectures,
        "syscalls": [
            {"names": ["read", "write", "exit_group"], "action": "SCMP_ACT_ALLOW"},
            // Named, if only to be refused: the profile knows it.
            {"names": ["openat2"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13},
        ],
    });
    for (key, value) in default.as_object().unwrap() {
        profile[key] = value.clone();
    }
    profile
}

#[test]
fn a_system_call_newer_than_the_profile_does_not_exist() {
    let all = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
    let filter = compile(profile(&json!({"defaultAction": "SCMP_ACT_ERRNO"}), &all)).unwrap();
    // openat2 is 437 everywhere.
    for (arch, number, expected) in [
        (X86_64, 0, ALLOW),
        (X86_64, 39, EPERM),
        (X86_64, 436, EPERM),
        (X86_64, 437, ERRNO + 13),
        (X86_64, 438, ENOSYS),
        (X86_64, 600, ENOSYS),
        (X86_64, X32_BIT - 1, ENOSYS),
        (X86_64, X32_BIT, ALLOW),
        (X86_64, X32_BIT + 39, EPERM),
        (X86_64, X32_BIT + 437, ERRNO + 13),
        (X86_64, X32_BIT + 438, ENOSYS),
        (I386, 3, ALLOW),
        (I386, 20, EPERM),
        (I386, 437, ERRNO + 13),
        (I386, 438, ENOSYS),
        (I386, 0xffff_ffff, ENOSYS),
        (AARCH64, 438, KILL_THREAD),
    ] {
        assert_eq!(
            answer(&filter, arch, number),
            expected,
            "{arch:#x} {number:#x}"
        );
    }
    // Without a word on architectures the native one is meant.
    let native = compile(profile(&json!({"defaultAction": "SCMP_ACT_KILL"}), &[])).unwrap();
    for (arch, number, expected) in [
        (X86_64, 436, KILL_THREAD),
        (X86_64, 438, ENOSYS),
        (X86_64, X32_BIT + 438, KILL_THREAD),
        (I386, 438, KILL_THREAD),
    ] {
        assert_eq!(
            answer(&native, arch, number),
            expected,
            "{arch:#x} {number:#x}"
        );
    }
}

#[test]
fn a_profile_that_answers_new_system_calls_itself_is_left_alone() {
    for (default, expected) in [
        (json!({"defaultAction": "SCMP_ACT_ALLOW"}), ALLOW),
        (json!({"defaultAction": "SCMP_ACT_LOG"}), 0x7ffc_0000),
        (json!({"defaultAction": "SCMP_ACT_TRACE"}), 0x7ff0_0001),
        (
            json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38}),
            ENOSYS,
        ),
    ] {
        let filter = compile(profile(&default, &[])).unwrap();
        assert_eq!(answer(&filter, X86_64, 438), expected, "{default}");
    }
}

#[test]
fn the_kernel_agrees_that_a_new_system_call_does_not_exist() {
    let mut profile = profile(&json!({"defaultAction": "SCMP_ACT_ERRNO"}), &[]);
    profile["defaultErrnoRet"] = json!(1);
    let calls = [(libc::SYS_getppid, [0, 0]), (600, [0, 0])];
    let results = under(&compile(profile).unwrap(), &calls);
    assert_eq!(results, [libc::EPERM, libc::ENOSYS]);
}
