//! Does KVM run what a Linux kernel consists of?
//!
//! That `/dev/kvm` opens proves nothing: some back ends emulate, and stop at the
//! first instruction that their author did not think of. This runs a page of code
//! in 64-bit mode with paging on one virtual processor, with instructions that
//! every kernel uses and emulators lack, and believes only the right answer.

use std::{
    arch::global_asm, fs::OpenOptions, io, os::fd::IntoRawFd, os::unix::fs::OpenOptionsExt,
    sync::mpsc, thread, time::Duration,
};

use kvm_bindings::{KVM_MAX_CPUID_ENTRIES, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryMmap};

/// Longer than any processor needs by far, even an emulated one on a busy host. What
/// cannot run the code says so at once.
const LIMIT: Duration = Duration::from_secs(5);

/// Guest memory in bytes.
const MEMORY: usize = 64 << 10;
/// Where the parts of it are; each has a page.
const PML4: u64 = 0x1000;
const PDPT: u64 = 0x2000;
const PAGE_DIRECTORY: u64 = 0x3000;
const PAGE_TABLE: u64 = 0x4000;
const GDT: u64 = 0x5000;
const CODE: u64 = 0x6000;
const STACK_TOP: u64 = 0x8000;
const DATA: u64 = 0x8000;
const IDT: u64 = 0x9000;
/// A second virtual address of [`DATA`].
const ALIAS: u64 = 0x1_0000;

/// Answers go to this port.
const PORT: u16 = 0x600;
/// All went well.
const GOOD: u8 = 0x42;

/// What the code tests; a wrong result answers its number.
const STEPS: [&str; 6] = [
    "nothing",
    "push and pop",
    "a second mapping of a page",
    "cmpxchg16b",
    "int3",
    "xsave and xrstor",
];

// r15 holds the number of the step. rdi = DATA, rsi = ALIAS, r13 = 1 with xsave.
global_asm!(
    ".pushsection .rodata.bulkhead_probe, \"a\"",
    ".global bulkhead_probe_start, bulkhead_probe_int3, bulkhead_probe_end",
    "bulkhead_probe_start:",
    "mov r15d, 1",
    "movabs rax, 0x1122334455667788",
    "push rax",
    "pop rcx",
    "cmp rax, rcx",
    "jne 9f",
    "mov r15d, 2",
    "mov [rdi], rax",
    "cmp [rsi], rax",
    "jne 9f",
    "mov r15d, 3",
    "mov qword ptr [rdi + 16], 1",
    "mov qword ptr [rdi + 24], 2",
    "mov eax, 1",
    "mov edx, 2",
    "mov ebx, 3",
    "mov ecx, 4",
    "lock cmpxchg16b [rdi + 16]",
    "jne 9f",
    "cmp qword ptr [rdi + 16], 3",
    "jne 9f",
    "cmp qword ptr [rdi + 24], 4",
    "jne 9f",
    "mov r15d, 4",
    "xor r12d, r12d",
    "int3",
    "cmp r12d, 1",
    "jne 9f",
    "test r13d, r13d",
    "jz 8f",
    "mov r15d, 5",
    "xor ecx, ecx",
    "xgetbv",
    "test eax, 1",
    "jz 9f",
    "mov eax, 3",
    "xor edx, edx",
    "xsave [rdi + 64]",
    "mov eax, 3",
    "xor edx, edx",
    "xrstor [rdi + 64]",
    "8:",
    "mov r15d, 0x42",
    "9:",
    "mov eax, r15d",
    "mov edx, 0x600",
    "out dx, al",
    "hlt",
    "bulkhead_probe_int3:",
    "inc r12d",
    "iretq",
    "bulkhead_probe_end:",
    ".popsection",
);

unsafe extern "C" {
    static bulkhead_probe_start: u8;
    static bulkhead_probe_int3: u8;
    static bulkhead_probe_end: u8;
}

