//! Streams with both ends of the protocol, over the library's own client and server.

use std::collections::HashMap;

use tokio::{net::UnixListener, sync::watch};
use ttrpc::r#async::{Server, Service, transport::Listener};

use super::{
    link::{Ended, Message},
    *,
};

const LONG: Duration = Duration::from_secs(20);

/// A server of a hub's streams, as the shim has one.
struct Bench {
    dir: tempfile::TempDir,
    hub: Arc<Hub>,
    server: Server,
}

impl Bench {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (hub, server) = serve(&dir).await;
        Bench { dir, hub, server }
    }

    /// The server ends with all of its connections, and another one takes its place.
    async fn restart(&mut self) {
        self.server.shutdown().await.unwrap();
        std::fs::remove_file(self.dir.path().join("s")).unwrap();
        (self.hub, self.server) = serve(&self.dir).await;
    }

    fn address(&self, id: &str) -> Address {
        Address {
            socket: self.dir.path().join("s"),
            id: id.to_owned(),
        }
    }

    /// Somebody who comes for a stream, as containerd does.
    async fn come(&self, id: &str) -> Link {
        let dialled = timeout(LONG, Link::dial(&self.address(id))).await;
        dialled.unwrap().unwrap().0
    }

    async fn outlet(&self, id: &str) -> Outlet {
        Outlet::new(self.hub.claim(&self.address(id)).await.unwrap())
    }
}

async fn serve(dir: &tempfile::TempDir) -> (Arc<Hub>, Server) {
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).unwrap();
    let hub = Hub::new(Some(socket));
    let calls: Arc<dyn StreamHandler + Send + Sync> = Arc::new(Calls(Arc::clone(&hub)));
    let service = Service {
        methods: HashMap::new(),
        streams: HashMap::from([(METHOD.to_owned(), calls)]),
    };
    let connections = futures::stream::unfold(listener, async |listener| {
        let accepted = listener.accept().await.map(|(stream, _)| stream);
        Some((accepted, listener))
    });
    let mut server = Server::new()
        .add_listener(Listener::new(connections))
        .register_service(HashMap::from([(SERVICE.to_owned(), service)]));
    server.start().await.unwrap();
    (hub, server)
}

/// Takes so many bytes, with the credit that containerd's receiver gives: a window
/// more whenever less than one is open.
async fn take(link: &mut Link, count: usize) -> Vec<u8> {
    let (mut taken, mut open) = (Vec::new(), 0);
    while taken.len() < count {
        if open < 64 << 10 {
            link.grant(64 << 10).await.unwrap();
            open += 64 << 10;
        }
        match timeout(LONG, link.receive()).await.expect("nothing comes") {
            Ok(Message::Data(bytes)) => {
                assert!(bytes.len() <= 32 << 10);
                open -= bytes.len();
                taken.extend(bytes);
            }
            other => panic!("{other:?}"),
        }
    }
    taken
}

/// Bytes of which each place can be told.
fn pattern(length: usize) -> Vec<u8> {
    let words = (0_u64..).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.take(length).collect()
}

#[tokio::test]
async fn output_goes_to_whoever_named_the_stream_before_there_was_a_process_io_21() {
    let bench = Bench::new().await;
    let mut link = bench.come("c-stdout").await;
    let mut outlet = bench.outlet("c-stdout").await;
    let all = pattern(3 << 20);
    let write = async {
        for part in all.chunks(50_000) {
            outlet.write(part).await;
        }
        outlet.finish().await;
    };
    let read = async {
        let taken = take(&mut link, all.len()).await;
        assert!(taken == all);
        assert_eq!(
            timeout(LONG, link.receive()).await.unwrap(),
            Err(Ended::Finished)
        );
    };
    tokio::join!(write, read);
}

#[tokio::test]
async fn a_receiver_without_credit_stalls_its_stream_and_no_other_io_10_io_11() {
    let bench = Bench::new().await;
    let mut stalled = bench.come("one").await;
    let mut free = bench.come("two").await;
    let (mut one, mut two) = (bench.outlet("one").await, bench.outlet("two").await);
    stalled.grant(10).await.unwrap();
    let mut write = std::pin::pin!(one.write(b"more than ten"));
    let waited = timeout(Duration::from_millis(200), &mut write).await;
    assert!(waited.is_err());
    let (taken, ()) = tokio::join!(take(&mut free, 4), two.write(b"free"));
    assert_eq!(taken, b"free");
    assert_eq!(
        stalled.receive().await,
        Ok(Message::Data(b"more than ".to_vec()))
    );
    stalled.grant(10).await.unwrap();
    timeout(LONG, write).await.unwrap();
    assert_eq!(stalled.receive().await, Ok(Message::Data(b"ten".to_vec())));
}

