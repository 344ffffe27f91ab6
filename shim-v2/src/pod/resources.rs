//! What is asked of a container that exists: to stand still, to live with other limits,
//! to tell what it has used.

use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use futures::future::join_all;
use tracing::{info, warn};

use super::{Arc, Container, Pod, check, refused};
use crate::{
    agent::{ProcessName, stats},
    error::{Error, Result},
    lock::lock,
    names::ContainerId,
    process::Process,
    state::{Op, State},
};

impl Pod {
    /// Lets every process of a container stand still; answers when they do and what
    /// they wrote is in their files.
    pub async fn pause(&self, id: &ContainerId) -> Result<()> {
        let (container, init) = self.first(id)?;
        let begun = init.pause();
        let Some(pausing) = begun.map_err(|refusal| refused(&init, Op::Pause, refusal))? else {
            return Ok(());
        };
        // What is being made would never be ready. No further one is begun, and a start
        // has limits of its own.
        let execs: Vec<Arc<Process>> = lock(&container.execs).all.values().cloned().collect();
        join_all(execs.iter().map(|exec| exec.settled())).await;
        let guest = self.living()?;
        if let Err(error) = guest.agent().freeze(id).await {
            if matches!(error, Error::Deadline { .. }) {
                // It may come to stand still after all, and its caller was told
                // otherwise.
                self.doubt.notify_one();
                let (guest, id) = (Arc::clone(guest), id.clone());
                tokio::spawn(async move { guest.agent().thaw(&id).await });
            }
            return Err(self.explained(error).await);
        }
        if pausing.confirm() {
            Ok(())
        } else {
            Err(Error::InitNotRunning(id.clone()))
        }
    }

    /// Lets them go on.
    pub async fn resume(&self, id: &ContainerId) -> Result<()> {
        let (container, init) = self.first(id)?;
        check(&container, &init, Op::Resume)?;
        if init.state() != State::Paused {
            return Ok(());
        }
        let thawed = self.living()?.agent().thaw(id).await;
        if let Err(error) = thawed {
            self.doubt_if_late(&error);
            return Err(self.explained(error).await);
        }
        init.resumed();
        Ok(())
    }

    /// Changes limits of a container; `resources` is the OCI object as JSON. The machine
    /// is made larger before, or smaller afterwards.
    pub async fn update(self: &Arc<Self>, id: &ContainerId, resources: Vec<u8>) -> Result<()> {
        let (container, init) = self.first(id)?;
        check(&container, &init, Op::Update)?;
        let guest = self.living()?;
        let before = *lock(&container.limits);
        let limits = before.updated(&resources);
        let updated = async {
            Pod::can_give(&**guest, limits, before)?;
            self.grow(guest, Some((id, limits))).await?;
            guest.agent().update(id, resources).await
        };
        let updated = updated.await;
        if updated.is_ok() {
            *lock(&container.limits) = limits;
        }
        self.shrink();
        match updated {
            Ok(notes) => {
                for note in notes {
                    warn!(container = %id, "{note}");
                }
                info!(container = %id, "it has other limits");
                Ok(())
            }
            Err(error) => {
                self.doubt_if_late(&error);
                Err(self.explained(error).await)
            }
        }
    }

    /// What a container has used. If its guest does not say so in time, or not any more,
    /// what it said last.
    pub async fn stats(&self, id: &ContainerId) -> Result<Metrics> {
        let (container, init) = self.first(id)?;
        let runs = match init.state() {
            State::Registered | State::Starting => return Ok(stats::none()),
            State::Live | State::Pausing | State::Paused => true,
            State::Ended => false,
        };
        if runs && let Ok(guest) = self.living() {
            match guest.agent().stats(id).await {
                Ok(now) => container.has_used(now),
                Err(error) => {
                    self.doubt_if_late(&error);
                    info!(container = %id, error = error.text(), "what it uses is not known");
                }
            }
        }
        Ok(lock(&container.used).clone().unwrap_or_else(stats::none))
    }

    pub(super) fn first(&self, id: &ContainerId) -> Result<(Arc<Container>, Arc<Process>)> {
        self.find(&ProcessName {
            container: id.clone(),
            exec: None,
        })
    }

    /// Whoever was kept waiting in vain has the agent looked at.
    pub(super) fn doubt_if_late(&self, error: &Error) {
        if matches!(error, Error::Deadline { .. }) {
            self.doubt.notify_one();
        }
    }
}

impl Container {
    /// Remembers what it has used by now.
    pub(super) fn has_used(&self, now: Metrics) {
        let mut used = lock(&self.used);
        let now = match used.as_ref() {
            Some(before) => stats::after(before, now),
            None => now,
        };
        *used = Some(now);
    }
}
