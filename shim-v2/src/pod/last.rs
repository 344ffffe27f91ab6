//! The last of a container on the host.

use tracing::warn;

use super::Container;
use crate::{
    hooks::{Hooks, Moment},
    lock::lock,
};

impl Container {
    /// Takes down what the host has of it. Whoever comes second finds nothing to do.
    pub(super) async fn remove_from_host(&self) {
        let Some(files) = lock(&self.files).take() else {
            return;
        };
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
