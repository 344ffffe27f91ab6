//! What stands before each frame (virtio 1.2, 5.1.6), on the queues and on the tap
//! alike: which checksum is still missing, and into which pieces the frame is to be
//! cut.
//!
//! Pure rules: what may be said to a guest, and what of a guest's words may be said to
//! the host's kernel.

use super::feature;

/// Bytes of the header.
pub(crate) const HEADER: usize = 12;

/// Bytes of an Ethernet header, and of the tag of a VLAN.
const ETHERNET: usize = 14;
const TAG: usize = 4;

/// Most bytes of a frame: with its header 65,562 (virtio 1.2, 5.1.6.3.1).
pub(super) const LONGEST: usize = 65_550;

/// The MTU of Ethernet, which a driver that does not take ours has.
const USUAL_MTU: u16 = 1500;

/// Flags.
pub(super) const NEEDS_CSUM: u8 = 1;
pub(super) const DATA_VALID: u8 = 2;

/// Kinds of segmentation, and a flag beside them.
pub(super) const NONE: u8 = 0;
pub(super) const TCP_V4: u8 = 1;
pub(super) const TCP_V6: u8 = 4;
pub(super) const ECN: u8 = 0x80;

/// A TCP header without options, and where its checksum is.
const TCP: usize = 20;
const TCP_CHECKSUM: u16 = 16;

/// Fewest bytes of TCP in a segment (Linux: TCP_MIN_GSO_SIZE). With fewer, a frame of
/// the guest's would be tens of thousands of the host's.
const LEAST_SEGMENT: u16 = 8;

/// The header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) flags: u8,
    pub(super) gso_type: u8,
    /// Bytes of all headers of the frame: a hint.
    pub(super) hdr_len: u16,
    /// Bytes of TCP in a segment.
    pub(super) gso_size: u16,
    /// From where to the end of the frame the checksum goes.
    pub(super) csum_start: u16,
    /// Where it is put, from there.
    pub(super) csum_offset: u16,
    /// Buffers that the frame lies in.
    pub(super) num_buffers: u16,
}

/// What both sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Terms {
    features: u64,
    /// Most bytes of a frame that is not to be cut.
    longest: usize,
}

impl Terms {
    pub(super) fn new(features: u64, mtu: u16) -> Terms {
        let mtu = if features & feature::MTU == 0 {
            mtu.max(USUAL_MTU)
        } else {
            mtu
        };
        Terms {
            features,
            longest: usize::from(mtu).saturating_add(ETHERNET + TAG).min(LONGEST),
        }
    }

    pub(super) fn has(self, feature: u64) -> bool {
        self.features & feature != 0
    }

    /// Most bytes of a frame that is not to be cut.
    pub(super) fn longest_whole(self) -> usize {
        self.longest
    }

    /// Most bytes of a frame for the guest that its driver is ready for.
    pub(super) fn longest_for_guest(self) -> usize {
        if self.has(feature::GUEST_TSO4 | feature::GUEST_TSO6) {
            LONGEST
        } else {
            self.longest
        }
    }

    /// Whether a frame may have so many bytes.
    pub(super) fn allow(self, header: &Header, frame: usize) -> bool {
        let longest = if header.gso_type == NONE {
            self.longest
        } else {
            LONGEST
        };
        (ETHERNET..=longest).contains(&frame)
    }
}

impl Header {
    pub(super) fn parse(bytes: &[u8; HEADER]) -> Header {
        let [flags, gso_type, a, b, c, d, e, f, g, h, i, j] = *bytes;
        Header {
            flags,
            gso_type,
            hdr_len: u16::from_le_bytes([a, b]),
            gso_size: u16::from_le_bytes([c, d]),
            csum_start: u16::from_le_bytes([e, f]),
            csum_offset: u16::from_le_bytes([g, h]),
            num_buffers: u16::from_le_bytes([i, j]),
        }
    }

