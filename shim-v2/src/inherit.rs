//! What a new process inherits: the descriptors that were named, nothing else.
//!
//! Every descriptor of the shim is close-on-exec; this makes sure of those that
//! the shim itself inherited without knowing.

use std::{
    io,
    os::{
        fd::{BorrowedFd, RawFd},
        unix::process::CommandExt,
    },
    process::Command,
};

use rustix::io::{FdFlags, fcntl_setfd};

/// Lets the process that `command` starts inherit its standard streams and `fds`,
/// under the same numbers. It gets a session of its own.
///
/// The numbers must stay open until the process is started.
pub(crate) fn only(command: &mut Command, fds: Vec<RawFd>) {
    // SAFETY: the closure makes system calls on memory that exists already; it
    // neither allocates nor locks.
    unsafe { command.pre_exec(move || keep(&fds)) };
}

/// Makes the calling process, which is about to execute a program, keep `fds` and its
/// standard streams only, in a session of its own. Makes system calls only.
pub(crate) fn keep(fds: &[RawFd]) -> io::Result<()> {
    rustix::process::setsid()?;
    // SAFETY: changes flags of descriptors of this process only; the arguments
    // are plain numbers.
    let closed = unsafe {
        libc::syscall(
            libc::SYS_close_range,
            3,
            libc::c_uint::MAX,
            libc::CLOSE_RANGE_CLOEXEC,
        )
    };
    if closed != 0 {
        return Err(io::Error::last_os_error());
    }
    for fd in fds {
        // SAFETY: the caller keeps the descriptor open until the exec, and the
        // child has its own copy of the table.
        let fd = unsafe { BorrowedFd::borrow_raw(*fd) };
        fcntl_setfd(fd, FdFlags::empty())?;
    }
    Ok(())
}
