//! Descriptor tables at random, and tables that another processor rewrites while
//! they are served.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestMemory, GuestMemoryMmap, VolatileSlice};

use super::super::testing::{Driver, Guest, INDIRECT, NEXT, WRITE, descriptor, interrupt};
use super::*;

/// Two pieces of RAM with a hole between them.
const LOW: u64 = 0x10_0000;
const HIGH: (u64, u64) = (0x1_0000_0000, 0x10_0000);
/// A table for indirect descriptors.
const TABLE: u64 = 0x8_0000;
const SIZE: u16 = 16;

fn with_a_hole() -> Arc<GuestMemoryMmap> {
    let (high, len) = HIGH;
    let ranges = [
        (GuestAddress(0), usize::try_from(LOW).unwrap()),
        (GuestAddress(high), usize::try_from(len).unwrap()),
    ];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).unwrap())
}

fn any_descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let address = prop_oneof![
        4 => 0..LOW,
        2 => HIGH.0..HIGH.0 + HIGH.1,
        2 => Just(TABLE),
        1 => prop::sample::select(vec![
            LOW - 1, LOW, HIGH.0 - 1, HIGH.0, HIGH.0 + HIGH.1 - 1, u64::MAX, u64::MAX - 15,
        ]),
    ];
    let len = prop_oneof![
        6 => 1..0x1000_u32,
        2 => (0..20_u32).prop_map(|entries| entries * 16),
        1 => prop::sample::select(vec![0, 0x10_0000, u32::MAX, u32::MAX - 1]),
    ];
    let flags = prop_oneof![
        4 => Just(NEXT),
        2 => Just(NEXT | WRITE),
        2 => Just(WRITE),
        1 => Just(INDIRECT),
        1 => 0..8_u16,
    ];
    (
        address,
        len,
        flags,
        prop_oneof![9 => 0..SIZE, 1 => any::<u16>()],
    )
}

/// Every part lies in one of the pieces, and their lengths are what the chain says.
fn check(chain: &Chain) {
    let bytes = |slices: &[VolatileSlice<'_>]| slices.iter().map(VolatileSlice::len).sum::<usize>();
    let (from, to) = (chain.reader(), chain.writer());
    let (read, write): (Vec<_>, Vec<_>) = (from.slices().collect(), to.slices().collect());
    assert!(read.len() + write.len() <= SIZE.into());
    assert_eq!(chain.readable_len(), bytes(&read));
    assert_eq!(chain.writable_len(), bytes(&write));
    assert!(chain.readable_len() + chain.writable_len() > 0);
}

proptest! {
    #[test]
    fn any_table_gives_bytes_of_memory_only_and_each_chain_back_once_b43_b44_b45(
        table in prop::collection::vec(any_descriptor(), usize::from(SIZE)),
        indirect in prop::collection::vec(any_descriptor(), 20),
        heads in prop::collection::vec(prop_oneof![20 => 0..SIZE, 1 => any::<u16>()], 1..16),
        skip in any::<usize>(),
    ) {
        let mem = with_a_hole();
        let mut driver = Driver::with_size(&mem, 0x1000, 0, SIZE);
        for (index, raw) in (0..).zip(&table) {
            driver.write_descriptor(index, *raw);
        }
        for (at, raw) in (TABLE..).step_by(16).zip(&indirect) {
            driver.write(at, &descriptor(*raw));
        }
        for head in &heads {
            driver.make_available(*head);
        }
        let irq = Arc::new(EventFd::new(0).unwrap());
        let mut ring = driver.ring(interrupt(&irq));
        let mut seen = Vec::new();
        while let Some(chain) = ring.pop() {
            check(&chain);
            // Cursors stay within, wherever they are cut.
            let mut reader = chain.reader();
            let mut front = reader.split(skip % 0x2000);
            let (mut a, mut b) = (vec![0; front.len().min(0x1000)], vec![0; reader.len().min(0x1000)]);
            front.read_exact(&mut a).unwrap();
            reader.read_exact(&mut b).unwrap();
            assert!(front.read_exact(&mut vec![0; front.len() + 1]).is_err());
            seen.push(chain.head());
            ring.give_back(chain, 0);
        }
        // In order, each once, up to a head that is none.
        let valid: Vec<u16> = heads.iter().copied().take_while(|head| *head < SIZE).collect();
        let used: Vec<u16> = driver.all_used().iter().map(|used| used.0).collect();
        prop_assert_eq!(&used, &valid);
        let mut used = VecDeque::from(used);
        for head in seen {
            while used.pop_front() != Some(head) {
                prop_assert!(!used.is_empty(), "a chain that was not available");
            }
        }
    }

    #[test]
    fn what_is_written_is_read_again_however_it_is_cut(
        lens in prop::collection::vec(1..300_u32, 1..8),
        cuts in prop::collection::vec(0..500_usize, 0..8),
        bytes in prop::collection::vec(any::<u8>(), 2400),
    ) {
        let mut guest = Guest::new();
        let buffers = |flags| {
            let starts = (0x1_0000_u64..).step_by(0x1000);
            starts.zip(&lens).map(move |(at, len)| (at, *len, flags)).collect::<Vec<_>>()
        };
        guest.driver.offer(&buffers(WRITE));
        guest.driver.offer(&buffers(0));
        let total: u32 = lens.iter().sum();
        let total = usize::try_from(total).unwrap();
        let chain = guest.ring.pop().unwrap();
        let mut writer = chain.writer();
        let mut rest = bytes.as_slice();
        for cut in &cuts {
            let mut part = writer.split(*cut);
            let (now, later) = rest.split_at(part.len());
            part.write_all(now).unwrap();
            prop_assert_eq!(part.written(), now.len());
            rest = later;
        }
        prop_assert_eq!(writer.write(rest), writer.written());
        prop_assert!(writer.is_empty());
        guest.ring.give_back(chain, total);

        let chain = guest.ring.pop().unwrap();
        // Through a file and back, without a copy.
        let file = tempfile::tempfile().unwrap();
        let mut reader = chain.reader();
        prop_assert_eq!(reader.write_at(&file, 5).unwrap(), total);
        prop_assert!(reader.is_empty());
        let mut back = vec![0; total];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut back, 5).unwrap();
        prop_assert_eq!(&back, &bytes[..total]);
        let mut cursor = chain.reader();
        let mut again = Vec::new();
        for cut in cuts {
            let mut part = vec![0; cut.min(cursor.len())];
            cursor.read_exact(&mut part).unwrap();
            again.extend(part);
        }
        let skipped = cursor.skip(usize::MAX);
        prop_assert_eq!(&again, &bytes[..total - skipped]);
    }
}

