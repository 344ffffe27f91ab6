//! What is legal when: the states of a process and the calls upon it.
//!
//! ```text
//!              start             started           exit
//!  Registered ──────► Starting ─────────► Live ─────────► Ended ──► (deleted)
//!     │  ▲                │                                  ▲
//!     │  └── failed ──────┤ (an exec: has ended)             │
//!     └───── kill, exit ──┴──────────────────────────────────┘
//! ```
//!
//! Pure: no IO, no lock. Every pair is listed; the tests hold the table of
//! containerd's task API against it. Who meets `Starting` has waited for its end
//! already if the call may wait (Delete, and Kill of an exec).

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
    /// It has ended.
    Ended,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Registered => "created",
            State::Starting => "being started",
            State::Live => "running",
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
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Op::Start => "start",
            Op::Delete => "delete",
            Op::Kill => "kill",
            Op::Exec => "execute in",
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
}

/// May `op` be done to the first process of a container in `state`?
pub fn init(state: State, op: Op) -> Result<(), Refusal> {
    match (state, op) {
        (State::Registered, Op::Start | Op::Delete | Op::Kill | Op::Exec)
        | (State::Starting | State::Live, Op::Kill | Op::Exec)
        | (State::Ended, Op::Delete) => Ok(()),
        (State::Starting | State::Live | State::Ended, Op::Start)
        | (State::Starting | State::Live, Op::Delete) => Err(Refusal::WrongState),
        (State::Ended, Op::Kill) => Err(Refusal::Finished),
        (State::Ended, Op::Exec) => Err(Refusal::InitNotRunning),
    }
}

/// May `op` be done to an exec in `state`, in a container whose first process is
/// in the state `init`?
pub fn exec(init: State, state: State, op: Op) -> Result<(), Refusal> {
    match (init, state, op) {
        (State::Live, State::Registered, Op::Start)
        | (_, State::Registered | State::Ended, Op::Delete)
        | (_, State::Live, Op::Kill) => Ok(()),
        (State::Registered | State::Starting | State::Ended, State::Registered, Op::Start) => {
            Err(Refusal::InitNotRunning)
        }
        (_, State::Ended, Op::Kill) => Err(Refusal::Finished),
        (_, State::Starting | State::Live | State::Ended, Op::Start)
        | (_, State::Starting | State::Live, Op::Delete)
        | (_, State::Registered | State::Starting, Op::Kill)
        | (_, _, Op::Exec) => Err(Refusal::WrongState),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRONG: Result<(), Refusal> = Err(Refusal::WrongState);
    const GONE: Result<(), Refusal> = Err(Refusal::Finished);
    const DOWN: Result<(), Refusal> = Err(Refusal::InitNotRunning);
    const STATES: [State; 4] = [
        State::Registered,
        State::Starting,
        State::Live,
        State::Ended,
    ];

    #[test]
    fn calls_on_a_container_follow_the_table_ta_03() {
        for (op, expected) in [
            (Op::Start, [Ok(()), WRONG, WRONG, WRONG]),
            (Op::Delete, [Ok(()), WRONG, WRONG, Ok(())]),
            (Op::Kill, [Ok(()), Ok(()), Ok(()), GONE]),
            (Op::Exec, [Ok(()), Ok(()), Ok(()), DOWN]),
        ] {
            assert_eq!(STATES.map(|state| init(state, op)), expected, "{op:?}");
        }
    }

    #[test]
    fn calls_on_an_exec_follow_the_table_ta_03() {
        for container in STATES {
            let start = if container == State::Live {
                Ok(())
            } else {
                DOWN
            };
            for (op, expected) in [
                (Op::Start, [start, WRONG, WRONG, WRONG]),
                (Op::Delete, [Ok(()), WRONG, WRONG, Ok(())]),
                (Op::Kill, [WRONG, WRONG, Ok(()), GONE]),
            ] {
                let verdicts = STATES.map(|state| exec(container, state, op));
                assert_eq!(verdicts, expected, "{container:?} {op:?}");
            }
        }
    }
}
