//! virtio-vsock: stream sockets between programs of the guest and of the host
//! (virtio 1.2, 5.10).
//!
//! Host to guest: a program connects to the listening Unix socket, writes
//! `CONNECT <port>\n`, reads `OK <local port>\n`, and then talks to the guest's
//! program. End of file instead of `OK` means that the guest refused.
//!
//! Guest to host: a connection to one of the configured ports becomes a pair of
//! Unix sockets, one end of which goes over the acceptor socket. Every other port
//! is answered by a reset, as is every other kind of socket.
//!
//! Nothing that was sent is lost: bytes of the guest reach the host's program
//! although the guest has closed or reset the stream since, and bytes of the host
//! reach the guest before it hears that the host closed. A side that does not
//! read stops the other, at [`limits::STREAM_BUFFER`] bytes.
//!
//! `mux.rs` owns all streams of a running device, `stream.rs` one of them,
//! `state.rs` and `credit.rs` are the rules, `packet.rs` the form on the wire,
//! `limits.rs` every bound.
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

mod credit;
mod limits;
mod mux;
mod packet;
mod state;
mod stream;
#[cfg(test)]
mod tests;

use std::{io, os::fd::OwnedFd, sync::Arc};

use crate::{
    devices::{Device, Io, Worker, queue::State},
    event_loop::{EventLoop, Registration},
};

/// What stays the same over resets of the device.
#[derive(Debug)]
struct Host {
    guest_cid: u64,
    listener: Option<Arc<OwnedFd>>,
    acceptor: Option<OwnedFd>,
    ports: Vec<u32>,
}

/// The device as the driver finds it.
#[derive(Debug)]
pub struct Vsock {
    host: Arc<Host>,
    config: [u8; 8],
    events: Arc<EventLoop>,
}

impl Vsock {
    /// A device for the guest with this context id (3 or more), which runs on
    /// `events` once the driver is ready.
    ///
    /// `listener` is a listening Unix stream socket, `acceptor` a Unix
    /// SOCK_SEQPACKET socket, `ports` what the guest may connect to; see
    /// [`config::Vsock`](crate::config::Vsock).
    pub fn new(
        guest_cid: u32,
        listener: Option<OwnedFd>,
        acceptor: Option<OwnedFd>,
        ports: Vec<u32>,
        events: Arc<EventLoop>,
    ) -> io::Result<Vsock> {
        if let Some(listener) = &listener {
            rustix::io::ioctl_fionbio(listener, true)?;
        }
        let guest_cid = u64::from(guest_cid);
        Ok(Vsock {
            config: guest_cid.to_le_bytes(),
            host: Arc::new(Host {
                guest_cid,
                listener: listener.map(Arc::new),
                acceptor,
                ports,
            }),
            events,
        })
    }
}

impl Device for Vsock {
    fn id(&self) -> u32 {
        19
    }

    fn queue_sizes(&self) -> &[u16] {
        // Receive, transmit, event (virtio 1.2, 5.10.2). Nothing is ever put in
        // the last one: it is for guests that move to another host.
        &[limits::QUEUE; 3]
    }

    fn config(&self) -> Vec<u8> {
        self.config.to_vec()
    }

    fn activate(&mut self, io: Io) -> io::Result<Box<dyn Worker>> {
        let host = Arc::clone(&self.host);
        let registration = self.events.add(|watch| mux::Mux::new(host, io, watch))?;
        Ok(Box::new(registration))
    }
}

impl Worker for Registration<mux::Mux> {
    fn stop(self: Box<Self>) -> Vec<Option<State>> {
        Registration::stop(*self).map_or_else(Vec::new, |mux| mux.into_states().into())
    }
}