/// The code, and the offset of its interrupt handler.
fn code() -> (&'static [u8], u64) {
    let (start, handler, end) = (
        &raw const bulkhead_probe_start,
        &raw const bulkhead_probe_int3,
        &raw const bulkhead_probe_end,
    );
    let length = end.addr() - start.addr();
    // SAFETY: the two symbols begin and end one section's bytes, assembled above
    // into read-only data that is never unmapped.
    let bytes = unsafe { std::slice::from_raw_parts(start, length) };
    (bytes, (handler.addr() - start.addr()) as u64)
}

/// What is wrong with KVM.
#[derive(Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing.
    Usable,
    /// `/dev/kvm` cannot be opened.
    Closed(i32),
    /// It opens, but does not run the code; why.
    Broken(String),
}

/// Runs the test, within five seconds.
pub fn probe() -> Verdict {
    let (send, receive) = mpsc::channel();
    // A processor that never comes back keeps this thread; it ends with the process.
    thread::spawn(move || send.send(run()));
    match receive.recv_timeout(LIMIT) {
        Ok(Ok(())) => Verdict::Usable,
        Ok(Err(Failure::Open(errno))) => Verdict::Closed(errno),
        Ok(Err(Failure::Other(text))) => Verdict::Broken(text),
        Err(_) => Verdict::Broken(format!(
            "a few instructions did not end within {} s",
            LIMIT.as_secs()
        )),
    }
}

enum Failure {
    Open(i32),
    Other(String),
}

fn cannot<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> Failure {
    move |error| Failure::Other(format!("cannot {what}: {error}"))
}

fn open() -> Result<Kvm, Failure> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open("/dev/kvm");
    let file = file.map_err(|error: io::Error| Failure::Open(error.raw_os_error().unwrap_or(0)))?;
    // SAFETY: the descriptor was opened above and its ownership is given away here.
    Ok(unsafe { std::os::fd::FromRawFd::from_raw_fd(file.into_raw_fd()) })
}

