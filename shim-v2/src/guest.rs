//! What a pod needs of whatever runs its guest.
//!
//! The seam between the life cycle and the virtual machine: [`Pod`](crate::pod::Pod)
//! knows these two traits and nothing of KVM. The product's side is
//! [`vm`](crate::vm); the tests put the agent's service into their own process.

use std::{fmt::Debug, fs::File, io, os::fd::BorrowedFd, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::time::timeout;
use tracing::warn;

use crate::{
    agent::Agent,
    carry::Bag,
    cgroup::Place,
    error::Result,
    io::Dialer,
    statedir::HostProcess,
    vm::{Carried, Shape, Size, holder::Holder, vmm::End},
};

/// Time for the guest's end to be seen after its agent said farewell.
const PARTING: Duration = Duration::from_millis(500);

/// Starts guests.
#[async_trait]
pub trait Boots: Debug + Send + Sync {
    /// Boots a guest and waits for its agent. Giving up the future ends what was
    /// begun. Without a place for the cgroup it gets one of its own choice.
    async fn boot(
        &self,
        shape: Shape,
        oom_score_adj: i32,
        cgroup: Option<Place>,
    ) -> Result<Arc<dyn Guest>>;

    /// Goes on with the guest of the program before this one.
    fn unpack(&self, carried: Carried) -> Result<Arc<dyn Guest>>;
}

/// A running guest. Dropping it kills it.
#[async_trait]
pub trait Guest: Debug + Send + Sync {
    /// The agent.
    fn agent(&self) -> &Agent;

    /// Connects streams.
    fn dialer(&self) -> &Dialer;

    /// The process of the host that runs it.
    fn process(&self) -> HostProcess;

    /// Gives it a disk, which its kernel does not look at before it is told to. Answers
    /// the number of the device.
    async fn attach(&self, disk: File, read_only: bool) -> Result<u8>;

    /// Takes the device with this number away.
    async fn detach(&self, device: u8) -> Result<()>;

    /// Gives it a network interface, the other side of a tap, which its kernel does not
    /// look at before it is told to. Answers the number of the device.
    async fn attach_interface(&self, tap: File, mac: [u8; 6], mtu: u16) -> Result<u8>;

    /// The network namespace of the pod's own.
    fn network(&self) -> BorrowedFd<'_>;

    /// The largest that it can become.
    fn most(&self) -> Size;

    /// How large it is.
    async fn size(&self) -> Size;

    /// Makes it so large, within what it can be; answers how large it is then. It may
    /// have kept memory that it is to give back, and be late with what it is to get.
    async fn resize(&self, to: Size) -> Result<Size>;

    /// Makes a process of the host that stands for one of the guest's, under this label:
    /// in the pod's own network namespace, or in another one. For the thread only that
    /// the shim lives by.
    fn hold(&self, label: &str, network: Option<BorrowedFd<'_>>) -> Result<Holder>;

    /// What goes along when the program changes; `None` while something is under way.
    fn carry(&self, bag: &mut Bag) -> io::Result<Option<Carried>>;

    /// Kills it: always possible, needs no answer.
    fn kill(&self);

    /// How it ended, if it did.
    fn has_ended(&self) -> Option<End>;

    /// Waits for the end.
    async fn ended(&self) -> End;

    /// Waits until nothing of it is left on the host either, beside the pod's own
    /// directory.
    async fn gone(&self);
}

/// Ends a guest: in order if its agent answers, else by force.
pub(crate) async fn stop(guest: &dyn Guest) {
    if guest.has_ended().is_none() && guest.agent().shutdown().await.is_ok() {
        let _ = timeout(PARTING, guest.ended()).await;
    }
    guest.kill();
}

/// A device that a guest has, such as a disk. Dropped, it is taken away, without waiting for that.
#[derive(Debug)]
pub struct Attached {
    device: u8,
    guest: Option<Arc<dyn Guest>>,
}

impl Attached {
    /// One that the guest has under this number.
    pub(crate) fn new(device: u8, guest: &Arc<dyn Guest>) -> Self {
        Attached {
            device,
            guest: Some(Arc::clone(guest)),
        }
    }

    /// Its number: all that goes along when the program changes.
    pub(crate) fn device(&self) -> u8 {
        self.device
    }

    /// Takes it away; the guest has let go of it, or never will.
    pub async fn detach(mut self) {
        if let Some(guest) = self.guest.take() {
            take_away(&*guest, self.device).await;
        }
    }
}

impl Drop for Attached {
    fn drop(&mut self) {
        let Some(guest) = self.guest.take() else {
            return;
        };
        let device = self.device;
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { take_away(&*guest, device).await });
        }
    }
}

async fn take_away(guest: &dyn Guest, device: u8) {
    // With the virtual machine the device is gone too.
    if guest.has_ended().is_none()
        && let Err(error) = guest.detach(device).await
    {
        warn!(
            device,
            error = error.text(),
            "a device cannot be taken from the VMM"
        );
    }
}
