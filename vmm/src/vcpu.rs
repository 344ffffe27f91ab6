//! Virtual processors: a thread each, and what their exits ask for.
//!
//! [`serve`] maps an exit to an [`Action`] and touches nothing but the machine's
//! ports and device registers. Notifications and interrupts do not come here:
//! the kernel passes them between guest and device threads.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::{
    exit::{End, Ending, Exits},
    jail::{Confined, threads::ThreadKind},
    mmio::Window,
    pause::{Gate, Kick},
    ports::Ports,
    standing::Stand,
};

/// What all processors of a machine share.
#[derive(Debug)]
pub struct Machine {
    /// I/O ports.
    pub ports: Mutex<Ports>,
    /// Registers of the virtio devices.
    pub window: Mutex<Window>,
    /// Exits served so far.
    pub counts: Counts,
}

/// Exits to this process, by kind.
#[derive(Debug, Default)]
pub struct Counts {
    port: AtomicU64,
    mmio: AtomicU64,
    collected: AtomicU64,
    other: AtomicU64,
}

impl Counts {
    /// The counts so far.
    #[must_use]
    pub fn snapshot(&self) -> Exits {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Exits {
            port: get(&self.port),
            mmio: get(&self.mmio),
            collected: get(&self.collected),
            other: get(&self.other),
        }
    }
}

/// What follows from an exit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Enter the guest again.
    Resume,
    /// The processor waits for nothing that could come: its thread ends.
    End(End, String),
    /// Apply a write to device registers, after those collected before it.
    Registers {
        /// Guest-physical address.
        address: u64,
        /// What was written, in its first `length` bytes.
        data: [u8; 8],
        /// 1 to 8.
        length: usize,
    },
    /// KVM_EXIT_INTERNAL_ERROR: ask KVM for the details.
    InternalError,
}

/// What `exit` asks for.
pub fn serve(exit: VcpuExit<'_>, machine: &Machine) -> Action {
    let counts = &machine.counts;
    let counter = match &exit {
        VcpuExit::IoIn(..) | VcpuExit::IoOut(..) => &counts.port,
        VcpuExit::MmioRead(..) | VcpuExit::MmioWrite(..) => &counts.mmio,
        _ => &counts.other,
    };
    counter.fetch_add(1, Ordering::Relaxed);
    match exit {
        VcpuExit::IoOut(port, data) => lock(&machine.ports)
            .write(port, data)
            .map_or(Action::Resume, |(end, reason)| Action::End(end, reason)),
        VcpuExit::IoIn(port, data) => {
            lock(&machine.ports).read(port, data);
            Action::Resume
        }
        // Registers of devices are memory to the guest: nothing else answers.
        VcpuExit::MmioRead(_, data) => {
            data.fill(0xff);
            Action::Resume
        }
        VcpuExit::MmioWrite(address, written) => {
            let mut data = [0; 8];
            for (to, from) in data.iter_mut().zip(written) {
                *to = *from;
            }
            Action::Registers {
                address,
                data,
                length: written.len().min(data.len()),
            }
        }
        // The kernel woke the thread for a reason of its own.
        VcpuExit::Intr | VcpuExit::IrqWindowOpen => Action::Resume,
        VcpuExit::Shutdown => Action::End(
            End::TripleFault,
            "The guest's processor shut down (triple fault)".into(),
        ),
        VcpuExit::InternalError => Action::InternalError,
        VcpuExit::FailEntry(reason, cpu) => Action::End(
            End::KvmError,
            format!("KVM cannot enter the guest: hardware reason {reason:#x} on CPU {cpu}"),
        ),
        other => Action::End(
            End::UnknownExit,
            format!("KVM stopped the guest for an unknown reason: {other:?}"),
        ),
    }
}

/// A processor that is ready to run.
#[derive(Debug)]
pub struct Vcpu {
    /// Number, from 0.
    pub id: u8,
    /// KVM's side of it, which lives as long as the process.
    pub fd: &'static mut VcpuFd,
    /// What it shares with the others.
    pub machine: Arc<Machine>,
    /// Where it says that the machine has ended.
    pub ending: Ending,
    /// Where it stops.
    pub gate: Arc<Gate>,
}

impl Vcpu {
    /// Starts the processor's thread, which runs as long as the machine and enters
    /// the guest once the gate opens.
    pub fn spawn(self, confined: &Confined) -> io::Result<()> {
        let (gate, name) = (Arc::clone(&self.gate), format!("vcpu{}", self.id));
        let kick = self.start(|run| confined.spawn(ThreadKind::Processor, name, run))?;
        gate.add(kick);
        Ok(())
    }

