//! How many bytes each side of a stream may still send (virtio 1.2, 5.10.6.3).
//!
//! Counters run freely and wrap at 2^32; only differences mean something. What
//! the guest says about its own buffers is used for its own stream only, so a
//! lie makes nothing but that stream slow.

use super::limits::STREAM_BUFFER;

/// The credit of one stream in both directions.
#[derive(Clone, Debug, Default)]
pub(super) struct Credit {
    /// Bytes taken from the guest.
    received: u32,
    /// Of these, bytes passed on to the host's socket.
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    announced: u32,
    /// Bytes sent to the guest.
    sent: u32,
    /// Of these, bytes that the guest says its program took.
    taken: u32,
    /// Size of the guest's buffer.
    guest_buffer: u32,
}

/// The guest sent more than it had credit for.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Overrun;

impl Credit {
    /// Notes the state of the guest's buffer, which each packet carries.
    ///
    /// A count outside what is in flight is ignored: two processors of a guest
    /// may put their packets in the ring in another order than they read the
    /// count, so an old one is no offence.
    pub(super) fn hear(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.guest_buffer = buf_alloc;
        if fwd_cnt.wrapping_sub(self.taken) <= self.in_flight() {
            self.taken = fwd_cnt;
        }
    }

    /// Bytes that may be sent to the guest now.
    pub(super) fn to_guest(&self) -> u32 {
        self.guest_buffer.saturating_sub(self.in_flight())
    }

    /// Notes `len` bytes, at most [`Self::to_guest`], as sent.
    pub(super) fn sent(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// Notes `len` bytes as received, if the guest had credit for them.
    pub(super) fn received(&mut self, len: u32) -> Result<(), Overrun> {
        let buffered = self.received.wrapping_sub(self.forwarded);
        if len > STREAM_BUFFER.saturating_sub(buffered) {
            return Err(Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// Notes `len` bytes as passed on to the host.
    pub(super) fn forwarded(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest should hear of room that it does not know of: half of
    /// the buffer, so that a steady sender neither stops nor gets an answer to
    /// each packet.
    pub(super) fn owes_update(&self) -> bool {
        self.forwarded.wrapping_sub(self.announced) >= STREAM_BUFFER / 2
    }

    /// `buf_alloc` and `fwd_cnt` for a packet that goes out now.
    pub(super) fn announce(&mut self) -> (u32, u32) {
        self.announced = self.forwarded;
        (STREAM_BUFFER, self.forwarded)
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.taken)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn about_to_wrap() -> Credit {
        Credit {
            received: u32::MAX - 10,
            forwarded: u32::MAX - 10,
            announced: u32::MAX - 10,
            sent: u32::MAX - 10,
            taken: u32::MAX - 10,
            guest_buffer: 100,
        }
    }

    #[test]
    fn credit_towards_the_guest_shrinks_as_bytes_go_and_grows_as_they_are_taken() {
        let mut credit = about_to_wrap();
        assert_eq!(credit.to_guest(), 100);
        credit.sent(60);
        assert_eq!(credit.to_guest(), 40);
        credit.hear(100, 9);
        assert_eq!(credit.to_guest(), 60);
    }

    #[test]
    fn lies_about_the_guests_buffer_never_give_more_than_it_claims_b57() {
        for (buf_alloc, fwd_cnt, credit_left) in [
            (0, 0, 0),
            (30, 0, 0),
            (100, 1000, 40),
            (100, u32::MAX, 40),
            (u32::MAX, 60, u32::MAX),
            (u32::MAX, 61, u32::MAX - 60),
        ] {
            let mut credit = Credit::default();
            credit.hear(100, 0);
            credit.sent(60);
            credit.hear(buf_alloc, fwd_cnt);
            assert_eq!(credit.to_guest(), credit_left, "{buf_alloc} {fwd_cnt}");
        }
    }

    #[test]
    fn a_guest_may_fill_its_buffer_and_not_one_byte_more_b57() {
        let mut credit = about_to_wrap();
        assert_eq!(credit.received(STREAM_BUFFER), Ok(()));
        assert_eq!(credit.received(1), Err(Overrun));
        credit.forwarded(2);
        assert_eq!(credit.received(3), Err(Overrun));
        assert_eq!(credit.received(u32::MAX), Err(Overrun));
        assert_eq!(credit.received(2), Ok(()));
    }

    #[test]
    fn room_is_announced_when_half_of_the_buffer_is_free_again() {
        let mut credit = about_to_wrap();
        assert_eq!(credit.received(STREAM_BUFFER), Ok(()));
        credit.forwarded(STREAM_BUFFER / 2 - 1);
        assert!(!credit.owes_update());
        credit.forwarded(1);
        assert!(credit.owes_update());
        let (buf_alloc, fwd_cnt) = credit.announce();
        assert_eq!(buf_alloc, STREAM_BUFFER);
        assert_eq!(fwd_cnt, (u32::MAX - 10).wrapping_add(STREAM_BUFFER / 2));
        assert!(!credit.owes_update());
    }

    /// A guest and a host that play by the rules, at random: neither stops for
    /// good and none oversteps.
    #[test]
    fn any_honest_exchange_keeps_both_sides_within_their_credit() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut below = |limit: u32| {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            u32::try_from(random % u64::from(limit.max(1))).unwrap()
        };
        let mut credit = about_to_wrap();
        let (mut guest_sent, mut guest_knows) = (credit.received, credit.announced);
        let mut guest_holds = 0;
        for _ in 0..100_000 {
            let free = STREAM_BUFFER - guest_sent.wrapping_sub(guest_knows);
            let len = below(free + 1);
            assert_eq!(credit.received(len), Ok(()));
            guest_sent = guest_sent.wrapping_add(len);
            let held = credit.received.wrapping_sub(credit.forwarded);
            credit.forwarded(below(held + 1));
            if credit.owes_update() {
                guest_knows = credit.announce().1;
            }
            let len = below(credit.to_guest() + 1);
            credit.sent(len);
            guest_holds += len;
            assert!(guest_holds <= 100);
            guest_holds -= below(guest_holds + 1);
            credit.hear(100, credit.sent.wrapping_sub(guest_holds));
            assert_eq!(credit.to_guest(), 100 - guest_holds);
        }
    }
}
