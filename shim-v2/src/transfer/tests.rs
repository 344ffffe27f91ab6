//! The service with a client of it, before a scripted guest.

use containerd_shim_protos::protobuf::well_known_types::wrappers::{
    BytesValue, Int32Value, StringValue,
};
use futures::{StreamExt, poll, stream};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    Code, Request,
    r#async::{
        Client, ClientStream, Server,
        transport::{Listener, Socket},
    },
};

use super::{proto::transfer_ttrpc::TransferClient, *};
use crate::{
    io::streaming::{Calls, METHOD, SERVICE},
    pod::tests::{
        copies::END,
        harness::{Bench, run},
        script::DEADLINE,
    },
};

const WINDOW: i32 = 64 << 10;

/// The service of a pod, and one connection to it.
struct Caller {
    client: Client,
    _server: Server,
}

/// A stream from the caller's side.
struct Line(ClientStream<Any, Any>);

#[derive(Debug, PartialEq)]
enum Heard {
    Data(Vec<u8>),
    Credit(i32),
    End,
}

fn any(kind: &str, content: &impl Message) -> Any {
    Any {
        type_url: kind.to_owned(),
        value: content.write_to_bytes().unwrap(),
        ..Any::default()
    }
}

fn path(container: &str, path: &str) -> ContainerPath {
    ContainerPath {
        container_id: container.to_owned(),
        path: path.to_owned(),
        ..ContainerPath::default()
    }
}

fn request(source: Any, destination: Any) -> TransferRequest {
    TransferRequest {
        source: Some(source).into(),
        destination: Some(destination).into(),
        ..TransferRequest::default()
    }
}

fn inwards(stream: &str, to: &ContainerPath) -> TransferRequest {
    let from = ReadStream {
        stream: stream.to_owned(),
        media_type: TAR.to_owned(),
        ..ReadStream::default()
    };
    request(any(READ_STREAM, &from), any(CONTAINER_PATH, to))
}

fn outwards(from: &ContainerPath, stream: &str) -> TransferRequest {
    let to = WriteStream {
        stream: stream.to_owned(),
        media_type: TAR.to_owned(),
        ..WriteStream::default()
    };
    request(any(CONTAINER_PATH, from), any(WRITE_STREAM, &to))
}

impl Caller {
    async fn new(bench: &Bench) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let calls = Calls(Arc::clone(bench.pod.hub()));
        let streaming = Service {
            methods: HashMap::new(),
            streams: HashMap::from([(METHOD.to_owned(), Arc::new(calls) as _)]),
        };
        // The library asks for the next connection at once: there is none yet.
        let connections = stream::iter([Ok(theirs)]).chain(stream::pending());
        let mut server = Server::new()
            .add_listener(Listener::new(connections))
            .register_service(HashMap::from([(SERVICE.to_owned(), streaming)]))
            .register_service(TransferService::new(Arc::clone(&bench.pod)).services());
        server.start().await.unwrap();
        Caller {
            client: Client::new(Socket::new(ours)),
            _server: server,
        }
    }

    async fn open(&self, id: &str) -> Line {
        let request = Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            ..Request::default()
        };
        let stream = self.client.new_stream(request, true, true).await.unwrap();
        let mut stream = ClientStream::<Any, Any>::new(stream);
        let mut init = StringValue::new();
        init.value = id.to_owned();
        let kind = "containerd.services.streaming.v1.StreamInit";
        stream.send(&any(kind, &init)).await.unwrap();
        let answer = stream.recv().await.unwrap();
        assert_eq!(answer.type_url, "google.protobuf.Empty");
        Line(stream)
    }

    async fn transfer(&self, request: &TransferRequest) -> Result<(), Code> {
        let client = TransferClient::new(self.client.clone());
        let context = ttrpc::context::with_timeout(0);
        let answer = timeout(DEADLINE, client.transfer(context, request)).await;
        match answer.expect("no answer") {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => Err(status.code()),
            Err(error) => panic!("{error}"),
        }
    }
}

impl Line {
    async fn say(&self, bytes: &[u8]) {
        let mut data = BytesValue::new();
        data.value = bytes.to_vec();
        let data = any("containerd.types.transfer.Data", &data);
        self.0.send(&data).await.unwrap();
    }

    async fn grant(&self, credit: i32) {
        let mut update = Int32Value::new();
        update.value = credit;
        let update = any("containerd.types.transfer.WindowUpdate", &update);
        self.0.send(&update).await.unwrap();
    }

    async fn hear(&mut self) -> Heard {
        let heard = timeout(DEADLINE, self.0.recv()).await;
        match heard.expect("nothing comes") {
            Ok(any) if any.type_url.ends_with("WindowUpdate") => {
                Heard::Credit(Int32Value::parse_from_bytes(&any.value).unwrap().value)
            }
            Ok(any) => Heard::Data(BytesValue::parse_from_bytes(&any.value).unwrap().value),
            Err(ttrpc::Error::Eof) => Heard::End,
            Err(error) => panic!("{error}"),
        }
    }

