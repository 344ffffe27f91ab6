//! The agent as a script: it does what it is told, unless a test holds a call back.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{Arc, Mutex},
    time::Duration,
};

use async_trait::async_trait;
use bulkhead_agent::streams::{BoxStream, Streams};
use bulkhead_agent_api::{
    agent::{
        AcceptRequest, AcceptResponse, CancelCopyRequest, Cause, ContainerRequest, CopyInRequest,
        CopyOutRequest, CreateRequest, Empty, ExecRequest, KillRequest, NetworkRequest,
        ProcessRequest, ProcessResponse, StatsResponse, Stdio, UpdateRequest, UpdateResponse,
        WaitOomRequest, WaitOomResponse, WaitResponse, cause::Kind,
    },
    agent_ttrpc::Agent,
    cause, relay,
};
use tokio::{
    io::{AsyncWriteExt, DuplexStream, duplex},
    sync::watch,
    time::timeout,
};
use ttrpc::{Code, r#async::TtrpcContext};

use super::copies::Copied;
use crate::lock::lock;

/// No test waits so long, on its own clock, for what will come.
pub(crate) const DEADLINE: Duration = Duration::from_secs(120);

/// A process as the agent has it.
#[derive(Debug, Default)]
struct Model {
    exit: Option<u32>,
    /// Kept open until the process ends.
    streams: Mutex<Vec<BoxStream>>,
}

#[derive(Debug, Default)]
struct Guts {
    calls: Vec<String>,
    held: BTreeSet<&'static str>,
    refused: BTreeMap<&'static str, (Code, Kind)>,
    processes: BTreeMap<(String, String), Model>,
    ooms: BTreeMap<String, u64>,
    /// Connections that the host has not asked for yet: container, socket, its end.
    connections: Mutex<VecDeque<(String, u32, DuplexStream)>>,
    /// Microseconds of processor time that any container has used.
    used: u64,
    /// Somebody else holds the output of what ends.
    shared_output: bool,
    off: bool,
    copied: Copied,
}

/// The agent.
#[derive(Clone, Debug)]
pub(crate) struct Script {
    guts: watch::Sender<Guts>,
    /// Where connections for streams meet their processes.
    pub(crate) streams: Arc<Streams>,
}

fn refusal(code: Code) -> ttrpc::Error {
    refused(code, Kind::OTHER)
}

fn refused(code: Code, kind: Kind) -> ttrpc::Error {
    let mut status = ttrpc::get_status(code, "refused".to_owned());
    let cause = Cause {
        kind: kind.into(),
        ..Cause::default()
    };
    cause::add(&mut status, &cause);
    ttrpc::Error::RpcStatus(status)
}

impl Script {
    pub(crate) fn new() -> Self {
        Script {
            guts: watch::Sender::default(),
            streams: Streams::new(),
        }
    }

    /// Calls of this name wait from now on.
    pub(crate) fn hold(&self, call: &'static str) {
        self.guts.send_modify(|guts| {
            guts.held.insert(call);
        });
    }

    /// They go on.
    pub(crate) fn release(&self, call: &'static str) {
        self.guts.send_modify(|guts| {
            guts.held.remove(call);
        });
    }

    /// Calls of this name fail from now on.
    pub(crate) fn refuse(&self, call: &'static str, code: Code, kind: Kind) {
        self.guts.send_modify(|guts| {
            guts.refused.insert(call, (code, kind));
        });
    }

    pub(crate) fn calls(&self) -> Vec<String> {
        self.guts.borrow().calls.clone()
    }

    /// The last call but for heartbeats, which come by themselves.
    pub(crate) fn last_call(&self) -> String {
        let calls = self.calls();
        let last = calls.into_iter().rfind(|call| call.trim() != "Ping");
        last.unwrap_or_default()
    }

    /// Waits until this call has come.
    pub(crate) async fn called(&self, call: &str) {
        self.until(|guts| guts.calls.iter().any(|seen| seen == call))
            .await;
    }

    /// Are there no containers in the guest?
    pub(crate) async fn emptied(&self) {
        self.until(|guts| guts.processes.is_empty()).await;
    }

    pub(crate) fn has(&self, container: &str, exec: &str) -> bool {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.borrow().processes.contains_key(&key)
    }

    /// A process ends by itself.
    pub(crate) fn exits(&self, container: &str, exec: &str, status: u32) {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            let process = guts.processes.get_mut(&key).expect("it is there");
            process.exit.get_or_insert(status);
            lock(&process.streams).clear();
        });
    }

    /// A process ends whose output somebody else holds.
    pub(crate) fn keeps_output(&self, container: &str, exec: &str, status: u32) {
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            guts.shared_output = true;
            let process = guts.processes.get_mut(&key).expect("it is there");
            process.exit.get_or_insert(status);
        });
    }

    /// A process connects to a socket; its end of the connection.
    pub(crate) fn connects(&self, container: &str, socket: u32) -> DuplexStream {
        let (process, agent) = duplex(4096);
        self.guts.send_modify(|guts| {
            lock(&guts.connections).push_back((container.to_owned(), socket, agent));
        });
        process
    }

    /// How many connections the host has not asked for.
    pub(crate) fn waiting(&self) -> usize {
        lock(&self.guts.borrow().connections).len()
    }

    /// The OOM killer strikes.
    pub(crate) fn oom(&self, container: &str) {
        self.guts.send_modify(|guts| {
            *guts.ooms.entry(container.to_owned()).or_default() += 1;
        });
    }

    /// Containers have used so much processor time.
    pub(crate) fn uses(&self, microseconds: u64) {
        self.guts.send_modify(|guts| guts.used = microseconds);
    }

    fn stats_of(&self, container: &str) -> StatsResponse {
        let guts = self.guts.borrow();
        let kills = guts.ooms.get(container).copied().unwrap_or(0);
        StatsResponse {
            cpu: [("usage_usec".to_owned(), guts.used)].into(),
            memory_events: [("oom_kill".to_owned(), kills)].into(),
            ..StatsResponse::default()
        }
    }

    /// Waits until it was asked to power off.
    pub(crate) async fn powered_off(&self) {
        let mut guts = self.guts.subscribe();
        let _ = guts.wait_for(|guts| guts.off).await.map(drop);
    }

    async fn until_ever(&self, seen: impl FnMut(&Guts) -> bool) {
        let mut guts = self.guts.subscribe();
        let _ = guts.wait_for(seen).await.map(drop);
    }

    /// Looks at the copies, or changes what they do.
    pub(crate) fn copied<T>(&self, look: impl FnOnce(&mut Copied) -> T) -> T {
        let mut seen = None;
        self.guts
            .send_modify(|guts| seen = Some(look(&mut guts.copied)));
        seen.unwrap()
    }

    pub(super) async fn until_copied(&self, mut seen: impl FnMut(&Copied) -> bool) {
        let mut guts = self.guts.subscribe();
        let _ = guts.wait_for(|guts| seen(&guts.copied)).await.map(drop);
    }

    async fn until(&self, seen: impl FnMut(&Guts) -> bool) {
        let mut guts = self.guts.subscribe();
        let waited = timeout(DEADLINE, guts.wait_for(seen)).await;
        assert!(waited.is_ok(), "it did not come; calls: {:?}", self.calls());
    }

    pub(super) async fn enter(&self, call: &'static str, rest: String) -> ttrpc::Result<()> {
        self.guts.send_modify(|guts| {
            guts.calls.push(format!("{call}{rest}"));
        });
        let mut guts = self.guts.subscribe();
        let guts = guts.wait_for(|guts| !guts.held.contains(call)).await;
        match guts.map(|guts| guts.refused.get(call).copied()) {
            Ok(Some((code, kind))) => Err(refused(code, kind)),
            _ => Ok(()),
        }
    }

    async fn make(&self, container: &str, exec: &str, stdio: &Stdio) -> ttrpc::Result<()> {
        let mut streams = Vec::new();
        for id in [stdio.stdout, stdio.stdin, stdio.stderr] {
            if id != 0 {
                streams.push(self.streams.claim(id)?.stream().await?);
            }
        }
        if let Some(stdout) = streams.first_mut() {
            let text = format!("output of {container} {exec}");
            stdout.write_all(text.as_bytes()).await.unwrap();
        }
        let key = (container.to_owned(), exec.to_owned());
        self.guts.send_modify(|guts| {
            let process = Model {
                exit: None,
                streams: streams.into(),
            };
            assert!(guts.processes.insert(key, process).is_none(), "made twice");
        });
        Ok(())
    }
}

