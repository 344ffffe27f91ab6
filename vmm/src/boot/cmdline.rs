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

/// `own` with the devices announced, and how many processors there are if more may
/// come, before the arguments for init if any.
pub fn complete(own: &str, slots: &[Slot], processors: Option<u8>) -> Result<String, Error> {
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
    if let Some(count) = processors {
        let space = if line.is_empty() { "" } else { " " };
        let _ = write!(line, "{space}maxcpus={count}");
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
        assert_eq!(complete(own, &[SLOT], None).as_deref(), Ok(expected));
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
    fn the_kernel_is_told_to_leave_processors_alone_that_do_not_exist_yet() {
        let line = |own| complete(own, &[], Some(2)).unwrap();
        assert_eq!(line(""), "maxcpus=2");
        assert_eq!(line("quiet -- a"), "quiet maxcpus=2 -- a");
    }

    #[test]
    fn a_long_or_broken_line_is_refused() {
        assert_eq!(complete("a\0b", &[], None), Err(Error::Control('\0')));
        assert_eq!(complete("a\nb", &[], None), Err(Error::Control('\n')));
        assert!(complete(&"x".repeat(2047), &[], None).is_ok());
        assert_eq!(
            complete(&"x".repeat(2048), &[], None),
            Err(Error::Long { length: 2048 })
        );
    }
}
