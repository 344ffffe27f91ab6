//! Somebody who copies files by a shim's socket, as containerd's tools do: a stream, then
//! the call that names it, over one connection.

use std::{
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use bulkhead_shim::{
    io::streaming::{METHOD, SERVICE},
    transfer::proto::{
        transfer::{ContainerPath, ReadStream, TransferRequest, WriteStream},
        transfer_ttrpc::TransferClient,
    },
};
use containerd_shim_protos::protobuf::{
    Message,
    well_known_types::{
        any::Any,
        wrappers::{BytesValue, Int32Value, StringValue},
    },
};
use tokio::time::timeout;
use ttrpc::{
    Code, Request,
    r#async::{Client, ClientStream},
    context::with_duration,
};

/// No copy takes so long.
const LIMIT: Duration = Duration::from_secs(300);
/// Credit that a receiver gives, and the least that a sender expects.
const WINDOW: usize = 64 << 10;
const TAR: &str = "application/x-tar";

/// A caller on one connection.
#[derive(Clone)]
pub(crate) struct Caller(pub(crate) Client);

/// What is copied.
#[derive(Clone, Default)]
pub(crate) struct At {
    pub(crate) container: String,
    pub(crate) path: String,
    pub(crate) no_walk: bool,
    pub(crate) preserve_ownership: bool,
}

/// A stream.
pub(crate) struct Line {
    stream: ClientStream<Any, Any>,
    id: String,
}

fn any(kind: &str, content: &impl Message) -> Any {
    Any {
        type_url: kind.to_owned(),
        value: content.write_to_bytes().unwrap(),
        ..Any::default()
    }
}

impl At {
    fn any(&self) -> Any {
        let path = ContainerPath {
            container_id: self.container.clone(),
            path: self.path.clone(),
            no_walk: self.no_walk,
            preserve_ownership: self.preserve_ownership,
            ..ContainerPath::default()
        };
        any("containerd.types.transfer.ContainerPath", &path)
    }
}

impl Caller {
    /// Opens a stream.
    pub(crate) async fn open(&self) -> Line {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let id = format!("data-{}", NEXT.fetch_add(1, Ordering::Relaxed));
        let request = Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            ..Request::default()
        };
        let stream = self.0.new_stream(request, true, true).await.unwrap();
        let mut stream = ClientStream::<Any, Any>::new(stream);
        let mut init = StringValue::new();
        init.value.clone_from(&id);
        let kind = "containerd.services.streaming.v1.StreamInit";
        stream.send(&any(kind, &init)).await.unwrap();
        let answer = stream.recv().await.unwrap();
        assert_eq!(answer.type_url, "google.protobuf.Empty");
        Line { stream, id }
    }

    /// Asks for a transfer.
    pub(crate) async fn transfer(&self, request: &TransferRequest) -> Result<(), Code> {
        let client = TransferClient::new(self.0.clone());
        let answer = client.transfer(with_duration(LIMIT), request).await;
        match answer {
            Ok(_) => Ok(()),
            Err(ttrpc::Error::RpcStatus(status)) => {
                eprintln!("{}", status.message);
                Err(status.code())
            }
            Err(error) => panic!("{error}"),
        }
    }

    /// Copies an archive in.
    pub(crate) async fn copy_in(&self, tar: &[u8], to: &At) -> Result<(), Code> {
        let mut line = self.open().await;
        let request = line.inwards(to);
        let send = async {
            if line.pour(tar).await {
                line.stream.close_send().await.unwrap();
            }
        };
        tokio::join!(self.transfer(&request), send).0
    }

    /// Copies an archive out.
    pub(crate) async fn copy_out(&self, from: &At) -> Result<Vec<u8>, Code> {
        let mut line = self.open().await;
        let request = line.outwards(from);
        let (answer, taken) = tokio::join!(self.transfer(&request), line.take());
        answer.map(|()| taken)
    }
}

impl Line {
    pub(crate) fn inwards(&self, to: &At) -> TransferRequest {
        let from = ReadStream {
            stream: self.id.clone(),
            media_type: TAR.to_owned(),
            ..ReadStream::default()
        };
        TransferRequest {
            source: Some(any("containerd.types.transfer.ReadStream", &from)).into(),
            destination: Some(to.any()).into(),
            ..TransferRequest::default()
        }
    }

    pub(crate) fn outwards(&self, from: &At) -> TransferRequest {
        let to = WriteStream {
            stream: self.id.clone(),
            media_type: TAR.to_owned(),
            ..WriteStream::default()
        };
        TransferRequest {
            source: Some(from.any()).into(),
            destination: Some(any("containerd.types.transfer.WriteStream", &to)).into(),
            ..TransferRequest::default()
        }
    }

    /// Sends all of it, as there is credit; false if the shim ends it before.
    pub(crate) async fn pour(&mut self, bytes: &[u8]) -> bool {
        let mut credit = 0;
        for part in bytes.chunks(32 << 10) {
            while credit < part.len() {
                match self.hear().await {
                    Some(update) if update.type_url.ends_with("WindowUpdate") => {
                        let update = Int32Value::parse_from_bytes(&update.value).unwrap();
                        credit += usize::try_from(update.value).unwrap();
                    }
                    Some(other) => panic!("{other}"),
                    None => return false,
                }
            }
            credit -= part.len();
            let mut data = BytesValue::new();
            data.value = part.to_vec();
            let data = any("containerd.types.transfer.Data", &data);
            self.stream.send(&data).await.unwrap();
        }
        true
    }

    /// Grants credit.
    pub(crate) async fn grant(&self, credit: usize) {
        let mut update = Int32Value::new();
        update.value = i32::try_from(credit).unwrap();
        let update = any("containerd.types.transfer.WindowUpdate", &update);
        self.stream.send(&update).await.unwrap();
    }

    /// Takes all there is, with the credit of containerd's receiver.
    async fn take(&mut self) -> Vec<u8> {
        let (mut taken, mut open) = (Vec::new(), 0);
        loop {
            if open < WINDOW {
                self.grant(WINDOW).await;
                open += WINDOW;
            }
            let Some(data) = self.hear().await else {
                return taken;
            };
            let data = BytesValue::parse_from_bytes(&data.value).unwrap().value;
            assert!(data.len() <= 32 << 10 && data.len() <= open);
            open -= data.len();
            taken.extend(data);
        }
    }

    /// The next message; `None` at the end of the stream.
    pub(crate) async fn hear(&mut self) -> Option<Any> {
        let heard = timeout(LIMIT, self.stream.recv()).await;
        match heard.expect("nothing comes") {
            Ok(any) => Some(any),
            // Of a stream that is over: a status, for a message that came late.
            Err(ttrpc::Error::Eof | ttrpc::Error::RpcStatus(_)) => None,
            Err(error) => panic!("{error}"),
        }
    }
}
