use std::sync::{Arc, Mutex};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::Empty,
    shim_async::{Events as EventsService, create_events},
};
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

/// Takes events as containerd does, but refuses the first ones.
#[derive(Clone, Default)]
struct Containerd {
    taken: Arc<Mutex<Vec<(String, String, String)>>>,
    refuse: Arc<Mutex<u32>>,
}

#[async_trait]
impl EventsService for Containerd {
    async fn forward(
        &self,
        context: &TtrpcContext,
        request: ForwardRequest,
    ) -> ttrpc::Result<Empty> {
        let mut refuse = self.refuse.lock().unwrap();
        if *refuse > 0 {
            *refuse -= 1;
            return Err(ttrpc::Error::Others("not now".into()));
        }
        let envelope = request.envelope.unwrap();
        assert!(envelope.timestamp.seconds > 0);
        let metadata = context.metadata["containerd-namespace-ttrpc"].join(",");
        assert_eq!(metadata, envelope.namespace);
        let event = envelope.event.unwrap();
        self.taken
            .lock()
            .unwrap()
            .push((envelope.namespace, envelope.topic, event.type_url));
        Ok(Empty::new())
    }
}

fn exit(id: &str) -> Event {
    Event::Exit(TaskExit {
        container_id: id.into(),
        id: id.into(),
        ..TaskExit::default()
    })
}

#[tokio::test]
async fn events_arrive_in_order_although_containerd_refuses_some_lc_75() {
    let dir = tempfile::tempdir().unwrap();
    let address = format!("unix://{}/c.sock", dir.path().display());
    let containerd = Containerd::default();
    *containerd.refuse.lock().unwrap() = 2;
    let service = create_events(Arc::new(containerd.clone()));
    let mut server = Server::new()
        .bind(&address)
        .unwrap()
        .register_service(service);
    server.start().await.unwrap();
    let publisher = Publisher::new(&Namespace::new("moby").unwrap(), &address);
    publisher.publish(Event::Start(TaskStart::default()));
    publisher.publish(exit("a"));
    publisher.publish(Event::Delete(TaskDelete::default()));
    publisher.flush(Duration::from_secs(10)).await;
    let taken = containerd.taken.lock().unwrap().clone();
    let topics: Vec<&str> = taken.iter().map(|(_, topic, _)| topic.as_str()).collect();
    assert_eq!(topics, ["/tasks/start", "/tasks/exit", "/tasks/delete"]);
    assert_eq!(taken[1].2, "containerd.events.TaskExit");
    assert_eq!(taken[0].0, "moby");
}

#[tokio::test]
async fn without_an_address_events_are_dropped_silently_lc_11() {
    let publisher = Publisher::new(&Namespace::new("default").unwrap(), "");
    publisher.publish(exit("a"));
    publisher.flush(Duration::from_secs(1)).await;
}

#[tokio::test]
async fn an_absent_containerd_holds_up_nobody() {
    let publisher = Publisher::new(&Namespace::new("default").unwrap(), "/nowhere/c.sock");
    for _ in 0..QUEUE + 10 {
        publisher.publish(exit("a"));
    }
    publisher.flush(Duration::from_millis(10)).await;
}
