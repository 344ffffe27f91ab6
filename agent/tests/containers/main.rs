//! Real containers, made by the real service over a socket pair.
//!
//! Owns the proof that a container is what its specification says, seen from
//! inside. Standard streams are Unix connections here instead of vsock ones;
//! all else is as in a guest. Needs root, a cgroup v2 mount (with or without
//! controllers) and busybox: without the first two each test says so and
//! passes.
//!
//! One test makes containers at a time: the agent collects the exits of all
//! children of its process.

#![expect(
    clippy::tests_outside_test_module,
    clippy::unwrap_used,
    reason = "all of it is a test"
)]

mod cgroups;
mod confinement;
mod copies;
mod hooks;
mod life;
mod resources;
mod sockets;
mod streams;
mod support;
mod users;
