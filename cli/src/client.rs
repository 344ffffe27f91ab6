//! The shim's side of a container: starts the supervisor as containerd would, and
//! calls its Task service.
//!
//! [`Shim`] is a guard: unless it was [closed](Shim::close), dropping it runs the
//! shim's `delete` action, which removes whatever a pod left behind.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::Duration,
};

use containerd_shim_protos::{
    api::{
        CloseIORequest, CreateTaskRequest, DeleteRequest, ExecProcessRequest, KillRequest,
        ResizePtyRequest, ShutdownRequest, StartRequest, StateRequest, StateResponse, WaitRequest,
    },
    shim_async::{Client, TaskClient},
};
use ttrpc::context::{self, Context};

use crate::{
    args::ContainerId,
    error::{Error, Result},
    paths,
};

/// Name of the shim's binary.
pub(crate) const SHIM: &str = "containerd-shim-bulkhead-v2";

/// Limit for calls that start a VM; the shim's own limits are shorter.
const LONG: Duration = Duration::from_secs(660);
/// Limit for all other calls but Wait, which has none.
const SHORT: Duration = Duration::from_secs(60);

/// Finds a binary of ours: beside the running one first, then in PATH.
pub(crate) fn find_binary(name: &'static str) -> Result<PathBuf> {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.to_owned()));
    let path = std::env::var_os("PATH").unwrap_or_default();
    beside
        .into_iter()
        .chain(std::env::split_paths(&path).filter(|dir| dir.is_absolute()))
        .map(|dir| dir.join(name))
        .find(|candidate| {
            rustix::fs::access(candidate, rustix::fs::Access::EXEC_OK).is_ok()
                && candidate.is_file()
        })
        .ok_or(Error::NoBinary(name))
}

/// The size of a terminal in cells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Size {
    /// Columns.
    pub(crate) width: u16,
    /// Rows.
    pub(crate) height: u16,
}

/// One process: the first of the container, or an exec.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    /// The container.
    pub(crate) id: ContainerId,
    /// The exec, empty for the first process.
    pub(crate) exec_id: String,
}

/// Calls of the Task service.
#[derive(Clone)]
pub(crate) struct Task {
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
    pub(crate) async fn connect(id: &ContainerId, address: &str) -> Result<Self> {
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
    pub(crate) async fn create(&self, request: &CreateTaskRequest) -> Result<()> {
        let answer = self.client.create(limit(LONG), request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Before))
    }

    /// Registers one more process; `spec` is its OCI `process` object.
    pub(crate) async fn exec(
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
    pub(crate) async fn start(&self, process: &Process) -> Result<()> {
        let mut request = StartRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.start(limit(LONG), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Before))
    }

    /// Waits for the end of a process; answers its exit code.
    pub(crate) async fn wait(&self, process: &Process) -> Result<u32> {
        let mut request = WaitRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.wait(Context::default(), &request).await;
        answer
            .map(|answer| answer.exit_status)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Sends a signal to a process.
    pub(crate) async fn kill(&self, process: &Process, signal: u32) -> Result<()> {
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
    pub(crate) async fn resize(&self, process: &Process, size: Size) -> Result<()> {
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
    pub(crate) async fn close_stdin(&self, process: &Process) -> Result<()> {
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
    pub(crate) async fn state(&self) -> Result<StateResponse> {
        let mut request = StateRequest::new();
        request.id = self.id.to_string();
        let answer = self.client.state(limit(SHORT), &request).await;
        answer.map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Forgets a process that has ended.
    pub(crate) async fn delete(&self, process: &Process) -> Result<()> {
        let mut request = DeleteRequest::new();
        request.id = process.id.to_string();
        request.exec_id.clone_from(&process.exec_id);
        let answer = self.client.delete(limit(SHORT), &request).await;
        answer
            .map(drop)
            .map_err(|error| failed(&self.id, &error, Phase::Running))
    }

    /// Ends the shim. It may be gone before it answers, so there is no answer.
    async fn shutdown(&self) {
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
pub(crate) fn reason(id: &ContainerId) -> Option<String> {
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

/// A running shim, ended with all it holds when this is dropped.
#[derive(Debug)]
pub(crate) struct Shim {
    binary: PathBuf,
    id: ContainerId,
    bundle: PathBuf,
    address: String,
    armed: bool,
}

impl Shim {
    /// Starts the supervisor of `bundle`.
    pub(crate) fn start(id: &ContainerId, bundle: &Path) -> Result<Self> {
        let binary = find_binary(SHIM)?;
        // From here on there may be something to delete, whatever `start` says.
        let mut shim = Shim {
            binary,
            id: id.clone(),
            bundle: bundle.to_owned(),
            address: String::new(),
            armed: true,
        };
        let output = shim.call("start")?;
        if !output.status.success() {
            let text = String::from_utf8_lossy(&output.stderr);
            let text = text.trim();
            let text = if text.is_empty() {
                output.status.to_string()
            } else {
                text.to_owned()
            };
            return Err(Error::ShimStart(text));
        }
        let answer = String::from_utf8_lossy(&output.stdout);
        shim.address = parse_address(answer.trim()).ok_or_else(|| {
            Error::ShimStart(format!(
                "it answered {:?}, which is no address",
                answer.trim()
            ))
        })?;
        Ok(shim)
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Ends the shim after the container was deleted.
    pub(crate) async fn close(mut self, task: &Task) {
        task.shutdown().await;
        self.armed = false;
    }

    fn call(&self, action: &str) -> Result<Output> {
        let mut command = Command::new(&self.binary);
        command.args([
            "-namespace",
            paths::NAMESPACE,
            "-address",
            "",
            "-publish-binary",
            "",
            "-id",
        ]);
        command.arg(self.id.as_str());
        if action == "delete" {
            command.arg("-bundle").arg(&self.bundle);
        }
        command.arg(action).current_dir(&self.bundle).env_clear();
        command.env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        );
        // Its own group, so that a key of our terminal does not reach it.
        command.stdin(Stdio::null()).process_group(0);
        command.output().map_err(|source| Error::Path {
            action: "run",
            path: self.binary.clone(),
            source,
        })
    }
}

impl Drop for Shim {
    fn drop(&mut self) {
        if self.armed {
            // The caller already reports why; what is left after this cannot be
            // helped from here.
            let _ = self.call("delete");
        }
    }
}

/// Removes what a dead shim left behind.
pub(crate) fn clean_up(id: &ContainerId, bundle: &Path) -> Result<()> {
    let binary = find_binary(SHIM)?;
    drop(Shim {
        binary,
        id: id.clone(),
        bundle: bundle.to_owned(),
        address: String::new(),
        armed: true,
    });
    Ok(())
}

/// The address in an answer of `start`: plain text or JSON.
fn parse_address(answer: &str) -> Option<String> {
    if answer.starts_with('{') {
        let value: serde_json::Value = serde_json::from_str(answer).ok()?;
        return value.get("address")?.as_str().and_then(parse_address);
    }
    let path = answer.strip_prefix("unix://").unwrap_or(answer);
    (path.starts_with('/') && !path.contains('\n')).then(|| format!("unix://{path}"))
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

    #[test]
    fn every_form_of_an_address_is_understood() {
        for answer in [
            "unix:///run/s",
            "/run/s",
            r#"{"version":3,"address":"unix:///run/s","protocol":"ttrpc"}"#,
        ] {
            assert_eq!(
                parse_address(answer).as_deref(),
                Some("unix:///run/s"),
                "{answer}"
            );
        }
        for answer in ["", "oops", "{}", "/a\n/b"] {
            assert_eq!(parse_address(answer), None, "{answer}");
        }
    }
}
