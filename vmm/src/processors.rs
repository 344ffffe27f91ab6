//! How virtual processors are made, for the guest's start and later.

use std::sync::{
    Arc,
    atomic::{AtomicU8, Ordering},
};

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};

use crate::{
    boot,
    cpuid::{self, Processor},
    exit::Ending,
    pause::Gate,
    vcpu::{Machine, Vcpu},
};

/// Why there is no processor.
#[derive(Debug, thiserror::Error)]
#[error("KVM refused to {step}: {source}")]
pub struct Error {
    /// What was to be done.
    pub step: &'static str,
    /// Why not.
    pub source: kvm_ioctls::Error,
}

trait During<T> {
    fn during(self, step: &'static str) -> Result<T, Error>;
}

impl<T> During<T> for Result<T, kvm_ioctls::Error> {
    fn during(self, step: &'static str) -> Result<T, Error> {
        self.map_err(|source| Error { step, source })
    }
}

/// Makes the processors of a machine, one after the other.
#[derive(Debug)]
pub struct Maker {
    vm: Arc<VmFd>,
    supported: CpuId,
    tsc_deadline: bool,
    most: u8,
    made: Arc<AtomicU8>,
    machine: Arc<Machine>,
    ending: Ending,
    gate: Arc<Gate>,
}

impl Maker {
    /// For a machine that has at most so many.
    pub fn new(
        kvm: &Kvm,
        vm: &Arc<VmFd>,
        most: u8,
        machine: &Arc<Machine>,
        ending: &Ending,
        gate: &Arc<Gate>,
    ) -> Result<Maker, Error> {
        let supported = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .during("say what processors it supports")?;
        Ok(Maker {
            vm: Arc::clone(vm),
            supported,
            tsc_deadline: kvm.check_extension(Cap::TscDeadlineTimer),
            most,
            made: Arc::default(),
            machine: Arc::clone(machine),
            ending: ending.clone(),
            gate: Arc::clone(gate),
        })
    }

    /// The most that there can be.
    #[must_use]
    pub fn most(&self) -> u8 {
        self.most
    }

    /// How many there are.
    #[must_use]
    pub fn made(&self) -> u8 {
        self.made.load(Ordering::Relaxed)
    }

    /// How many there are, for others who want to know.
    #[must_use]
    pub fn count(&self) -> Arc<AtomicU8> {
        Arc::clone(&self.made)
    }

    /// Makes the next one, in reset.
    pub fn make(&mut self) -> Result<Vcpu, Error> {
        let id = self.made();
        let mut fd = self
            .vm
            .create_vcpu(u64::from(id))
            .during("create a virtual processor")?;
        let processor = Processor {
            id,
            vcpus: self.most,
            tsc_deadline: self.tsc_deadline,
        };
        let table = cpuid::table(&self.supported, processor)
            .map_err(|_| kvm_ioctls::Error::new(libc::E2BIG))
            .during("hold so large a table for CPUID")?;
        fd.set_cpuid2(&table).during("set a processor's CPUID")?;
        boot::cpu::prepare(&fd).during("prepare a processor")?;
        fd.map_coalesced_mmio_ring()
            .during("map its ring of collected writes")?;
        self.made.store(id.saturating_add(1), Ordering::Relaxed);
        Ok(Vcpu {
            id,
            // The thread of the processor runs as long as the process.
            fd: Box::leak(Box::new(fd)),
            machine: Arc::clone(&self.machine),
            ending: self.ending.clone(),
            gate: Arc::clone(&self.gate),
        })
    }
}
