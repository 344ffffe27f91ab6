//! What is legal when: the states of a process and the calls upon it.
//!
//! ```text
//!            start            exit
//!  Created ────────► Running ──────► Stopped ──► (deleted)
//!     │                                 ▲
//!     └───────── kill, exit ────────────┘
//! ```
//!
//! Pure: no IO, no lock. Every pair is listed; the tests hold the table of
//! containerd's task API against it.

/// State of a process, the first one of a container or an exec.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It exists (an exec: is registered) and waits for start.
    Created,
    /// Its program runs.
    Running,
    /// It has ended.
    Stopped,
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
        (State::Created, Op::Start | Op::Delete | Op::Kill | Op::Exec)
        | (State::Running, Op::Kill | Op::Exec)
        | (State::Stopped, Op::Delete) => Ok(()),
        (State::Running | State::Stopped, Op::Start) | (State::Running, Op::Delete) => {
            Err(Refusal::WrongState)
        }
        (State::Stopped, Op::Kill) => Err(Refusal::Finished),
        (State::Stopped, Op::Exec) => Err(Refusal::InitNotRunning),
    }
}

/// May `op` be done to an exec in `state`, in a container whose first process is
/// in the state `init`?
pub fn exec(init: State, state: State, op: Op) -> Result<(), Refusal> {
    match (init, state, op) {
        (State::Running, State::Created, Op::Start)
        | (_, State::Created | State::Stopped, Op::Delete)
        | (_, State::Running, Op::Kill) => Ok(()),
        (State::Created | State::Stopped, State::Created, Op::Start) => {
            Err(Refusal::InitNotRunning)
        }
        (_, State::Stopped, Op::Kill) => Err(Refusal::Finished),
        (_, State::Running | State::Stopped, Op::Start)
        | (_, State::Running, Op::Delete)
        | (_, State::Created, Op::Kill)
        | (_, _, Op::Exec) => Err(Refusal::WrongState),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRONG: Result<(), Refusal> = Err(Refusal::WrongState);
    const GONE: Result<(), Refusal> = Err(Refusal::Finished);
    const DOWN: Result<(), Refusal> = Err(Refusal::InitNotRunning);

    #[test]
    fn calls_on_a_container_follow_the_table_ta_03() {
        for (op, created, running, stopped) in [
            (Op::Start, Ok(()), WRONG, WRONG),
            (Op::Delete, Ok(()), WRONG, Ok(())),
            (Op::Kill, Ok(()), Ok(()), GONE),
            (Op::Exec, Ok(()), Ok(()), DOWN),
        ] {
            assert_eq!(init(State::Created, op), created, "{op:?} created");
            assert_eq!(init(State::Running, op), running, "{op:?} running");
            assert_eq!(init(State::Stopped, op), stopped, "{op:?} stopped");
        }
    }

    #[test]
    fn calls_on_an_exec_follow_the_table_ta_03() {
        for (container, op, created, running, stopped) in [
            (State::Created, Op::Start, DOWN, WRONG, WRONG),
            (State::Running, Op::Start, Ok(()), WRONG, WRONG),
            (State::Stopped, Op::Start, DOWN, WRONG, WRONG),
            (State::Running, Op::Delete, Ok(()), WRONG, Ok(())),
            (State::Stopped, Op::Delete, Ok(()), WRONG, Ok(())),
            (State::Running, Op::Kill, WRONG, Ok(()), GONE),
            (State::Stopped, Op::Kill, WRONG, Ok(()), GONE),
        ] {
            assert_eq!(
                exec(container, State::Created, op),
                created,
                "{container:?} {op:?} created"
            );
            assert_eq!(
                exec(container, State::Running, op),
                running,
                "{container:?} {op:?} running"
            );
            assert_eq!(
                exec(container, State::Stopped, op),
                stopped,
                "{container:?} {op:?} stopped"
            );
        }
    }
}
