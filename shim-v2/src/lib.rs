//! The supervisor of one pod: `containerd-shim-bulkhead-v2`.
//!
//! Owns what containerd sees of a pod: the shim binary's command line, the Task
//! service, exit facts, events, standard streams, and on the host the mounts, the
//! state directory and the process `bulkhead-vmm`.
//!
//! Promises that a pod leaves nothing behind: every thing that must be undone is
//! held by a guard, every mount lives in the shim's own mount namespace or copies of
//! it that end with it, and the VMM ends when the shim's end of its control socket
//! does.
//!
//! Never maps guest memory. What a guest says is parsed in [`agent`]; what its VMM
//! says (hostile as the guest may have made it) where it is read: a line in [`io`],
//! descriptors and the report in [`vm`].
//!
//! Read order: [`start`] makes the daemon, [`daemon`] serves, [`task`] translates
//! requests, [`pod`] carries them out upon a [`guest`].

pub mod agent;
pub mod assets;
mod callers;
pub mod carry;
pub mod cgroup;
mod child;
mod clock;
pub mod config;
pub mod daemon;
pub mod delete;
pub mod disk;
pub mod error;
pub mod events;
pub mod explain;
pub mod fate;
pub mod flags;
mod forward;
mod frames;
pub mod guest;
pub mod hooks;
mod idmap;
pub mod info;
mod inherit;
pub mod io;
mod lock;
pub mod log;
pub mod mount;
pub mod names;
pub mod network;
pub mod options;
pub mod pod;
pub mod process;
pub mod rootfs;
pub mod seccomp;
pub mod settings;
pub mod share;
pub mod sockets;
pub mod spec;
pub mod start;
pub mod state;
pub mod statedir;
pub mod task;
pub mod transfer;
pub mod upgrade;
pub mod vm;

pub use bulkhead_agent_api::spec::json;