fn run() -> Result<(), Failure> {
    let kvm = open()?;
    if kvm.get_api_version() != 12 {
        return Err(Failure::Other(format!(
            "KVM speaks version {}, not 12",
            kvm.get_api_version()
        )));
    }
    let vm = kvm.create_vm().map_err(|error| match error.errno() {
        libc::EBUSY => Failure::Open(libc::EBUSY),
        _ => cannot("create a virtual machine")(error),
    })?;
    let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), MEMORY)])
        .map_err(cannot("map memory"))?;
    fill(&memory).map_err(cannot("write guest memory"))?;
    let address = memory
        .get_host_address(GuestAddress(0))
        .map_err(cannot("find guest memory"))?;
    let region = kvm_userspace_memory_region {
        slot: 0,
        flags: 0,
        guest_phys_addr: 0,
        memory_size: MEMORY as u64,
        userspace_addr: address.addr() as u64,
    };
    // SAFETY: the region is the whole mapping of `memory`, which is dropped after
    // `vm` and its processor, made later in this function.
    unsafe { vm.set_user_memory_region(region) }.map_err(cannot("give the VM its memory"))?;
    let mut vcpu = vm
        .create_vcpu(0)
        .map_err(cannot("create a virtual processor"))?;
    let cpuid = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(cannot("ask for processor features"))?;
    vcpu.set_cpuid2(&cpuid)
        .map_err(cannot("set processor features"))?;
    // CPUID leaf 1: ECX bit 26 is XSAVE.
    let xsave = cpuid
        .as_slice()
        .iter()
        .any(|leaf| leaf.function == 1 && leaf.ecx & (1 << 26) != 0);

    let mut sregs = vcpu.get_sregs().map_err(cannot("read registers"))?;
    let segment = |selector, kind, long| kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector,
        type_: kind,
        present: 1,
        s: 1,
        l: long,
        db: 1 - long,
        g: 1,
        ..kvm_segment::default()
    };
    sregs.cs = segment(8, 11, 1);
    let data = segment(16, 3, 0);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    (sregs.gdt.base, sregs.gdt.limit) = (GDT, 23);
    (sregs.idt.base, sregs.idt.limit) = (IDT, 16 * 4 - 1);
    sregs.cr3 = PML4;
    // PAE, OSFXSR, OSXMMEXCPT, and OSXSAVE if there is such a thing.
    sregs.cr4 = 1 << 5 | 1 << 9 | 1 << 10 | u64::from(xsave) << 18;
    // PE, MP, ET, NE, WP, PG.
    sregs.cr0 = 1 | 1 << 1 | 1 << 4 | 1 << 5 | 1 << 16 | 1 << 31;
    // LME, LMA.
    sregs.efer = 1 << 8 | 1 << 10;
    vcpu.set_sregs(&sregs)
        .map_err(cannot("enter 64-bit mode"))?;
    let mut regs = vcpu.get_regs().map_err(cannot("read registers"))?;
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK_TOP, 2);
    (regs.rdi, regs.rsi, regs.r13) = (DATA, ALIAS, u64::from(xsave));
    vcpu.set_regs(&regs).map_err(cannot("set registers"))?;

    let reason = loop {
        break match vcpu.run() {
            Ok(VcpuExit::IoOut(PORT, [GOOD])) => return Ok(()),
            Ok(VcpuExit::IoOut(PORT, &[step])) => {
                let step = STEPS
                    .get(usize::from(step))
                    .copied()
                    .unwrap_or("its own test");
                return Err(Failure::Other(format!("the processor gets {step} wrong")));
            }
            Ok(VcpuExit::InternalError) => "KVM cannot run it (internal error)".to_owned(),
            Ok(VcpuExit::Shutdown) => "the processor shut down (triple fault)".to_owned(),
            Ok(exit) => format!("the processor stopped with {exit:?}"),
            Err(error) if error.errno() == libc::EINTR || error.errno() == libc::EAGAIN => continue,
            Err(error) => format!("KVM cannot run it ({error})"),
        };
    };
    let step = vcpu
        .get_regs()
        .ok()
        .and_then(|regs| STEPS.get(usize::try_from(regs.r15).ok()?));
    Err(Failure::Other(match step {
        Some(step) => format!("{reason} at the test of {step}"),
        None => reason,
    }))
}

/// Page tables, descriptor tables and the code.
fn fill(memory: &GuestMemoryMmap) -> Result<(), <GuestMemoryMmap as Bytes<GuestAddress>>::E> {
    // Present, writable.
    const FLAGS: u64 = 3;
    let put = |address: u64, value: u64| memory.write_obj(value, GuestAddress(address));
    put(PML4, PDPT | FLAGS)?;
    put(PDPT, PAGE_DIRECTORY | FLAGS)?;
    put(PAGE_DIRECTORY, PAGE_TABLE | FLAGS)?;
    for page in 0..16 {
        put(PAGE_TABLE + 8 * page, page << 12 | FLAGS)?;
    }
    put(PAGE_TABLE + 8 * (ALIAS >> 12), DATA | FLAGS)?;
    // 64-bit code and data, ring 0, accessed.
    put(GDT + 8, 0x00af_9b00_0000_ffff)?;
    put(GDT + 16, 0x00cf_9300_0000_ffff)?;
    let (code, handler) = code();
    memory.write_slice(code, GuestAddress(CODE))?;
    // Vector 3: a present 64-bit interrupt gate, selector 8; the offset fits in 16 bits.
    put(IDT + 16 * 3, (CODE + handler) | 8 << 16 | 0x8e00 << 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_ends_in_time_whatever_kvm_is_here() {
        let start = std::time::Instant::now();
        let _ = probe();
        assert!(start.elapsed() < 2 * LIMIT);
    }

    #[test]
    fn the_code_fits_its_page_and_speaks_to_its_port() {
        let (code, handler) = code();
        assert!(code.len() < 0x1000 && handler < code.len() as u64);
        let port = PORT.to_le_bytes();
        assert!(code.windows(2).any(|window| window == port) && code.contains(&GOOD));
    }
}
