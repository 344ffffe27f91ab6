//! What suites are written with. Runs in the lab host.

pub mod bundle;
pub mod command;
pub mod docker;
pub mod image;
pub mod leaks;
pub mod loop_device;
pub mod netns;
pub mod process;
pub mod reader;
pub mod setting;
pub mod terminal;
pub mod volume;
