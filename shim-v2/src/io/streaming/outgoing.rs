//! Bytes on their way to a receiver that grants credit. No I/O.
//!
//! The first grant on a link opens the window; each later one also acknowledges as
//! much of what was sent before it. That is all a receiver ever says, so what it took
//! after its last grant counts as not taken: on the next link it gets that again,
//! rather than never.

use std::collections::VecDeque;

/// Longest message, in bytes.
const MESSAGE: usize = 32 << 10;
/// So much is kept for a receiver that grants more than this before it takes anything:
/// twice the window of containerd's.
const KEPT: usize = 128 << 10;

/// What was sent and is not acknowledged, then what is not sent yet.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    bytes: VecDeque<u8>,
    /// So many of them were sent on this link.
    sent: usize,
    /// So many more may be sent.
    credit: usize,
    opened: bool,
}

impl Outgoing {
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend(bytes);
    }

    /// The receiver grants credit; what is not positive is none.
    pub(super) fn grant(&mut self, credit: i32) {
        let credit = usize::try_from(credit).unwrap_or(0);
        if self.opened {
            self.forget(credit.min(self.sent));
        }
        self.opened = true;
        self.credit = self.credit.saturating_add(credit);
    }

    /// The next message, if there is something to send and credit for it.
    pub(super) fn next(&mut self) -> Option<Vec<u8>> {
        let length = MESSAGE.min(self.credit).min(self.unsent());
        if length == 0 {
            return None;
        }
        let message = self.bytes.range(self.sent..self.sent + length);
        let message = message.copied().collect();
        self.sent += length;
        self.credit -= length;
        self.forget(self.sent.saturating_sub(KEPT));
        Some(message)
    }

    /// There is another link, on which nothing was sent or granted.
    pub(super) fn relink(&mut self) {
        self.sent = 0;
        self.credit = 0;
        self.opened = false;
    }

    /// Bytes that were not sent on this link.
    pub(super) fn unsent(&self) -> usize {
        self.bytes.len() - self.sent
    }

    /// All was sent and acknowledged.
    pub(super) fn is_settled(&self) -> bool {
        self.bytes.is_empty()
    }

    fn forget(&mut self, sent: usize) {
        self.bytes.drain(..sent);
        self.sent -= sent;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn nothing_is_sent_without_credit_and_no_message_is_longer_than_32_kib_io_21() {
        let mut out = Outgoing::default();
        out.push(&vec![b'x'; 100 << 10]);
        assert_eq!(out.next(), None);
        out.grant(64 << 10);
        let sent: Vec<usize> = std::iter::from_fn(|| Some(out.next()?.len())).collect();
        assert_eq!(sent, [32 << 10, 32 << 10]);
        out.grant(-5);
        assert_eq!(out.next(), None);
        out.grant(10);
        assert_eq!(out.next().unwrap().len(), 10);
    }

    #[test]
    fn what_no_credit_has_acknowledged_is_sent_again_io_22() {
        let mut out = Outgoing::default();
        out.grant(100);
        out.push(b"one two three");
        assert_eq!(out.next().unwrap(), b"one two three");
        out.grant(4);
        out.relink();
        assert_eq!(out.next(), None);
        out.grant(100);
        assert_eq!(out.next().unwrap(), b"two three");
        out.grant(100);
        assert!(out.is_settled());
    }

    #[derive(Clone, Debug)]
    enum Step {
        Push(Vec<u8>),
        Grant(i32),
        Next,
        Relink,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            prop::collection::vec(any::<u8>(), 0..50).prop_map(Step::Push),
            (-3..60_i32).prop_map(Step::Grant),
            Just(Step::Next),
            Just(Step::Relink),
        ]
    }

    proptest! {
        /// A receiver that keeps to the protocol (it grants what it took) and forgets
        /// nothing over its links sees every byte, in order, whatever breaks when.
        #[test]
        fn a_receiver_sees_all_bytes_in_order_io_22(steps in prop::collection::vec(step(), 0..80)) {
            let mut out = Outgoing::default();
            let (mut all, mut seen) = (Vec::new(), Vec::new());
            // Where in `all` this link began, and how far it has come.
            let (mut acknowledged, mut at, mut owed, mut opened) = (0, 0, 0_usize, false);
            for step in steps {
                match step {
                    Step::Push(bytes) => {
                        out.push(&bytes);
                        all.extend(bytes);
                    }
                    Step::Grant(credit) => {
                        if opened {
                            let credit = usize::try_from(credit).unwrap_or(0).min(owed);
                            owed -= credit;
                            acknowledged += credit;
                            out.grant(i32::try_from(credit).unwrap());
                        } else {
                            opened = true;
                            out.grant(credit);
                        }
                    }
                    Step::Next => {
                        if let Some(message) = out.next() {
                            prop_assert_eq!(&all[at..at + message.len()], &message[..]);
                            at += message.len();
                            owed += message.len();
                            let new = seen.len().min(at);
                            seen.extend_from_slice(&all[new..at]);
                        }
                    }
                    Step::Relink => {
                        out.relink();
                        (at, owed, opened) = (acknowledged, 0, false);
                    }
                }
            }
            prop_assert_eq!(&all[..seen.len()], &seen[..]);
            prop_assert_eq!(out.unsent(), all.len() - at);
        }
    }
}
