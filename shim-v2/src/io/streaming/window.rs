//! Credit for who sends to us.

use super::link::{Ended, Link};

/// Bytes that may be on their way.
const BYTES: usize = 64 << 10;

/// What the sender may still send.
#[derive(Debug, Default)]
pub(super) struct Window {
    granted: usize,
}

impl Window {
    /// Grants credit, once half of it is used up.
    pub(super) async fn open(&mut self, link: &Link) -> Result<(), Ended> {
        if self.granted < BYTES / 2 {
            let credit = i32::try_from(BYTES - self.granted).unwrap_or(0);
            link.grant(credit).await.map_err(|_| Ended::Broken)?;
            self.granted = BYTES;
        }
        Ok(())
    }

    /// So many bytes have come.
    pub(super) fn took(&mut self, bytes: usize) {
        self.granted = self.granted.saturating_sub(bytes);
    }
}
