//! What a limit needs of the threads that wait for it, and of those that set it.

use super::*;
use crate::devices::limit::{Limit, Limiter, Rate};

/// A limiter that lets nothing pass.
fn limiter() -> Limiter {
    let limiter = Limiter::new().unwrap();
    limiter.set(Limit {
        bytes: Rate {
            per_second: 1,
            burst: 1,
        },
        ..Limit::default()
    });
    limiter.spend(1 << 20);
    limiter
}

#[test]
fn who_waits_for_a_limit_and_who_sets_it_may_do_so() {
    outside("limited::waits_and_sets", |_| {});
}

#[test]
#[ignore = "the inner half of the test above"]
fn waits_and_sets() {
    let confined = enter(Some(&root())).unwrap();
    report_violations(Some(2)).unwrap();
    let (done, outcomes) = mpsc::channel();
    let first = Arc::new(limiter());
    let shared = Arc::clone(&first);
    start(&confined, move |kind| {
        let waited = match kind {
            ThreadKind::Devices | ThreadKind::Disk | ThreadKind::Network => !shared.allows(1),
            // Makes them for those that come.
            ThreadKind::Hotplug => !limiter().allows(1),
            // Stops what waits.
            _ => {
                shared.leave();
                false
            }
        };
        done.send((kind, waited)).unwrap();
    });
    confined.close().unwrap();
    let all: Vec<_> = outcomes.iter().collect();
    assert_eq!(
        all.iter().filter(|(_, waited)| *waited).count(),
        5,
        "{all:?}"
    );
    assert!(!first.allows(1));
    first.set(Limit::default());
    assert!(first.allows(1));
    meet();
}
