//! The cpio "newc" format, as the kernel's initramfs code reads it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).
//!
//! Owner, group and time are zero and inode numbers count from one, so that the
//! bytes depend on nothing but what was added, and in which order.

use anyhow::{Context, Result, ensure};

/// Name of the entry that ends an archive.
const TRAILER: &str = "TRAILER!!!";

/// An archive that grows by one entry after the other.
#[derive(Debug, Default)]
pub struct Archive {
    bytes: Vec<u8>,
    entries: u32,
}

/// What an entry is.
#[derive(Clone, Copy, Debug)]
pub enum Kind<'a> {
    /// A directory.
    Directory,
    /// A file with this content.
    File(&'a [u8]),
    /// A device.
    CharacterDevice {
        /// Which driver.
        major: u32,
        /// Which of its devices.
        minor: u32,
    },
}

impl Archive {
    /// Adds the entry `name`, relative to the root, with the permission bits
    /// `mode`. A directory comes before what is in it.
    ///
    /// # Errors
    ///
    /// The name is absolute or empty, or the file longer than 4 GiB.
    pub fn add(&mut self, name: &str, mode: u32, kind: Kind<'_>) -> Result<()> {
        ensure!(
            !name.is_empty() && !name.starts_with('/') && !name.contains('\0') && name != TRAILER,
            "Not a name for an archive: {name:?}"
        );
        // inode(7): the file types.
        let (file_type, links, data, (major, minor)) = match kind {
            Kind::Directory => (0o040_000, 2, &[][..], (0, 0)),
            Kind::File(data) => (0o100_000, 1, data, (0, 0)),
            Kind::CharacterDevice { major, minor } => (0o020_000, 1, &[][..], (major, minor)),
        };
        self.entries += 1;
        let len = u32::try_from(data.len()).context("A file is longer than the format allows")?;
        self.entry(
            name,
            [self.entries, file_type | mode, links, len, major, minor],
            data,
        );
        Ok(())
    }

    /// The archive as bytes.
    #[must_use]
    pub fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, [0, 0, 1, 0, 0, 0], &[]);
        self.bytes
    }

    fn entry(
        &mut self,
        name: &str,
        [inode, mode, links, len, major, minor]: [u32; 6],
        data: &[u8],
    ) {
        let name_len = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        // inode, mode, uid, gid, links, time, length, device (2), node (2), name, checksum
        for field in [
            inode, mode, 0, 0, links, 0, len, 0, 0, major, minor, name_len, 0,
        ] {
            self.bytes
                .extend_from_slice(format!("{field:08X}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(data);
        self.pad();
    }

    /// Headers and data begin at multiples of four bytes.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}
