//! A machine with a real KVM where there is none.
//!
//! Owns the *lab host*: a Debian system in a QEMU machine whose processor, with
//! SVM and nested paging, is emulated. Bulkhead runs in it exactly as on
//! hardware, and never knows.
//!
//! ```text
//! mmdebstrap ─► root.qcow2 ─► booted once ─► state + disk.qcow2             (cache)
//!                                │ containerd of a pinned version, images imported,
//!                                │ unless nobody asks for it
//!                                └─────────► state + disk.qcow2             (cache)
//!                                                  │ restored for each call
//! binaries ─► mke2fs -d ─► second disk ───────► Session ─► jobs
//!                          third disk ─────────────┘ /var/lib/bulkhead
//! ```
//!
//! Promises:
//! - A [`Session`] begins as every other one does, and leaves nothing behind.
//! - Nothing in the cache is used without its hash having been compared.
//! - The output of a job arrives byte for byte, with its exit code.
//!
//! Never changes the building machine's system: packages are the caller's
//! matter ([`packages`]), everything made here lies below the cache directory.

mod accelerator;
mod ahead;
mod core;
mod counter;
mod disk;
mod emulator;
mod image;
pub mod inputs;
mod machine;
pub mod packages;
pub mod programs;
pub mod protocol;
mod qmp;
mod root;
mod saved;
mod session;
mod store;
mod system;
mod terminal;

pub use accelerator::Accelerator;
pub use ahead::begin;
pub use bulkhead_guest::cache;
pub use disk::Contents;
pub use image::{Image, images};
pub use machine::{Clock, MEMORY_MIB};
pub use programs::Programs;
pub use session::{Exit, Job, Lab, Output, Session};
pub use store::Store;
