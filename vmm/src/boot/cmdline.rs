//! The kernel's command line.

use std::fmt::Write;

/// Longest command line of an x86 kernel, with its terminating zero byte
/// (COMMAND_LINE_SIZE).
pub const LONGEST: usize = 2048;

/// Where the driver finds a virtio device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot {
    /// Guest-physical address of its 4 KiB of registers.
    pub address: u64,
    /// Interrupt, a pin of the I/O APIC.
    pub irq: u32,
}

/// Why a command line cannot be used.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Longer than the kernel reads.
    #[error("The kernel command line has {length} bytes with the VMM's part, at most {} fit", LONGEST - 1)]
    Long {
        /// Bytes.
        length: usize,
    },
    /// The kernel would take it for the end, or a terminal for something else.
    #[error("The kernel command line has the control character {0:?}")]
    Control(char),
}

/// `own` with the devices announced, before the arguments for init if any.
pub fn with_devices(own: &str, slots: &[Slot]) -> Result<String, Error> {
    if let Some(control) = own.chars().find(|c| c.is_control()) {
        return Err(Error::Control(control));
    }
    // What follows a lone `--` the kernel hands to init.
    let (kernel, init) = own
        .find(" -- ")
        .or_else(|| own.ends_with(" --").then(|| own.len() - 3))
        .map_or((own, ""), |dashes| own.split_at(dashes));
    let mut line = kernel.trim().to_owned();
    for Slot { address, irq } in slots {
        let space = if line.is_empty() { "" } else { " " };
        // Writing to a string does not fail.
        let _ = write!(line, "{space}virtio_mmio.device=4K@{address:#x}:{irq}");
    }
    line.push_str(init);
    if line.len() >= LONGEST {
        return Err(Error::Long { length: line.len() });
    }
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SLOT: Slot = Slot {
        address: 0xd000_0000,
        irq: 16,
    };

    fn check(own: &str, expected: &str) {
        assert_eq!(with_devices(own, &[SLOT]).as_deref(), Ok(expected));
    }

    #[test]
    fn devices_come_before_the_arguments_of_init() {
        check("", "virtio_mmio.device=4K@0xd0000000:16");
        check(" quiet ", "quiet virtio_mmio.device=4K@0xd0000000:16");
        check("a -- b c", "a virtio_mmio.device=4K@0xd0000000:16 -- b c");
        check("a --", "a virtio_mmio.device=4K@0xd0000000:16 --");
        check("x=--y", "x=--y virtio_mmio.device=4K@0xd0000000:16");
    }

    #[test]
    fn a_long_or_broken_line_is_refused() {
        assert_eq!(with_devices("a\0b", &[]), Err(Error::Control('\0')));
        assert_eq!(with_devices("a\nb", &[]), Err(Error::Control('\n')));
        assert!(with_devices(&"x".repeat(2047), &[]).is_ok());
        assert_eq!(
            with_devices(&"x".repeat(2048), &[]),
            Err(Error::Long { length: 2048 })
        );
    }
}
