//! Programs of the kernel's (eBPF): their instructions, and how they begin to work.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd},
};

/// One instruction (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Instruction {
    /// Operation.
    pub code: u8,
    /// Destination register (low half) and source register (high half).
    pub registers: u8,
    /// Jump or memory offset.
    pub offset: i16,
    /// Constant.
    pub immediate: i32,
}

impl Instruction {
    /// With this source register.
    pub(crate) const fn from(mut self, source: u8) -> Self {
        self.registers |= source << 4;
        self
    }
}

/// Operation codes (`linux/bpf_common.h`, `linux/bpf.h`).
pub(crate) mod op {
    /// `dst = *(u32 *)(src + offset)`
    pub(crate) const LOAD_WORD: u8 = 0x61;
    /// `*(u32 *)(dst + offset) = src`
    pub(crate) const STORE_WORD: u8 = 0x63;
    /// `dst = src` (64 bits): also what leads somewhere.
    pub(crate) const MOVE_PLACE: u8 = 0xbf;
    /// `dst = src` (32 bits)
    pub(crate) const MOVE: u8 = 0xbc;
    /// `dst = immediate` (32 bits)
    pub(crate) const MOVE_CONST: u8 = 0xb4;
    /// `dst &= immediate` (32 bits)
    pub(crate) const AND: u8 = 0x54;
    /// `dst >>= immediate` (32 bits)
    pub(crate) const SHIFT_RIGHT: u8 = 0x74;
    /// Jump if `dst == immediate` (32 bits)
    pub(crate) const JUMP_EQUAL: u8 = 0x16;
    /// Jump if `dst != immediate` (32 bits)
    pub(crate) const JUMP_NOT_EQUAL: u8 = 0x56;
    /// Jump if `dst != immediate` (64 bits)
    pub(crate) const JUMP_NOT_EQUAL_64: u8 = 0x55;
    /// `r0 = function(r1, …)`
    pub(crate) const CALL: u8 = 0x85;
    pub(crate) const EXIT: u8 = 0x95;
}

/// Reads a word of what register 1 leads to: at the start, what the program is asked about.
pub(crate) const fn load(to: u8, offset: i16) -> Instruction {
    Instruction {
        code: op::LOAD_WORD,
        registers: to | (1 << 4),
        offset,
        immediate: 0,
    }
}

/// Writes a word of it.
pub(crate) const fn store(offset: i16, from: u8) -> Instruction {
    Instruction {
        code: op::STORE_WORD,
        registers: 1 | (from << 4),
        offset,
        immediate: 0,
    }
}

pub(crate) const fn move_register(to: u8, from: u8) -> Instruction {
    Instruction {
        code: op::MOVE,
        registers: to | (from << 4),
        offset: 0,
        immediate: 0,
    }
}

pub(crate) const fn constant(code: u8, register: u8, value: u32) -> Instruction {
    Instruction {
        code,
        registers: register,
        offset: 0,
        immediate: value.cast_signed(),
    }
}

/// What a program decides for the processes of a cgroup: its kind and the place where it
/// is asked (`enum bpf_prog_type`, `enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Hook {
    /// Access to devices.
    Device,
    /// Where a socket of IPv4 connects to.
    Connect4,
    /// Where a datagram of IPv4 goes.
    SendTo4,
    /// Whom a datagram of IPv4 is from.
    ReceiveFrom4,
    /// Whom a socket of IPv4 is connected with.
    PeerName4,
}

impl Hook {
    const fn kind(self) -> u32 {
        match self {
            Hook::Device => 15,
            _ => 18,
        }
    }

    const fn place(self) -> u32 {
        match self {
            Hook::Device => 6,
            Hook::Connect4 => 10,
            Hook::SendTo4 => 14,
            Hook::ReceiveFrom4 => 19,
            Hook::PeerName4 => 29,
        }
    }
}

/// Has the kernel look at a program and take it.
pub(crate) fn load_program(hook: Hook, program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    /// Head of `union bpf_attr` for BPF_PROG_LOAD.
    #[repr(C)]
    struct Load {
        kind: u32,
        instructions: u32,
        program: u64,
        license: u64,
        log_level: u32,
        log_size: u32,
        log: u64,
        kernel_version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        place: u32,
    }
    let load = Load {
        kind: hook.kind(),
        instructions: u32::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?,
        program: program.as_ptr().expose_provenance() as u64,
        license: c"Apache-2.0".as_ptr().expose_provenance() as u64,
        log_level: 0,
        log_size: 0,
        log: 0,
        kernel_version: 0,
        flags: 0,
        name: [0; 16],
        interface: 0,
        place: hook.place(),
    };
    // SAFETY: it names `program` and a C string, which outlive the call, and makes a
    // descriptor.
    unsafe { made(BPF_PROG_LOAD, &load) }
}

/// Attaches a program to a cgroup, as long as that is there; further ones can be added
/// below it.
pub(crate) fn attach(hook: Hook, cgroup: impl AsFd, program: impl AsFd) -> io::Result<()> {
    const BPF_PROG_ATTACH: libc::c_int = 8;
    const BPF_F_ALLOW_MULTI: u32 = 2;
    let attach = Attach {
        numbers: [
            cgroup.as_fd().as_raw_fd().cast_unsigned(),
            program.as_fd().as_raw_fd().cast_unsigned(),
            hook.place(),
            BPF_F_ALLOW_MULTI,
        ],
    };
    // SAFETY: it holds numbers only.
    unsafe { bpf(BPF_PROG_ATTACH, &attach) }.map(drop)
}

/// The same, as long as what this answers is open.
pub(crate) fn link(hook: Hook, cgroup: impl AsFd, program: impl AsFd) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    let attach = Attach {
        numbers: [
            program.as_fd().as_raw_fd().cast_unsigned(),
            cgroup.as_fd().as_raw_fd().cast_unsigned(),
            hook.place(),
            0,
        ],
    };
    // SAFETY: it holds numbers only, and makes a descriptor.
    unsafe { made(BPF_LINK_CREATE, &attach) }
}

/// Head of `union bpf_attr` for BPF_PROG_ATTACH and BPF_LINK_CREATE.
#[repr(C)]
struct Attach {
    numbers: [u32; 4],
}

/// The system call: a descriptor or zero.
///
/// # Safety
///
/// The attributes are those of the command, and what they point to is there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: they are the head of a bpf_attr, whose rest the kernel takes as zero; the
    // caller vouches for what they point to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            std::ptr::from_ref(attributes),
            size_of::<T>(),
        )
    };
    match RawFd::try_from(result) {
        Ok(fd) if fd >= 0 => Ok(fd),
        _ => Err(io::Error::last_os_error()),
    }
}

/// One that makes a descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn made<T>(command: libc::c_int, attributes: &T) -> io::Result<OwnedFd> {
    // SAFETY: as the caller says.
    let fd = unsafe { bpf(command, attributes) }?;
    // SAFETY: the kernel just returned it, so it is open and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