#[test]
fn a_processor_that_rewrites_descriptors_meanwhile_reaches_nothing_else_b46() {
    const GOOD: u64 = 0x4_0000;
    const LEN: u32 = 0x100;
    let mut guest = Guest::new();
    let mem = Arc::clone(&guest.driver.mem);
    let descriptors = guest.driver.base;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let good = [
                descriptor((GOOD, LEN, NEXT, 1)),
                descriptor((GOOD + 0x1000, LEN, WRITE, 0)),
            ];
            // Every mixture of these and the good ones is good or refused.
            let bad = [
                [descriptor((GOOD, u32::MAX, NEXT, 1)); 2],
                [descriptor((1 << 40, LEN, WRITE, 0)); 2],
                [descriptor((GOOD, LEN, INDIRECT, u16::MAX)); 2],
                [descriptor((u64::MAX - 8, LEN, NEXT, 0)); 2],
                [descriptor((GOOD, 0, NEXT, 0)); 2],
            ];
            for bad in bad.iter().cycle() {
                for table in [&good, bad] {
                    for (at, bytes) in (descriptors..).step_by(16).zip(table) {
                        mem.write_slice(bytes, GuestAddress(at)).unwrap();
                    }
                }
                if stop.load(Ordering::Relaxed) {
                    break;
                }
            }
        });
        let (mut served, mut refused) = (0, 0);
        while served < 20_000 || refused < 100 {
            guest.driver.make_available(0);
            let chain = guest.ring.pop();
            if let Some(chain) = chain {
                let (readable, writable) = (chain.readable_len(), chain.writable_len());
                assert!(readable % 0x100 == 0 && readable <= 0x1000, "{readable}");
                // What was walked stays so, whatever stands in the table now.
                let mut bytes = vec![0; readable];
                chain.reader().read_exact(&mut bytes).unwrap();
                let mut writer = chain.writer();
                assert_eq!(writer.write(&[0xaa; 0x2000]), writable);
                guest.ring.give_back(chain, writable);
                served += 1;
            } else {
                refused += 1;
            }
            assert_eq!(guest.driver.all_used().len(), 1, "back once");
        }
        stop.store(true, Ordering::Relaxed);
    });
    // Nothing but the two buffers was written to.
    let mut bytes = vec![0; 2 << 20];
    guest
        .driver
        .mem
        .read_slice(&mut bytes, GuestAddress(0))
        .unwrap();
    let outside = |at: &usize| {
        let at = u64::try_from(*at).unwrap();
        at >= 0x4000 && !(GOOD..GOOD + 0x2000).contains(&at)
    };
    let written = (0..bytes.len()).filter(outside).find(|at| bytes[*at] != 0);
    assert_eq!(written, None);
    assert!(guest.driver.mem.check_range(GuestAddress(GOOD), 0x2000));
}
