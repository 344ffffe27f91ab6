//! The guest's memory and where it lies among guest-physical addresses.
//!
//! Private anonymous mappings, aligned to 2 MiB so that transparent huge
//! pages back them from the first byte, kept out of core dumps. They are never
//! unmapped: they live as long as the process, and devices keep references to them.
//!
//! ```text
//! 0 … 3 GiB          RAM
//! 3 GiB … 4 GiB      no RAM: device registers, I/O APIC, local APICs
//! 4 GiB …            the rest of the RAM
//! n × 2 GiB …        what the guest gets while it runs
//! ```

use std::{io, ops::RangeInclusive, ptr, sync::Arc};

use vm_memory::{
    GuestAddress, GuestAddressSpace, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap,
    GuestRegionMmap, MmapRegion,
};

/// Guest memory in MiB that a configuration may ask for.
pub const SIZES_MIB: RangeInclusive<u32> = 32..=1_048_576;

/// First guest-physical address that is not RAM, if the guest has that much.
pub const HOLE_START: u64 = 3 << 30;
/// Where the rest of the RAM begins.
pub const HOLE_END: u64 = 4 << 30;

const HUGE_PAGE: usize = 2 << 20;

/// Alignment of what the guest gets while it runs: the most that Linux takes together.
const LATER_ALIGNMENT: u64 = 2 << 30;

/// Guest memory as devices reach it: more may come while they run, and none goes.
/// Clones are the same memory.
#[derive(Clone, Debug)]
pub struct Memory(GuestMemoryAtomic<GuestMemoryMmap>);

impl Memory {
    /// All that there is now.
    #[must_use]
    pub fn now(&self) -> Arc<GuestMemoryMmap> {
        self.0.memory().into_inner()
    }

    /// Maps `length` bytes, a multiple of 2 MiB, for this guest-physical address, where
    /// nothing is. Devices reach them once `give` has given them to the guest; if it fails
    /// nothing has changed.
    pub fn grow(
        &self,
        start: u64,
        length: u64,
        give: impl FnOnce(*mut u8) -> io::Result<()>,
    ) -> io::Result<()> {
        let size = usize::try_from(length).map_err(io::Error::other)?;
        let host = map_aligned(size)?;
        let more = || {
            let region = describe(host, size, start).ok_or(io::ErrorKind::InvalidInput)?;
            // One thread does this: nobody else's change is lost.
            let more = self.now().insert_region(Arc::new(region));
            let more = more.map_err(io::Error::other)?;
            let lock = self.0.lock().map_err(|_| io::ErrorKind::Deadlock)?;
            give(host)?;
            lock.replace(more);
            Ok(())
        };
        more().inspect_err(|_: &io::Error| {
            // SAFETY: nobody was told of the mapping, or kept it.
            let _ = unsafe { libc::munmap(host.cast(), size) };
        })
    }

    /// Gives pages back to the host: the guest finds zeros there.
    pub fn discard(&self, start: u64, length: u64) -> io::Result<()> {
        let memory = self.now();
        let length = usize::try_from(length).map_err(io::Error::other)?;
        for slice in memory.get_slices(GuestAddress(start), length) {
            let slice = slice.map_err(io::Error::other)?;
            let address = slice.ptr_guard_mut().as_ptr();
            // SAFETY: the slice lies in a private anonymous mapping that is guest memory:
            // what it holds may change at any time, and nobody here refers to it otherwise.
            let outcome =
                unsafe { libc::madvise(address.cast(), slice.len(), libc::MADV_DONTNEED) };
            if outcome != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        Ok(())
    }
}

impl From<Arc<GuestMemoryMmap>> for Memory {
    fn from(memory: Arc<GuestMemoryMmap>) -> Self {
        Memory(GuestMemoryAtomic::from(memory))
    }
}

/// Where what a guest with so much memory gets while it runs begins.
#[must_use]
pub fn later(mib: u32) -> u64 {
    let end = ranges(mib)
        .last()
        .map_or(0, |(start, length)| start + length);
    end.max(HOLE_END).next_multiple_of(LATER_ALIGNMENT)
}

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
        regions.push(describe(host, length, start).ok_or(Error::Layout { mib })?);
        offset += length;
    }
    GuestMemoryMmap::from_regions(regions).map_err(|_| Error::Layout { mib })
}

/// A part of a mapping that is never unmapped, as guest memory at this address.
fn describe(host: *mut u8, length: usize, start: u64) -> Option<GuestRegionMmap> {
    // SAFETY: `host` and `length` lie in the mapping, which is never unmapped.
    let region = unsafe { MmapRegion::build_raw(host, length, PROTECTION, FLAGS) };
    GuestRegionMmap::new(region.ok()?, GuestAddress(start))
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
    fn more_memory_is_reached_by_whoever_had_the_old_and_comes_back_empty_when_discarded() {
        let memory = Memory::from(Arc::new(map(32).unwrap()));
        let before = memory.now();
        let start = later(32);
        assert_eq!(start, 4 << 30);
        let at = GuestAddress(start + (2 << 20));
        assert!(before.write_obj(7_u8, at).is_err());
        let refused = memory.grow(start, 4 << 20, |_| Err(io::ErrorKind::OutOfMemory.into()));
        assert_eq!(refused.unwrap_err().kind(), io::ErrorKind::OutOfMemory);
        assert!(memory.now().write_obj(7_u8, at).is_err(), "nothing came");
        let given = |_| Ok(());
        memory.clone().grow(start, 4 << 20, given).unwrap();
        assert!(before.write_obj(7_u8, at).is_err(), "it is as it was");
        memory.now().write_obj(7_u8, at).unwrap();
        memory.now().write_obj(8_u8, GuestAddress(5)).unwrap();
        assert_eq!(before.read_obj::<u8>(GuestAddress(5)).unwrap(), 8);
        assert!(
            memory.grow(start + (2 << 20), 4 << 20, given).is_err(),
            "taken"
        );
        memory.discard(start + (2 << 20), 2 << 20).unwrap();
        assert_eq!(memory.now().read_obj::<u8>(at).unwrap(), 0);
        assert!(memory.discard(start, 6 << 20).is_err());
    }

    #[test]
    fn what_comes_later_lies_behind_all_that_is_there() {
        assert_eq!(later(3 << 10), 4 << 30);
        assert_eq!(later(4 << 10), 6 << 30);
        assert_eq!(later((5 << 10) + 1), 8 << 30);
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