fn label(container: &str, exec: &str) -> String {
    if exec.is_empty() {
        format!(" {container}")
    } else {
        format!(" {container}/{exec}")
    }
}

#[async_trait]
impl Agent for Script {
    async fn create(&self, _: &TtrpcContext, r: CreateRequest) -> ttrpc::Result<ProcessResponse> {
        self.enter("Create", label(&r.container_id, "")).await?;
        self.make(&r.container_id, "", &r.stdio).await?;
        Ok(ProcessResponse::default())
    }

    async fn start(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("Start", label(&r.container_id, "")).await?;
        Ok(Empty::default())
    }

    async fn exec(&self, _: &TtrpcContext, r: ExecRequest) -> ttrpc::Result<ProcessResponse> {
        self.enter("Exec", label(&r.container_id, &r.exec_id))
            .await?;
        self.make(&r.container_id, &r.exec_id, &r.stdio).await?;
        Ok(ProcessResponse::default())
    }

    async fn wait(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<WaitResponse> {
        self.enter("Wait", label(&r.container_id, &r.exec_id))
            .await?;
        let key = (r.container_id.clone(), r.exec_id.clone());
        let mut guts = self.guts.subscribe();
        let guts = guts
            .wait_for(|guts| guts.processes.get(&key).is_none_or(|it| it.exit.is_some()))
            .await
            .unwrap();
        let process = guts.processes.get(&key);
        let stats = self.stats_of(&r.container_id);
        Ok(WaitResponse {
            exit_status: process
                .and_then(|process| process.exit)
                .ok_or_else(|| refusal(Code::NOT_FOUND))?,
            oom_kills: guts.ooms.get(&r.container_id).copied().unwrap_or(0),
            output_open: guts.shared_output,
            stats: r.exec_id.is_empty().then_some(stats).into(),
            ..WaitResponse::default()
        })
    }

    async fn wait_oom(
        &self,
        _: &TtrpcContext,
        r: WaitOomRequest,
    ) -> ttrpc::Result<WaitOomResponse> {
        let mut guts = self.guts.subscribe();
        let kills = |guts: &Guts| guts.ooms.get(&r.container_id).copied().unwrap_or(0);
        let guts = guts.wait_for(|guts| kills(guts) > r.seen).await.unwrap();
        Ok(WaitOomResponse {
            oom_kills: kills(&guts),
            ..WaitOomResponse::default()
        })
    }

    async fn accept(&self, _: &TtrpcContext, r: AcceptRequest) -> ttrpc::Result<AcceptResponse> {
        let key = (r.container_id.clone(), String::new());
        let claim = self.streams.claim(r.stream)?;
        let mut next = None;
        self.until_ever(|guts| {
            let mut all = lock(&guts.connections);
            let place = all.iter().position(|(id, ..)| *id == r.container_id);
            next = place.and_then(|place| all.remove(place));
            next.is_some() || !guts.processes.contains_key(&key)
        })
        .await;
        let (_, socket, process) = next.ok_or_else(|| refusal(Code::NOT_FOUND))?;
        tokio::spawn(async move {
            if let Ok(stream) = claim.stream().await {
                relay(process, stream).await;
            }
        });
        Ok(AcceptResponse {
            socket,
            ..AcceptResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, r: KillRequest) -> ttrpc::Result<Empty> {
        let rest = format!("{} {}", label(&r.container_id, &r.exec_id), r.signal);
        self.enter("Kill", rest).await?;
        let mut found = false;
        self.guts.send_modify(|guts| {
            for ((container, exec), process) in &mut guts.processes {
                // The others of a container do not survive its first process.
                let named = *exec == r.exec_id || r.exec_id.is_empty();
                if *container == r.container_id && named && process.exit.is_none() {
                    found = true;
                    if r.signal == 9 {
                        process.exit = Some(137);
                        lock(&process.streams).clear();
                    }
                }
            }
        });
        if found {
            Ok(Empty::default())
        } else {
            Err(refusal(Code::NOT_FOUND))
        }
    }

    async fn delete(&self, _: &TtrpcContext, r: ProcessRequest) -> ttrpc::Result<Empty> {
        self.enter("Delete", label(&r.container_id, &r.exec_id))
            .await?;
        let key = (r.container_id.clone(), r.exec_id.clone());
        let mut answer = Err(refusal(Code::NOT_FOUND));
        self.guts
            .send_modify(|guts| match guts.processes.get(&key) {
                None => {}
                Some(Model { exit: None, .. }) => answer = Err(refusal(Code::FAILED_PRECONDITION)),
                Some(_) => {
                    let whole = r.exec_id.is_empty();
                    guts.processes.retain(|(container, exec), _| {
                        *container != r.container_id || (*exec != r.exec_id && !whole)
                    });
                    answer = Ok(Empty::default());
                }
            });
        answer
    }

    async fn ping(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.enter("Ping", String::new()).await?;
        Ok(Empty::default())
    }

    async fn shutdown(&self, _: &TtrpcContext, _: Empty) -> ttrpc::Result<Empty> {
        self.enter("Shutdown", String::new()).await?;
        self.guts.send_modify(|guts| guts.off = true);
        Ok(Empty::default())
    }

    async fn stats(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<StatsResponse> {
        self.enter("Stats", label(&r.container_id, "")).await?;
        Ok(self.stats_of(&r.container_id))
    }

    async fn update(&self, _: &TtrpcContext, r: UpdateRequest) -> ttrpc::Result<UpdateResponse> {
        self.enter("Update", label(&r.container_id, "")).await?;
        Ok(UpdateResponse::default())
    }

    async fn set_up_network(&self, _: &TtrpcContext, r: NetworkRequest) -> ttrpc::Result<Empty> {
        let names: Vec<&str> = r.interfaces.iter().map(|it| it.name.as_str()).collect();
        let names = format!(" {}", names.join(" "));
        self.enter("SetUpNetwork", names).await?;
        Ok(Empty::default())
    }

    async fn freeze(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("Freeze", label(&r.container_id, "")).await?;
        Ok(Empty::default())
    }

    async fn thaw(&self, _: &TtrpcContext, r: ContainerRequest) -> ttrpc::Result<Empty> {
        self.enter("Thaw", label(&r.container_id, "")).await?;
        Ok(Empty::default())
    }

    async fn copy_in(&self, _: &TtrpcContext, r: CopyInRequest) -> ttrpc::Result<Empty> {
        Script::copy_in(self, r).await
    }

    async fn copy_out(&self, _: &TtrpcContext, r: CopyOutRequest) -> ttrpc::Result<Empty> {
        Script::copy_out(self, r).await
    }

    async fn cancel_copy(&self, _: &TtrpcContext, r: CancelCopyRequest) -> ttrpc::Result<Empty> {
        Script::cancel_copy(self, r).await
    }
}
