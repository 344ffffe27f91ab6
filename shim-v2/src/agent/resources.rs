//! Calls of the agent about what a container may use and has used.

use std::time::Duration;

use bulkhead_agent_api::agent::{ContainerRequest, UpdateRequest};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;

use super::{Agent, answer, escape, stats};
use crate::{error::Result, names::ContainerId};

/// Limit for statistics: whoever asks has patience for two seconds.
const STATS: Duration = Duration::from_secs(1);
/// Limit for a container to stand still with its files written back; the agent's own
/// limits are shorter.
const FREEZE: Duration = Duration::from_secs(30);
/// Most notes that are taken from the guest.
const NOTES: usize = 32;

impl Agent {
    /// What a container has used.
    pub async fn stats(&self, container: &ContainerId) -> Result<Metrics> {
        let request = of(container);
        let call = self.client.stats(ttrpc::context::with_timeout(0), &request);
        let said = answer("Stats", STATS, "Stats failed", call).await?;
        Ok(stats::of(&said))
    }

    /// Changes limits of a container; `resources` is the OCI object. Answers what was
    /// left out, one sentence each.
    pub async fn update(&self, container: &ContainerId, resources: Vec<u8>) -> Result<Vec<String>> {
        let request = UpdateRequest {
            container_id: container.to_string(),
            resources,
            ..UpdateRequest::default()
        };
        let call = self
            .client
            .update(ttrpc::context::with_timeout(0), &request);
        let failed = "OCI runtime update failed";
        let response = answer("Update", self.limits.request, failed, call).await?;
        let notes = response.notes.iter().take(NOTES);
        Ok(notes.map(|note| escape(note)).collect())
    }

    /// Stops every process of a container where it is.
    pub async fn freeze(&self, container: &ContainerId) -> Result<()> {
        let request = of(container);
        let call = self
            .client
            .freeze(ttrpc::context::with_timeout(0), &request);
        answer("Freeze", FREEZE, "OCI runtime pause failed", call).await?;
        Ok(())
    }

    /// Lets them go on.
    pub async fn thaw(&self, container: &ContainerId) -> Result<()> {
        let request = of(container);
        let call = self.client.thaw(ttrpc::context::with_timeout(0), &request);
        let failed = "OCI runtime resume failed";
        answer("Thaw", self.limits.request, failed, call).await?;
        Ok(())
    }
}

fn of(container: &ContainerId) -> ContainerRequest {
    ContainerRequest {
        container_id: container.to_string(),
        ..ContainerRequest::default()
    }
}
