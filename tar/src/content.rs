//! The content of entries, on its way into files.

use std::{
    fs::File,
    io::{self, Read, Seek, SeekFrom, Write},
};

use crate::{Entry, Reader};

/// Bytes that are written, or left out as a hole, at once: a block of file systems.
const BLOCK: usize = 4096;

/// Writes the content of a file that is empty. What is not stored becomes a hole.
pub fn write_content<R: Read>(
    entry: &Entry,
    content: &mut Reader<R>,
    file: &mut File,
) -> io::Result<()> {
    let Some(segments) = &entry.segments else {
        return copy_with_holes(content, file, 0, entry.size);
    };
    for segment in segments {
        copy_with_holes(content, file, segment.offset, segment.length)?;
    }
    file.set_len(entry.size)
}

/// Copies the next `length` bytes of `from` to `offset` of `file`, where nothing is
/// yet. Blocks of zeros become holes: a file takes no more of the disk than its
/// content.
fn copy_with_holes(
    from: &mut impl Read,
    file: &mut File,
    offset: u64,
    length: u64,
) -> io::Result<()> {
    let mut buffer = [0; 16 * BLOCK];
    let (mut place, end) = (offset, offset.saturating_add(length));
    while place < end {
        let wanted =
            usize::try_from(end - place).map_or(buffer.len(), |left| left.min(buffer.len()));
        let part = buffer.get_mut(..wanted).unwrap_or_default();
        from.read_exact(part)?;
        for block in part.chunks(BLOCK) {
            if block.iter().any(|byte| *byte != 0) {
                file.seek(SeekFrom::Start(place))?;
                file.write_all(block)?;
            }
            place += block.len() as u64;
        }
    }
    // A hole at the end has no byte after it.
    if file.metadata()?.len() < end {
        file.set_len(end)?;
    }
    Ok(())
}
