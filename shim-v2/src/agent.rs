//! The agent in the guest, seen from the host: the only place where the shim
//! parses what a guest says.
//!
//! Every call has a deadline that counts time, not progress; for those that make
//! something in the guest it is the caller's, who must know of a late answer too.
//! Frames are bounded
//! before they are buffered. Texts are escaped and cut, numbers clamped, status
//! codes taken from a short list; no id of the guest is ever used.

mod copy;
mod resources;
pub mod stats;
mod wire;

pub use self::copy::Copying;

use std::{future::Future, time::Duration};

use bulkhead_agent_api::{
    GREETING,
    agent::{
        AcceptRequest, ClockRequest, ContainerRequest, CreateRequest, Empty, ExecRequest,
        KillRequest, ProcessRequest, ResizePtyRequest, WaitOomRequest,
    },
    agent_ttrpc::AgentClient,
    cause,
};
use containerd_shim_protos::cgroups_v2::metrics::Metrics;
use serde::{Deserialize, Serialize};
use tokio::{net::UnixStream, time::timeout};
use ttrpc::{
    Code,
    r#async::{Client, transport::Socket},
};

use self::wire::Wire;
use crate::{
    carry::Bag,
    error::{Error, Result, host},
    io::read_line,
    names::{ContainerId, ExecId},
};

/// Longest text that is taken from the guest, in bytes.
const MAX_TEXT: usize = 1024;
/// Limit for a SIGKILL, after which the VM can be killed instead.
const KILL: Duration = Duration::from_secs(1);
/// Limit for forgetting a process that has ended.
const DELETE: Duration = Duration::from_secs(3);
/// Limit for a sign of life.
const PING: Duration = Duration::from_secs(3);
/// Limit for an orderly end.
const SHUTDOWN: Duration = Duration::from_secs(2);

/// A process: the first one of a container, or an exec.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessName {
    /// The container.
    pub container: ContainerId,
    /// The exec; `None`: the first process.
    pub exec: Option<ExecId>,
}

impl ProcessName {
    /// The exec as the protocol names it: empty for the first process.
    #[must_use]
    pub fn exec_id(&self) -> String {
        self.exec
            .as_ref()
            .map_or_else(String::new, ToString::to_string)
    }

    fn request(&self) -> ProcessRequest {
        ProcessRequest {
            container_id: self.container.to_string(),
            exec_id: self.exec_id(),
            ..ProcessRequest::default()
        }
    }
}

impl std::fmt::Display for ProcessName {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.exec {
            Some(exec) => write!(f, "{exec:?} of {:?}", self.container),
            None => write!(f, "{:?}", self.container),
        }
    }
}

/// How a process of the guest ended, as the agent says.
#[derive(Clone, Debug, PartialEq)]
pub struct Ended {
    /// 0 to 255.
    pub status: u8,
    /// How often the OOM killer has struck in its container so far.
    pub oom_kills: u64,
    /// Another process still holds its output.
    pub output_open: bool,
    /// Of a first process: what its container has used.
    pub stats: Option<Box<Metrics>>,
}

/// A connection to the agent.
#[derive(Clone)]
pub struct Agent {
    client: AgentClient,
    wire: Wire,
    limits: Limits,
}

/// What goes along of it when the program changes.
#[derive(Debug, Serialize, Deserialize)]
pub struct Carried {
    wire: wire::Carried,
    limits: Limits,
}

/// Time for the agent's answers.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// To Create, which mounts and may meet a guest that is still waking up.
    pub create: Duration,
    /// To everything else but SIGKILL and Shutdown, which have limits of their own.
    pub request: Duration,
}

impl std::fmt::Debug for Agent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Agent")
            .field("limits", &self.limits)
            .finish_non_exhaustive()
    }
}

