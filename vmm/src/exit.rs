//! Why a virtual machine ended, as its parent learns it.
//!
//! Two channels say the same: the exit status of the process ([`End::status`],
//! one number for each kind) and, where the parent wants more, one JSON line
//! ([`Report`]) on the report descriptor.

use serde::{Deserialize, Serialize};

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
}
