//! The pod's network: what its namespace has when its first container starts, and what
//! becomes of it.
//!
//! Not before: Docker and others put interfaces in only once there is a pid.

use std::{collections::BTreeMap, convert::Infallible, io, os::fd::AsFd, time::Duration};

use bulkhead_agent_api::agent::{NetworkInterface, NetworkRequest};
use serde::{Deserialize, Serialize};
use tokio::{task::spawn_blocking, time::sleep};
use tracing::warn;

use super::{Arc, Container, Pod};
use crate::{
    carry::{Bag, CarriedFd},
    error::{Error, Result, host},
    forward::{Served, serve},
    guest::{Attached, Guest},
    network::{Asked, Link, Names, Network, Redirected, Watch, is_the_hosts},
};

/// Changes come in numbers: after the first of them so long is waited for others.
const SETTLES: Duration = Duration::from_millis(20);

/// A network namespace whose interfaces the guest has.
#[derive(Debug)]
pub(super) struct Connected {
    network: Network,
    /// By their numbers in the namespace.
    interfaces: BTreeMap<u32, Attached>,
    /// What the guest has been told, if that is known.
    told: Option<NetworkRequest>,
    /// Connections to the namespace's loopback addresses.
    loopback: Option<Served>,
    /// Questions to a name server in the namespace.
    names: Option<Asked>,
}

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Carried {
    namespace: CarriedFd,
    redirected: Vec<Redirected>,
    /// A shim that knew no filter let everything pass.
    #[serde(default = "Carried::before_there_was_a_filter")]
    trusted: bool,
    interfaces: BTreeMap<u32, u8>,
}

impl Carried {
    fn before_there_was_a_filter() -> bool {
        true
    }
}

/// What came of a look.
#[derive(Debug, Default)]
struct Looked {
    /// Tells of changes; the first time only.
    watch: Option<Watch>,
    /// Why interfaces cannot be joined.
    refused: Vec<Error>,
}

impl Connected {
    fn new(network: Network) -> Self {
        Connected {
            network,
            interfaces: BTreeMap::new(),
            told: Some(NetworkRequest::default()),
            loopback: None,
            names: None,
        }
    }

    /// Has the guest have what there is now.
    async fn follow(&mut self, guest: &Arc<dyn Guest>) -> Result<Looked> {
        let doing = "join the network namespace";
        let seen = self.network.look().await.map_err(host(doing))?;
        let mut looked = Looked {
            watch: seen.watch,
            refused: seen.refused.into_iter().map(|it| host(doing)(it)).collect(),
        };
        match seen.loopback.map(|it| it.and_then(|it| serve(guest, it))) {
            Some(Ok(served)) => self.loopback = Some(served),
            Some(Err(error)) => warn!(%error, "connections to the pod's 127.0.0.1 are refused"),
            None => {}
        }
        if let Some(names) = seen.names {
            match ask_by_us(guest, names).await {
                Ok(asked) => self.names = Some(asked),
                Err(error) => {
                    let error = error.text();
                    warn!(error, "names of other containers are not known in the pod");
                }
            }
        }
        let links: BTreeMap<u32, &Link> = seen.links.iter().map(|it| (it.index, it)).collect();
        for (index, tap) in seen.taps {
            let Some(link) = links.get(&index) else {
                continue;
            };
            match guest.attach_interface(tap, link.mac, link.mtu).await {
                Ok(device) => {
                    self.interfaces.insert(index, Attached::new(device, guest));
                }
                Err(error) => {
                    self.network.let_go(index).await;
                    looked.refused.push(error);
                }
            }
        }
        let gone = self
            .interfaces
            .extract_if(.., |index, _| !links.contains_key(index));
        let gone: Vec<(u32, Attached)> = gone.collect();
        let joined = self.interfaces.iter().filter_map(|(index, attached)| {
            let link = links.get(index)?;
            Some(message(link, attached.device()))
        });
        let request = NetworkRequest {
            interfaces: joined.collect(),
            rules: seen.rules,
            ..NetworkRequest::default()
        };
        if self.told.as_ref() != Some(&request) {
            // If this fails nobody knows what it has.
            self.told = None;
            guest.agent().set_up_network(&request).await?;
            self.told = Some(request);
        }
        // The guest has let go of them.
        for (_, interface) in gone {
            interface.detach().await;
        }
        Ok(looked)
    }

    /// Takes all interfaces away, and lets go of the namespace.
    async fn undo(self) {
        for interface in self.interfaces.into_values() {
            interface.detach().await;
        }
        // Should it fail it has said so.
        let _ = spawn_blocking(move || drop(self.network)).await;
    }

