//! The last of a pod, and of a container on the host.

use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::timeout;
use tracing::warn;

use super::{Container, DIE, FLUSH, KILLED, Pod, Slot};
use crate::{
    guest,
    hooks::{Hooks, Moment},
    io::Patience,
    lock::lock,
    names::ContainerId,
    process::Exit,
};

impl Pod {
    /// Ends the pod: VM, containers, events, state directory. Whoever calls it
    /// again waits for the same end.
    pub async fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.stopped.get_or_init(|| self.end()).await;
    }

    async fn end(&self) {
        let creating: Vec<ContainerId> = lock(&self.slots)
            .iter()
            .filter(|(_, slot)| matches!(slot, Slot::Creating(_)))
            .map(|(id, _)| id.clone())
            .collect();
        for id in creating {
            self.cancel_create(&id).await;
        }
        if let Some(guest) = self.guest.get() {
            if self.is_empty() {
                // Every container was deleted, so the guest holds nothing of value.
                guest.kill();
            } else {
                guest::stop(&**guest).await;
            }
            if timeout(DIE, guest.ended()).await.is_err() {
                warn!("the VMM does not end");
            }
        }
        self.disconnect().await;
        for container in self.containers() {
            // The end of the VM ends every process that was started in it.
            if timeout(DIE, container.init.exit()).await.is_err() {
                self.conclude(&container, Exit::now(KILLED), Duration::ZERO)
                    .await;
            }
            container.init.close_streams(Patience::SHORT).await;
            container.remove_from_host().await;
        }
        self.events.flush(FLUSH).await;
        if let Some(guest) = self.guest.get() {
            // Its directory is the last that tells of a pod.
            let _ = timeout(DIE, guest.gone()).await;
        }
        let slots = std::mem::take(&mut *lock(&self.slots));
        let (share, dir) = (Arc::clone(&self.share), Arc::clone(&self.dir));
        let removed = tokio::task::spawn_blocking(move || {
            drop(slots);
            share.unmount();
            dir.remove()
        });
        match removed.await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!(%error, "cannot remove the state directory"),
            Err(error) => warn!(%error, "cannot remove the state directory"),
        }
    }
}

impl Container {
    /// Takes down what the host has of it. Whoever comes second finds nothing to do.
    pub(super) async fn remove_from_host(&self) {
        let Some(files) = lock(&self.files).take() else {
            return;
        };
        self.sockets.end().await;
        let _ = tokio::task::spawn_blocking(move || drop(files)).await;
        run_last(&self.hooks).await;
        lock(&self.told).take();
    }
}

/// Runs the hooks that come last: what they fail at is nobody's fault by now.
pub(super) async fn run_last(hooks: &Hooks) {
    if let Err(error) = hooks.run(Moment::Poststop, 0).await {
        warn!(container = %hooks.id, error = error.text(), "after its end");
    }
}