    /// The same for one of which the gate does not know yet, in a thread that `spawn`
    /// starts.
    pub fn start_later(
        self,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<()> {
        let gate = Arc::clone(&self.gate);
        gate.expect_one_more();
        match self.start(spawn) {
            Ok(kick) => gate.add_late(kick),
            Err(error) => {
                gate.expect_one_less();
                return Err(error);
            }
        }
        Ok(())
    }

    fn start(
        self,
        spawn: impl FnOnce(Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>,
    ) -> io::Result<Kick> {
        let immediate_exit = &raw mut self.fd.get_kvm_run().immediate_exit;
        // SAFETY: the byte lies in the mapping of the processor's `kvm_run`, which
        // is never unmapped because `fd` is never dropped. Everybody who accesses
        // it, but for the kernel, does so through this.
        let immediate_exit: &'static AtomicU8 = unsafe { AtomicU8::from_ptr(immediate_exit) };
        let thread = spawn(Box::new(move || {
            let mut this = self;
            let (end, reason) = this.run(immediate_exit);
            this.ending.end(end, reason);
        }))?;
        Ok(Kick {
            immediate_exit,
            thread,
        })
    }

    fn run(&mut self, immediate_exit: &AtomicU8) -> (End, String) {
        let mut ran = false;
        loop {
            if self.gate.is_closed() {
                // The guest's watchdogs are told that it did not run. One that has
                // no clock of KVM's, or not yet, cannot be told.
                let _ = self.fd.kvmclock_ctrl();
                let stand = if ran {
                    Stand::of(self.fd)
                } else {
                    Stand::default()
                };
                self.gate.wait(self.id, stand, immediate_exit);
            }
            ran = true;
            let action = match self.fd.run() {
                Ok(exit) => serve(exit, &self.machine),
                Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => Action::Resume,
                Err(error) => {
                    let reason = format!("KVM cannot run processor {}: {error}", self.id);
                    return (End::KvmError, reason);
                }
            };
            match action {
                Action::Resume => {}
                Action::End(end, reason) => return (end, reason),
                Action::InternalError => return (End::KvmError, self.internal_error()),
                Action::Registers {
                    address,
                    data,
                    length,
                } => self.write_registers(address, data.get(..length).unwrap_or(&data)),
            }
        }
    }

    /// Applies what KVM has collected, then this write. The lock spans both: the
    /// ring is common to all processors, and its order is the guest's.
    fn write_registers(&mut self, address: u64, data: &[u8]) {
        let mut window = lock(&self.machine.window);
        let mut stopping = Vec::new();
        while let Ok(Some(write)) = self.fd.coalesced_mmio_read() {
            let length = usize::try_from(write.len).unwrap_or(0);
            if let Some(data) = write.data.get(..length) {
                stopping.extend(window.write(write.phys_addr, data));
            }
            self.machine
                .counts
                .collected
                .fetch_add(1, Ordering::Relaxed);
        }
        stopping.extend(window.write(address, data));
        drop(window);
        for device in stopping {
            device.finish(&self.machine.window);
        }
    }

    fn internal_error(&mut self) -> String {
        let run = self.fd.get_kvm_run();
        // SAFETY: every bit pattern is a value of this member's integers, and the
        // exit reason that was just seen says that KVM filled it.
        let suberror = unsafe { run.__bindgen_anon_1.internal.suberror };
        let rip = self.fd.get_regs().map_or_else(
            |error| format!("unknown ({error})"),
            |regs| format!("{:#x}", regs.rip),
        );
        format!("KVM internal error: suberror {suberror}, rip {rip}")
    }
}

/// A thread that panicked has ended the process: nobody sees a poisoned lock.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine() -> Machine {
        Machine {
            ports: Mutex::default(),
            window: Mutex::new(Window::new(0xd000_0000, Vec::new())),
            counts: Counts::default(),
        }
    }

    fn ends(exit: VcpuExit<'_>) -> Option<End> {
        match serve(exit, &machine()) {
            Action::End(end, reason) => {
                assert!(!reason.contains('\n') && !reason.ends_with('.'), "{reason}");
                Some(end)
            }
            _ => None,
        }
    }

    #[test]
    fn each_kind_of_end_is_told_apart() {
        assert_eq!(ends(VcpuExit::IoOut(0x600, &[1])), Some(End::PowerOff));
        assert_eq!(ends(VcpuExit::IoOut(0x600, &[2])), Some(End::GuestPanic));
        assert_eq!(ends(VcpuExit::IoOut(0x64, &[0xfe])), Some(End::Reboot));
        assert_eq!(ends(VcpuExit::Shutdown), Some(End::TripleFault));
        assert_eq!(ends(VcpuExit::FailEntry(5, 1)), Some(End::KvmError));
        assert_eq!(ends(VcpuExit::Unknown), Some(End::UnknownExit));
        assert_eq!(ends(VcpuExit::Unsupported(99)), Some(End::UnknownExit));
        assert_eq!(ends(VcpuExit::Hlt), Some(End::UnknownExit));
        assert_eq!(
            serve(VcpuExit::InternalError, &machine()),
            Action::InternalError
        );
        assert_eq!(serve(VcpuExit::Intr, &machine()), Action::Resume);
    }

    #[test]
    fn reads_of_nothing_give_ones_of_any_width_b49() {
        let machine = machine();
        for width in 0..=8 {
            let mut data = vec![0; width];
            let action = serve(VcpuExit::MmioRead(0xfff_0000, &mut data), &machine);
            assert_eq!(action, Action::Resume);
            assert_eq!(data, vec![0xff; width]);
            let action = serve(VcpuExit::IoIn(0x1234, &mut data), &machine);
            assert_eq!(action, Action::Resume);
            assert_eq!(data, vec![0xff; width]);
        }
    }

    #[test]
    fn a_write_keeps_its_address_and_bytes() {
        assert_eq!(
            serve(VcpuExit::MmioWrite(0xd000_0070, &[1, 2]), &machine()),
            Action::Registers {
                address: 0xd000_0070,
                data: [1, 2, 0, 0, 0, 0, 0, 0],
                length: 2,
            }
        );
    }

    #[test]
    fn exits_are_counted_by_kind() {
        let machine = machine();
        serve(VcpuExit::IoIn(1, &mut []), &machine);
        serve(VcpuExit::MmioWrite(1, &[]), &machine);
        serve(VcpuExit::MmioRead(1, &mut []), &machine);
        serve(VcpuExit::Intr, &machine);
        assert_eq!(
            machine.counts.snapshot(),
            Exits {
                port: 1,
                mmio: 2,
                collected: 0,
                other: 1,
            }
        );
    }
}
