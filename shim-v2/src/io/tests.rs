mod logger;

use std::{os::unix::net::UnixListener as StdListener, path::Path};

use bulkhead_agent_api::STREAMS_WAITING;
use rustix::fs::{Mode, OFlags};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream, unix::pipe},
};

use super::{
    open::{open_fifo, open_file},
    *,
};

struct Guest {
    dir: tempfile::TempDir,
    listener: UnixListener,
    dialer: Dialer,
    host: super::StreamHost,
}

impl Guest {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = StdListener::bind(dir.path().join("vsock.sock")).unwrap();
        listener.set_nonblocking(true).unwrap();
        let place = crate::mount::open_dir(dir.path()).unwrap();
        Guest {
            listener: UnixListener::from_std(listener).unwrap(),
            dialer: Dialer::new(place, "vsock.sock"),
            host: super::StreamHost {
                namespace: Namespace::new("space").unwrap(),
                mounts: None,
                hub: Hub::new(Some(dir.path().join("shim.sock"))),
            },
            dir,
        }
    }

    async fn open(&self, stdio: &Stdio) -> Result<(Streams, agent::Stdio, Room)> {
        Streams::open(stdio, "id", &self.host, &self.dialer).await
    }

    /// Answers a connection as the VMM and the agent do.
    async fn accept(&self) -> (u64, UnixStream) {
        let (mut stream, _) = self.listener.accept().await.unwrap();
        assert_eq!(read_line(&mut stream, 32).await.unwrap(), b"CONNECT 1025");
        stream.write_all(b"OK 7\n").await.unwrap();
        (stream.read_u64_le().await.unwrap(), stream)
    }

    fn fifo(&self, name: &str) -> String {
        let path = self.dir.path().join(name);
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::RUSR | Mode::WUSR).unwrap();
        path.display().to_string()
    }
}

fn reader(path: &str) -> pipe::Receiver {
    pipe::OpenOptions::new().open_receiver(path).unwrap()
}

#[test]
fn input_comes_from_fifos_and_streams_only_io_02() {
    for bad in ["file:///a/log", "binary:///a/log", "npipe://x"] {
        let stdio = Stdio {
            stdin: bad.into(),
            ..Stdio::default()
        };
        let code = stdio.check().unwrap_err().code();
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{bad}");
    }
}

#[test]
fn the_name_of_stderr_means_nothing_with_a_terminal_io_03() {
    let mut stdio = Stdio {
        stderr: "npipe://x".into(),
        terminal: true,
        ..Stdio::default()
    };
    stdio.check().unwrap();
    stdio.terminal = false;
    assert!(stdio.check().is_err());
}

#[tokio::test]
async fn only_fifos_are_opened_b20() {
    let guest = Guest::new();
    let path = |name: &str| guest.dir.path().join(name);
    std::fs::write(path("file"), "").unwrap();
    let fifo = guest.fifo("fifo");
    std::os::unix::fs::symlink(&fifo, path("link")).unwrap();
    for bad in ["file", "link", "missing"] {
        assert!(open_fifo(&path(bad), OFlags::RDONLY).is_err(), "{bad}");
    }
    assert!(open_fifo(Path::new("/dev/null"), OFlags::RDONLY).is_err());
}

#[tokio::test]
async fn output_reaches_a_reader_that_comes_late_and_ends_with_the_guests_ta_37_io_07() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdout: guest.fifo("out"),
        ..Stdio::default()
    };
    let (streams, (id, mut stream)) = tokio::join!(guest.open(&stdio), guest.accept());
    let (streams, told, _room) = streams.unwrap();
    assert_eq!((told.stdin, told.stdout, told.stderr), (0, id, 0));
    stream.write_all(b"hello").await.unwrap();
    let mut out = reader(&stdio.stdout);
    let mut text = [0; 5];
    out.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"hello");
    // The reader goes and another one comes: no end, no loss.
    drop(out);
    stream.write_all(b"again").await.unwrap();
    let mut out = reader(&stdio.stdout);
    drop(stream);
    streams.drained(Duration::from_secs(5)).await;
    let mut text = Vec::new();
    out.read_to_end(&mut text).await.unwrap();
    assert_eq!(text, b"again");
}

