//! Files into a container and out of it, by the process that copies them.

use std::{fs, os::unix::fs::MetadataExt, time::Duration};

use bulkhead_agent_api::{
    COPY_BEGINS,
    agent::{CancelCopyRequest, ContainerRequest, CopyInRequest, CopyOutRequest, Stdio},
};
use bulkhead_tar::{Entry, Kind, Reader, Writer};
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::UnixStream,
    time::{sleep, timeout},
};
use ttrpc::{Code, context};

use crate::{
    support::{Host, block_on, busybox_spec},
    users::with_own_users,
};

fn archive(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut writer = Writer::new(&mut bytes);
    for (name, content) in files {
        let entry = Entry {
            name: name.as_bytes().to_vec(),
            size: content.len() as u64,
            mode: 0o640,
            uid: 1000,
            gid: 1000,
            ..Entry::default()
        };
        writer.file(&entry, &mut &**content).unwrap();
    }
    writer.finish().unwrap();
    bytes
}

fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        error => panic!("{error}"),
    }
}

impl Host {
    async fn begin_copy(&self) -> (u64, UnixStream) {
        let id = self.id();
        (id, self.stream(id).await)
    }

    /// Copies in; the stream is left open, so that it is the archive that ends.
    async fn copy_in(&self, container: &str, path: &str, tar: &[u8]) -> ttrpc::Result<()> {
        self.copy_in_as(container, path, tar, false).await
    }

    async fn copy_in_as(
        &self,
        container: &str,
        path: &str,
        tar: &[u8],
        preserve_ownership: bool,
    ) -> ttrpc::Result<()> {
        let (stream, mut connection) = self.begin_copy().await;
        let request = CopyInRequest {
            container_id: container.into(),
            stream,
            path: path.into(),
            preserve_ownership,
            ..Default::default()
        };
        let send = async {
            let begins = connection.read_u8().await;
            // Of what is refused the rest is not taken.
            let _ = connection.write_all(tar).await;
            begins
        };
        let call = self.client.copy_in(context::Context::default(), &request);
        let (answer, begins) = tokio::join!(call, send);
        answer?;
        assert_eq!(begins.unwrap(), COPY_BEGINS);
        Ok(())
    }

    async fn copy_out(&self, container: &str, path: &str) -> ttrpc::Result<Vec<u8>> {
        let (stream, mut connection) = self.begin_copy().await;
        let request = CopyOutRequest {
            container_id: container.into(),
            stream,
            path: path.into(),
            ..Default::default()
        };
        let mut taken = Vec::new();
        let call = self.client.copy_out(context::Context::default(), &request);
        let (answer, read) = tokio::join!(call, connection.read_to_end(&mut taken));
        answer?;
        read.unwrap();
        assert_eq!(taken.first(), Some(&COPY_BEGINS));
        Ok(taken.split_off(1))
    }

    /// A container that sleeps.
    async fn sleeper(&self, change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut spec = busybox_spec(["sleep", "1000"]);
        change(&mut spec);
        let id = self.create(spec, Stdio::default()).await.unwrap();
        self.start_container(&id).await.unwrap();
        id
    }

    async fn remove(&self, id: &str) {
        self.kill(id, "", 9).await.unwrap();
        self.wait(id, "").await.unwrap();
        self.delete(id, "").await.unwrap();
    }

