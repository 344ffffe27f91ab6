//! The zero page: what the kernel is told at its 64-bit entry point.

use linux_loader::loader::bootparam::boot_params;

use super::{CMDLINE, HIGH_START, LOW_END};
use crate::memory;

/// Type of usable RAM in the memory map (E820).
const RAM: u32 = 1;

/// Where the initramfs lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Initramfs {
    /// Guest-physical address.
    pub address: u32,
    /// Length in bytes.
    pub size: u32,
}

/// The zero page for a guest with `memory_mib` of RAM.
#[must_use]
pub fn zero_page(
    memory_mib: u32,
    cmdline_length: u32,
    initramfs: Option<Initramfs>,
) -> boot_params {
    let mut params = boot_params::default();
    // boot.rst: what a loader sets; the rest is for the kernel's own header.
    params.hdr.boot_flag = 0xaa55;
    params.hdr.header = u32::from_le_bytes(*b"HdrS");
    params.hdr.version = 0x20f;
    params.hdr.type_of_loader = 0xff;
    params.hdr.kernel_alignment = 0x100_0000;
    params.hdr.cmd_line_ptr = u32::try_from(CMDLINE).unwrap_or(0);
    params.hdr.cmdline_size = cmdline_length;
    if let Some(Initramfs { address, size }) = initramfs {
        params.hdr.ramdisk_image = address;
        params.hdr.ramdisk_size = size;
    }
    for (entry, (start, end)) in params.e820_table.iter_mut().zip(ram(memory_mib)) {
        entry.addr = start;
        entry.size = end - start;
        entry.type_ = RAM;
        params.e820_entries += 1;
    }
    params
}

/// Usable RAM as (start, end), ascending: all but the last KiB below 640 KiB and
/// what lies between that and 1 MiB, as on a PC.
fn ram(memory_mib: u32) -> Vec<(u64, u64)> {
    let mut ram = vec![(0, LOW_END)];
    for (start, length) in memory::ranges(memory_mib) {
        ram.push((start.max(HIGH_START), start + length));
    }
    ram
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_map_covers_all_ram_but_the_pcs_hole() {
        assert_eq!(ram(256), [(0, 0x9_fc00), (0x10_0000, 256 << 20)]);
        assert_eq!(
            ram(4096),
            [(0, 0x9_fc00), (0x10_0000, 3 << 30), (4 << 30, 5 << 30),]
        );
    }

    #[test]
    fn the_zero_page_names_map_command_line_and_initramfs() {
        let initramfs = Initramfs {
            address: 0x100_0000,
            size: 42,
        };
        let params = zero_page(4096, 17, Some(initramfs));
        assert_eq!(params.e820_entries, 3);
        let last = params.e820_table[2];
        assert_eq!(
            ({ last.addr }, { last.size }, { last.type_ }),
            (4 << 30, 1 << 30, 1)
        );
        let header = params.hdr;
        assert_eq!({ header.cmd_line_ptr }, 0x2_0000);
        assert_eq!({ header.ramdisk_image }, 0x100_0000);
        assert_eq!({ header.ramdisk_size }, 42);
    }
}
