//! The lab host, and what the suites that run in it are written with.
//!
//! - [`lab`] is the outside: it builds a Debian machine with a real KVM, keeps it
//!   booted in a file, and runs commands in it.
//! - The rest is the inside: the suites of `tests/suites/` are compiled against
//!   it, copied into the lab host and run there. `bulkhead-labd` runs them.

pub mod inside;
pub mod lab;

pub use inside::{
    bundle,
    command::{Command, Outcome, Running},
    docker, image,
    leaks::{LEFT_BEHIND, LeakCheck},
    loop_device::LoopDevice,
    netns, process,
    reader::Reader,
    setting::Setting,
    terminal::Terminal,
    volume,
};

/// The busybox image in the lab host: an OCI image layout.
pub const BUSYBOX: &str = "/usr/share/lab/images/busybox";

/// The name of the same image in containerd.
pub const BUSYBOX_NAME: &str = "localhost/lab/busybox:latest";

/// The Debian image in the lab host: python3, redis, a C compiler, apt.
pub const DEBIAN: &str = "/usr/share/lab/images/debian";

/// The name of the same in containerd.
pub const DEBIAN_NAME: &str = "localhost/lab/debian:latest";

/// Test programs of others in the lab host: fsx, pjdfstest.
pub const TOOLS: &str = "/lab/tools";
