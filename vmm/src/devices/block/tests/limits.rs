//! A disk whose limit holds the guest back. The loop has no thread: a test turns it.

use std::time::{Duration, Instant};

use super::*;
use crate::devices::{
    limit::{Limit, Rate},
    testing::Driver,
};

struct Machine {
    events: Arc<EventLoop>,
    block: Block,
    worker: Option<Box<dyn Worker>>,
    driver: Driver,
}

impl Machine {
    fn new(bytes: Rate, operations: Rate) -> Machine {
        let mut file = tempfile::tempfile().unwrap();
        for sector in 0..8 {
            file.write_all(&[sector; 512]).unwrap();
        }
        let events = EventLoop::new("test").unwrap();
        let name = "bulkhead-0".into();
        let block = Block::new(Arc::clone(&events), file, Access::ReadWrite, name).unwrap();
        block.limiter.set(Limit { bytes, operations });
        let mut machine = Machine {
            events,
            block,
            worker: None,
            driver: Guest::new().driver,
        };
        machine.start();
        machine
    }

    /// A driver that begins anew.
    fn start(&mut self) {
        let guest = Guest::new();
        self.driver = guest.driver;
        let io = Io {
            queues: vec![Some(guest.ring)],
            features: 0,
        };
        self.worker = Some(self.block.activate(io).unwrap());
    }

    /// Offers a request of so many bytes of data, whose answer lies behind them; its head.
    fn offer(&mut self, kind: u32, sector: u64, length: u32) -> u16 {
        let header = [
            kind.to_le_bytes().as_slice(),
            &[0; 4],
            &sector.to_le_bytes(),
        ]
        .concat();
        let at = HEADER + sector * 16;
        self.driver.write(at, &header);
        let data = DATA + sector * 0x1000;
        let head = if kind == request::OUT {
            let chain = [(at, 16, READ), (data, length, READ), (STATUS, 1, WRITE)];
            self.driver.offer(&chain)
        } else {
            let chain = [(at, 16, READ), (data, length + 1, WRITE)];
            self.driver.offer(&chain)
        };
        self.driver.notify();
        head
    }

    /// Turns the loop once; the heads of what was done.
    fn turn(&mut self) -> Vec<u16> {
        let limit = Duration::from_secs(30);
        assert!(self.events.is_ready_within(limit), "nobody is woken");
        self.events.turn().unwrap();
        let used = self.driver.all_used();
        used.into_iter().map(|(head, _)| head).collect()
    }
}

const NOTHING: [u16; 0] = [];

const NONE: Rate = Rate {
    per_second: 0,
    burst: 0,
};

/// So little a second that a test sees no more than the burst.
fn burst(burst: u64) -> Rate {
    Rate {
        per_second: 1,
        burst,
    }
}

#[test]
fn requests_wait_in_order_and_go_on_at_once_when_the_limit_is_lifted() {
    let mut machine = Machine::new(burst(1024), NONE);
    let heads = [0, 1, 2, 3, 4].map(|sector| machine.offer(request::IN, sector, 512));
    assert_eq!(machine.turn(), heads[..2]);
    assert!(!machine.events.is_ready(), "nothing spins");
    // Who notifies gets no more.
    machine.driver.notify();
    assert_eq!(machine.turn(), NOTHING);
    machine.block.limiter.set(Limit::default());
    assert_eq!(machine.turn(), heads[2..]);
    for sector in 0..5 {
        let data = machine.driver.read(DATA + u64::from(sector) * 0x1000, 513);
        assert_eq!(data, [&[sector; 512], &[answer::OK][..]].concat());
    }
    assert!(machine.block.limiter.held_us() > 0);
}

#[test]
fn the_timer_lets_them_go_on() {
    let operations = Rate {
        per_second: 1000,
        burst: 1,
    };
    let mut machine = Machine::new(NONE, operations);
    let start = Instant::now();
    let heads: Vec<u16> = (0..8).map(|at| machine.offer(request::IN, at, 0)).collect();
    let mut done = Vec::new();
    while done.len() < heads.len() {
        done.extend(machine.turn());
    }
    assert_eq!(done, heads);
    assert!(start.elapsed() >= Duration::from_millis(7));
}

#[test]
fn every_kind_of_request_waits_and_no_reset_gives_the_guest_more() {
    let mut machine = Machine::new(NONE, burst(1));
    for _ in 0..1000 {
        machine.block.limiter.spend(0);
    }
    let kinds = [request::IN, request::OUT, request::FLUSH, request::GET_ID];
    for kind in kinds.into_iter().chain([2, 11, u32::MAX]) {
        machine.offer(kind, 0, 512);
        assert_eq!(machine.turn(), NOTHING, "{kind}");
        let states = machine.worker.take().unwrap().stop();
        let state = states[0].unwrap();
        assert_eq!((state.next_available, state.next_used), (0, 0), "{kind}");
        assert!(!machine.events.is_ready());
        machine.start();
    }
}

#[test]
fn what_is_written_and_what_is_read_are_bytes() {
    for kind in [request::IN, request::OUT] {
        let mut machine = Machine::new(burst(512), NONE);
        let heads = [0, 1].map(|sector| machine.offer(kind, sector, 512));
        assert_eq!(machine.turn(), heads[..1], "{kind}");
    }
}

#[test]
fn a_request_that_is_larger_than_the_burst_passes_once() {
    let mut machine = Machine::new(burst(512), NONE);
    let heads = [0, 1].map(|sector| machine.offer(request::IN, sector, 2048));
    assert_eq!(machine.turn(), heads[..1]);
    // Nor does one without data pass those that wait.
    machine.offer(request::FLUSH, 0, 0);
    assert_eq!(machine.turn(), NOTHING);
}

#[test]
fn nothing_counts_as_held_back_once_the_device_is_stopped() {
    let mut machine = Machine::new(burst(512), NONE);
    machine.block.limiter.spend(1 << 20);
    machine.offer(request::IN, 0, 512);
    assert_eq!(machine.turn(), NOTHING);
    machine.worker.take().unwrap().stop();
    let held = machine.block.limiter.held_us();
    for _ in 0..1000 {
        assert_eq!(machine.block.limiter.held_us(), held);
    }
}

#[test]
fn a_timer_of_an_earlier_driver_wakes_one_that_has_no_queue_once_b48() {
    let operations = Rate {
        per_second: 1000,
        burst: 1,
    };
    let mut machine = Machine::new(NONE, operations);
    machine.block.limiter.spend(0);
    machine.offer(request::IN, 0, 0);
    assert_eq!(machine.turn(), NOTHING);
    machine.worker.take().unwrap().stop();
    let io = Io {
        queues: vec![None],
        features: 0,
    };
    machine.worker = Some(machine.block.activate(io).unwrap());
    machine.events.turn().unwrap();
    assert!(!machine.events.is_ready());
}
