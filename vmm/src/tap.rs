//! Taps as [`crate::devices::net`] wants them, for whoever starts a machine: it may not
//! make any itself.

use std::{fs::File, io, os::unix::fs::OpenOptionsExt};

use vmm_sys_util::ioctl::{ioctl_with_ref, ioctl_with_val};

use crate::devices::net::HEADER;

/// `_IOW('T', 202, int)`, and what else a tap is asked for.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;

/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and TUN_F_TSO_ECN.
const OFFLOADS: libc::c_ulong = 1 | 2 | 4 | 8;

/// Makes one of this name, of at most 15 bytes, in the network namespace of the calling
/// thread. It goes when the last copy of the descriptor is closed.
///
/// # Errors
///
/// The kernel refuses it: somebody else has the name, or the caller may not.
pub fn make(name: &str) -> io::Result<File> {
    // SAFETY: all zeroes is a request without a name.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidFilename.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = libc::c_short::try_from(flags).map_err(io::Error::other)?;
    let header = libc::c_int::try_from(HEADER).map_err(io::Error::other)?;
    let tap = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: it reads a `struct ifreq`.
    done(unsafe { ioctl_with_ref(&tap, TUNSETIFF, &request) })?;
    // SAFETY: it reads an integer.
    done(unsafe { ioctl_with_ref(&tap, TUNSETVNETHDRSZ, &header) })?;
    // SAFETY: it takes a number.
    done(unsafe { ioctl_with_val(&tap, TUNSETOFFLOAD, OFFLOADS) })?;
    Ok(tap)
}

fn done(result: libc::c_int) -> io::Result<()> {
    match result {
        0.. => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
