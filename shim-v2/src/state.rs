//! What is legal when: the states of a process and the calls upon it.
//!
//! ```text
//!              start             started           exit
//!  Registered ──────► Starting ─────────► Live ─────────► Ended ──► (deleted)
//!     │  ▲                │               │ ▲                ▲
//!     │  └── failed ──────┤               │ └ resume, failed │
//!     │                   │         pause │         │        │
//!     │                   │               ▼         │        │
//!     │                   │            Pausing ► Paused      │
//!     │                   │ (an exec:     │         │        │
//!     └───── kill, exit ──┴── has ended) ─┴─────────┴────────┘
//! ```
//!
//! Only the first process of a container is paused, and its execs with it. Pure: no
//! IO, no lock. Every pair is listed; the tests hold the table of containerd's task
//! API against it. Who meets `Starting` has waited for its end already if the call may
//! wait (Delete, and Kill of an exec).

use std::fmt;

/// State of a process, the first one of a container or an exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It exists (an exec: is known by name only) and waits for start.
    Registered,
    /// It is being started.
    Starting,
    /// Its program runs.
    Live,
    /// Its program runs, and is about to stand still.
    Pausing,
    /// Its program stands still.
    Paused,
    /// It has ended.
    Ended,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Registered => "created",
            State::Starting => "being started",
            State::Live => "running",
            State::Pausing => "being paused",
            State::Paused => "paused",
            State::Ended => "stopped",
        })
    }
}

/// A call that depends on the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    /// Let the program run.
    Start,
    /// Forget the process.
    Delete,
    /// Send a signal.
    Kill,
    /// Register a further process.
    Exec,
    /// Let the container stand still.
    Pause,
    /// Let it go on.
    Resume,
    /// Change its limits.
    Update,
    /// Copy files in or out.
    Copy,
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Start => "start",
            Op::Delete => "delete",
            Op::Kill => "kill",
            Op::Exec => "execute in",
            Op::Pause => "pause",
            Op::Resume => "resume",
            Op::Update => "update",
            Op::Copy => "copy files of",
        })
    }
}

/// Why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The state does not allow it.
    WrongState,
    /// The process is gone already, so there is nothing to do.
    Finished,
    /// The container's first process does not run.
    InitNotRunning,
    /// The container stands still.
    Paused,
}

/// May `op` be done to the first process of a container in `state`?
pub fn init(state: State, op: Op) -> Result<(), Refusal> {
    match (state, op) {
        (State::Registered, Op::Start | Op::Delete | Op::Kill | Op::Exec | Op::Update)
        | (State::Starting, Op::Kill | Op::Exec | Op::Update)
        | (State::Live, Op::Kill | Op::Exec | Op::Pause | Op::Resume | Op::Update | Op::Copy)
        | (State::Pausing, Op::Kill | Op::Update)
        | (State::Paused, Op::Kill | Op::Pause | Op::Resume | Op::Update)
        | (State::Ended, Op::Delete) => Ok(()),
        (State::Registered, Op::Pause | Op::Resume)
        | (State::Starting, Op::Start | Op::Delete | Op::Pause | Op::Resume)
        | (State::Live | State::Paused, Op::Start | Op::Delete)
        | (State::Pausing, Op::Start | Op::Delete | Op::Pause | Op::Resume)
        | (State::Ended, Op::Start) => Err(Refusal::WrongState),
        (State::Pausing | State::Paused, Op::Exec | Op::Copy) => Err(Refusal::Paused),
        (State::Ended, Op::Kill) => Err(Refusal::Finished),
        (State::Registered | State::Starting, Op::Copy)
        | (State::Ended, Op::Exec | Op::Pause | Op::Resume | Op::Update | Op::Copy) => {
            Err(Refusal::InitNotRunning)
        }
    }
}

