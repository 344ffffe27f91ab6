//! Files with holes: which parts of them an archive stores. The old GNU form keeps
//! the list in the header and in blocks after it, the pax forms 0.0 and 0.1 in
//! records, 1.0 before the content.

use std::io::{self, Read};

use super::{BLOCK, Entry, Extended, Kind, Reader, Segment, broken, decimal, field, number};

/// Most parts of one file.
const MAX_SEGMENTS: usize = 1 << 20;

/// Finds the parts of the current entry, if it is a file with holes, its size, and
/// for some forms its name. What is left of the entry afterwards is content.
pub(super) fn find<R: Read>(
    reader: &mut Reader<R>,
    entry: &mut Entry,
    letter: u8,
    block: &[u8; BLOCK],
    extended: &Extended,
) -> io::Result<()> {
    let segments = if letter == b'S' {
        entry.size = size(number(field(block, 483, 12))?)?;
        old(reader, block)?
    } else {
        let major = extended.get("GNU.sparse.major").unwrap_or_default();
        let minor = extended.get("GNU.sparse.minor").unwrap_or_default();
        let listed = extended
            .records
            .iter()
            .any(|(key, _)| key == b"GNU.sparse.map" || key == b"GNU.sparse.offset");
        let inside = match (major, minor) {
            (b"1", b"0") => true,
            (b"0", b"0" | b"1") => false,
            (b"", b"") if listed => false,
            // A form that nobody knows: the content is what is stored, as for Go.
            _ => return Ok(()),
        };
        if let Some(name) = extended.get("GNU.sparse.name") {
            entry.name = name.to_vec();
        }
        let told = match extended.number("GNU.sparse.size")? {
            Some(told) => Some(told),
            None => extended.number("GNU.sparse.realsize")?,
        };
        if let Some(told) = told {
            entry.size = size(told)?;
        }
        if inside {
            before_content(reader)?
        } else {
            in_records(extended)?
        }
    };
    if entry.kind != Kind::Regular {
        return broken("what is no file has holes");
    }
    check(&segments, entry.size, reader.left)?;
    entry.segments = Some(segments);
    Ok(())
}

fn size(number: i64) -> io::Result<u64> {
    u64::try_from(number).or_else(|_| broken("the size of a sparse file is negative"))
}

/// Parts follow each other, lie within the file, and are what is stored.
fn check(segments: &[Segment], size: u64, stored: u64) -> io::Result<()> {
    let (mut end, mut sum) = (0_u64, 0_u64);
    for Segment { offset, length } in segments {
        let next = offset.checked_add(*length).filter(|next| *next <= size);
        let (Some(next), true) = (next, *offset >= end) else {
            return broken("the parts of a sparse file do not fit");
        };
        end = next;
        sum = sum.saturating_add(*length);
    }
    if sum == stored {
        Ok(())
    } else {
        broken("the parts of a sparse file are not what is stored")
    }
}

fn add(segments: &mut Vec<Segment>, offset: i64, length: i64) -> io::Result<()> {
    if segments.len() == MAX_SEGMENTS {
        return broken("a sparse file has too many parts");
    }
    segments.push(Segment {
        offset: size(offset)?,
        length: size(length)?,
    });
    Ok(())
}

fn old<R: Read>(reader: &mut Reader<R>, header: &[u8; BLOCK]) -> io::Result<Vec<Segment>> {
    let mut segments = Vec::new();
    let mut block = *header;
    let (mut start, mut count, mut more) = (386, 4, 482);
    loop {
        for index in 0..count {
            let offset = field(&block, start + 24 * index, 12);
            if offset.first() == Some(&0) {
                break;
            }
            let length = field(&block, start + 24 * index + 12, 12);
            add(&mut segments, number(offset)?, number(length)?)?;
        }
        if field(&block, more, 1) == [0] {
            return Ok(segments);
        }
        block = reader.block()?.ok_or(io::ErrorKind::UnexpectedEof)?;
        (start, count, more) = (0, 21, 504);
    }
}

fn in_records(extended: &Extended) -> io::Result<Vec<Segment>> {
    let wrong = || broken("the list of a sparse file's parts is not understood");
    let mut numbers = Vec::new();
    for (key, value) in &extended.records {
        match key.as_slice() {
            b"GNU.sparse.map" => {
                // The whole list at once; counts alone.
                numbers = value.split(|byte| *byte == b',').map(decimal).collect();
                break;
            }
            b"GNU.sparse.offset" | b"GNU.sparse.numbytes" => {
                // One after the other.
                if (numbers.len() % 2 == 0) != (key == b"GNU.sparse.offset") {
                    return wrong();
                }
                numbers.push(decimal(value));
            }
            _ => {}
        }
    }
    let mut segments = Vec::new();
    for pair in numbers.chunks(2) {
        match pair {
            [Some(offset), Some(length)] => add(&mut segments, *offset, *length)?,
            _ => return wrong(),
        }
    }
    let told = extended.number("GNU.sparse.numblocks")?;
    if told.is_some_and(|told| usize::try_from(told) != Ok(segments.len())) {
        return wrong();
    }
    Ok(segments)
}

/// Numbers in lines, up to the end of a block: their count, then two for each part.
fn before_content<R: Read>(reader: &mut Reader<R>) -> io::Result<Vec<Segment>> {
    let mut lines = Lines {
        reader,
        block: [0; BLOCK],
        next: BLOCK,
    };
    let count = lines.number()?;
    let mut segments = Vec::new();
    for _ in 0..size(count)? {
        let offset = lines.number()?;
        let length = lines.number()?;
        add(&mut segments, offset, length)?;
    }
    Ok(segments)
}

struct Lines<'a, R> {
    reader: &'a mut Reader<R>,
    block: [u8; BLOCK],
    next: usize,
}

impl<R: Read> Lines<'_, R> {
    fn number(&mut self) -> io::Result<i64> {
        let mut line = Vec::new();
        loop {
            if self.next == BLOCK {
                self.reader.read_exact(&mut self.block)?;
                self.next = 0;
            }
            let byte = self.block.get(self.next).copied().unwrap_or(0);
            self.next += 1;
            match byte {
                b'\n' => break,
                byte if line.len() < 20 => line.push(byte),
                _ => return broken("a number in a sparse file's list is too long"),
            }
        }
        match decimal(&line) {
            Some(number) => Ok(number),
            None => broken("the list of a sparse file's parts is not understood"),
        }
    }
}
