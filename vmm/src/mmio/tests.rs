//! The transport against drivers that keep the rules and drivers that do not.

use std::{
    io,
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize},
    },
};

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;
use crate::{devices::testing, event_loop::EventLoop};

/// A device that counts its workers and keeps its line.
#[derive(Clone, Default)]
struct Fake {
    running: Arc<AtomicUsize>,
    started: Arc<AtomicUsize>,
    features: Arc<AtomicU64>,
    config: Arc<Mutex<Vec<u8>>>,
}

struct Running(Arc<AtomicUsize>);

impl Worker for Running {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        self.0.fetch_sub(1, Ordering::Relaxed);
        Vec::new()
    }
}

impl Device for Fake {
    fn id(&self) -> u32 {
        26
    }
    fn features(&self) -> u64 {
        0b101
    }
    fn queue_sizes(&self) -> &[u16] {
        &[16, 128]
    }
    fn config(&self) -> Vec<u8> {
        self.config.lock().unwrap().clone()
    }
    fn activate(&mut self, io: Io) -> io::Result<Box<dyn Worker>> {
        self.features.store(io.features, Ordering::Relaxed);
        self.running.fetch_add(1, Ordering::Relaxed);
        self.started.fetch_add(1, Ordering::Relaxed);
        Ok(Box::new(Running(Arc::clone(&self.running))))
    }
}

/// The driver of one device, and the registers that it reads.
struct Driver {
    window: Mutex<Window>,
    file: Arc<MmapRegion>,
    fake: Fake,
    interrupt: Interrupt,
    irq: Arc<EventFd>,
    notify: Vec<EventFd>,
}

const BASE: u64 = 0xd000_0000;
const GOOD: u64 = 1 << 32 | 1 << 29 | 0b100;

impl Driver {
    fn new() -> Driver {
        let fake = Fake::default();
        *fake.config.lock().unwrap() = b"configured".to_vec();
        let mut driver = Driver::of(Box::new(fake.clone()), testing::memory(2 << 20));
        driver.fake = fake;
        driver
    }

    fn of(device: Box<dyn Device>, memory: Arc<GuestMemoryMmap>) -> Driver {
        let file = Arc::new(MmapRegion::new(PAGE).unwrap());
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let page = Registers::new(Arc::clone(&file), 0);
        let irq = Arc::new(event());
        let interrupt = Interrupt::new(Arc::clone(&irq), page.clone());
        let notify: Vec<_> = device.queue_sizes().iter().map(|_| event()).collect();
        let wiring = Wiring {
            memory: memory.into(),
            page,
            interrupt: interrupt.clone(),
            notify: notify
                .iter()
                .map(|event| event.try_clone().unwrap())
                .collect(),
        };
        let transport = Transport::new(device, wiring);
        Driver {
            window: Mutex::new(Window::new(BASE, vec![transport])),
            file,
            fake: Fake::default(),
            interrupt,
            irq,
            notify,
        }
    }

    fn write(&mut self, register: u64, value: u32) {
        self.write_bytes(BASE + register, &value.to_le_bytes());
    }

    fn write_bytes(&mut self, address: u64, data: &[u8]) {
        let stopping = self.window.lock().unwrap().write(address, data);
        if let Some(stopping) = stopping {
            stopping.finish(&self.window);
        }
    }

