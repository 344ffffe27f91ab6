//! The other end of the queue of events, for tests.

use std::sync::{Arc, Mutex};

use super::{Event, Publisher, Queue};
use crate::lock::lock;

/// What was published, in order.
#[derive(Debug)]
pub(crate) struct Told {
    queue: Arc<Queue>,
    told: Mutex<Vec<Event>>,
}

impl Publisher {
    /// A publisher whose events are kept.
    pub(crate) fn kept() -> (Self, Told) {
        let (publisher, queue) = Self::channel();
        let told = Told {
            queue,
            told: Mutex::default(),
        };
        (publisher, told)
    }
}

impl Told {
    /// All events so far.
    pub(crate) fn events(&self) -> Vec<Event> {
        let mut told = lock(&self.told);
        told.extend(std::iter::from_fn(|| self.queue.take()));
        told.clone()
    }

    /// The same in words: topic, container or exec, and status.
    pub(crate) fn all(&self) -> Vec<String> {
        self.events().iter().map(brief).collect()
    }
}

fn brief(event: &Event) -> String {
    let topic = event.topic();
    match event {
        Event::Create(event) => format!("{topic} {}", event.container_id),
        Event::Start(event) => format!("{topic} {}", event.container_id),
        Event::ExecAdded(event) => format!("{topic} {}", event.exec_id),
        Event::ExecStarted(event) => format!("{topic} {}", event.exec_id),
        Event::Oom(event) => format!("{topic} {}", event.container_id),
        Event::Exit(event) => format!("{topic} {} {}", event.id, event.exit_status),
        Event::Paused(event) => format!("{topic} {}", event.container_id),
        Event::Resumed(event) => format!("{topic} {}", event.container_id),
        Event::Carried { .. } => topic.to_owned(),
        Event::Delete(event) => format!("{topic} {} {}", event.container_id, event.exit_status),
    }
}