    /// Waits until the container's only process is its first one.
    async fn is_alone(&self, id: &str) {
        let alone = async {
            while self.pids(id).await.len() > 1 {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(Duration::from_secs(10), alone)
            .await
            .expect("a process is left");
    }
}

#[test]
fn a_file_goes_in_and_comes_out_again_and_an_exec_sees_it_ss_18_ss_19_ss_20() {
    block_on(async |host: &mut Host| {
        // Also where the container may have no further process.
        let limited = host.has_controller("pids");
        let id = host
            .sleeper(|spec| {
                if limited {
                    spec["linux"]["resources"]["pids"] = json!({"limit": 1});
                }
            })
            .await;
        let tar = archive(&[("hello.txt", b"from the host"), ("d/empty", b"")]);
        host.copy_in(&id, "/tmp/new", &tar).await.unwrap();
        let cat = busybox_spec(["cat", "/tmp/new/hello.txt"])["process"].clone();
        assert_eq!(host.run_exec(&id, &cat).await.stdout, "from the host");
        let out = host.copy_out(&id, "/tmp/new/hello.txt").await.unwrap();
        let mut reader = Reader::new(&*out);
        let entry = reader.next_entry().unwrap().unwrap();
        assert_eq!(entry.name, b"hello.txt");
        assert_eq!((entry.uid, entry.mode), (0, 0o640));
        let mut content = Vec::new();
        std::io::Read::read_to_end(&mut reader, &mut content).unwrap();
        assert_eq!(content, b"from the host");
        // What only the container has mounted is where it goes to, and comes from.
        host.copy_in(&id, "/dev/shm", &tar).await.unwrap();
        assert!(!host.rootfs.join("dev/shm").join("hello.txt").exists());
        host.copy_out(&id, "/dev/shm/hello.txt").await.unwrap();
        host.is_alone(&id).await;
        host.remove(&id).await;
    });
}

#[test]
fn in_a_user_namespace_of_its_own_owners_are_those_of_the_container_ss_18() {
    block_on(async |host: &mut Host| {
        let mut spec = busybox_spec(["sleep", "1000"]);
        with_own_users(host, &mut spec);
        let id = host.create(spec, Stdio::default()).await.unwrap();
        host.start_container(&id).await.unwrap();
        let tar = archive(&[("f", b"x")]);
        host.copy_in(&id, "/tmp/root", &tar).await.unwrap();
        host.copy_in_as(&id, "/tmp/kept", &tar, true).await.unwrap();
        let uid = |path: &str| fs::metadata(host.rootfs.join(path)).unwrap().uid();
        assert_eq!(uid("tmp/root/f"), 100_000);
        assert_eq!(uid("tmp/kept/f"), 101_000);
        let out = host.copy_out(&id, "/tmp/kept/f").await.unwrap();
        let entry = Reader::new(&*out).next_entry().unwrap().unwrap();
        assert_eq!(entry.uid, 1000);
        host.remove(&id).await;
    });
}

#[test]
fn what_is_not_there_and_what_is_no_archive_is_refused_and_leaves_no_process_ss_63() {
    block_on(async |host: &mut Host| {
        let id = host.sleeper(|_| {}).await;
        let tar = archive(&[("f", b"x")]);
        assert_eq!(code(host.copy_out(&id, "/none").await), Code::NOT_FOUND);
        assert_eq!(code(host.copy_out("c999", "/").await), Code::NOT_FOUND);
        assert_eq!(code(host.copy_in("c999", "/", &tar).await), Code::NOT_FOUND);
        let garbage = host.copy_in(&id, "/tmp", &[b'x'; 4096]).await;
        assert_eq!(code(garbage), Code::INVALID_ARGUMENT);
        let onto_a_file = host.copy_in(&id, "/etc/passwd", &tar).await;
        assert_eq!(code(onto_a_file), Code::FAILED_PRECONDITION);
        let read_only = host.copy_in(&id, "/proc/sys", &tar).await;
        assert_eq!(code(read_only), Code::FAILED_PRECONDITION);
        // Links lead where they lead for the container.
        std::os::unix::fs::symlink("/../../../../tmp", host.rootfs.join("up")).unwrap();
        host.copy_in(&id, "/up", &tar).await.unwrap();
        assert!(host.rootfs.join("tmp/f").exists());
        host.is_alone(&id).await;
        host.remove(&id).await;
        let stopped = host.copy_out(&id, "/").await;
        assert_eq!(code(stopped), Code::NOT_FOUND);
    });
}

#[test]
fn a_copy_that_is_given_up_or_loses_its_host_ends_with_its_process() {
    block_on(async |host: &mut Host| {
        let id = host.sleeper(|_| {}).await;
        let begun = archive(&[("f", &[b'x'; 5000])]);
        for cancel in [false, true] {
            // Nothing follows, and nothing is taken.
            let (stream, mut connection) = host.begin_copy().await;
            let request = CopyInRequest {
                container_id: id.clone(),
                stream,
                path: "/tmp".into(),
                ..Default::default()
            };
            let call = host.client.copy_in(context::Context::default(), &request);
            let end = async {
                assert_eq!(connection.read_u8().await.unwrap(), COPY_BEGINS);
                connection.write_all(&begun[..2000]).await.unwrap();
                give_up(host, stream, connection, cancel).await;
            };
            assert!(tokio::join!(call, end).0.is_err());
            host.is_alone(&id).await;

            let (stream, mut connection) = host.begin_copy().await;
            let request = CopyOutRequest {
                container_id: id.clone(),
                stream,
                path: "/bin/busybox".into(),
                ..Default::default()
            };
            let call = host.client.copy_out(context::Context::default(), &request);
            let end = async {
                assert_eq!(connection.read_u8().await.unwrap(), COPY_BEGINS);
                give_up(host, stream, connection, cancel).await;
            };
            assert!(tokio::join!(call, end).0.is_err());
            host.is_alone(&id).await;
        }
        host.remove(&id).await;
    });
}

/// Ends a copy by either way, once its process is there.
async fn give_up(host: &Host, stream: u64, connection: UnixStream, cancel: bool) {
    if !cancel {
        return drop(connection);
    }
    sleep(Duration::from_millis(200)).await;
    let request = CancelCopyRequest {
        stream,
        ..Default::default()
    };
    let context = context::Context::default();
    host.client.cancel_copy(context, &request).await.unwrap();
}

#[test]
fn a_copy_does_not_hold_up_the_end_of_its_container_and_a_paused_one_has_none() {
    block_on(async |host: &mut Host| {
        let id = host.sleeper(|_| {}).await;
        let request = ContainerRequest {
            container_id: id.clone(),
            ..Default::default()
        };
        let context = context::Context::default;
        host.client.freeze(context(), &request).await.unwrap();
        let paused = host.copy_out(&id, "/etc/passwd").await;
        assert_eq!(code(paused), Code::FAILED_PRECONDITION);
        host.client.thaw(context(), &request).await.unwrap();

        let (stream, mut connection) = host.begin_copy().await;
        let request = CopyOutRequest {
            container_id: id.clone(),
            stream,
            path: "/bin/busybox".into(),
            ..Default::default()
        };
        let call = host.client.copy_out(context(), &request);
        let end = async {
            assert_eq!(connection.read_u8().await.unwrap(), COPY_BEGINS);
            // Until the stream is full: nobody takes what comes.
            while host.pids(&id).await.len() < 2 {
                sleep(Duration::from_millis(10)).await;
            }
            sleep(Duration::from_millis(200)).await;
            host.remove(&id).await;
        };
        let (answer, ()) = tokio::join!(call, end);
        assert!(answer.is_err());
    });
}

#[test]
fn no_program_of_the_container_sees_who_copies() {
    block_on(async |host: &mut Host| {
        let id = host.sleeper(|_| {}).await;
        let (stream, mut connection) = host.begin_copy().await;
        let request = CopyOutRequest {
            container_id: id.clone(),
            stream,
            path: "/bin/busybox".into(),
            ..Default::default()
        };
        let call = host.client.copy_out(context::Context::default(), &request);
        let look = async {
            assert_eq!(connection.read_u8().await.unwrap(), COPY_BEGINS);
            while host.pids(&id).await.len() < 2 {
                sleep(Duration::from_millis(10)).await;
            }
            let ls = busybox_spec(["sh", "-c", "ls -d /proc/[0-9]*"])["process"].clone();
            let seen = host.run_exec(&id, &ls).await.stdout;
            // The first process, the shell and ls.
            assert!(seen.lines().count() <= 3, "{seen}");
            drop(connection);
        };
        assert!(tokio::join!(call, look).0.is_err());
        host.remove(&id).await;
    });
}

#[test]
fn what_is_made_in_proc_is_no_file_to_be_copied() {
    block_on(async |host: &mut Host| {
        let id = host.sleeper(|_| {}).await;
        let out = host.copy_out(&id, "/").await.unwrap();
        let mut reader = Reader::new(&*out);
        let mut names = Vec::new();
        while let Some(entry) = reader.next_entry().unwrap() {
            let directory = entry.kind == Kind::Directory;
            names.push((String::from_utf8(entry.name).unwrap(), directory));
        }
        assert!(names.contains(&("./proc/".into(), true)));
        assert!(names.contains(&("./etc/passwd".into(), false)));
        let below = |name: &str| {
            name.len() > 7 && (name.starts_with("./proc/") || name.starts_with("./sys/"))
        };
        assert!(!names.iter().any(|(name, _)| below(name)), "{names:?}");
        host.remove(&id).await;
    });
}
