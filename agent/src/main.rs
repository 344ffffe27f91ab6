//! `bulkhead-agent`: PID 1 of the guest, or with the argument `init` the helper
//! that becomes a container's process.
//!
//! Starts at C's `main`: Rust's own start-up code wants `/dev/null` for the
//! standard streams and aborts without it, but a guest that has just started
//! has no `/dev` until its first process makes one.
#![no_main]

use std::{
    env,
    ffi::{c_char, c_int},
};

use bulkhead_agent::{boot, init};

/// Called by the C library with the arguments, which `std` has recorded.
// SAFETY: the only `main` of the program, with the signature that C gives it.
#[unsafe(no_mangle)]
extern "C" fn main(_: c_int, _: *const *const c_char) -> c_int {
    bulkhead_agent::ignore_sigpipe();
    let helper = env::args_os().nth(1).is_some_and(|first| first == "init");
    if helper { init::main() } else { boot::main() }
}
