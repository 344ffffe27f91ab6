//! The pod's network: what its namespace has when its first container starts.
//!
//! Not before: Docker and others put interfaces in only once there is a pid.

use std::{io, os::fd::AsFd};

use bulkhead_agent_api::agent::NetworkInterface;
use serde::{Deserialize, Serialize};
use tokio::task::spawn_blocking;

use super::{Arc, Container, Pod};
use crate::{
    carry::{Bag, CarriedFd},
    error::{Result, host},
    guest::{Attached, Guest},
    network::{Joined, Network, Redirected},
};

/// A network namespace whose interfaces the guest has.
#[derive(Debug)]
pub(super) struct Connected {
    network: Network,
    interfaces: Vec<Attached>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    namespace: CarriedFd,
    redirected: Vec<Redirected>,
    interfaces: Vec<u8>,
}

impl Connected {
    /// Gives the guest these interfaces.
    async fn hand_over(&mut self, guest: &Arc<dyn Guest>, interfaces: Vec<Joined>) -> Result<()> {
        let mut told = Vec::new();
        for Joined { link, tap } in interfaces {
            let device = guest.attach_interface(tap, link.mac, link.mtu).await?;
            self.interfaces.push(Attached::new(device, guest));
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
        guest.agent().set_up_network(told).await
    }

    /// Takes them away, and lets go of the namespace.
    async fn undo(self) {
        for interface in self.interfaces {
            interface.detach().await;
        }
        // Should it fail it has said so.
        let _ = spawn_blocking(move || drop(self.network)).await;
    }

    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let (namespace, redirected) = self.network.parts();
        Ok(Carried {
            namespace: bag.put(namespace)?,
            redirected: redirected.to_vec(),
            interfaces: self.interfaces.iter().map(Attached::device).collect(),
        })
    }

    pub(super) fn unpack(carried: Carried, guest: &Arc<dyn Guest>) -> Result<Self> {
        let namespace = carried.namespace.take();
        let namespace = namespace.map_err(host("take over a network namespace"))?;
        let interfaces = carried.interfaces.into_iter();
        Ok(Connected {
            network: Network::new(namespace, carried.redirected),
            interfaces: interfaces
                .map(|device| Attached::new(device, guest))
                .collect(),
        })
    }
}

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
        let joining = spawn_blocking(move || Network::join(namespace)).await;
        let (joined, interfaces) = joining
            .map_err(io::Error::other)
            .and_then(|joined| joined)
            .map_err(host("join the network namespace"))?;
        if interfaces.is_empty() {
            return Ok(());
        }
        let mut connected = Connected {
            network: joined,
            interfaces: Vec::new(),
        };
        if let Err(error) = connected.hand_over(guest, interfaces).await {
            connected.undo().await;
            return Err(error);
        }
        *network = Some(connected);
        Ok(())
    }

    /// Lets go of it.
    pub(super) async fn disconnect(&self) {
        if let Some(connected) = self.network.lock().await.take() {
            connected.undo().await;
        }
    }
}
