//! Reads tar: V7, ustar, star, GNU and pax (pax(1) of POSIX, tar(5), the GNU manual's
//! appendix on sparse files), by the same rules as Go's `archive/tar`, which is what
//! containerd and Docker read layers with.
//!
//! Not the `tar` crate: that one takes extended headers of any length into memory,
//! knows no sparse files of the pax forms, no times before 1970 and none that only
//! an extended header tells.
//!
//! Memory is bounded whatever the archive says; numbers are checked here, what names
//! mean is the caller's affair. [`Writer`] writes what any reader understands.

use std::io::{self, Read};

mod content;
mod sparse;
mod write;

pub use crate::{content::write_content, write::Writer};

/// Size of all blocks.
const BLOCK: usize = 512;

/// Longest extended header, long name or long link.
const MAX_EXTENSION: u64 = 1 << 20;

/// Most headers in a row that only describe the next one.
const MAX_EXTENSIONS: usize = 64;

/// A moment.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Time {
    /// Seconds since 1970.
    pub seconds: i64,
    /// Further nanoseconds, less than a second.
    pub nanoseconds: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    #[default]
    Regular,
    /// One more name of a file.
    Link,
    /// A symbolic link.
    Symlink,
    /// A character device.
    Char,
    /// A block device.
    Block,
    /// A directory.
    Directory,
    /// A FIFO.
    Fifo,
    /// Something else, by its letter.
    Other(u8),
}

/// Bytes of a file that are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Where they belong.
    pub offset: u64,
    /// How many.
    pub length: u64,
}

/// One entry, without its content.
#[derive(Clone, Debug, Default)]
pub struct Entry {
    /// As in the archive.
    pub name: Vec<u8>,
    /// Target of a link.
    pub link: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// Bytes of the file, with its holes.
    pub size: u64,
    /// Where the stored bytes belong; `None` for a file without holes.
    pub segments: Option<Vec<Segment>>,
    /// Permissions and more.
    pub mode: i64,
    /// Owner.
    pub uid: i64,
    /// Group.
    pub gid: i64,
    /// Last change.
    pub mtime: Time,
    /// Last use, if it is told.
    pub atime: Option<Time>,
    /// Number of a device: major, minor.
    pub device: (i64, i64),
    /// Extended attributes.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// An archive that is read from its beginning to its end.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    /// Bytes taken from `input`.
    position: u64,
    /// Stored bytes of the current entry that were not read.
    left: u64,
    /// What fills its last block.
    padding: u64,
    ended: bool,
}

/// An error of the archive.
fn broken<T>(reason: &str) -> io::Result<T> {
    Err(io::Error::new(
        io::ErrorKind::InvalidData,
        reason.to_owned(),
    ))
}

impl<R: Read> Reader<R> {
    /// Nothing is read yet.
    pub fn new(input: R) -> Self {
        Reader {
            input,
            position: 0,
            left: 0,
            padding: 0,
            ended: false,
        }
    }

    /// Where the stored bytes of the current entry begin, before any was read.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// The next entry; `None` at the end.
    pub fn next_entry(&mut self) -> io::Result<Option<Entry>> {
        let mut extended = Extended::default();
        for _ in 0..MAX_EXTENSIONS {
            self.skip()?;
            let Some(block) = self.header()? else {
                return Ok(None);
            };
            let raw = Raw::new(&block)?;
            match raw.letter {
                // Global headers: neither containerd nor Docker lets them count.
                b'g' => {
                    self.enter(raw.size)?;
                }
                b'x' => {
                    self.enter(raw.size)?;
                    let text = self.extension()?;
                    extended.records(&text)?;
                }
                b'L' => {
                    self.enter(raw.size)?;
                    extended.long_name = Some(until_nul(&self.extension()?).to_vec());
                }
                b'K' => {
                    self.enter(raw.size)?;
                    extended.long_link = Some(until_nul(&self.extension()?).to_vec());
                }
                _ => return self.entry(&block, raw, &extended).map(Some),
            }
        }
        broken("it has too many extended headers in a row")
    }

    /// The same for an input that can seek: content is not read.
    pub fn next_seeking(&mut self) -> io::Result<Option<Entry>>
    where
        R: io::Seek,
    {
        let ahead = self.left.saturating_add(self.padding);
        let Ok(offset) = i64::try_from(ahead) else {
            return broken("an entry is larger than any file");
        };
        self.input.seek_relative(offset)?;
        self.position = self.position.saturating_add(ahead);
        (self.left, self.padding) = (0, 0);
        self.next_entry()
    }

