//! Packs a linked `vmlinux` into as few bytes as a loader needs.
//!
//! The linker puts each segment at a file offset that is a multiple of 2 MiB
//! away from its address, and pads sections to 2 MiB with `int3` or zeros: of
//! 18 MiB some 9 MiB say something. What starts a pod reads and hashes the
//! whole file each time, so the rest is left out: segments are stored one after
//! the other at page boundaries, long runs of padding are not stored (memory
//! that was never written reads as zeros), symbols and sections are dropped.
//!
//! Addresses, entry point and the notes (with the PVH entry) stay as they were.

use anyhow::{Context, Result, ensure};

/// Boundary at which segments begin, in memory and in the file.
const PAGE: usize = 4096;

/// Pages of padding that are worth a segment boundary.
const RUN: usize = 8;

// System V ABI, ELF-64: sizes, field offsets, values.
const EHDR_LEN: usize = 64;
const PHDR_LEN: usize = 56;
const E_PHOFF: usize = 32;
const E_SHOFF: usize = 40;
const E_PHENTSIZE: usize = 54;
const E_PHNUM: usize = 56;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;

/// One program header, with offsets and lengths as indices.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    kind: u32,
    flags: u32,
    offset: usize,
    vaddr: u64,
    paddr: u64,
    file_len: usize,
    mem_len: u64,
    align: u64,
}

/// The packed form of `elf`, an ELF-64 little-endian executable.
pub(crate) fn pack(elf: &[u8]) -> Result<Vec<u8>> {
    ensure!(
        elf.len() >= EHDR_LEN && elf.starts_with(b"\x7fELF\x02\x01\x01"),
        "Not an ELF-64 little-endian file"
    );
    ensure!(
        usize::from(u16_at(elf, E_PHENTSIZE)?) == PHDR_LEN,
        "The program headers are not {PHDR_LEN} bytes long"
    );
    let table = index(u64_at(elf, E_PHOFF)?)?;
    let segments = (0..usize::from(u16_at(elf, E_PHNUM)?))
        .map(|n| Segment::read(elf, table + n * PHDR_LEN))
        .collect::<Result<Vec<_>>>()?;

    let mut loads = Vec::new();
    for segment in segments.iter().filter(|segment| segment.kind == PT_LOAD) {
        loads.extend(segment.without_padding(elf));
    }
    let notes: Vec<&Segment> = segments
        .iter()
        .filter(|segment| segment.kind == PT_NOTE)
        .collect();

    let count = u16::try_from(loads.len() + notes.len()).context("Too many segments")?;
    let mut packed = elf[..EHDR_LEN].to_vec();
    packed[E_PHOFF..E_PHOFF + 8].copy_from_slice(&(EHDR_LEN as u64).to_le_bytes());
    packed[E_SHOFF..E_SHOFF + 8].fill(0);
    packed[E_PHNUM..E_PHNUM + 2].copy_from_slice(&count.to_le_bytes());
    // e_shentsize, e_shnum, e_shstrndx
    packed[E_PHNUM + 2..EHDR_LEN].fill(0);
    packed.resize(EHDR_LEN + usize::from(count) * PHDR_LEN, 0);

    let mut headers = Vec::new();
    for load in &loads {
        packed.resize(packed.len().next_multiple_of(PAGE), 0);
        let offset = packed.len();
        packed.extend_from_slice(load.bytes(elf));
        headers.push(Segment {
            offset,
            align: PAGE as u64,
            ..*load
        });
    }
    for note in notes {
        // Notes lie within a loaded segment and move with it.
        let (old, new) = loads
            .iter()
            .zip(&headers)
            .find(|(old, _)| {
                note.offset >= old.offset
                    && note.offset + note.file_len <= old.offset + old.file_len
            })
            .context("The notes are in no loaded segment")?;
        headers.push(Segment {
            offset: note.offset - old.offset + new.offset,
            ..*note
        });
    }
    for (n, header) in headers.iter().enumerate() {
        header.write(&mut packed[EHDR_LEN + n * PHDR_LEN..][..PHDR_LEN]);
    }
    Ok(packed)
}

