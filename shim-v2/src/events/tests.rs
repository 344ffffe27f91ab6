use std::{
    os::fd::AsFd,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::Empty,
    shim_async::{Events as EventsService, create_events},
};
use tokio::sync::watch;
use ttrpc::r#async::{Server, TtrpcContext};

use super::*;

/// Takes events as containerd does, but refuses the first ones.
#[derive(Clone)]
struct Taker {
    taken: watch::Sender<Vec<(String, String, String)>>,
    refuse: Arc<Mutex<u32>>,
}

impl Taker {
    fn new(refuse: u32) -> Self {
        Taker {
            taken: watch::Sender::default(),
            refuse: Arc::new(Mutex::new(refuse)),
        }
    }

    async fn serve(&self, address: &str) -> Server {
        let service = create_events(Arc::new(self.clone()));
        let mut server = Server::new()
            .bind(&format!("unix://{address}"))
            .unwrap()
            .register_service(service);
        server.start().await.unwrap();
        server
    }

    /// Waits for so many events; answers their topics.
    async fn topics(&self, count: usize) -> Vec<String> {
        let mut taken = self.taken.subscribe();
        let taken = timeout(
            Duration::from_secs(60),
            taken.wait_for(|taken| taken.len() >= count),
        );
        let taken = taken.await.expect("events are lost").unwrap();
        taken.iter().map(|(_, topic, _)| topic.clone()).collect()
    }
}

#[async_trait]
impl EventsService for Taker {
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
        self.taken.send_modify(|taken| {
            taken.push((envelope.namespace, envelope.topic, event.type_url));
        });
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

fn address(dir: &tempfile::TempDir) -> String {
    dir.path().join("c.sock").display().to_string()
}

fn publisher(address: &str) -> Publisher {
    Publisher::new(&Namespace::new("moby").unwrap(), address)
}

const TOPICS: [&str; 3] = ["/tasks/start", "/tasks/exit", "/tasks/delete"];

fn publish_three(publisher: &Publisher) {
    publisher.publish(Event::Start(TaskStart::default()));
    publisher.publish(exit("a"));
    publisher.publish(Event::Delete(TaskDelete::default()));
}

#[tokio::test]
async fn events_arrive_in_order_although_containerd_refuses_some_lc_75_tt_05() {
    let dir = tempfile::tempdir().unwrap();
    let containerd = Taker::new(2);
    let _server = containerd.serve(&address(&dir)).await;
    let publisher = publisher(&format!("unix://{}", address(&dir)));
    publish_three(&publisher);
    publisher.flush(Duration::from_secs(10)).await;
    assert_eq!(containerd.topics(0).await, TOPICS);
    let taken = containerd.taken.borrow().clone();
    assert_eq!(taken[1].2, "containerd.events.TaskExit");
    assert_eq!(taken[0].0, "moby");
}

#[tokio::test]
async fn an_event_that_containerd_always_refuses_does_not_hold_up_the_next() {
    let dir = tempfile::tempdir().unwrap();
    let containerd = Taker::new(OFFERS);
    let _server = containerd.serve(&address(&dir)).await;
    let publisher = publisher(&address(&dir));
    publish_three(&publisher);
    assert_eq!(containerd.topics(2).await, TOPICS[1..]);
}

#[tokio::test(start_paused = true)]
async fn events_wait_in_order_for_a_containerd_that_is_away_f66() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = publisher(&address(&dir));
    publish_three(&publisher);
    sleep(Duration::from_secs(300)).await;
    let containerd = Taker::new(0);
    let _server = containerd.serve(&address(&dir)).await;
    assert_eq!(containerd.topics(3).await, TOPICS);
}

#[tokio::test(start_paused = true)]
async fn an_event_is_not_kept_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let publisher = publisher(&address(&dir));
    publisher.publish(exit("old"));
    sleep(KEEP + FORWARD).await;
    publisher.publish(Event::Delete(TaskDelete::default()));
    let containerd = Taker::new(0);
    let _server = containerd.serve(&address(&dir)).await;
    assert_eq!(containerd.topics(1).await, ["/tasks/delete"]);
}

#[tokio::test]
async fn a_containerd_that_accepts_no_connection_blocks_nothing() {
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
    let dir = tempfile::tempdir().unwrap();
    let socket = || {
        rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )
        .unwrap()
    };
    let place = SocketAddrUnix::new(address(&dir)).unwrap();
    let listener = socket();
    rustix::net::bind(&listener, &place).unwrap();
    rustix::net::listen(listener.as_fd(), 0).unwrap();
    // As that of a stopped process: its queue of connections is full.
    let mut waiting = Vec::new();
    loop {
        let client = socket();
        if rustix::net::connect(&client, &place).is_err() {
            break;
        }
        waiting.push(client);
    }
    let publisher = publisher(&address(&dir));
    publish_three(&publisher);
    let begun = std::time::Instant::now();
    publisher.flush(Duration::from_millis(300)).await;
    assert!(begun.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn without_an_address_events_are_dropped_silently_lc_11() {
    let publisher = publisher("");
    publisher.publish(exit("a"));
    assert!(publisher.queue.is_none());
    assert!(publisher.writer.lock().unwrap().is_none());
    let begun = std::time::Instant::now();
    publisher.flush(Duration::from_secs(60)).await;
    assert!(begun.elapsed() < Duration::from_secs(1));
}

#[tokio::test]
async fn a_full_queue_drops_the_newest_event_and_holds_up_nobody() {
    let (publisher, told) = Publisher::kept();
    for number in 0..QUEUE + 10 {
        publisher.publish(exit(&number.to_string()));
    }
    let told = told.all();
    assert_eq!(told.len(), QUEUE);
    assert_eq!(told[0], "/tasks/exit 0 0");
    assert_eq!(told[QUEUE - 1], format!("/tasks/exit {} 0", QUEUE - 1));
}
