//! What lies in memory and registers before the first guest instruction.
//!
//! Linux's 64-bit boot protocol (Documentation/arch/x86/boot.rst): the kernel's
//! ELF segments where they ask to be, the zero page with the memory map, the
//! command line, the initramfs, an identity map of the first GiB, and an MP
//! table, since there is no firmware that would describe the processors.
//!
//! ```text
//! 0x00500  GDT            0x07000  zero page      0x09000  page tables
//! 0x20000  command line   0xf0000  MP table       kernel, …, initramfs at the end
//! ```

pub mod cmdline;
pub mod cpu;
pub mod kernel;
pub mod mptable;
pub mod params;

pub(crate) const GDT: u64 = 0x500;
pub(crate) const ZERO_PAGE: u64 = 0x7000;
pub(crate) const PAGE_TABLES: u64 = 0x9000;
pub(crate) const CMDLINE: u64 = 0x2_0000;
/// End of the RAM below 640 KiB that the guest may use.
pub(crate) const LOW_END: u64 = 0x9_fc00;
pub(crate) const MP_TABLE: u64 = 0xf_0000;
/// The kernel, the initramfs and the rest of the RAM are above.
pub(crate) const HIGH_START: u64 = 0x10_0000;
