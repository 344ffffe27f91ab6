//! Copies of files into a container and out of it.
//!
//! A process of its own does the work (`init/transfer.rs`), with a pipe for the
//! archive; a pump stands between that and the host's stream, as for a process's
//! output. Promises that the process does not outlive the request, and that the host
//! can give the copy up at any time.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use bulkhead_agent_api::{
    COPY_BEGINS,
    agent::{CopyInRequest, CopyOutRequest},
};
use tokio::{io::AsyncWriteExt, sync::Notify};

use super::{Containers, cgroup_fd, lock, state::Op};
use crate::{
    channel::{Copy, Extent, Fds, Job, Owners},
    error::{Doing, Error},
    launch::launch,
    reaper::ended,
    stdio,
    streams::BoxStream,
};

/// Copies under way, by their streams.
#[derive(Debug, Default)]
pub(super) struct Copies(Mutex<HashMap<u64, Arc<Notify>>>);

/// One of them, which leaves the list at its end.
struct Underway<'a> {
    copies: &'a Copies,
    stream: u64,
    given_up: Arc<Notify>,
}

impl Copies {
    fn begin(&self, stream: u64) -> Result<Underway<'_>, Error> {
        let given_up = Arc::new(Notify::new());
        let mut all = lock(&self.0);
        if all.contains_key(&stream) {
            return Err(Error::StreamTaken(stream));
        }
        all.insert(stream, Arc::clone(&given_up));
        Ok(Underway {
            copies: self,
            stream,
            given_up,
        })
    }
}

impl Drop for Underway<'_> {
    fn drop(&mut self) {
        lock(&self.copies.0).remove(&self.stream);
    }
}

impl Containers {
    /// Unpacks an archive into a container.
    pub async fn copy_in(&self, request: &CopyInRequest) -> Result<(), Error> {
        let copy = Copy::In {
            path: PathBuf::from(&request.path),
            owners: if request.preserve_ownership {
                Owners::Archive
            } else {
                Owners::Root
            },
        };
        self.copy(&request.container_id, request.stream, copy).await
    }

    /// Packs an archive of what a container has.
    pub async fn copy_out(&self, request: &CopyOutRequest) -> Result<(), Error> {
        let copy = Copy::Out {
            path: PathBuf::from(&request.path),
            extent: if request.no_walk {
                Extent::Header
            } else {
                Extent::Whole
            },
        };
        self.copy(&request.container_id, request.stream, copy).await
    }

    /// Ends a copy, if it is not over.
    pub fn cancel_copy(&self, stream: u64) {
        if let Some(given_up) = lock(&self.copies.0).get(&stream) {
            given_up.notify_one();
        }
    }

    async fn copy(&self, id: &str, stream: u64, copy: Copy) -> Result<(), Error> {
        let underway = self.copies.begin(stream)?;
        tokio::select! {
            copied = self.copy_with(id, stream, copy) => copied,
            () = underway.given_up.notified() => Err(Error::CopyGivenUp(stream)),
        }
    }

    async fn copy_with(&self, id: &str, stream: u64, copy: Copy) -> Result<(), Error> {
        let container = self.container(id)?;
        container.check(Op::Copy)?;
        let claim = self.streams.claim(stream)?;
        let (read, write) = stdio::pipe()?;
        let inwards = matches!(copy, Copy::In { .. });
        let (ours, stdio) = if inwards {
            (write, [read, stdio::null()?, stdio::null()?])
        } else {
            (read, [stdio::null()?, write, stdio::null()?])
        };
        let init = container.init.pidfd.try_clone();
        let fds = Fds {
            stdio,
            cgroup: cgroup_fd(&*container.cgroup()?)?,
            container: Some(init.doing("refer to the container")?),
        };
        let job = Job::Copy {
            copy,
            container: self.place(&container),
        };
        // Neither the container nor its cgroup is held on to: who deletes it need not wait.
        drop(container);
        let mut host = claim.stream().await?;
        begin(&mut host).await?;
        let launched = launch(&self.config.helper, &self.reaper, &job, fds).await;
        let launched = launched.map_err(of_copy)?;
        let exit = launched.exit.clone();
        let pump = if inwards {
            stdio::Pump::In(ours)
        } else {
            stdio::Pump::Out(ours)
        };
        let pump = pump.run(host, exit.clone())?;
        // Dropped, it kills the process.
        let waiting = launched.into_waiting();
        let done = async {
            // The process says nothing more if all went well.
            waiting.start().await.map_err(of_copy)?;
            match ended(exit).await {
                Some(exit) if exit.status == 0 => Ok(()),
                _ => Err(Error::CopyKilled),
            }
        };
        // What a failed copy has written is of no use, and whoever should take it may not
        // take anything any more.
        let pump = async {
            pump.await;
            Ok(())
        };
        tokio::try_join!(done, pump).map(drop)
    }
}

/// Tells the host that the stream is taken.
async fn begin(host: &mut BoxStream) -> Result<(), Error> {
    let written = host.write_all(&[COPY_BEGINS]).await;
    written.doing("tell the host that a copy begins")
}

fn of_copy(error: Error) -> Error {
    match error {
        Error::Init(failure) => Error::Copy(failure),
        Error::InitKilled => Error::CopyKilled,
        error => error,
    }
}
