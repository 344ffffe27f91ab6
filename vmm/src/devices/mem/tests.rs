use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::testing::{Driver, READ, WRITE, interrupt, memory};
use super::*;

const START: u64 = 4 << 30;
/// Where the driver has request and answer.
const ASKED: u64 = 0x10_0000;
const TOLD: u64 = 0x11_0000;

const ACK: u64 = 0;
const NACK: u64 = 1;
const ERROR: u64 = 3;

/// A driver, and 16 blocks of address space of which `usable` are memory.
struct Guest {
    driver: Driver,
    events: Arc<EventLoop>,
    pool: Arc<Pool>,
    irq: Arc<EventFd>,
    memory: Memory,
    device: Mem,
    worker: Box<dyn Worker>,
}

fn guest(usable: u64, requested: u64) -> Guest {
    let own = memory(2 << 20);
    let driver = Driver::new(&own, 0x1000, 0x1000);
    let memory = Memory::from(own);
    memory.grow(START, usable * BLOCK, |_| Ok(())).unwrap();
    let pool = Arc::new(Pool::new(START, 16 * BLOCK, memory.clone()));
    pool.ask(requested * BLOCK, usable * BLOCK);
    let events = EventLoop::new("test").unwrap();
    let irq = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let acknowledged = EventFd::new(EFD_NONBLOCK).unwrap();
    let mut device = Mem::new(Arc::clone(&events), Arc::clone(&pool), acknowledged);
    let worker = device.activate(Io {
        queues: vec![Some(driver.ring(interrupt(&irq)))],
        features: 0,
    });
    let mut guest = Guest {
        driver,
        events,
        pool,
        irq,
        memory,
        device,
        worker: worker.unwrap(),
    };
    guest.turn();
    guest
}

impl Guest {
    fn turn(&mut self) {
        self.events.turn().unwrap();
    }

    /// Kind and state of the answer to a request.
    fn ask(&mut self, kind: u16, block: u64, count: u16) -> (u64, u16) {
        self.ask_raw(kind, START.wrapping_add(block.wrapping_mul(BLOCK)), count)
    }

    fn ask_raw(&mut self, kind: u16, address: u64, count: u16) -> (u64, u16) {
        let mut request = [0; REQUEST];
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&address.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        self.driver.write(ASKED, &request);
        let head = self.driver.offer(&[(ASKED, 24, READ), (TOLD, 10, WRITE)]);
        self.driver.notify();
        self.turn();
        assert_eq!(self.driver.all_used(), [(head, 10)]);
        let answer = self.driver.read(TOLD, 10);
        let kind = u64::from_le_bytes(answer[..8].try_into().unwrap());
        (kind, u16::from_le_bytes([answer[8], answer[9]]))
    }

    /// usable, plugged and requested blocks, as the driver reads them.
    fn told(&self) -> [u64; 3] {
        let config = self.device.config();
        assert_eq!(config.len(), 56);
        [32, 40, 48].map(|at| u64::from_le_bytes(config[at..at + 8].try_into().unwrap()) / BLOCK)
    }
}

#[test]
fn the_driver_reads_where_and_how_much_memory_it_is_to_have() {
    let guest = guest(8, 5);
    let config = guest.device.config();
    let words: Vec<u64> = config
        .as_chunks()
        .0
        .iter()
        .map(|bytes| u64::from_le_bytes(*bytes))
        .collect();
    let blocks = |count| count * BLOCK;
    assert_eq!(
        words,
        [BLOCK, 0, START, blocks(16), blocks(8), 0, blocks(5)]
    );
    assert_eq!((guest.device.id(), guest.device.features()), (24, 2));
}

#[test]
fn blocks_are_plugged_up_to_what_is_asked_for_and_unplugged_again() {
    let mut guest = guest(8, 5);
    assert_eq!(guest.ask(request::PLUG, 0, 2), (ACK, 0));
    assert_eq!(guest.ask(request::PLUG, 3, 3), (ACK, 0));
    assert_eq!(guest.told(), [8, 5, 5]);
    assert_eq!(guest.ask(request::PLUG, 7, 1), (NACK, 0), "enough");
    assert_eq!(guest.ask(request::STATE, 0, 2), (ACK, Answer::PLUGGED));
    assert_eq!(guest.ask(request::STATE, 2, 1), (ACK, Answer::UNPLUGGED));
    assert_eq!(guest.ask(request::STATE, 0, 8), (ACK, Answer::MIXED));
    assert_eq!(guest.ask(request::UNPLUG, 3, 2), (ACK, 0));
    assert_eq!(guest.pool.plugged(), 3 * BLOCK);
    assert_eq!(guest.ask(request::PLUG, 6, 2), (ACK, 0));
    assert_eq!(guest.ask(request::UNPLUG_ALL, 0, 0), (ACK, 0));
    assert_eq!(guest.told(), [8, 0, 5]);
}

