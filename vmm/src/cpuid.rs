//! What CPUID tells the guest: all that KVM supports but virtualisation itself, and
//! a topology of one socket with one thread a core.
//!
//! The levels of the topology (leaf 0xB) are made, not edited: KVM lists them in
//! part or not at all, and a guest that misses one takes each processor for a socket.

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

/// CPUID.1:EBX and ECX, EDX bits.
const HYPERVISOR: u32 = 1 << 31;
const TSC_DEADLINE: u32 = 1 << 24;
const MULTI_THREADED: u32 = 1 << 28;
const VMX: u32 = 1 << 5;
/// CPUID.0x8000_0001:ECX.
const SVM: u32 = 1 << 2;

/// Levels of the topology.
const TOPOLOGY: u32 = 0xb;
/// Their longer form; without it the shorter one is used.
const TOPOLOGY_V2: u32 = 0x1f;
/// What SVM can do.
const SVM_FEATURES: u32 = 0x8000_000a;

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
pub fn table(supported: &CpuId, processor: Processor) -> Result<CpuId, vmm_sys_util::fam::Error> {
    let mut entries = supported.as_slice().to_vec();
    entries.retain(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2 | SVM_FEATURES));
    for entry in &mut entries {
        set(entry, processor);
    }
    let last_leaf = entries.iter().find(|entry| entry.function == 0);
    if last_leaf.is_some_and(|entry| entry.eax >= TOPOLOGY) {
        entries.extend(levels(processor));
    }
    CpuId::from_entries(&entries)
}

/// Level 0 is threads, level 1 cores, level 2 ends the list.
fn levels(processor: Processor) -> [kvm_cpuid_entry2; 3] {
    let Processor { id, vcpus, .. } = processor;
    let level = |index: u32, shift: u32, count: u8, kind: u32| kvm_cpuid_entry2 {
        function: TOPOLOGY,
        index,
        flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count.into(),
        ecx: kind << 8 | index,
        edx: id.into(),
        ..Default::default()
    };
    [
        level(0, 0, 1, 1),
        level(1, width(vcpus), vcpus, 2),
        level(2, 0, 0, 0),
    ]
}

/// Bits of an APIC id that number the cores.
fn width(vcpus: u8) -> u32 {
    u32::BITS - u32::from(vcpus).saturating_sub(1).leading_zeros()
}