    pub(super) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let (namespace, redirected, trusted) = self.network.parts();
        let interfaces = self.interfaces.iter();
        Ok(Carried {
            namespace: bag.put(namespace)?,
            redirected: redirected.to_vec(),
            trusted,
            interfaces: interfaces
                .map(|(index, attached)| (*index, attached.device()))
                .collect(),
        })
    }

    pub(super) fn unpack(carried: Carried, guest: &Arc<dyn Guest>) -> Result<Self> {
        let namespace = carried.namespace.take();
        let namespace = namespace.map_err(host("take over a network namespace"))?;
        let interfaces = carried.interfaces.into_iter();
        Ok(Connected {
            network: Network::unpack(namespace, carried.redirected, carried.trusted),
            interfaces: interfaces
                .map(|(index, device)| (index, Attached::new(device, guest)))
                .collect(),
            told: None,
            loopback: None,
            names: None,
        })
    }
}

/// Has the guest ask a name server of the namespace.
async fn ask_by_us(guest: &Arc<dyn Guest>, names: Names) -> Result<Asked> {
    let _room = guest.dialer().reserve(1).await;
    let (id, stream) = guest.dialer().stream().await?;
    guest.agent().names(id).await?;
    let served = stream.into_std().and_then(|stream| names.serve(stream));
    served.map_err(host("serve names"))
}

fn message(link: &Link, device: u8) -> NetworkInterface {
    let link = link.clone();
    NetworkInterface {
        device: device.into(),
        name: link.name,
        mac: link.mac.to_vec(),
        mtu: link.mtu.into(),
        down: link.down,
        addresses: link.addresses,
        routes: link.routes,
        neighbours: link.neighbours,
        ..NetworkInterface::default()
    }
}

impl Pod {
    /// Joins the network namespace of the pod with the guest, unless it is joined, and
    /// follows it from then on.
    pub(super) async fn connect(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        container: &Container,
    ) -> Result<()> {
        let mut network = self.network.lock().await;
        let trusted = container.sends_as_others || !self.settings.get().spoof_filter;
        if let Some(connected) = &mut *network {
            if trusted && connected.network.trust() {
                connected.follow(guest).await?;
            }
            return Ok(());
        }
        let namespace = match &container.network {
            Some(given) => given.as_fd(),
            None => guest.network(),
        };
        if is_the_hosts(namespace).map_err(host("look at the network namespace"))? {
            return Ok(());
        }
        let namespace = namespace.try_clone_to_owned();
        let namespace = namespace.map_err(host("keep the network namespace"))?;
        let mut connected = Connected::new(Network::new(namespace, trusted));
        let looked = connected.follow(guest).await;
        let refused = |mut looked: Looked| match looked.refused.pop() {
            Some(error) => Err(error),
            None => Ok(looked.watch),
        };
        match looked.and_then(refused) {
            Ok(watch) => {
                *network = Some(connected);
                if let Some(watch) = watch {
                    self.follow(guest, watch);
                }
                Ok(())
            }
            Err(error) => {
                connected.undo().await;
                Err(error)
            }
        }
    }

    /// Follows a network namespace that the program before this one has joined.
    pub(super) fn follow_again(self: &Arc<Self>, guest: &Arc<dyn Guest>) {
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        tokio::spawn(async move {
            if let Some(watch) = pod.look_again(&guest).await {
                pod.follow(&guest, watch);
            }
        });
    }

    fn follow(self: &Arc<Self>, guest: &Arc<dyn Guest>, watch: Watch) {
        let (pod, guest) = (Arc::clone(self), Arc::clone(guest));
        tokio::spawn(async move {
            let followed = async {
                let mut changes = watch.listen()?;
                loop {
                    changes.next().await?;
                    sleep(SETTLES).await;
                    pod.look_again(&guest).await;
                }
            };
            tokio::select! {
                Err::<Infallible, io::Error>(error) = followed => {
                    warn!(%error, "the network namespace is not followed any more");
                }
                _ = guest.ended() => {}
            }
        });
    }

    /// Has the guest have what there is by now.
    async fn look_again(&self, guest: &Arc<dyn Guest>) -> Option<Watch> {
        let mut network = self.network.lock().await;
        let looked = network.as_mut()?.follow(guest).await;
        let looked = looked.unwrap_or_else(|error| {
            self.doubt_if_late(&error);
            Looked {
                refused: vec![error],
                ..Looked::default()
            }
        });
        for error in &looked.refused {
            warn!(
                error = error.text(),
                "the guest's network is not that of its namespace"
            );
        }
        looked.watch
    }

    /// Lets go of it.
    pub(super) async fn disconnect(&self) {
        if let Some(connected) = self.network.lock().await.take() {
            connected.undo().await;
        }
    }
}