impl Agent {
    /// Reads the greeting on a connection that the guest opened. The caller
    /// limits the time.
    pub async fn greet(mut stream: UnixStream, limits: Limits) -> Result<Self> {
        let line = read_line(&mut stream, 64).await.map_err(|error| {
            Error::Boot(format!("the agent's greeting cannot be read: {error}"))
        })?;
        if line != GREETING.trim_end().as_bytes() {
            return Err(Error::Boot(format!(
                "the guest greets with {:?}, this shim needs {:?}: kernel, root image and shim must be of one version",
                escape(&String::from_utf8_lossy(&line)),
                GREETING.trim_end()
            )));
        }
        Ok(Agent::over(Wire::new(stream), limits))
    }

    fn over(wire: Wire, limits: Limits) -> Self {
        let client = Client::new(Socket::new(wire.clone()));
        Agent {
            client: AgentClient::new(client),
            wire,
            limits,
        }
    }

    /// Goes on with the connection of the program before this one.
    pub(crate) fn unpack(carried: Carried) -> Result<Self> {
        let wire = Wire::unpack(carried.wire).map_err(host("take over the agent's connection"))?;
        Ok(Agent::over(wire, carried.limits))
    }

    /// Is a message under way? Then it cannot be [carried](Agent::carry).
    pub(crate) fn is_busy(&self) -> bool {
        self.wire.is_busy()
    }

    /// How many answers have come.
    pub(crate) fn heard(&self) -> u64 {
        self.wire.heard()
    }

    /// What goes along when the program changes.
    pub(crate) fn carry(&self, bag: &mut Bag) -> std::io::Result<Carried> {
        Ok(Carried {
            wire: self.wire.carry(bag)?,
            limits: self.limits,
        })
    }

    /// The limits of calls.
    #[must_use]
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Creates a container and its first process. The caller limits the time.
    pub async fn create(&self, request: &CreateRequest) -> Result<()> {
        let call = self.client.create(ttrpc::context::with_timeout(0), request);
        call.await
            .map_err(|error| refusal("OCI runtime create failed", error))?;
        Ok(())
    }

    /// Lets the first process of a container run; what runs before it may take some
    /// time of its own.
    pub async fn start(&self, container: &ContainerId, before: Duration) -> Result<()> {
        let request = ContainerRequest {
            container_id: container.to_string(),
            ..ContainerRequest::default()
        };
        let call = self.client.start(ttrpc::context::with_timeout(0), &request);
        answer(
            "Start",
            self.limits.request.saturating_add(before),
            "OCI runtime start failed",
            call,
        )
        .await?;
        Ok(())
    }

    /// Creates and starts a further process. The caller limits the time.
    pub async fn exec(&self, request: &ExecRequest) -> Result<()> {
        let call = self.client.exec(ttrpc::context::with_timeout(0), request);
        call.await
            .map_err(|error| refusal("OCI runtime exec failed", error))?;
        Ok(())
    }

    /// Waits for the end of a process, however long that takes.
    pub async fn wait(&self, name: &ProcessName) -> Result<Ended> {
        let request = name.request();
        let call = self.client.wait(ttrpc::context::with_timeout(0), &request);
        let response = call.await.map_err(|error| refusal("Wait failed", error))?;
        Ok(Ended {
            status: u8::try_from(response.exit_status).unwrap_or(255),
            oom_kills: response.oom_kills,
            output_open: response.output_open,
            stats: response
                .stats
                .into_option()
                .map(|said| Box::new(stats::of(&said))),
        })
    }

    /// Waits until the OOM killer has struck in a container more often than
    /// `seen` times, however long that takes; answers how often.
    pub async fn wait_oom(&self, container: &ContainerId, seen: u64) -> Result<u64> {
        let request = WaitOomRequest {
            container_id: container.to_string(),
            seen,
            ..WaitOomRequest::default()
        };
        let call = self
            .client
            .wait_oom(ttrpc::context::with_timeout(0), &request);
        let response = call
            .await
            .map_err(|error| refusal("WaitOom failed", error))?;
        Ok(response.oom_kills)
    }

