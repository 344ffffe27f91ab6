//! Calls of the shim's Task service.

use std::{fs, time::Duration};

use containerd_shim_protos::{
    api::{
        CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
        PauseRequest, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StateRequest,
        StateResponse, StatsRequest, UpdateTaskRequest, WaitRequest,
    },
    protobuf::well_known_types::any::Any,
    shim_async::{Client, TaskClient},
};
use ttrpc::context::{self, Context};

use crate::{
    error::{Error, Result},
    id::ContainerId,
    paths,
};

/// Limit for calls that start a VM; the shim's own limits are shorter.
const LONG: Duration = Duration::from_secs(660);
/// Limit for all other calls but Wait, which has none.
const SHORT: Duration = Duration::from_secs(60);

/// The size of a terminal in cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Size {
    /// Columns.
    pub width: u16,
    /// Rows.
    pub height: u16,
}

/// One process: the first of the container, or an exec.
#[derive(Clone, Debug)]
pub struct Process {
    /// The container.
    pub id: ContainerId,
    /// The exec, empty for the first process.
    pub exec_id: String,
}

/// Calls of the Task service.
#[derive(Clone)]
pub struct Task {
    client: TaskClient,
    id: ContainerId,
}

impl std::fmt::Debug for Task {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Task")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Task {
    /// Connects to the shim at `address`.
    pub async fn connect(id: &ContainerId, address: &str) -> Result<Self> {
        let address = if address.contains("://") {
            address.to_owned()
        } else {
            format!("unix://{address}")
        };
        match Client::connect(&address).await {
            Ok(client) => Ok(Task {
                client: TaskClient::new(client),
                id: id.clone(),
            }),
            Err(error) => Err(failed(id, &error, Phase::Before)),
        }
    }

    /// Makes the container.
    pub async fn create(&self, request: &CreateTaskRequest) -> Result<()> {
        let answer = self.client.create(limit(LONG), request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Before))
    }

    /// Registers one more process; `spec` is its OCI `process` object.
    pub async fn exec(
        &self,
        mut request: ExecProcessRequest,
        spec: &serde_json::Value,
    ) -> Result<()> {
        let mut any = protobuf::well_known_types::any::Any::new();
        any.type_url = "types.containerd.io/opencontainers/runtime-spec/1/Process".to_owned();
        any.value = spec.to_string().into_bytes();
        request.spec = Some(any).into();
        let answer = self.client.exec(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Before))
    }

    /// Runs a process that was made.
    pub async fn start(&self, process: &Process) -> Result<()> {
        let mut request = StartRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.start(limit(LONG), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Before))
    }

    /// Waits for the end of a process; answers its exit code.
    pub async fn wait(&self, process: &Process) -> Result<u32> {
        let mut request = WaitRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.wait(Context::default(), &request).await;
        answer
            .map(|answer| answer.exit_status)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Sends a signal to a process.
    pub async fn kill(&self, process: &Process, signal: u32) -> Result<()> {
        let mut request = KillRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        request.signal = signal;
        let answer = self.client.kill(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Tells the size of the terminal.
    pub async fn resize(&self, process: &Process, size: Size) -> Result<()> {
        let mut request = ResizePtyRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        request.width = size.width.into();
        request.height = size.height.into();
        let answer = self.client.resize_pty(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Says that no more input comes.
    pub async fn close_stdin(&self, process: &Process) -> Result<()> {
        let mut request = CloseIORequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        request.stdin = true;
        let answer = self.client.close_io(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// What the first process does.
    pub async fn state(&self) -> Result<StateResponse> {
        let mut request = StateRequest::new();
        request.id = self.id.to_string();
        let answer = self.client.state(limit(SHORT), &request).await;
        answer.map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Forgets a process that has ended.
    pub async fn delete(&self, process: &Process) -> Result<()> {
        let mut request = DeleteRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.delete(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Stops every process of the container where it is.
    pub async fn pause(&self) -> Result<()> {
        let mut request = PauseRequest::new();
        request.id = self.id.to_string();
        let answer = self.client.pause(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Lets them go on.
    pub async fn resume(&self) -> Result<()> {
        let mut request = ResumeRequest::new();
        request.id = self.id.to_string();
        let answer = self.client.resume(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Changes limits; `resources` is the OCI object.
    pub async fn update(&self, resources: &serde_json::Value) -> Result<()> {
        let mut any = Any::new();
        any.type_url =
            "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".to_owned();
        any.value = resources.to_string().into_bytes();
        let mut request = UpdateTaskRequest::new();
        request.id = self.id.to_string();
        request.resources = Some(any).into();
        let answer = self.client.update(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// What the container has used: metrics of this host's version of cgroups.
    pub async fn stats(&self) -> Result<Any> {
        let mut request = StatsRequest::new();
        request.id = self.id.to_string();
        let answer = self.client.stats(limit(SHORT), &request).await;
        answer
            .map(|answer| answer.stats.into_option().unwrap_or_default())
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Ends the shim. It may be gone before it answers, so there is no answer.
    pub(crate) async fn shutdown(&self) {
        let mut request = ShutdownRequest::new();
        request.id = self.id.to_string();
        let _ = self.client.shutdown(limit(SHORT), &request).await;
    }
}

fn limit(limit: Duration) -> Context {
    context::with_duration(limit)
}

/// When a call failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The program did not run yet.
    Before,
    /// It may have run.
    Running,
}

fn failed(id: &ContainerId, error: &ttrpc::Error, phase: Phase) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) if status.code() != ttrpc::Code::UNAVAILABLE => {
            let text = status.message().to_owned();
            match program_code(&text) {
                Some(code) => Error::Program { code, text },
                None => Error::Call(text),
            }
        }
        error => {
            let why = || match error {
                ttrpc::Error::RpcStatus(status) => status.message().to_owned(),
                error => format!("its supervisor is gone ({error})"),
            };
            let reason = reason(id).unwrap_or_else(why);
            Error::Gone {
                reason,
                started: phase == Phase::Running,
            }
        }
    }
}

/// Why the pod ended, if the shim could still say so.
pub fn reason(id: &ContainerId) -> Option<String> {
    let text = fs::read_to_string(paths::reason(id)).ok()?;
    let text: String = text
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(1000)
        .collect();
    (!text.is_empty()).then_some(text)
}

/// The shell's code for a program that cannot be run, from runc's phrases, which
/// every caller of a runtime goes by.
fn program_code(text: &str) -> Option<u8> {
    let (_, rest) = text.split_once("exec: \"")?;
    let has = |phrase: &str| rest.contains(phrase);
    if has("executable file not found in $PATH") || has("no such file or directory") {
        Some(127)
    } else if has("permission denied") || has("exec format error") || has("is a directory") {
        Some(126)
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runcs_phrases_give_the_shells_codes() {
        for (text, code) in [
            (
                "OCI runtime: exec: \"nope\": executable file not found in $PATH",
                Some(127),
            ),
            ("exec: \"/nope\": no such file or directory", Some(127)),
            ("exec: \"/etc/passwd\": permission denied", Some(126)),
            ("Cannot open /dev/kvm: permission denied", None),
            ("no such file or directory", None),
        ] {
            assert_eq!(program_code(text), code, "{text}");
        }
    }
}
