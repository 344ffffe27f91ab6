//! What CPUID tells the guest: all that KVM supports, and a topology of one
//! socket with one thread a core.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

/// CPUID.1:EBX and ECX, EDX bits.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const MULTI_THREADED: u32 = 1 << 28;

/// What the tables differ by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Processor {
    /// APIC id, from 0.
    pub id: u8,
    /// Processors in all.
    pub vcpus: u8,
    /// KVM's local APIC has a deadline timer.
    pub tsc_deadline: bool,
}

/// The table of one processor, from the one that KVM supports.
#[must_use]
pub fn table(supported: &CpuId, processor: Processor) -> CpuId {
    let mut cpuid = supported.clone();
    for entry in cpuid.as_mut_slice() {
        set(entry, processor);
    }
    cpuid
}

fn set(entry: &mut kvm_cpuid_entry2, processor: Processor) {
    let Processor {
        id,
        vcpus,
        tsc_deadline,
    } = processor;
    let id = u32::from(id);
    let last = u32::from(vcpus).saturating_sub(1);
    // Bits of an APIC id that number the cores.
    let width = u32::BITS - last.leading_zeros();
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ecx |= HYPERVISOR;
            if tsc_deadline {
                entry.ecx |= TSC_DEADLINE;
            }
            // CLFLUSH size stays; APIC id and number of logical processors.
            entry.ebx = entry.ebx & 0x0000_ffff | id << 24 | (last + 1) << 16;
            if vcpus > 1 {
                entry.edx |= MULTI_THREADED;
            } else {
                entry.edx &= !MULTI_THREADED;
            }
        }
        // Caches (Intel, AMD): the third level is shared by all, others by none.
        (0x4 | 0x8000_001d, _) => {
            let shared = if entry.eax >> 5 & 7 == 3 { last } else { 0 };
            entry.eax = entry.eax & !(0xfff << 14) | shared << 14;
            if entry.function == 0x4 {
                entry.eax = entry.eax & 0x03ff_ffff | last << 26;
            }
        }
        // Topology: level 0 is threads, level 1 cores.
        (0xb, 0) => topology(entry, 0, 1, 1 << 8, id),
        (0xb, 1) => topology(entry, width, last + 1, 2 << 8 | 1, id),
        (0xb, index) => topology(entry, 0, 0, index & 0xff, id),
        // The longer form of 0xb; without it the shorter one is used.
        (0x1f, _) => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
        // AMD: number of threads and width of the ids.
        (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | width << 12 | last,
        // AMD: extended APIC id; one thread a core; one node.
        (0x8000_001e, _) => {
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
}

fn topology(entry: &mut kvm_cpuid_entry2, shift: u32, count: u32, level: u32, id: u32) {
    (entry.eax, entry.ebx, entry.ecx, entry.edx) = (shift, count, level, id);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, id: u8, vcpus: u8) -> kvm_cpuid_entry2 {
        let mut entry = kvm_cpuid_entry2 {
            function,
            index,
            ..Default::default()
        };
        let processor = Processor {
            id,
            vcpus,
            tsc_deadline: true,
        };
        set(&mut entry, processor);
        entry
    }

    #[test]
    fn each_processor_knows_its_id_and_how_many_there_are() {
        let basic = entry(1, 0, 3, 6);
        assert_eq!(basic.ebx, 3 << 24 | 6 << 16);
        assert_eq!(basic.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(basic.edx, MULTI_THREADED);
        assert_eq!(entry(1, 0, 0, 1).edx, 0);
        let cores = entry(0xb, 1, 3, 6);
        assert_eq!((cores.eax, cores.ebx, cores.edx), (3, 6, 3));
        let threads = entry(0xb, 0, 3, 6);
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 1 << 8));
        assert_eq!(entry(0x8000_0008, 0, 0, 64).ecx, 6 << 12 | 63);
    }

    #[test]
    fn one_processor_needs_no_bits_for_its_id() {
        assert_eq!(entry(0xb, 1, 0, 1).eax, 0);
        assert_eq!(entry(0x8000_0008, 0, 0, 1).ecx, 0);
    }
}
