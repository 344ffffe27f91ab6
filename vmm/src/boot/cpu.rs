//! The first processor's state at the kernel's 64-bit entry point.
//!
//! Paging on with the first GiB mapped to itself, flat segments, interrupts off
//! (boot.rst, "64-bit boot protocol"). The other processors stay in reset until
//! the guest starts them.

use kvm_bindings::{
    Msrs, kvm_dtable, kvm_fpu, kvm_lapic_state, kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs,
};
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::{GDT, PAGE_TABLES, ZERO_PAGE};

const PDPT: u64 = PAGE_TABLES + 0x1000;
const PAGE_DIRECTORY: u64 = PAGE_TABLES + 0x2000;
/// Grows down; the kernel changes to its own at once.
const STACK: u64 = PAGE_TABLES - 0x10;

/// Present, writable.
const TABLE: u64 = 0b11;
/// Present, writable, 2 MiB.
const LARGE: u64 = 1 << 7 | 0b11;

/// Writes page tables and GDT.
pub fn write_tables(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    memory.write_obj(PDPT | TABLE, GuestAddress(PAGE_TABLES))?;
    memory.write_obj(PAGE_DIRECTORY | TABLE, GuestAddress(PDPT))?;
    for page in 0..512 {
        memory.write_obj(page << 21 | LARGE, GuestAddress(PAGE_DIRECTORY + page * 8))?;
    }
    for (slot, entry) in (0..).zip(gdt()) {
        memory.write_obj(entry, GuestAddress(GDT + slot * 8))?;
    }
    Ok(())
}

/// Two empty entries, then code and data where the kernel expects them:
/// __BOOT_CS is 0x10, __BOOT_DS 0x18; and a task segment.
fn gdt() -> [u64; 5] {
    [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x008f_8b00_0000_ffff,
    ]
}

/// The segment register that a GDT entry stands for (SDM 3.4.5).
fn register(slot: u16) -> kvm_segment {
    let entry = gdt()[usize::from(slot)];
    let bits =
        |from: u32, count: u32| u8::try_from(entry >> from & ((1 << count) - 1)).unwrap_or(0);
    kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: slot * 8,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: bits(55, 1),
        unusable: 0,
        padding: 0,
    }
}

/// Sets the registers of the first processor.
pub fn start_at(vcpu: &VcpuFd, entry: u64) -> Result<(), kvm_ioctls::Error> {
    let mut sregs = vcpu.get_sregs()?;
    long_mode(&mut sregs);
    vcpu.set_sregs(&sregs)?;
    vcpu.set_regs(&kvm_regs {
        rip: entry,
        rsp: STACK,
        rsi: ZERO_PAGE,
        // Only the bit that is always one.
        rflags: 0x2,
        ..Default::default()
    })
}

fn long_mode(sregs: &mut kvm_sregs) {
    let code = register(2);
    let data = register(3);
    (sregs.cs, sregs.tr) = (code, register(4));
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.gdt = kvm_dtable {
        base: GDT,
        limit: 5 * 8 - 1,
        ..Default::default()
    };
    sregs.idt = kvm_dtable::default();
    sregs.cr3 = PAGE_TABLES;
    // PAE
    sregs.cr4 |= 1 << 5;
    // PG, PE
    sregs.cr0 |= 1 << 31 | 1;
    // LMA, LME
    sregs.efer |= 1 << 10 | 1 << 8;
}

/// Sets what every processor needs, the waiting ones too.
pub fn prepare(vcpu: &VcpuFd) -> Result<(), kvm_ioctls::Error> {
    vcpu.set_fpu(&kvm_fpu {
        // x87 and SSE as after reset: all exceptions masked.
        fcw: 0x37f,
        mxcsr: 0x1f80,
        ..Default::default()
    })?;
    let msrs = Msrs::from_entries(&[
        // IA32_MISC_ENABLE: fast string operations.
        msr(0x1a0, 1),
        // IA32_MTRR_DEF_TYPE: MTRRs on, memory is write-back.
        msr(0x2ff, 1 << 11 | 6),
    ])
    .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))?;
    vcpu.set_msrs(&msrs)?;
    let mut lapic = vcpu.get_lapic()?;
    deliver(&mut lapic, LINT0, EXTERNAL);
    deliver(&mut lapic, LINT1, NMI);
    vcpu.set_lapic(&lapic)
}

fn msr(index: u32, data: u64) -> kvm_msr_entry {
    kvm_msr_entry {
        index,
        data,
        ..Default::default()
    }
}

/// Offsets of the local vector table's entries (SDM 11.5.1).
const LINT0: usize = 0x350;
const LINT1: usize = 0x360;
/// Delivery modes: from the 8259, and NMI. Both unmasked.
const EXTERNAL: u32 = 0b111 << 8;
const NMI: u32 = 0b100 << 8;

fn deliver(lapic: &mut kvm_lapic_state, entry: usize, mode: u32) {
    for (register, byte) in lapic.regs[entry..entry + 4]
        .iter_mut()
        .zip(mode.to_le_bytes())
    {
        *register = std::ffi::c_char::from_le_bytes([byte]);
    }
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestMemory;

    use super::*;
    use crate::memory;

    #[test]
    fn the_first_gib_is_mapped_to_itself() {
        let memory = memory::map(32).unwrap();
        write_tables(&memory).unwrap();
        let entry = |at| memory.read_obj::<u64>(GuestAddress(at)).unwrap();
        for address in [0, 0x1000, 0x100_0000, 0x3fff_ffff_u64] {
            let pdpt = entry(PAGE_TABLES + (address >> 39 & 511) * 8);
            assert_eq!(pdpt & 0b11, 0b11);
            let directory = entry((pdpt & !0xfff) + (address >> 30 & 511) * 8);
            assert_eq!(directory & 0b11, 0b11);
            let page = entry((directory & !0xfff) + (address >> 21 & 511) * 8);
            assert_eq!(page & 0xff, 1 << 7 | 0b11, "2 MiB, writable, present");
            assert_eq!(page & !0x1f_ffff, address & !0x1f_ffff);
        }
        assert!(memory.check_address(GuestAddress(STACK)).is_some());
    }

    #[test]
    fn segments_are_flat_64_bit_code_and_data() {
        let code = register(2);
        assert_eq!((code.selector, code.l, code.db, code.s), (0x10, 1, 0, 1));
        assert_eq!((code.type_, code.present, code.dpl), (0xb, 1, 0));
        let data = register(3);
        assert_eq!((data.selector, data.type_, data.s), (0x18, 0x3, 1));
        let task = register(4);
        assert_eq!((task.type_, task.s, task.present), (0xb, 0, 1));
    }

    #[test]
    fn local_interrupt_lines_are_unmasked() {
        let mut lapic = kvm_lapic_state::default();
        deliver(&mut lapic, LINT0, EXTERNAL);
        assert_eq!(lapic.regs[0x350..0x354], [0, 7, 0, 0]);
    }
}
