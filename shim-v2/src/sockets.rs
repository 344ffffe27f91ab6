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
    fs,
    future::poll_fn,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixStream as StdStream,
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    },
    time::Duration,
};

use bulkhead_agent_api::{
    agent,
    relay::{Relay, Way},
};
use rustix::{
    fs::{CWD, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2},
    net::{
        AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with,
        sockopt::{Timeout, set_socket_timeout},
    },
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixStream,
    sync::Semaphore,
    task::{JoinHandle, JoinSet},
    time::timeout,
};
use tracing::{info, warn};
use ttrpc::Code;

use crate::{
    carry::{Bag, CarriedFd},
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
    let address = SocketAddrUnix::new(address)?;
    // With a limit of time a signal, as of a child that ends, breaks it off.
    rustix::io::retry_on_intr(|| connect(&socket, &address))?;
    let stream = StdStream::from(socket);
    stream.set_nonblocking(true)?;
    Ok(stream)
}

/// The sockets of one container being served. Dropped, all its connections are closed.
#[derive(Debug)]
pub(crate) struct Service {
    task: Mutex<Option<JoinHandle<()>>>,
    served: Arc<Served>,
}

/// What is known of the service from outside.
#[derive(Debug, Default)]
struct Served {
    sockets: Vec<Arc<HostSocket>>,
    /// The stream for the connection that is waited for; 0: none is.
    awaited: AtomicU64,
    /// Connections that are being made.
    dialling: AtomicUsize,
    relays: Mutex<Vec<Weak<Carrying>>>,
}

/// A connection that is carried on.
type Carrying = Mutex<Relay<UnixStream, UnixStream>>;

/// What goes along of the sockets of one container when the program changes.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Carried {
    sockets: Vec<PathBuf>,
    awaited: u64,
    relays: Vec<CarriedRelay>,
}

#[derive(Debug, Serialize, Deserialize)]
struct CarriedRelay {
    host: CarriedFd,
    guest: CarriedFd,
    there: Way,
    back: Way,
}

impl Service {
    /// Serves a container that was created with these sockets, if there are any.
    pub(crate) fn begin(
        guest: &Arc<dyn Guest>,
        container: &ContainerId,
        sockets: Vec<HostSocket>,
        places: &Places,
    ) -> Self {
        Self::serve(guest, container, sockets, places, 0, Vec::new())
    }

    /// Goes on with that of the program before this one.
    pub(crate) fn unpack(
        guest: &Arc<dyn Guest>,
        container: &ContainerId,
        carried: Carried,
        places: &Places,
    ) -> io::Result<Self> {
        let socket = |path| HostSocket {
            path,
            fails: AtomicBool::new(false),
        };
        let relay = |carried: CarriedRelay| {
            let stream = |fd: CarriedFd| UnixStream::from_std(StdStream::from(fd.take()?));
            let (host, guest) = (stream(carried.host)?, stream(carried.guest)?);
            Ok(Relay::new(host, guest, carried.there, carried.back))
        };
        let relays: io::Result<Vec<_>> = carried.relays.into_iter().map(relay).collect();
        let sockets = carried.sockets.into_iter().map(socket).collect();
        let awaited = carried.awaited;
        let relays = relays?;
        Ok(Self::serve(
            guest, container, sockets, places, awaited, relays,
        ))
    }

    fn serve(
        guest: &Arc<dyn Guest>,
        container: &ContainerId,
        sockets: Vec<HostSocket>,
        places: &Places,
        awaited: u64,
        relays: Vec<Relay<UnixStream, UnixStream>>,
    ) -> Self {
        let served = Arc::new(Served {
            sockets: sockets.into_iter().map(Arc::new).collect(),
            awaited: AtomicU64::new(awaited),
            ..Served::default()
        });
        let serve = Serve {
            guest: Arc::clone(guest),
            container: container.clone(),
            served: Arc::clone(&served),
            places: places.clone(),
        };
        let serves = !served.sockets.is_empty();
        let task = serves.then(|| tokio::spawn(serve.run(relays)));
        Service {
            task: Mutex::new(task),
            served,
        }
    }

    /// Is a connection being made?
    pub(crate) fn is_busy(&self) -> bool {
        self.served.dialling.load(Ordering::SeqCst) > 0
    }