impl Segment {
    fn read(elf: &[u8], at: usize) -> Result<Segment> {
        let segment = Segment {
            kind: u32_at(elf, at)?,
            flags: u32_at(elf, at + 4)?,
            offset: index(u64_at(elf, at + 8)?)?,
            vaddr: u64_at(elf, at + 16)?,
            paddr: u64_at(elf, at + 24)?,
            file_len: index(u64_at(elf, at + 32)?)?,
            mem_len: u64_at(elf, at + 40)?,
            align: u64_at(elf, at + 48)?,
        };
        ensure!(
            segment
                .offset
                .checked_add(segment.file_len)
                .is_some_and(|end| end <= elf.len())
                && segment.file_len as u64 <= segment.mem_len,
            "A segment is longer than the file or its memory: {segment:x?}"
        );
        ensure!(
            segment.kind != PT_LOAD || segment.paddr.is_multiple_of(PAGE as u64),
            "A segment does not begin at a page: {segment:x?}"
        );
        Ok(segment)
    }

    fn write(&self, header: &mut [u8]) {
        header[0..4].copy_from_slice(&self.kind.to_le_bytes());
        header[4..8].copy_from_slice(&self.flags.to_le_bytes());
        let fields = [
            self.offset as u64,
            self.vaddr,
            self.paddr,
            self.file_len as u64,
            self.mem_len,
            self.align,
        ];
        for (n, field) in fields.iter().enumerate() {
            header[8 + n * 8..][..8].copy_from_slice(&field.to_le_bytes());
        }
    }

    fn bytes<'a>(&self, elf: &'a [u8]) -> &'a [u8] {
        &elf[self.offset..self.offset + self.file_len]
    }

    /// The parts of this segment that hold something. Together they cover the
    /// same memory: each reaches to the beginning of the next.
    fn without_padding(&self, elf: &[u8]) -> Vec<Segment> {
        let mut parts: Vec<Segment> = Vec::new();
        for (start, end) in kept(self.bytes(elf)) {
            if let Some(last) = parts.last_mut() {
                last.mem_len = self.vaddr + start as u64 - last.vaddr;
            }
            let skipped = if parts.is_empty() { 0 } else { start };
            parts.push(Segment {
                offset: self.offset + skipped,
                vaddr: self.vaddr + skipped as u64,
                paddr: self.paddr + skipped as u64,
                file_len: end - skipped,
                mem_len: self.mem_len - skipped as u64,
                ..*self
            });
        }
        parts
    }
}

/// The ranges of `bytes` between long runs of padding pages; at least one.
fn kept(bytes: &[u8]) -> Vec<(usize, usize)> {
    let mut ranges = Vec::new();
    let (mut start, mut end, mut run) = (0, 0, 0);
    for (n, page) in bytes.chunks(PAGE).enumerate() {
        let at = n * PAGE;
        if is_padding(page) {
            run += 1;
            continue;
        }
        if run >= RUN && end > 0 {
            ranges.push((start, end));
            start = at;
        }
        run = 0;
        end = at + page.len();
    }
    ranges.push((start, end));
    ranges
}

/// Whether a page is one byte repeated that means nothing: zero, or the `int3`
/// between functions and the end of their section.
fn is_padding(page: &[u8]) -> bool {
    page.iter().all(|byte| *byte == 0) || page.iter().all(|byte| *byte == 0xcc)
}

fn field<const N: usize>(elf: &[u8], at: usize) -> Result<[u8; N]> {
    elf.get(at..)
        .and_then(|rest| rest.first_chunk::<N>())
        .copied()
        .context("The ELF headers reach beyond the end of the file")
}

fn u16_at(elf: &[u8], at: usize) -> Result<u16> {
    Ok(u16::from_le_bytes(field(elf, at)?))
}

fn u32_at(elf: &[u8], at: usize) -> Result<u32> {
    Ok(u32::from_le_bytes(field(elf, at)?))
}