#[tokio::test]
async fn a_stalled_reader_stalls_the_guest_and_nothing_is_buffered_io_10() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdout: guest.fifo("out"),
        stderr: guest.fifo("err"),
        ..Stdio::default()
    };
    let (streams, (_, stream), (_, mut other)) = {
        let accept = async { (guest.accept().await, guest.accept().await) };
        let (streams, (one, two)) = tokio::join!(guest.open(&stdio), accept);
        (streams.unwrap().0, one, two)
    };
    let flood = vec![b'x'; 4 << 20];
    let (mut read_half, mut write_half) = stream.into_split();
    let writer = tokio::spawn(async move {
        write_half.write_all(&flood).await.unwrap();
    });
    // The other stream of the process is not held up.
    other.write_all(b"free").await.unwrap();
    let mut err = reader(&stdio.stderr);
    let mut text = [0; 4];
    err.read_exact(&mut text).await.unwrap();
    streams.drained(Duration::from_millis(50)).await;
    assert!(!writer.is_finished());
    let mut out = reader(&stdio.stdout);
    let mut total = 0;
    let mut buffer = vec![0; 1 << 20];
    while total < 4 << 20 {
        total += out.read(&mut buffer).await.unwrap();
    }
    writer.await.unwrap();
    assert_eq!(read_half.read(&mut buffer).await.unwrap_or(0), 0);
}

#[tokio::test]
async fn stdin_ends_only_after_close_io_and_with_all_that_was_written_ta_55_ta_56_io_08() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdin: guest.fifo("in"),
        ..Stdio::default()
    };
    let (streams, (_, mut stream)) = tokio::join!(guest.open(&stdio), guest.accept());
    let (streams, _, _room) = streams.unwrap();
    let mut writer = pipe::OpenOptions::new().open_sender(&stdio.stdin).unwrap();
    writer.write_all(b"one").await.unwrap();
    drop(writer);
    let mut text = [0; 3];
    streams.begin_stdin();
    stream.read_exact(&mut text).await.unwrap();
    // The writer is gone, yet another one may come.
    let mut writer = pipe::OpenOptions::new().open_sender(&stdio.stdin).unwrap();
    writer.write_all(b"two").await.unwrap();
    streams.close_stdin();
    drop(writer);
    let mut rest = Vec::new();
    stream.read_to_end(&mut rest).await.unwrap();
    assert_eq!(rest, b"two");
}

#[tokio::test]
async fn stdin_is_not_read_before_its_process_starts() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdin: guest.fifo("in"),
        ..Stdio::default()
    };
    let (streams, (_, mut stream)) = tokio::join!(guest.open(&stdio), guest.accept());
    let (streams, _, _room) = streams.unwrap();
    let mut writer = pipe::OpenOptions::new().open_sender(&stdio.stdin).unwrap();
    let mut text = *b"early";
    writer.write_all(&text).await.unwrap();
    let nothing = Duration::from_millis(200);
    assert!(timeout(nothing, stream.read_u8()).await.is_err());
    streams.begin_stdin();
    stream.read_exact(&mut text).await.unwrap();
    assert_eq!(&text, b"early");
}

#[tokio::test]
async fn output_is_appended_to_a_log_file_which_both_streams_may_share() {
    let guest = Guest::new();
    let log = guest.dir.path().join("new/dir/out.log");
    let name = format!("file://{}", log.display());
    let stdio = Stdio {
        stdout: name.clone(),
        stderr: name,
        ..Stdio::default()
    };
    for round in ["one", "two"] {
        let accept = async { (guest.accept().await, guest.accept().await) };
        let (streams, ((_, mut out), (_, mut err))) = tokio::join!(guest.open(&stdio), accept);
        let (streams, _, _room) = streams.unwrap();
        out.write_all(format!("{round} to stdout\n").as_bytes())
            .await
            .unwrap();
        drop(out);
        err.write_all(format!("{round} to stderr\n").as_bytes())
            .await
            .unwrap();
        drop(err);
        streams.drained(Duration::from_secs(10)).await;
    }
    let text = std::fs::read_to_string(&log).unwrap();
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "one to stderr",
            "one to stdout",
            "two to stderr",
            "two to stdout"
        ]
    );
}

#[tokio::test]
async fn a_log_that_is_no_file_is_refused_without_waiting_b20() {
    let guest = Guest::new();
    guest.fifo("fifo");
    for bad in [guest.dir.path().join("fifo"), guest.dir.path().to_owned()] {
        assert!(open_file(&bad).is_err(), "{bad:?}");
    }
    assert!(open_file(Path::new("/dev/null")).is_err());
}

#[tokio::test]
async fn room_in_the_guest_is_reserved_before_dialling_and_given_back() {
    let guest = Guest::new();
    let stdio = Stdio {
        stdout: guest.fifo("out"),
        ..Stdio::default()
    };
    let mut held = Vec::new();
    for _ in 0..STREAMS_WAITING {
        let (opened, connection) = tokio::join!(guest.open(&stdio), guest.accept());
        held.push((opened.unwrap(), connection));
    }
    let mut next = std::pin::pin!(guest.open(&stdio));
    assert!(futures::poll!(&mut next).is_pending());
    // Nothing was dialled.
    assert!(futures::poll!(std::pin::pin!(guest.listener.accept())).is_pending());
    let ((streams, _, room), _connection) = held.pop().unwrap();
    drop(room);
    let (opened, _) = tokio::join!(next, guest.accept());
    let (_streams, _, _room) = opened.unwrap();
    drop(streams);
}
