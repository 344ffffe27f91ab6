//! Calls of the Task service under either of its names, from any number of threads.

use std::time::Duration;

use containerd_shim_protos::{
    api::{
        DeleteRequest, DeleteResponse, Empty, KillRequest, ShutdownRequest, StartRequest,
        StartResponse, WaitRequest, WaitResponse,
    },
    protobuf::Message,
};
use ttrpc::{Client, Request, context};

/// The shim's binary, on the path of whoever starts it.
pub(crate) const BINARY: &str = "containerd-shim-bulkhead-v2";
/// Namespace of containerd for which shims are started.
pub(crate) const NAMESPACE: &str = "suite";
/// The Task service under the name of version 3.
pub(crate) const TASK_V3: &str = "containerd.task.v3.Task";

/// Limit for a call.
const LIMIT: Duration = Duration::from_secs(120);

/// A connection to a shim for the calls of one container.
pub(crate) struct Task {
    client: Client,
    /// The name of the service.
    service: &'static str,
    pub(crate) id: String,
}

impl Task {
    /// Connects to the shim at this address.
    pub(crate) fn connect(address: &str, service: &'static str, id: &str) -> Task {
        Task {
            client: Client::connect(address).expect("the shim listens"),
            service,
            id: id.into(),
        }
    }

    /// Calls a method of the service and waits for the answer.
    pub(crate) fn call<A: Message>(
        &self,
        method: &str,
        request: &impl Message,
    ) -> ttrpc::Result<A> {
        let mut context = context::with_duration(LIMIT);
        context.add("containerd-namespace-ttrpc".into(), NAMESPACE.into());
        let request = Request {
            service: self.service.into(),
            method: method.into(),
            timeout_nano: context.timeout_nano,
            metadata: context::to_pb(context.metadata),
            payload: request.write_to_bytes().expect("it fits into memory"),
            ..Request::default()
        };
        let answer = self.client.request(request)?;
        let answer = A::parse_from_bytes(&answer.payload);
        Ok(answer.expect("the answer is that of the method"))
    }

    /// Starts the first process, or an exec.
    pub(crate) fn start(&self, exec: &str) -> ttrpc::Result<StartResponse> {
        let request = StartRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..StartRequest::default()
        };
        self.call("Start", &request)
    }

    /// Waits for its end.
    pub(crate) fn wait(&self, exec: &str) -> ttrpc::Result<WaitResponse> {
        let request = WaitRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..WaitRequest::default()
        };
        self.call("Wait", &request)
    }

    /// Sends SIGKILL: to it alone, or to all of the container.
    pub(crate) fn kill(&self, exec: &str, all: bool) -> ttrpc::Result<Empty> {
        let request = KillRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            signal: 9,
            all,
            ..KillRequest::default()
        };
        self.call("Kill", &request)
    }

    /// Deletes it.
    pub(crate) fn delete(&self, exec: &str) -> ttrpc::Result<DeleteResponse> {
        let request = DeleteRequest {
            id: self.id.clone(),
            exec_id: exec.into(),
            ..DeleteRequest::default()
        };
        self.call("Delete", &request)
    }

    /// Ends the shim if it has no container. It may be gone before it answers.
    pub(crate) fn shutdown(&self) -> ttrpc::Result<Empty> {
        let request = ShutdownRequest {
            id: self.id.clone(),
            ..ShutdownRequest::default()
        };
        self.call("Shutdown", &request)
    }
}
