//! Where a machine stands, in words, for whoever finds out why one does not come up.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::fmt::{self, Write};

use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE,
    KVM_MP_STATE_UNINITIALIZED, kvm_lapic_state,
};
use kvm_ioctls::VcpuFd;

/// RFLAGS.IF
const INTERRUPTS: u64 = 1 << 9;
/// The first register of the local APIC's IRR (Intel SDM volume 3, 12.4.1).
const IRR: usize = 0x200;
/// Bytes from one of its registers to the next, each of which has 32 bits.
const APART: usize = 0x10;

/// Where a processor is that is outside of the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stand {
    /// Its instruction pointer.
    rip: u64,
    /// It takes interrupts.
    interruptible: bool,
    /// As KVM numbers what it does (KVM_MP_STATE_*).
    activity: u32,
    /// The highest vector that waits in its local APIC.
    pending: Option<usize>,
}

impl Stand {
    /// Asks KVM; what it does not say stays as of a processor that never ran.
    pub(crate) fn of(vcpu: &VcpuFd) -> Stand {
        let regs = vcpu.get_regs().unwrap_or_default();
        Stand {
            rip: regs.rip,
            interruptible: regs.rflags & INTERRUPTS != 0,
            activity: vcpu.get_mp_state().unwrap_or_default().mp_state,
            pending: vcpu.get_lapic().ok().as_ref().and_then(highest),
        }
    }
}

impl fmt::Display for Stand {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.activity {
            KVM_MP_STATE_UNINITIALIZED | KVM_MP_STATE_INIT_RECEIVED => {
                return f.write_str("was never started");
            }
            KVM_MP_STATE_HALTED => write!(f, "is halted at {:#x}", self.rip)?,
            KVM_MP_STATE_RUNNABLE => write!(f, "runs at {:#x}", self.rip)?,
            other => write!(f, "is in state {other} at {:#x}", self.rip)?,
        }
        if !self.interruptible {
            f.write_str(" with interrupts off")?;
        }
        match self.pending {
            Some(vector) => write!(f, " while vector {vector:#x} waits"),
            None => Ok(()),
        }
    }
}

/// The highest vector that is set in the IRR.
fn highest(lapic: &kvm_lapic_state) -> Option<usize> {
    let registers = lapic.regs.get(IRR..)?.chunks(APART).take(8).enumerate();
    let highest = registers.filter_map(|(number, register)| {
        let bytes = register
            .first_chunk::<4>()?
            .map(|byte| byte.cast_unsigned());
        let bit = u32::from_le_bytes(bytes).checked_ilog2()?;
        number
            .checked_mul(32)?
            .checked_add(usize::try_from(bit).ok()?)
    });
    highest.max()
}

/// How far a device is with a queue, by the indices in the guest's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// Chains that the driver made available, modulo 2^16.
    pub available: u16,
    /// Chains that the device gave back.
    pub used: u16,
}

/// A device that its driver has started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its place among the devices, from 0.
    pub place: usize,
    /// Virtio's number of its kind.
    pub id: u32,
    /// Its queues.
    pub queues: Vec<Progress>,
}

/// One line about devices, `None` if they could not be looked at, and about processors:
/// a number each, and where it stands if it is outside of the guest.
pub(crate) fn words(
    processors: impl Iterator<Item = (u8, Option<Stand>)>,
    devices: Option<&[Started]>,
) -> String {
    let mut words = String::new();
    // Writing to a string does not fail.
    match devices {
        None => words.push_str("the devices are held by a processor"),
        Some([]) => words.push_str("no device was started"),
        Some(devices) => {
            let mut separator = "";
            for Started { place, id, queues } in devices {
                let _ = write!(words, "{separator}device {place} (virtio {id}) gave back");
                for (queue, Progress { available, used }) in queues.iter().enumerate() {
                    let separator = if queue == 0 { "" } else { "," };
                    let _ = write!(words, "{separator} {used} of {available}");
                }
                separator = ", ";
            }
        }
    }
    for (id, stand) in processors {
        let _ = match stand {
            Some(stand) => write!(words, ", processor {id} {stand}"),
            None => write!(words, ", processor {id} does not leave the guest"),
        };
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_says_where_processors_and_queues_are() {
        let halted = Stand {
            rip: 0xffff_ffff_8100_0000,
            interruptible: true,
            activity: KVM_MP_STATE_HALTED,
            pending: None,
        };
        let busy = Stand {
            rip: 0x10,
            pending: Some(0xec),
            ..Stand::default()
        };
        let waits = Stand {
            activity: KVM_MP_STATE_UNINITIALIZED,
            ..Stand::default()
        };
        let stands = [Some(halted), Some(busy), Some(waits), None];
        let device = Started {
            place: 1,
            id: 26,
            queues: vec![
                Progress {
                    available: 0,
                    used: 0,
                },
                Progress {
                    available: 8,
                    used: 7,
                },
            ],
        };
        assert_eq!(
            words((0..).zip(stands), Some(&[device])),
            "device 1 (virtio 26) gave back 0 of 0, 7 of 8, \
             processor 0 is halted at 0xffffffff81000000, \
             processor 1 runs at 0x10 with interrupts off while vector 0xec waits, \
             processor 2 was never started, processor 3 does not leave the guest"
        );
        let none = words([(0, Some(waits))].into_iter(), Some(&[]));
        assert_eq!(none, "no device was started, processor 0 was never started");
    }

    #[test]
    fn the_highest_vector_that_waits_is_found() {
        let mut lapic = kvm_lapic_state::default();
        assert_eq!(highest(&lapic), None);
        lapic.regs[IRR + APART] = 1;
        assert_eq!(highest(&lapic), Some(32));
        lapic.regs[IRR + 7 * APART + 1] = 0x10;
        assert_eq!(highest(&lapic), Some(7 * 32 + 12));
        // Beyond the IRR.
        lapic.regs[IRR + 8 * APART] = 1;
        assert_eq!(highest(&lapic), Some(7 * 32 + 12));
    }
}
