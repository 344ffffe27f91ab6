//! Connections of a container to sockets of the host.

use std::{fs, os::unix::net::UnixListener as StdListener};

use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
};

use super::{
    super::*,
    harness::{Bench, run},
};

/// A socket of the host beside the pod.
fn service(bench: &Bench, name: &str) -> UnixListener {
    let listener = StdListener::bind(bench.place.join(name)).unwrap();
    listener.set_nonblocking(true).unwrap();
    UnixListener::from_std(listener).unwrap()
}

/// Creates a container that has these sockets.
async fn create(bench: &Bench, id: &str, names: &[&str]) {
    let sources = names.iter().map(|name| bench.place.join(name));
    let mount = |source| json!({"destination": "/run/s", "type": "uds", "source": source});
    let mounts: Vec<_> = sources.map(mount).collect();
    let request = bench.request_with(id, |spec| spec["mounts"] = json!(mounts));
    bench.pod.create(request).await.unwrap();
}

async fn accept(listener: &UnixListener) -> UnixStream {
    // Far beyond any other limit: the clock of these tests jumps to the next one whenever
    // nothing but sockets is waited for.
    let accepted = timeout(Duration::from_secs(3600), listener.accept()).await;
    accepted.expect("nobody connects").unwrap().0
}

#[test]
fn each_connection_of_the_guest_is_carried_on_to_its_socket_ss_21() {
    run(async |bench| {
        let (one, two) = (service(bench, "one"), service(bench, "two"));
        create(bench, "c", &["one", "two"]).await;
        for (listener, number) in [(&two, 1), (&one, 0), (&two, 1)] {
            let mut process = bench.agent.connects("c", number);
            let mut host = accept(listener).await;
            process.write_all(b"question").await.unwrap();
            process.shutdown().await.unwrap();
            let mut said = String::new();
            host.read_to_string(&mut said).await.unwrap();
            assert_eq!(said, "question");
            host.write_all(b"answer").await.unwrap();
            drop(host);
            said.clear();
            process.read_to_string(&mut said).await.unwrap();
            assert_eq!(said, "answer");
        }
    });
}

#[test]
fn nobody_is_dialled_before_somebody_connects_ss_43() {
    run(async |bench| {
        let listener = service(bench, "s");
        create(bench, "c", &["s"]).await;
        bench.start("c").await.unwrap();
        let waited = timeout(Duration::from_secs(60), listener.accept()).await;
        assert!(waited.is_err());
        // The service closes at once, which reaches the process.
        let mut process = bench.agent.connects("c", 0);
        drop(accept(&listener).await);
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
    });
}

#[test]
fn a_service_that_is_not_there_closes_the_connection_and_is_reached_later_ss_21() {
    run(async |bench| {
        create(bench, "c", &["s"]).await;
        let mut process = bench.agent.connects("c", 0);
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
        let listener = service(bench, "s");
        let mut process = bench.agent.connects("c", 0);
        accept(&listener).await.write_all(b"x").await.unwrap();
        assert_eq!(process.read_u8().await.unwrap(), b'x');
    });
}

#[test]
fn a_socket_that_was_not_given_is_refused_and_with_it_all_that_follows_ss_21() {
    run(async |bench| {
        let listener = service(bench, "s");
        create(bench, "c", &["s"]).await;
        create(bench, "d", &["s", "s"]).await;
        // The guest gives up on a stream that does not come.
        let mut process = bench.agent.connects("c", 1);
        assert_eq!(process.read(&mut [0]).await.unwrap(), 0);
        let _never = bench.agent.connects("c", 0);
        let waited = timeout(Duration::from_secs(20), listener.accept()).await;
        assert!(waited.is_err());
        // The other container is none the worse.
        let _process = bench.agent.connects("d", 1);
        accept(&listener).await;
    });
}

#[test]
fn a_pod_has_so_many_connections_and_the_next_one_waits_ss_66() {
    run(async |bench| {
        let listener = service(bench, "s");
        create(bench, "c", &["s"]).await;
        let mut processes = Vec::new();
        let mut hosts = Vec::new();
        for _ in 0..128 {
            processes.push(bench.agent.connects("c", 0));
            hosts.push(accept(&listener).await);
        }
        let _next = bench.agent.connects("c", 0);
        let waited = timeout(Duration::from_secs(20), listener.accept()).await;
        assert!(waited.is_err());
        assert_eq!(bench.agent.waiting(), 1);
        processes.pop();
        accept(&listener).await;
    });
}

#[test]
fn a_container_that_is_deleted_leaves_no_connection_ss_21() {
    run(async |bench| {
        let listener = service(bench, "s");
        create(bench, "c", &["s"]).await;
        bench.start("c").await.unwrap();
        let _process = bench.agent.connects("c", 0);
        let mut host = accept(&listener).await;
        bench.agent.exits("c", "", 0);
        bench.wait("c").await;
        // The guest of this test keeps its end open.
        bench.delete("c").await.unwrap();
        assert_eq!(host.read(&mut [0]).await.unwrap(), 0);
        assert!(host.write_all(b"x").await.is_err());
        bench.create("c").await.unwrap();
    });
}

#[test]
fn what_is_no_socket_is_refused_and_nothing_is_left_ss_21() {
    run(async |bench| {
        fs::write(bench.place.join("file"), "").unwrap();
        let source = bench.place.join("file");
        let request = bench.request_with("c", |spec| {
            spec["mounts"] = json!([{"destination": "/s", "type": "uds", "source": source}]);
        });
        let error = bench.pod.create(request).await.unwrap_err();
        assert_eq!(error.code(), Code::INVALID_ARGUMENT, "{}", error.text());
        assert!(
            error.text().contains("it is not a socket"),
            "{}",
            error.text()
        );
        assert_eq!((bench.booted(), bench.shared()), (0, 0));
    });
}
