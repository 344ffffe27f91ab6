//! The MP configuration table: processors, the I/O APIC and how its pins are
//! wired (Intel MultiProcessor Specification 1.4, chapter 4).
//!
//! Without ACPI it is the only way in which Linux learns of processors.

/// Guest-physical address of the I/O APIC.
pub const IO_APIC: u32 = 0xfec0_0000;
/// Guest-physical address of each processor's local APIC.
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Pins of KVM's I/O APIC.
pub const PINS: u8 = 24;

const VERSION_1_4: u8 = 4;
/// Version register of KVM's local and I/O APIC.
const LOCAL_APIC_VERSION: u8 = 0x14;
const IO_APIC_VERSION: u8 = 0x11;

/// Floating pointer and table in one piece, to be put at `address`, a multiple
/// of 16 between 0xf0000 and 0xfffff, for processors with APIC ids 0 to
/// `vcpus - 1`.
#[must_use]
pub fn table(address: u32, vcpus: u8) -> Vec<u8> {
    let io_apic_id = vcpus;
    let mut entries = Entries::default();
    for id in 0..vcpus {
        // 4.3.1: usable; the first one is the bootstrap processor.
        let flags = if id == 0 { 0b11 } else { 0b01 };
        entries.push(&[&[0, id, LOCAL_APIC_VERSION, flags], &[0; 16]]);
    }
    // 4.3.2: bus 0 is ISA, whose lines are edge-triggered and active high.
    entries.push(&[&[1, 0], b"ISA   "]);
    // 4.3.3
    entries.push(&[&[2, io_apic_id, IO_APIC_VERSION, 1], &IO_APIC.to_le_bytes()]);
    for pin in 0..PINS {
        // 4.3.4: vectored interrupt, polarity and trigger mode of the bus.
        entries.push(&[&[3, 0, 0, 0, 0, pin, io_apic_id, pin]]);
    }
    // 4.3.5: LINT0 takes the 8259's interrupt, LINT1 the NMI, on all processors.
    entries.push(&[&[4, 3, 0, 0, 0, 0, 0xff, 0]]);
    entries.push(&[&[4, 1, 0, 0, 0, 0, 0xff, 1]]);

    let [low, high] = u16::try_from(44 + entries.bytes.len())
        .unwrap_or(u16::MAX)
        .to_le_bytes();
    let [count_low, count_high] = entries.count.to_le_bytes();
    // 4.2
    let mut table = [
        b"PCMP".as_slice(),
        &[low, high, VERSION_1_4, 0],
        b"BULKHEAD",
        b"BULKHEAD    ",
        &[0; 6],
        &[count_low, count_high],
        &LOCAL_APIC.to_le_bytes(),
        &[0; 4],
        &entries.bytes,
    ]
    .concat();
    table[7] = checksum(&table);
    // 4.1: one paragraph, a checksum of its own.
    let mut pointer = [
        b"_MP_".as_slice(),
        &(address + 16).to_le_bytes(),
        &[1, VERSION_1_4, 0, 0, 0, 0, 0, 0],
    ]
    .concat();
    pointer[10] = checksum(&pointer);
    pointer.extend(table);
    pointer
}

#[derive(Default)]
struct Entries {
    bytes: Vec<u8>,
    count: u16,
}

impl Entries {
    fn push(&mut self, parts: &[&[u8]]) {
        for part in parts {
            self.bytes.extend_from_slice(part);
        }
        self.count += 1;
    }
}

/// The byte that makes the sum of all zero.
fn checksum(bytes: &[u8]) -> u8 {
    bytes
        .iter()
        .fold(0u8, |sum, byte| sum.wrapping_add(*byte))
        .wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_parts_add_up_to_zero_and_say_their_length() {
        for vcpus in [1, 2, 64] {
            let bytes = table(0xf_0000, vcpus);
            let (pointer, table) = bytes.split_at(16);
            assert_eq!(checksum(pointer), 0);
            assert_eq!(checksum(table), 0);
            assert_eq!(&pointer[4..8], &0xf_0010u32.to_le_bytes());
            assert_eq!(
                usize::from(u16::from_le_bytes([table[4], table[5]])),
                table.len()
            );
            let entries = u16::from_le_bytes([table[34], table[35]]);
            assert_eq!(entries, u16::from(vcpus) + 1 + 1 + 24 + 2);
            assert_eq!(
                table.len(),
                44 + usize::from(vcpus) * 20 + 8 * (1 + 1 + 24 + 2)
            );
        }
    }

    #[test]
    fn the_first_processor_boots_the_others_wait() {
        let bytes = table(0xf_0000, 3);
        let flags = |id: usize| bytes[16 + 44 + id * 20 + 3];
        assert_eq!([flags(0), flags(1), flags(2)], [3, 1, 1]);
    }
}
