//! Events for containerd: one queue, one writer, in order.
//!
//! An event is published over ttrpc to `TTRPC_ADDRESS`. While containerd is away
//! it is tried again for minutes, and those behind it wait: a later event never
//! overtakes an earlier one. Each is delivered once, unless containerd took it and
//! its answer was lost: then it is sent again. Without an address (CRI-O) events
//! are dropped silently. Nothing here blocks a request or the thread: a full queue
//! drops the newest event and says so, and whoever does not accept a connection is
//! a containerd that is away.

use std::{
    collections::{HashMap, VecDeque},
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskPaused, TaskResumed, TaskStart,
    },
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    topics,
};
use serde::{Deserialize, Serialize};
use tokio::{
    net::UnixStream,
    sync::Notify,
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tracing::{debug, warn};
use ttrpc::r#async::transport::Socket;

use crate::{
    carry::Bytes,
    lock::lock,
    names::{Namespace, plain_address},
};

/// Events that wait at most.
const QUEUE: usize = 2048;
/// Time that an event is kept for a containerd that is away.
const KEEP: Duration = Duration::from_secs(600);
/// Times that an event is offered to a containerd that answers with an error.
const OFFERS: u32 = 5;
/// Limit of one attempt.
const FORWARD: Duration = Duration::from_secs(5);
/// First and longest pause between two attempts.
const PAUSES: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// What happened, without the time and the namespace.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// A container was created.
    Create(Box<TaskCreate>),
    /// Its first process runs.
    Start(TaskStart),
    /// An exec was registered.
    ExecAdded(TaskExecAdded),
    /// An exec runs.
    ExecStarted(TaskExecStarted),
    /// The kernel's OOM killer struck in a container.
    Oom(TaskOOM),
    /// A process ended.
    Exit(TaskExit),
    /// A container was deleted.
    Delete(TaskDelete),
    /// A container stands still.
    Paused(TaskPaused),
    /// It goes on.
    Resumed(TaskResumed),
    /// What the program before this one was to tell.
    Carried {
        /// Its topic.
        topic: String,
        /// What is told.
        payload: Any,
    },
}

impl Event {
    /// The topic on which it is published.
    #[must_use]
    pub fn topic(&self) -> &str {
        match self {
            Event::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Event::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Event::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Event::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Event::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Event::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Event::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
            Event::Paused(_) => topics::TASK_PAUSED_EVENT_TOPIC,
            Event::Resumed(_) => topics::TASK_RESUMED_EVENT_TOPIC,
            Event::Carried { topic, .. } => topic,
        }
    }

    fn payload(&self) -> Any {
        fn any<M: Message + protobuf::MessageFull>(message: &M) -> Any {
            Any {
                type_url: M::descriptor().full_name().to_owned(),
                value: message.write_to_bytes().unwrap_or_default(),
                ..Any::default()
            }
        }
        match self {
            Event::Create(message) => any(message.as_ref()),
            Event::Start(message) => any(message),
            Event::ExecAdded(message) => any(message),
            Event::ExecStarted(message) => any(message),
            Event::Oom(message) => any(message),
            Event::Exit(message) => any(message),
            Event::Delete(message) => any(message),
            Event::Paused(message) => any(message),
            Event::Resumed(message) => any(message),
            Event::Carried { payload, .. } => payload.clone(),
        }
    }
}

/// The streams of a container, as the create event tells them.
#[must_use]
pub fn task_io(stdin: &str, stdout: &str, stderr: &str, terminal: bool) -> TaskIO {
    TaskIO {
        stdin: stdin.to_owned(),
        stdout: stdout.to_owned(),
        stderr: stderr.to_owned(),
        terminal,
        ..TaskIO::default()
    }
}

/// An event in the queue.
#[derive(Clone, Debug)]
pub(crate) struct Queued {
    at: Timestamp,
    since: Instant,
    event: Event,
}

/// What waits to be told, in order. The first one stays until it is taken.
#[derive(Debug, Default)]
pub(crate) struct Queue {
    waiting: Mutex<VecDeque<Queued>>,
    news: Notify,
    closed: AtomicBool,
    /// The first one is being told.
    telling: AtomicBool,
}

impl Queue {
    /// The first one; `None` once the queue is closed and empty.
    async fn first(&self) -> Option<Queued> {
        loop {
            let first = lock(&self.waiting).front().cloned();
            if first.is_some() || self.closed.load(Ordering::SeqCst) {
                return first;
            }
            self.news.notified().await;
        }
    }

    /// Takes the first one out.
    pub(crate) fn take(&self) -> Option<Event> {
        lock(&self.waiting).pop_front().map(|queued| queued.event)
    }
}

/// What goes along of one event when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Carried {
    seconds: i64,
    nanos: i32,
    age: Duration,
    topic: String,
    type_url: String,
    value: Bytes,
}

impl Carried {
    fn of(queued: &Queued) -> Self {
        let payload = queued.event.payload();
        Carried {
            seconds: queued.at.seconds,
            nanos: queued.at.nanos,
            age: queued.since.elapsed(),
            topic: queued.event.topic().to_owned(),
            type_url: payload.type_url,
            value: payload.value,
        }
    }

    fn queued(self) -> Queued {
        let now = Instant::now();
        let payload = Any {
            type_url: self.type_url,
            value: self.value,
            ..Any::default()
        };
        Queued {
            at: Timestamp {
                seconds: self.seconds,
                nanos: self.nanos,
                ..Timestamp::default()
            },
            since: now.checked_sub(self.age).unwrap_or(now),
            event: Event::Carried {
                topic: self.topic,
                payload,
            },
        }
    }
}

