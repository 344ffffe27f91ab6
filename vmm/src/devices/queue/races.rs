//! Who wakes whom, in every order that the memory model allows: the device's half
//! is the real one, its rings are loom's atomics, and the driver is written as
//! virtio 1.2, 2.7 asks of it. A model ends in a deadlock, which fails it, when both
//! sides sleep with something left to do.

use loom::{
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU16, fence},
    },
    thread,
};

use super::split::{Broken, Rings, Split, State, Word};
use std::sync::atomic::Ordering;

const SIZE: u16 = 2;

/// Rings of two entries. That heads and used elements are seen once the index is
/// is asserted by their values.
#[derive(Default)]
struct Shared {
    available: AtomicU16,
    available_event: AtomicU16,
    used: AtomicU16,
    used_flags: AtomicU16,
    used_event: AtomicU16,
    heads: [AtomicU16; SIZE as usize],
    elements: [AtomicU16; SIZE as usize],
}

impl Shared {
    fn word(&self, word: Word) -> &AtomicU16 {
        match word {
            Word::Available => &self.available,
            Word::AvailableEvent => &self.available_event,
            Word::Used => &self.used,
            Word::UsedFlags => &self.used_flags,
            Word::UsedEvent => &self.used_event,
        }
    }
}

impl Rings for Arc<Shared> {
    fn load(&self, word: Word, order: Ordering) -> Result<u16, Broken> {
        Ok(self.word(word).load(order))
    }
    fn store(&self, word: Word, value: u16, order: Ordering) -> Result<(), Broken> {
        self.word(word).store(value, order);
        Ok(())
    }
    fn head(&self, slot: u16) -> Result<u16, Broken> {
        Ok(self.heads[usize::from(slot)].load(Ordering::Relaxed))
    }
    fn put(&self, slot: u16, head: u16, _: u32) -> Result<(), Broken> {
        self.elements[usize::from(slot)].store(head, Ordering::Relaxed);
        Ok(())
    }
    fn fence(&self) {
        fence(Ordering::SeqCst);
    }
}

/// An eventfd, or an interrupt that stays pending until it is taken.
#[derive(Default)]
struct Event(Mutex<bool>, Condvar);

impl Event {
    fn signal(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_one();
    }

    fn wait(&self) {
        let mut signalled = self.0.lock().unwrap();
        while !std::mem::take(&mut *signalled) {
            signalled = self.1.wait(signalled).unwrap();
        }
    }
}

fn state(event_index: bool, start: u16) -> State {
    State {
        size: SIZE,
        event_index,
        descriptors: 0,
        available: 0,
        used: 0,
        next_available: start,
        next_used: start,
    }
}

/// A driver that makes `count` chains available one by one, notifying as it is
/// asked to, then waits for all of them to come back.
fn drive(shared: &Shared, event_index: bool, start: u16, count: u16, kick: &Event, irq: &Event) {
    for position in (0..count).map(|at| start.wrapping_add(at)) {
        let slot = usize::from(position % SIZE);
        shared.heads[slot].store(position % SIZE, Ordering::Relaxed);
        let next = position.wrapping_add(1);
        shared.available.store(next, Ordering::Release);
        // 2.7.13.4: a barrier between the index and the look at the wish.
        fence(Ordering::SeqCst);
        let wanted = if event_index {
            shared.available_event.load(Ordering::Relaxed) == position
        } else {
            shared.used_flags.load(Ordering::Relaxed) == 0
        };
        if wanted {
            kick.signal();
        }
    }
    let mut seen = start;
    while seen != start.wrapping_add(count) {
        let used = shared.used.load(Ordering::Acquire);
        if used == seen {
            if event_index {
                shared.used_event.store(seen, Ordering::Relaxed);
                fence(Ordering::SeqCst);
                if shared.used.load(Ordering::Acquire) != seen {
                    continue;
                }
            }
            irq.wait();
            continue;
        }
        while seen != used {
            let slot = usize::from(seen % SIZE);
            let head = shared.elements[slot].load(Ordering::Relaxed);
            assert_eq!(head, seen % SIZE, "an element is seen with its index");
            seen = seen.wrapping_add(1);
        }
    }
}

/// When the device interrupts.
#[derive(Clone, Copy, PartialEq)]
enum Tells {
    /// After each turn, as `Ring::turn`.
    EachTurn,
    /// After each chain, as a thread with `Ring::pop`, `give_back` and `tell`.
    EachChain,
}

fn serve(shared: Arc<Shared>, state: &State, tells: Tells, count: u16, kick: &Event, irq: &Event) {
    let mut split = Split::new(shared, state);
    let mut done = 0;
    while done < count {
        if tells == Tells::EachTurn {
            split.silence().unwrap();
        }
        loop {
            if let Some(head) = split.take().unwrap() {
                assert_eq!(head, state.next_available.wrapping_add(done) % SIZE);
                split.use_up(head, 0).unwrap();
                done += 1;
                if tells == Tells::EachChain && split.interrupts().unwrap() {
                    irq.signal();
                }
            } else if !split.listen().unwrap() {
                break;
            }
        }
        if split.interrupts().unwrap() {
            irq.signal();
        }
        if done < count {
            kick.wait();
        }
    }
}

fn nobody_sleeps_for_ever(tells: Tells, event_index: bool, start: u16) {
    let mut model = loom::model::Builder::new();
    // More switches than two add nothing but time: a missed wake-up needs one.
    model.preemption_bound = Some(2);
    model.check(move || {
        let shared = Arc::new(Shared::default());
        for word in [
            Word::Available,
            Word::AvailableEvent,
            Word::Used,
            Word::UsedEvent,
        ] {
            shared.word(word).store(start, Ordering::Relaxed);
        }
        let (kick, irq) = (Arc::new(Event::default()), Arc::new(Event::default()));
        let device = {
            let (shared, kick, irq) = (Arc::clone(&shared), Arc::clone(&kick), Arc::clone(&irq));
            let state = state(event_index, start);
            thread::spawn(move || serve(shared, &state, tells, SIZE, &kick, &irq))
        };
        drive(&shared, event_index, start, SIZE, &kick, &irq);
        device.join().unwrap();
    });
}

#[test]
fn no_wake_up_is_missed_by_a_loop_with_the_event_index() {
    // The positions wrap.
    nobody_sleeps_for_ever(Tells::EachTurn, true, u16::MAX);
}

#[test]
fn no_wake_up_is_missed_by_a_thread_with_the_event_index() {
    nobody_sleeps_for_ever(Tells::EachChain, true, 0);
}

#[test]
fn no_wake_up_is_missed_without_the_event_index() {
    nobody_sleeps_for_ever(Tells::EachTurn, false, 0);
    nobody_sleeps_for_ever(Tells::EachChain, false, 0);
}
