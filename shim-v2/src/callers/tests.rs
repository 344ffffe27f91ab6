use std::time::Duration;

use futures::stream;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::timeout,
};
use ttrpc::r#async::{
    Client, Server,
    transport::{Listener, Socket},
};

use super::*;

const TASK: &str = "containerd.task.v3.Task";
const LIMIT: Duration = Duration::from_secs(10);
/// Time for what must not happen.
const SOON: Duration = Duration::from_millis(100);

/// Answers with its request's payload: at once, or when it is told to.
struct Echo(Arc<Notify>);

#[async_trait]
impl MethodHandler for Echo {
    async fn handler(&self, _: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        if request.method != "State" {
            self.0.notified().await;
        }
        Ok(Response {
            payload: request.payload,
            ..Response::default()
        })
    }
}

/// A shim as far as its callers know it.
struct Shim {
    callers: Callers,
    /// Lets a handler answer.
    ends: Arc<Notify>,
    _server: Server,
}

impl Shim {
    async fn serve(connections: impl FnOnce(&Callers) -> Vec<Connection>) -> Self {
        let ends = Arc::<Notify>::default();
        let methods = ["State", "Wait", "Delete"].map(|name| {
            let echo: Box<dyn MethodHandler + Send + Sync> = Box::new(Echo(Arc::clone(&ends)));
            (name.to_owned(), echo)
        });
        let service = Service {
            methods: HashMap::from(methods),
            streams: HashMap::new(),
        };
        let services = HashMap::from([(TASK.to_owned(), service)]);
        let callers = Callers::of(&services);
        let connections = connections(&callers).into_iter().map(Ok);
        let mut server = Server::new()
            .add_listener(Listener::new(stream::iter(connections.collect::<Vec<_>>())))
            .register_service(services)
            .register_service(refusals());
        server.start().await.unwrap();
        Shim {
            callers,
            ends,
            _server: server,
        }
    }
}

fn request(service: &str, method: &str, payload: &[u8]) -> Request {
    Request {
        service: service.to_owned(),
        method: method.to_owned(),
        payload: payload.to_vec(),
        ..Request::default()
    }
}

async fn ask(client: &Client, method: &str, payload: &[u8]) -> Vec<u8> {
    let answer = client.request(request(TASK, method, payload));
    let answer = timeout(LIMIT, answer).await.expect("it is answered");
    answer.unwrap().payload
}

/// Waits until the library has all that was sent, and nothing but this is under way.
async fn settled(callers: &Callers, busy: Option<&str>) {
    let settle = async {
        while callers.busy().as_deref() != busy {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    };
    timeout(LIMIT, settle).await.expect("it settles");
}

#[tokio::test]
async fn who_waits_is_answered_by_the_next_program_on_the_same_connection() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = Client::new(Socket::new(ours));
    let old = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    let waiting = tokio::spawn({
        let client = client.clone();
        async move { ask(&client, "Wait", b"for the end").await }
    });
    assert_eq!(ask(&client, "State", b"1").await, b"1");
    settled(&old.callers, None).await;

    let _gate = old.callers.close();
    let mut bag = Bag::default();
    let carried = old.callers.carry(&mut bag).unwrap();
    let text = serde_json::to_string(&carried).unwrap();
    std::mem::forget((bag, carried));
    let new = Shim::serve(|callers| {
        callers
            .unpack(serde_json::from_str(&text).unwrap())
            .unwrap()
    })
    .await;
    assert_eq!(ask(&client, "State", b"2").await, b"2");
    assert!(!waiting.is_finished());
    new.ends.notify_one();
    let answer = timeout(LIMIT, waiting).await.expect("it is answered");
    assert_eq!(answer.unwrap(), b"for the end");
    // Of the old one it was not.
    settled(&new.callers, None).await;
}

#[tokio::test]
async fn what_changes_something_is_waited_for_and_what_comes_meanwhile_waits() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = Client::new(Socket::new(ours));
    let shim = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    let begin = |method: &'static str| {
        let client = client.clone();
        tokio::spawn(async move { ask(&client, method, b"x").await })
    };
    let deleting = begin("Delete");
    let name = format!("{TASK}/Delete");
    settled(&shim.callers, Some(&name)).await;
    let gate = shim.callers.close();
    let asking = begin("State");
    tokio::time::sleep(SOON).await;
    assert!(!asking.is_finished());
    shim.ends.notify_one();
    assert_eq!(timeout(LIMIT, deleting).await.unwrap().unwrap(), b"x");
    settled(&shim.callers, None).await;
    assert!(!asking.is_finished());
    drop(gate);
    assert_eq!(timeout(LIMIT, asking).await.unwrap().unwrap(), b"x");
}