    /// Waits until a process of a container has connected to one of its sockets, however
    /// long that takes; answers the number of the socket, which may be any. The guest
    /// expects the stream with this id for it.
    pub async fn accept(&self, container: &ContainerId, stream: u64) -> Result<u32> {
        let request = AcceptRequest {
            container_id: container.to_string(),
            stream,
            ..AcceptRequest::default()
        };
        let call = self
            .client
            .accept(ttrpc::context::with_timeout(0), &request);
        let response = call
            .await
            .map_err(|error| refusal("Accept failed", error))?;
        Ok(response.socket)
    }

    /// Asks for a sign of life.
    pub async fn ping(&self) -> Result<()> {
        let request = Empty::default();
        let call = self.client.ping(ttrpc::context::with_timeout(0), &request);
        answer("Ping", PING, "Ping failed", call).await?;
        Ok(())
    }

    /// Sends a signal.
    pub async fn kill(&self, name: &ProcessName, signal: u32, all: bool) -> Result<()> {
        let request = KillRequest {
            container_id: name.container.to_string(),
            exec_id: name.exec_id(),
            signal,
            all,
            ..KillRequest::default()
        };
        let limit = if signal == libc::SIGKILL.unsigned_abs() {
            KILL
        } else {
            self.limits.request
        };
        let call = self.client.kill(ttrpc::context::with_timeout(0), &request);
        answer("Kill", limit, "Kill failed", call).await?;
        Ok(())
    }

    /// Forgets an ended process; of the first one: removes the container.
    pub async fn delete(&self, name: &ProcessName) -> Result<()> {
        let request = name.request();
        let call = self
            .client
            .delete(ttrpc::context::with_timeout(0), &request);
        answer("Delete", DELETE, "Delete failed", call).await?;
        Ok(())
    }

    /// Sets the size of a process's terminal.
    pub async fn resize(&self, name: &ProcessName, columns: u32, rows: u32) -> Result<()> {
        let request = ResizePtyRequest {
            container_id: name.container.to_string(),
            exec_id: name.exec_id(),
            columns,
            rows,
            ..ResizePtyRequest::default()
        };
        let call = self
            .client
            .resize_pty(ttrpc::context::with_timeout(0), &request);
        answer("ResizePty", self.limits.request, "ResizePty failed", call).await?;
        Ok(())
    }

    /// What the wall clock of the guest shows, in nanoseconds since the epoch, after
    /// it was moved by so many nanoseconds: any number, as the guest chooses.
    pub async fn clock(&self, move_ns: i64) -> Result<u64> {
        let request = ClockRequest {
            move_ns,
            ..ClockRequest::default()
        };
        let call = self.client.clock(ttrpc::context::with_timeout(0), &request);
        let response = answer("Clock", self.limits.request, "Clock failed", call).await?;
        Ok(response.now_ns)
    }

    /// Asks the guest to power off.
    pub async fn shutdown(&self) -> Result<()> {
        let request = Empty::default();
        let call = self
            .client
            .shutdown(ttrpc::context::with_timeout(0), &request);
        answer("Shutdown", SHUTDOWN, "Shutdown failed", call).await?;
        Ok(())
    }
}

async fn answer<T>(
    name: &'static str,
    limit: Duration,
    context: &'static str,
    call: impl Future<Output = ttrpc::Result<T>>,
) -> Result<T> {
    match timeout(limit, call).await {
        Ok(answer) => answer.map_err(|error| refusal(context, error)),
        Err(_) => Err(Error::Deadline {
            call: name,
            limit_ms: limit.as_millis(),
        }),
    }
}

fn refusal(context: &'static str, error: ttrpc::Error) -> Error {
    match error {
        ttrpc::Error::RpcStatus(status) => {
            let code = match status.code() {
                code @ (Code::NOT_FOUND
                | Code::ALREADY_EXISTS
                | Code::INVALID_ARGUMENT
                | Code::FAILED_PRECONDITION
                | Code::RESOURCE_EXHAUSTED
                | Code::UNIMPLEMENTED
                | Code::DEADLINE_EXCEEDED) => code,
                _ => Code::INTERNAL,
            };
            Error::Agent {
                context,
                code,
                cause: cause::of(&status).kind.enum_value_or_default(),
                text: escape(&status.message),
            }
        }
        error => Error::VmGone(format!(
            "the agent's connection broke ({})",
            escape(&error.to_string())
        )),
    }
}