/// The end of the queue that events are put into.
#[derive(Debug)]
pub struct Publisher {
    /// `None`: nobody is told.
    queue: Option<Arc<Queue>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// Starts the writer. `address` is that of containerd's ttrpc socket.
    #[must_use]
    pub fn new(namespace: &Namespace, address: &str) -> Self {
        Self::unpack(namespace, address, Vec::new())
    }

    /// The same, with what the program before this one was to tell first.
    pub(crate) fn unpack(namespace: &Namespace, address: &str, carried: Vec<Carried>) -> Self {
        if address.is_empty() {
            return Publisher {
                queue: None,
                writer: None.into(),
            };
        }
        let (publisher, queue) = Self::channel();
        lock(&queue.waiting).extend(carried.into_iter().map(Carried::queued));
        let containerd = Containerd {
            namespace: namespace.to_string(),
            address: plain_address(address).to_owned(),
            client: None,
        };
        *lock(&publisher.writer) = Some(tokio::spawn(containerd.write(queue)));
        publisher
    }

    /// A queue, and the end from which events are taken.
    pub(crate) fn channel() -> (Self, Arc<Queue>) {
        let queue = Arc::<Queue>::default();
        let publisher = Publisher {
            queue: Some(Arc::clone(&queue)),
            writer: None.into(),
        };
        (publisher, queue)
    }

    /// Puts an event into the queue.
    pub fn publish(&self, event: Event) {
        debug!(topic = event.topic(), "event");
        let Some(queue) = &self.queue else { return };
        let mut waiting = lock(&queue.waiting);
        if waiting.len() >= QUEUE || queue.closed.load(Ordering::SeqCst) {
            warn!(topic = event.topic(), "event dropped: the queue is full");
            return;
        }
        waiting.push_back(Queued {
            at: Timestamp::now(),
            since: Instant::now(),
            event,
        });
        queue.news.notify_one();
    }

    /// Is one being told just now?
    pub(crate) fn is_busy(&self) -> bool {
        let telling = |queue: &Arc<Queue>| queue.telling.load(Ordering::SeqCst);
        self.queue.as_ref().is_some_and(telling)
    }

    /// What goes along when the program changes. It must not be [busy](Publisher::is_busy).
    pub(crate) fn carry(&self) -> Vec<Carried> {
        let waiting = |queue: &Arc<Queue>| lock(&queue.waiting).iter().map(Carried::of).collect();
        self.queue.as_ref().map_or_else(Vec::new, waiting)
    }

    /// Ends the queue and waits until it is empty, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        if let Some(queue) = &self.queue {
            queue.closed.store(true, Ordering::SeqCst);
            queue.news.notify_one();
        }
        let writer = lock(&self.writer).take();
        if let Some(writer) = writer
            && timeout(limit, writer).await.is_err()
        {
            warn!("events dropped: containerd does not take them");
        }
    }
}

/// The connection to containerd.
struct Containerd {
    namespace: String,
    address: String,
    client: Option<EventsClient>,
}

impl Containerd {
    async fn write(mut self, queue: Arc<Queue>) {
        while let Some(queued) = queue.first().await {
            if let Err(error) = self.deliver(&queued, &queue.telling).await {
                let topic = queued.event.topic();
                warn!(topic, %error, "event dropped: containerd does not take it");
            }
            queue.take();
            queue.telling.store(false, Ordering::SeqCst);
        }
    }

    /// Leaves `telling` true if it was taken, or given up.
    async fn deliver(&mut self, queued: &Queued, telling: &AtomicBool) -> ttrpc::Result<()> {
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(queued.at.clone()),
                namespace: self.namespace.clone(),
                topic: queued.event.topic().to_owned(),
                event: MessageField::some(queued.event.payload()),
                ..Envelope::default()
            }),
            ..ForwardRequest::default()
        };
        let (mut pause, longest) = PAUSES;
        let mut offers = 0;
        loop {
            telling.store(true, Ordering::SeqCst);
            let error = match self.forward(&request).await {
                Ok(()) => return Ok(()),
                Err(error) => error,
            };
            if matches!(error, ttrpc::Error::RpcStatus(_)) {
                offers += 1;
            }
            if offers == OFFERS || queued.since.elapsed() >= KEEP {
                return Err(error);
            }
            debug!(%error, "event not taken");
            self.client = None;
            telling.store(false, Ordering::SeqCst);
            sleep(pause).await;
            pause = (pause * 2).min(longest);
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let failed = |error: io::Error| ttrpc::Error::Socket(error.to_string());
        let service = match &self.client {
            Some(service) => service,
            None => {
                // Not the library's own way, which blocks the thread until the
                // connection is accepted.
                let stream = timeout(FORWARD, UnixStream::connect(&self.address)).await;
                let stream = stream
                    .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
                    .map_err(failed)?;
                let client = Client::new(Socket::new(stream));
                self.client.insert(EventsClient::new(client))
            }
        };
        let mut context = ttrpc::context::with_duration(FORWARD);
        context.metadata = HashMap::from([(
            "containerd-namespace-ttrpc".to_owned(),
            vec![self.namespace.clone()],
        )]);
        match timeout(FORWARD, service.forward(context, request)).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(failed(io::ErrorKind::TimedOut.into())),
        }
    }
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
