//! The pod's network: what its namespace has when its first container starts.
//!
//! Not before: Docker and others put interfaces in only once there is a pid.

use std::os::fd::AsFd;

use bulkhead_agent_api::agent::NetworkInterface;

use super::{Arc, Container, Pod};
use crate::{
    error::{Result, host},
    guest::Guest,
    network::{Joined, Network},
};

impl Pod {
    /// Joins the network namespace of the pod with the guest, unless it is joined.
    pub(super) async fn connect(
        &self,
        guest: &Arc<dyn Guest>,
        container: &Container,
    ) -> Result<()> {
        let mut network = self.network.lock().await;
        if network.is_some() {
            return Ok(());
        }
        let namespace = match &container.network {
            Some(given) => given.as_fd(),
            None => guest.network(),
        };
        let namespace = namespace.try_clone_to_owned();
        let namespace = namespace.map_err(host("keep the network namespace"))?;
        let joining = tokio::task::spawn_blocking(move || Network::join(namespace));
        let joined = joining.await.map_err(std::io::Error::other);
        let (joined, interfaces) = joined
            .and_then(|joined| joined)
            .map_err(host("join the network namespace"))?;
        if interfaces.is_empty() {
            return Ok(());
        }
        let mut told = Vec::new();
        for Joined { link, tap } in interfaces {
            let device = guest.attach_interface(tap, link.mac, link.mtu).await?;
            told.push(NetworkInterface {
                device: device.into(),
                name: link.name,
                mtu: link.mtu.into(),
                addresses: link.addresses,
                routes: link.routes,
                neighbours: link.neighbours,
                ..NetworkInterface::default()
            });
        }
        guest.agent().set_up_network(told).await?;
        *network = Some(joined);
        Ok(())
    }

    /// Lets go of it.
    pub(super) async fn disconnect(&self) {
        let network = self.network.lock().await.take();
        // The guest has ended: nobody waits for an answer.
        let _ = tokio::task::spawn_blocking(move || drop(network)).await;
    }
}
