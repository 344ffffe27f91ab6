//! Word of changes in a network namespace.

use std::{io, os::fd::OwnedFd};

use rustix::net::{
    AddressFamily, RecvFlags, SocketFlags, SocketType, bind, netlink::SocketAddrNetlink, recv,
    socket_with,
};
use tokio::io::{Interest, unix::AsyncFd};

/// RTMGRP_LINK, RTMGRP_NEIGH; addresses, routes and rules of IPv4; the same of IPv6.
const GROUPS: u32 = 0x1 | 0x4 | (0x10 | 0x40 | 0x80) | (0x100 | 0x400 | 0x4_0000);

/// Tells that something has changed, and not what.
#[derive(Debug)]
pub struct Watch(OwnedFd);

impl Watch {
    /// In the network namespace of the calling thread.
    pub(super) fn new() -> io::Result<Watch> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        // NETLINK_ROUTE is number zero.
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
        bind(&socket, &SocketAddrNetlink::new(0, GROUPS))?;
        Ok(Watch(socket))
    }

    /// Listens from now on.
    ///
    /// # Errors
    ///
    /// The socket cannot be waited for.
    pub fn listen(self) -> io::Result<Changes> {
        // SAFETY: it stays the same open descriptor until it is dropped, with the watch.
        let socket = unsafe { AsyncFd::register_with_interest(self.0, Interest::READABLE) };
        Ok(Changes(socket?))
    }
}

/// Changes as they come.
#[derive(Debug)]
pub struct Changes(AsyncFd<OwnedFd>);

impl Changes {
    /// Waits for the next one, or several of them.
    ///
    /// # Errors
    ///
    /// The socket cannot be waited for.
    pub async fn next(&mut self) -> io::Result<()> {
        self.0.readable().await?.clear_ready();
        while is_more(self.0.get_ref()) {}
        Ok(())
    }
}

/// Takes a message; whether there was one. Those that were lost are as good.
fn is_more(socket: &OwnedFd) -> bool {
    let mut message = [0_u8; 64];
    match recv(socket, &mut message[..], RecvFlags::empty()) {
        Ok((count, _)) => count > 0,
        Err(error) => matches!(error, rustix::io::Errno::INTR | rustix::io::Errno::NOBUFS),
    }
}
