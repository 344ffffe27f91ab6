use std::pin::pin;

use futures::{FutureExt, future::join_all, poll};
use tokio::task::unconstrained;

use super::*;
use crate::{
    events::testing::Told,
    names::{ContainerId, ExecId},
};

fn process(exec: Option<&str>) -> (Process, Told) {
    let name = ProcessName {
        container: ContainerId::new("c").unwrap(),
        exec: exec.map(|exec| ExecId::new(exec).unwrap()),
    };
    let (events, told) = Publisher::kept();
    let herald = Herald {
        events: Arc::new(events),
    };
    let process = Process::new(name, Stdio::default(), (0, 0), None, herald);
    (process, told)
}

fn any(_: State) -> Result<(), Refusal> {
    Ok(())
}

#[tokio::test]
async fn an_end_is_recorded_once_and_told_to_every_waiter_lc_74_ta_31() {
    let (process, events) = process(None);
    let mut waiters = pin!(unconstrained(join_all((0..1000).map(|_| process.exit()))));
    // All of them wait before there is anything to be told.
    assert!(poll!(&mut waiters).is_pending());
    process.end(Exit::now(7));
    process.end(Exit::now(8));
    let told = waiters.now_or_never().expect("nobody waits any more");
    assert!(told.iter().all(|exit| exit.status == 7));
    assert_eq!(process.exit().await.status, 7);
    assert_eq!(events.all(), ["/tasks/exit c 7"]);
}

#[test]
fn a_process_that_ended_cannot_run_again() {
    let (process, _) = process(None);
    let start = process.begin(any).unwrap();
    process.end(Exit::now(1));
    assert!(start.confirm());
    assert_eq!(process.state(), State::Ended);
    assert!(
        process
            .begin(|state| crate::state::init(state, crate::state::Op::Start))
            .is_err()
    );
}

#[test]
fn an_end_that_overtakes_the_start_is_told_after_it_lc_73() {
    let (process, events) = process(None);
    let start = process.begin(any).unwrap();
    process.end(Exit::now(3));
    assert_eq!(process.state(), State::Starting);
    assert!(events.all().is_empty());
    assert!(start.confirm());
    assert_eq!(events.all(), ["/tasks/start c", "/tasks/exit c 3"]);
}

#[test]
fn a_failed_start_leaves_an_init_that_can_be_deleted_and_an_exec_that_has_ended_ta_24_ta_25() {
    let (init, events) = process(None);
    drop(init.begin(any).unwrap());
    assert_eq!(init.state(), State::Registered);
    // Its process dies of the failure.
    init.end(Exit::now(1));
    assert_eq!(events.all(), ["/tasks/exit c 1"]);
    let (exec, events) = process(Some("e"));
    exec.begin(any).unwrap().fail(127);
    assert_eq!(exec.phase().exit().map(|exit| exit.status), Some(127));
    assert!(events.all().is_empty());
}

#[test]
fn an_exec_that_is_given_up_while_it_starts_is_not_told_as_started() {
    let (exec, events) = process(Some("e"));
    let start = exec.begin(any).unwrap();
    exec.end(Exit::now(137));
    assert_eq!(exec.state(), State::Ended);
    assert!(!start.confirm());
    assert!(events.all().is_empty());
}

#[test]
fn a_pause_and_its_end_are_told_once_and_in_order_ta_51() {
    let (process, events) = process(None);
    assert!(process.pause().is_err());
    assert!(process.begin(any).unwrap().confirm());
    // It fails in the guest.
    drop(process.pause().unwrap());
    assert_eq!(process.state(), State::Live);
    let pausing = process.pause().unwrap().unwrap();
    assert_eq!(process.pause().unwrap_err(), Refusal::WrongState);
    assert!(pausing.confirm());
    assert!(process.pause().unwrap().is_none());
    process.resumed();
    process.resumed();
    let pausing = process.pause().unwrap().unwrap();
    process.end(Exit::now(137));
    assert!(!pausing.confirm());
    process.resumed();
    assert_eq!(
        events.all(),
        [
            "/tasks/start c",
            "/tasks/paused c",
            "/tasks/resumed c",
            "/tasks/exit c 137"
        ]
    );
}

#[test]
fn only_what_does_not_run_is_retired() {
    let (exec, _) = process(Some("e"));
    let start = exec.begin(any).unwrap();
    assert_eq!(exec.retire(), Err(State::Starting));
    assert!(start.confirm());
    assert_eq!(exec.retire(), Err(State::Live));
    exec.end(Exit::now(5));
    assert_eq!(exec.retire().unwrap().status, 5);
    let (exec, events) = process(Some("e"));
    assert_eq!(exec.retire().unwrap().status, 0);
    assert_eq!(exec.state(), State::Ended);
    assert!(events.all().is_empty());
}
