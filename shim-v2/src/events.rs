//! Events for containerd: one queue, one writer, in order, each exactly once.
//!
//! An event is published over ttrpc to `TTRPC_ADDRESS`. While containerd is away
//! it is tried again, and those behind it wait: a later event never overtakes an
//! earlier one. Without an address (CRI-O) events are dropped silently. Publishing
//! never blocks a request: a full queue drops the newest event and says so.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::Duration,
};

use containerd_shim_protos::{
    events::task::{
        TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM,
        TaskStart,
    },
    protobuf::{
        Message, MessageField,
        well_known_types::{any::Any, timestamp::Timestamp},
    },
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    topics,
};
use tokio::{
    sync::mpsc,
    task::JoinHandle,
    time::{sleep, timeout},
};
use tracing::{debug, warn};

use crate::names::{Namespace, plain_address};

/// Events that wait at most.
const QUEUE: usize = 2048;
/// Attempts to publish one event.
const ATTEMPTS: u32 = 5;
/// Limit of one attempt.
const FORWARD: Duration = Duration::from_secs(5);

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
}

impl Event {
    /// The topic on which it is published.
    #[must_use]
    pub fn topic(&self) -> &'static str {
        match self {
            Event::Create(_) => topics::TASK_CREATE_EVENT_TOPIC,
            Event::Start(_) => topics::TASK_START_EVENT_TOPIC,
            Event::ExecAdded(_) => topics::TASK_EXEC_ADDED_EVENT_TOPIC,
            Event::ExecStarted(_) => topics::TASK_EXEC_STARTED_EVENT_TOPIC,
            Event::Oom(_) => topics::TASK_OOM_EVENT_TOPIC,
            Event::Exit(_) => topics::TASK_EXIT_EVENT_TOPIC,
            Event::Delete(_) => topics::TASK_DELETE_EVENT_TOPIC,
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

/// The end of the queue that events are put into.
#[derive(Debug)]
pub struct Publisher {
    queue: Mutex<Option<mpsc::Sender<(Timestamp, Event)>>>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Publisher {
    /// Starts the writer. `address` is that of containerd's ttrpc socket.
    #[must_use]
    pub fn new(namespace: &Namespace, address: &str) -> Self {
        if address.is_empty() {
            return Publisher {
                queue: None.into(),
                writer: None.into(),
            };
        }
        let (queue, events) = mpsc::channel(QUEUE);
        let address = format!("unix://{}", plain_address(address));
        let writer = tokio::spawn(write(events, namespace.to_string(), address));
        Publisher {
            queue: Some(queue).into(),
            writer: Some(writer).into(),
        }
    }

    /// Puts an event into the queue.
    pub fn publish(&self, event: Event) {
        debug!(topic = event.topic(), "event");
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(queue) = queue.as_ref() else { return };
        if let Err(error) = queue.try_send((Timestamp::now(), event)) {
            let event = match &error {
                mpsc::error::TrySendError::Full((_, event))
                | mpsc::error::TrySendError::Closed((_, event)) => event,
            };
            warn!(topic = event.topic(), "event dropped: the queue is full");
        }
    }

    /// Ends the queue and waits until it is empty, at most `limit`.
    pub async fn flush(&self, limit: Duration) {
        self.queue
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        let writer = self
            .writer
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(writer) = writer
            && timeout(limit, writer).await.is_err()
        {
            warn!("events dropped: containerd does not take them");
        }
    }
}

async fn write(mut events: mpsc::Receiver<(Timestamp, Event)>, namespace: String, address: String) {
    let mut client = None;
    while let Some((timestamp, event)) = events.recv().await {
        let topic = event.topic();
        let request = ForwardRequest {
            envelope: MessageField::some(Envelope {
                timestamp: MessageField::some(timestamp),
                namespace: namespace.clone(),
                topic: topic.to_owned(),
                event: MessageField::some(event.payload()),
                ..Envelope::default()
            }),
            ..ForwardRequest::default()
        };
        for attempt in 1..=ATTEMPTS {
            match forward(&mut client, &namespace, &address, &request).await {
                Ok(()) => break,
                Err(error) if attempt == ATTEMPTS => {
                    warn!(topic, %error, "event dropped: containerd does not take it");
                }
                Err(error) => {
                    debug!(topic, %error, attempt, "event not taken");
                    client = None;
                    sleep(Duration::from_millis(100 << attempt)).await;
                }
            }
        }
    }
}

async fn forward(
    client: &mut Option<EventsClient>,
    namespace: &str,
    address: &str,
    request: &ForwardRequest,
) -> ttrpc::Result<()> {
    let service = match client {
        Some(service) => service,
        None => client.insert(EventsClient::new(Client::connect(address).await?)),
    };
    let metadata = HashMap::from([(
        "containerd-namespace-ttrpc".to_owned(),
        vec![namespace.to_owned()],
    )]);
    let mut context = ttrpc::context::with_duration(FORWARD);
    context.metadata = metadata;
    service.forward(context, request).await?;
    Ok(())
}

#[cfg(test)]
mod tests;
