//! A fault of QEMU 10's, and how its program is mended.
//!
//! VMRUN with an interrupt to inject (`helper_vmrun`) delivers it, and leaves its vector
//! in `exception_index`. Until the next #VMEXIT, whatever makes the processor's loop turn
//! for another reason than an interrupt (`cpu_handle_interrupt`: the end of a budget of
//! instructions, a request of another thread) takes that for an exception which is
//! pending, and delivers it again: into the handler, where interrupts are off. Then the
//! guest's kernel waits for a lock that it holds itself, and one guest of some thousand
//! hangs; by a clock that counts instructions, one of some dozens.
//!
//! Where the loop notes that it was asked to turn, it first compares:
//!
//! ```text
//! mov   exception_index(%rbx), %ebp
//! cmp   $-1, %ebp
//! jne   …                                   ← nothing is done instead
//! movl  $EXCP_INTERRUPT, exception_index(%rbx)
//! ```
//!
//! No exception that is really pending comes to this place: it has been delivered, or has
//! left the loop, before. So the jump can go.

/// An instruction of six bytes that does nothing.
const NOTHING: [u8; 6] = [0x66, 0x0f, 0x1f, 0x44, 0x00, 0x00];
/// Bytes of the four instructions, and where the jump is among them.
const LENGTH: usize = 25;
const JUMP: std::ops::Range<usize> = 9..15;

/// Mends the program; false if it does not have the place, or several that look like it,
/// and is left as it was.
pub(super) fn mend(program: &mut [u8]) -> bool {
    let mut places = (0..).zip(program.windows(LENGTH)).filter_map(|(at, code)| {
        // Both displacements are that of `exception_index`; EXCP_INTERRUPT is 0x10000.
        let &[
            0x8b,
            _,
            a,
            b,
            c,
            d, //
            0x83,
            _,
            0xff, //
            0x0f,
            0x85,
            _,
            _,
            _,
            _, //
            0xc7,
            _,
            e,
            f,
            g,
            h,
            0,
            0,
            1,
            0,
        ] = code
        else {
            return None;
        };
        ([a, b, c, d] == [e, f, g, h]).then_some(at)
    });
    let (Some(at), None) = (places.next(), places.next()) else {
        return false;
    };
    drop(places);
    let at: usize = at;
    program[at..][JUMP].copy_from_slice(&NOTHING);
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Debian's two builds of version 10.0 have.
    const CODE: [u8; LENGTH] = [
        0x8b, 0xab, 0xd0, 0x02, 0, 0, 0x83, 0xfd, 0xff, 0x0f, 0x85, 0x06, 0xff, 0xff, 0xff, 0xc7,
        0x83, 0xd0, 0x02, 0, 0, 0, 0, 1, 0,
    ];

    #[test]
    fn the_jump_goes_and_nothing_else_changes() {
        let mut program = [&[0x90; 7][..], &CODE, &[0xc3; 40]].concat();
        let before = program.clone();
        assert!(mend(&mut program));
        let changed: Vec<usize> = (0..program.len())
            .filter(|at| program[*at] != before[*at])
            .collect();
        assert_eq!(changed, [16, 17, 18, 19, 20, 21]);
        assert_eq!(program[16..22], NOTHING);
        assert!(!mend(&mut program), "it is mended");
    }

    #[test]
    fn a_program_without_the_place_or_with_two_stays_as_it_is() {
        let mut other = CODE;
        other[2] += 8;
        for code in [&other[..], &CODE[1..], &[CODE, CODE].concat()] {
            let mut program = code.to_vec();
            assert!(!mend(&mut program));
            assert_eq!(program, code);
        }
    }
}
