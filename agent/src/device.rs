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
    device: u32,
}

impl Bound {
    /// Has the driver take the device with this number.
    pub(crate) fn take(device: u32) -> io::Result<Self> {
        fs::write(format!("{DRIVER}/bind"), name(device))?;
        Ok(Bound { device })
    }
}

/// The first thing of this class, such as `block` or `net`, that the kernel has made of
/// the device with this number.
pub(crate) fn find(device: u32, class: &str) -> io::Result<PathBuf> {
    let name = name(device);
    for device in fs::read_dir(format!("{DEVICES}/{name}"))? {
        let Ok(mut found) = fs::read_dir(device?.path().join(class)) else {
            continue;
        };
        if let Some(found) = found.next() {
            return Ok(found?.path());
        }
    }
    let none = format!("{name} has nothing of the class {class}");
    Err(io::Error::new(io::ErrorKind::NotFound, none))
}

/// As the kernel has it.
fn name(device: u32) -> String {
    format!("virtio-mmio.{device}")
}

impl Drop for Bound {
    fn drop(&mut self) {
        // Nobody is left to be told of a failure.
        let _ = fs::write(format!("{DRIVER}/unbind"), name(self.device));
    }
}
