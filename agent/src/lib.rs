//! The agent: PID 1 of the guest, creates the containers of a pod.
//!
//! ```text
//! main ── init                       the helper: becomes a container's process
//!   └──── boot ── rpc ┬ container ┬ launch ── channel ── (init)
//!         PID 1 serve └ clock     ├ cgroup
//!         └ baseline              ├ stdio, sockets ── streams
//!                                 └ reaper
//! ```
//!
//! [`spec`] turns `config.json` into a checked plan before anything is done;
//! [`error`] holds every failure and its status code.
//!
//! Promises: one thread, but for calls of the kernel that may take their time, and no
//! copy of it is ever made (see [`init`]);
//! killing needs no lock that is held across a wait; a container that could
//! not be created leaves nothing. Knows nothing of images, networks or the
//! host; the transport is a parameter of [`rpc::serve`], so that the whole of
//! it but [`boot`] runs on any Linux machine with cgroup v2.

mod baseline;
pub mod boot;
mod bpf;
mod cgroup;
mod channel;
mod clock;
pub mod container;
mod device;
mod disk;
pub mod error;
pub mod init;
mod launch;
mod names;
mod network;
pub mod reaper;
pub mod rpc;
pub mod size;
mod sockets;
mod stdio;
pub mod streams;
mod sys;

pub use bulkhead_agent_api::spec;

/// Makes a write to a pipe without a reader an error, not the end of the
/// process.
pub fn ignore_sigpipe() {
    sys::ignore_sigpipe();
}
