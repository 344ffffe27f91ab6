//! The protocol between the shim and the agent: everything both must agree on.
//!
//! Owns `agent.proto`, the vsock ports, the greeting, the paths in the guest, and what a
//! [specification](spec) means. Promises that nothing else is shared between host and
//! guest. Holds no behaviour but that, the place of a [`cause`] in a status and the
//! [relay](mod@relay) of a connection, which must be the same on both sides.
//!
//! # Connections
//! All over vsock; the host is context id 2, the guest [`GUEST_CID`].
//!
//! 1. **Agent → host, port [`AGENT_PORT`]**, once, when the agent is ready. The
//!    agent writes [`GREETING`], then serves ttrpc (`Agent`) on it. There is no
//!    other connection from the guest to the host.
//! 2. **Host → guest, port [`STREAM_PORT`]**, one for each stream. The
//!    host first writes the stream's id (8 bytes, little endian, not 0, never
//!    used twice in a pod); the request that names this id may arrive before or
//!    after it. stdin flows to the guest, stdout and stderr to the host; the
//!    end of a stream is the shutdown of the vsock connection in its direction.
//!    At most [`STREAMS_WAITING`] connections are open whose request has not been
//!    answered; the agent accepts no more of them, and refuses a request whose
//!    streams do not come. A copy has one such stream, into which the agent first
//!    writes [`COPY_BEGINS`]; what follows in the one direction or the other is a tar
//!    archive.
//!
//!    The same for each connection to a socket of the host: a process of a container
//!    connects to a socket of the agent's; the answer to `Accept`, whose request named
//!    a stream, tells which one. The host then connects to its own socket and carries
//!    the connection on by that stream, both ways. If it cannot, it closes the stream
//!    at once. And one for what is asked at 127.0.0.11 of the guest, in both directions
//!    [messages](names::Message).

#[expect(missing_debug_implementations, reason = "generated code")]
#[expect(
    clippy::all,
    clippy::pedantic,
    clippy::restriction,
    reason = "generated code"
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/mod.rs"));
}

pub mod cause;
pub mod names;
pub mod relay;
pub mod spec;

pub use self::{
    generated::{agent, agent_ttrpc},
    relay::relay,
};

/// Counts up whenever a shim cannot speak any more with an agent that was started before:
/// who takes over a pod that runs must speak its agent's.
pub const PROTOCOL: u32 = 1;

/// Context id of the guest. Every VM has its own vsock, so all can have the same.
pub const GUEST_CID: u32 = 3;

/// Host port that the agent connects to once.
pub const AGENT_PORT: u32 = 1024;

/// Guest port on which the agent accepts standard streams.
pub const STREAM_PORT: u32 = 1025;

/// What the agent writes into the stream of a copy when it has taken it.
pub const COPY_BEGINS: u8 = 0;

/// Most connections of standard streams that wait for the answer to the request
/// that names them.
pub const STREAMS_WAITING: usize = 64;

/// virtio-fs tag of the pod's share.
pub const SHARE_TAG: &str = "bulkhead";

/// virtio-fs tag under which the same share is offered for what only the guest
/// changes while it lives.
pub const PRIVATE_TAG: &str = "bulkhead-private";

/// Where the agent mounts the pod's share. The shim lays out below it:
/// `<container id>/rootfs` and `<container id>/volumes/<n>`.
pub const SHARE_DIR: &str = "/run/bulkhead/share";

/// Where the agent mounts the share again, for root file systems that belong to
/// one container alone. The layout is the same.
pub const PRIVATE_DIR: &str = "/run/bulkhead/private";

/// Where the agent mounts root file systems that are disks: `<container id>/rootfs`.
pub const DISKS_DIR: &str = "/run/bulkhead/disks";

/// Where the agent listens on sockets for containers: `<container id>/<n>`.
pub const SOCKETS_DIR: &str = "/run/bulkhead/sockets";

/// First line on the agent's connection: product, protocol version, newline.
///
/// A shim that reads anything else refuses the guest.
pub const GREETING: &str = concat!("bulkhead-agent ", env!("CARGO_PKG_VERSION"), "\n");