fn u64_at(elf: &[u8], at: usize) -> Result<u64> {
    Ok(u64::from_le_bytes(field(elf, at)?))
}

fn index(value: u64) -> Result<usize> {
    usize::try_from(value).context("An offset in the ELF headers does not fit")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file with one loaded segment that holds `content` at offset 2 MiB,
    /// and a note of 16 bytes at its beginning.
    fn elf(content: &[u8], mem_len: u64) -> Vec<u8> {
        let offset = 2 << 20;
        let load = Segment {
            kind: PT_LOAD,
            flags: 5,
            offset,
            vaddr: 0xffff_ffff_8100_0000,
            paddr: 0x100_0000,
            file_len: content.len(),
            mem_len,
            align: 2 << 20,
        };
        let note = Segment {
            kind: PT_NOTE,
            file_len: 16,
            mem_len: 16,
            align: 4,
            ..load
        };
        let mut elf = vec![0; offset];
        elf[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        elf[E_PHOFF] = EHDR_LEN.to_le_bytes()[0];
        elf[E_PHENTSIZE] = PHDR_LEN.to_le_bytes()[0];
        elf[E_PHNUM] = 2;
        load.write(&mut elf[EHDR_LEN..][..PHDR_LEN]);
        note.write(&mut elf[EHDR_LEN + PHDR_LEN..][..PHDR_LEN]);
        elf.extend_from_slice(content);
        elf
    }

    /// Memory as a loader fills it, from the lowest physical address on, and
    /// the content of the notes.
    fn load(elf: &[u8]) -> (Vec<u8>, Vec<u8>) {
        let (mut memory, mut notes) = (Vec::new(), Vec::new());
        for n in 0..usize::from(u16_at(elf, E_PHNUM).unwrap()) {
            let segment = Segment::read(elf, EHDR_LEN + n * PHDR_LEN).unwrap();
            if segment.kind == PT_NOTE {
                notes = segment.bytes(elf).to_vec();
                continue;
            }
            assert_eq!(segment.vaddr - segment.paddr, 0xffff_ffff_8000_0000);
            let at = index(segment.paddr - 0x100_0000).unwrap();
            assert!(at >= memory.len(), "segments do not overlap");
            memory.resize(at + index(segment.mem_len).unwrap(), 0);
            memory[at..at + segment.file_len].copy_from_slice(segment.bytes(elf));
        }
        (memory, notes)
    }

    #[test]
    fn a_packed_kernel_loads_to_the_same_memory_without_its_padding() {
        let mut content = vec![1; 3 * PAGE];
        content.resize(100 * PAGE, 0xcc);
        content.resize(101 * PAGE + 5, 2);
        content.resize(200 * PAGE, 0);
        let original = elf(&content, 210 * PAGE as u64);
        let packed = pack(&original).unwrap();
        assert!(packed.len() < 8 * PAGE, "{}", packed.len());

        let (mut before, notes_before) = load(&original);
        let (after, notes_after) = load(&packed);
        before[3 * PAGE..100 * PAGE].fill(0);
        assert!(before == after);
        assert_eq!(notes_before, notes_after);
        assert_eq!(pack(&packed).unwrap(), packed);
    }

    #[test]
    fn a_short_run_of_padding_is_kept() {
        let mut content = vec![1; PAGE];
        content.resize((RUN - 1) * PAGE, 0xcc);
        content.resize(20 * PAGE, 3);
        let original = elf(&content, 20 * PAGE as u64);
        let (before, _) = load(&original);
        let (after, _) = load(&pack(&original).unwrap());
        assert!(before == after);
    }

    #[test]
    fn what_is_not_a_kernel_is_refused() {
        assert!(pack(b"").is_err());
        assert!(pack(&[0x7f; 100]).is_err());
        let mut short = elf(&[1; PAGE], PAGE as u64);
        short.truncate(2 << 20);
        assert!(pack(&short).is_err());
    }
}
