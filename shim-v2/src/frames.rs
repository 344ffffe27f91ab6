//! ttrpc frames in a stream of bytes, which come in pieces of any length.

use ttrpc::proto::{MESSAGE_HEADER_LENGTH, MessageHeader};

use crate::carry::Bytes;

/// A part of a frame.
#[derive(Debug, Default)]
pub(crate) struct Part(Vec<u8>);

/// What became of a part.
#[derive(Debug)]
pub(crate) enum Next {
    /// A whole frame, header included.
    Frame(MessageHeader, Bytes),
    /// The header of one that is too long; its payload follows.
    TooLong(MessageHeader),
}

impl Part {
    /// Takes bytes from the front of `bytes` up to the end of a frame, or up to a header
    /// that announces more than `most` bytes; `None` if there is no end in them.
    pub(crate) fn next(&mut self, bytes: &mut &[u8], most: usize) -> Option<Next> {
        while !bytes.is_empty() {
            let whole = header(&self.0).map_or(MESSAGE_HEADER_LENGTH, length);
            let missing = whole.saturating_sub(self.0.len());
            let (new, rest) = bytes.split_at(missing.min(bytes.len()));
            self.0.extend_from_slice(new);
            *bytes = rest;
            let Some(header) = header(&self.0) else {
                continue;
            };
            if header.length as usize > most {
                self.0.clear();
                return Some(Next::TooLong(header));
            }
            if self.0.len() == length(header) {
                return Some(Next::Frame(header, std::mem::take(&mut self.0)));
            }
        }
        None
    }

    /// What there is of it.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl From<Bytes> for Part {
    fn from(bytes: Bytes) -> Self {
        Part(bytes)
    }
}

/// The header at the front of a frame, if that is there.
pub(crate) fn header(part: &[u8]) -> Option<MessageHeader> {
    part.get(..MESSAGE_HEADER_LENGTH).map(MessageHeader::from)
}

/// What follows the header of a whole frame.
pub(crate) fn payload(frame: &[u8]) -> &[u8] {
    frame.get(MESSAGE_HEADER_LENGTH..).unwrap_or_default()
}

fn length(header: MessageHeader) -> usize {
    MESSAGE_HEADER_LENGTH + header.length as usize
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn frames_are_found_however_they_are_cut(
            lengths in prop::collection::vec(0_u32..300, 0..8),
            cut in 1_usize..50,
        ) {
            let mut sent = Vec::new();
            for length in &lengths {
                sent.extend(Vec::from(MessageHeader::new_request(1, *length)));
                sent.resize(sent.len() + *length as usize, 0xff);
            }
            let (mut part, mut found) = (Part::default(), Vec::new());
            let mut whole = Vec::new();
            for mut piece in sent.chunks(cut) {
                while let Some(next) = part.next(&mut piece, 250) {
                    match next {
                        Next::Frame(header, frame) => {
                            prop_assert_eq!(payload(&frame).len(), header.length as usize);
                            found.push(header.length);
                            whole.extend(frame);
                        }
                        Next::TooLong(header) => {
                            prop_assert!(header.length > 250);
                            return Ok(());
                        }
                    }
                }
            }
            prop_assert_eq!(found, lengths);
            prop_assert_eq!(whole, sent);
            prop_assert!(part.bytes().is_empty());
        }
    }
}
