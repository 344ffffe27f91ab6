//! Acting as the guest's process for the length of one system call.
//!
//! New files must belong to whoever creates them in the guest, atomically, so the
//! thread takes on that process's file system identity (setfsuid(2), per thread)
//! and umask. It keeps its capabilities meanwhile: the guest's kernel has checked
//! permissions already, with knowledge that the host does not have.

use std::io;

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use rustix::{
    fs::Mode,
    process::umask,
    thread::{
        CapabilitiesSecureBits, CapabilitySet, UnshareFlags, capabilities,
        capabilities_secure_bits, set_capabilities, set_capabilities_secure_bits,
    },
};

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
    umask(Mode::empty());
    Ok(())
}

/// The thread acts as somebody else until this is dropped.
#[derive(Debug)]
pub(super) struct Caller {
    uid: Uid,
    gid: Gid,
}

impl Caller {
    /// Becomes user `uid` of group `gid`, creating files under `mask`.
    pub(super) fn become_(uid: u32, gid: u32, mask: u32) -> io::Result<Caller> {
        let caller = Caller {
            gid: setfsgid(Gid::from_raw(gid)),
            uid: setfsuid(Uid::from_raw(uid)),
        };
        umask(Mode::from_bits_truncate(mask & 0o777));
        // These calls report no failure; a second, void one tells what holds.
        let now = (
            setfsuid(Uid::from_raw(u32::MAX)).as_raw(),
            setfsgid(Gid::from_raw(u32::MAX)).as_raw(),
        );
        if now != (uid, gid) {
            return Err(io::Error::from_raw_os_error(libc::EPERM));
        }
        Ok(caller)
    }
}

impl Drop for Caller {
    fn drop(&mut self) {
        setfsuid(self.uid);
        setfsgid(self.gid);
        umask(Mode::empty());
    }
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
