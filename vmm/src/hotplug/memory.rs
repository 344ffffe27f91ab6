//! Memory that the guest gets while it runs, and gives back.
//!
//! Of the host it is there as soon as it is asked for, in pieces that the guest's kernel
//! takes as a whole, and costs nothing until it is used. How much of it the guest takes,
//! and when, its driver decides.

use std::{io, sync::Arc};

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use vm_memory::GuestMemory;
use vmm_sys_util::eventfd::EventFd;

use super::{Places, Starter};
use crate::{
    config::Config,
    devices::mem::{BLOCK, Mem, Pool},
    memory::{Memory, later},
    vcpu::Machine,
};

/// What a Linux of less than 64 GiB takes as a whole (its memory blocks), and a larger
/// one.
const PIECE: u64 = 128 << 20;
const LARGE_PIECE: u64 = 2 << 30;
const LARGE_MIB: u32 = 64 << 10;

/// Bytes of address space for so much more memory of a guest that begins with so much.
fn span(memory_mib: u32, more_mib: u32) -> u64 {
    up_to(u64::from(more_mib) << 20, piece(memory_mib))
}

fn piece(memory_mib: u32) -> u64 {
    match memory_mib {
        LARGE_MIB.. => LARGE_PIECE,
        _ => PIECE,
    }
}

fn up_to(bytes: u64, unit: u64) -> u64 {
    bytes.checked_next_multiple_of(unit).unwrap_or(u64::MAX)
}

/// More memory for a machine.
#[derive(Debug)]
pub(crate) struct More {
    vm: Arc<VmFd>,
    memory: Memory,
    /// Where the device comes, and its number.
    place: Places,
    device: u8,
    /// What the guest began with, in MiB.
    memory_mib: u32,
    /// The most that may be added, in MiB.
    more_mib: u32,
    pool: Arc<Pool>,
    /// Guest-physical address of the first piece.
    start: u64,
    /// The next number of a memory slot of KVM's.
    slot: u32,
    /// Signalled when the driver has seen that it is asked for something else.
    acknowledged: EventFd,
}

impl More {
    /// For a machine of this configuration whose memory, and nothing else but the
    /// devices' registers, KVM has. `acknowledged` is signalled by the driver of device
    /// number `device`.
    pub(crate) fn new(
        config: &Config,
        vm: &Arc<VmFd>,
        memory: &Memory,
        machine: &Arc<Machine>,
        starter: Starter,
        (device, acknowledged): (u8, EventFd),
    ) -> More {
        let (memory_mib, more_mib) = (config.memory_mib, config.more_memory_mib);
        let start = later(memory_mib);
        let pool = Pool::new(start, span(memory_mib, more_mib), memory.clone());
        // One for each region, and the registers.
        let slots = memory.now().num_regions().saturating_add(1);
        More {
            vm: Arc::clone(vm),
            memory: memory.clone(),
            place: Places::new(["memory", "memory"], &[device], machine, starter),
            device,
            memory_mib,
            more_mib,
            pool: Arc::new(pool),
            start,
            slot: u32::try_from(slots).unwrap_or(u32::MAX),
            acknowledged,
        }
    }

    /// What the guest has of it.
    pub(crate) fn pool(&self) -> Arc<Pool> {
        Arc::clone(&self.pool)
    }

    /// Asks the guest to have so much in all; answers the number of the device. With less
    /// than it began with it is asked for that.
    pub(super) fn ask(&mut self, mib: u32) -> Result<u8, String> {
        let more = mib.saturating_sub(self.memory_mib);
        if more > self.more_mib {
            let most = self.memory_mib.saturating_add(self.more_mib);
            return Err(format!(
                "{mib} MiB of memory are too many: {most} are the most"
            ));
        }
        let requested = up_to(u64::from(more) << 20, BLOCK);
        let usable = up_to(requested, piece(self.memory_mib)).max(self.pool.usable());
        self.map(usable)?;
        self.pool.ask(requested, usable);
        self.plug()?;
        Ok(self.device)
    }

    /// Makes memory of the host of the address space up to there.
    fn map(&mut self, usable: u64) -> Result<(), String> {
        let there = self.pool.usable();
        let length = usable.saturating_sub(there);
        if length == 0 {
            return Ok(());
        }
        let start = self.start.saturating_add(there);
        let (vm, slot) = (&self.vm, self.slot);
        let grown = self.memory.grow(start, length, |host| {
            let region = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: start,
                memory_size: length,
                userspace_addr: host.expose_provenance() as u64,
            };
            // SAFETY: the mapping has this length and, once KVM has it, is never unmapped;
            // no other slot has this number or covers the range, which begins where the
            // last one ended.
            unsafe { vm.set_user_memory_region(region) }.map_err(io::Error::from)
        });
        grown.map_err(|error| {
            let mib = length >> 20;
            format!("the host has no {mib} MiB of memory more: {error}")
        })?;
        self.slot = self.slot.saturating_add(1);
        Ok(())
    }

    /// Puts the device where the guest will look for it, unless it is there.
    fn plug(&mut self) -> Result<(), String> {
        if self.place.has(self.device) {
            return Ok(());
        }
        let (pool, acknowledged) = (Arc::clone(&self.pool), &self.acknowledged);
        let plugged = self.place.attach(|_, events| {
            let device = Mem::new(events, pool, acknowledged.try_clone()?);
            Ok(Box::new(device))
        });
        plugged.map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_address_space_is_made_of_pieces_that_linux_takes_as_a_whole() {
        assert_eq!(span(512, 1), 128 << 20);
        assert_eq!(span(512, 1024), 1 << 30);
        assert_eq!(span(512, 1025), (1 << 30) + (128 << 20));
        assert_eq!(span(64 << 10, 1), 2 << 30);
    }
}
