//! The machine follows its containers: it grows before one gets more, and shrinks once
//! they need less.

use bulkhead_agent_api::spec::capacity::Capacity;
use tracing::warn;

use super::{Arc, Pod, Slot};
use crate::{
    error::{Error, Result},
    guest::Guest,
    lock::lock,
    names::ContainerId,
    spec::Limits,
    vm::{self, Shape, Size},
};

impl Pod {
    /// How a machine begins whose first container has these limits.
    pub(super) fn shape(&self, limits: Limits, pod: vm::Pod, places: u8) -> Shape {
        let (config, host) = (self.settings.get(), Size::of_this_host());
        Shape::new(Size::of([limits], config, host), config, host, pod, places)
    }

    /// Makes the machine large enough for all containers, those that are being created
    /// and one that will have these limits among them.
    pub(super) async fn grow(
        &self,
        guest: &Arc<dyn Guest>,
        other: Option<(&ContainerId, Limits)>,
    ) -> Result<()> {
        let _one_at_a_time = self.sizing.lock().await;
        let now = guest.size().await;
        let wanted = self.needed(other).or(now);
        if wanted == now {
            return Ok(());
        }
        let size = guest.resize(wanted).await?;
        if size != wanted {
            warn!(
                ?wanted,
                ?size,
                "the machine is smaller than its containers need"
            );
        }
        Ok(())
    }

    /// Refuses limits, other than those before, that the machine can never give.
    pub(super) fn can_give(guest: &dyn Guest, limits: Limits, before: Limits) -> Result<()> {
        let most = guest.most();
        let most = Capacity {
            memory: u64::from(most.memory_mib) << 20,
            processors: most.vcpus.into(),
        };
        let (now, then) = (limits.thousandths(), before.thousandths());
        let memory = limits.memory.filter(|_| limits.memory != before.memory);
        let given = most.can_give(memory, now.filter(|_| now != then));
        given.map_err(Error::Beyond)
    }

    /// Makes it no larger than needed, beside everything else: what the guest cannot
    /// spare it keeps, and to find that out takes its time.
    pub(super) fn shrink(self: &Arc<Self>) {
        let Ok(guest) = self.living().map(Arc::clone) else {
            return;
        };
        let (pod, work) = (Arc::clone(self), self.work());
        tokio::spawn(async move {
            let _one_at_a_time = pod.sizing.lock().await;
            // Of what ends nothing is needed any more.
            if !pod.is_empty()
                && let Err(error) = guest.resize(pod.needed(None)).await
            {
                pod.doubt_if_late(&error);
                warn!(error = error.text(), "the machine stays as large as it is");
            }
            drop(work);
        });
    }

    fn needed(&self, other: Option<(&ContainerId, Limits)>) -> Size {
        let limits: Vec<Limits> = lock(&self.slots)
            .iter()
            .filter_map(|(id, slot)| match (other, slot) {
                (Some((other, limits)), _) if other == id => Some(limits),
                (_, Slot::Creating(creation)) => creation.limits.get().copied(),
                (_, Slot::Ready(container)) => Some(*lock(&container.limits)),
            })
            .collect();
        Size::of(limits, self.settings.get(), Size::of_this_host())
    }
}