    fn entry(&mut self, block: &[u8; BLOCK], raw: Raw, extended: &Extended) -> io::Result<Entry> {
        let mut entry = raw.entry;
        let stored = extended.apply(&mut entry, raw.size)?;
        // The name of an old tar says what is a directory.
        if raw.letter == 0 && entry.name.ends_with(b"/") {
            entry.kind = Kind::Directory;
        }
        let stored = if matches!(entry.kind, Kind::Regular | Kind::Other(_)) {
            stored
        } else {
            0
        };
        self.enter(stored)?;
        entry.size = stored;
        sparse::find(self, &mut entry, raw.letter, block, extended)?;
        Ok(entry)
    }

    /// Sets up the content of an entry.
    fn enter(&mut self, size: u64) -> io::Result<()> {
        if i64::try_from(size).is_err() {
            return broken("an entry is larger than any file");
        }
        self.left = size;
        self.padding = size.next_multiple_of(BLOCK as u64).saturating_sub(size);
        Ok(())
    }

    /// Passes over what is left of the current entry.
    fn skip(&mut self) -> io::Result<()> {
        let count = self.left.saturating_add(self.padding);
        let skipped = io::copy(&mut self.input.by_ref().take(count), &mut io::sink())?;
        if skipped < count {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.position = self.position.saturating_add(count);
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The content of a header that describes the next one.
    fn extension(&mut self) -> io::Result<Vec<u8>> {
        if self.left > MAX_EXTENSION {
            return broken("an extended header is longer than 1 MiB");
        }
        let mut text = Vec::new();
        self.read_to_end(&mut text)?;
        if self.left > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(text)
    }

    /// A block as it is; `None` at the very end.
    fn block(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        let mut block = [0; BLOCK];
        let mut count = 0;
        while let Some(rest) = block.get_mut(count..).filter(|rest| !rest.is_empty()) {
            match self.input.read(rest) {
                Ok(0) if count == 0 => return Ok(None),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => count += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.position = self.position.saturating_add(BLOCK as u64);
        Ok(Some(block))
    }

    /// The next header; `None` at the end, which is two blocks of zeros, or nothing.
    fn header(&mut self) -> io::Result<Option<[u8; BLOCK]>> {
        if self.ended {
            return Ok(None);
        }
        let is_zero = |block: &[u8; BLOCK]| block.iter().all(|byte| *byte == 0);
        let first = self.block()?;
        if let Some(block) = first.filter(|block| !is_zero(block)) {
            return Ok(Some(block));
        }
        if first.is_some() && self.block()?.is_some_and(|block| !is_zero(&block)) {
            return broken("something follows its end");
        }
        self.ended = true;
        Ok(None)
    }
}

/// The stored bytes of the current entry.
impl<R: Read> Read for Reader<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let limit = usize::try_from(self.left).unwrap_or(usize::MAX);
        let wanted = buffer.len().min(limit);
        let Some(buffer) = buffer.get_mut(..wanted).filter(|buffer| !buffer.is_empty()) else {
            return Ok(0);
        };
        let count = self.input.read(buffer)?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left = self.left.saturating_sub(count as u64);
        self.position = self.position.saturating_add(count as u64);
        Ok(count)
    }
}

/// What a header block says by itself.
struct Raw {
    letter: u8,
    /// Stored bytes.
    size: u64,
    entry: Entry,
}

/// Which fields a header has after those of V7.
#[derive(PartialEq, Eq)]
enum Format {
    V7,
    Ustar,
    Star,
    Gnu,
}

fn field(block: &[u8; BLOCK], start: usize, length: usize) -> &[u8] {
    block.get(start..start + length).unwrap_or_default()
}

impl Raw {
    fn new(block: &[u8; BLOCK]) -> io::Result<Self> {
        check_sum(block)?;
        let format = match (field(block, 257, 6), field(block, 263, 2)) {
            (b"ustar\0", _) if field(block, 508, 4) == b"tar\0" => Format::Star,
            (b"ustar\0", _) => Format::Ustar,
            (b"ustar ", b" \0") => Format::Gnu,
            _ => Format::V7,
        };
        let letter = field(block, 156, 1).first().copied().unwrap_or(0);
        let kind = match letter {
            // 7: files that shall lie in one piece.
            0 | b'0' | b'7' => Kind::Regular,
            b'S' if format == Format::Gnu => Kind::Regular,
            b'1' => Kind::Link,
            b'2' => Kind::Symlink,
            b'3' => Kind::Char,
            b'4' => Kind::Block,
            b'5' => Kind::Directory,
            b'6' => Kind::Fifo,
            other => Kind::Other(other),
        };
        let Ok(size) = u64::try_from(number(field(block, 124, 12))?) else {
            return broken("the size of an entry is negative");
        };
        let mut entry = Entry {
            name: until_nul(field(block, 0, 100)).to_vec(),
            link: until_nul(field(block, 157, 100)).to_vec(),
            kind,
            size,
            segments: None,
            mode: number(field(block, 100, 8))?,
            uid: number(field(block, 108, 8))?,
            gid: number(field(block, 116, 8))?,
            mtime: Time {
                seconds: number(field(block, 136, 12))?,
                nanoseconds: 0,
            },
            atime: None,
            device: (0, 0),
            xattrs: Vec::new(),
        };
        if format != Format::V7 && matches!(kind, Kind::Char | Kind::Block) {
            entry.device = (number(field(block, 329, 8))?, number(field(block, 337, 8))?);
        }
        let atime = |start| {
            let text = field(block, start, 12);
            let told = text.first().is_some_and(|byte| *byte != 0);
            told.then(|| number(text)).transpose()
        };
        let mut prefix = &[][..];
        match format {
            Format::V7 => {}
            Format::Ustar => prefix = until_nul(field(block, 345, 155)),
            Format::Star => {
                prefix = until_nul(field(block, 345, 131));
                entry.atime = atime(476)?.map(whole);
            }
            Format::Gnu => match atime(345) {
                Ok(atime) => entry.atime = atime.map(whole),
                // Some writers put a prefix here, as if it were ustar.
                Err(_) => prefix = until_nul(field(block, 345, 155)),
            },
        }
        if !prefix.is_empty() {
            entry.name = [prefix, b"/", &entry.name].concat();
        }
        Ok(Raw {
            letter,
            size,
            entry,
        })
    }
}

fn whole(seconds: i64) -> Time {
    Time {
        seconds,
        nanoseconds: 0,
    }
}

/// The sum of all bytes, with spaces for the sum itself; some have added them signed.
fn check_sum(block: &[u8; BLOCK]) -> io::Result<()> {
    let told = number(field(block, 148, 8))?;
    let (mut unsigned, mut signed) = (0_i64, 0_i64);
    for (index, byte) in block.iter().enumerate() {
        let byte = if (148..156).contains(&index) {
            b' '
        } else {
            *byte
        };
        unsigned += i64::from(byte);
        signed += i64::from(byte.cast_signed());
    }
    if told == unsigned || told == signed {
        Ok(())
    } else {
        broken("the sum of a header is wrong")
    }
}

fn until_nul(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == 0).next().unwrap_or_default()
}

/// A number: octal, or in base 256 if the first bit is set (two's complement in the
/// other bits).
fn number(field: &[u8]) -> io::Result<i64> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a number is not understood");
    let first = field.first().copied().unwrap_or(0);
    if first & 0x80 == 0 {
        let fills = |byte: &u8| *byte == b' ' || *byte == 0;
        let start = field.iter().position(|byte| !fills(byte));
        let Some(text) = start.and_then(|start| field.get(start..)) else {
            return Ok(0);
        };
        let text = std::str::from_utf8(until_nul(text)).map_err(|_| wrong())?;
        let text = text.trim_end_matches(' ');
        if text.starts_with(['+', '-']) {
            return Err(wrong());
        }
        return i64::from_str_radix(text, 8).map_err(|_| wrong());
    }
    let inverted = if first & 0x40 == 0 { 0 } else { 0xff };
    let mut value = 0_u64;
    for (index, byte) in field.iter().enumerate() {
        let mut byte = byte ^ inverted;
        if index == 0 {
            byte &= 0x7f;
        }
        if value >> 56 != 0 {
            return Err(wrong());
        }
        value = value << 8 | u64::from(byte);
    }
    let value = i64::try_from(value).map_err(|_| wrong())?;
    Ok(if inverted == 0 { value } else { !value })
}

