//! Files into a container and out of it, as a tar archive.
//!
//! The process that copies has the container's mounts and is in its cgroup: it sees
//! what the container's programs see, the memory that it takes is theirs, and it ends
//! with them at the latest. It is in no other namespace of theirs, so that none of
//! them finds it, and has the rights of the guest's root, or of the container's where
//! that has a user namespace of its own.

mod pack;
mod unpack;

use std::{
    cell::Cell,
    fs::File,
    io::{BufReader, BufWriter},
    os::fd::OwnedFd,
};

use rustix::fs::Mode;

use super::{
    Doing, Error, Helper, Result, clone_and_run, exec,
    paths::Root,
    process::{self, GuestProc},
};
use crate::{
    channel::{Channel, Copy, Fds, Place, Report},
    sys,
};

/// The first to be killed when the container's memory is used up: it can be begun anew.
const OOM_SCORE_ADJ: i32 = 1000;

/// Bytes that are read or written at once: the size of a pipe.
const BUFFER_BYTES: usize = 64 << 10;

/// In the helper: clones the copying process into the container's cgroup.
pub(super) fn run(channel: &Channel, copy: &Copy, place: &Place, fds: &Fds) -> Result<Helper> {
    let proc = GuestProc::open()?;
    let container = exec::first_process(fds)?;
    let cgroup = Cell::new(None);
    clone_and_run(
        channel,
        || exec::clone_into_container(&proc, place, fds, &cgroup),
        |pid| exec::prepare(&proc, pid, OOM_SCORE_ADJ, cgroup.take()),
        || steps(channel, copy, place, fds, container),
    )
}

/// Every step of the process, in order.
fn steps(
    channel: &Channel,
    copy: &Copy,
    place: &Place,
    fds: &Fds,
    container: &OwnedFd,
) -> Result<Helper> {
    let user = if place.own_user {
        libc::CLONE_NEWUSER
    } else {
        0
    };
    sys::join_namespaces(container, libc::CLONE_NEWNS | user)
        .doing("join the container's mounts")?;
    if place.own_user {
        process::become_root()?;
    }
    rustix::process::umask(Mode::empty());
    let root = Root::of_this_process().doing("open the container's root")?;
    let [input, output, _] = &fds.stdio;
    let file = |fd: &OwnedFd| fd.try_clone().map(File::from).doing("take the stream");
    let (input, output) = (file(input)?, file(output)?);

    channel
        .report(&Report::Ready, None)
        .map_err(|_| Error::Gone)?;
    if !channel.wait_for_start() {
        return Err(Error::Gone);
    }
    match copy {
        Copy::In { path, owners } => {
            let input = BufReader::with_capacity(BUFFER_BYTES, input);
            unpack::unpack(&root, path, *owners, input)?;
        }
        Copy::Out { path, extent } => {
            let output = BufWriter::with_capacity(BUFFER_BYTES, output);
            pack::pack(&root, path, *extent, output)?;
        }
    }
    Ok(Helper::Done)
}
