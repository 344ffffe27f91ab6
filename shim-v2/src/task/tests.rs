use containerd_shim_protos::shim_async::{Client, TaskClient};
use futures::{poll, stream};
use tokio::net::UnixStream;
use ttrpc::{
    Code,
    r#async::{
        Server,
        transport::{Listener, Socket},
    },
};

use super::*;
use crate::pod::tests::harness::{Bench, named, run};

/// The service of a pod, and a client of it.
struct Served {
    task: TaskClient,
    end: Arc<Notify>,
    socket: PathBuf,
    _server: Server,
}

async fn serve(bench: &Bench) -> Served {
    let socket = bench.place.join("task.sock");
    std::fs::write(&socket, "").unwrap();
    let end = Arc::new(Notify::new());
    let service = TaskService::new(
        Arc::clone(&bench.pod),
        Some(socket.clone()),
        Arc::clone(&end),
    );
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut server = Server::new()
        .add_listener(Listener::new(stream::iter([Ok(theirs)])))
        .register_service(service.services());
    server.start().await.unwrap();
    Served {
        task: TaskClient::new(Client::new(Socket::new(ours))),
        end,
        socket,
        _server: server,
    }
}

fn context() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(0)
}

fn code<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Code {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => status.code(),
        error => panic!("{error}"),
    }
}

fn state_of(id: &str, exec: &str) -> StateRequest {
    StateRequest {
        id: id.into(),
        exec_id: exec.into(),
        ..StateRequest::default()
    }
}

fn create_of(bench: &Bench, id: &str) -> CreateTaskRequest {
    CreateTaskRequest {
        id: id.into(),
        bundle: bench.request(id).bundle.display().to_string(),
        ..CreateTaskRequest::default()
    }
}

impl Served {
    async fn status(&self, id: &str, exec: &str) -> Status {
        let answer = self.task.state(context(), &state_of(id, exec)).await;
        answer.unwrap().status.unwrap()
    }
}

#[test]
fn state_tells_every_step_of_a_life_ta_06_ta_08() {
    run(async |bench| {
        let served = serve(bench).await;
        let connect = ConnectRequest {
            id: "c".into(),
            ..ConnectRequest::default()
        };
        let before = served.task.connect(context(), &connect).await.unwrap();
        assert_eq!((before.shim_pid, before.task_pid), (std::process::id(), 0));
        let created = served.task.create(context(), &create_of(bench, "c")).await;
        let pid = created.unwrap().pid;
        let after = served.task.connect(context(), &connect).await.unwrap();
        assert_eq!(after.task_pid, pid);
        assert_ne!(pid, after.shim_pid);
        assert_eq!(served.status("c", "").await, Status::CREATED);
        bench.start("c").await.unwrap();
        assert_eq!(served.status("c", "").await, Status::RUNNING);
        bench.agent.exits("c", "", 7);
        bench.wait("c").await;
        let state = served
            .task
            .state(context(), &state_of("c", ""))
            .await
            .unwrap();
        assert_eq!(state.status.unwrap(), Status::STOPPED);
        assert_eq!((state.exit_status, state.pid), (7, pid));
        assert!(state.exited_at.seconds > 0);
        bench.delete("c").await.unwrap();
        let gone = served.task.state(context(), &state_of("c", "")).await;
        assert_eq!(code(gone), Code::NOT_FOUND);
        served.task.connect(context(), &connect).await.unwrap();
    });
}

#[test]
fn pids_tell_which_exec_each_one_stands_for_ta_50() {
    run(async |bench| {
        let served = serve(bench).await;
        bench.running("c").await;
        bench.executing("c/e").await;
        let request = PidsRequest {
            id: "c".into(),
            ..PidsRequest::default()
        };
        let answer = served.task.pids(context(), &request).await.unwrap();
        let [first, exec] = answer.processes.as_slice() else {
            panic!("{answer:?}");
        };
        assert_eq!((first.pid, first.info.is_some()), (bench.pid("c"), false));
        assert_eq!(exec.pid, bench.pid("c/e"));
        assert_eq!(exec.info.type_url, "containerd.runc.v1.ProcessDetails");
        let details = ProcessDetails::parse_from_bytes(&exec.info.value).unwrap();
        assert_eq!(details.exec_id, "e");
        let unknown = PidsRequest {
            id: "x".into(),
            ..PidsRequest::default()
        };
        let answer = served.task.pids(context(), &unknown).await;
        assert_eq!(code(answer), Code::NOT_FOUND);
    });
}

