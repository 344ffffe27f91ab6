//! The few I/O ports of the machine. All others read as ones and swallow writes.
//!
//! ```text
//! 0x060, 0x064  keyboard controller: only its reset line
//! 0x3f8 …       16550 serial port, if asked for (kernel debugging)
//! 0x600         power: 1 = power off, 2 = the kernel has panicked
//! 0x601         before that, bytes of the panic message
//! ```
#![cfg_attr(
    not(test),
    deny(
        clippy::indexing_slicing,
        clippy::arithmetic_side_effects,
        clippy::unwrap_used,
        clippy::expect_used
    )
)]

use std::{fmt, fs::File, io};

use vm_superio::{Serial, Trigger, serial::NoEvents};
use vmm_sys_util::eventfd::EventFd;

use crate::exit::{End, printable};

const KEYBOARD_DATA: u16 = 0x60;
const KEYBOARD_STATUS: u16 = 0x64;
/// Pulses the reset line.
const KEYBOARD_RESET: u8 = 0xfe;
/// Something to read, ready for commands: whoever looks for a keyboard controller
/// finds its buffer never empty and gives up at once; whoever wants to reset by
/// it need not wait.
const KEYBOARD_READY: u8 = 0x01;
const SERIAL: u16 = 0x3f8;
/// Interrupt of the serial port.
pub const SERIAL_IRQ: u32 = 4;
const POWER: u16 = 0x600;
const POWER_OFF: u8 = 1;
const PANICKED: u8 = 2;
const PANIC_MESSAGE: u16 = 0x601;
/// Longest panic message that is kept, in bytes.
const LONGEST_MESSAGE: usize = 512;

/// An event as the serial port raises it.
#[derive(Debug)]
pub struct Line(pub EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// A serial port that only speaks.
pub type SerialPort = Serial<Line, NoEvents, File>;

/// The ports.
#[derive(Default)]
pub struct Ports {
    serial: Option<SerialPort>,
    message: Vec<u8>,
}

impl fmt::Debug for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ports").finish_non_exhaustive()
    }
}

impl Ports {
    /// The machine's ports, with a serial port or not.
    #[must_use]
    pub fn new(serial: Option<SerialPort>) -> Ports {
        Ports {
            serial,
            message: Vec::new(),
        }
    }

    /// The guest writes `data` to `port`, each byte in turn. Says whether that
    /// ends the machine.
    pub fn write(&mut self, port: u16, data: &[u8]) -> Option<(End, String)> {
        match (port, data) {
            (POWER, [POWER_OFF, ..]) => Some((End::PowerOff, "The guest powered off".into())),
            (POWER, [PANICKED, ..]) => Some((End::GuestPanic, self.panic_reason())),
            (PANIC_MESSAGE, _) => {
                let room = LONGEST_MESSAGE.saturating_sub(self.message.len());
                self.message.extend(data.iter().take(room));
                None
            }
            (KEYBOARD_STATUS, [KEYBOARD_RESET, ..]) => {
                Some((End::Reboot, "The guest asked for a reset".into()))
            }
            _ => {
                if let Some((serial, offset)) = self.serial_at(port) {
                    for byte in data {
                        // Lost output of a debugging aid changes nothing.
                        let _ = serial.write(offset, *byte);
                    }
                }
                None
            }
        }
    }

    /// The guest reads from `port`.
    pub fn read(&mut self, port: u16, data: &mut [u8]) {
        data.fill(match port {
            KEYBOARD_STATUS => KEYBOARD_READY,
            KEYBOARD_DATA => 0xff,
            _ => self
                .serial_at(port)
                .map_or(0xff, |(serial, offset)| serial.read(offset)),
        });
    }

    fn serial_at(&mut self, port: u16) -> Option<(&mut SerialPort, u8)> {
        let offset = port.checked_sub(SERIAL).filter(|offset| *offset < 8)?;
        Some((self.serial.as_mut()?, u8::try_from(offset).ok()?))
    }

    fn panic_reason(&self) -> String {
        let message = printable(&self.message);
        if message.is_empty() {
            "The guest's kernel panicked".into()
        } else {
            format!("The guest's kernel panicked: {message}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_power_device_ends_the_machine() {
        let mut ports = Ports::default();
        assert_eq!(ports.write(POWER, &[0]), None);
        assert_eq!(ports.write(POWER, &[]), None);
        assert!(matches!(ports.write(POWER, &[1]), Some((End::PowerOff, _))));
        assert_eq!(
            ports.write(POWER, &[2]),
            Some((End::GuestPanic, "The guest's kernel panicked".into()))
        );
    }

    #[test]
    fn a_panic_message_is_cut_and_escaped() {
        let mut ports = Ports::default();
        assert_eq!(ports.write(PANIC_MESSAGE, b"no \x1b[31minit\n"), None);
        let (_, reason) = ports.write(POWER, &[2]).unwrap();
        assert_eq!(reason, "The guest's kernel panicked: no \\x1b[31minit");
        for _ in 0..1000 {
            ports.write(PANIC_MESSAGE, &[b'x'; 4096]);
        }
        assert_eq!(ports.message.len(), LONGEST_MESSAGE);
    }

    #[test]
    fn the_keyboard_controller_only_resets() {
        let mut ports = Ports::default();
        for command in 0..=u8::MAX {
            let end = ports.write(KEYBOARD_STATUS, &[command]);
            assert_eq!(end.is_some(), command == 0xfe, "{command:#x}");
        }
    }

    #[test]
    fn other_ports_read_ones_and_swallow_writes_b53() {
        let mut ports = Ports::default();
        for port in 0..=u16::MAX {
            let mut data = [0; 4];
            ports.read(port, &mut data);
            let expected = if port == KEYBOARD_STATUS { 1 } else { 0xff };
            assert_eq!(data, [expected; 4], "{port:#x}");
            assert_eq!(ports.write(port, &[0xff; 4]), None, "{port:#x}");
        }
    }

    #[test]
    fn the_serial_port_takes_its_registers_in_any_order_b53() {
        let out = tempfile::tempfile().unwrap();
        let line = Line(EventFd::new(0).unwrap());
        let mut ports = Ports::new(Some(Serial::new(line, out)));
        for value in 0..=u8::MAX {
            for offset in 0..8 {
                assert_eq!(ports.write(SERIAL + offset, &[value]), None);
                ports.read(SERIAL + 7 - offset, &mut [0]);
            }
        }
    }
}
