//! Every bound of the device, in one table.

/// Streams, programs that have not said yet to which port they want, and ended
/// streams that still drain, all together. Three for each of many programs in
/// the guest.
pub(super) const STREAMS: usize = 512;

/// Bytes of the guest that one stream keeps for a host program that does not
/// read. With [`STREAMS`] the most that a guest can make the device hold: 64 MiB.
pub(super) const STREAM_BUFFER: u32 = 128 * 1024;

/// Largest payload in bytes, in either direction.
pub(super) const PACKET: usize = 64 * 1024;

/// Resets, for streams that do not exist, that wait for a buffer of the guest.
/// Further ones are dropped.
pub(super) const RESETS: usize = 256;

/// Descriptors in each queue.
pub(super) const QUEUE: u16 = 256;

/// Longest first line of a host program, its newline included: `CONNECT` and a
/// port.
pub(super) const LINE: usize = 32;
