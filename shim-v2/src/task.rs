//! The Task service: containerd's requests in, typed errors out as status codes.
//!
//! Served under the names of version 2 and 3, which are the same on the wire.
//! Parses at the edge, holds no state, and turns a panic of a handler into the
//! answer Internal.

use std::{
    collections::HashMap,
    path::PathBuf,
    sync::{Arc, Mutex},
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ProcessInfo, ResizePtyRequest, ResumeRequest,
        ShutdownRequest, StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest,
        StatsResponse, Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    protobuf::{EnumOrUnknown, Message, MessageField, well_known_types::any::Any},
    shim::oci::ProcessDetails,
    shim_async::{Task, create_task},
};
use tokio::sync::Notify;
use tracing::{debug, warn};
use ttrpc::r#async::{Service, TtrpcContext};

use crate::{
    agent::ProcessName,
    error::{Error, Result},
    io::{Stdio, streaming},
    json,
    lock::lock,
    names::{ContainerId, ExecId},
    options::Options,
    pod::{Create, HostPid, Pod},
    state::{self, State},
    transfer::TransferService,
};

mod stats;

/// Name of the service in version 2.
const TASK_V2: &str = "containerd.task.v2.Task";

/// Answers requests for one pod.
#[derive(Clone, Debug)]
pub struct TaskService {
    pod: Arc<Pod>,
    /// The shim's socket, removed before Shutdown is answered.
    socket: Arc<Mutex<Option<PathBuf>>>,
    /// Told after Shutdown.
    end: Arc<Notify>,
}

impl TaskService {
    /// A service for `pod` on the socket at `socket`; `end` is notified when the
    /// shim may exit.
    #[must_use]
    pub fn new(pod: Arc<Pod>, socket: Option<PathBuf>, end: Arc<Notify>) -> Self {
        let socket = Arc::new(Mutex::new(socket));
        TaskService { pod, socket, end }
    }

    /// The service under both of its names, and those of the pod's streams and files.
    #[must_use]
    pub fn services(self) -> HashMap<String, Service> {
        let calls = streaming::Calls(Arc::clone(self.pod.hub()));
        let streaming = Service {
            methods: HashMap::new(),
            streams: HashMap::from([(streaming::METHOD.to_owned(), Arc::new(calls) as _)]),
        };
        let transfer = TransferService::new(Arc::clone(&self.pod)).services();
        let service: Arc<dyn Task + Send + Sync> = Arc::new(self);
        let mut services = create_task(Arc::clone(&service));
        services.extend(
            create_task(service)
                .into_values()
                .map(|service| (TASK_V2.to_owned(), service)),
        );
        services.insert(streaming::SERVICE.to_owned(), streaming);
        services.extend(transfer);
        services
    }

    /// Ends the pod and gives up its socket.
    pub async fn stop(&self) {
        // Who comes from now on starts a shim of their own, whose socket has the
        // same name.
        let socket = lock(&self.socket).take();
        if let Some(socket) = socket
            && let Err(error) = std::fs::remove_file(socket)
        {
            debug!(%error, "the socket is gone already");
        }
        self.pod.stop().await;
    }

    /// Runs a handler in a task of its own: it goes on when the caller has lost
    /// patience, and its panic is only a failed request.
    async fn answer<T, F>(
        &self,
        call: &'static str,
        id: &str,
        handler: impl FnOnce(Self) -> F,
    ) -> ttrpc::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T>> + Send + 'static,
    {
        debug!(call, id, "request");
        let (work, handler) = (self.pod.work(), handler(self.clone()));
        let result = tokio::spawn(async move {
            let result = handler.await;
            drop(work);
            result
        });
        result
            .await
            .unwrap_or(Err(Error::Panicked(call)))
            .map_err(|error| refuse(call, id, &error))
    }
}

/// Logs a failure and gives it its status.
pub(crate) fn refuse(call: &'static str, id: &str, error: &Error) -> ttrpc::Error {
    warn!(call, id, error = error.text(), "request failed");
    error.into()
}

fn name(id: &str, exec: &str) -> Result<ProcessName> {
    let exec = if exec.is_empty() {
        None
    } else {
        Some(ExecId::new(exec)?)
    };
    Ok(ProcessName {
        container: ContainerId::new(id)?,
        exec,
    })
}

fn init(id: &str) -> Result<ProcessName> {
    name(id, "")
}

