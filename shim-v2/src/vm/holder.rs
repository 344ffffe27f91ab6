//! A process of the host that stands for one of the guest's: its pid.
//!
//! Whoever runs containers knows a process by a number of the host: to look at its
//! network namespace, to see it in a list, to kill it as a last resort. A [`Holder`]
//! is the process with that number. It lives in the pod's network namespace and in the
//! cgroup of its VMM, sleeps, and ends with the shim. It has no descriptors, listens to
//! no signal but SIGKILL, and is a program of one page; where the host lets no such
//! program run it stays a copy of the shim, which costs some memory.
//!
//! What somebody means who kills it is the pod's affair.

use std::{
    convert::Infallible,
    ffi::CString,
    fs::File,
    io::{self, Write},
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    ptr,
    sync::OnceLock,
};

use libc::c_char;
use nix::sys::signal::SigSet;
use rustix::{
    fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create},
    io::Errno,
    process::{Signal, getpid, getppid, set_parent_process_death_signal},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use serde::{Deserialize, Serialize};
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

use crate::{
    carry::{Bag, CarriedFd},
    cgroup::{self, Entrance},
    child::{Child, Failure},
    error::{Error, Result, host},
    inherit,
};

/// Most holders of a pod, for the limit of tasks of their cgroup: those of every exec
/// at once, and more.
pub const HOLDERS: u64 = 1024;

/// Time for one to be gone; it takes what the kernel needs.
const GONE_MS: u32 = 200;

/// What a holder is called in lists of processes.
const NAME: &str = "bulkhead-task";

// The program: an ELF file whose one segment is the file itself.
std::arch::global_asm!(
    ".pushsection .rodata.bulkhead_holder, \"a\", @progbits",
    ".balign 8",
    "bulkhead_holder:",
    ".byte 0x7f, 'E', 'L', 'F', 2, 1, 1, 0", // 64 bits, little endian
    ".quad 0",
    ".short 2, 62", // an executable for x86-64
    ".long 1",
    ".quad 0x400000 + (2f - bulkhead_holder)", // where it begins
    ".quad 64, 0",                             // program headers, no sections
    ".long 0",
    ".short 64, 56, 1, 0, 0, 0",
    ".long 1, 5", // loaded, to be read and executed
    ".quad 0, 0x400000, 0x400000",
    ".quad 3f - bulkhead_holder, 3f - bulkhead_holder, 0x1000",
    "2:",
    "mov edi, 15", // prctl(PR_SET_NAME, name)
    "lea rsi, [rip + 5f]",
    "mov eax, 157",
    "syscall",
    "xor edi, edi", // close_range(0, the last one, 0)
    "mov esi, 0xffffffff",
    "xor edx, edx",
    "mov eax, 436",
    "syscall",
    "4:",
    "mov eax, 34", // pause()
    "syscall",
    "jmp 4b",
    "5:",
    ".asciz \"bulkhead-task\"",
    "3:",
    "bulkhead_holder_end:",
    ".popsection",
);

unsafe extern "C" {
    static bulkhead_holder: u8;
    static bulkhead_holder_end: u8;
}

/// The program's file.
fn program() -> &'static [u8] {
    let (begin, end) = (&raw const bulkhead_holder, &raw const bulkhead_holder_end);
    // SAFETY: both names are labels of the assembly above, the second one at the end of
    // what the first one begins; it is read-only data of this program.
    unsafe { std::slice::from_raw_parts(begin, end.addr() - begin.addr()) }
}

/// Where the holders of a pod live: next to its VMM.
#[derive(Debug)]
pub struct Quarters {
    cgroup: Option<Entrance>,
    network: OwnedFd,
    /// The holders' program, once there was one; `None` if this host has none.
    program: OnceLock<Option<OwnedFd>>,
}

/// What goes along of them when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    cgroup: Option<cgroup::CarriedEntrance>,
    network: CarriedFd,
}

impl Quarters {
    /// Those of a pod whose VMM is in this cgroup and this network namespace.
    #[must_use]
    pub(crate) fn new(cgroup: Option<Entrance>, network: OwnedFd) -> Self {
        Quarters {
            cgroup,
            network,
            program: OnceLock::new(),
        }
    }

