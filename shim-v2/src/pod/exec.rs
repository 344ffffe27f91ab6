//! Further processes of a container.
//!
//! Exec only registers; the process is made in the guest at Start, and its streams
//! are opened then.

use std::sync::Arc;

use super::{Container, DRAIN, Pod, making::Making, refused};
use crate::{
    agent::ProcessName,
    error::{Error, Result},
    events::Event,
    guest::Guest,
    io::{Patience, Stdio, Streams},
    lock::lock,
    names::{ContainerId, ExecId},
    process::{Exit, Process},
    spec::{self, Terminal},
    state::{self, Op},
};
use bulkhead_agent_api::agent::{ExecRequest, cause::Kind};
use containerd_shim_protos::events::task::TaskExecAdded;
use serde_json::Value;

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
        self.tell(id, &prepared.fields)?;
        {
            let mut execs = lock(&container.execs);
            if execs.closed {
                return Err(Error::InitNotRunning(id.clone()));
            }
            if execs.all.contains_key(&exec) {
                return Err(Error::ExecExists {
                    container: id.clone(),
                    exec,
                });
            }
            let name = ProcessName {
                container: id.clone(),
                exec: Some(exec.clone()),
            };
            let pending = Some(prepared.guest);
            let process = Process::new(name, stdio, prepared.console, pending, self.herald());
            execs.all.insert(exec.clone(), Arc::new(process));
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
    ) -> Result<()> {
        let start = {
            let execs = lock(&container.execs);
            if execs.closed {
                return Err(Error::InitNotRunning(container.id.clone()));
            }
            process
                .begin(|state| state::exec(container.init.state(), state, Op::Start))
                .map_err(|refusal| refused(process, Op::Start, refusal))?
        };
        let made = match self.living() {
            Ok(guest) => {
                let made = self.make(guest, container, process).await;
                made.map(|made| (guest, made))
            }
            Err(error) => Err(error),
        };
        match made {
            Ok((guest, making)) => {
                if start.confirm() {
                    self.watch(guest, container, process);
                    return Ok(());
                }
                // Its container has ended meanwhile.
                self.undo(making);
                process.close_streams(Patience::SHORT).await;
                Err(Error::InitNotRunning(container.id.clone()))
            }
            Err(error) => {
                start.fail(failed_status(&error));
                process.close_streams(Patience::SHORT).await;
                Err(error)
            }
        }
    }

    async fn make(
        self: &Arc<Self>,
        guest: &Arc<dyn Guest>,
        container: &Container,
        process: &Arc<Process>,
    ) -> Result<Making> {
        let holder = self.hold(guest, &process.name, container.network.as_ref())?;
        self.keep(guest, process, holder);
        let id = process.name.exec_id();
        // What it waits for others is not counted against its limit; each of them lets go
        // at its own, whatever the guest does.
        let _turn = self.turns.acquire().await;
        let opened = Streams::open(&process.stdio, &id, &self.streams, guest.dialer());
        let (streams, mut stdio, room) = opened.await?;
        (stdio.columns, stdio.rows) = process.size();
        process.attach(streams);
        let name = process.name.clone();
        let request = ExecRequest {
            container_id: name.container.to_string(),
            exec_id: name.exec_id(),
            process: process
                .take_pending()
                .unwrap_or_default()
                .to_string()
                .into_bytes(),
            stdio: Some(stdio).into(),
            ..ExecRequest::default()
        };
        let agent = guest.agent().clone();
        let limit = agent.limits().request;
        let mut making = Making::begin(guest, name, async move {
            let answer = agent.exec(&request).await;
            drop(room);
            answer
        });
        match making.answer("Exec", limit).await {
            Ok(()) => Ok(making),
            Err(error) => {
                if matches!(error, Error::Deadline { .. }) {
                    self.doubt.notify_one();
                    self.undo(making);
                }
                Err(error)
            }
        }
    }

    /// Forgets an exec that does not run.
    pub(super) async fn delete_exec(
        &self,
        container: &Container,
        exec: &ExecId,
        process: &Process,
    ) -> Result<(u32, Exit)> {
        let exit = process.retire().map_err(|state| Error::WrongState {
            process: process.name.to_string(),
            state,
            op: Op::Delete,
        })?;
        process.drained(DRAIN).await;
        process.close_streams(Patience::ORDERLY).await;
        if process.take_pending().is_none() {
            self.forget_in_guest(&process.name).await;
        }
        lock(&container.execs).all.remove(exec);
        Ok((process.pid(), exit))
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
