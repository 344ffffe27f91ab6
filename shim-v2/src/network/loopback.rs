//! Who connects to the namespace's own 127.0.0.1 or ::1 means the guest's: port
//! forwarding of Kubernetes does so, from the host.
//!
//! A program of the kernel's (BPF, of the kind `sk_lookup`) leads such connections to
//! listeners of ours, whatever their port. It goes when its descriptor is closed, so
//! nothing of it outlives the shim, and no rule of anybody's is touched. What is meant for
//! 127.0.0.11 is left alone: there Docker's name server listens.

use std::{
    fs::File,
    io,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd},
    ptr,
};

/// Connections to the loopback addresses of a network namespace, until it is dropped.
#[derive(Debug)]
pub struct Loopback {
    /// One for each family that the namespace has.
    pub listeners: Vec<TcpListener>,
    /// What leads to them, as long as it is open.
    pub steering: OwnedFd,
}

impl Loopback {
    /// In the network namespace of the calling thread.
    pub(super) fn new() -> io::Result<Loopback> {
        let map = new_map()?;
        let mut listeners = Vec::new();
        for (key, address) in [
            (0_u32, SocketAddr::from((Ipv4Addr::LOCALHOST, 0))),
            (1, SocketAddr::from((Ipv6Addr::LOCALHOST, 0))),
        ] {
            // A namespace may be without the one or the other.
            let Ok(listener) = TcpListener::bind(address) else {
                continue;
            };
            listener.set_nonblocking(true)?;
            insert(&map, key, listener.as_raw_fd())?;
            listeners.push(listener);
        }
        let namespace = File::open("/proc/thread-self/ns/net")?;
        let steering = attach(&load(&program(map.as_raw_fd()))?, &namespace)?;
        Ok(Loopback {
            listeners,
            steering,
        })
    }
}

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

/// The program: finds the listener for a connection to a loopback address.
fn program(map: RawFd) -> Vec<Instruction> {
    // Places in `struct bpf_sk_lookup`.
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;
    // Addresses as the kernel has them, read by a machine with the low byte first.
    let docker = i32::from_le_bytes([127, 0, 0, 11]);
    let last_of_ipv6 = i32::from_le_bytes([0, 0, 0, 1]);
    // Jumps to the end: whoever would be found without us is.
    const PASS: i16 = i16::MAX;
    // Functions of the kernel.
    const MAP_LOOKUP: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;

    let op = |code, to: u8, from: u8, offset, value| Instruction {
        code,
        registers: to | (from << 4),
        offset,
        value,
    };
    let copy = |to, from| op(0xbf, to, from, 0, 0);
    let set = |to, value| op(0xb7, to, 0, 0, value);
    let load = |to, from, offset| op(0x61, to, from, offset, 0);
    let unless = |register, value, skip| op(0x55, register, 0, skip, value);
    let when = |register, value, skip| op(0x15, register, 0, skip, value);
    let call = |function| op(0x85, 0, 0, 0, function);
    let mut program = vec![
        copy(6, 1),
        load(2, 6, PROTOCOL),
        unless(2, libc::IPPROTO_TCP, PASS),
        load(2, 6, FAMILY),
        when(2, libc::AF_INET6, 7),
        unless(2, libc::AF_INET, PASS),
        load(2, 6, LOCAL_IP4),
        when(2, docker, PASS),
        op(0x57, 2, 0, 0, 0xff),
        unless(2, 127, PASS),
        set(3, 0),
        op(0x05, 0, 0, 9, 0),
        // IPv6.
        load(2, 6, LOCAL_IP6),
        unless(2, 0, PASS),
        load(2, 6, LOCAL_IP6 + 4),
        unless(2, 0, PASS),
        load(2, 6, LOCAL_IP6 + 8),
        unless(2, 0, PASS),
        load(2, 6, LOCAL_IP6 + 12),
        unless(2, last_of_ipv6, PASS),
        set(3, 1),
        // The listener of the family: *(u32 *)(r10 - 4) = r3.
        op(0x63, 10, 3, -4, 0),
        op(0x18, 1, 1, 0, map),
        op(0, 0, 0, 0, 0),
        copy(2, 10),
        op(0x07, 2, 0, 0, -4),
        call(MAP_LOOKUP),
        when(0, 0, PASS),
        copy(7, 0),
        copy(1, 6),
        copy(2, 7),
        set(3, 0),
        call(SK_ASSIGN),
        copy(1, 7),
        call(SK_RELEASE),
        // To whomever it finds otherwise.
        set(0, 1),
        op(0x95, 0, 0, 0, 0),
    ];
    let pass = program.len().saturating_sub(2);
    for (at, instruction) in program.iter_mut().enumerate() {
        if instruction.offset == PASS {
            // Few enough.
            instruction.offset = i16::try_from(pass.saturating_sub(at + 1)).unwrap_or(PASS);
        }
    }
    program
}

/// A map of sockets (BPF_MAP_TYPE_SOCKMAP) for two.
fn new_map() -> io::Result<OwnedFd> {
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

fn insert(map: &OwnedFd, key: u32, socket: RawFd) -> io::Result<()> {
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

fn load(program: &[Instruction]) -> io::Result<OwnedFd> {
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
    let attributes = Attributes {
        kind: 30,
        count: u32::try_from(program.len()).map_err(io::Error::other)?,
        instructions: program.as_ptr(),
        licence: c"Apache-2.0".as_ptr(),
        log: [0; 2],
        log_buffer: ptr::null_mut(),
        version: 0,
        flags: 0,
        // The last byte is zero.
        name: *b"bulkhead_lo\0\0\0\0\0",
        interface: 0,
        attached_as: SK_LOOKUP,
    };
    // SAFETY: BPF_PROG_LOAD reads these and the program, and makes a descriptor.
    unsafe { made(5, &attributes) }
}

/// BPF_SK_LOOKUP among what a program can be attached as.
const SK_LOOKUP: u32 = 36;

fn attach(program: &OwnedFd, namespace: &File) -> io::Result<OwnedFd> {
    #[repr(C)]
    struct Attributes {
        program: u32,
        target: u32,
        attached_as: u32,
        flags: u32,
    }
    let attributes = Attributes {
        program: program.as_raw_fd().cast_unsigned(),
        target: namespace.as_raw_fd().cast_unsigned(),
        attached_as: SK_LOOKUP,
        flags: 0,
    };
    // SAFETY: BPF_LINK_CREATE reads these and makes a descriptor.
    unsafe { made(28, &attributes) }
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
