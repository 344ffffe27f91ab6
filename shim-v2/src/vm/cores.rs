//! Core scheduling: no other program on the hyperthread beside the VM.
//!
//! Who wants it says so by a variable in the environment of `start`. The thread that
//! starts the VMM takes a cookie (core-scheduling.rst in the kernel's documentation),
//! which the VMM and all of its threads inherit.

use std::io;

use crate::error::{Result, host};

/// The variable by which containerd asks for it, if it is not empty.
pub(crate) const CORE_SCHEDULING: &str = "SCHED_CORE";

/// Gives the calling thread a cookie of its own, if the pod shall have one.
pub(super) fn take_cookie() -> Result<()> {
    let wanted = std::env::var_os(CORE_SCHEDULING).is_some_and(|value| !value.is_empty());
    if wanted {
        make_cookie().map_err(host(
            "make a cookie for core scheduling (SCHED_CORE is set; it needs Linux 5.14 with CONFIG_SCHED_CORE)",
        ))?;
    }
    Ok(())
}

fn make_cookie() -> io::Result<()> {
    /// The calling thread.
    const SELF: libc::c_ulong = 0;
    // SAFETY: changes an attribute of the calling thread; the arguments are numbers.
    let made = unsafe {
        libc::prctl(
            libc::PR_SCHED_CORE,
            libc::PR_SCHED_CORE_CREATE,
            SELF,
            libc::PR_SCHED_CORE_SCOPE_THREAD,
            0,
        )
    };
    match io::Error::last_os_error() {
        _ if made == 0 => Ok(()),
        // No processor has hyperthreads: nobody is beside the VM.
        error if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        error => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cookie() -> Option<u64> {
        let mut cookie = 0_u64;
        // SAFETY: the kernel writes eight bytes to `cookie`.
        let read = unsafe {
            libc::prctl(
                libc::PR_SCHED_CORE,
                libc::PR_SCHED_CORE_GET,
                0,
                libc::PR_SCHED_CORE_SCOPE_THREAD,
                &raw mut cookie,
            )
        };
        (read == 0).then_some(cookie)
    }

    #[test]
    fn a_thread_has_a_cookie_where_processors_have_hyperthreads_lc_46() {
        let made = std::thread::spawn(|| make_cookie().map(|()| cookie()));
        match made.join().unwrap() {
            Ok(None) => println!("skipped: no processor has hyperthreads"),
            Ok(cookie) => assert_ne!(cookie, Some(0)),
            Err(error) => println!("skipped: this kernel cannot: {error}"),
        }
        assert!(matches!(cookie(), None | Some(0)), "it is the thread's own");
    }
}
