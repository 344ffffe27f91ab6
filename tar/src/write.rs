//! Writes tar: ustar, with an extended header of pax before each entry that does not
//! fit into one.

use std::io::{self, Read, Write};

use crate::{BLOCK, Entry, Kind};

/// Longest name and target of a link in a header.
const MAX_NAME: usize = 100;
/// Greatest number in a field of twelve bytes, and of eight: octal, with a NUL.
const MAX_LONG: i64 = 0o777_7777_7777;
const MAX_SHORT: i64 = 0o777_7777;

/// An archive that is written from its beginning to its end.
#[derive(Debug)]
pub struct Writer<W> {
    output: W,
}

impl<W: Write> Writer<W> {
    /// Nothing is written yet.
    pub fn new(output: W) -> Self {
        Writer { output }
    }

    /// Writes an entry without content: what is no file, or an empty one.
    pub fn entry(&mut self, entry: &Entry) -> io::Result<()> {
        self.file(entry, &mut io::empty())
    }

    /// Writes a file of `entry.size` bytes: what `content` has beyond that is left out,
    /// what is missing of it is zeros, for the size is told before. Times have whole
    /// seconds; attributes and the time of the last use are not told.
    pub fn file(&mut self, entry: &Entry, content: &mut impl Read) -> io::Result<()> {
        self.header(entry)?;
        let size = stored(entry);
        let copied = io::copy(&mut content.take(size), &mut self.output)?;
        io::copy(&mut io::repeat(0).take(size - copied), &mut self.output)?;
        self.pad(size)
    }

    /// Writes nothing but a header: whoever looks for content finds the next one.
    pub fn header(&mut self, entry: &Entry) -> io::Result<()> {
        let records = records(entry);
        if !records.is_empty() {
            let header = Entry {
                name: b"pax".to_vec(),
                size: records.len() as u64,
                ..Entry::default()
            };
            self.output.write_all(&header_block(&header, b'x'))?;
            self.output.write_all(&records)?;
            self.pad(header.size)?;
        }
        let letter = match entry.kind {
            Kind::Regular => b'0',
            Kind::Link => b'1',
            Kind::Symlink => b'2',
            Kind::Char => b'3',
            Kind::Block => b'4',
            Kind::Directory => b'5',
            Kind::Fifo => b'6',
            Kind::Other(letter) => letter,
        };
        self.output.write_all(&header_block(entry, letter))
    }

    /// Writes the end. An archive without it is not whole.
    pub fn finish(mut self) -> io::Result<()> {
        self.output.write_all(&[0; 2 * BLOCK])?;
        self.output.flush()
    }

    /// Fills the last block of `size` bytes.
    fn pad(&mut self, size: u64) -> io::Result<()> {
        let padding = size.next_multiple_of(BLOCK as u64) - size;
        io::copy(&mut io::repeat(0).take(padding), &mut self.output)?;
        Ok(())
    }
}

/// Bytes of content that follow the header.
fn stored(entry: &Entry) -> u64 {
    match entry.kind {
        Kind::Regular => entry.size,
        _ => 0,
    }
}

/// What of an entry does not fit into its header.
fn records(entry: &Entry) -> Vec<u8> {
    let mut records = Vec::new();
    if entry.name.len() > MAX_NAME {
        record(&mut records, "path", &entry.name);
    }
    if entry.link.len() > MAX_NAME {
        record(&mut records, "linkpath", &entry.link);
    }
    let size = i64::try_from(stored(entry)).unwrap_or(i64::MAX);
    let numbers = [
        ("size", size, MAX_LONG),
        ("mtime", entry.mtime.seconds, MAX_LONG),
        ("uid", entry.uid, MAX_SHORT),
        ("gid", entry.gid, MAX_SHORT),
    ];
    for (key, number, most) in numbers {
        if !(0..=most).contains(&number) {
            record(&mut records, key, number.to_string().as_bytes());
        }
    }
    records
}

/// Adds `LENGTH KEY=VALUE\n`, whose length counts its own digits.
fn record(records: &mut Vec<u8>, key: &str, value: &[u8]) {
    // A space, an equals sign, a newline.
    let rest = key.len() + value.len() + 3;
    let mut length = rest;
    while length != rest + length.to_string().len() {
        length = rest + length.to_string().len();
    }
    records.extend(format!("{length} {key}=").into_bytes());
    records.extend(value);
    records.push(b'\n');
}

fn header_block(entry: &Entry, letter: u8) -> [u8; BLOCK] {
    let mut block = [0; BLOCK];
    put(&mut block, 0, MAX_NAME, &entry.name);
    octal(&mut block, 100, 8, entry.mode & 0o7777);
    octal(&mut block, 108, 8, entry.uid);
    octal(&mut block, 116, 8, entry.gid);
    let size = i64::try_from(stored(entry)).unwrap_or(i64::MAX);
    octal(&mut block, 124, 12, size);
    octal(&mut block, 136, 12, entry.mtime.seconds);
    put(&mut block, 148, 8, b"        ");
    put(&mut block, 156, 1, &[letter]);
    put(&mut block, 157, MAX_NAME, &entry.link);
    put(&mut block, 257, 8, b"ustar\x0000");
    octal(&mut block, 329, 8, entry.device.0);
    octal(&mut block, 337, 8, entry.device.1);
    let sum = block.iter().map(|byte| i64::from(*byte)).sum();
    octal(&mut block, 148, 8, sum);
    block
}

/// Writes as much of `value` as the field holds.
fn put(block: &mut [u8; BLOCK], start: usize, length: usize, value: &[u8]) {
    let field = block.iter_mut().skip(start).take(length);
    for (to, from) in field.zip(value) {
        *to = *from;
    }
}

/// A number with a NUL at its end; 0 if it is told before the header.
fn octal(block: &mut [u8; BLOCK], start: usize, length: usize, number: i64) {
    let most = if length == 12 { MAX_LONG } else { MAX_SHORT };
    let number = if (0..=most).contains(&number) {
        number
    } else {
        0
    };
    let digits = format!("{number:0width$o}\0", width = length - 1);
    put(block, start, length, digits.as_bytes());
}

#[cfg(test)]
mod tests;