    pub(super) fn bytes(self) -> [u8; HEADER] {
        let [a, b] = self.hdr_len.to_le_bytes();
        let [c, d] = self.gso_size.to_le_bytes();
        let [e, f] = self.csum_start.to_le_bytes();
        let [g, h] = self.csum_offset.to_le_bytes();
        let [i, j] = self.num_buffers.to_le_bytes();
        [self.flags, self.gso_type, a, b, c, d, e, f, g, h, i, j]
    }

    /// What the driver is told of a frame of the tap's, unless that asks for something
    /// that the driver did not offer to do (5.1.6.4.1).
    pub(super) fn for_guest(self, terms: Terms) -> Option<Header> {
        let (kind, ecn) = (self.gso_type & !ECN, self.gso_type & ECN != 0);
        let kind_offered = match kind {
            NONE => true,
            TCP_V4 => terms.has(feature::GUEST_TSO4),
            TCP_V6 => terms.has(feature::GUEST_TSO6),
            _ => false,
        };
        let sums = terms.has(feature::GUEST_CSUM);
        if !kind_offered
            || ecn && !terms.has(feature::GUEST_ECN)
            || self.flags & NEEDS_CSUM != 0 && !sums
        {
            return None;
        }
        // That a checksum was found right is a word that can be left out.
        let known = if sums { NEEDS_CSUM | DATA_VALID } else { 0 };
        Some(Header {
            flags: self.flags & known,
            ..self
        })
    }

