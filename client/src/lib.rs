//! Containers as a caller of the shim sees them: its start and end, the calls of the
//! Task service, standard streams, signals, and what is remembered of a container.
//!
//! Read order: `record.rs`, `shim.rs`, `task.rs`, `streams.rs`, `attach.rs`,
//! `state.rs`.

pub mod attach;
pub mod error;
pub mod id;
pub mod paths;
pub mod record;
pub mod shim;
pub mod state;
pub mod streams;
pub mod task;
pub mod terminal;

pub use crate::{
    attach::Signals,
    error::{Error, Result, at, host},
    id::ContainerId,
    record::{Container, Record, Scratch},
    shim::Shim,
    state::State,
    streams::Streams,
    task::{Process, Task},
};
