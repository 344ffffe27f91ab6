//! The tap: one frame a call, straight from and to guest memory.
//!
//! Its descriptor and its parts of memory go to the kernel here and nowhere else in
//! the device.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    sync::Arc,
};

use super::header::{HEADER, LONGEST};
use crate::devices::queue::{Chain, Reader};

/// Parts that the kernel takes at once (UIO_MAXIOV).
const IOV_MAX: usize = 1024;

/// The descriptor. A clone is the same.
#[derive(Clone, Debug)]
pub(super) struct Tap(pub(super) Arc<OwnedFd>);

/// What was read of one frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Length {
    /// Bytes of the frame, without its header.
    pub(super) frame: usize,
    /// How many of them lie in the chains; the others lie beside them.
    pub(super) direct: usize,
}

impl Tap {
    /// Reads one frame: its header into `header`, the frame into the chains, the first
    /// of which keeps room for a header, and what they do not take into `rest`, which
    /// has room for more than any frame. Of the chains no more parts are used than
    /// `expected` bytes need.
    ///
    /// `None` if it is longer than any frame, or shorter than its header.
    pub(super) fn read<'c>(
        &self,
        header: &mut [u8; HEADER],
        chains: impl IntoIterator<Item = &'c Chain>,
        expected: usize,
        rest: &mut [u8],
    ) -> io::Result<Option<Length>> {
        let mut parts = Vec::with_capacity(64);
        parts.push(iovec(header.as_mut_ptr(), HEADER));
        let (mut skip, mut direct) = (HEADER, 0_usize);
        'parts: for chain in chains {
            let mut writer = chain.writer();
            skip = skip.saturating_sub(writer.skip(skip));
            for slice in writer.split(LONGEST).slices() {
                if direct >= expected || parts.len().saturating_add(1) == IOV_MAX {
                    break 'parts;
                }
                direct = direct.saturating_add(slice.len());
                parts.push(iovec(slice.ptr_guard_mut().as_ptr(), slice.len()));
            }
        }
        parts.push(iovec(rest.as_mut_ptr(), rest.len()));
        // SAFETY: each part lies in `header` or `rest`, which nobody else has, or in
        // guest memory, which the chains keep and to which no reference exists.
        let len = unsafe { libc::readv(self.0.as_raw_fd(), parts.as_ptr(), count(&parts)) };
        let len = usize::try_from(len).map_err(|_| io::Error::last_os_error())?;
        if len == 0 {
            // No tap has an end, but what stands for one in tests.
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let frame = len.checked_sub(HEADER).filter(|frame| *frame <= LONGEST);
        Ok(frame.map(|frame| Length {
            frame,
            direct: direct.min(frame),
        }))
    }

    /// Writes one frame behind its header.
    pub(super) fn write(&self, header: &[u8; HEADER], frame: &Reader<'_>) -> io::Result<()> {
        let mut parts = Vec::with_capacity(64);
        parts.push(iovec(header.as_ptr().cast_mut(), HEADER));
        // A chain has as many parts as its queue is long at most.
        parts.extend(frame.slices().map(|slice| {
            let start = slice.ptr_guard().as_ptr().cast_mut();
            iovec(start, slice.len())
        }));
        // SAFETY: each part lies in `header` or in guest memory, which the reader
        // borrows; the kernel only reads them.
        let len = unsafe { libc::writev(self.0.as_raw_fd(), parts.as_ptr(), count(&parts)) };
        if len < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

fn iovec(start: *mut u8, len: usize) -> libc::iovec {
    libc::iovec {
        iov_base: start.cast(),
        iov_len: len,
    }
}

fn count(parts: &[libc::iovec]) -> libc::c_int {
    // At most IOV_MAX.
    libc::c_int::try_from(parts.len()).unwrap_or(0)
}