    fn read(&self, register: u64) -> u32 {
        let at = usize::try_from(register).unwrap();
        let mut bytes = [0; 4];
        let slice = self.file.get_slice(at, 4).unwrap();
        slice.copy_to(&mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn status(&mut self, bits: &[u8]) -> u32 {
        let mut all = 0;
        for bit in bits {
            all |= u32::from(*bit);
            self.write(reg::STATUS, all);
        }
        self.read(reg::STATUS)
    }

    fn accept(&mut self, features: u64) {
        for (select, value) in [(0, features), (1, features >> 32)] {
            self.write(reg::DRIVER_FEATURES_SEL, select);
            let value = u32::try_from(value & u64::from(u32::MAX)).unwrap();
            self.write(reg::DRIVER_FEATURES, value);
        }
    }

    fn queue(&mut self, number: u32, size: u32, rings: [u32; 3]) {
        self.write(reg::QUEUE_SEL, number);
        self.write(reg::QUEUE_NUM, size);
        self.write(reg::QUEUE_DESC_LOW, rings[0]);
        self.write(reg::QUEUE_DRIVER_LOW, rings[1]);
        self.write(reg::QUEUE_DEVICE_LOW, rings[2]);
        self.write(reg::QUEUE_READY, 1);
    }

    /// Up to and with FEATURES_OK.
    fn negotiate(&mut self) {
        self.status(&[ACKNOWLEDGE, DRIVER]);
        self.accept(GOOD);
        assert_eq!(self.status(&[ACKNOWLEDGE, DRIVER, FEATURES_OK]), 0b1011);
    }

    fn start(&mut self) -> u32 {
        self.write(reg::STATUS, 0b1111);
        self.read(reg::STATUS)
    }
}

const RINGS: [u32; 3] = [0x1000, 0x2000, 0x3000];

#[test]
fn status_moves_one_bit_at_a_time_and_in_order_b48() {
    use Step::{AcceptFeatures, Ignore, Reset, Set, Start};
    let table = [
        (0, 1, Set(1)),
        (1, 3, Set(3)),
        (3, 11, AcceptFeatures(11)),
        (11, 15, Start(15)),
        // Not in order, more than one, or what is set already.
        (0, 2, Ignore),
        (0, 3, Ignore),
        (0, 15, Ignore),
        (1, 9, Ignore),
        (3, 7, Ignore),
        (3, 15, Ignore),
        (11, 11, Ignore),
        (15, 15, Ignore),
        (15, 4, Ignore),
        (11, 3, Ignore),
        // Unknown bits.
        (3, 0x13, Ignore),
        (3, 0x23, Ignore),
        (0, 0x100, Ignore),
        (0, u32::MAX, Ignore),
        // Giving up, at any time; then only a reset helps.
        (0, 128, Set(128)),
        (15, 143, Set(143)),
        (128, 129, Ignore),
        (143, 0, Reset),
        // The device's own bit is not the driver's.
        (0, 64, Ignore),
        (11, 75, Ignore),
        (79, 15, Ignore),
        (79, 0, Reset),
        (79, 0x8f, Set(0xcf)),
    ];
    for (now, value, expected) in table {
        assert_eq!(step(now, value), expected, "{now:#x} -> {value:#x}");
    }
    for now in 0..=u8::MAX {
        assert_eq!(step(now, 0), Reset);
        for value in 1..=0xff_u32 {
            let before_start = step(now, value) == Start(u8::try_from(value).unwrap());
            assert!(!before_start || now == 11, "{now:#x} -> {value:#x}");
        }
    }
}

#[test]
fn the_device_is_described_in_its_registers() {
    let mut driver = Driver::new();
    assert_eq!(driver.read(reg::MAGIC).to_le_bytes(), *b"virt");
    assert_eq!(driver.read(reg::VERSION), 2);
    assert_eq!(driver.read(reg::DEVICE_ID), 26);
    assert_eq!(driver.read(reg::DEVICE_FEATURES), 0b101 | 0b11 << 28);
    driver.write(reg::DEVICE_FEATURES_SEL, 1);
    assert_eq!(driver.read(reg::DEVICE_FEATURES), 1);
    driver.write(reg::DEVICE_FEATURES_SEL, 2);
    assert_eq!(driver.read(reg::DEVICE_FEATURES), 0);
    assert_eq!(driver.read(reg::CONFIG).to_le_bytes(), *b"conf");
    assert_eq!(driver.read(reg::CONFIG + 8).to_le_bytes(), *b"ed\0\0");
    assert_eq!(driver.read(reg::SHM[0]), u32::MAX);
    assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 16);
    driver.write(reg::QUEUE_SEL, 1);
    assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 128);
}

#[test]
fn a_driver_that_keeps_the_rules_gets_its_device_and_its_features() {
    let mut driver = Driver::new();
    driver.negotiate();
    driver.queue(1, 128, RINGS);
    assert_eq!(driver.read(reg::QUEUE_READY), 1);
    assert_eq!(driver.start(), 0b1111);
    assert_eq!(driver.fake.running.load(Ordering::Relaxed), 1);
    assert_eq!(driver.fake.features.load(Ordering::Relaxed), GOOD);
    driver.write(reg::STATUS, 0);
    assert_eq!(driver.read(reg::STATUS), 0);
    assert_eq!(driver.read(reg::QUEUE_READY), 0);
    assert_eq!(driver.fake.running.load(Ordering::Relaxed), 0);
}

