//! Programs of the kernel's (BPF), as much of them as networks need.

use std::{
    io,
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// An instruction (`struct bpf_insn`).
#[repr(C)]
#[derive(Clone, Copy, Debug)]
struct Instruction {
    code: u8,
    /// Destination in the lower half, source in the upper.
    registers: u8,
    offset: i16,
    value: i32,
}

/// What an instruction reads or writes at once.
#[derive(Clone, Copy, Debug)]
pub(super) enum Width {
    Byte = 0x10,
    Half = 0x08,
    Word = 0x00,
}

/// Where in a `struct __sk_buff` its first byte is, and the end of those that can be read.
pub(super) const DATA: i16 = 76;
pub(super) const DATA_END: i16 = 80;

/// A function of the kernel's that a program calls (`enum bpf_func_id`).
#[derive(Clone, Copy, Debug)]
pub(super) enum Function {
    MapLookup = 1,
    CloneRedirect = 13,
    LookUpUdp = 85,
    Release = 86,
    LookUpTcp = 99,
    Assign = 124,
}

/// A program being written. Registers are their numbers: 0 what a function answers and
/// what the program ends with, 1 to 5 what a function is given, 6 to 9 the program's own,
/// 10 its stack. A jump names a place by a label `L`, which may come later.
#[derive(Debug)]
pub(super) struct Program<L> {
    instructions: Vec<Instruction>,
    jumps: Vec<(usize, L)>,
    places: Vec<(L, usize)>,
}

impl<L: Copy + PartialEq> Program<L> {
    pub(super) fn new() -> Self {
        Program {
            instructions: Vec::new(),
            jumps: Vec::new(),
            places: Vec::new(),
        }
    }

    fn op(&mut self, code: u8, to: u8, from: u8, offset: i16, value: i32) {
        self.instructions.push(Instruction {
            code,
            registers: to | (from << 4),
            offset,
            value,
        });
    }

    fn jump(&mut self, code: u8, to: u8, from: u8, value: i32, label: L) {
        self.jumps.push((self.instructions.len(), label));
        self.op(code, to, from, 0, value);
    }

    /// This is the place of a label.
    pub(super) fn here(&mut self, label: L) {
        self.places.push((label, self.instructions.len()));
    }

    pub(super) fn copy(&mut self, to: u8, from: u8) {
        self.op(0xbf, to, from, 0, 0);
    }

    pub(super) fn set(&mut self, to: u8, value: i32) {
        self.op(0xb7, to, 0, 0, value);
    }

    pub(super) fn add(&mut self, to: u8, value: i32) {
        self.op(0x07, to, 0, 0, value);
    }

    pub(super) fn and(&mut self, to: u8, value: i32) {
        self.op(0x57, to, 0, 0, value);
    }

    /// Reads what is `offset` bytes behind the place in `from`.
    pub(super) fn load(&mut self, width: Width, to: u8, from: u8, offset: i16) {
        self.op(0x61 | width as u8, to, from, offset, 0);
    }

    /// Writes a word `offset` bytes behind the place in `to`.
    pub(super) fn store(&mut self, to: u8, offset: i16, from: u8) {
        self.op(0x63, to, from, offset, 0);
    }

    /// A map by its descriptor.
    pub(super) fn map(&mut self, to: u8, map: RawFd) {
        self.op(0x18, to, 1, 0, map);
        self.op(0, 0, 0, 0, 0);
    }

    pub(super) fn call(&mut self, function: Function) {
        self.op(0x85, 0, 0, 0, function as i32);
    }

    pub(super) fn go(&mut self, label: L) {
        self.jump(0x05, 0, 0, 0, label);
    }

    /// If a word is this.
    pub(super) fn if_is(&mut self, register: u8, value: i32, label: L) {
        self.jump(0x16, register, 0, value, label);
    }

    /// If a word is not this.
    pub(super) fn if_not(&mut self, register: u8, value: i32, label: L) {
        self.jump(0x56, register, 0, value, label);
    }

    /// If what a function found is nothing.
    pub(super) fn if_nothing(&mut self, register: u8, label: L) {
        self.jump(0x15, register, 0, 0, label);
    }

    /// If a place lies behind another one.
    pub(super) fn if_greater(&mut self, register: u8, other: u8, label: L) {
        self.jump(0x2d, register, other, 0, label);
    }

    /// Ends with this.
    pub(super) fn answer(&mut self, value: i32) {
        self.set(0, value);
        self.op(0x95, 0, 0, 0, 0);
    }

    /// Has the kernel look at it and take it.
    pub(super) fn load_as(mut self, kind: Kind) -> io::Result<OwnedFd> {
        for (at, label) in &self.jumps {
            let place = self.places.iter().find(|(known, _)| known == label);
            let place = place.and_then(|(_, place)| place.checked_sub(at + 1));
            let missing = || io::Error::other("a jump backwards or to nowhere");
            let offset = place.and_then(|it| i16::try_from(it).ok());
            self.instructions[*at].offset = offset.ok_or_else(missing)?;
        }
        load(&self.instructions, kind)
    }
}

/// Kinds of programs.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    /// A classifier of tc (BPF_PROG_TYPE_SCHED_CLS).
    Classifier,
    /// What finds the socket for a connection (BPF_PROG_TYPE_SK_LOOKUP).
    SocketLookup,
}