fn set(entry: &mut kvm_cpuid_entry2, processor: Processor) {
    let Processor {
        id,
        vcpus,
        tsc_deadline,
    } = processor;
    let id = u32::from(id);
    let last = u32::from(vcpus).saturating_sub(1);
    let width = width(vcpus);
    match (entry.function, entry.index) {
        (0x1, _) => {
            entry.ecx = entry.ecx & !VMX | HYPERVISOR;
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
        (0x8000_0001, _) => entry.ecx &= !SVM,
        // AMD: number of threads and width of the ids.
        (0x8000_0008, _) => entry.ecx = entry.ecx & !0xf0ff | width << 12 | last,
        // AMD: extended APIC id; one thread a core; one node.
        (0x8000_001e, _) => {
            (entry.eax, entry.ebx, entry.ecx) = (id, id & 0xff, 0);
        }
        _ => {}
    }
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

    /// What a guest reads in its table.
    fn read(cpuid: &CpuId, function: u32, index: u32) -> Option<(u32, u32, u32, u32)> {
        let mut entries = cpuid.as_slice().iter();
        let entry = entries.find(|entry| entry.function == function && entry.index == index)?;
        Some((entry.eax, entry.ebx, entry.ecx, entry.edx))
    }

    /// How Linux counts the processors of a socket: by the width of the level above
    /// the last one (detect_extended_topology).
    fn socket_of(cpuid: &CpuId) -> Option<u32> {
        let mut shift = 0;
        let mut id = None;
        for index in 0.. {
            let (eax, ebx, ecx, edx) = read(cpuid, TOPOLOGY, index)?;
            if ebx == 0 || ecx >> 8 == 0 {
                break;
            }
            (shift, id) = (eax & 0x1f, Some(edx));
        }
        id.map(|id| id >> shift)
    }

    fn given(entries: &[(u32, u32, u32)]) -> CpuId {
        let entries: Vec<_> = entries
            .iter()
            .map(|(function, index, eax)| kvm_cpuid_entry2 {
                function: *function,
                index: *index,
                eax: *eax,
                ..Default::default()
            })
            .collect();
        CpuId::from_entries(&entries).unwrap()
    }

    #[test]
    fn all_processors_are_in_one_socket_whatever_kvm_lists() {
        // As older kernels do, as newer ones do, and one that lists none.
        for supported in [
            given(&[
                (0, 0, 0x1f),
                (1, 0, 0),
                (0xb, 0, 1),
                (0xb, 1, 7),
                (0x1f, 0, 1),
            ]),
            given(&[(0, 0, 0x1f), (1, 0, 0), (0xb, 0, 0), (0x1f, 0, 0)]),
            given(&[(0, 0, 0xd), (1, 0, 0)]),
        ] {
            for vcpus in [1, 2, 3, 6, 64] {
                for id in 0..vcpus {
                    let processor = Processor {
                        id,
                        vcpus,
                        tsc_deadline: true,
                    };
                    let cpuid = table(&supported, processor).unwrap();
                    assert_eq!(socket_of(&cpuid), Some(0), "{id} of {vcpus}");
                    let (_, threads, kind, own) = read(&cpuid, TOPOLOGY, 0).unwrap();
                    assert_eq!((threads, kind, own), (1, 1 << 8, id.into()));
                    let (_, cores, kind, _) = read(&cpuid, TOPOLOGY, 1).unwrap();
                    assert_eq!((cores, kind), (vcpus.into(), 2 << 8 | 1));
                    assert_eq!(read(&cpuid, TOPOLOGY, 2), Some((0, 0, 2, id.into())));
                    assert_eq!(read(&cpuid, TOPOLOGY_V2, 0), None);
                }
            }
        }
        // A processor that does not have the leaf is told by the others.
        let old = given(&[(0, 0, 0xa), (1, 0, 0)]);
        let processor = Processor {
            id: 1,
            vcpus: 2,
            tsc_deadline: false,
        };
        assert_eq!(read(&table(&old, processor).unwrap(), TOPOLOGY, 0), None);
    }

    #[test]
    fn what_this_hosts_kvm_supports_becomes_a_table_that_it_takes() {
        let Ok(kvm) = kvm_ioctls::Kvm::new() else {
            println!("skipped: it needs /dev/kvm");
            return;
        };
        let most = kvm_bindings::KVM_MAX_CPUID_ENTRIES;
        let supported = kvm.get_supported_cpuid(most).unwrap();
        let vm = kvm.create_vm().unwrap();
        for id in 0..3 {
            let processor = Processor {
                id,
                vcpus: 3,
                tsc_deadline: false,
            };
            let cpuid = table(&supported, processor).unwrap();
            let vcpu = vm.create_vcpu(id.into()).unwrap();
            vcpu.set_cpuid2(&cpuid).unwrap();
            let taken = vcpu.get_cpuid2(most).unwrap();
            if read(&taken, 0, 0).is_some_and(|(eax, ..)| eax >= TOPOLOGY) {
                assert_eq!(socket_of(&taken), Some(0));
            }
            assert_eq!(read(&taken, 1, 0).unwrap().2 & VMX, 0);
            let extended = read(&taken, 0x8000_0001, 0);
            assert!(extended.is_none_or(|(_, _, ecx, _)| ecx & SVM == 0));
        }
    }

    #[test]
    fn the_guest_is_not_told_that_it_could_run_guests() {
        let one = |function: u32| kvm_cpuid_entry2 {
            function,
            ecx: u32::MAX,
            eax: 1,
            ..Default::default()
        };
        let supported = CpuId::from_entries(&[one(1), one(0x8000_0001), one(SVM_FEATURES)]);
        let processor = Processor {
            id: 0,
            vcpus: 1,
            tsc_deadline: true,
        };
        let cpuid = table(&supported.unwrap(), processor).unwrap();
        assert_eq!(read(&cpuid, 1, 0).unwrap().2, !VMX);
        assert_eq!(read(&cpuid, 0x8000_0001, 0).unwrap().2, !SVM);
        assert_eq!(read(&cpuid, SVM_FEATURES, 0), None);
    }

    #[test]
    fn each_processor_knows_its_id_and_how_many_there_are() {
        let basic = entry(1, 0, 3, 6);
        assert_eq!(basic.ebx, 3 << 24 | 6 << 16);
        assert_eq!(basic.ecx, HYPERVISOR | TSC_DEADLINE);
        assert_eq!(basic.edx, MULTI_THREADED);
        assert_eq!(entry(1, 0, 0, 1).edx, 0);
        assert_eq!(entry(0x8000_0008, 0, 0, 64).ecx, 6 << 12 | 63);
    }

    #[test]
    fn one_processor_needs_no_bits_for_its_id() {
        assert_eq!(width(1), 0);
        assert_eq!(entry(0x8000_0008, 0, 0, 1).ecx, 0);
    }
}
