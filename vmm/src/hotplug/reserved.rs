//! The places of devices that are absent when the guest starts.

use std::sync::Arc;

use super::{Keeper, More, Places, Processors, Starter};
use crate::{
    boot::cmdline::Slot,
    config::Config,
    devices::{Device, absent::Absent, block, mem, net},
    exit::Ending,
    jail::{Confined, threads::ThreadKind},
    present::Present,
    vcpu::Machine,
};

/// Numbers of devices, in the order in which the guest is told of them.
#[derive(Debug)]
pub(crate) struct Reserved {
    disks: Vec<u8>,
    interfaces: Vec<u8>,
    memory: Option<u8>,
    processors: u8,
}

impl Reserved {
    /// Appends absent devices for what the configuration says may come.
    pub(crate) fn append(devices: &mut Vec<Box<dyn Device>>, config: &Config) -> Reserved {
        let mut append = |count: u8, queues| -> Vec<u8> {
            // A configuration has few devices.
            let first = u8::try_from(devices.len()).unwrap_or(u8::MAX);
            let numbers = (first..).take(count.into());
            let absent = numbers.inspect(|_| devices.push(Box::new(Absent(queues))));
            absent.collect()
        };
        let grows = u8::from(config.more_memory_mib > 0);
        Reserved {
            disks: append(config.places, block::QUEUES),
            interfaces: append(config.interfaces, net::QUEUES),
            memory: append(grows, mem::QUEUES).first().copied(),
            processors: config.more_vcpus,
        }
    }

    /// The device by which memory comes, and where it is.
    pub(crate) fn memory<'a>(&self, slots: &'a [Slot]) -> Option<(u8, &'a Slot)> {
        let device = self.memory?;
        Some((device, slots.get(usize::from(device))?))
    }

    /// Who brings them; none if nothing can come.
    pub(crate) fn keeper(
        &self,
        machine: &Arc<Machine>,
        memory: Option<More>,
        processors: Processors,
        present: &Present,
        starter: impl Fn(ThreadKind) -> Starter,
    ) -> Option<Keeper> {
        let places =
            |names, devices: &[u8], kind| Places::new(names, devices, machine, starter(kind));
        let nothing = self.disks.is_empty() && self.interfaces.is_empty();
        if nothing && memory.is_none() && self.processors == 0 {
            return None;
        }
        Some(Keeper {
            disks: places(["disk", "disks"], &self.disks, ThreadKind::Disk),
            interfaces: places(["net", "interfaces"], &self.interfaces, ThreadKind::Network),
            present: present.clone(),
            memory,
            processors,
        })
    }
}

/// Starts threads of a kind, out of that of what comes later.
pub(crate) fn starters(confined: &Confined, ending: &Ending) -> impl Fn(ThreadKind) -> Starter {
    move |kind| Starter {
        seal: confined.seal(kind),
        ending: ending.clone(),
    }
}