#[tokio::test]
async fn who_comes_again_gets_what_was_not_acknowledged_io_22() {
    let bench = Bench::new().await;
    let mut outlet = bench.outlet("c").await;
    let mut first = bench.come("c").await;
    first.grant(100).await.unwrap();
    timeout(LONG, outlet.write(b"one two ")).await.unwrap();
    let data = first.receive().await;
    assert_eq!(data, Ok(Message::Data(b"one two ".to_vec())));
    first.grant(4).await.unwrap();
    // The one who took them all, and said so of the first word, is gone.
    drop(first);
    let mut second = bench.come("c").await;
    let write = timeout(LONG, outlet.write(b"three"));
    let (taken, written) = tokio::join!(take(&mut second, 9), write);
    written.unwrap();
    assert_eq!(taken, b"two three");
    // So does who comes after the end, for nobody has acknowledged the last words.
    outlet.finish().await;
    assert_eq!(second.receive().await, Err(Ended::Finished));
    let lingers = tokio::spawn(outlet.linger());
    let mut third = bench.come("c").await;
    assert_eq!(take(&mut third, 9).await, b"two three");
    assert_eq!(
        timeout(LONG, third.receive()).await.unwrap(),
        Err(Ended::Finished)
    );
    lingers.abort();
}

#[tokio::test]
async fn input_ends_when_its_sender_says_so_and_not_when_it_is_gone_io_22() {
    let bench = Bench::new().await;
    let claim = bench.hub.claim(&bench.address("in")).await.unwrap();
    let (_closing, closed) = watch::channel(false);
    let mut inlet = Inlet::new(claim, closed);
    for (word, end) in [("one", false), ("two", true)] {
        let mut link = bench.come("in").await;
        let send = async {
            let Ok(Message::Credit(65_536)) = link.receive().await else {
                panic!("no credit for a window");
            };
            link.data(word.into()).await.unwrap();
            if end {
                link.finish().await;
            }
        };
        let (read, ()) = tokio::join!(timeout(LONG, inlet.read()), send);
        assert_eq!(read.unwrap().as_deref(), Some(word.as_bytes()));
    }
    assert_eq!(timeout(LONG, inlet.read()).await.unwrap(), None);
}

#[tokio::test]
async fn input_that_was_sent_before_its_end_was_asked_for_is_delivered_ta_55() {
    let bench = Bench::new().await;
    let claim = bench.hub.claim(&bench.address("in")).await.unwrap();
    let (closing, closed) = watch::channel(false);
    let mut inlet = Inlet::new(claim, closed);
    let link = bench.come("in").await;
    link.data(b"last words".to_vec()).await.unwrap();
    closing.send_replace(true);
    assert_eq!(inlet.read().await.as_deref(), Some(&b"last words"[..]));
    assert_eq!(timeout(LONG, inlet.read()).await.unwrap(), None);
}

#[tokio::test]
async fn a_stream_of_another_server_is_dialled_again_when_it_was_restarted_io_22() {
    let mut bench = Bench::new().await;
    let other = Hub::new(None);
    let mut outlet = Outlet::new(other.claim(&bench.address("out")).await.unwrap());
    let all = pattern(1 << 20);
    let (first, second) = all.split_at(all.len() / 2);
    for part in [first, second] {
        let claim = bench.hub.claim(&bench.address("out")).await.unwrap();
        let (_closing, closed) = watch::channel(false);
        let mut inlet = Inlet::new(claim, closed);
        let read = async {
            let mut taken = Vec::new();
            while taken.len() < part.len() {
                let bytes = timeout(LONG, inlet.read()).await.expect("nothing comes");
                taken.extend(bytes.expect("it ends"));
            }
            // Acknowledges all of it.
            let _ = timeout(Duration::from_millis(100), inlet.read()).await;
            taken
        };
        let (taken, ()) = tokio::join!(read, outlet.write(part));
        assert!(taken.ends_with(part), "{} bytes", taken.len());
        drop(inlet);
        bench.restart().await;
    }
}

#[tokio::test]
async fn a_stream_is_of_one_process_and_must_be_named() {
    let bench = Bench::new().await;
    let claim = bench.hub.claim(&bench.address("c")).await.unwrap();
    assert!(bench.hub.claim(&bench.address("c")).await.is_err());
    drop(claim);
    bench.hub.claim(&bench.address("c")).await.unwrap();
    assert!(Link::dial(&bench.address("")).await.is_err());
    let missing = Address {
        socket: bench.dir.path().join("none"),
        id: "c".to_owned(),
    };
    let error = bench.hub.claim(&missing).await.unwrap_err().text();
    assert!(error.contains("none"), "{error}");
}

#[tokio::test]
async fn callers_whom_no_process_wants_are_bounded() {
    let bench = Bench::new().await;
    let mut first = bench.come("first").await;
    for number in 0..EARLY {
        bench.hub.called(&number.to_string());
    }
    assert_eq!(
        timeout(LONG, first.receive()).await.unwrap(),
        Err(Ended::Finished)
    );
    assert_eq!(lock(&bench.hub.slots).early.len(), EARLY);
}