    /// Sends all of it, no more than there is credit for.
    async fn pour(&mut self, bytes: &[u8]) {
        let mut credit = 0;
        for part in bytes.chunks(30_000) {
            while credit < part.len() {
                match self.hear().await {
                    Heard::Credit(more) => credit += usize::try_from(more).unwrap(),
                    other => panic!("{other:?}"),
                }
            }
            credit -= part.len();
            self.say(part).await;
        }
    }

    /// Takes all there is, as containerd's receiver does.
    async fn take(&mut self) -> Vec<u8> {
        let (mut taken, mut open) = (Vec::new(), 0);
        loop {
            if open < WINDOW {
                self.grant(WINDOW).await;
                open += WINDOW;
            }
            match self.hear().await {
                Heard::Data(bytes) => {
                    assert!(bytes.len() <= 32 << 10);
                    open -= i32::try_from(bytes.len()).unwrap();
                    assert!(open >= 0);
                    taken.extend(bytes);
                }
                Heard::End => return taken,
                other @ Heard::Credit(_) => panic!("{other:?}"),
            }
        }
    }
}

/// Waits until so many further copies could be begun.
async fn left(bench: &Bench, count: usize) {
    let reached = async {
        while bench.pod.copies_left() != count {
            tokio::time::sleep(std::time::Duration::from_millis(1)).await;
        }
    };
    let reached = timeout(DEADLINE, reached).await;
    assert!(reached.is_ok(), "{} are left", bench.pod.copies_left());
}

fn pattern(length: usize) -> Vec<u8> {
    let words = (0_u64..).flat_map(|n| n.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    words.take(length).collect()
}

#[test]
fn what_a_caller_sends_arrives_whole_by_its_end_or_by_that_of_the_archive_ss_18() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        let all = pattern(1 << 20);
        let mut line = caller.open("data-1").await;
        let send = async {
            line.pour(&all).await;
            line.0.close_send().await.unwrap();
            line
        };
        let asked = inwards("data-1", &path("c", "/tmp"));
        let (answer, mut line) = tokio::join!(caller.transfer(&asked), send);
        answer.unwrap();
        assert!(
            bench
                .agent
                .copied(|copied| std::mem::take(&mut copied.taken))
                == all
        );
        assert_eq!(bench.agent.last_call(), "CopyIn c /tmp");
        while line.hear().await != Heard::End {}

        let mut line = caller.open("data-2").await;
        let mut owned = path("c", "/");
        owned.preserve_ownership = true;
        let asked = inwards("data-2", &owned);
        let ended = [&all[..100], END].concat();
        let send = line.pour(&ended);
        let (answer, ()) = tokio::join!(caller.transfer(&asked), send);
        answer.unwrap();
        assert_eq!(bench.agent.last_call(), "CopyIn c / kept");
        // What comes behind the end is no fault.
        line.say(b"padding").await;
        line.0.close_send().await.unwrap();
        while line.hear().await != Heard::End {}
    });
}

#[test]
fn what_a_guest_sends_arrives_whole_and_the_stream_ends_with_it_ss_19() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        let all = pattern(1 << 20);
        bench.agent.gives(&all);
        let mut line = caller.open("data-1").await;
        let mut header = path("c", "/data/stat");
        header.no_walk = true;
        let asked = outwards(&header, "data-1");
        let (answer, taken) = tokio::join!(caller.transfer(&asked), line.take());
        answer.unwrap();
        assert!(taken == all, "{} bytes", taken.len());
        assert_eq!(bench.agent.last_call(), "CopyOut c /data/stat header");
    });
}

#[test]
fn what_cannot_be_is_refused_by_its_kind_and_its_stream_is_closed_ss_63() {
    run(async |bench| {
        bench.running("c").await;
        bench.create("waits").await.unwrap();
        let caller = Caller::new(bench).await;
        let empty = TransferRequest::default();
        assert_eq!(caller.transfer(&empty).await, Err(Code::INVALID_ARGUMENT));
        let there = path("c", "/tmp");
        let to_image = any("containerd.types.transfer.ImageStore", &StringValue::new());
        let mut zip = outwards(&there, "s");
        let to = WriteStream {
            stream: "s".into(),
            media_type: "application/zip".into(),
            ..WriteStream::default()
        };
        zip.destination = Some(any(WRITE_STREAM, &to)).into();
        let mut garbage = outwards(&there, "s");
        garbage.source.mut_or_insert_default().value = vec![0xff; 9];
        let mut nowhere = outwards(&there, "s");
        nowhere.destination = None.into();
        let from = any(CONTAINER_PATH, &there);
        for (asked, code, closes) in [
            (request(from.clone(), to_image), Code::UNIMPLEMENTED, false),
            (request(from.clone(), from), Code::UNIMPLEMENTED, false),
            (nowhere, Code::INVALID_ARGUMENT, false),
            (zip, Code::UNIMPLEMENTED, true),
            (garbage, Code::INVALID_ARGUMENT, true),
            (outwards(&path("c", ""), "s"), Code::INVALID_ARGUMENT, true),
            (
                outwards(&path("../c", "/"), "s"),
                Code::INVALID_ARGUMENT,
                true,
            ),
            (outwards(&path("none", "/"), "s"), Code::NOT_FOUND, true),
            (inwards("s", &path("none", "/")), Code::NOT_FOUND, true),
            (
                outwards(&path("waits", "/"), "s"),
                Code::FAILED_PRECONDITION,
                true,
            ),
            (outwards(&there, "another"), Code::NOT_FOUND, false),
        ] {
            let mut line = caller.open("s").await;
            assert_eq!(caller.transfer(&asked).await, Err(code), "{asked}");
            if closes {
                assert_eq!(line.hear().await, Heard::End, "{asked}");
            }
        }
        assert!(
            !bench
                .agent
                .calls()
                .iter()
                .any(|call| call.starts_with("Copy"))
        );
    });
}

