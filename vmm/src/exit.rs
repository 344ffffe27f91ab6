//! Why a virtual machine ended, as its parent learns it.
//!
//! Two channels say the same: the exit status of the process ([`End::status`],
//! one number for each kind) and, where the parent wants more, one JSON line
//! ([`Report`]) on the report descriptor. Inside the process an end travels from
//! the thread that meets it to the main thread by [`Ending`]: the first one wins.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EventFd};

use crate::event_loop::event_fd;

/// The ways in which a virtual machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum End {
    /// The guest powered off.
    PowerOff,
    /// The guest asked for a reset.
    Reboot,
    /// The guest's kernel panicked.
    GuestPanic,
    /// The processor shut down (KVM_EXIT_SHUTDOWN), on x86 after a triple fault.
    TripleFault,
    /// KVM_EXIT_INTERNAL_ERROR or KVM_EXIT_FAIL_ENTRY.
    KvmError,
    /// An exit that the VMM does not know.
    UnknownExit,
    /// The configuration, a file or the host does not allow the VM to start.
    Refused,
    /// A device or a thread of the VMM failed.
    Device,
    /// Whoever started the VM is gone.
    Orphaned,
    /// A thread of the VMM made a system call that it must not make.
    Blocked,
}

impl End {
    /// Exit status of the process.
    #[must_use]
    pub fn status(self) -> u8 {
        match self {
            End::PowerOff => 0,
            End::Reboot => 10,
            End::GuestPanic => 11,
            End::TripleFault => 12,
            End::KvmError => 13,
            End::UnknownExit => 14,
            End::Refused => 15,
            End::Device => 16,
            End::Orphaned => 17,
            End::Blocked => 18,
        }
    }
}

/// What the parent is told about the end.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The kind of end.
    pub end: End,
    /// One line for people. Parts that come from the guest are escaped and cut.
    pub reason: String,
    /// Last lines of the guest's console, escaped, if there was one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub console: Vec<String>,
    /// What it took, if the machine came to run.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stats: Option<Stats>,
}

/// Costs of a machine's life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stats {
    /// Exits to the VMM, by kind.
    pub exits: Exits,
    /// CLOCK_MONOTONIC in µs when `main` began.
    pub main_us: u64,
    /// CLOCK_MONOTONIC in µs just before the first processor entered the guest.
    pub first_run_us: u64,
    /// CLOCK_MONOTONIC in µs when the end was seen.
    pub end_us: u64,
}

/// Exits from the guest to the VMM's process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exits {
    /// To I/O ports.
    pub port: u64,
    /// To device registers and unassigned addresses.
    pub mmio: u64,
    /// Not exits: register writes that came along with a later one.
    pub collected: u64,
    /// All others.
    pub other: u64,
}

/// Text from the guest as one line: without its trailing white space, control and
/// non-ASCII characters escaped.
#[must_use]
pub fn printable(text: &[u8]) -> String {
    text.trim_ascii_end().escape_ascii().to_string()
}

/// The end of the virtual machine, from whichever thread meets it first.
#[derive(Clone, Debug)]
pub struct Ending(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    first: Mutex<Option<(End, String)>>,
    event: EventFd,
}

impl Ending {
    /// Nothing has ended yet.
    pub fn new() -> io::Result<Ending> {
        Ok(Ending(Arc::new(Shared {
            first: Mutex::new(None),
            event: EventFd::new(EFD_CLOEXEC)?,
        })))
    }

    /// Ends the virtual machine, unless it has ended already.
    pub fn end(&self, end: End, reason: impl Into<String>) {
        let mut first = self.0.first.lock().unwrap_or_else(PoisonError::into_inner);
        if first.is_none() {
            *first = Some((end, reason.into()));
            // The counter of an event that is written once cannot overflow.
            let _ = self.0.event.write(1);
        }
    }

    /// Waits for the end.
    #[must_use]
    pub fn wait(&self) -> (End, String) {
        loop {
            if let Some(ended) = self.get() {
                return ended;
            }
            // An interrupted read only means to look again.
            let _ = self.0.event.read();
        }
    }

    /// The end, if it has come.
    #[must_use]
    pub fn get(&self) -> Option<(End, String)> {
        self.0
            .first
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }
}

impl AsFd for Ending {
    /// Readable once the end has come.
    fn as_fd(&self) -> BorrowedFd<'_> {
        event_fd(&self.0.event)
    }
}
