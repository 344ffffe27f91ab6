//! Devices that come while the machine runs: the kernel passed over them at boot, for
//! nothing was there, and its driver is told to look again.

use std::{fs, io, path::PathBuf};

/// Where the driver is told to take and to leave devices.
const DRIVER: &str = "/sys/bus/platform/drivers/virtio-mmio";
/// Where the kernel lists them.
const DEVICES: &str = "/sys/bus/platform/devices";

/// A device that the driver has. Dropped, it is let go of, whoever still uses it.
#[derive(Debug)]
pub(crate) struct Bound {
    /// `virtio-mmio.N`.
    name: String,
}

impl Bound {
    /// Has the driver take the device with this number.
    pub(crate) fn take(device: u32) -> io::Result<Self> {
        let name = format!("virtio-mmio.{device}");
        fs::write(format!("{DRIVER}/bind"), &name)?;
        Ok(Bound { name })
    }

    /// The first thing of this class, such as `block` or `net`, that the kernel has made of
    /// it.
    pub(crate) fn find(&self, class: &str) -> io::Result<PathBuf> {
        for device in fs::read_dir(format!("{DEVICES}/{}", self.name))? {
            let Ok(mut found) = fs::read_dir(device?.path().join(class)) else {
                continue;
            };
            if let Some(found) = found.next() {
                return Ok(found?.path());
            }
        }
        let none = format!("{} has nothing of the class {class}", self.name);
        Err(io::Error::new(io::ErrorKind::NotFound, none))
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Nobody is left to be told of a failure.
        let _ = fs::write(format!("{DRIVER}/unbind"), &self.name);
    }
}
