//! Every bound of the device, in one table.

/// Streams that the guest has opened, those that it has left and that still drain
/// included. The agent needs one.
pub(super) const GUEST_STREAMS: usize = 64;

/// The same for streams that programs of the host have opened, with programs that
/// have not said yet to which port they want. Only who starts the machine can
/// reach the listener, and no burst of it may be lost: three streams for each of
/// a hundred programs at once, as many again that still drain, and the connections to
/// sockets of the host.
pub(super) const HOST_STREAMS: usize = 768;

/// Bytes of the guest that one stream keeps for a host program that does not
/// read. With both kinds of streams the most that a guest can make the device
/// hold: 104 MiB.
pub(super) const STREAM_BUFFER: u32 = 128 * 1024;

/// Largest payload in bytes, in either direction.
pub(super) const PACKET: usize = 64 * 1024;

/// Resets that wait for a buffer of the guest. With so many no new stream begins
/// and no packet of an unknown stream is answered, so that there are never more
/// than this and one for each stream.
pub(super) const RESETS: usize = 256;

/// Descriptors in each queue.
pub(super) const QUEUE: u16 = 256;

/// Longest first line of a host program, its newline included: `CONNECT` and a
/// port.
pub(super) const LINE: usize = 32;