    /// What the tap is told of a frame of the guest's with `frame` bytes, all of which
    /// are there; nothing if the driver's words make no sense for them, or ask for what
    /// was not negotiated (5.1.6.2).
    ///
    /// Where they mean nothing they are not passed on.
    pub(super) fn for_tap(self, terms: Terms, frame: usize) -> Option<Header> {
        let (start, offset) = (usize::from(self.csum_start), usize::from(self.csum_offset));
        if !terms.allow(&self, frame) || usize::from(self.hdr_len) > frame {
            return None;
        }
        let mut checked = Header::default();
        if self.flags & NEEDS_CSUM != 0 {
            let end = start.saturating_add(offset).saturating_add(2);
            if !terms.has(feature::CSUM) || start < ETHERNET || end > frame {
                return None;
            }
            checked.flags = NEEDS_CSUM;
            checked.csum_start = self.csum_start;
            checked.csum_offset = self.csum_offset;
        }
        let offered = match self.gso_type & !ECN {
            NONE if self.gso_type == NONE => return Some(checked),
            TCP_V4 => terms.has(feature::HOST_TSO4),
            TCP_V6 => terms.has(feature::HOST_TSO6),
            _ => false,
        };
        let headers = start.saturating_add(TCP);
        if !offered
            || self.gso_type & ECN != 0 && !terms.has(feature::HOST_ECN)
            || checked.flags & NEEDS_CSUM == 0
            || self.csum_offset != TCP_CHECKSUM
            || headers > frame
            || self.gso_size < LEAST_SEGMENT
        {
            return None;
        }
        // 5.1.6.2.2: the driver's is not to be relied on.
        let hdr_len = u16::try_from(headers).ok()?.max(self.hdr_len);
        Some(Header {
            gso_type: self.gso_type,
            gso_size: self.gso_size,
            hdr_len,
            ..checked
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const ALL: u64 = u64::MAX;

    /// A frame of TCP over IPv4 with 1000 bytes, to be cut.
    fn tcp() -> Header {
        Header {
            flags: NEEDS_CSUM,
            gso_type: TCP_V4,
            hdr_len: 54,
            gso_size: 100,
            csum_start: 34,
            csum_offset: 16,
            num_buffers: 0,
        }
    }

    fn for_tap(change: impl Fn(&mut Header), features: u64) -> Option<Header> {
        let mut header = tcp();
        change(&mut header);
        header.for_tap(Terms::new(features, 1500), 1000)
    }

    #[test]
    fn bytes_are_those_of_the_specification() {
        let header = Header {
            flags: 1,
            gso_type: 0x84,
            hdr_len: 0x0302,
            gso_size: 0x0504,
            csum_start: 0x0706,
            csum_offset: 0x0908,
            num_buffers: 0x0b0a,
        };
        let bytes = [1, 0x84, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11];
        assert_eq!(header.bytes(), bytes);
        assert_eq!(Header::parse(&bytes), header);
    }

    #[test]
    fn what_makes_sense_is_passed_on_and_nothing_else() {
        assert_eq!(for_tap(|_| {}, ALL), Some(tcp()));
        // Flags that nobody knows, the words of another direction, and a hint that is
        // too low.
        let odd = for_tap(
            |header| {
                header.flags = 0xff;
                header.num_buffers = 7;
                header.hdr_len = 3;
            },
            ALL,
        );
        assert_eq!(odd, Some(tcp()));
        let hint = for_tap(|header| header.hdr_len = 66, ALL);
        assert_eq!(hint.unwrap().hdr_len, 66);
        // Without a checksum and segments to be made nothing of the rest counts.
        let plain = for_tap(|header| (header.flags, header.gso_type) = (0, NONE), ALL);
        assert_eq!(plain, Some(Header::default()));
        let sum_only = for_tap(|header| header.gso_type = NONE, ALL);
        let expected = Header {
            flags: NEEDS_CSUM,
            csum_start: 34,
            csum_offset: 16,
            ..Header::default()
        };
        assert_eq!(sum_only, Some(expected));
        let v6 = for_tap(|header| header.gso_type = TCP_V6 | ECN, ALL);
        assert_eq!(v6.unwrap().gso_type, TCP_V6 | ECN);
    }

    #[test]
    fn words_that_make_no_sense_are_refused_b51() {
        type Change = fn(&mut Header);
        let changes: &[(&str, Change)] = &[
            ("hdr_len", |header| header.hdr_len = 1001),
            ("start", |header| {
                (header.gso_type, header.csum_start) = (NONE, 983);
            }),
            ("start that wraps", |header| {
                (header.gso_type, header.csum_start) = (NONE, u16::MAX);
            }),
            ("start in the Ethernet header", |header| {
                header.csum_start = 13;
            }),
            ("offset", |header| {
                (header.gso_type, header.csum_offset) = (NONE, 965);
            }),
            ("offset that wraps", |header| {
                (header.gso_type, header.csum_offset) = (NONE, u16::MAX);
            }),
            ("offset of no TCP", |header| header.csum_offset = 6),
            ("half of a TCP header", |header| header.csum_start = 981),
            ("no checksum", |header| header.flags = 0),
            ("size 0", |header| header.gso_size = 0),
            ("size 7", |header| header.gso_size = 7),
            ("type 255", |header| header.gso_type = 255),
            ("UFO", |header| header.gso_type = 3),
            ("USO", |header| header.gso_type = 5),
            ("ECN alone", |header| header.gso_type = ECN),
        ];
        for (name, change) in changes {
            assert_eq!(for_tap(change, ALL), None, "{name}");
        }
        // At the edge of what is refused.
        assert!(for_tap(|header| header.hdr_len = 1000, ALL).is_some());
        assert!(for_tap(|header| header.csum_start = 980, ALL).is_some());
        let last = |header: &mut Header| (header.gso_type, header.csum_offset) = (NONE, 964);
        assert!(for_tap(last, ALL).is_some());
    }

    #[test]
    fn what_was_not_negotiated_is_refused() {
        let v6 = |header: &mut Header| header.gso_type = TCP_V6;
        let ecn = |header: &mut Header| header.gso_type = TCP_V4 | ECN;
        assert_eq!(for_tap(|_| {}, ALL & !feature::CSUM), None);
        assert_eq!(for_tap(|_| {}, ALL & !feature::HOST_TSO4), None);
        assert_eq!(for_tap(v6, ALL & !feature::HOST_TSO6), None);
        assert_eq!(for_tap(ecn, ALL & !feature::HOST_ECN), None);
        assert!(for_tap(v6, ALL & !feature::HOST_TSO4).is_some());

        let guest = |gso_type, features| {
            let header = Header { gso_type, ..tcp() };
            header.for_guest(Terms::new(features, 1500)).is_some()
        };
        for (gso_type, missing) in [
            (NONE, feature::GUEST_CSUM),
            (TCP_V4, feature::GUEST_CSUM),
            (TCP_V4, feature::GUEST_TSO4),
            (TCP_V6, feature::GUEST_TSO6),
            (TCP_V4 | ECN, feature::GUEST_ECN),
        ] {
            assert!(guest(gso_type, ALL), "{gso_type}");
            assert!(!guest(gso_type, ALL & !missing), "{gso_type}");
        }
        assert!(!guest(3, ALL), "UFO");
        assert!(!guest(5, ALL), "USO");
        // A right checksum is no demand.
        let header = Header {
            flags: DATA_VALID,
            ..Header::default()
        };
        let told = header.for_guest(Terms::new(0, 1500));
        assert_eq!(told, Some(Header::default()));
        let told = header.for_guest(Terms::new(ALL, 1500));
        assert_eq!(told, Some(header));
    }

    #[test]
    fn only_what_is_to_be_cut_is_longer_than_the_mtu() {
        let plain = Header::default();
        for (features, mtu, longest) in [
            (ALL, 1500, 1518),
            (ALL, 1280, 1298),
            (ALL, 9000, 9018),
            // A driver that does not take it has 1500.
            (0, 1280, 1518),
            (0, 9000, 9018),
            // No frame is longer than the longest.
            (ALL, u16::MAX, LONGEST),
        ] {
            let terms = Terms::new(features, mtu);
            for (frame, allowed) in [
                (0, false),
                (13, false),
                (14, true),
                (longest, true),
                (longest + 1, false),
            ] {
                assert_eq!(plain.for_tap(terms, frame).is_some(), allowed, "{frame}");
                assert_eq!(terms.allow(&plain, frame), allowed, "{frame}");
            }
        }
        let terms = Terms::new(ALL, 1500);
        assert!(tcp().for_tap(terms, LONGEST).is_some());
        assert!(tcp().for_tap(terms, LONGEST + 1).is_none());
    }

    proptest! {
        #[test]
        fn whatever_a_driver_says_the_kernel_hears_sense_b51(
            bytes in prop_oneof![
                any::<[u8; HEADER]>(),
                // Near to what makes sense.
                (0..4_u8, 0..6_u8, 0..200_u16, 0..200_u16, 0..200_u16, prop_oneof![Just(16), 0..40_u16])
                    .prop_map(|(flags, gso_type, hdr_len, gso_size, csum_start, csum_offset)| {
                        Header { flags, gso_type, hdr_len, gso_size, csum_start, csum_offset, num_buffers: 0 }
                            .bytes()
                    }),
            ],
            frame in prop_oneof![0..300_usize, 0..70_000_usize],
            features in any::<u64>(),
        ) {
            let terms = Terms::new(features, 1500);
            if let Some(header) = Header::parse(&bytes).for_tap(terms, frame) {
                prop_assert!((ETHERNET..=LONGEST).contains(&frame));
                prop_assert!(usize::from(header.hdr_len) <= frame);
                prop_assert_eq!(header.num_buffers, 0);
                prop_assert_eq!(header.flags & !NEEDS_CSUM, 0);
                let end = usize::from(header.csum_start) + usize::from(header.csum_offset) + 2;
                if header.flags & NEEDS_CSUM == 0 {
                    prop_assert_eq!(header, Header::default());
                    prop_assert!(frame <= 1518);
                } else {
                    prop_assert!(end <= frame && terms.has(feature::CSUM));
                }
                if header.gso_type != NONE {
                    prop_assert!(matches!(header.gso_type & !ECN, TCP_V4 | TCP_V6));
                    prop_assert!(header.gso_size >= LEAST_SEGMENT);
                    prop_assert!(header.hdr_len >= header.csum_start + 20);
                    prop_assert!(usize::from(header.csum_start) + TCP <= frame);
                }
            }
        }
    }
}