#[test]
fn what_is_unplugged_is_the_hosts_again() {
    let mut guest = guest(8, 8);
    guest.ask(request::PLUG, 0, 8);
    let at = |block: u64| GuestAddress(START + block * BLOCK + 5);
    for block in 0..8 {
        guest.memory.now().write_obj(9_u8, at(block)).unwrap();
    }
    guest.ask(request::UNPLUG, 2, 3);
    let left: Vec<u8> = (0..8)
        .map(|block| guest.memory.now().read_obj(at(block)).unwrap())
        .collect();
    assert_eq!(left, [9, 9, 0, 0, 0, 9, 9, 9]);
    guest.ask(request::UNPLUG_ALL, 0, 0);
    assert_eq!(guest.memory.now().read_obj::<u8>(at(7)).unwrap(), 0);
}

#[test]
fn a_request_that_breaks_a_rule_is_an_error_and_changes_nothing() {
    let mut guest = guest(8, 8);
    guest.ask(request::PLUG, 2, 2);
    for (kind, block, count) in [
        (request::PLUG, 2, 1),
        (request::PLUG, 1, 2),
        (request::PLUG, 8, 1),
        (request::PLUG, 7, 2),
        (request::PLUG, 0, 0),
        (request::PLUG, u64::MAX, 1),
        (request::UNPLUG, 1, 2),
        (request::UNPLUG, 3, 2),
        (request::UNPLUG, 0, 0xffff),
        (request::STATE, 8, 1),
        (4, 0, 1),
        (0xffff, 2, 1),
    ] {
        assert_eq!(
            guest.ask(kind, block, count),
            (ERROR, 0),
            "{kind} {block} {count}"
        );
    }
    for address in [0, START + 1, START - BLOCK, u64::MAX] {
        assert_eq!(
            guest.ask_raw(request::PLUG, address, 1),
            (ERROR, 0),
            "{address:x}"
        );
    }
    assert_eq!(guest.told(), [8, 2, 8]);
}

#[test]
fn a_chain_that_is_no_request_gets_an_error_or_nothing() {
    let mut guest = guest(8, 8);
    for (chain, written) in [
        (&[(ASKED, 23, READ), (TOLD, 10, WRITE)][..], 10),
        (&[(TOLD, 10, WRITE)], 10),
        (&[(ASKED, 24, READ), (TOLD, 9, WRITE)], 0),
        (&[(ASKED, 24, READ)], 0),
        (&[(1 << 40, 24, READ), (TOLD, 10, WRITE)], 0),
    ] {
        guest.driver.offer(chain);
        guest.driver.notify();
        guest.turn();
        assert_eq!(guest.driver.all_used()[0].1, written, "{chain:x?}");
    }
    assert_eq!(guest.told(), [8, 0, 8]);
}

#[test]
fn who_has_more_than_is_asked_for_may_keep_it_but_gets_no_more() {
    let mut guest = guest(8, 4);
    guest.ask(request::PLUG, 0, 4);
    guest.pool.ask(BLOCK, 2 * BLOCK);
    // Never less than is plugged.
    assert_eq!(guest.told()[1..], [4, 1]);
    assert_eq!(guest.ask(request::PLUG, 1, 1).0, ERROR);
}

#[test]
fn the_blocks_outlive_a_reset_of_the_device() {
    let mut guest = guest(8, 4);
    guest.ask(request::PLUG, 0, 4);
    let states = guest.worker.stop();
    assert!(matches!(states.as_slice(), [Some(_)]));
    // Nobody is there to be told.
    guest.pool.ask(8 * BLOCK, 8 * BLOCK);
    assert_eq!(guest.irq.read().unwrap(), 1, "of the answer alone");
    let io = Io {
        queues: vec![Some(guest.driver.ring(interrupt(&guest.irq)))],
        features: 0,
    };
    guest.worker = guest.device.activate(io).unwrap();
    assert_eq!(guest.pool.plugged(), 4 * BLOCK);
}
