//! Sockets of the host that containers reach.
//!
//! A container's process connects to a socket of the guest; the guest says so in its
//! answer to `Accept`, and only then does the shim connect to the socket of the host and
//! carry the connection on. The guest knows a number, the shim the path: a number that it
//! was not given ends the service.
//!
//! # What a path means
//! Links in it are followed once, when the container is created. From then on each
//! connection goes to whatever socket has that very name, and no link is followed any
//! more: a service that is started again is reached, by a directory that it makes anew
//! too, and nobody who may write in a directory on the way can lead to a socket that is
//! not below it.
//!
//! # Limits
//! [`CONNECTIONS`] for a pod. Who comes when there are so many waits in the guest. One
//! task a connection; a service that takes none is waited for [`DIAL`], in a thread.

use std::{
    fs, io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{agent, relay};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use tokio::{
    net::UnixStream,
    sync::{OwnedSemaphorePermit, Semaphore},
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tracing::{info, warn};
use ttrpc::Code;

use crate::{
    error::{Error, Result},
    guest::Guest,
    lock::lock,
    names::ContainerId,
    spec::Socket,
};

/// Most connections of a pod at once. A container that waits for the next one has a place
/// for it.
const CONNECTIONS: usize = 128;

/// How long a service may take to let somebody in.
const DIAL: Duration = Duration::from_secs(5);

/// How long what is under way may take when the container is gone.
const REST: Duration = Duration::from_secs(2);

/// Places for connections of a pod.
#[derive(Clone, Debug)]
pub struct Places(Arc<Semaphore>);

impl Default for Places {
    fn default() -> Self {
        Places(Arc::new(Semaphore::new(CONNECTIONS)))
    }
}

/// A socket of the host, found.
#[derive(Debug)]
pub struct HostSocket {
    /// Absolute and without a link.
    path: PathBuf,
    /// The last attempt to reach it failed, which was logged.
    fails: AtomicBool,
}

impl HostSocket {
    /// Finds a socket; also what the guest is told of it. One that is meant as such may be
    /// absent: its service has not started yet.
    pub fn find(wanted: &Socket) -> Result<(Self, agent::Socket)> {
        let failed = |action, source| Error::Path {
            action,
            path: wanted.source.clone(),
            source,
        };
        let refuse = |reason: &str| Error::Argument {
            what: "Source of a mount",
            value: wanted.source.display().to_string(),
            reason: format!("{reason} (mounted on {})", wanted.destination),
        };
        let path = match fs::canonicalize(&wanted.source) {
            Err(error) if error.kind() == io::ErrorKind::NotFound && wanted.may_be_absent => {
                let (parent, name) = (wanted.source.parent(), wanted.source.file_name());
                let (Some(parent), Some(name)) = (parent, name) else {
                    return Err(refuse("it has no name"));
                };
                let parent = fs::canonicalize(parent);
                let path = parent
                    .map_err(|error| failed("find the directory of", error))?
                    .join(name);
                if path.is_symlink() {
                    return Err(refuse("it is a link that leads to nothing"));
                }
                warn!(socket = %path.display(), "is not there; connections are closed until it is");
                path
            }
            path => path.map_err(|error| failed("find the socket", error))?,
        };
        // Whoever is root in the guest, if nobody said who.
        let mut told = agent::Socket {
            mode: 0o600,
            ..agent::Socket::default()
        };
        match open(&path) {
            Ok((_, stat)) if is_socket(&stat) => {
                (told.mode, told.uid, told.gid) = (stat.st_mode & 0o777, stat.st_uid, stat.st_gid);
            }
            Ok(_) => return Err(refuse("it is not a socket")),
            Err(error) if error.kind() == io::ErrorKind::NotFound && wanted.may_be_absent => {}
            Err(error) => return Err(failed("open the socket", error)),
        }
        let fails = AtomicBool::new(false);
        Ok((HostSocket { path, fails }, told))
    }

    /// Connects to it.
    async fn dial(self: &Arc<Self>) -> io::Result<UnixStream> {
        let socket = Arc::clone(self);
        // A file system that is not there any more blocks, as does a service that lets
        // nobody in.
        let dialled = tokio::task::spawn_blocking(move || dial(&socket.path)).await;
        let dialled = dialled.unwrap_or_else(|error| Err(io::Error::other(error)));
        match &dialled {
            Ok(_) => self.fails.store(false, Ordering::Relaxed),
            // Told once, however often a container tries.
            Err(error) if !self.fails.swap(true, Ordering::Relaxed) => {
                warn!(socket = %self.path.display(), %error, "cannot be reached");
            }
            Err(_) => {}
        }
        UnixStream::from_std(dialled?)
    }
}

/// Opens what has this name, as a place only.
fn open(path: &Path) -> io::Result<(OwnedFd, Stat)> {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let place = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS)?;
    let stat = fstat(&place)?;
    Ok((place, stat))
}

fn is_socket(stat: &Stat) -> bool {
    FileType::from_raw_mode(stat.st_mode) == FileType::Socket
}

/// Connects to the socket of this name; blocks, for [`DIAL`] at most where a service lets
/// nobody in.
fn dial(path: &Path) -> io::Result<StdStream> {
    let (place, stat) = open(path)?;
    if !is_socket(&stat) {
        return Err(io::Error::other("it is not a socket any more"));
    }
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(DIAL))?;
    // By the descriptor: what was looked at, and its name may be too long for an address.
    let address = format!("/proc/self/fd/{}", place.as_raw_fd());
    connect(&socket, &SocketAddrUnix::new(address)?)?;
    let stream = StdStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// The sockets of one container being served. Dropped, all its connections are closed.
#[derive(Debug)]
pub(crate) struct Service(Mutex<Option<JoinHandle<()>>>);

impl Service {
    /// Serves a container that was created with these sockets, if there are any.
    pub(crate) fn begin(
        guest: &Arc<dyn Guest>,
        container: &ContainerId,
        sockets: Vec<HostSocket>,
        places: &Places,
    ) -> Self {
        let serve = Serve {
            guest: Arc::clone(guest),
            container: container.clone(),
            sockets: sockets.into_iter().map(Arc::new).collect(),
            places: places.clone(),
        };
        let serves = !serve.sockets.is_empty();
        Service(Mutex::new(serves.then(|| tokio::spawn(serve.run()))))
    }

    /// Lets what is under way come to its end, and closes the rest. The container is gone
    /// from the guest.
    pub(crate) async fn end(&self) {
        let Some(mut task) = lock(&self.0).take() else {
            return;
        };
        if timeout(REST, &mut task).await.is_err() {
            task.abort();
            // Its descriptors are closed when it is gone.
            let _ = task.await;
        }
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        if let Some(task) = &*lock(&self.0) {
            task.abort();
        }
    }
}

struct Serve {
    guest: Arc<dyn Guest>,
    container: ContainerId,
    sockets: Vec<Arc<HostSocket>>,
    places: Places,
}

impl Serve {
    /// Until the container is gone and its connections have ended.
    async fn run(self) {
        let mut connections = JoinSet::new();
        // Without a place nobody is asked for.
        while let Ok(place) = Arc::clone(&self.places.0).acquire_owned().await {
            let stream = self.guest.dialer().new_id();
            let number = match self.guest.agent().accept(&self.container, stream).await {
                Ok(number) => number,
                Err(error) if error.code() == Code::NOT_FOUND => break,
                Err(error) => {
                    info!(container = %self.container, error = error.text(), "its sockets are served no more");
                    break;
                }
            };
            let socket = usize::try_from(number).ok();
            let Some(socket) = socket.and_then(|number| self.sockets.get(number)) else {
                warn!(container = %self.container, number, "the guest names a socket that it was not given: its sockets are served no more");
                break;
            };
            while connections.try_join_next().is_some() {}
            let (guest, socket) = (Arc::clone(&self.guest), Arc::clone(socket));
            connections.spawn(carry_on(guest, stream, socket, place));
        }
        while connections.join_next().await.is_some() {}
    }
}

/// Carries a connection of the guest on to a socket, by the stream that was named for it.
async fn carry_on(
    guest: Arc<dyn Guest>,
    stream: u64,
    socket: Arc<HostSocket>,
    _place: OwnedSemaphorePermit,
) {
    let dialled = socket.dial().await;
    // That nobody is there the guest learns by the end of the stream.
    let room = guest.dialer().reserve(1).await;
    let connected = guest.dialer().connect(stream).await;
    drop(room);
    match (dialled, connected) {
        (Ok(host), Ok(guest)) => relay(host, guest).await,
        // The one was logged, and the guest gives up by itself after the other.
        (Err(_), _) | (_, Err(_)) => {}
    }
}

#[cfg(test)]
mod tests;
