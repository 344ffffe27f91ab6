//! Sockets of the host in a container.

use bulkhead_agent_api::agent::{AcceptRequest, CreateRequest, Socket, Stdio};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
};
use ttrpc::{Code, context};

use crate::support::{Host, block_on, busybox_spec};

/// A container that sleeps, with a socket at `/tmp/made/s` in a tmpfs of its own.
async fn create(host: &Host, id: &str, sockets: Vec<Socket>) -> ttrpc::Result<u32> {
    let mut spec = busybox_spec(["sleep", "1000"]);
    spec["root"] = json!({"path": host.rootfs, "readonly": true});
    let source = host.directory.path().join("sockets").join(id).join("0");
    let mounts = spec["mounts"].as_array_mut().unwrap();
    mounts.push(json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs"}));
    mounts.push(json!({"destination": "/tmp/made/s", "type": "bind", "source": source}));
    let request = CreateRequest {
        container_id: id.to_owned(),
        spec: serde_json::to_vec(&spec).unwrap(),
        stdio: Some(Stdio::default()).into(),
        sockets,
        ..CreateRequest::default()
    };
    let answer = host.client.create(context::Context::default(), &request);
    Ok(answer.await?.pid)
}

async fn accept(host: &Host, id: &str, stream: u64) -> ttrpc::Result<u32> {
    let request = AcceptRequest {
        container_id: id.to_owned(),
        stream,
        ..AcceptRequest::default()
    };
    let answer = host.client.accept(context::Context::default(), &request);
    Ok(answer.await?.socket)
}

#[test]
fn a_socket_is_in_its_container_before_the_start_and_gone_with_it_ss_21() {
    block_on(async |host: &mut Host| {
        let socket = Socket {
            mode: 0o620,
            uid: 7,
            gid: 9,
            ..Socket::default()
        };
        let pid = create(host, "c", vec![socket]).await.unwrap();
        // As the container sees it: in the mount namespace of its process.
        let place = format!("/proc/{pid}/root/tmp/made/s");
        let mut process = UnixStream::connect(&place).await.unwrap();
        let stream = host.id();
        assert_eq!(accept(host, "c", stream).await.unwrap(), 0);
        process.write_all(b"question").await.unwrap();
        process.shutdown().await.unwrap();
        let mut carried = host.stream(stream).await;
        let mut said = String::new();
        carried.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "question");
        carried.write_all(b"answer").await.unwrap();
        drop(carried);
        said.clear();
        process.read_to_string(&mut said).await.unwrap();
        assert_eq!(said, "answer");

        host.start_container("c").await.unwrap();
        let process = busybox_spec(["stat", "-c", "%F %a %u %g", "/tmp/made/s"])["process"].clone();
        let seen = host.run_exec("c", &process).await;
        assert_eq!(seen.stdout, "socket 620 7 9\n", "{}", seen.stderr);
        let (ended, ()) = tokio::join!(accept(host, "c", host.id()), async {
            host.kill_all("c", 9).await.unwrap();
            host.wait("c", "").await.unwrap();
            host.delete("c", "").await.unwrap();
        });
        let Err(ttrpc::Error::RpcStatus(status)) = ended else {
            panic!("{ended:?}");
        };
        assert_eq!(status.code(), Code::NOT_FOUND);
        let left = std::fs::read_dir(host.directory.path().join("sockets")).unwrap();
        assert_eq!(left.count(), 0);
        // A container that cannot be made leaves none either, and its id is free.
        create(host, "c", Vec::new()).await.unwrap_err();
        assert_eq!(host.cgroups(), 0);
    });
}
