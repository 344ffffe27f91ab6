//! The device controller of cgroup v2: a small eBPF program for each container.
//!
//! Owns the program's bytes. It answers 1 (allowed) or 0 (EPERM) for an access
//! to a device; the last rule that matches decides, and what no rule matches is
//! denied.

use crate::{
    bpf::{Instruction, constant, load, move_register, op},
    spec::{devices::default_rules, plan::DeviceRule},
};

const ALL: u32 = DeviceRule::MKNOD | DeviceRule::READ | DeviceRule::WRITE;

/// Registers: r1 holds `struct bpf_cgroup_dev_ctx` at the start.
const R0: u8 = 0;
const SCRATCH: u8 = 1;
const KIND: u8 = 2;
const ACCESS: u8 = 3;
const MAJOR: u8 = 4;
const MINOR: u8 = 5;

/// The program for a container with these rules.
pub(super) fn program(rules: &[DeviceRule]) -> Vec<Instruction> {
    let mut program = vec![
        load(KIND, 0),
        move_register(ACCESS, KIND),
        constant(op::AND, KIND, 0xffff),
        constant(op::SHIFT_RIGHT, ACCESS, 16),
        load(MAJOR, 4),
        load(MINOR, 8),
    ];
    let always: Vec<_> = default_rules().collect();
    for rule in rules.iter().chain(&always).rev() {
        program.extend(block(rule));
    }
    program.extend(answer(false));
    program
}

/// Answers if the rule matches; else runs on into what follows.
fn block(rule: &DeviceRule) -> Vec<Instruction> {
    let mut block = Vec::new();
    if let Some(kind) = rule.kind {
        block.push(constant(op::JUMP_NOT_EQUAL, KIND, kind as u32));
    }
    if let Some(major) = rule.major {
        block.push(constant(op::JUMP_NOT_EQUAL, MAJOR, major));
    }
    if let Some(minor) = rule.minor {
        block.push(constant(op::JUMP_NOT_EQUAL, MINOR, minor));
    }
    block.push(move_register(SCRATCH, ACCESS));
    if rule.allow {
        // Allowed only if nothing beyond the rule is asked for.
        block.push(constant(op::AND, SCRATCH, ALL & !rule.access));
        block.push(constant(op::JUMP_NOT_EQUAL, SCRATCH, 0));
    } else {
        // Denied if anything of the rule is asked for.
        block.push(constant(op::AND, SCRATCH, rule.access));
        block.push(constant(op::JUMP_EQUAL, SCRATCH, 0));
    }
    block.extend(answer(rule.allow));
    let length = block.len();
    for (place, instruction) in block.iter_mut().enumerate() {
        if matches!(instruction.code, op::JUMP_EQUAL | op::JUMP_NOT_EQUAL) {
            // A jump counts from the instruction after it.
            instruction.offset = i16::try_from(length - place - 1).unwrap_or(i16::MAX);
        }
    }
    block
}

fn answer(allow: bool) -> [Instruction; 2] {
    [
        constant(op::MOVE_CONST, R0, allow.into()),
        constant(op::EXIT, R0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::plan::DeviceKind;

    /// An access as the kernel puts the question.
    #[derive(Clone, Copy)]
    struct Access {
        kind: DeviceKind,
        major: u32,
        minor: u32,
        access: u32,
    }

    /// Does what the kernel does with the few operations that we use.
    fn run(program: &[Instruction], asked: Access) -> bool {
        let context = [
            asked.access << 16 | asked.kind as u32,
            asked.major,
            asked.minor,
        ];
        let mut registers = [0u32; 6];
        let mut next = 0;
        loop {
            let instruction = program[next];
            next += 1;
            let to = usize::from(instruction.registers & 0xf);
            let from = usize::from(instruction.registers >> 4);
            let value = instruction.immediate.cast_unsigned();
            let jump = usize::try_from(instruction.offset).unwrap();
            match instruction.code {
                op::LOAD_WORD => registers[to] = context[jump / 4],
                op::MOVE => registers[to] = registers[from],
                op::MOVE_CONST => registers[to] = value,
                op::AND => registers[to] &= value,
                op::SHIFT_RIGHT => registers[to] >>= value,
                op::JUMP_EQUAL if registers[to] == value => next += jump,
                op::JUMP_NOT_EQUAL if registers[to] != value => next += jump,
                op::JUMP_EQUAL | op::JUMP_NOT_EQUAL => {}
                op::EXIT => return registers[0] != 0,
                other => panic!("operation {other:#x}"),
            }
        }
    }

    const R: u32 = DeviceRule::READ;
    const W: u32 = DeviceRule::WRITE;
    const M: u32 = DeviceRule::MKNOD;

    fn check(rules: &[DeviceRule], asked: (DeviceKind, u32, u32, u32), expected: bool) {
        let (kind, major, minor, access) = asked;
        let answer = run(
            &program(rules),
            Access {
                kind,
                major,
                minor,
                access,
            },
        );
        assert_eq!(answer, expected, "{asked:?} under {rules:?}");
    }

    #[test]
    fn without_rules_only_the_default_devices_can_be_used() {
        use DeviceKind::{Block, Char};
        check(&[], (Char, 1, 3, R | W), true);
        check(&[], (Char, 136, 77, R | W), true);
        check(&[], (Char, 1, 1, R), false);
        check(&[], (Char, 10, 229, R), false);
        check(&[], (Block, 1, 3, R), false);
        check(&[], (Block, 254, 0, R), false);
        check(&[], (Block, 254, 0, M), true);
        check(&[], (Block, 254, 0, M | R), false);
    }

    #[test]
    fn the_last_matching_rule_decides() {
        use DeviceKind::{Block, Char};
        let rule = |allow, kind, major, minor, access| DeviceRule {
            allow,
            kind,
            major,
            minor,
            access,
        };
        let fuse = rule(true, Some(Char), Some(10), Some(229), R | W);
        check(&[fuse], (Char, 10, 229, R | W), true);
        check(&[fuse], (Char, 10, 229, R), true);
        check(&[fuse], (Char, 10, 228, R), false);
        let deny_write = rule(false, Some(Char), Some(10), None, W);
        check(&[fuse, deny_write], (Char, 10, 229, R), true);
        check(&[fuse, deny_write], (Char, 10, 229, R | W), false);
        check(&[deny_write, fuse], (Char, 10, 229, R | W), true);
        let everything = rule(true, None, None, None, R | W | M);
        check(&[everything], (Block, 8, 0, R | W), true);
        let nothing = rule(false, None, None, None, R | W | M);
        check(&[everything, nothing], (Block, 8, 0, R), false);
        check(&[nothing], (Char, 1, 3, R | W), true);
    }
}
