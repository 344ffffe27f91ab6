use bulkhead_vmm::exit;

use super::*;

fn report(reason: &str) -> Option<Report> {
    Some(Report {
        end: exit::End::GuestPanic,
        reason: reason.into(),
        console: vec!["a\x1b".into()],
        stats: None,
    })
}

/// Runs a program in place of the VMM and gives its end, as the thread that
/// waits for it does. `hold` keeps the report's other end open meanwhile.
fn end_of(script: &str, hold: bool) -> End {
    let (report, report_end) = io::pipe().unwrap();
    let mut child = Child::start(&Program {
        arguments: &["-c".to_owned(), script.to_owned()],
        // It reports there.
        ..Program::new(Path::new("/bin/sh"), report_end.as_fd())
    })
    .unwrap();
    let held = hold.then_some(report_end);
    let report = read_report(report.into(), &child.pidfd().unwrap());
    drop(held);
    super::end_of(&mut child, report)
}

#[test]
fn a_report_that_fills_the_pipe_does_not_hold_the_vmm_up() {
    // A pipe takes 64 KiB; nobody has read yet when the process waits for room.
    let end = end_of("yes | head -c 1000000 >&2; exit 3", false);
    assert_eq!(end.reason, "the VMM ended with status 3 and no report");
}

#[test]
fn a_report_is_read_whoever_else_holds_its_pipe() {
    let said = r#"{"end":"blocked","reason":"The VMM's thread x made the blocked system call 41"}"#;
    for hold in [false, true] {
        let end = end_of(&format!("cat >&2 << 'END'\n{said}\nEND\nexit 18"), hold);
        assert_eq!(end.status, FAILED);
        assert!(
            end.reason.ends_with("the blocked system call 41"),
            "{end:?}"
        );
    }
}

#[test]
fn an_end_by_sigkill_is_137_every_other_255_f22_f33() {
    let check = |raw: i32, given: Option<Report>, status: u8, words: &str| {
        let end = End::of(ExitStatus::from_raw(raw), given);
        assert_eq!(end.status, status, "{end:?}");
        assert!(end.reason.contains(words), "{end:?}");
    };
    check(9, None, 137, "killed");
    check(11, None, 255, "crashed with signal 11");
    check(6, report("x"), 255, "signal 6");
    check(31, None, 255, "blocked");
    check(0, None, 255, "status 0 and no report");
    check(0, report("the guest powered off"), 255, "powered off");
    check(
        11 << 8,
        report("guest panic: \x1b[0m"),
        255,
        "guest panic: \\u{1b}[0m",
    );
}