/// BPF_SK_LOOKUP among what a program can be attached as.
const SK_LOOKUP: u32 = 36;

fn load(program: &[Instruction], kind: Kind) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        count: u32,
        instructions: *const Instruction,
        licence: *const libc::c_char,
        log: [u32; 2],
        log_buffer: *mut u8,
        version: u32,
        flags: u32,
        name: [u8; 16],
        interface: u32,
        attached_as: u32,
    }
    let (kind, attached_as) = match kind {
        Kind::Classifier => (3, 0),
        Kind::SocketLookup => (30, SK_LOOKUP),
    };
    let attributes = Attributes {
        kind,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr(),
        licence: c"Apache-2.0".as_ptr(),
        log: [0; 2],
        log_buffer: ptr::null_mut(),
        version: 0,
        flags: 0,
        // The last byte is zero.
        name: *b"bulkhead\0\0\0\0\0\0\0\0",
        interface: 0,
        attached_as,
    };
    // SAFETY: BPF_PROG_LOAD reads these and the program, and makes a descriptor.
    unsafe { made(5, &attributes) }
}

/// Has a program that finds sockets do so in a network namespace, as long as what this
/// answers is open.
pub(super) fn attach(program: &OwnedFd, namespace: RawFd) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attached_as: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: namespace.cast_unsigned(),
        attached_as: SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: BPF_LINK_CREATE reads these and makes a descriptor.
    unsafe { made(28, &attributes) }
}

/// A map of sockets (BPF_MAP_TYPE_SOCKMAP) for two.
pub(super) fn new_map() -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        kind: u32,
        key_size: u32,
        value_size: u32,
        most: u32,
        flags: u32,
    }
    let attributes = Attributes {
        kind: 15,
        key_size: 4,
        value_size: 4,
        most: 2,
        flags: 0,
    };
    // SAFETY: BPF_MAP_CREATE reads these and makes a descriptor.
    unsafe { made(0, &attributes) }
}

/// Puts a socket into a map.
pub(super) fn insert(map: &OwnedFd, key: u32, socket: RawFd) -> io::Result<()> {
    #[repr(C)]
    struct Attributes {
        map: u32,
        key: *const u32,
        value: *const u32,
        flags: u64,
    }
    let value = socket.cast_unsigned();
    let attributes = Attributes {
        map: map.as_raw_fd().cast_unsigned(),
        key: &raw const key,
        value: &raw const value,
        flags: 0,
    };
    // SAFETY: BPF_MAP_UPDATE_ELEM reads these, the key and the value, which have the
    // sizes that the map was made with.
    unsafe { bpf(2, &attributes) }.map(drop)
}

/// The system call: a descriptor or zero.
///
/// # Safety
///
/// The attributes are those of the command, and what they point to is there.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<RawFd> {
    // SAFETY: the kernel reads no more than their size, and the caller vouches for what
    // they point to.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            ptr::from_ref(attributes),
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
    // SAFETY: it is new. The kernel makes those of BPF close-on-exec.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What a classifier answers to a frame (BPF_PROG_TEST_RUN). Kernels since 6.18 do not try
/// it with half of a header.
#[cfg(test)]
pub(super) fn answer(program: &OwnedFd, frame: &[u8]) -> io::Result<i32> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        answer: i32,
        length: u32,
        room: u32,
        frame: *const u8,
        out: *mut u8,
        times: u32,
        took: u32,
        rest: [u64; 6],
    }
    let attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        answer: i32::MIN,
        length: u32::try_from(frame.len()).unwrap(),
        room: 0,
        frame: frame.as_ptr(),
        out: ptr::null_mut(),
        times: 1,
        took: 0,
        rest: [0; 6],
    };
    let attributes = std::cell::UnsafeCell::new(attributes);
    // SAFETY: it reads these and the frame, and writes into the attributes, which nobody
    // else looks at.
    unsafe { bpf(10, &attributes) }?;
    Ok(attributes.into_inner().answer)
}