/// A process as Pids tells it. Those of the guest have no number on the host, and the
/// message has no place for another one.
fn process_info(held: HostPid) -> ProcessInfo {
    let details = held.exec.map(|exec| {
        let details = ProcessDetails {
            exec_id: exec.to_string(),
            ..ProcessDetails::default()
        };
        Any {
            type_url: "containerd.runc.v1.ProcessDetails".to_owned(),
            value: details.write_to_bytes().unwrap_or_default(),
            ..Any::default()
        }
    });
    ProcessInfo {
        pid: held.pid,
        info: details.into(),
        ..ProcessInfo::default()
    }
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let id = request.id.clone();
        self.answer("Create", &id, |service| async move {
            if !request.checkpoint.is_empty() || !request.parent_checkpoint.is_empty() {
                return Err(Error::Unsupported("Restoring a checkpoint"));
            }
            let pid = service
                .pod
                .create(Create {
                    id: ContainerId::new(&request.id)?,
                    bundle: PathBuf::from(request.bundle),
                    rootfs: request.rootfs,
                    stdio: Stdio {
                        stdin: request.stdin,
                        stdout: request.stdout,
                        stderr: request.stderr,
                        terminal: request.terminal,
                    },
                    options: Options::read(request.options.as_ref()),
                })
                .await?;
            Ok(CreateTaskResponse {
                pid,
                ..CreateTaskResponse::default()
            })
        })
        .await
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let id = request.id.clone();
        self.answer("Start", &id, |service| async move {
            let pid = service
                .pod
                .start(&name(&request.id, &request.exec_id)?)
                .await?;
            Ok(StartResponse {
                pid,
                ..StartResponse::default()
            })
        })
        .await
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let id = request.id.clone();
        self.answer("State", &id, |service| async move {
            let found = service
                .pod
                .describe(&name(&request.id, &request.exec_id)?)?;
            let phase = found.process.phase();
            let stdio = found.process.stdio.clone();
            let mut response = StateResponse {
                id: request.id.clone(),
                exec_id: request.exec_id.clone(),
                bundle: found.bundle.display().to_string(),
                pid: found.process.pid(),
                status: EnumOrUnknown::new(match state::seen(found.container, phase.state()) {
                    State::Registered | State::Starting => Status::CREATED,
                    State::Live => Status::RUNNING,
                    State::Pausing => Status::PAUSING,
                    State::Paused => Status::PAUSED,
                    State::Ended => Status::STOPPED,
                }),
                stdin: stdio.stdin,
                stdout: stdio.stdout,
                stderr: stdio.stderr,
                terminal: stdio.terminal,
                ..StateResponse::default()
            };
            if let Some(exit) = phase.exit() {
                response.exit_status = u32::from(exit.status);
                response.exited_at = MessageField::some(exit.at.clone());
            }
            Ok(response)
        })
        .await
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        // Not a task of its own: it ends with its caller.
        let wait = async { self.pod.wait(&name(&request.id, &request.exec_id)?).await };
        let exit = wait
            .await
            .map_err(|error| refuse("Wait", &request.id, &error))?;
        Ok(WaitResponse {
            exit_status: u32::from(exit.status),
            exited_at: MessageField::some(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Kill", &id, |service| async move {
            let name = name(&request.id, &request.exec_id)?;
            service.pod.kill(&name, request.signal, request.all).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        let id = request.id.clone();
        self.answer("Delete", &id, |service| async move {
            let (pid, exit) = service
                .pod
                .delete(&name(&request.id, &request.exec_id)?)
                .await?;
            Ok(DeleteResponse {
                pid,
                exit_status: u32::from(exit.status),
                exited_at: MessageField::some(exit.at),
                ..DeleteResponse::default()
            })
        })
        .await
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Exec", &id, |service| async move {
            let process = json::parse(&request.spec.value).map_err(|source| Error::Json {
                what: "the process of an exec".to_owned(),
                source,
            })?;
            let stdio = Stdio {
                stdin: request.stdin.clone(),
                stdout: request.stdout.clone(),
                stderr: request.stderr.clone(),
                terminal: request.terminal,
            };
            service.pod.exec(
                &ContainerId::new(&request.id)?,
                ExecId::new(&request.exec_id)?,
                process,
                stdio,
            )?;
            Ok(Empty::new())
        })
        .await
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let id = request.id.clone();
        self.answer("Pids", &id, |service| async move {
            let pids = service.pod.pids(&ContainerId::new(&request.id)?)?;
            Ok(PidsResponse {
                processes: pids.into_iter().map(process_info).collect(),
                ..PidsResponse::default()
            })
        })
        .await
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("CloseIO", &id, |service| async move {
            let name = name(&request.id, &request.exec_id)?;
            if request.stdin {
                service.pod.close_stdin(&name)?;
            } else {
                service.pod.describe(&name)?;
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("ResizePty", &id, |service| async move {
            let name = name(&request.id, &request.exec_id)?;
            // A terminal counts in 16 bits.
            let cells = |count: u32| count.min(u32::from(u16::MAX));
            service
                .pod
                .resize(&name, cells(request.width), cells(request.height))
                .await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let id = request.id.clone();
        self.answer("Stats", &id, |service| async move {
            let used = service.pod.stats(&ContainerId::new(&request.id)?).await?;
            Ok(StatsResponse {
                stats: MessageField::some(stats::message(&used)),
                ..StatsResponse::default()
            })
        })
        .await
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let id = request.id.clone();
        self.answer("Connect", &id, |service| async move {
            let found = init(&request.id).and_then(|name| service.pod.describe(&name));
            Ok(ConnectResponse {
                shim_pid: std::process::id(),
                task_pid: found.map_or(0, |found| found.process.pid()),
                version: env!("CARGO_PKG_VERSION").to_owned(),
                ..ConnectResponse::default()
            })
        })
        .await
    }

    async fn shutdown(&self, _: &TtrpcContext, request: ShutdownRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Shutdown", &id, |service| async move {
            if service.pod.is_empty() || request.now {
                service.stop().await;
                service.end.notify_one();
            }
            Ok(Empty::new())
        })
        .await
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Pause", &id, |service| async move {
            service.pod.pause(&ContainerId::new(&request.id)?).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Resume", &id, |service| async move {
            service.pod.resume(&ContainerId::new(&request.id)?).await?;
            Ok(Empty::new())
        })
        .await
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        Err(refuse(
            "Checkpoint",
            &request.id,
            &Error::Unsupported("Checkpoint"),
        ))
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        self.answer("Update", &id, |service| async move {
            // What it says is judged where it is done; here only that it is JSON.
            let resources =
                json::parse(&request.resources.value).map_err(|source| Error::Json {
                    what: "the resources of an update".to_owned(),
                    source,
                })?;
            let id = ContainerId::new(&request.id)?;
            let resources = resources.to_string().into_bytes();
            service.pod.update(&id, resources).await?;
            Ok(Empty::new())
        })
        .await
    }
}

#[cfg(test)]
mod tests;
