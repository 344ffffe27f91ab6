//! The disks and interfaces that a machine has now, with what can be asked of them and set
//! for them while they run.
//!
//! Whoever attaches one tells it here, and so does who takes it away. Nothing here waits
//! for a device or for the host.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::devices::{
    block,
    limit::{Limiter, Limits},
    net::{self, Counters, Limiters, Net},
};

/// By the numbers of their devices. A clone is the same.
#[derive(Clone, Debug, Default)]
pub(crate) struct Present(Arc<Mutex<BTreeMap<u8, Known>>>);

/// What is known of one.
#[derive(Clone, Debug)]
pub(crate) enum Known {
    Disk(Arc<Limiter>),
    Interface(Arc<Counters>, Limiters),
}

impl From<&block::Block> for Known {
    fn from(disk: &block::Block) -> Known {
        Known::Disk(disk.limiter())
    }
}

impl From<&Net> for Known {
    fn from(net: &Net) -> Known {
        Known::Interface(net.counters(), net.limiters())
    }
}

impl Present {
    pub(crate) fn add(&self, device: u8, known: Known) {
        self.all().insert(device, known);
    }

    pub(crate) fn remove(&self, device: u8) {
        self.all().remove(&device);
    }

    /// What has passed through the interfaces.
    pub(crate) fn interfaces(&self) -> Vec<(u8, net::Totals)> {
        self.each(|known| match known {
            Known::Interface(counters, limiters) => Some(counters.totals(limiters)),
            Known::Disk(_) => None,
        })
    }

    /// What became of requests to the disks.
    pub(crate) fn disks(&self) -> Vec<(u8, block::Totals)> {
        self.each(|known| match known {
            Known::Disk(limiter) => Some(block::Totals {
                held_us: limiter.held_us(),
            }),
            Known::Interface(..) => None,
        })
    }

    /// Limits a device from now on.
    pub(crate) fn limit(&self, device: u8, limits: Limits) -> Result<(), String> {
        let all = self.all();
        let known = all.get(&device);
        let known = known.ok_or_else(|| format!("no disk and no interface is device {device}"))?;
        let limits = match (known, limits) {
            (Known::Disk(limiter), Limits::Disk(limit)) => vec![(limiter, limit)],
            (Known::Interface(_, limiters), Limits::Interface { receive, transmit }) => {
                vec![(&limiters.receive, receive), (&limiters.transmit, transmit)]
            }
            (Known::Disk(_), Limits::Interface { .. }) => {
                return Err(format!("device {device} is a disk, not an interface"));
            }
            (Known::Interface(..), Limits::Disk(_)) => {
                return Err(format!("device {device} is an interface, not a disk"));
            }
        };
        if let Some(fault) = limits.iter().find_map(|(_, limit)| limit.fault()) {
            return Err(format!("device {device} {fault}"));
        }
        for (limiter, limit) in limits {
            limiter.set(limit);
        }
        Ok(())
    }

    fn each<T>(&self, of: impl Fn(&Known) -> Option<T>) -> Vec<(u8, T)> {
        let all = self.all();
        let told = all
            .iter()
            .map(|(device, known)| Some((*device, of(known)?)));
        told.flatten().collect()
    }

    fn all(&self) -> MutexGuard<'_, BTreeMap<u8, Known>> {
        // A panic ends the process: what it left is never seen.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;
    use crate::{
        devices::{
            block::{Access, Block},
            limit::{Limit, Rate},
            net::Options,
        },
        event_loop::EventLoop,
    };

    const LIMIT: Limit = Limit {
        bytes: Rate {
            per_second: 1,
            burst: 1,
        },
        operations: Rate {
            per_second: 0,
            burst: 0,
        },
    };

    const BOTH: Limits = Limits::Interface {
        receive: LIMIT,
        transmit: LIMIT,
    };

    /// Disk 3 and interface 5.
    fn present() -> (Present, Arc<Limiter>, Limiters) {
        let events = EventLoop::new("test").unwrap();
        let (file, read_only) = (tempfile::tempfile().unwrap(), Access::ReadOnly);
        let disk = Block::new(Arc::clone(&events), file, read_only, "disk".into()).unwrap();
        let (tap, _) = std::os::unix::net::UnixDatagram::pair().unwrap();
        tap.set_nonblocking(true).unwrap();
        let options = Options {
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
        };
        let net = Net::new(events, OwnedFd::from(tap), options).unwrap();
        let present = Present::default();
        present.add(3, Known::from(&disk));
        present.add(5, Known::from(&net));
        (present, disk.limiter(), net.limiters())
    }

    fn is_limited(limiter: &Limiter) -> bool {
        limiter.spend(1 << 20);
        !limiter.allows(1)
    }

    #[test]
    fn disks_and_interfaces_are_limited_by_themselves() {
        let (present, disk, net) = present();
        present.limit(3, Limits::Disk(LIMIT)).unwrap();
        assert!(is_limited(&disk) && !is_limited(&net.receive) && !is_limited(&net.transmit));
        present.limit(3, Limits::Disk(Limit::default())).unwrap();
        let transmit = Limits::Interface {
            receive: Limit::default(),
            transmit: LIMIT,
        };
        present.limit(5, transmit).unwrap();
        assert!(!is_limited(&disk) && !is_limited(&net.receive) && is_limited(&net.transmit));
        present.limit(5, BOTH).unwrap();
        assert!(is_limited(&net.receive));
    }

    #[test]
    fn a_limit_that_cannot_be_is_refused_and_changes_nothing() {
        let (present, disk, net) = present();
        let check = |device, limits, expected: &str| {
            assert_eq!(present.limit(device, limits), Err(expected.into()));
        };
        check(4, BOTH, "no disk and no interface is device 4");
        check(3, BOTH, "device 3 is a disk, not an interface");
        let limits = Limits::Disk(LIMIT);
        check(5, limits, "device 5 is an interface, not a disk");
        let wrong = Limit {
            operations: Rate {
                per_second: 0,
                burst: 9,
            },
            ..LIMIT
        };
        let because = "cannot have a burst of 9 operations without a rate";
        check(3, Limits::Disk(wrong), &format!("device 3 {because}"));
        let limits = Limits::Interface {
            receive: LIMIT,
            transmit: wrong,
        };
        check(5, limits, &format!("device 5 {because}"));
        present.remove(3);
        let limits = Limits::Disk(LIMIT);
        check(3, limits, "no disk and no interface is device 3");
        assert!(
            ![disk, net.receive, net.transmit]
                .iter()
                .any(|all| is_limited(all))
        );
    }

    #[test]
    fn how_long_each_was_held_back_is_told() {
        let (present, disk, net) = present();
        assert_eq!(present.disks(), [(3, block::Totals::default())]);
        assert_eq!(present.interfaces(), [(5, net::Totals::default())]);
        present.limit(3, Limits::Disk(LIMIT)).unwrap();
        present.limit(5, BOTH).unwrap();
        let held = || {
            let [(_, totals)] = present.interfaces()[..] else {
                panic!("one interface");
            };
            let disk = present.disks()[0].1.held_us;
            [disk, totals.received_held_us, totals.transmitted_held_us].map(|us| us > 0)
        };
        // Each waits for centuries.
        for (limiter, expected) in [
            (&net.transmit, [false, false, true]),
            (&disk, [true, false, true]),
            (&net.receive, [true, true, true]),
        ] {
            assert!(is_limited(limiter));
            while limiter.held_us() == 0 {}
            assert_eq!(held(), expected);
        }
    }
}
