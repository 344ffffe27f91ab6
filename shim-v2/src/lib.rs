//! The supervisor of one pod: `containerd-shim-bulkhead-v2`.
//!
//! Owns what containerd sees of a pod: the shim binary's command line, the Task
//! service, exit facts, events, standard streams, and on the host the mounts, the
//! state directory and the process `bulkhead-vmm`.
//!
//! Promises that a pod leaves nothing behind: every thing that must be undone is
//! held by a guard, every mount lives in the shim's own mount namespace, and the
//! VMM ends when the shim's end of its control socket does.
//!
//! Never maps guest memory; parses bytes of the guest in [`agent`] only.
//!
//! Read order: [`start`] makes the daemon, [`daemon`] serves, [`task`] translates
//! requests, [`pod`] carries them out.

pub mod agent;
pub mod assets;
pub mod config;
pub mod daemon;
pub mod delete;
pub mod error;
pub mod events;
pub mod flags;
pub mod info;
mod inherit;
pub mod io;
pub mod log;
pub mod mount;
pub mod names;
pub mod pod;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod share;
pub mod spec;
pub mod start;
pub mod state;
pub mod statedir;
pub mod task;
pub mod vm;

pub use bulkhead_spec::json;
