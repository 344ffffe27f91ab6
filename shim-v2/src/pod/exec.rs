//! Further processes of a container.
//!
//! Exec only registers; the process is made in the guest at Start, and its streams
//! are opened then.

use std::sync::Arc;

use bulkhead_agent_api::agent::cause::Kind;
use containerd_shim_protos::events::task::{TaskExecAdded, TaskExecStarted};
use serde_json::Value;
use tracing::{info, warn};

use super::{Container, DRAIN, Pod, lock, refused};
use crate::{
    agent::ProcessName,
    error::{Error, Result},
    events::Event,
    io::{Stdio, Streams},
    names::{ContainerId, ExecId},
    process::{Exit, Process},
    spec::{self, Terminal},
    state::{self, Op},
};

/// Exit status of an exec whose program does not exist.
const NOT_FOUND: u8 = 127;
/// Exit status of an exec whose program cannot be run.
const NOT_EXECUTABLE: u8 = 126;

impl Pod {
    /// Registers a process. `process` is an OCI process object.
    pub fn exec(&self, id: &ContainerId, exec: ExecId, process: Value, stdio: Stdio) -> Result<()> {
        let first = ProcessName {
            container: id.clone(),
            exec: None,
        };
        let (container, init) = self.find(&first)?;
        state::init(init.state(), Op::Exec).map_err(|refusal| refused(&init, Op::Exec, refusal))?;
        stdio.check()?;
        let prepared = spec::prepare_process(process, Terminal::from(stdio.terminal))?;
        for note in &prepared.notes {
            info!(container = %id, %exec, "{note}");
        }
        {
            let mut execs = lock(&container.execs);
            if execs.contains_key(&exec) {
                return Err(Error::ExecExists {
                    container: id.clone(),
                    exec,
                });
            }
            let name = ProcessName {
                container: id.clone(),
                exec: Some(exec.clone()),
            };
            let process = Process::new(name, stdio, prepared.console, Some(prepared.guest));
            execs.insert(exec.clone(), Arc::new(process));
        }
        self.events.publish(Event::ExecAdded(TaskExecAdded {
            container_id: id.to_string(),
            exec_id: exec.to_string(),
            ..TaskExecAdded::default()
        }));
        Ok(())
    }

    /// Makes the process in the guest and lets it run.
    pub(super) async fn start_exec(
        self: &Arc<Self>,
        container: &Arc<Container>,
        process: &Arc<Process>,
    ) -> Result<u32> {
        state::exec(container.init.state(), process.state(), Op::Start)
            .map_err(|refusal| refused(process, Op::Start, refusal))?;
        let started = self.make(process).await;
        if let Err(error) = started {
            // Waiters and Delete must not hang on an exec that never ran.
            process.exited(Exit::now(failed_status(&error)));
            process.close_streams();
            return Err(error);
        }
        process.running();
        let pid = self.pid();
        self.events.publish(Event::ExecStarted(TaskExecStarted {
            container_id: container.id.to_string(),
            exec_id: process
                .name
                .exec
                .as_ref()
                .map_or_else(String::new, ToString::to_string),
            pid,
            ..TaskExecStarted::default()
        }));
        self.watch(self.living_vm()?, container, process);
        Ok(pid)
    }

    async fn make(&self, process: &Process) -> Result<()> {
        let vm = self.living_vm()?;
        let (streams, mut stdio) = Streams::open(&process.stdio, vm.dialer()).await?;
        (stdio.columns, stdio.rows) = process.size();
        process.attach(streams);
        let spec = process
            .take_pending()
            .unwrap_or_default()
            .to_string()
            .into_bytes();
        vm.agent().exec(&process.name, spec, stdio).await
    }

    /// Forgets an exec that does not run.
    pub(super) async fn delete_exec(
        &self,
        container: &Container,
        exec: &ExecId,
        process: &Process,
    ) -> Result<(u32, Exit)> {
        let started = process.take_pending().is_none();
        process.exited(Exit::now(0));
        let exit = process.exit().await;
        process.drained(DRAIN).await;
        process.close_streams();
        if started
            && let Ok(vm) = self.living_vm()
            && let Err(error) = vm.agent().delete(&process.name).await
            && error.code() != ttrpc::Code::NOT_FOUND
        {
            warn!(process = %process.name, error = error.text(), "the guest does not forget it");
        }
        lock(&container.execs).remove(exec);
        Ok((self.pid(), exit))
    }
}

fn failed_status(error: &Error) -> u8 {
    match error {
        Error::Agent {
            cause: Kind::PROGRAM_NOT_FOUND,
            ..
        } => NOT_FOUND,
        Error::Agent {
            cause: Kind::PROGRAM_NOT_EXECUTABLE,
            ..
        } => NOT_EXECUTABLE,
        _ => 255,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_of_an_exec_that_never_ran_is_that_of_its_cause() {
        for (cause, text, status) in [
            (Kind::PROGRAM_NOT_FOUND, "permission denied", 127),
            (Kind::PROGRAM_NOT_EXECUTABLE, "exec format error", 126),
            (
                Kind::STEP,
                "Cannot set RLIMIT_NOFILE: permission denied",
                255,
            ),
            (Kind::OUT_OF_MEMORY, "no such file or directory", 255),
            (Kind::OTHER, "", 255),
        ] {
            let error = Error::Agent {
                context: "OCI runtime exec failed",
                code: ttrpc::Code::INVALID_ARGUMENT,
                cause,
                text: text.to_owned(),
            };
            assert_eq!(failed_status(&error), status, "{error}");
        }
    }
}
