//! Loads the kernel and its initramfs: file to guest memory, no copy between.

use std::{
    fs::File,
    io::{self, Seek, SeekFrom},
    os::unix::fs::FileExt,
};

use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

use super::{
    CMDLINE, HIGH_START, MP_TABLE, ZERO_PAGE, cmdline, mptable,
    params::{self, Initramfs},
};
use crate::memory;

/// What is loaded.
#[derive(Debug)]
pub struct Images<'a> {
    /// Uncompressed x86-64 ELF.
    pub kernel: &'a File,
    /// Initial RAM file system.
    pub initramfs: Option<&'a File>,
    /// Complete command line.
    pub cmdline: &'a str,
}

/// Why a kernel cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A read failed.
    #[error("Cannot read the {what}")]
    Read {
        /// Which file.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// Not a kernel that can be started here.
    #[error("The kernel is not an uncompressed x86-64 ELF executable (vmlinux): {0}")]
    Format(&'static str),
    /// A part lies outside RAM.
    #[error("The {what} does not fit into {memory_mib} MiB of guest memory")]
    Room {
        /// Which part.
        what: &'static str,
        /// Size of the guest's memory.
        memory_mib: u32,
    },
    /// The memory that the guest has was refused.
    #[error("Cannot write to guest memory")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Puts everything but the processor's own tables into guest memory. Returns the
/// guest-physical address of the kernel's entry point.
pub fn load(
    memory: &GuestMemoryMmap,
    memory_mib: u32,
    vcpus: u8,
    images: &Images<'_>,
) -> Result<u64, Error> {
    let kernel = load_elf(memory, memory_mib, images.kernel)?;
    let initramfs = images
        .initramfs
        .map(|file| load_initramfs(memory, memory_mib, kernel.end, file))
        .transpose()?;
    memory.write_slice(images.cmdline.as_bytes(), GuestAddress(CMDLINE))?;
    let length = u32::try_from(images.cmdline.len()).unwrap_or(0);
    debug_assert!(images.cmdline.len() < cmdline::LONGEST, "checked when made");
    memory.write_obj(
        params::zero_page(memory_mib, length, initramfs),
        GuestAddress(ZERO_PAGE),
    )?;
    let address = u32::try_from(MP_TABLE).unwrap_or(0);
    memory.write_slice(&mptable::table(address, vcpus), GuestAddress(MP_TABLE))?;
    Ok(kernel.entry)
}

#[derive(Debug, PartialEq, Eq)]
struct Kernel {
    entry: u64,
    /// First address after its last segment, zeroed data included.
    end: u64,
}

/// A loadable segment (Elf64_Phdr).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    offset: u64,
    address: u64,
    file_size: u64,
    memory_size: u64,
}

fn load_elf(memory: &GuestMemoryMmap, memory_mib: u32, file: &File) -> Result<Kernel, Error> {
    let read = |source| Error::Read {
        what: "kernel",
        source,
    };
    let mut header = [0; 64];
    file.read_exact_at(&mut header, 0).map_err(read)?;
    let (entry, table, count) = elf_header(&header)?;
    let mut segments = vec![0; usize::from(count) * 56];
    file.read_exact_at(&mut segments, table).map_err(read)?;
    let room = || Error::Room {
        what: "kernel",
        memory_mib,
    };
    let mut end = 0;
    for segment in segments.chunks_exact(56).filter_map(segment) {
        if segment.address < HIGH_START {
            return Err(Error::Format("a segment lies below 1 MiB"));
        }
        let after = segment
            .address
            .checked_add(segment.memory_size.max(segment.file_size))
            .ok_or(Error::Format("a segment ends beyond the address space"))?;
        let size = usize::try_from(after - segment.address).map_err(|_| room())?;
        if after > memory::HOLE_START || !memory.check_range(GuestAddress(segment.address), size) {
            return Err(room());
        }
        copy(
            memory,
            file,
            segment.offset,
            segment.address,
            segment.file_size,
        )
        .map_err(read)?;
        end = end.max(after);
    }
    if !(HIGH_START..end).contains(&entry) {
        return Err(Error::Format("its entry point lies in no segment"));
    }
    Ok(Kernel { entry, end })
}

/// Entry point, offset and number of the program headers (Elf64_Ehdr).
fn elf_header(header: &[u8; 64]) -> Result<(u64, u64, u16), Error> {
    const EXECUTABLE: u16 = 2;
    const X86_64: u16 = 62;
    if !header.starts_with(b"\x7fELF") {
        return Err(Error::Format("no ELF header"));
    }
    // 64 bit, little-endian, version 1.
    if header[4..7] != [2, 1, 1] {
        return Err(Error::Format("not a 64-bit little-endian file"));
    }
    if (u16_at(header, 16), u16_at(header, 18)) != (EXECUTABLE, X86_64) {
        return Err(Error::Format("not an executable for x86-64"));
    }
    if u16_at(header, 54) != 56 {
        return Err(Error::Format("program headers of a strange size"));
    }
    Ok((u64_at(header, 24), u64_at(header, 32), u16_at(header, 56)))
}

fn segment(header: &[u8]) -> Option<Segment> {
    const LOAD: u16 = 1;
    // p_type is 32 bits wide; the loadable type has none in its upper half.
    (u16_at(header, 0) == LOAD && u16_at(header, 2) == 0).then(|| Segment {
        offset: u64_at(header, 8),
        address: u64_at(header, 24),
        file_size: u64_at(header, 32),
        memory_size: u64_at(header, 40),
    })
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Puts the initramfs behind the kernel, in the RAM below the hole: so it shares a huge
/// page, which the host must clear first, with the kernel's end.
fn load_initramfs(
    memory: &GuestMemoryMmap,
    memory_mib: u32,
    kernel_end: u64,
    file: &File,
) -> Result<Initramfs, Error> {
    let read = |source| Error::Read {
        what: "initramfs",
        source,
    };
    let room = || Error::Room {
        what: "initramfs",
        memory_mib,
    };
    let size = file.metadata().map_err(read)?.len();
    let top = (u64::from(memory_mib) << 20).min(memory::HOLE_START);
    // A page boundary, so that the guest can free its pages afterwards.
    let address = kernel_end
        .checked_next_multiple_of(0x1000)
        .ok_or_else(room)?;
    if address.checked_add(size).is_none_or(|end| end > top) {
        return Err(room());
    }
    copy(memory, file, 0, address, size).map_err(read)?;
    Ok(Initramfs {
        address: u32::try_from(address).map_err(|_| room())?,
        size: u32::try_from(size).map_err(|_| room())?,
    })
}

/// Reads `size` bytes at `offset` of the file to guest-physical `address`.
fn copy(
    memory: &GuestMemoryMmap,
    mut file: &File,
    offset: u64,
    address: u64,
    size: u64,
) -> io::Result<()> {
    file.seek(SeekFrom::Start(offset))?;
    let size = usize::try_from(size).map_err(io::Error::other)?;
    memory
        .read_exact_volatile_from(GuestAddress(address), &mut file, size)
        .map_err(|error| match error {
            vm_memory::GuestMemoryError::IOError(error) => error,
            other => io::Error::other(other),
        })
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    const BASE: u64 = 0x100_0000;

    /// A kernel of one segment with `code`, and `memory_size` bytes in memory.
    fn elf(address: u64, memory_size: u64, code: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 64 + 56];
        file[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        file[16..20].copy_from_slice(&[2, 0, 62, 0]);
        file[24..32].copy_from_slice(&address.to_le_bytes());
        file[32] = 64;
        file[54] = 56;
        file[56] = 1;
        file[64] = 1;
        file[72] = 120;
        file[88..96].copy_from_slice(&address.to_le_bytes());
        file[96..104].copy_from_slice(&u64::try_from(code.len()).unwrap().to_le_bytes());
        file[104..112].copy_from_slice(&memory_size.to_le_bytes());
        file.extend_from_slice(code);
        file
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn refused(bytes: &[u8]) -> String {
        let memory = memory::map(32).unwrap();
        load_elf(&memory, 32, &file(bytes)).unwrap_err().to_string()
    }

    #[test]
    fn a_segment_lands_at_its_physical_address() {
        let memory = memory::map(32).unwrap();
        let kernel = load_elf(&memory, 32, &file(&elf(BASE, 0x3000, b"code"))).unwrap();
        assert_eq!(
            kernel,
            Kernel {
                entry: BASE,
                end: BASE + 0x3000
            }
        );
        let mut code = [0; 4];
        memory.read_slice(&mut code, GuestAddress(BASE)).unwrap();
        assert_eq!(&code, b"code");
    }

    #[test]
    fn what_is_no_kernel_is_refused_with_the_reason() {
        let good = elf(BASE, 4, b"code");
        let mut wrong = good.clone();
        wrong[18] = 3;
        assert!(refused(&wrong).ends_with("not an executable for x86-64"));
        assert!(refused(&[0; 64]).ends_with("no ELF header"));
        assert_eq!(refused(b"short"), "Cannot read the kernel");
        assert_eq!(refused(&good[..123]), "Cannot read the kernel");
        assert!(refused(&elf(0x1000, 4, b"code")).ends_with("below 1 MiB"));
        assert!(refused(&elf(u64::MAX - 2, 4, b"code")).ends_with("the address space"));
        let large = "The kernel does not fit into 32 MiB of guest memory";
        assert_eq!(refused(&elf(BASE, 16 << 20 | 1, b"code")), large);
        assert_eq!(refused(&elf(BASE, u64::MAX - BASE, b"code")), large);
    }

    #[test]
    fn the_initramfs_lies_behind_the_kernel_and_within_ram() {
        let memory = memory::map(32).unwrap();
        let image = file(&[7; 5000]);
        let placed = load_initramfs(&memory, 32, BASE + 1, &image).unwrap();
        assert_eq!(placed.address, u32::try_from(BASE).unwrap() + 0x1000);
        assert_eq!(placed.size, 5000);
        let last = (32 << 20) - 0x2000;
        assert!(load_initramfs(&memory, 32, last, &image).is_ok());
        for end in [last + 1, u64::MAX] {
            let error = load_initramfs(&memory, 32, end, &image).unwrap_err();
            assert_eq!(
                error.to_string(),
                "The initramfs does not fit into 32 MiB of guest memory"
            );
        }
    }
}
