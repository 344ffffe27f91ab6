//! The life of one stream: which step is legal when, and what it leads to.
//!
//! ```text
//!  host asks ──► Asked ──response──► Open ──both halves ended──► over
//!  guest asks ────────────────────────▲      or reset by either
//! ```
//!
//! Pure: no socket, no queue, no counter.

/// What a side will do no longer (virtio 1.2, 5.10.6.5: hints of
/// VIRTIO_VSOCK_OP_SHUTDOWN). Once said it stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Ended {
    /// It takes no more bytes.
    pub(super) receive: bool,
    /// It sends no more bytes.
    pub(super) send: bool,
}

impl Ended {
    pub(super) const BOTH: Ended = Ended {
        receive: true,
        send: true,
    };
    pub(super) const SEND: Ended = Ended {
        receive: false,
        send: true,
    };

    /// From the flags of a packet; unknown bits mean nothing.
    pub(super) fn from_flags(flags: u32) -> Ended {
        Ended {
            receive: flags & 1 != 0,
            send: flags & 2 != 0,
        }
    }

    /// For the flags of a packet.
    pub(super) fn flags(self) -> u32 {
        u32::from(self.receive) | u32::from(self.send) << 1
    }

    fn and(self, more: Ended) -> Ended {
        Ended {
            receive: self.receive || more.receive,
            send: self.send || more.send,
        }
    }
}

/// Where a stream stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    /// The host asked the guest for a connection and waits for the answer.
    Asked,
    /// Bytes flow in the directions that nobody has ended.
    Open {
        /// What the guest has ended.
        guest: Ended,
        /// What the host has ended.
        host: Ended,
    },
}

/// What can happen to a stream, a reset apart: that ends it in every state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// The guest asks for a connection with these ports.
    Request,
    /// The guest accepts the connection that the host asked for.
    Response,
    /// The guest sends bytes.
    Data,
    /// The guest tells of, or asks for, credit.
    Credit,
    /// The guest ends a direction or both.
    GuestEnds(Ended),
    /// The host's program ends a direction or both.
    HostEnds(Ended),
}

/// What follows from an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// The stream goes on.
    To(State),
    /// The guest has ended both directions: confirm by a reset; what it sent
    /// before still belongs to the host.
    Over,
    /// The event is not allowed here: reset.
    Refuse,
}

impl State {
    /// A stream on which nothing has ended.
    pub(super) const OPEN: State = State::Open {
        guest: Ended {
            receive: false,
            send: false,
        },
        host: Ended {
            receive: false,
            send: false,
        },
    };

    /// What follows from `event` in this state.
    pub(super) fn after(self, event: Event) -> Step {
        match (self, event) {
            (State::Asked, Event::Response) => Step::To(State::OPEN),
            (
                State::Asked,
                Event::Request
                | Event::Data
                | Event::Credit
                | Event::GuestEnds(_)
                | Event::HostEnds(_),
            )
            | (State::Open { .. }, Event::Request | Event::Response) => Step::Refuse,
            (State::Open { guest, .. }, Event::Data) if guest.send => Step::Refuse,
            (State::Open { .. }, Event::Data | Event::Credit) => Step::To(self),
            (State::Open { guest, host }, Event::GuestEnds(more)) => {
                let guest = guest.and(more);
                if guest == Ended::BOTH {
                    Step::Over
                } else {
                    Step::To(State::Open { guest, host })
                }
            }
            (State::Open { guest, host }, Event::HostEnds(more)) => Step::To(State::Open {
                guest,
                host: host.and(more),
            }),
        }
    }

    /// Whether bytes of the host's program still go to the guest.
    pub(super) fn flows_to_guest(self) -> bool {
        matches!(self, State::Open { guest, host } if !guest.receive && !host.send)
    }

    /// Whether bytes of the guest still go to the host's program.
    pub(super) fn flows_to_host(self) -> bool {
        matches!(self, State::Open { host, .. } if !host.receive)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECEIVE: Ended = Ended {
        receive: true,
        send: false,
    };
    const NONE: Ended = Ended {
        receive: false,
        send: false,
    };

    fn open(guest: Ended, host: Ended) -> State {
        State::Open { guest, host }
    }

    #[test]
    fn every_pair_of_state_and_event_has_the_step_of_the_table() {
        use Event::*;
        for (state, event, step) in [
            (State::Asked, Response, Step::To(State::OPEN)),
            (State::Asked, Request, Step::Refuse),
            (State::Asked, Data, Step::Refuse),
            (State::Asked, Credit, Step::Refuse),
            (State::Asked, GuestEnds(Ended::BOTH), Step::Refuse),
            (State::Asked, HostEnds(Ended::BOTH), Step::Refuse),
            (State::OPEN, Request, Step::Refuse),
            (State::OPEN, Response, Step::Refuse),
            (State::OPEN, Data, Step::To(State::OPEN)),
            (State::OPEN, Credit, Step::To(State::OPEN)),
            (
                State::OPEN,
                GuestEnds(Ended::SEND),
                Step::To(open(Ended::SEND, NONE)),
            ),
            (State::OPEN, GuestEnds(Ended::BOTH), Step::Over),
            (open(Ended::SEND, NONE), GuestEnds(RECEIVE), Step::Over),
            (open(Ended::SEND, NONE), Data, Step::Refuse),
            (open(RECEIVE, NONE), Data, Step::To(open(RECEIVE, NONE))),
            (
                State::OPEN,
                HostEnds(Ended::SEND),
                Step::To(open(NONE, Ended::SEND)),
            ),
            (
                open(NONE, Ended::SEND),
                HostEnds(RECEIVE),
                Step::To(open(NONE, Ended::BOTH)),
            ),
            (
                open(NONE, Ended::BOTH),
                Data,
                Step::To(open(NONE, Ended::BOTH)),
            ),
        ] {
            assert_eq!(state.after(event), step, "{state:?} {event:?}");
        }
    }

    #[test]
    fn what_a_side_ended_stays_ended() {
        let all = [NONE, RECEIVE, Ended::SEND, Ended::BOTH];
        for guest in all {
            for host in all {
                for more in all {
                    let Step::To(State::Open { host: now, .. }) =
                        open(guest, host).after(Event::HostEnds(more))
                    else {
                        panic!("the host may always end a direction");
                    };
                    assert_eq!(now.receive, host.receive || more.receive);
                    assert_eq!(now.send, host.send || more.send);
                }
            }
        }
    }

    #[test]
    fn flags_survive_a_round_trip_and_unknown_bits_are_dropped() {
        for flags in 0..16 {
            assert_eq!(Ended::from_flags(flags).flags(), flags & 3);
        }
    }

    #[test]
    fn bytes_flow_only_where_nobody_ended_the_direction() {
        assert!(!State::Asked.flows_to_guest() && !State::Asked.flows_to_host());
        assert!(State::OPEN.flows_to_guest() && State::OPEN.flows_to_host());
        assert!(!open(RECEIVE, NONE).flows_to_guest());
        assert!(!open(NONE, Ended::SEND).flows_to_guest());
        assert!(!open(NONE, RECEIVE).flows_to_host());
        assert!(open(Ended::SEND, NONE).flows_to_host());
    }
}
