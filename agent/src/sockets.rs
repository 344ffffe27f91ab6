//! Sockets of the host in a container: the guest's end of each.
//!
//! The agent listens; the specification mounts the socket's file where the container
//! looks for it. Nothing is accepted before the host asks for a connection, so whoever
//! connects waits where the kernel lets him: in the queue of the socket, which has an
//! end. Each connection is relayed by a stream that the host opens for it; that it
//! cannot, it says by closing that stream.
//!
//! Promises: who may connect is who may on the host, by the mode of the file; what a
//! process had written when its container ended is passed on, if that takes no longer
//! than [`REST`]; nothing is left of a container's sockets when [`Sockets`] is dropped.

use std::{
    fs,
    future::poll_fn,
    io,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::UnixListener as StdListener,
    },
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    task::{Context, Poll},
    time::Duration,
};

use bulkhead_agent_api::{agent::Socket, relay};
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::{AtFlags, Gid, Mode, OFlags, Uid, chmodat, chownat},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, listen, socket_with},
};
use tokio::{
    net::{UnixListener, UnixStream},
    sync::{Mutex as AsyncMutex, Semaphore, watch},
    task::JoinSet,
    time::{sleep, timeout},
};

use crate::{
    container::lock,
    error::{Doing, Error},
    streams::Streams,
};

/// Most connections of a container at once. The host has a limit for all of them.
const CONNECTIONS: usize = 128;

/// Connections that wait to be accepted, of each socket.
const WAITING: i32 = 128;

/// How long what is under way may take when the container is deleted.
const REST: Duration = Duration::from_secs(1);

/// The sockets of one container. Dropped, they are removed, and what goes through them
/// is closed.
#[derive(Debug)]
pub(crate) struct Sockets {
    id: String,
    listeners: Vec<UnixListener>,
    /// The one that is looked at first. Held by who looks.
    next: AsyncMutex<usize>,
    places: Arc<Semaphore>,
    relays: Mutex<JoinSet<()>>,
    stage: watch::Sender<Stage>,
    /// Where their files are, as long as there are any.
    directory: Mutex<Option<Directory>>,
}

/// How far the end of the sockets has come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    #[default]
    Open,
    /// What has come is still accepted.
    Closing,
    /// The host has been told that there are no more.
    Closed,
}

/// A directory that is removed with what is in it.
#[derive(Debug)]
struct Directory(PathBuf);

