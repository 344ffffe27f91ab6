//! The freezer of one cgroup: its processes stand still, and what they are and hold
//! stays.

use std::{io, path::Path, time::Duration};

use tokio::time::timeout;

use super::{Cgroup, wait_until};
use crate::error::{Doing, Error};

/// How long processes may take to stand still. One that waits in the kernel, as for a
/// file server, does not before it is answered.
const FREEZE_MAX: Duration = Duration::from_secs(10);

/// A cgroup that stands still; it goes on when this is dropped.
#[derive(Debug)]
#[must_use = "dropping it lets the processes go on"]
pub(crate) struct Frozen<'a> {
    cgroup: Option<&'a Cgroup>,
}

impl Frozen<'_> {
    /// Leaves it so, until [`Cgroup::thaw`].
    pub(crate) fn keep(mut self) {
        self.cgroup = None;
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        if let Some(cgroup) = self.cgroup {
            // Whoever froze it hears of another failure already.
            let _ = cgroup.thaw();
        }
    }
}

impl Cgroup {
    /// Stops every process in it and below it; answers when they stand still.
    pub(crate) async fn freeze(&self) -> Result<Frozen<'_>, Error> {
        set(&self.path, "1").doing("freeze the container")?;
        let frozen = Frozen { cgroup: Some(self) };
        match timeout(FREEZE_MAX, wait_until(&self.path, "frozen", 1)).await {
            Ok(result) => result.doing("see the container stand still")?,
            Err(_) => return Err(Error::Restless(FREEZE_MAX)),
        }
        Ok(frozen)
    }

    /// Lets every process in it and below it go on.
    pub(crate) fn thaw(&self) -> io::Result<()> {
        set(&self.path, "0")
    }
}

fn set(cgroup: &Path, state: &str) -> io::Result<()> {
    std::fs::write(cgroup.join("cgroup.freeze"), state)
}