/// May `op` be done to an exec in `state`, in a container whose first process is
/// in the state `init`?
pub fn exec(init: State, state: State, op: Op) -> Result<(), Refusal> {
    match (init, state, op) {
        (State::Live, State::Registered, Op::Start)
        | (_, State::Registered | State::Ended, Op::Delete)
        | (_, State::Live | State::Pausing | State::Paused, Op::Kill) => Ok(()),
        (State::Registered | State::Starting | State::Ended, State::Registered, Op::Start) => {
            Err(Refusal::InitNotRunning)
        }
        (State::Pausing | State::Paused, State::Registered, Op::Start) => Err(Refusal::Paused),
        (_, State::Ended, Op::Kill) => Err(Refusal::Finished),
        (
            _,
            State::Starting | State::Live | State::Pausing | State::Paused | State::Ended,
            Op::Start,
        )
        | (_, State::Starting | State::Live | State::Pausing | State::Paused, Op::Delete)
        | (_, State::Registered | State::Starting, Op::Kill)
        | (_, _, Op::Exec | Op::Pause | Op::Resume | Op::Update | Op::Copy) => {
            Err(Refusal::WrongState)
        }
    }
}

/// The state of a process as callers see it, in a container whose first process is in
/// the state `init`: what runs stands still with its container.
pub fn seen(init: State, state: State) -> State {
    match (init, state) {
        (State::Pausing | State::Paused, State::Live) => init,
        _ => state,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRONG: Result<(), Refusal> = Err(Refusal::WrongState);
    const GONE: Result<(), Refusal> = Err(Refusal::Finished);
    const DOWN: Result<(), Refusal> = Err(Refusal::InitNotRunning);
    const STILL: Result<(), Refusal> = Err(Refusal::Paused);
    const STATES: [State; 6] = [
        State::Registered,
        State::Starting,
        State::Live,
        State::Pausing,
        State::Paused,
        State::Ended,
    ];

    #[test]
    fn calls_on_a_container_follow_the_table_ta_03() {
        for (op, expected) in [
            (Op::Start, [Ok(()), WRONG, WRONG, WRONG, WRONG, WRONG]),
            (Op::Delete, [Ok(()), WRONG, WRONG, WRONG, WRONG, Ok(())]),
            (Op::Kill, [Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), GONE]),
            (Op::Exec, [Ok(()), Ok(()), Ok(()), STILL, STILL, DOWN]),
            (Op::Pause, [WRONG, WRONG, Ok(()), WRONG, Ok(()), DOWN]),
            (Op::Resume, [WRONG, WRONG, Ok(()), WRONG, Ok(()), DOWN]),
            (Op::Update, [Ok(()), Ok(()), Ok(()), Ok(()), Ok(()), DOWN]),
            (Op::Copy, [DOWN, DOWN, Ok(()), STILL, STILL, DOWN]),
        ] {
            assert_eq!(STATES.map(|state| init(state, op)), expected, "{op:?}");
        }
    }

    #[test]
    fn calls_on_an_exec_follow_the_table_ta_03() {
        for container in STATES {
            let start = match container {
                State::Live => Ok(()),
                State::Pausing | State::Paused => STILL,
                State::Registered | State::Starting | State::Ended => DOWN,
            };
            for (op, expected) in [
                (Op::Start, [start, WRONG, WRONG, WRONG, WRONG, WRONG]),
                (Op::Delete, [Ok(()), WRONG, WRONG, WRONG, WRONG, Ok(())]),
                (Op::Kill, [WRONG, WRONG, Ok(()), Ok(()), Ok(()), GONE]),
            ] {
                let verdicts = STATES.map(|state| exec(container, state, op));
                assert_eq!(verdicts, expected, "{container:?} {op:?}");
            }
        }
    }

    #[test]
    fn an_exec_that_runs_stands_still_with_its_container_ta_52() {
        for container in STATES {
            for state in STATES {
                let verdict = seen(container, state);
                let stands = matches!(container, State::Pausing | State::Paused);
                let expected = match state {
                    State::Live if stands => container,
                    state => state,
                };
                assert_eq!(verdict, expected, "{container:?} {state:?}");
            }
        }
    }
}