#[test]
fn what_the_guest_refuses_is_answered_as_such_and_its_stream_is_closed_ss_63() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        for call in ["CopyIn", "CopyOut"] {
            let other = ttrpc::Code::NOT_FOUND;
            bench.agent.refuse(call, other, Default::default());
        }
        let mut line = caller.open("s").await;
        let asked = outwards(&path("c", "/none"), "s");
        assert_eq!(caller.transfer(&asked).await, Err(Code::NOT_FOUND));
        assert_eq!(line.hear().await, Heard::End);
        let mut line = caller.open("s").await;
        let asked = inwards("s", &path("c", "/none"));
        assert_eq!(caller.transfer(&asked).await, Err(Code::NOT_FOUND));
        while line.hear().await != Heard::End {}
    });
}

#[test]
fn a_copy_is_given_up_when_its_caller_has_gone() {
    run(async |bench| {
        bench.running("c").await;
        for asked in [
            inwards("s", &path("c", "/tmp")),
            outwards(&path("c", "/tmp"), "s"),
        ] {
            let caller = Caller::new(bench).await;
            let line = caller.open("s").await;
            let client = TransferClient::new(caller.client.clone());
            let context = ttrpc::context::with_timeout(0);
            let mut transfer = Box::pin(client.transfer(context, &asked));
            assert!(poll!(&mut transfer).is_pending());
            let given = timeout(DEADLINE / 4, &mut transfer).await;
            assert!(given.is_err(), "it is over");
            assert_eq!(bench.pod.copies_left(), 63);
            drop(transfer);
            drop((line, client, caller));
            bench.agent.called("CancelCopy").await;
            left(bench, 64).await;
        }
        // A caller with a limit of its own, whose connection stays.
        let caller = Caller::new(bench).await;
        let _line = caller.open("s").await;
        let client = TransferClient::new(caller.client.clone());
        let context = ttrpc::context::with_timeout(1_000_000_000);
        let asked = inwards("s", &path("c", "/tmp"));
        client.transfer(context, &asked).await.unwrap_err();
        left(bench, 64).await;
    });
}

#[test]
fn a_caller_without_credit_stalls_its_own_copy_only_and_little_is_kept_for_it() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        let mut stalled = caller.open("stalled").await;
        let asked = outwards(&path("c", "/endless"), "stalled");
        let client = TransferClient::new(caller.client.clone());
        let context = ttrpc::context::with_timeout(0);
        let mut endless = std::pin::pin!(client.transfer(context, &asked));
        assert!(poll!(&mut endless).is_pending());
        stalled.grant(10).await;
        assert_eq!(stalled.hear().await, Heard::Data(vec![b'x'; 10]));
        bench.agent.gives(b"something");
        let mut free = caller.open("free").await;
        let asked = outwards(&path("c", "/short"), "free");
        let (answer, taken) = tokio::join!(caller.transfer(&asked), free.take());
        answer.unwrap();
        assert_eq!(taken, b"something");
        let given = bench.agent.copied(|copied| copied.given);
        assert!(given < 2 << 20, "{given} bytes wait");
        assert!(poll!(&mut endless).is_pending());
    });
}

#[test]
fn a_copy_ends_with_its_guest() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        let mut line = caller.open("s").await;
        line.grant(10).await;
        let asked = outwards(&path("c", "/endless"), "s");
        let end = async {
            line.hear().await;
            bench.guest().ends(1, "it broke");
            while line.hear().await != Heard::End {}
        };
        let (answer, ()) = tokio::join!(caller.transfer(&asked), end);
        assert_eq!(answer, Err(Code::UNAVAILABLE));
    });
}

#[test]
fn copies_that_nobody_ends_are_bounded() {
    run(async |bench| {
        bench.running("c").await;
        let caller = Caller::new(bench).await;
        let mut calls = Vec::new();
        for number in 0..64 {
            let id = format!("s{number}");
            let line = caller.open(&id).await;
            let client = TransferClient::new(caller.client.clone());
            let call = tokio::spawn(async move {
                let context = ttrpc::context::with_timeout(0);
                client
                    .transfer(context, &outwards(&path("c", "/endless"), &id))
                    .await
            });
            calls.push((line, call));
        }
        left(bench, 0).await;
        let _line = caller.open("one more").await;
        let asked = inwards("one more", &path("c", "/"));
        assert_eq!(caller.transfer(&asked).await, Err(Code::RESOURCE_EXHAUSTED));
        for (_, call) in calls {
            call.abort();
        }
    });
}