#[tokio::test]
async fn a_service_that_is_not_there_is_unimplemented_tt_07() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let client = Client::new(Socket::new(ours));
    let shim = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    for service in ["containerd.task.v9.Task", REFUSALS] {
        let answer = client.request(request(service, "Wait", b"")).await;
        let Err(ttrpc::Error::RpcStatus(status)) = answer else {
            panic!("{answer:?}");
        };
        assert_eq!(status.code(), Code::UNIMPLEMENTED);
        assert!(status.message.contains(service), "{}", status.message);
    }
    settled(&shim.callers, None).await;
}

#[tokio::test]
async fn a_message_that_is_too_long_is_too_much_and_the_connection_goes_on_tt_01() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let _shim = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    let length = u32::try_from(MESSAGE_LENGTH_MAX + 1).unwrap();
    let mut sent = Vec::from(MessageHeader::new_request(1, length));
    sent.resize(MESSAGE_HEADER_LENGTH + length as usize, 7);
    ours.write_all(&sent).await.unwrap();
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    ours.read_exact(&mut header).await.unwrap();
    let header = MessageHeader::from(header);
    let mut payload = vec![0; header.length as usize];
    ours.read_exact(&mut payload).await.unwrap();
    let response = Response::parse_from_bytes(&payload).unwrap();
    assert_eq!(response.status().code(), Code::RESOURCE_EXHAUSTED);
    assert_eq!(header.stream_id, 1);
    let client = Client::new(Socket::new(ours));
    assert_eq!(ask(&client, "State", b"on").await, b"on");
}

#[tokio::test]
async fn a_request_is_carried_in_part() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let old = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    let payload = request(TASK, "State", b"whole").write_to_bytes().unwrap();
    let length = u32::try_from(payload.len()).unwrap();
    let sent = [Vec::from(MessageHeader::new_request(1, length)), payload].concat();
    let (first, rest) = sent.split_at(sent.len() / 2);
    ours.write_all(first).await.unwrap();
    tokio::time::sleep(SOON).await;
    settled(&old.callers, None).await;
    let _gate = old.callers.close();
    let mut bag = Bag::default();
    let carried = old.callers.carry(&mut bag).unwrap();
    std::mem::forget(bag);
    let _new = Shim::serve(|callers| callers.unpack(carried).unwrap()).await;
    ours.write_all(rest).await.unwrap();
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    let read = timeout(LIMIT, ours.read_exact(&mut header)).await;
    read.expect("it is answered").unwrap();
    assert_eq!(MessageHeader::from(header).stream_id, 1);
}

#[tokio::test]
async fn a_message_that_is_too_long_is_passed_over_by_the_next_program_too() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let old = Shim::serve(|callers| vec![callers.connection(theirs)]).await;
    // One waits, and one says too much.
    let wait = request(TASK, "Wait", b"w").write_to_bytes().unwrap();
    let length = u32::try_from(wait.len()).unwrap();
    let waits = [Vec::from(MessageHeader::new_request(1, length)), wait].concat();
    ours.write_all(&waits).await.unwrap();
    let long = u32::try_from(MESSAGE_LENGTH_MAX + 1).unwrap();
    ours.write_all(&Vec::from(MessageHeader::new_request(3, long)))
        .await
        .unwrap();
    let mut payload = vec![7; long as usize];
    ours.write_all(&payload[..1000]).await.unwrap();
    let mut header = [0; MESSAGE_HEADER_LENGTH];
    ours.read_exact(&mut header).await.unwrap();
    let refused = MessageHeader::from(header);
    assert_eq!(refused.stream_id, 3);
    let mut response = vec![0; refused.length as usize];
    ours.read_exact(&mut response).await.unwrap();
    settled(&old.callers, None).await;
    let _gate = old.callers.close();
    let mut bag = Bag::default();
    let carried = old.callers.carry(&mut bag).unwrap();
    std::mem::forget(bag);
    let new = Shim::serve(|callers| callers.unpack(carried).unwrap()).await;
    ours.write_all(&payload.split_off(1000)).await.unwrap();
    new.ends.notify_one();
    let read = timeout(LIMIT, ours.read_exact(&mut header)).await;
    read.expect("who waits is answered").unwrap();
    assert_eq!(MessageHeader::from(header).stream_id, 1);
}

#[test]
fn answers_are_followed_however_they_are_cut() {
    let mut sent = Vec::new();
    for (number, length) in [(1, 0_u32), (3, 5), (5, 300)] {
        sent.extend(Vec::from(MessageHeader::new_response(number, length)));
        sent.resize(sent.len() + length as usize, 7);
    }
    for cut in 1..sent.len() {
        let (mut said, mut heard) = (Said::default(), Vec::new());
        for part in sent.chunks(cut) {
            said.follow(part, |header| heard.push(header.stream_id));
        }
        assert_eq!(heard, [1, 3, 5], "{cut}");
        assert!(said.is_whole());
    }
}