/// Makes a text of the guest harmless: one line, no control characters, cut.
#[must_use]
pub fn escape(text: &str) -> String {
    let mut safe = String::new();
    for c in text.chars() {
        if safe.len() >= MAX_TEXT {
            safe.push('…');
            break;
        }
        // Beside control characters also those that reorder or hide text.
        let hidden = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{feff}');
        if c.is_control() || hidden {
            safe.extend(c.escape_default());
        } else {
            safe.push(c);
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: Limits = Limits {
        create: KILL,
        request: KILL,
    };

    #[test]
    fn texts_of_the_guest_are_escaped_and_cut_b74() {
        assert_eq!(escape("exec: \"x\": not found"), "exec: \"x\": not found");
        assert_eq!(escape("a\x1b[31mb\n"), "a\\u{1b}[31mb\\n");
        assert_eq!(escape("a\u{202e}b"), "a\\u{202e}b");
        assert!(escape(&"x".repeat(1 << 20)).len() <= MAX_TEXT + 3);
    }

    #[test]
    fn codes_of_the_guest_come_from_a_short_list_b72() {
        let refuse =
            |code| refusal("x", ttrpc::Error::RpcStatus(ttrpc::get_status(code, "t"))).code();
        assert_eq!(refuse(Code::NOT_FOUND), Code::NOT_FOUND);
        assert_eq!(refuse(Code::OK), Code::INTERNAL);
        assert_eq!(refuse(Code::UNAUTHENTICATED), Code::INTERNAL);
        assert_eq!(
            refusal("x", ttrpc::Error::RemoteClosed).code(),
            Code::UNAVAILABLE
        );
    }

    #[tokio::test]
    async fn another_version_is_refused_at_the_greeting_f61() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut guest, b"bulkhead-agent 9.9.9\n")
            .await
            .unwrap();
        let text = Agent::greet(host, LIMITS).await.unwrap_err().to_string();
        assert!(
            text.contains("9.9.9") && text.contains(env!("CARGO_PKG_VERSION")),
            "{text}"
        );
    }

    #[tokio::test]
    async fn a_greeting_without_end_is_refused_b75() {
        let (mut guest, host) = UnixStream::pair().unwrap();
        tokio::io::AsyncWriteExt::write_all(&mut guest, &[b'x'; 4096])
            .await
            .unwrap();
        assert!(Agent::greet(host, LIMITS).await.is_err());
    }

    #[tokio::test]
    async fn a_silent_agent_meets_the_deadline_f35() {
        let (_guest, host) = UnixStream::pair().unwrap();
        let limits = Limits {
            create: Duration::from_millis(50),
            request: Duration::from_millis(50),
        };
        let agent = Agent::over(Wire::new(host), limits);
        let name = ProcessName {
            container: ContainerId::new("c").unwrap(),
            exec: None,
        };
        let error = agent.kill(&name, 9, false).await.unwrap_err();
        assert!(
            matches!(error, Error::Deadline { limit_ms: 1000, .. }),
            "{error}"
        );
        let error = agent.kill(&name, 15, false).await.unwrap_err();
        assert!(
            matches!(error, Error::Deadline { limit_ms: 50, .. }),
            "{error}"
        );
    }

    #[tokio::test]
    async fn a_lost_connection_is_reported_at_once_f34() {
        let (guest, host) = UnixStream::pair().unwrap();
        let limits = Limits {
            create: Duration::from_secs(10),
            request: Duration::from_secs(10),
        };
        let agent = Agent::over(Wire::new(host), limits);
        drop(guest);
        let name = ProcessName {
            container: ContainerId::new("c").unwrap(),
            exec: None,
        };
        assert!(matches!(agent.wait(&name).await, Err(Error::VmGone(_))));
    }
}
