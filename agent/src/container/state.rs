//! The states of a container and what is legal in each.

/// Where a container is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its first process waits for the start.
    Created,
    /// Its first process runs.
    Running,
    /// Its processes stand still.
    Paused,
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
    /// Stop its processes where they are.
    Freeze,
    /// Let them go on.
    Thaw,
    /// Change its limits.
    Update,
    /// Copy files in or out.
    Copy,
}

impl State {
    /// Whether `op` is legal.
    pub fn allows(self, op: Op) -> bool {
        match (self, op) {
            (Self::Created, Op::Start | Op::Update)
            | (Self::Running, Op::Exec | Op::Freeze | Op::Thaw | Op::Update | Op::Copy)
            | (Self::Paused, Op::Freeze | Op::Thaw | Op::Update)
            | (Self::Stopped, Op::Delete) => true,
            (Self::Created, Op::Exec | Op::Delete | Op::Freeze | Op::Thaw | Op::Copy)
            | (Self::Running, Op::Start | Op::Delete)
            | (Self::Paused, Op::Start | Op::Exec | Op::Delete | Op::Copy)
            | (
                Self::Stopped,
                Op::Start | Op::Exec | Op::Freeze | Op::Thaw | Op::Update | Op::Copy,
            ) => false,
        }
    }
}