impl Drop for Directory {
    fn drop(&mut self) {
        // Nobody is left to be told of a failure.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Sockets {
    /// Listens on the sockets of the container `id`, below `directory`.
    pub(crate) fn listen(directory: &Path, id: &str, wanted: &[Socket]) -> Result<Self, Error> {
        let mut sockets = Self {
            id: id.to_owned(),
            listeners: Vec::new(),
            next: AsyncMutex::default(),
            places: Arc::new(Semaphore::new(CONNECTIONS)),
            relays: Mutex::default(),
            stage: watch::Sender::default(),
            directory: Mutex::default(),
        };
        if !wanted.is_empty() {
            sockets
                .listen_in(&directory.join(id), wanted)
                .doing("listen on a socket")?;
        }
        Ok(sockets)
    }

    fn listen_in(&mut self, path: &Path, wanted: &[Socket]) -> io::Result<()> {
        fs::create_dir_all(path)?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        *lock(&self.directory) = Some(Directory(path.to_owned()));
        let directory = rustix::fs::open(path, flags, Mode::empty())?;
        for (number, socket) in wanted.iter().enumerate() {
            let listener = listener(&directory, &number.to_string(), socket)?;
            self.listeners.push(UnixListener::from_std(listener)?);
        }
        Ok(())
    }

    /// Waits for a connection and relays it by the stream with this id, when that comes.
    /// Answers the number of its socket.
    pub(crate) async fn accept(&self, streams: &Arc<Streams>, stream: u64) -> Result<u32, Error> {
        let closed = || Error::NoContainer(self.id.clone());
        let place = Arc::clone(&self.places).acquire_owned().await;
        let place = place.expect("nobody closes the semaphore");
        // From here on it can come.
        let claim = streams.claim(stream)?;
        let (number, connection) = self.next().await.ok_or_else(closed)?;
        let mut relays = lock(&self.relays);
        while relays.try_join_next().is_some() {}
        relays.spawn(async move {
            if let Ok(stream) = claim.stream().await {
                relay(connection, stream).await;
            }
            drop(place);
        });
        Ok(number)
    }

    /// The next connection; none if there is none and the container is being deleted.
    async fn next(&self) -> Option<(u32, UnixStream)> {
        const AFTER_FAILURE: Duration = Duration::from_millis(100);
        let mut next = self.next.lock().await;
        loop {
            let accepted = tokio::select! {
                // What has come comes before the end.
                biased;
                accepted = poll_fn(|context| self.poll_accept(*next, context)) => accepted,
                () = self.reached(Stage::Closing) => {
                    self.stage.send_replace(Stage::Closed);
                    return None;
                }
            };
            match accepted {
                (number, Ok(connection)) => {
                    *next = number + 1;
                    return Some((u32::try_from(number).ok()?, connection));
                }
                // Out of descriptors or memory: the same at once if asked at once.
                (_, Err(_)) => sleep(AFTER_FAILURE).await,
            }
        }
    }

    /// Looks at all listeners, at `first` first, so that none waits for a busier one.
    fn poll_accept(
        &self,
        first: usize,
        context: &mut Context<'_>,
    ) -> Poll<(usize, io::Result<UnixStream>)> {
        let count = self.listeners.len();
        for number in (first..first + count).map(|number| number % count) {
            if let Poll::Ready(accepted) = self.listeners[number].poll_accept(context) {
                return Poll::Ready((number, accepted.map(|(connection, _)| connection)));
            }
        }
        Poll::Pending
    }

    /// Lets what is under way come to its end, and closes the rest. The processes of the
    /// container have ended.
    pub(crate) async fn close(&self) {
        self.stage.send_replace(Stage::Closing);
        let rest = async {
            if self.has_waiting() {
                self.reached(Stage::Closed).await;
            }
            let mut relays = std::mem::take(&mut *lock(&self.relays));
            while relays.join_next().await.is_some() {}
        };
        let _ = timeout(REST, rest).await;
        // Now, for whoever has the id next has its files there.
        lock(&self.directory).take();
    }

    /// Waits until the end has come so far.
    async fn reached(&self, wanted: Stage) {
        let mut stage = self.stage.subscribe();
        // Its other end is ours.
        let _ = stage.wait_for(|stage| *stage >= wanted).await.map(drop);
    }

    /// Whether somebody has connected and was not accepted yet.
    fn has_waiting(&self) -> bool {
        let watched = |listener| PollFd::new(listener, PollFlags::IN);
        let mut listeners: Vec<_> = self.listeners.iter().map(watched).collect();
        let now = Timespec::default();
        poll(&mut listeners, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

/// Listens at `name` in a directory. Nobody can connect before the file says who may.
fn listener(directory: &OwnedFd, name: &str, socket: &Socket) -> io::Result<StdListener> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    // By the descriptor: a path may be too long for the address of a socket.
    let path = format!("/proc/self/fd/{}/{name}", directory.as_raw_fd());
    bind(&listener, &SocketAddrUnix::new(path)?)?;
    let (uid, gid) = (Uid::from_raw(socket.uid), Gid::from_raw(socket.gid));
    chownat(
        directory,
        name,
        Some(uid),
        Some(gid),
        AtFlags::SYMLINK_NOFOLLOW,
    )?;
    chmodat(
        directory,
        name,
        Mode::from_raw_mode(socket.mode & 0o777),
        AtFlags::empty(),
    )?;
    listen(&listener, WAITING)?;
    Ok(listener.into())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};

    use super::*;

    /// A socket that any user of this machine could be given.
    fn socket(mode: u32) -> Socket {
        Socket {
            mode,
            uid: rustix::process::geteuid().as_raw(),
            gid: rustix::process::getegid().as_raw(),
            ..Socket::default()
        }
    }

    struct Bench {
        dir: tempfile::TempDir,
        sockets: Arc<Sockets>,
        streams: Arc<Streams>,
    }

    impl Bench {
        fn new(wanted: &[Socket]) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let sockets = Sockets::listen(dir.path(), "c", wanted).unwrap();
            Bench {
                dir,
                sockets: Arc::new(sockets),
                streams: Streams::new(),
            }
        }

        fn path(&self, number: u32) -> PathBuf {
            self.dir.path().join("c").join(number.to_string())
        }

        async fn connect(&self, number: u32) -> UnixStream {
            UnixStream::connect(self.path(number)).await.unwrap()
        }

        async fn accept(&self, stream: u64) -> Result<u32, Error> {
            self.sockets.accept(&self.streams, stream).await
        }

        /// The host's end of the stream with this id.
        async fn stream(&self, id: u64) -> DuplexStream {
            let (mut host, guest) = duplex(64);
            self.streams.accept(guest, self.streams.room().await);
            host.write_all(&id.to_le_bytes()).await.unwrap();
            host
        }
    }

    #[tokio::test]
    async fn a_connection_is_relayed_by_the_stream_that_was_named_for_it_ss_21() {
        let bench = Bench::new(&[socket(0o700), socket(0o700)]);
        let (accepted, mut process) = tokio::join!(bench.accept(7), bench.connect(1));
        assert_eq!(accepted.unwrap(), 1);
        // It may write at once, and the stream may come late.
        process.write_all(b"question").await.unwrap();
        let mut host = bench.stream(7).await;
        let mut said = [0; 8];
        host.read_exact(&mut said).await.unwrap();
        assert_eq!(&said, b"question");
        host.write_all(b"answer").await.unwrap();
        drop(host);
        let mut said = String::new();
        process.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "answer");
    }

