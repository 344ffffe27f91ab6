//! A request that makes something in the guest.
//!
//! A caller may lose patience, but the guest goes on making what it was asked for.
//! So the request runs in a task of its own, and whoever does not want its outcome
//! any more says [`Making::undo`], which waits for the answer, however late, and has
//! the guest take back what it made.

use std::{sync::Arc, time::Duration};

use tokio::{task::JoinHandle, time::timeout};
use tracing::{info, warn};
use ttrpc::Code;

use super::{DIE, Pod, SIGKILL};
use crate::{
    agent::ProcessName,
    error::{Error, Result},
    guest::Guest,
};

impl Pod {
    /// Has the guest take back what nobody wants any more.
    pub(super) fn undo(&self, making: Making) -> JoinHandle<()> {
        let work = self.work();
        tokio::spawn(async move {
            making.undo().await;
            drop(work);
        })
    }
}

/// The request.
#[derive(Debug)]
pub(super) struct Making {
    guest: Arc<dyn Guest>,
    name: ProcessName,
    task: JoinHandle<Result<()>>,
    /// What came of it, once it is known.
    made: Option<bool>,
}

impl Making {
    /// Sends the request for the process `name`.
    pub(super) fn begin(
        guest: &Arc<dyn Guest>,
        name: ProcessName,
        request: impl Future<Output = Result<()>> + Send + 'static,
    ) -> Self {
        Making {
            guest: Arc::clone(guest),
            name,
            task: tokio::spawn(request),
            made: None,
        }
    }

    /// Waits for the answer, at most `limit`.
    pub(super) async fn answer(&mut self, call: &'static str, limit: Duration) -> Result<()> {
        let Ok(answer) = timeout(limit, &mut self.task).await else {
            return Err(Error::Deadline {
                call,
                limit_ms: limit.as_millis(),
            });
        };
        let answer = answer.unwrap_or(Err(Error::Panicked(call)));
        self.made = Some(answer.is_ok());
        answer
    }

    /// Waits for the answer without a limit, the end of the guest being one, and
    /// takes back what was made.
    pub(super) async fn undo(self) {
        let made = match self.made {
            Some(made) => made,
            None => matches!(self.task.await, Ok(Ok(()))),
        };
        if !made {
            return;
        }
        info!(process = %self.name, "nobody wants it any more");
        let agent = self.guest.agent();
        // It may have ended already; Delete tells whether it is gone.
        let _ = agent.kill(&self.name, SIGKILL, false).await;
        let _ = timeout(DIE, agent.wait(&self.name)).await;
        match agent.delete(&self.name).await {
            Err(error) if error.code() != Code::NOT_FOUND => {
                warn!(process = %self.name, error = error.text(), "the guest does not take it back");
            }
            _ => {}
        }
    }
}