#[test]
fn a_wait_holds_up_nobody_on_the_same_connection_tt_03() {
    run(async |bench| {
        let served = serve(bench).await;
        bench.running("c").await;
        let request = WaitRequest {
            id: "c".into(),
            ..WaitRequest::default()
        };
        let mut wait = std::pin::pin!(served.task.wait(context(), &request));
        assert!(poll!(&mut wait).is_pending());
        assert_eq!(served.status("c", "").await, Status::RUNNING);
        assert!(poll!(&mut wait).is_pending());
        bench.agent.exits("c", "", 3);
        assert_eq!(wait.await.unwrap().exit_status, 3);
    });
}

#[test]
fn a_create_whose_caller_goes_away_is_finished_and_can_be_deleted_tt_04() {
    run(async |bench| {
        let served = serve(bench).await;
        bench.agent.hold("Create");
        let request = create_of(bench, "c");
        {
            let mut create = std::pin::pin!(served.task.create(context(), &request));
            assert!(poll!(&mut create).is_pending());
            bench.agent.called("Create c").await;
        }
        drop(served);
        bench.agent.release("Create");
        while bench.pod.describe(&named("c")).is_err() {
            tokio::task::yield_now().await;
        }
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        bench.agent.emptied().await;
    });
}

#[test]
fn the_process_of_an_exec_is_json_whatever_its_type_says_tt_09_ta_26() {
    run(async |bench| {
        let served = serve(bench).await;
        bench.running("c").await;
        let exec = |id: &str, json: &str| ExecProcessRequest {
            id: "c".into(),
            exec_id: id.into(),
            spec: MessageField::some(Any {
                type_url: "something/else".into(),
                value: json.as_bytes().to_vec(),
                ..Any::default()
            }),
            ..ExecProcessRequest::default()
        };
        for bad in ["", "{", "[]", "{\"args\": []}", "null"] {
            let answer = served.task.exec(context(), &exec("bad", bad)).await;
            assert_eq!(code(answer), Code::INVALID_ARGUMENT, "{bad:?}");
        }
        let good = r#"{"args": ["/bin/true"], "cwd": "/", "user": {"uid": 0, "gid": 0}}"#;
        let answer = served.task.exec(context(), &exec("good", good)).await;
        answer.unwrap();
        assert_eq!(served.status("c", "good").await, Status::CREATED);
        let again = served.task.exec(context(), &exec("good", good)).await;
        assert_eq!(code(again), Code::ALREADY_EXISTS);
        let traversal = served.task.exec(context(), &exec("../x", good)).await;
        assert_eq!(code(traversal), Code::INVALID_ARGUMENT);
    });
}

#[test]
fn shutdown_waits_for_the_last_container_and_gives_the_socket_up_first_ta_71_ta_72() {
    run(async |bench| {
        let served = serve(bench).await;
        bench.running("c").await;
        let request = ShutdownRequest {
            id: "c".into(),
            ..ShutdownRequest::default()
        };
        served.task.shutdown(context(), &request).await.unwrap();
        assert!(served.socket.exists());
        assert_eq!(served.status("c", "").await, Status::RUNNING);
        bench.kill("c", 9).await.unwrap();
        bench.wait("c").await;
        bench.delete("c").await.unwrap();
        let mut ended = std::pin::pin!(served.end.notified());
        assert!(poll!(&mut ended).is_pending());
        served.task.shutdown(context(), &request).await.unwrap();
        assert!(!served.socket.exists());
        ended.await;
    });
}

#[test]
fn a_panic_of_a_handler_is_a_failed_request_f5() {
    run(async |bench| {
        let end = Arc::new(Notify::new());
        let service = TaskService::new(Arc::clone(&bench.pod), None, end);
        let answer: ttrpc::Result<()> = service
            .answer("Test", "c", |_| async { panic!("a mistake") })
            .await;
        assert_eq!(code(answer), Code::INTERNAL);
        bench.running("c").await;
    });
}
