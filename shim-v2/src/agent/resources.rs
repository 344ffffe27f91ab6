//! Calls of the agent about what a container may use and has used.

use std::time::Duration;

use bulkhead_agent_api::agent::{
    ContainerRequest, DialRequest, NamesRequest, NetworkRequest, ResizeRequest, UpdateRequest,
};
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

    /// Has the guest use so many processors, and so much memory in MiB beyond what it
    /// began with, which comes by this device. Answers what it says that it
    /// uses then.
    pub async fn resize_machine(
        &self,
        vcpus: u8,
        more_mib: u32,
        device: Option<u8>,
    ) -> Result<(u8, u32)> {
        let request = ResizeRequest {
            processors: vcpus.into(),
            more_memory_bytes: u64::from(more_mib) << 20,
            memory_device: device.unwrap_or_default().into(),
            ..ResizeRequest::default()
        };
        let call = self
            .client
            .resize(ttrpc::context::with_timeout(0), &request);
        let failed = "the guest does not take another size";
        let size = answer("Resize", self.limits.request, failed, call).await?;
        Ok((
            u8::try_from(size.processors).unwrap_or(u8::MAX),
            u32::try_from(size.more_memory_bytes >> 20).unwrap_or(u32::MAX),
        ))
    }

    /// Has the guest's network be this.
    pub async fn set_up_network(&self, network: &NetworkRequest) -> Result<()> {
        let call = self
            .client
            .set_up_network(ttrpc::context::with_timeout(0), network);
        let failed = "the guest does not set up its network";
        answer("SetUpNetwork", self.limits.request, failed, call).await?;
        Ok(())
    }

    /// Connects to what listens on this port of the guest's own loopback address; the
    /// stream with this id carries the connection on.
    pub async fn dial(&self, stream: u64, port: u16) -> Result<()> {
        let request = DialRequest {
            stream,
            port: port.into(),
            ..DialRequest::default()
        };
        let call = self.client.dial(ttrpc::context::with_timeout(0), &request);
        answer("Dial", self.limits.request, "nobody listens there", call).await?;
        Ok(())
    }

    /// Has it ask the host, by the stream with this id, what it is asked at 127.0.0.11.
    pub async fn names(&self, stream: u64) -> Result<()> {
        let request = NamesRequest {
            stream,
            ..NamesRequest::default()
        };
        let call = self.client.names(ttrpc::context::with_timeout(0), &request);
        let failed = "the guest does not ask for names";
        answer("Names", self.limits.request, failed, call).await?;
        Ok(())
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
