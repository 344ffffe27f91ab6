//! containerd's service of events, and nothing else of it.

use std::{
    path::Path,
    sync::{Arc, Condvar, Mutex},
    time::Instant,
};

use containerd_shim_protos::{
    Events as Service, create_events,
    protobuf::{Message, well_known_types::empty::Empty},
    shim::{event::Envelope, events::ForwardRequest},
};
use ttrpc::{Server, TtrpcContext};

/// What a shim has told.
#[derive(Default)]
struct Told(Mutex<Vec<Envelope>>, Condvar);

impl Service for Told {
    fn forward(&self, _: &TtrpcContext, request: ForwardRequest) -> ttrpc::Result<Empty> {
        let envelope = request.envelope.unwrap_or_default();
        self.0.lock().unwrap().push(envelope);
        self.1.notify_all();
        Ok(Empty::new())
    }
}

/// The service at a socket, until it is dropped.
pub(crate) struct Events {
    told: Arc<Told>,
    server: Mutex<Option<Server>>,
}

impl Events {
    /// Listens at `socket`.
    pub(crate) fn listen(socket: &Path) -> Events {
        let told = Arc::<Told>::default();
        let service: Arc<dyn Service + Send + Sync> = Arc::clone(&told) as _;
        let mut server = Server::new()
            .bind(&format!("unix://{}", socket.display()))
            .unwrap()
            .register_service(create_events(service));
        server.start().unwrap();
        let server = Mutex::new(Some(server));
        Events { told, server }
    }

    /// Waits for an event with this topic.
    pub(crate) fn wait_for(&self, topic: &str, end: Instant) -> Envelope {
        let mut told = self.told.0.lock().unwrap();
        loop {
            if let Some(found) = told.iter().find(|event| event.topic == topic) {
                return found.clone();
            }
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "no {topic} in {told:?}");
            told = self.told.1.wait_timeout(told, left).unwrap().0;
        }
    }

    /// All so far, in their order.
    pub(crate) fn all(&self) -> Vec<Envelope> {
        self.told.0.lock().unwrap().clone()
    }
}

impl Drop for Events {
    fn drop(&mut self) {
        if let Some(server) = self.server.lock().unwrap().take() {
            server.shutdown();
        }
    }
}

/// What an envelope holds, which must be of this type.
pub(crate) fn content<M: Message>(envelope: &Envelope, kind: &str) -> M {
    let event = envelope.event.as_ref().expect("an event");
    assert_eq!(event.type_url, kind);
    M::parse_from_bytes(&event.value).unwrap()
}
