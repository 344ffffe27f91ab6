//! The states of a container and what is legal in each.

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its first process waits for the start.
    Created,
    /// Its first process runs.
    Running,
    /// Its first process has ended.
    Stopped,
}

/// What can be asked of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Op {
    /// Let the first process go.
    Start,
    /// Run a further process.
    Exec,
    /// Remove the container.
    Delete,
}

impl State {
    /// Whether `op` is legal.
    pub fn allows(self, op: Op) -> bool {
        match (self, op) {
            (Self::Created, Op::Start)
            | (Self::Running, Op::Exec)
            | (Self::Stopped, Op::Delete) => true,
            (Self::Created, Op::Exec | Op::Delete)
            | (Self::Running, Op::Start | Op::Delete)
            | (Self::Stopped, Op::Start | Op::Exec) => false,
        }
    }
}
