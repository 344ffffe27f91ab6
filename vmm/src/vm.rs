//! A machine from its configuration to its end, as one straight line.
//!
//! The process is confined before its first thread starts; each thread seals
//! itself, and the guest runs when the last of them has.

use std::{
    fs::File,
    io,
    os::fd::{FromRawFd, OwnedFd},
    sync::{Arc, Mutex, atomic::Ordering},
    time::Duration,
};

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::{Cap, IoEventAddress, Kvm, VmFd};
use rustix::time::{ClockId, clock_gettime};
use vm_memory::{GuestMemory, GuestMemoryMmap, GuestMemoryRegion, MmapRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::{
    boot::{
        self,
        cmdline::{self, Slot},
        kernel,
    },
    config::{self, Config, MOST_DEVICES, Policy},
    control::{Control, Status},
    devices::{
        Device, Interrupt,
        block::{Access, Block},
        console::{Console, Output},
        fs::Fs,
        mem::Pool,
        notices::Notices,
        rng::Rng,
        vsock::Vsock,
    },
    event_loop::EventLoop,
    exit::{End, Ending, Report, Stats},
    hotplug::{self, Hotplug, More, Processors, Reserved},
    jail::{self, threads::ThreadKind},
    memory::{self, Memory},
    mmio::{self, Registers, Transport, Window, Wiring},
    pause::Gate,
    ports::{self, Ports, SerialPort},
    present::{Known, Present},
    processors::{self, Maker},
    standing,
    vcpu::{Counts, Machine, Vcpu},
};

/// Guest-physical address of the first device's registers, in the hole of the RAM.
const REGISTERS: u64 = 0xd000_0000;
/// Interrupts of devices, in order: pins that only the I/O APIC has first.
const IRQS: [u32; MOST_DEVICES] = [
    16, 17, 18, 19, 20, 21, 22, 23, 5, 6, 7, 9, 10, 11, 13, 14, 15,
];
/// Three pages below the BIOS that KVM on Intel processors uses for itself.
const KVM_TSS: usize = 0xfffb_d000;
/// Size of the descriptor table, made while one thread has it.
const DESCRIPTORS: i32 = 1000;
/// How long the reader of the console has to take the last of it.
const LAST_OUTPUT: Duration = Duration::from_secs(1);
/// Lines of the console in a report.
const LAST_LINES: usize = 20;

/// What KVM must be able to do, beside what every version can.
const NEEDED: [(Cap, &str); 4] = [
    (Cap::ReadonlyMem, "read-only memory"),
    (Cap::CoalescedMmio, "the collecting of MMIO writes"),
    (Cap::Ioeventfd, "ioeventfd"),
    (Cap::Irqfd, "irqfd"),
];

/// Why a machine cannot start.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// See [`config::Error`].
    #[error(transparent)]
    Config(#[from] config::Error),
    /// See [`memory::Error`].
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// See [`cmdline::Error`].
    #[error(transparent)]
    Cmdline(#[from] cmdline::Error),
    /// See [`kernel::Error`].
    #[error(transparent)]
    Kernel(#[from] kernel::Error),
    /// See [`jail::Error`].
    #[error(transparent)]
    Jail(#[from] jail::Error),
    /// A call to KVM failed.
    #[error("KVM refused to {step}")]
    Kvm {
        /// What was to be done.
        step: &'static str,
        /// Why not.
        source: kvm_ioctls::Error,
    },
    /// See [`processors::Error`].
    #[error(transparent)]
    Processor(#[from] processors::Error),
    /// KVM is too old.
    #[error("KVM of this host does not support {0}")]
    Lacks(&'static str),
    /// A device, an event or a thread could not be made.
    #[error("Cannot set up {what}")]
    Setup {
        /// What.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
}

trait During<T> {
    /// Says what failed.
    fn during(self, step: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, kvm_ioctls::Error> {
    fn during(self, step: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Kvm { step, source })
    }
}

impl<T> During<T> for io::Result<T> {
    fn during(self, what: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error::Setup { what, source })
    }
}

/// What a person at the command line may add to a configuration.
#[derive(Debug, Default)]
pub struct Extras {
    /// Output of a serial port, which a machine otherwise has not.
    pub serial: Option<File>,
}

/// CLOCK_MONOTONIC in µs.
#[must_use]
pub fn now_us() -> u64 {
    let now = clock_gettime(ClockId::Monotonic);
    let (seconds, nanoseconds) = (now.tv_sec.unsigned_abs(), now.tv_nsec.unsigned_abs());
    seconds * 1_000_000 + nanoseconds / 1000
}

/// Boots the machine and waits for its end.
///
/// # Safety
/// The descriptors that `config` names were inherited for it and belong to nobody
/// else; this is called once.
pub unsafe fn run(config: &Config, extras: Extras, main_us: u64) -> Result<Report, Error> {
    config.check()?;
    // SAFETY: the caller vouches for the descriptors, `check` that each is named
    // once; they are taken here and nowhere else.
    let fds = unsafe { Descriptors::take(config) };
    grow_descriptor_table(&fds.kvm);

    let memory = memory::map(config.memory_mib)?;
    let kvm = fds.kvm;
    for (capability, what) in NEEDED {
        if !kvm.check_extension(capability) {
            return Err(Error::Lacks(what));
        }
    }
    let vm = Arc::new(kvm.create_vm().during("create a virtual machine")?);
    vm.set_tss_address(KVM_TSS).during("set the TSS address")?;
    vm.create_irq_chip()
        .during("create interrupt controllers")?;
    add_memory(&vm, &memory)?;
    let every = Memory::from(Arc::new(memory.clone()));

    jail::report_violations(config.report.map(|config::Fd(fd)| fd))?;
    let confined = jail::enter(config.jail.as_ref())?;
    let ending = Ending::new().during("the end's event")?;
    let output = Output::new(fds.console_output);
    let mut loops = Loops::default();
    let mut devices: Vec<Box<dyn Device>> = Vec::new();
    let present = Present::default();
    let notices = config.notices.then(Notices::default);
    for share in &config.shares {
        let told = notices
            .as_ref()
            .filter(|_| share.policy == Policy::Shared)
            .map(Notices::outbox);
        let fs = Fs::new(share, told, &confined);
        devices.push(Box::new(fs.during("a shared directory")?));
    }
    if let Some(vsock) = &config.vsock {
        let (listener, acceptor) = (fds.vsock_listener, fds.vsock_acceptor);
        let ports = vsock.ports.clone();
        let vsock = Vsock::new(vsock.guest_cid, listener, acceptor, ports, loops.shared()?);
        devices.push(Box::new(vsock.during("the vsock device")?));
    }
    for (index, (file, access)) in fds.disks.into_iter().enumerate() {
        let name = format!("bulkhead-{index}");
        let disk = Block::new(loops.add(ThreadKind::Disk, "disk")?, file, access, name);
        let disk = disk.during("a disk")?;
        // A configuration has few devices.
        let device = u8::try_from(devices.len()).unwrap_or(u8::MAX);
        present.add(device, Known::from(&disk));
        devices.push(Box::new(disk));
    }
    if config.console.is_some() {
        let console = Console::new(loops.shared()?, output.clone(), fds.console_input);
        devices.push(Box::new(console));
    }
    if config.rng {
        let rng = Rng::new(loops.shared()?);
        devices.push(Box::new(rng.during("the entropy device")?));
    }
    if let Some(notices) = notices {
        devices.push(Box::new(notices));
    }
    let reserved = Reserved::append(&mut devices, config);

    let slots: Vec<Slot> = slots(devices.len());
    let first_processors = (config.more_vcpus > 0).then_some(config.vcpus);
    let cmdline = cmdline::complete(&config.cmdline, &slots, first_processors)?;
    let images = kernel::Images {
        kernel: &fds.kernel,
        initramfs: fds.initramfs.as_ref(),
        cmdline: &cmdline,
    };
    let entry = kernel::load(&memory, config.memory_mib, config.most_vcpus(), &images)?;
    // Other machines' as well: whoever takes this one over must not hold them.
    drop((fds.kernel, fds.initramfs));
    boot::cpu::write_tables(&memory).map_err(kernel::Error::Memory)?;
    let machine = Arc::new(Machine {
        ports: Mutex::new(Ports::new(serial(&vm, extras.serial)?)),
        window: Mutex::new(connect(&vm, &every, devices, &slots)?),
        counts: Counts::default(),
    });
    let gate = Gate::new(config.vcpus.into()).during("stop processors")?;
    let mut maker = Maker::new(&kvm, &vm, config.most_vcpus(), &machine, &ending, &gate)?;
    let vcpus = processors(&mut maker, config.vcpus, entry)?;
    let processors_made = maker.count();

    for (kind, events) in loops.all {
        let (name, ending) = (events.name().into(), ending.clone());
        confined
            .spawn(kind, name, move || events.run(&ending))
            .during("a device's thread")?;
    }
    let starter = hotplug::starters(&confined, &ending);
    let more = match reserved.memory(&slots) {
        Some((device, slot)) => {
            let place = (device, acknowledgements(&vm, slot.address)?);
            let starter = starter(ThreadKind::Memory);
            Some(More::new(config, &vm, &every, &machine, starter, place))
        }
        None => None,
    };
    let pool = more.as_ref().map(More::pool);
    let processors = Processors::new(maker, starter(ThreadKind::Processor));
    let hotplug = reserved
        .keeper(&machine, more, processors, &present, starter)
        .map(|keeper| Hotplug::start(keeper, &confined))
        .transpose()
        .during("the thread for what comes later")?;
    for vcpu in vcpus {
        vcpu.spawn(&confined).during("a processor's thread")?;
    }
    confined.close()?;
    let first_run_us = now_us();
    gate.open();
    let control = Control {
        socket: fds.control,
        gate: &gate,
        hotplug: hotplug.as_ref(),
        present: &present,
        status: |paused| Status {
            paused,
            vcpus: processors_made.load(Ordering::Relaxed),
            most_vcpus: config.most_vcpus(),
            memory_mib: config
                .memory_mib
                .saturating_add(plugged_mib(pool.as_deref())),
            most_memory_mib: config.memory_mib.saturating_add(config.more_memory_mib),
            exits: machine.counts.snapshot(),
            running_us: now_us().saturating_sub(first_run_us),
        },
        standing: || {
            // A processor that holds it may be what does not go on.
            let devices = machine
                .window
                .try_lock()
                .ok()
                .map(|window| window.started());
            standing::words(gate.stands().into_iter(), devices.as_deref())
        },
    };
    let (end, reason) = control.serve(&ending);
    let end_us = now_us();
    output.finish(LAST_OUTPUT);
    // The process ends now. Taking the devices down would gain nothing, and needs calls
    // that this thread may not make.
    std::mem::forget(Arc::clone(&machine));
    Ok(Report {
        end,
        reason,
        console: match end {
            End::PowerOff | End::Reboot => Vec::new(),
            _ => output.last_lines(LAST_LINES),
        },
        stats: Some(Stats {
            exits: machine.counts.snapshot(),
            main_us,
            first_run_us,
            end_us,
        }),
    })
}

/// The configuration's descriptors, owned.
#[derive(Debug)]
struct Descriptors {
    kvm: Kvm,
    kernel: File,
    initramfs: Option<File>,
    disks: Vec<(File, Access)>,
    console_output: Option<OwnedFd>,
    console_input: Option<OwnedFd>,
    vsock_listener: Option<OwnedFd>,
    vsock_acceptor: Option<OwnedFd>,
    control: Option<OwnedFd>,
}

impl Descriptors {
    /// # Safety
    /// As for [`config::Fd::take`], for each descriptor but that of the report.
    unsafe fn take(config: &Config) -> Descriptors {
        let take = |fd: config::Fd| {
            // SAFETY: the caller vouches for it.
            unsafe { fd.take() }
        };
        let console = config.console.as_ref();
        let vsock = config.vsock.as_ref();
        Descriptors {
            // SAFETY: as above; the number is the descriptor of /dev/kvm.
            kvm: unsafe { Kvm::from_raw_fd(config.kvm.0) },
            kernel: take(config.kernel).into(),
            initramfs: config.initramfs.map(|fd| take(fd).into()),
            disks: config
                .disks
                .iter()
                .map(|disk| {
                    let access = if disk.read_only {
                        Access::ReadOnly
                    } else {
                        Access::ReadWrite
                    };
                    (take(disk.fd).into(), access)
                })
                .collect(),
            console_output: console.and_then(|console| console.output).map(take),
            console_input: console.and_then(|console| console.input).map(take),
            vsock_listener: vsock.and_then(|vsock| vsock.listener).map(take),
            vsock_acceptor: vsock.and_then(|vsock| vsock.acceptor).map(take),
            control: config.control.map(take),
        }
    }
}

/// Lets the kernel make the descriptor table large now: later, with threads, each
/// growth would wait for an RCU grace period.
fn grow_descriptor_table(any: &Kvm) {
    use std::os::fd::{AsRawFd, BorrowedFd};
    // SAFETY: `any` owns the descriptor and outlives the borrow.
    let any = unsafe { BorrowedFd::borrow_raw(any.as_raw_fd()) };
    // Where the limit is lower the table stays as it is.
    drop(rustix::io::fcntl_dupfd_cloexec(any, DESCRIPTORS));
}

/// Event loops that the devices share or have for themselves.
#[derive(Debug, Default)]
struct Loops {
    all: Vec<(ThreadKind, Arc<EventLoop>)>,
    shared: Option<Arc<EventLoop>>,
}

impl Loops {
    fn add(&mut self, kind: ThreadKind, name: &'static str) -> Result<Arc<EventLoop>, Error> {
        let events = EventLoop::new(name).during("an event loop")?;
        self.all.push((kind, Arc::clone(&events)));
        Ok(events)
    }

    /// The loop of devices that never block.
    fn shared(&mut self) -> Result<Arc<EventLoop>, Error> {
        if let Some(events) = &self.shared {
            return Ok(Arc::clone(events));
        }
        let events = self.add(ThreadKind::Devices, "devices")?;
        self.shared = Some(Arc::clone(&events));
        Ok(events)
    }
}

fn slots(devices: usize) -> Vec<Slot> {
    (REGISTERS..)
        .step_by(mmio::PAGE)
        .zip(IRQS)
        .take(devices)
        .map(|(address, irq)| Slot { address, irq })
        .collect()
}

fn add_memory(vm: &VmFd, memory: &GuestMemoryMmap) -> Result<(), Error> {
    for (slot, region) in (0..).zip(memory.iter()) {
        let region = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: the region is a mapping of its length that is never unmapped, and
        // no other slot covers its guest-physical range.
        unsafe { vm.set_user_memory_region(region) }.during("add guest memory")?;
    }
    Ok(())
}

/// Gives each device its registers, notifications and interrupt.
fn connect(
    vm: &VmFd,
    memory: &Memory,
    devices: Vec<Box<dyn Device>>,
    slots: &[Slot],
) -> Result<Window, Error> {
    if devices.is_empty() {
        return Ok(Window::new(REGISTERS, Vec::new()));
    }
    let file = MmapRegion::new(devices.len() * mmio::PAGE)
        .map_err(io::Error::other)
        .during("device registers")?;
    let file = Arc::new(file);
    let mut transports = Vec::new();
    for (index, (device, slot)) in devices.into_iter().zip(slots).enumerate() {
        let page = Registers::new(Arc::clone(&file), index);
        let wiring = Wiring {
            memory: memory.clone(),
            interrupt: interrupt(vm, slot.irq, page.clone())?,
            page,
            notify: notifications(vm, slot.address, device.queue_sizes().len())?,
        };
        // A place is written to when its disk comes, not while the guest boots.
        let collected = mmio::COLLECTED.into_iter().filter(|_| device.id() != 0);
        for range in collected {
            let length = u32::try_from(range.end - range.start).unwrap_or(0);
            vm.register_coalesced_mmio(IoEventAddress::Mmio(slot.address + range.start), length)
                .during("collect writes to device registers")?;
        }
        transports.push(Transport::new(device, wiring));
    }
    let registers = kvm_userspace_memory_region {
        slot: u32::try_from(memory.now().num_regions()).unwrap_or(u32::MAX),
        flags: KVM_MEM_READONLY,
        guest_phys_addr: REGISTERS,
        memory_size: file.size() as u64,
        userspace_addr: file.as_ptr().expose_provenance() as u64,
    };
    // The machine lives as long as the process, so do its registers.
    std::mem::forget(Arc::clone(&file));
    // SAFETY: the mapping has this length and, with a reference given away above,
    // is never unmapped; the range lies in the hole that no RAM covers.
    unsafe { vm.set_user_memory_region(registers) }.during("add device registers")?;
    Ok(Window::new(REGISTERS, transports))
}

fn interrupt(vm: &VmFd, irq: u32, page: Registers) -> Result<Interrupt, Error> {
    let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).during("an interrupt's event")?;
    vm.register_irqfd(&line, irq)
        .during("connect an interrupt")?;
    Ok(Interrupt::new(Arc::new(line), page))
}

/// Signalled when a driver acknowledges a change of the device's configuration.
fn acknowledgements(vm: &VmFd, address: u64) -> Result<EventFd, Error> {
    let register = IoEventAddress::Mmio(address + mmio::INTERRUPT_ACK);
    let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).during("a change's event")?;
    vm.register_ioevent(&event, &register, mmio::CHANGE_ACKNOWLEDGED)
        .during("connect acknowledgements of changes")?;
    Ok(event)
}

fn notifications(vm: &VmFd, address: u64, queues: usize) -> Result<Vec<EventFd>, Error> {
    let register = IoEventAddress::Mmio(address + mmio::QUEUE_NOTIFY);
    (0u32..)
        .take(queues)
        .map(|queue| {
            let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).during("a queue's event")?;
            vm.register_ioevent(&event, &register, queue)
                .during("connect a queue's notifications")?;
            Ok(event)
        })
        .collect()
}

fn serial(vm: &VmFd, output: Option<File>) -> Result<Option<SerialPort>, Error> {
    output
        .map(|output| {
            let line = EventFd::new(EFD_CLOEXEC).during("the serial port's event")?;
            vm.register_irqfd(&line, ports::SERIAL_IRQ)
                .during("connect the serial port")?;
            Ok(SerialPort::new(ports::Line(line), output))
        })
        .transpose()
}

/// The processors that the guest begins with.
fn processors(maker: &mut Maker, count: u8, entry: u64) -> Result<Vec<Vcpu>, Error> {
    let mut vcpus = Vec::new();
    for _ in 0..count {
        vcpus.push(maker.make()?);
    }
    if let Some(first) = vcpus.first() {
        boot::cpu::start_at(first.fd, entry).during("set the first processor's registers")?;
    }
    Ok(vcpus)
}

/// MiB of memory that the guest has taken since its start.
fn plugged_mib(pool: Option<&Pool>) -> u32 {
    let bytes = pool.map_or(0, Pool::plugged);
    u32::try_from(bytes >> 20).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_device_has_a_page_and_an_interrupt_of_its_own() {
        let slots = slots(MOST_DEVICES);
        assert_eq!(slots.len(), MOST_DEVICES);
        assert_eq!(slots[1].address - slots[0].address, 0x1000);
        let mut irqs: Vec<u32> = slots.iter().map(|slot| slot.irq).collect();
        irqs.sort_unstable();
        irqs.dedup();
        assert_eq!(irqs.len(), MOST_DEVICES);
        assert!(irqs.iter().all(|irq| *irq < u32::from(boot::mptable::PINS)));
    }
}
