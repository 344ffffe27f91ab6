//! Taps: interfaces of the host whose other side is a descriptor.

use std::{fs::File, io, os::fd::AsRawFd};

/// `struct ifreq`, as far as a tap needs it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    rest: [u8; 22],
}

/// IFF_TAP, IFF_NO_PI and IFF_VNET_HDR.
const FLAGS: u16 = 0x0002 | 0x1000 | 0x4000;
/// Bytes of virtio's header.
static HEADER: i32 = 12;
/// TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6 and TUN_F_TSO_ECN.
const OFFLOADS: i32 = 0xf;

nix::ioctl_write_ptr_bad!(tunsetiff, 0x4004_54ca, Request);
nix::ioctl_write_ptr_bad!(tunsetvnethdrsz, 0x4004_54d8, i32);
nix::ioctl_write_int_bad!(tunsetoffload, 0x4004_54d0);

/// Makes one of this name, as `bulkhead_vmm::devices::net` wants it, in the network
/// namespace of the calling thread. It goes when the last copy of the descriptor is closed.
pub(super) fn make(name: &str) -> io::Result<File> {
    let file = File::options()
        .read(true)
        .write(true)
        .open("/dev/net/tun")?;
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        flags: FLAGS,
        rest: [0; 22],
    };
    // The last byte stays zero.
    for (to, from) in request
        .name
        .iter_mut()
        .take(libc::IFNAMSIZ - 1)
        .zip(name.bytes())
    {
        *to = from;
    }
    // SAFETY: it reads a `struct ifreq`, which is not longer.
    unsafe { tunsetiff(file.as_raw_fd(), &raw const request) }?;
    // SAFETY: it reads an integer.
    unsafe { tunsetvnethdrsz(file.as_raw_fd(), &raw const HEADER) }?;
    // SAFETY: it takes a number.
    unsafe { tunsetoffload(file.as_raw_fd(), OFFLOADS) }?;
    rustix::io::ioctl_fionbio(&file, true)?;
    Ok(file)
}
