//! One call of the method `Stream`, from either end.
//!
//! Its messages are of type Any. What they hold has one field each, number 1: a text,
//! bytes or a number, which is what the wrappers of protobuf's own library are on the
//! wire.

use containerd_shim_protos::protobuf::{
    Message as _,
    well_known_types::{
        any::Any,
        wrappers::{BytesValue, Int32Value, StringValue},
    },
};
use tokio::{net::UnixStream, sync::oneshot};
use ttrpc::{
    Request,
    r#async::{
        CSReceiver, CSSender, Client, ClientStream, SSReceiver, SSSender, ServerStream,
        transport::Socket,
    },
};

use super::{Address, METHOD, SERVICE};

const INIT: &str = "containerd.services.streaming.v1.StreamInit";
const DATA: &str = "containerd.types.transfer.Data";
const UPDATE: &str = "containerd.types.transfer.WindowUpdate";

/// What a message says.
#[derive(Debug, PartialEq)]
pub(super) enum Message {
    Data(Vec<u8>),
    /// So many more bytes may be sent.
    Credit(i32),
    /// Nothing that is known.
    Other,
}

impl Message {
    fn parse(any: &Any) -> Self {
        match kind(any) {
            DATA => BytesValue::parse_from_bytes(&any.value)
                .map_or(Message::Other, |data| Message::Data(data.value)),
            UPDATE => Int32Value::parse_from_bytes(&any.value)
                .map_or(Message::Other, |update| Message::Credit(update.value)),
            _ => Message::Other,
        }
    }
}

/// The type, without what may stand before it.
fn kind(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

fn any(kind: &str, content: &impl containerd_shim_protos::protobuf::Message) -> Any {
    Any {
        type_url: kind.to_owned(),
        // Fails for messages that lack what they require, which these cannot.
        value: content.write_to_bytes().unwrap_or_default(),
        ..Any::default()
    }
}

/// The stream that a first message names.
pub(super) fn named(first: &Any) -> Option<String> {
    let init = StringValue::parse_from_bytes(&first.value).ok()?;
    (kind(first) == INIT && !init.value.is_empty()).then_some(init.value)
}

/// The answer to it.
pub(super) fn acknowledgement() -> Any {
    any("google.protobuf.Empty", &StringValue::new())
}

#[derive(Debug)]
enum Sender {
    Server(SSSender<Any>),
    Client(CSSender<Any>),
}

#[derive(Debug)]
enum Receiver {
    Server(SSReceiver<Any>),
    Client(CSReceiver<Any>),
}

/// How a link's other end has ended.
#[derive(Debug, PartialEq)]
pub(super) enum Ended {
    /// It said that there is no more.
    Finished,
    /// Without a word.
    Broken,
}

/// A call under way. Dropping it ends it.
#[derive(Debug)]
pub(super) struct Link {
    sender: Sender,
    receiver: Receiver,
    /// Tells whoever made the link that it is dropped.
    _open: oneshot::Sender<()>,
}

impl Link {
    /// The link of somebody who called.
    pub(super) fn called(stream: ServerStream<Any, Any>) -> (Self, oneshot::Receiver<()>) {
        let (sender, receiver) = stream.split();
        Self::new(Sender::Server(sender), Receiver::Server(receiver))
    }

    fn new(sender: Sender, receiver: Receiver) -> (Self, oneshot::Receiver<()>) {
        let (open, told) = oneshot::channel();
        let link = Link {
            sender,
            receiver,
            _open: open,
        };
        (link, told)
    }

    /// Calls for a stream.
    pub(super) async fn dial(address: &Address) -> ttrpc::Result<(Self, oneshot::Receiver<()>)> {
        let socket = UnixStream::connect(&address.socket).await;
        let socket = socket.map_err(|error| ttrpc::Error::Others(error.to_string()))?;
        let client = Client::new(Socket::new(socket));
        let request = Request {
            service: SERVICE.to_owned(),
            method: METHOD.to_owned(),
            ..Request::default()
        };
        let stream = client.new_stream(request, true, true).await?;
        let mut stream = ClientStream::<Any, Any>::new(stream);
        let init = StringValue {
            value: address.id.clone(),
            ..StringValue::default()
        };
        stream.send(&any(INIT, &init)).await?;
        stream.recv().await?;
        let (sender, receiver) = stream.split();
        Ok(Self::new(
            Sender::Client(sender),
            Receiver::Client(receiver),
        ))
    }

    pub(super) async fn data(&self, bytes: Vec<u8>) -> ttrpc::Result<()> {
        let data = BytesValue {
            value: bytes,
            ..BytesValue::default()
        };
        self.send(&any(DATA, &data)).await
    }

    pub(super) async fn grant(&self, credit: i32) -> ttrpc::Result<()> {
        let update = Int32Value {
            value: credit,
            ..Int32Value::default()
        };
        self.send(&any(UPDATE, &update)).await
    }

    async fn send(&self, message: &Any) -> ttrpc::Result<()> {
        match &self.sender {
            Sender::Server(sender) => sender.send(message).await,
            Sender::Client(sender) => sender.send(message).await,
        }
    }

    /// Waits for a message. On a socket of our own a link that breaks is only seen when
    /// something is sent on it.
    pub(super) async fn receive(&mut self) -> Result<Message, Ended> {
        let received = match &mut self.receiver {
            Receiver::Server(receiver) => receiver.recv().await,
            Receiver::Client(receiver) => match receiver.recv().await {
                Ok(message) => Ok(Some(message)),
                Err(ttrpc::Error::Eof) => Ok(None),
                Err(error) => Err(error),
            },
        };
        match received {
            Ok(Some(message)) => Ok(Message::parse(&message)),
            Ok(None) => Err(Ended::Finished),
            Err(_) => Err(Ended::Broken),
        }
    }

    /// Says that there is no more.
    pub(super) async fn finish(self) {
        // Of one that was called, its handler says so.
        if let Sender::Client(sender) = &self.sender {
            let _ = sender.close_send().await;
        }
    }
}
