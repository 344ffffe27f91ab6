//! A place without a device (virtio 1.2, 4.2.2: a device with the number 0), which a
//! driver passes over until something is put there.

use std::io;

use super::{Device, Io, Worker};

/// Nothing, with as many queues as what may come.
#[derive(Debug)]
pub struct Absent(pub &'static [u16]);

impl Device for Absent {
    fn id(&self) -> u32 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        self.0
    }

    fn activate(&mut self, _: Io) -> io::Result<Box<dyn Worker>> {
        Err(io::ErrorKind::NotFound.into())
    }
}