#[test]
fn features_without_version_1_or_never_offered_are_not_accepted_b48() {
    for features in [0, 0b101, 1 << 32 | 0b10, 1 << 32 | 1 << 33, u64::MAX] {
        let mut driver = Driver::new();
        driver.status(&[ACKNOWLEDGE, DRIVER]);
        driver.accept(features);
        let status = driver.status(&[ACKNOWLEDGE, DRIVER, FEATURES_OK]);
        assert_eq!(status, 0b0011, "{features:#x}");
        assert_eq!(driver.start(), 0b0011);
    }
}

#[test]
fn bad_queues_do_not_start_the_device_b44_b47() {
    for (size, rings) in [
        (0, RINGS),
        (3, RINGS),
        (256, RINGS),
        (65_535, RINGS),
        (65_536, RINGS),
        (0x1_0010, RINGS),
        // Not aligned.
        (16, [0x1008, 0x2000, 0x3000]),
        (16, [0x1000, 0x2001, 0x3000]),
        (16, [0x1000, 0x2000, 0x3002]),
        // Beyond RAM, in the device's own registers, around the end.
        (16, [0x20_0000, 0x2000, 0x3000]),
        (16, [0x1000, 0x1f_fff0, 0x3000]),
        (16, [0x1000, 0x2000, 0xd000_0000]),
        (16, [0xffff_fff0, 0x2000, 0x3000]),
        // Over each other.
        (16, [0x1000, 0x1000, 0x3000]),
        (16, [0x1000, 0x2000, 0x2000]),
        (128, [0x1000, 0x17f0, 0x3000]),
    ] {
        let mut driver = Driver::new();
        driver.negotiate();
        driver.queue(1, size, rings);
        let status = driver.start();
        assert_eq!(status, 0b100_1111, "{size} {rings:x?}");
        assert_eq!(driver.fake.started.load(Ordering::Relaxed), 0);
        driver.write(reg::STATUS, 0);
        assert_eq!(driver.read(reg::STATUS), 0, "a reset helps");
    }
    let mut driver = Driver::new();
    driver.negotiate();
    driver.queue(0, 16, RINGS);
    driver.queue(1, 16, RINGS);
    assert_eq!(driver.start(), 0b100_1111, "two queues in one place");
}

#[test]
fn queues_are_frozen_while_the_device_runs_b47() {
    let mut driver = Driver::new();
    driver.queue(0, 16, RINGS);
    assert_eq!(driver.read(reg::QUEUE_READY), 0, "before FEATURES_OK");
    driver.negotiate();
    driver.queue(1, 128, RINGS);
    assert_eq!(driver.start(), 0b1111);
    let before = format!("{:?}", driver.window);
    driver.write(reg::QUEUE_READY, 0);
    driver.queue(1, 64, [0x5000, 0x6000, 0x7000]);
    driver.accept(0);
    assert_eq!(format!("{:?}", driver.window), before);
    assert_eq!(driver.read(reg::QUEUE_READY), 1);
}

#[test]
fn selectors_out_of_range_read_zero_and_swallow_writes_b47() {
    let mut driver = Driver::new();
    driver.negotiate();
    for select in [2, 3, 0xffff, u32::MAX] {
        driver.queue(select, 16, RINGS);
        assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 0, "{select}");
        assert_eq!(driver.read(reg::QUEUE_READY), 0, "{select}");
    }
    assert_eq!(driver.start(), 0b1111, "no queue at all is no error");
}

