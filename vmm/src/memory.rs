//! The guest's memory and where it lies among guest-physical addresses.
//!
//! One private anonymous mapping, aligned to 2 MiB so that transparent huge
//! pages back it from the first byte, kept out of core dumps. It is never
//! unmapped: it lives as long as the process, and devices keep references to it.
//!
//! ```text
//! 0 … 3 GiB          RAM
//! 3 GiB … 4 GiB      no RAM: device registers, I/O APIC, local APICs
//! 4 GiB …            the rest of the RAM
//! ```

use std::{io, ops::RangeInclusive, ptr};

use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// Guest memory in MiB that a configuration may ask for.
pub const SIZES_MIB: RangeInclusive<u32> = 32..=1_048_576;

/// First guest-physical address that is not RAM, if the guest has that much.
pub const HOLE_START: u64 = 3 << 30;
/// Where the rest of the RAM begins.
pub const HOLE_END: u64 = 4 << 30;

const HUGE_PAGE: usize = 2 << 20;

/// Why there is no guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Outside [`SIZES_MIB`].
    #[error(
        "Guest memory of {mib} MiB is not possible: {} to {} MiB are",
        SIZES_MIB.start(), SIZES_MIB.end()
    )]
    Size {
        /// What was asked for.
        mib: u32,
    },
    /// The host refused the mapping.
    #[error("Cannot map {mib} MiB of guest memory")]
    Map {
        /// What was asked for.
        mib: u32,
        /// Why.
        source: io::Error,
    },
    /// The mapping cannot be described as guest memory.
    #[error("Cannot lay out {mib} MiB of guest memory")]
    Layout {
        /// What was asked for.
        mib: u32,
    },
}

/// RAM as (guest-physical address, length), ascending; one or two ranges.
#[must_use]
pub fn ranges(mib: u32) -> Vec<(u64, u64)> {
    let size = u64::from(mib) << 20;
    if size <= HOLE_START {
        vec![(0, size)]
    } else {
        vec![(0, HOLE_START), (HOLE_END, size - HOLE_START)]
    }
}

/// Maps the guest's memory. No page of it is touched yet.
pub fn map(mib: u32) -> Result<GuestMemoryMmap, Error> {
    if !SIZES_MIB.contains(&mib) {
        return Err(Error::Size { mib });
    }
    let size = usize::try_from(u64::from(mib) << 20).map_err(|_| Error::Size { mib })?;
    let base = map_aligned(size).map_err(|source| Error::Map { mib, source })?;
    let mut offset = 0;
    let mut regions = Vec::new();
    for (start, length) in ranges(mib) {
        let length = usize::try_from(length).map_err(|_| Error::Size { mib })?;
        // SAFETY: the ranges add up to `size`, the length of the mapping at
        // `base`, so the pointer stays in it.
        let host = unsafe { base.add(offset) };
        // SAFETY: `host` and `length` lie in the mapping, which is never unmapped.
        let region = unsafe { MmapRegion::build_raw(host, length, PROTECTION, FLAGS) };
        regions.push(
            region
                .ok()
                .and_then(|region| GuestRegionMmap::new(region, GuestAddress(start)))
                .ok_or(Error::Layout { mib })?,
        );
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| Error::Layout { mib })
}

const PROTECTION: libc::c_int = libc::PROT_READ | libc::PROT_WRITE;
const FLAGS: libc::c_int = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;

/// Maps `size` bytes at a multiple of 2 MiB. The up to 2 MiB of address space
/// beside them stay reserved and untouched.
fn map_aligned(size: usize) -> io::Result<*mut u8> {
    // SAFETY: a new anonymous mapping at an address that the kernel chooses
    // touches nothing that exists.
    let start = unsafe { libc::mmap(ptr::null_mut(), size + HUGE_PAGE, PROTECTION, FLAGS, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    let padding = start.cast::<u8>().align_offset(HUGE_PAGE);
    // SAFETY: `padding` is below 2 MiB, by which the mapping exceeds `size`.
    let base = unsafe { start.cast::<u8>().add(padding) };
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_DONTDUMP] {
        // Only advice: a kernel without huge pages refuses the first.
        // SAFETY: `base` and `size` lie in the mapping just made, and neither
        // piece of advice changes what it holds.
        let _ = unsafe { libc::madvise(base.cast(), size, advice) };
    }
    Ok(base)
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestMemory};

    use super::*;

    #[test]
    fn ram_leaves_a_hole_below_4_gib() {
        assert_eq!(ranges(256), [(0, 256 << 20)]);
        assert_eq!(ranges(3072), [(0, 3 << 30)]);
        assert_eq!(ranges(3073), [(0, 3 << 30), (4 << 30, 1 << 20)]);
        let memory = map(3073).unwrap();
        assert_eq!(memory.num_regions(), 2);
        assert!(memory.read_obj::<u8>(GuestAddress(HOLE_START)).is_err());
        assert_eq!(memory.read_obj::<u8>(GuestAddress(HOLE_END)).unwrap(), 0);
    }

    #[test]
    fn memory_starts_at_a_huge_page() {
        let memory = map(32).unwrap();
        let host = memory.get_host_address(GuestAddress(0)).unwrap();
        assert_eq!(host.align_offset(HUGE_PAGE), 0);
    }

    #[test]
    fn an_impossible_size_is_refused_with_the_size_f31() {
        for mib in [0, 31, 1_048_577, u32::MAX] {
            let text = map(mib).unwrap_err().to_string();
            assert_eq!(
                text,
                format!("Guest memory of {mib} MiB is not possible: 32 to 1048576 MiB are")
            );
        }
    }
}
