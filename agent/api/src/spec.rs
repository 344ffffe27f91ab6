//! From the bytes of `config.json` to what will be done for a container.
//!
//! Owns the JSON form ([`oci`]), the reading with limits ([`json`]), the tables of
//! what is known (capabilities, limits, devices, namespaces, sysctls, mount
//! options) and the [`plan`]. Shim and agent use the same functions: the shim
//! before a virtual machine exists, the agent to act. So whatever is refused is
//! refused early, with the field and its value, and whatever the shim lets pass
//! the agent takes. What is left out without harm is said in [`Checked::notes`].
//!
//! Pure: touches no file and makes no system call.

pub mod capacity;
mod check;
pub mod devices;
mod error;
mod hooks;
pub mod json;
mod mounts;
mod note;
pub mod oci;
pub mod plan;
mod process;
mod resources;
mod sysctl;
mod update;

pub use self::{
    check::container,
    error::Error,
    mounts::{allowed_in_proc, socket, take_id_map},
    note::{Fate, Note, report},
    process::{CAPABILITIES, Inherited, SECCOMP_FLAGS, process, seccomp},
    update::{InForce, Update, update},
};

/// What was accepted.
#[derive(Clone, Debug, PartialEq)]
pub struct Checked<T> {
    /// What will be done.
    pub plan: T,
    /// What was left out of it or changed.
    pub notes: Vec<Note>,
}

#[cfg(test)]
mod tests;
