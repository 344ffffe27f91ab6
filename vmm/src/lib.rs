//! `bulkhead-vmm`: one virtual machine in one process.
//!
//! Owns the guest's memory, its processors and its devices. Knows nothing of
//! containers, pods or containerd; opens nothing that a caller could have opened
//! for it.

pub mod assets;
pub mod boot;
pub mod config;
pub mod control;
pub mod cpuid;
pub mod devices;
pub mod event_loop;
pub mod exit;
pub mod hotplug;
pub mod jail;
pub mod memory;
pub mod mmio;
pub mod pause;
pub mod ports;
mod present;
pub mod probe;
pub mod processors;
pub mod standing;
pub mod tap;
pub mod vcpu;
pub mod vm;
