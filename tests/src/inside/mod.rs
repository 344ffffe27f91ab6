//! What suites are written with. Runs in the lab host.

pub mod bundle;
pub mod command;
pub mod image;
pub mod leaks;
pub mod process;
pub mod reader;
pub mod terminal;
pub mod volume;