    /// What goes along when the program changes. It must not be
    /// [busy](Service::is_busy).
    pub(crate) fn carry(&self, bag: &mut Bag) -> io::Result<Carried> {
        let mut relays = Vec::new();
        for relay in lock(&self.served.relays).iter().filter_map(Weak::upgrade) {
            let relay = lock(&relay);
            let (host, guest, there, back) = relay.parts();
            relays.push(CarriedRelay {
                host: bag.put(host)?,
                guest: bag.put(guest)?,
                there: there.clone(),
                back: back.clone(),
            });
        }
        let sockets = self.served.sockets.iter();
        Ok(Carried {
            sockets: sockets.map(|socket| socket.path.clone()).collect(),
            awaited: self.served.awaited.load(Ordering::SeqCst),
            relays,
        })
    }

    /// Lets what is under way come to its end, and closes the rest. The container is gone
    /// from the guest.
    pub(crate) async fn end(&self) {
        let Some(mut task) = lock(&self.task).take() else {
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
        if let Some(task) = &*lock(&self.task) {
            task.abort();
        }
    }
}

impl Served {
    /// Carries a connection on.
    async fn carry_on(&self, relay: Relay<UnixStream, UnixStream>) {
        let relay = Arc::new(Mutex::new(relay));
        {
            let mut relays = lock(&self.relays);
            relays.retain(|relay| relay.strong_count() > 0);
            relays.push(Arc::downgrade(&relay));
        }
        poll_fn(|context| lock(&relay).poll(context)).await;
    }
}

struct Serve {
    guest: Arc<dyn Guest>,
    container: ContainerId,
    served: Arc<Served>,
    places: Places,
}

impl Serve {
    /// Until the container is gone and its connections have ended.
    async fn run(self, relays: Vec<Relay<UnixStream, UnixStream>>) {
        let mut connections = JoinSet::new();
        for relay in relays {
            // As many as they were.
            let place = Arc::clone(&self.places.0).try_acquire_owned();
            let served = Arc::clone(&self.served);
            connections.spawn(async move {
                served.carry_on(relay).await;
                drop(place);
            });
        }
        // Without a place nobody is asked for.
        while let Ok(place) = Arc::clone(&self.places.0).acquire_owned().await {
            // The guest may have been asked before the program changed.
            let stream = match self.served.awaited.load(Ordering::SeqCst) {
                0 => self.guest.dialer().new_id(),
                stream => stream,
            };
            self.served.awaited.store(stream, Ordering::SeqCst);
            let accepted = self.guest.agent().accept(&self.container, stream).await;
            self.served.awaited.store(0, Ordering::SeqCst);
            let number = match accepted {
                Ok(number) => number,
                Err(error) if error.code() == Code::NOT_FOUND => break,
                Err(error) => {
                    info!(container = %self.container, error = error.text(), "its sockets are served no more");
                    break;
                }
            };
            let socket = usize::try_from(number).ok();
            let Some(socket) = socket.and_then(|number| self.served.sockets.get(number)) else {
                warn!(container = %self.container, number, "the guest names a socket that it was not given: its sockets are served no more");
                break;
            };
            while connections.try_join_next().is_some() {}
            let connection = Connection {
                guest: Arc::clone(&self.guest),
                served: Arc::clone(&self.served),
                stream,
                socket: Arc::clone(socket),
            };
            self.served.dialling.fetch_add(1, Ordering::SeqCst);
            connections.spawn(async move {
                connection.carry_on().await;
                drop(place);
            });
        }
        while connections.join_next().await.is_some() {}
    }
}

/// A connection of the guest to a socket, by the stream that was named for it.
struct Connection {
    guest: Arc<dyn Guest>,
    served: Arc<Served>,
    stream: u64,
    socket: Arc<HostSocket>,
}

impl Connection {
    async fn carry_on(self) {
        let dialled = self.socket.dial().await;
        // That nobody is there the guest learns by the end of the stream.
        let room = self.guest.dialer().reserve(1).await;
        let connected = self.guest.dialer().connect(self.stream).await;
        drop(room);
        self.served.dialling.fetch_sub(1, Ordering::SeqCst);
        match (dialled, connected) {
            (Ok(host), Ok(guest)) => {
                let relay = Relay::new(host, guest, Way::default(), Way::default());
                self.served.carry_on(relay).await;
            }
            // The one was logged, and the guest gives up by itself after the other.
            (Err(_), _) | (_, Err(_)) => {}
        }
    }
}

#[cfg(test)]
mod tests;