    #[tokio::test]
    async fn who_connects_is_not_accepted_before_the_host_asks_ss_21() {
        let bench = Bench::new(&[socket(0o700)]);
        assert!(!bench.sockets.has_waiting());
        let _process = bench.connect(0).await;
        assert!(bench.sockets.has_waiting());
        assert_eq!(bench.accept(7).await.unwrap(), 0);
        assert!(!bench.sockets.has_waiting());
    }

    #[tokio::test]
    async fn a_stream_that_closes_at_once_or_never_comes_closes_the_connection_ss_21() {
        let bench = Bench::new(&[socket(0o700)]);
        let mut process = bench.connect(0).await;
        bench.accept(7).await.unwrap();
        drop(bench.stream(7).await);
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);

        let mut process = bench.connect(0).await;
        bench.accept(8).await.unwrap();
        tokio::time::pause();
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn a_busy_socket_does_not_keep_others_waiting() {
        let bench = Bench::new(&[socket(0o700), socket(0o700), socket(0o700)]);
        let mut processes = Vec::new();
        for number in [0, 0, 0, 1, 2] {
            processes.push(bench.connect(number).await);
        }
        let mut order = Vec::new();
        for stream in 1..=5 {
            order.push(bench.accept(stream).await.unwrap());
        }
        assert_eq!(order, [0, 1, 2, 0, 0]);
    }

    #[tokio::test]
    async fn the_file_says_who_may_connect_and_goes_with_its_container_ss_21() {
        let bench = Bench::new(&[socket(0o640), socket(0o777)]);
        let modes = [0, 1].map(|number| {
            let file = fs::metadata(bench.path(number)).unwrap();
            assert_eq!(file.uid(), rustix::process::geteuid().as_raw());
            file.permissions().mode() & 0o7777
        });
        assert_eq!(modes, [0o640, 0o777]);
        let Bench { dir, sockets, .. } = bench;
        drop(sockets);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[tokio::test]
    async fn what_was_written_before_the_end_is_passed_on_ss_21() {
        let bench = Bench::new(&[socket(0o700)]);
        for words in ["first", "second"] {
            let mut process = bench.connect(0).await;
            process.write_all(words.as_bytes()).await.unwrap();
        }
        bench.accept(1).await.unwrap();
        let host = async {
            let mut said = [String::new(), String::new()];
            bench
                .stream(1)
                .await
                .read_to_string(&mut said[0])
                .await
                .unwrap();
            // The second one is found by who asks after the end has begun.
            bench.accept(2).await.unwrap();
            bench
                .stream(2)
                .await
                .read_to_string(&mut said[1])
                .await
                .unwrap();
            assert!(matches!(bench.accept(3).await, Err(Error::NoContainer(id)) if id == "c"));
            said
        };
        let ((), said) = tokio::join!(bench.sockets.close(), host);
        assert_eq!(said, ["first", "second"]);
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_does_not_wait_long_for_who_does_not_read() {
        let bench = Bench::new(&[socket(0o700)]);
        let mut process = bench.connect(0).await;
        process.write_all(&[0; 4096]).await.unwrap();
        bench.accept(1).await.unwrap();
        let _stalled = bench.stream(1).await;
        let begun = tokio::time::Instant::now();
        bench.sockets.close().await;
        assert!((REST..REST * 2).contains(&begun.elapsed()));
        // And a container without sockets has nobody to wait for.
        let none = Bench::new(&[]);
        let (ended, ()) = tokio::join!(none.accept(1), none.sockets.close());
        assert!(ended.is_err());
        assert_eq!(fs::read_dir(none.dir.path()).unwrap().count(), 0);
    }
}