/// What the headers before an entry say of it.
#[derive(Debug, Default)]
struct Extended {
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    /// In order; a later one counts more.
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Extended {
    /// Reads the records of a pax header: `LENGTH KEY=VALUE\n` each.
    fn records(&mut self, mut text: &[u8]) -> io::Result<()> {
        // A second header replaces the first.
        self.records.clear();
        while !text.is_empty() {
            let Some((record, rest)) = split_record(text) else {
                return broken("an extended header is not understood");
            };
            let Some(equals) = record.iter().position(|byte| *byte == b'=') else {
                return broken("an extended header has a record without a value");
            };
            let (key, value) = record.split_at(equals);
            let value = value.get(1..).unwrap_or_default();
            if key.is_empty() || key.contains(&0) {
                return broken("an extended header has a record without a name");
            }
            self.records.push((key.to_vec(), value.to_vec()));
            text = rest;
        }
        Ok(())
    }

    /// The last value of `key`; an empty one counts as none.
    fn get(&self, key: &str) -> Option<&[u8]> {
        let mut records = self.records.iter().rev();
        let (_, value) = records.find(|(known, _)| known == key.as_bytes())?;
        (!value.is_empty()).then_some(value)
    }

    fn number(&self, key: &str) -> io::Result<Option<i64>> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        match decimal(value) {
            Some(number) => Ok(Some(number)),
            None => broken("an extended header has a number that is not understood"),
        }
    }