#[test]
fn a_reset_holds_up_nobody_but_who_asked_for_it_b48() {
    let mut driver = Driver::new();
    driver.negotiate();
    assert_eq!(driver.start(), 0b1111);
    let write = |register, value: u32| {
        let mut window = driver.window.lock().unwrap();
        window.write(BASE + register, &value.to_le_bytes())
    };
    let stopping = write(reg::STATUS, 0).expect("a worker runs");
    // The lock is free, the reset not done, and no other begins.
    assert_eq!(driver.read(reg::STATUS), 0b1111);
    for value in [0, 1, 128] {
        assert!(write(reg::STATUS, value).is_none());
    }
    assert!(write(reg::QUEUE_SEL, 1).is_none());
    assert_eq!(driver.read(reg::STATUS), 0b1111);
    assert_eq!(driver.read(reg::QUEUE_NUM_MAX), 16);
    assert_eq!(driver.fake.running.load(Ordering::Relaxed), 1);
    stopping.finish(&driver.window);
    assert_eq!(driver.read(reg::STATUS), 0);
    assert_eq!(driver.fake.running.load(Ordering::Relaxed), 0);
    driver.negotiate();
    assert_eq!(driver.start(), 0b1111);
}

#[test]
fn drivers_are_told_of_changes_of_the_configuration_and_of_nothing_twice() {
    let mut driver = Driver::new();
    let change = |text: &[u8]| {
        *driver.fake.config.lock().unwrap() = text.to_vec();
        driver.interrupt.config_change(text);
    };
    let generation = driver.read(reg::CONFIG_GENERATION);
    change(b"reconfigured");
    assert_ne!(driver.read(reg::CONFIG_GENERATION), generation);
    assert_eq!(driver.read(reg::CONFIG + 8).to_le_bytes(), *b"ured");
    assert!(driver.irq.read().is_err(), "no driver is there yet");
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);

    // The event of the kernel, and the loop that waits for it.
    let events = EventLoop::new("test").unwrap();
    let acknowledged = EventFd::new(EFD_NONBLOCK).unwrap();
    let copy = acknowledged.try_clone().unwrap();
    let _clear = driver.interrupt.clear_on(copy, &events).unwrap();
    driver.negotiate();
    assert_eq!(driver.start(), 0b1111);
    let change = |text: &[u8]| driver.interrupt.config_change(text);
    for round in 0..3 {
        change(&[round; 4]);
        assert_eq!(driver.irq.read().unwrap(), 1);
        assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
        assert_eq!(driver.read(reg::CONFIG), u32::from_le_bytes([round; 4]));
        // Interrupts of queues change nothing.
        driver.interrupt.used_buffer();
        assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
        driver.irq.read().unwrap();
        acknowledged.write(1).unwrap();
        events.turn().unwrap();
        assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    }
    // An acknowledgement of the first is none of the second.
    change(b"1111");
    acknowledged.write(1).unwrap();
    change(b"2222");
    assert!(!events.is_ready());
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
    acknowledged.write(1).unwrap();
    events.turn().unwrap();
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    // A reset shows what the device says.
    change(b"3333");
    driver.write(reg::STATUS, 0);
    assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    assert_eq!(driver.read(reg::CONFIG).to_le_bytes(), *b"reco");
}

#[test]
fn a_driver_that_breaks_a_ring_is_told_until_it_resets_the_device_b46() {
    let events = EventLoop::new("test").unwrap();
    let memory = testing::memory(2 << 20);
    let device = crate::devices::rng::Rng::new(Arc::clone(&events)).unwrap();
    let mut driver = Driver::of(Box::new(device), Arc::clone(&memory));
    for _ in 0..2 {
        // The head 64, of a queue of 64.
        memory
            .write_slice(&[0; 0x3000], GuestAddress(0x1000))
            .unwrap();
        memory
            .write_slice(&[0, 0, 1, 0, 64, 0], GuestAddress(0x2000))
            .unwrap();
        driver.status(&[ACKNOWLEDGE, DRIVER]);
        driver.accept(VERSION_1);
        driver.status(&[ACKNOWLEDGE, DRIVER, FEATURES_OK]);
        driver.queue(0, 64, RINGS);
        assert_eq!(driver.start(), 0b1111);
        events.turn().unwrap();
        assert_eq!(driver.read(reg::STATUS), 0b100_1111);
        assert_eq!(driver.read(reg::INTERRUPT_STATUS), 3);
        assert_eq!(driver.irq.read().unwrap(), 1);
        // Once, whatever it does.
        driver.notify[0].write(1).unwrap();
        events.turn().unwrap();
        driver.write(reg::STATUS, 0b1111);
        assert!(driver.irq.read().is_err());
        assert_eq!(driver.read(reg::STATUS), 0b100_1111);
        driver.write(reg::STATUS, 0);
        assert_eq!(driver.read(reg::STATUS), 0);
        assert_eq!(driver.read(reg::INTERRUPT_STATUS), 1);
    }
}

