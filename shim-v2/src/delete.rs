//! `delete`: removes what a pod left behind, from its id alone.
//!
//! Needs no living shim, no guest, no bundle; whatever is gone already is no error.
//! It may meet a shim that is in the middle of its own end. Takes less than two
//! seconds. Mounts need no care: they ended with the shim's mount namespace.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    api::DeleteResponse,
    protobuf::{Message, MessageField, well_known_types::timestamp::Timestamp},
};
use rustix::process::Signal;

use crate::{
    error::{Error, Result, host},
    flags::Flags,
    mount,
    names::{ContainerId, GroupId, Namespace},
    statedir::{Process, StateDir, ended, signal},
};

/// Time for the shim to end in order once its VM is gone.
const ORDERLY_MS: u32 = 800;
/// Time for a killed process to be gone; it takes what the kernel needs.
const KILLED_MS: u32 = 1000;
/// Exit status of a task whose shim is gone: 128 and SIGKILL.
const STATUS: u32 = 137;

/// Cleans up and returns what must be printed.
pub fn run(flags: &Flags) -> Result<Vec<u8>> {
    let namespace = Namespace::new(&flags.namespace)?;
    let id = ContainerId::new(&flags.id)?;
    // A container in the pod of another one has nothing on the host that is not in
    // its shim's namespace: only an owner has a directory of its name.
    let dir = StateDir::of(&namespace, &GroupId::new(id.as_str())?);
    let pid = dir.processes().vmm.map_or(0, |vmm| vmm.pid.unsigned_abs());
    end(&dir)?;
    if let Some(bundle) = bundle(flags) {
        // By whoever mounted it there; containerd gives up on a busy one.
        let _ = mount::detach(&bundle.join("rootfs"));
    }
    let response = DeleteResponse {
        pid,
        exit_status: STATUS,
        exited_at: MessageField::some(Timestamp::now()),
        ..DeleteResponse::default()
    };
    response
        .write_to_bytes()
        .map_err(|error| host("encode the answer")(io::Error::other(error)))
}

fn bundle(flags: &Flags) -> Option<PathBuf> {
    if flags.bundle.is_empty() {
        std::env::current_dir().ok()
    } else {
        Some(PathBuf::from(&flags.bundle))
    }
}

/// Ends the processes of a pod and removes its directory and socket.
fn end(dir: &StateDir) -> Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let processes = dir.processes();
    kill(processes.vmm);
    if let Some(shim) = processes.shim.and_then(|shim| shim.open().ok().flatten()) {
        // With its VM gone it tells the ends of its tasks and cleans up itself.
        let _ = signal(&shim, Signal::TERM);
        if !ended(&shim, ORDERLY_MS) {
            let _ = signal(&shim, Signal::KILL);
            ended(&shim, KILLED_MS);
        }
    }
    // A VM that was started in the meantime.
    kill(dir.processes().vmm);
    if let Some(socket) = processes.socket {
        remove_dead_socket(&socket);
    }
    dir.remove().map_err(|source| Error::Path {
        action: "remove",
        path: dir.path().to_owned(),
        source,
    })
}

fn kill(process: Option<Process>) {
    if let Some(process) = process.and_then(|process| process.open().ok().flatten()) {
        let _ = signal(&process, Signal::KILL);
        ended(&process, KILLED_MS);
    }
}

/// Removes a socket unless somebody listens on it: then it is another shim's.
fn remove_dead_socket(path: &Path) {
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}

/// Clears what an earlier pod of the same id left, before a new one begins.
///
/// A pod whose shim lives is left alone: that is an error.
pub fn sweep(dir: &StateDir) -> io::Result<()> {
    if !dir.exists() {
        return Ok(());
    }
    let processes = dir.processes();
    if let Some(shim) = processes.shim
        && let Some(process) = shim.open()?
        && !ended(&process, 0)
    {
        let text = format!("it is in use by a shim with pid {}", shim.pid);
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, text));
    }
    kill(processes.vmm);
    dir.remove()
}