    /// Overrides what the header says; answers how many bytes are stored.
    fn apply(&self, entry: &mut Entry, size: u64) -> io::Result<u64> {
        if let Some(name) = self.get("path") {
            entry.name = name.to_vec();
        }
        if let Some(link) = self.get("linkpath") {
            entry.link = link.to_vec();
        }
        if let Some(name) = &self.long_name {
            entry.name.clone_from(name);
        }
        if let Some(link) = &self.long_link {
            entry.link.clone_from(link);
        }
        if let Some(uid) = self.number("uid")? {
            entry.uid = uid;
        }
        if let Some(gid) = self.number("gid")? {
            entry.gid = gid;
        }
        if let Some(text) = self.get("mtime") {
            entry.mtime = time(text)?;
        }
        if let Some(text) = self.get("atime") {
            entry.atime = Some(time(text)?);
        }
        for (key, value) in &self.records {
            if let Some(name) = key.strip_prefix(b"SCHILY.xattr.") {
                entry.xattrs.retain(|(known, _)| known != name);
                entry.xattrs.push((name.to_vec(), value.clone()));
            }
        }
        match self.number("size")?.map(u64::try_from) {
            None => Ok(size),
            Some(Ok(size)) => Ok(size),
            Some(Err(_)) => broken("the size of an entry is negative"),
        }
    }
}

/// The record that `text` begins with, without its length and newline, and the rest.
fn split_record(text: &[u8]) -> Option<(&[u8], &[u8])> {
    let space = text.iter().take(20).position(|byte| *byte == b' ')?;
    let length = usize::try_from(decimal(text.get(..space)?)?).ok()?;
    let record = text.get(space + 1..length)?;
    let record = record.strip_suffix(b"\n")?;
    Some((record, text.get(length..)?))
}

fn decimal(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    (!text.starts_with('+')).then_some(())?;
    text.parse().ok()
}

/// A time of an extended header: seconds, perhaps negative, perhaps with a fraction.
fn time(text: &[u8]) -> io::Result<Time> {
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "a time is not understood");
    let text = std::str::from_utf8(text).map_err(|_| wrong())?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = whole.starts_with('-');
    let seconds = match whole {
        "" | "-" => 0,
        whole => decimal(whole.as_bytes()).ok_or_else(wrong)?,
    };
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: u32 = digits.parse().map_err(|_| wrong())?;
    Ok(if negative && nanoseconds > 0 {
        Time {
            seconds: seconds.checked_sub(1).ok_or_else(wrong)?,
            nanoseconds: 1_000_000_000 - nanoseconds,
        }
    } else {
        Time {
            seconds,
            nanoseconds,
        }
    })
}

#[cfg(test)]
mod tests;