/// All of this process's descriptors and threads, exactly: so it has one for
/// itself.
#[test]
fn resets_of_every_device_leave_nothing_behind_b48() {
    let done = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "mmio::tests::many_resets"])
        .args(["--ignored", "--nocapture", "--test-threads=1"])
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && said.contains("1 passed"), "{said}");
}

#[test]
#[ignore = "the inner half of the test above"]
fn many_resets() {
    use crate::{
        config::Share,
        devices::{
            block::{Access, Block},
            console::{Console, Output},
            fs::Fs,
            rng::Rng,
            vsock::Vsock,
        },
        exit::Ending,
        jail,
    };
    let events = EventLoop::new("test").unwrap();
    events.spawn(Ending::new().unwrap()).unwrap();
    let shared = || Arc::clone(&events);
    let dir = tempfile::tempdir().unwrap();
    let share = Share {
        tag: "test".into(),
        dir: dir.path().into(),
        read_only: false,
        queues: 1,
        policy: crate::config::Policy::Shared,
    };
    let (input, _writer) = io::pipe().unwrap();
    let (_reader, output) = io::pipe().unwrap();
    let listener = std::os::unix::net::UnixListener::bind(dir.path().join("socket")).unwrap();
    let disk = tempfile::tempfile().unwrap();
    disk.set_len(4096).unwrap();
    let output = Output::new(Some(output.into()));
    let disk = Block::new(shared(), disk, Access::ReadWrite, "disk".into());
    let vsock = Vsock::new(3, Some(listener.into()), None, vec![], shared());
    let devices: Vec<Box<dyn Device>> = vec![
        Box::new(Fs::new(&share, None, &jail::enter(None).unwrap()).unwrap()),
        Box::new(vsock.unwrap()),
        Box::new(disk.unwrap()),
        Box::new(Console::new(shared(), output, Some(input.into()))),
        Box::new(Rng::new(shared()).unwrap()),
    ];
    let mut drivers: Vec<Driver> = devices
        .into_iter()
        .map(|device| Driver::of(device, testing::memory(2 << 20)))
        .collect();
    let count = |what| std::fs::read_dir(what).unwrap().count();
    let mut before = None;
    for round in 0..300 {
        for driver in &mut drivers {
            driver.status(&[ACKNOWLEDGE, DRIVER]);
            driver.accept(VERSION_1);
            assert_eq!(driver.status(&[ACKNOWLEDGE, DRIVER, FEATURES_OK]), 0b1011);
            for (queue, at) in (0..)
                .zip((0x1000..).step_by(0x8000))
                .take(driver.notify.len())
            {
                driver.queue(queue, 16, [at, at + 0x1000, at + 0x2000]);
            }
            assert_eq!(driver.start(), 0b1111);
            assert_eq!(driver.start(), 0b1111, "DRIVER_OK twice starts once");
            // Some resets meet a device that has work to do.
            for event in driver.notify.iter().filter(|_| round % 2 == 0) {
                event.write(1).unwrap();
            }
            driver.write(reg::STATUS, 0);
            assert_eq!(driver.read(reg::STATUS), 0);
        }
        let now = (count("/proc/self/fd"), count("/proc/self/task"));
        assert_eq!(*before.get_or_insert(now), now, "round {round}");
    }
}

#[test]
fn any_write_of_any_width_is_survived_b49() {
    let mut driver = Driver::new();
    driver.negotiate();
    let before = driver.read(reg::CONFIG);
    for register in 0..0x1000 {
        for width in [0, 1, 2, 3, 5, 8, 16] {
            driver.write_bytes(BASE + register, &vec![0xff; width]);
        }
    }
    assert_eq!(driver.read(reg::STATUS), 0b1011);
    for register in (0..0x1000).rev() {
        for value in [0, 1, 2, 0x7fff_ffff, u32::MAX] {
            driver.write(register, value);
        }
    }
    assert_eq!(driver.read(reg::CONFIG), before);
    for address in [0, BASE - 1, BASE + 0x1000, u64::MAX] {
        driver.write_bytes(address, &[1, 0, 0, 0]);
    }
}
