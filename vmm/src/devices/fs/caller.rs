//! Acting as the guest's process for the length of one system call.
//!
//! New files must belong to whoever creates them in the guest, atomically, so the
//! thread takes on that process's file system identity (setfsuid(2), per thread)
//! and umask. It keeps its capabilities meanwhile: the guest's kernel has checked
//! permissions already, with knowledge that the host does not have.
//!
//! Between requests a thread is who it was at its start, and its umask is that of
//! the last request that needed one. What holds already is not set again.

use std::{cell::Cell, io};

use rustix::{
    fs::Mode,
    process::umask,
    thread::{
        CapabilitiesSecureBits, CapabilitySet, UnshareFlags, capabilities,
        capabilities_secure_bits, set_capabilities, set_capabilities_secure_bits,
    },
};

thread_local! {
    /// The umask of this thread.
    static UMASK: Cell<u32> = const { Cell::new(u32::MAX) };
    /// The user and group as which this thread works for the share itself.
    static SELF: Cell<(u32, u32)> = const { Cell::new((0, 0)) };
}

/// Prepares a thread: its umask and working directory become its own, and a
/// changed identity does not cost it its capabilities.
pub(super) fn prepare_thread() -> io::Result<()> {
    // SAFETY: this thread shares no memory of its file system context with others
    // that rely on it: only its root, working directory and umask become its own.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }?;
    let keep = CapabilitiesSecureBits::NO_SETUID_FIXUP;
    let bits = capabilities_secure_bits()?;
    if !bits.contains(keep)
        && capabilities(None)?
            .effective
            .contains(CapabilitySet::SETPCAP)
    {
        set_capabilities_secure_bits(bits | keep)?;
    }
    set_umask(0);
    SELF.set((fsuid(u32::MAX), fsgid(u32::MAX)));
    Ok(())
}

fn set_umask(mask: u32) {
    if UMASK.replace(mask) != mask {
        umask(Mode::from_bits_truncate(mask));
    }
}

/// The thread acts as somebody else until this is dropped.
#[derive(Debug)]
pub(super) struct Caller {
    /// Who it was before, where that is another one.
    before: Option<(u32, u32)>,
}

impl Caller {
    /// Becomes user `uid` of group `gid`, creating files under `mask`.
    pub(super) fn become_(uid: u32, gid: u32, mask: u32) -> io::Result<Caller> {
        set_umask(mask & 0o777);
        let before = SELF.get();
        if before == (uid, gid) {
            return Ok(Caller { before: None });
        }
        fsgid(gid);
        fsuid(uid);
        let caller = Caller {
            before: Some(before),
        };
        // These calls report no failure; a second, void one tells what holds.
        if (fsuid(u32::MAX), fsgid(u32::MAX)) == (uid, gid) {
            Ok(caller)
        } else {
            Err(io::Error::from_raw_os_error(libc::EPERM))
        }
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        if let Some((uid, gid)) = self.before {
            fsuid(uid);
            fsgid(gid);
        }
    }
}

/// Sets the file system's user of this thread; the one before. No user has the
/// largest number: it changes nothing.
fn fsuid(uid: u32) -> u32 {
    // SAFETY: the call takes a number and touches no memory.
    unsafe { libc::setfsuid(uid) }.cast_unsigned()
}

/// As [`fsuid`], for the group.
fn fsgid(gid: u32) -> u32 {
    // SAFETY: the call takes a number and touches no memory.
    unsafe { libc::setfsgid(gid) }.cast_unsigned()
}

/// While it lives, the host clears set-user-id and set-group-id bits of a file
/// that is written to, as for a process without CAP_FSETID.
#[derive(Debug)]
pub(super) struct KillPrivileges(bool);

impl KillPrivileges {
    /// Gives CAP_FSETID up if `wanted`.
    pub(super) fn when(wanted: bool) -> io::Result<KillPrivileges> {
        let had = wanted && fsetid(false)?;
        Ok(KillPrivileges(had))
    }
}

impl Drop for KillPrivileges {
    fn drop(&mut self) {
        if self.0 {
            // It is still in the permitted set, so this cannot fail.
            let _ = fsetid(true);
        }
    }
}

/// Whether CAP_FSETID was effective before it became `on` for this thread.
fn fsetid(on: bool) -> io::Result<bool> {
    let mut sets = capabilities(None)?;
    let had = sets.effective.contains(CapabilitySet::FSETID);
    if had != on {
        sets.effective.set(CapabilitySet::FSETID, on);
        set_capabilities(None, sets)?;
    }
    Ok(had)
}