    /// The network namespace.
    pub(crate) fn network(&self) -> BorrowedFd<'_> {
        self.network.as_fd()
    }

    /// Those of the program before this one.
    pub(crate) fn unpack(carried: Carried) -> io::Result<Self> {
        let cgroup = carried.cgroup.map(Entrance::unpack).transpose()?;
        Ok(Quarters::new(cgroup, carried.network.take()?))
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let cgroup = self.cgroup.as_ref().map(|cgroup| cgroup.carry(bag));
        Ok(Carried {
            cgroup: cgroup.transpose()?,
            network: bag.put(&self.network)?,
        })
    }

    /// The way into the cgroup.
    pub(crate) fn entrance(&self) -> Option<&Entrance> {
        self.cgroup.as_ref()
    }

    /// Makes a holder that lists of processes show with `label`; in the pod's own
    /// network namespace, or in another one.
    ///
    /// It ends with the calling thread, which must be the one that the shim lives by.
    pub(crate) fn hold(&self, label: &str, network: Option<BorrowedFd<'_>>) -> Result<Holder> {
        let failed = host("make the process that stands for a container's");
        match self.start(label, network.unwrap_or_else(|| self.network.as_fd())) {
            Ok(child) => Ok(Holder { child: Some(child) }),
            Err(Failure::Birth(error) | Failure::Program(error)) => Err(failed(error)),
        }
    }

    fn start(&self, label: &str, network: BorrowedFd<'_>) -> Result<Child, Failure> {
        let text = |text: &str| CString::new(text).map_err(|nul| Failure::Program(nul.into()));
        let words = [text(NAME)?, text(label)?];
        let argv = [words[0].as_ptr(), words[1].as_ptr(), ptr::null()];
        let program = self.program.get_or_init(|| {
            let made = executable();
            let made = made.inspect_err(|error| warn!(%error, "no program for holders"));
            made.ok()
        });
        let shim = getpid();
        let become_it = || -> io::Result<Infallible> {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            if getppid() != Some(shim) {
                return Err(Errno::SRCH.into());
            }
            SigSet::all().thread_block()?;
            move_into_link_name_space(network, Some(LinkNameSpaceType::Network))?;
            rustix::process::chdir(c"/")?;
            inherit::keep(&[])?;
            if let Some(program) = program {
                execute(program.as_fd(), &argv);
            }
            sleep()
        };
        // SAFETY: `become_it` makes system calls only, on memory that is there.
        unsafe { Child::born(self.cgroup.as_ref(), become_it) }
    }
}

/// A file with the program that nobody can change.
fn executable() -> io::Result<OwnedFd> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = match memfd_create(NAME, flags | MemfdFlags::EXEC) {
        // Before Linux 6.3 every such file could be executed.
        Err(Errno::INVAL) => memfd_create(NAME, flags),
        made => made,
    };
    let mut file = File::from(file?);
    file.write_all(program())?;
    let all = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    fcntl_add_seals(&file, all)?;
    Ok(file.into())
}

/// Becomes a program, without environment; returns if it cannot. Makes system calls
/// only.
fn execute(program: BorrowedFd<'_>, argv: &[*const c_char; 3]) {
    let environment: [*const c_char; 1] = [ptr::null()];
    // SAFETY: the path is empty and ends with NUL; both arrays end with a null pointer
    // and consist of pointers to strings that end with NUL and live as long.
    unsafe {
        libc::syscall(
            libc::SYS_execveat,
            program.as_raw_fd(),
            c"".as_ptr(),
            argv.as_ptr(),
            environment.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
}

/// What the program does, for a process that could not become it.
fn sleep() -> ! {
    // SAFETY: closes descriptors of a process that uses none any more.
    unsafe { libc::syscall(libc::SYS_close_range, 0, libc::c_uint::MAX, 0) };
    loop {
        // SAFETY: waits, and touches nothing.
        unsafe { libc::pause() };
    }
}

/// A process that stands for one of the guest's. Dropping it ends it.
#[derive(Debug)]
pub struct Holder {
    child: Option<Child>,
}

impl Holder {
    /// Goes on with one of the program before this one.
    pub(crate) fn unpack(pid: u32) -> io::Result<Self> {
        let child = Child::adopt(pid.cast_signed())?;
        Ok(Holder { child: Some(child) })
    }

    /// Its number.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child
            .as_ref()
            .map_or(0, |child| child.pid().unsigned_abs())
    }

    /// Waits until somebody has ended it.
    pub async fn ended(&self) {
        let Some(child) = &self.child else { return };
        let watch = |pidfd: OwnedFd| {
            // SAFETY: the descriptor is owned, so it is open and the same for as long.
            let watched = unsafe { AsyncFd::register_with_interest(pidfd, Interest::READABLE) };
            watched.map_err(io::Error::from)
        };
        match child.pidfd().and_then(watch) {
            Ok(pidfd) => {
                let _ = pidfd.readable().await.map(drop);
            }
            Err(source) => {
                let error = Error::Host {
                    action: "watch the process that stands for a container's",
                    source,
                };
                warn!(error = error.text(), "its end will not be seen");
                std::future::pending::<()>().await;
            }
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        if let Some(child) = self.child.take() {
            child.end(GONE_MS);
        }
    }
}

#[cfg(test)]
mod tests;
